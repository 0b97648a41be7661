// Package mesh holds the nouns of the mesh: the kinds of resources that are no
// policies, a file each, with their specifications and checks.
package mesh

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// MeshSpec is a service mesh: a set of proxies that trust one authority and
// see one another's services.
type MeshSpec struct {
	// MTLS encrypts and authenticates every connection between proxies. Off
	// where it is absent or names no enabled backend.
	MTLS *MTLS `json:"mtls,omitempty"`
	// Tracing, Logging and Metrics declare backends that policies refer to.
	Tracing *Tracing `json:"tracing,omitempty"`
	Logging *Logging `json:"logging,omitempty"`
	Metrics *Metrics `json:"metrics,omitempty"`
	// Networking holds settings of all proxies' connections.
	Networking *MeshNetworking `json:"networking,omitempty"`
	// Routing says where traffic may go.
	Routing *Routing `json:"routing,omitempty"`
	// Constraints say which Dataplanes may join.
	Constraints *Constraints `json:"constraints,omitempty"`
	// SkipCreatingInitialPolicies lists policy types of which no default is
	// made for a new mesh; "*" means none at all.
	SkipCreatingInitialPolicies []string `json:"skipCreatingInitialPolicies,omitempty"`
	// MeshServices says whether services are resources of their own.
	MeshServices *MeshServicesMode `json:"meshServices,omitempty"`
}

// MTLS is the mesh's mutual TLS.
type MTLS struct {
	// EnabledBackend names the authority in use; empty means mutual TLS is off.
	EnabledBackend string `json:"enabledBackend,omitempty"`
	// Backends declares authorities; at most one.
	Backends []Backend `json:"backends,omitempty"`
	// SkipValidation lets a backend be stored although it can't be used yet.
	SkipValidation bool `json:"skipValidation,omitempty"`
}

// Backend is an authority that issues the proxies' certificates.
type Backend struct {
	// Name is the backend's name in this mesh.
	Name string `json:"name"`
	// Type is the sort of authority. This version has "builtin".
	Type string `json:"type"`
	// Mode is STRICT (the default: inbounds take mutual TLS alone) or
	// PERMISSIVE (plaintext too, for migration).
	Mode Mode `json:"mode,omitempty"`
	// DPCert is about the certificates of proxies.
	DPCert *DPCert `json:"dpCert,omitempty"`
	// RootChain is about fetching the authority's own certificates.
	RootChain *RootChain `json:"rootChain,omitempty"`
	// Conf is the authority's own configuration, by type.
	Conf json.RawMessage `json:"conf,omitempty"`
}

// Mode is how strictly inbounds demand mutual TLS.
type Mode string

// Modes of a backend.
const (
	Strict     Mode = "STRICT"
	Permissive Mode = "PERMISSIVE"
)

// Values lists the modes.
func (Mode) Values() []string { return []string{string(Strict), string(Permissive)} }

// DPCert is about the certificates of proxies.
type DPCert struct {
	Rotation *Rotation `json:"rotation,omitempty"`
	// RequestTimeout bounds one request to the authority.
	RequestTimeout *resource.ProtoDuration `json:"requestTimeout,omitempty"`
}

// Rotation says how long certificates last.
type Rotation struct {
	// Expiration is one whole number and one unit of y, w, d, h, m, s, ms. The
	// default is 24h; certificates are renewed after two thirds of it.
	Expiration string `json:"expiration,omitempty"`
}

// RootChain is about fetching the authority's own certificates.
type RootChain struct {
	RequestTimeout *resource.ProtoDuration `json:"requestTimeout,omitempty"`
}

// Tracing declares tracing backends.
type Tracing struct {
	DefaultBackend string           `json:"defaultBackend,omitempty"`
	Backends       []TracingBackend `json:"backends,omitempty"`
}

// TracingBackend is where traces may be sent.
type TracingBackend struct {
	Name     string          `json:"name"`
	Sampling *float64        `json:"sampling,omitempty"`
	Type     string          `json:"type,omitempty"`
	Conf     json.RawMessage `json:"conf,omitempty"`
}

// Logging declares access log backends.
type Logging struct {
	DefaultBackend string           `json:"defaultBackend,omitempty"`
	Backends       []LoggingBackend `json:"backends,omitempty"`
}

// LoggingBackend is where access logs may be sent.
type LoggingBackend struct {
	Name   string          `json:"name"`
	Format string          `json:"format,omitempty"`
	Type   string          `json:"type,omitempty"`
	Conf   json.RawMessage `json:"conf,omitempty"`
}

// MeshNetworking holds settings of all proxies' connections.
type MeshNetworking struct {
	Outbound *MeshOutbound `json:"outbound,omitempty"`
}

// MeshOutbound is about traffic that leaves a proxy.
type MeshOutbound struct {
	// Passthrough lets traffic to unknown addresses through a transparent
	// proxy; the default is true.
	Passthrough *bool `json:"passthrough,omitempty"`
}

// Routing says where traffic may go.
type Routing struct {
	// LocalityAwareLoadBalancing prefers endpoints of the proxy's own zone.
	LocalityAwareLoadBalancing bool `json:"localityAwareLoadBalancing,omitempty"`
	// ZoneEgress sends cross-zone traffic through zone egresses; needs mTLS.
	ZoneEgress bool `json:"zoneEgress,omitempty"`
	// DefaultForbidMeshExternalServiceAccess closes external services by default.
	DefaultForbidMeshExternalServiceAccess bool `json:"defaultForbidMeshExternalServiceAccess,omitempty"`
}

// Constraints say which Dataplanes may join.
type Constraints struct {
	DataplaneProxy *ProxyConstraints `json:"dataplaneProxy,omitempty"`
}

// ProxyConstraints say what a Dataplane's tag sets must be like: each must meet
// one of the requirements, if there are any, and none of the restrictions.
type ProxyConstraints struct {
	Requirements []TagRule `json:"requirements,omitempty"`
	Restrictions []TagRule `json:"restrictions,omitempty"`
}

// TagRule matches tag sets that have all these tags; "*" is any value.
type TagRule struct {
	Tags map[string]string `json:"tags"`
}

// MeshServicesMode says whether services are resources of their own.
type MeshServicesMode struct {
	Mode ServicesMode `json:"mode,omitempty"`
}

// ServicesMode is where MeshServices are made and used.
type ServicesMode string

// Modes of meshServices.
const (
	ServicesDisabled   ServicesMode = "Disabled"
	ServicesEverywhere ServicesMode = "Everywhere"
	ServicesReachable  ServicesMode = "ReachableBackends"
	ServicesExclusive  ServicesMode = "Exclusive"
)

// Values lists the modes.
func (ServicesMode) Values() []string {
	return []string{string(ServicesDisabled), string(ServicesEverywhere), string(ServicesReachable), string(ServicesExclusive)}
}

// Meshes is the kind Mesh.
var Meshes = resource.Define(resource.Kind{
	Name: "Mesh", Plural: "meshes", Short: "m", Scope: resource.Global, Shape: resource.Flat,
	Sync: resource.GlobalToZone, Federated: true,
	Columns: []resource.Column{{Name: "mTLS", Path: "mtls"}, {Name: "LOCALITY", Path: "routing.localityAwareLoadBalancing"}, {Name: "ZONEEGRESS", Path: "routing.zoneEgress"}},
}, checkMesh)

// EnabledBackend returns the authority in use, or nil where mutual TLS is off.
func (m *MeshSpec) EnabledBackend() *Backend {
	if m == nil || m.MTLS == nil || m.MTLS.EnabledBackend == "" {
		return nil
	}
	for i := range m.MTLS.Backends {
		if m.MTLS.Backends[i].Name == m.MTLS.EnabledBackend {
			return &m.MTLS.Backends[i]
		}
	}
	return nil
}

// ServicesMode returns the mode of meshServices; Disabled by default.
func (m *MeshSpec) ServicesMode() ServicesMode {
	if m.MeshServices == nil || m.MeshServices.Mode == "" {
		return ServicesDisabled
	}
	return m.MeshServices.Mode
}

// Lifetime returns how long the backend's certificates last; 24 h by default.
func (b *Backend) Lifetime() time.Duration {
	if b.DPCert == nil || b.DPCert.Rotation == nil || b.DPCert.Rotation.Expiration == "" {
		return 24 * time.Hour
	}
	d, err := resource.ParseLife(b.DPCert.Rotation.Expiration)
	if err != nil {
		return 24 * time.Hour
	}
	return d
}

func checkMesh(m *MeshSpec) (bad []errs.Field) {
	if t := m.MTLS; t != nil {
		if len(t.Backends) > 1 {
			bad = append(bad, errs.Field{Path: "mtls.backends", Message: "cannot have more than 1 backends"})
		}
		seen := map[string]bool{}
		for i, b := range t.Backends {
			at := fmt.Sprintf("mtls.backends[%d]", i)
			switch {
			case b.Name == "":
				bad = append(bad, errs.Field{Path: at + ".name", Message: "cannot be empty"})
			case seen[b.Name]:
				bad = append(bad, errs.Field{Path: at + ".name", Message: fmt.Sprintf("%q name is already used for another backend", b.Name)})
			case !dnsLabel.MatchString(b.Name):
				bad = append(bad, errs.Field{Path: at + ".conf.mtls.backends.name", Message: fmt.Sprintf("%q name must be valid dns name", b.Name)})
			}
			seen[b.Name] = true
			if b.DPCert != nil && b.DPCert.Rotation != nil && b.DPCert.Rotation.Expiration != "" {
				if _, err := resource.ParseLife(b.DPCert.Rotation.Expiration); err != nil {
					bad = append(bad, errs.Field{Path: "mtls.dpcert.rotation.expiration", Message: "has to be a valid format"})
				}
			}
		}
		if t.EnabledBackend != "" && !seen[t.EnabledBackend] {
			bad = append(bad, errs.Field{Path: "mtls.enabledBackend", Message: "has to be set to one of the backends in the mesh"})
		}
	}
	if m.Routing != nil && m.Routing.ZoneEgress && m.EnabledBackend() == nil {
		bad = append(bad, errs.Field{Path: "mtls", Message: "has to be set when zoneEgress enabled"})
	}
	bad = append(bad, checkNamedBackends(m)...)
	if c := m.Constraints; c != nil && c.DataplaneProxy != nil {
		for _, l := range []struct {
			name  string
			rules []TagRule
		}{{"requirements", c.DataplaneProxy.Requirements}, {"restrictions", c.DataplaneProxy.Restrictions}} {
			for i, r := range l.rules {
				at := fmt.Sprintf("constraints.dataplaneProxy.%s[%d].tags", l.name, i)
				if len(r.Tags) == 0 {
					bad = append(bad, errs.Field{Path: at, Message: "must have at least one tag"})
				}
				bad = append(bad, checkTags(at, r.Tags, true)...)
			}
		}
	}
	return bad
}

// checkNamedBackends checks what tracing, logging and metrics have in common.
func checkNamedBackends(m *MeshSpec) (bad []errs.Field) {
	check := func(section, defaultField, defaultName string, backends []string) {
		for i, n := range backends {
			if n == "" {
				bad = append(bad, errs.Field{Path: fmt.Sprintf("%s.backends[%d].name", section, i), Message: "cannot be empty"})
			} else if slices.Contains(backends[:i], n) {
				bad = append(bad, errs.Field{Path: fmt.Sprintf("%s.backends[%d].name", section, i), Message: fmt.Sprintf("%q name is already used for another backend", n)})
			}
		}
		if defaultName != "" && !slices.Contains(backends, defaultName) {
			bad = append(bad, errs.Field{Path: section + "." + defaultField, Message: "has to be set to one of the " + section + " backend in mesh"})
		}
	}
	var list []string
	if t := m.Tracing; t != nil {
		for i, b := range t.Backends {
			list = append(list, b.Name)
			if b.Sampling != nil && (*b.Sampling < 0 || *b.Sampling > 100) {
				bad = append(bad, errs.Field{Path: fmt.Sprintf("tracing.backends[%d].sampling", i), Message: "must be in inclusive range [0.0, 100.0]"})
			}
		}
		check("tracing", "defaultBackend", t.DefaultBackend, list)
	}
	list = nil
	if l := m.Logging; l != nil {
		for _, b := range l.Backends {
			list = append(list, b.Name)
		}
		check("logging", "defaultBackend", l.DefaultBackend, list)
	}
	list = nil
	if t := m.Metrics; t != nil {
		for i := range t.Backends {
			list = append(list, t.Backends[i].Name)
			bad = append(bad, checkMetrics(fmt.Sprintf("metrics.backends[%d]", i), &t.Backends[i])...)
		}
		check("metrics", "enabledBackend", t.EnabledBackend, list)
	}
	return bad
}
