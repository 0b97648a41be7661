package auth

import (
	"slices"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// AccessConfig says who may do what (key "access").
type AccessConfig struct {
	// Type is "static": the lists below. There is no other in this version.
	Type string `json:"type"`
	// Anonymous is what callers without a credential may do: "closed" (the
	// default) lets them see the index, health, readiness and the GUI's static
	// files; "contract" lets them read and write as the original does, all but
	// secrets and tokens.
	Anonymous string `json:"anonymous"`
	// Static holds the lists.
	Static StaticAccess `json:"static"`
}

// Values of AccessConfig.Anonymous.
const (
	AnonymousClosed   = "closed"
	AnonymousContract = "contract"
)

// StaticAccess lists who may do what beyond reading and writing the ordinary
// kinds, which every authenticated caller may.
type StaticAccess struct {
	// AdminResources may read and write Secret and GlobalSecret.
	AdminResources Principals `json:"adminResources"`
	// GenerateDPToken may issue dataplane tokens.
	GenerateDPToken Principals `json:"generateDpToken"`
	// GenerateUserToken may issue user tokens.
	GenerateUserToken Principals `json:"generateUserToken"`
	// GenerateZoneToken may issue zone tokens.
	GenerateZoneToken Principals `json:"generateZoneToken"`
	// ViewConfigDump may see a proxy's configuration.
	ViewConfigDump Principals `json:"viewConfigDump" env:"KUMA_ACCESS_STATIC_GET_CONFIG_DUMP"`
	// ViewStats may see a proxy's statistics.
	ViewStats Principals `json:"viewStats"`
	// ViewClusters may see a proxy's clusters.
	ViewClusters Principals `json:"viewClusters"`
	// ControlPlaneMetadata may see the control plane's configuration.
	ControlPlaneMetadata Principals `json:"controlPlaneMetadata"`
}

// Principals are users by name and groups by name.
type Principals struct {
	// Users are names of users.
	Users []string `json:"users"`
	// Groups are names of groups; one in common suffices.
	Groups []string `json:"groups"`
}

// DefaultAccess is the contract's, but for anonymous callers, who are shut out.
func DefaultAccess() AccessConfig {
	admins := func() Principals { return Principals{Users: []string{AdminName}, Groups: []string{AdminGroup}} }
	everyone := func() Principals {
		return Principals{Users: []string{}, Groups: []string{AnonymousGroup, AuthenticatedGroup}}
	}
	return AccessConfig{
		Type: "static", Anonymous: AnonymousClosed,
		Static: StaticAccess{
			AdminResources: admins(), GenerateDPToken: admins(), GenerateUserToken: admins(), GenerateZoneToken: admins(),
			ViewConfigDump: everyone(), ViewStats: everyone(), ViewClusters: everyone(), ControlPlaneMetadata: everyone(),
		},
	}
}

// Action is what a caller may do beyond reading and writing resources.
type Action uint8

// The actions. The zero value is none of them, and refused.
const (
	_ Action = iota
	// GenerateDataplaneToken issues dataplane tokens.
	GenerateDataplaneToken
	// GenerateUserToken issues user tokens.
	GenerateUserToken
	// GenerateZoneToken issues zone tokens.
	GenerateZoneToken
	// ViewConfigDump shows a proxy's configuration.
	ViewConfigDump
	// ViewStats shows a proxy's statistics.
	ViewStats
	// ViewClusters shows a proxy's clusters.
	ViewClusters
	// ViewMetadata shows the control plane's own configuration.
	ViewMetadata
	// ViewKinds shows what the API offers, and counts.
	ViewKinds
	// ViewTLS shows who is connected, from where, and how well that is guarded;
	// it is for those who may see secrets.
	ViewTLS
	// RotateAuthority shows and replaces the control plane's own authority; it is
	// for those who may write secrets.
	RotateAuthority
)

// Access answers who may do what. It never changes.
type Access struct {
	open  bool
	lists StaticAccess
}

// NewAccess makes an Access of a configuration.
func NewAccess(cfg AccessConfig) (*Access, error) {
	if cfg.Type != "" && cfg.Type != "static" {
		return nil, errs.New(errs.Invalid, "access.type: %q is not known; use \"static\"", cfg.Type)
	}
	switch cfg.Anonymous {
	case "", AnonymousClosed, AnonymousContract:
	default:
		return nil, errs.New(errs.Invalid, "access.anonymous: %q is not known; use %q or %q", cfg.Anonymous, AnonymousClosed, AnonymousContract)
	}
	return &Access{open: cfg.Anonymous == AnonymousContract, lists: cfg.Static}, nil
}

// Open reports whether anonymous callers may read and write as in the
// original. The control plane says so at start.
func (a *Access) Open() bool { return a.open }

// Read tells whether the caller may read resources of the kind.
func (a *Access) Read(c Caller, k *resource.Kind) error { return a.resource(c, k) }

// Write tells whether the caller may create, change and delete resources of
// the kind.
func (a *Access) Write(c Caller, k *resource.Kind) error { return a.resource(c, k) }

func (a *Access) resource(c Caller, k *resource.Kind) error {
	var ok bool
	switch {
	case c.system:
		ok = true
	case k.Admin:
		ok = c.in(a.lists.AdminResources)
	default:
		ok = !c.IsAnonymous() || a.open
	}
	if ok {
		return nil
	}
	return errs.New(errs.Denied, "user %q cannot access the resource of type %q", c, k.Name)
}

// Do tells whether the caller may do this.
func (a *Access) Do(c Caller, action Action) error {
	type rule struct {
		allowed Principals
		what    string
	}
	var r rule
	switch action {
	case GenerateDataplaneToken:
		r = rule{a.lists.GenerateDPToken, "generate dataplane token"}
	case GenerateUserToken:
		// The contract's message names nobody here.
		if c.system || c.in(a.lists.GenerateUserToken) {
			return nil
		}
		return errs.New(errs.Denied, "action not allowed")
	case GenerateZoneToken:
		r = rule{a.lists.GenerateZoneToken, "generate zone token"}
	case ViewConfigDump:
		r = rule{a.lists.ViewConfigDump, "envoy proxy info"}
	case ViewStats:
		r = rule{a.lists.ViewStats, "envoy proxy info"}
	case ViewClusters:
		r = rule{a.lists.ViewClusters, "envoy proxy info"}
	case ViewMetadata:
		r = rule{a.lists.ControlPlaneMetadata, "control-plane metadata"}
	case ViewTLS:
		r = rule{a.lists.AdminResources, "the TLS report"}
	case RotateAuthority:
		r = rule{a.lists.AdminResources, "the control plane's authority"}
	case ViewKinds:
		r = rule{Principals{Groups: []string{AuthenticatedGroup, AnonymousGroup}}, "the API's description"}
	}
	if c.system || c.in(r.allowed) {
		return nil
	}
	if c.IsAnonymous() && a.open && slices.Contains(r.allowed.Groups, AnonymousGroup) {
		return nil
	}
	if r.what == "" {
		r.what = "this"
	}
	return errs.New(errs.Denied, "user %q cannot access %s", c, r.what)
}
