// Package meshmetric is the policy MeshMetric: which metrics a proxy serves, and
// where.
package meshmetric

import (
	"encoding/json"
	"fmt"
	"regexp"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/resource"
)

// Conf says which metrics a proxy serves, and where. What is left out keeps its
// default.
type Conf struct {
	// Sidecar chooses among the proxy's own metrics.
	Sidecar *Sidecar `json:"sidecar,omitempty"`
	// Applications are endpoints of the workload, whose metrics are served with
	// the proxy's.
	Applications []Application `json:"applications,omitempty"`
	// Backends are where the metrics are to be had. The proxy serves none without
	// one. Where there is one for Prometheus, it takes the place of what
	// Mesh.metrics says, for the selected proxies.
	Backends []Backend `json:"backends,omitempty"`
}

// Sidecar chooses among the proxy's own metrics: those in use, then profiles,
// then what is excluded, then what is included after all.
type Sidecar struct {
	// Profiles are lists of metrics that belong together.
	Profiles *Profiles `json:"profiles,omitempty"`
	// IncludeUnused serves metrics that never changed, too; the default is false.
	IncludeUnused *bool `json:"includeUnused,omitempty"`
}

// Profiles are lists of metrics that belong together.
type Profiles struct {
	// AppendProfiles are put together; the broadest counts. The default is Basic.
	AppendProfiles []Profile `json:"appendProfiles,omitempty"`
	// Exclude drops metrics from the profiles.
	Exclude []Selector `json:"exclude,omitempty"`
	// Include serves metrics whatever else is said of them.
	Include []Selector `json:"include,omitempty"`
}

// Profile names a list of metrics.
type Profile struct {
	// Name is All, Basic (what the dashboards need) or None.
	Name *ProfileName `json:"name,omitempty"`
}

// ProfileName is a list of metrics.
type ProfileName string

// Lists of metrics.
const (
	All   ProfileName = "All"
	Basic ProfileName = "Basic"
	None  ProfileName = "None"
)

// Values lists the profiles.
func (ProfileName) Values() []string { return []string{string(All), string(Basic), string(None)} }

// Selector chooses metrics by name.
type Selector struct {
	// Type is how Match is read: Exact, Prefix, Regex or Contains.
	Type *SelectorType `json:"type,omitempty"`
	// Match is compared with a metric's name.
	Match *string `json:"match,omitempty"`
}

// SelectorType is how a selector compares.
type SelectorType string

// Ways to compare.
const (
	Exact    SelectorType = "Exact"
	Prefix   SelectorType = "Prefix"
	Regex    SelectorType = "Regex"
	Contains SelectorType = "Contains"
)

// Values lists the ways.
func (SelectorType) Values() []string {
	return []string{string(Exact), string(Prefix), string(Regex), string(Contains)}
}

// Application is an endpoint of the workload.
type Application struct {
	// Name tells it from the others.
	Name *string `json:"name,omitempty"`
	// Path is where it serves metrics; the default is /metrics.
	Path *string `json:"path,omitempty"`
	// Address is the workload's; the default is where kuma-dp reaches it.
	Address *string `json:"address,omitempty"`
	// Port is the workload's, 1 to 65535; it is required.
	Port *uint32 `json:"port,omitempty"`
}

// Backend is where metrics are to be had.
type Backend struct {
	// Type is Prometheus; OpenTelemetry is not part of this version.
	Type *BackendType `json:"type,omitempty"`
	// Prometheus goes with the type Prometheus.
	Prometheus *Prometheus `json:"prometheus,omitempty"`
	// OpenTelemetry is not part of this version.
	OpenTelemetry json.RawMessage `json:"openTelemetry,omitempty"`
}

// BackendType is a sort of backend.
type BackendType string

// Sorts of backends.
const (
	PrometheusType    BackendType = "Prometheus"
	OpenTelemetryType BackendType = "OpenTelemetry"
)

// Values lists the sorts.
func (BackendType) Values() []string {
	return []string{string(PrometheusType), string(OpenTelemetryType)}
}

// Prometheus is an endpoint that Prometheus scrapes. It learns of it from the
// control plane (kuma_sd_configs).
type Prometheus struct {
	// ClientID is the client_id of the Prometheus that is meant; the default is
	// every one that no other backend names.
	ClientID *string `json:"clientId,omitempty"`
	// Port is where the proxy serves metrics, at networking.address; the default
	// is 5670.
	Port *uint32 `json:"port,omitempty"`
	// Path is the one path that is served; the default is /metrics.
	Path *string `json:"path,omitempty"`
	// TLS says how the endpoint is secured.
	TLS *TLS `json:"tls,omitempty"`
}

// TLS says how an endpoint is secured.
type TLS struct {
	// Mode is Disabled (the default: plaintext), ProvidedTLS (with the certificate
	// that kuma-dp is given by --metrics-cert-path and --metrics-key-path) or
	// ActiveMTLSBackend (Prometheus must show a certificate of the mesh). What can't
	// be secured as asked for is not served.
	Mode *TLSMode `json:"mode,omitempty"`
}

// TLSMode is how an endpoint is secured.
type TLSMode string

// Modes of an endpoint.
const (
	Disabled          TLSMode = "Disabled"
	ProvidedTLS       TLSMode = "ProvidedTLS"
	ActiveMTLSBackend TLSMode = "ActiveMTLSBackend"
)

// Values lists the modes.
func (TLSMode) Values() []string {
	return []string{string(Disabled), string(ProvidedTLS), string(ActiveMTLSBackend)}
}

// Policy is the kind MeshMetric.
var Policy = policy.New(resource.Kind{
	Name: "MeshMetric", Plural: "meshmetrics", Short: "mm", Federated: true,
	Policy: &resource.PolicyTraits{Default: true},
}, check, apply)

// Limits of one policy, of each list and of names.
const (
	maxItems = 100
	maxText  = 1000
)

func check(s *policy.Spec[Conf]) []errs.Field {
	bad := policy.CheckRefs(s, policy.Allowed{Top: []string{policy.KindMesh, policy.KindDataplane, policy.KindMeshSubset}})
	if len(s.Rules) > 0 {
		bad = append(bad, errs.Field{Path: "spec.rules", Message: "is not supported by this policy"})
	}
	c := s.Default
	if c == nil || c.Sidecar == nil && len(c.Applications) == 0 && len(c.Backends) == 0 {
		return append(bad, errs.Field{Path: "spec.default", Message: "at least one of 'sidecar', 'applications' or 'backends' has to be defined"})
	}
	const at = "spec.default"
	if c.Sidecar != nil && c.Sidecar.Profiles != nil {
		bad = append(bad, checkProfiles(at+".sidecar.profiles", c.Sidecar.Profiles)...)
	}
	for _, l := range []struct {
		name string
		size int
	}{{"applications", len(c.Applications)}, {"backends", len(c.Backends)}} {
		if l.size > maxItems {
			return append(bad, errs.Field{Path: at + "." + l.name, Message: fmt.Sprintf("has %d entries, the limit is %d", l.size, maxItems)})
		}
	}
	for i := range c.Applications {
		bad = append(bad, checkApplication(fmt.Sprintf("%s.applications[%d]", at, i), &c.Applications[i])...)
	}
	return append(bad, checkBackends(at+".backends", c.Backends)...)
}

func checkProfiles(at string, p *Profiles) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: at + path, Message: fmt.Sprintf(format, args...)})
	}
	if n := max(len(p.AppendProfiles), len(p.Include), len(p.Exclude)); n > maxItems {
		add("", "has a list of %d entries, the limit is %d", n, maxItems)
		return bad
	}
	for i, profile := range p.AppendProfiles {
		if profile.Name == nil {
			add(fmt.Sprintf(".appendProfiles[%d].name", i), "must be set, to one of: All, Basic, None")
		}
	}
	for _, l := range []struct {
		name string
		list []Selector
	}{{"exclude", p.Exclude}, {"include", p.Include}} {
		for i, s := range l.list {
			in := fmt.Sprintf(".%s[%d]", l.name, i)
			if s.Type == nil {
				add(in+".type", "must be set, to one of: Exact, Prefix, Regex, Contains")
			}
			switch match := text(s.Match, ""); {
			case match == "":
				add(in+".match", "must not be empty")
			case len(match) > maxText:
				add(in+".match", "has %d characters, the limit is %d", len(match), maxText)
			case s.Type != nil && *s.Type == Regex:
				if _, err := regexp.Compile(match); err != nil {
					add(in+".match", "invalid regex: %v", err)
				}
			}
		}
	}
	return bad
}

func checkApplication(at string, a *Application) (bad []errs.Field) {
	if a.Port == nil || *a.Port < 1 || *a.Port > 65535 {
		bad = append(bad, errs.Field{Path: at + ".port", Message: "port must be in the range [1, 65535]"})
	}
	if a.Path != nil {
		bad = append(bad, mesh.CheckMetricsPath(at+".path", *a.Path)...)
	}
	if a.Address != nil {
		bad = append(bad, mesh.CheckHost(at+".address", *a.Address)...)
	}
	if len(text(a.Name, "")) > maxText {
		bad = append(bad, errs.Field{Path: at + ".name", Message: fmt.Sprintf("has more than %d characters", maxText)})
	}
	return bad
}

func checkBackends(at string, list []Backend) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	clients, ports := map[string]int{}, map[uint32]int{}
	for i := range list {
		b := &list[i]
		in := fmt.Sprintf("%s[%d]", at, i)
		switch {
		case b.Type == nil:
			add(in+".type", "must be set, to Prometheus")
			continue
		case *b.Type == OpenTelemetryType:
			add(in+".type", "OpenTelemetry backends are not part of this version; use Prometheus")
			continue
		case b.OpenTelemetry != nil:
			add(in+".openTelemetry", "must not be set with type Prometheus, and is not part of this version")
			continue
		}
		p := b.Prometheus
		if p == nil {
			p = new(Prometheus)
		}
		if p.Port != nil && (*p.Port < 1 || *p.Port > 65535) {
			add(in+".prometheus.port", "port must be in the range [1, 65535]")
		}
		if p.Path != nil {
			bad = append(bad, mesh.CheckMetricsPath(in+".prometheus.path", *p.Path)...)
		}
		id := text(p.ClientID, "")
		switch {
		case len(id) > 253:
			add(in+".prometheus.clientId", "has %d characters, the limit is 253", len(id))
		case !printable(id):
			add(in+".prometheus.clientId", "must be printable ASCII without spaces")
		}
		if other, dup := clients[id]; dup {
			add(in+".prometheus.clientId", "%q is that of backends[%d] too: a client has one endpoint", id, other)
		}
		clients[id] = i
		port := number(p.Port, mesh.MetricsPort)
		if other, dup := ports[port]; dup {
			add(in+".prometheus.port", "%d is that of backends[%d] too; choose another one", port, other)
		}
		ports[port] = i
	}
	return bad
}

func printable(s string) bool {
	for _, c := range s {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

// Settled is an endpoint for Prometheus with nothing left out.
type Settled struct {
	// Client is "" for those that no backend names.
	Client string
	Port   uint32
	Path   string
	Mode   TLSMode
}

// Settle returns the endpoint with its defaults.
func (p *Prometheus) Settle() Settled {
	if p == nil {
		p = new(Prometheus)
	}
	s := Settled{text(p.ClientID, ""), number(p.Port, mesh.MetricsPort), text(p.Path, mesh.MetricsPath), Disabled}
	if p.TLS != nil && p.TLS.Mode != nil {
		s.Mode = *p.TLS.Mode
	}
	return s
}

// Endpoints returns the endpoints for Prometheus.
func (c *Conf) Endpoints() []Settled {
	var out []Settled
	for i := range c.Backends {
		if b := &c.Backends[i]; b.Type != nil && *b.Type == PrometheusType {
			out = append(out, b.Prometheus.Settle())
		}
	}
	return out
}

func text(s *string, other string) string {
	if s == nil {
		return other
	}
	return *s
}

func number(n *uint32, other uint32) uint32 {
	if n == nil {
		return other
	}
	return *n
}
