package auth

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"kuma/internal/errs"
	"kuma/internal/token"
)

// ErrIssuerOff says, in the contract's words, that this control plane issues no
// tokens of this sort.
var ErrIssuerOff error = &errs.Error{Kind: errs.Invalid, Message: "issuing tokens using the control plane is disabled."}

// IssuerConfig is what an Issuer needs.
type IssuerConfig struct {
	// Users and Proxies are the configuration: which tokens are issued.
	Users   UsersConfig
	Proxies ProxiesConfig
	// Secrets is where keys are.
	Secrets Secrets
	// Log may be nil.
	Log *slog.Logger
}

// Issuer makes tokens. It asks nobody for permission: its callers do.
type Issuer struct {
	cfg      IssuerConfig
	material *material
}

// NewIssuer makes an Issuer.
func NewIssuer(c IssuerConfig) *Issuer {
	c.Log = logger(c.Log)
	return &Issuer{c, newMaterial()}
}

// DataplaneRequest asks for a dataplane token; JSON as POST /tokens/dataplane
// has it.
type DataplaneRequest struct {
	// Name is the only Dataplane that may use the token; empty means any.
	Name string `json:"name"`
	// Mesh is the mesh whose key signs, and in which the token counts.
	Mesh string `json:"mesh"`
	// Tags lists the values that each tag may have.
	Tags map[string][]string `json:"tags"`
	// Type is dataplane, ingress, egress, or empty.
	Type string `json:"type"`
	// Workload is what the label kuma.io/workload must be; empty means any.
	Workload string `json:"workload"`
	// ValidFor is the token's life in Go's syntax; empty means ten years.
	ValidFor string `json:"validFor"`
}

// ZoneRequest asks for a zone token.
type ZoneRequest struct {
	// Zone is the only zone in which the token counts.
	Zone string `json:"zone"`
	// Scope lists what it is for: "ingress", "egress".
	Scope []string `json:"scope"`
	// ValidFor is the token's life in Go's syntax; empty means ten years.
	ValidFor string `json:"validFor"`
}

// UserRequest asks for a user token.
type UserRequest struct {
	// Name is the user's.
	Name string `json:"name"`
	// Groups are the user's.
	Groups []string `json:"groups"`
	// ValidFor is the token's life in Go's syntax.
	ValidFor string `json:"validFor"`
}

// Dataplane makes a dataplane token. Errors: Invalid with fields, NotFound
// where the mesh has no signing key, ErrIssuerOff.
func (i *Issuer) Dataplane(ctx context.Context, r DataplaneRequest) (string, error) {
	var bad []errs.Field
	if r.Mesh == "" {
		bad = append(bad, errs.Field{Path: "mesh", Message: "cannot be empty"})
	}
	if r.Type != "" && !slices.Contains([]string{"dataplane", token.ScopeIngress, token.ScopeEgress}, r.Type) {
		bad = append(bad, errs.Field{Path: "type", Message: r.Type + " is not a valid proxy type"})
	}
	life, bad := validFor(r.ValidFor, bad)
	if err := errs.Fields(bad...); err != nil {
		return "", err
	}
	if !i.cfg.Proxies.DPProxy.DPToken.EnableIssuer {
		return "", ErrIssuerOff
	}
	s, err := i.source(r.Mesh, token.DataplaneKeyPrefix(r.Mesh)).signer(ctx)
	if err != nil {
		return "", err
	}
	return s.Dataplane(token.DataplaneClaims{Name: r.Name, Mesh: r.Mesh, Tags: r.Tags, Type: r.Type, Workload: r.Workload}, life)
}

// Zone makes a zone token. Errors are as for Dataplane.
func (i *Issuer) Zone(ctx context.Context, r ZoneRequest) (string, error) {
	var bad []errs.Field
	if r.Zone == "" {
		bad = append(bad, errs.Field{Path: "zone", Message: "cannot be empty"})
	}
	if len(r.Scope) == 0 {
		bad = append(bad, errs.Field{Path: "scope", Message: "cannot be empty"})
	}
	for n, s := range r.Scope {
		if s != token.ScopeIngress && s != token.ScopeEgress {
			bad = append(bad, errs.Field{Path: fmt.Sprintf("scope[%d]", n), Message: fmt.Sprintf("%q is not a scope; use %q or %q", short(s), token.ScopeIngress, token.ScopeEgress)})
		}
	}
	life, bad := validFor(r.ValidFor, bad)
	if err := errs.Fields(bad...); err != nil {
		return "", err
	}
	if !i.cfg.Proxies.ZoneProxy.ZoneToken.EnableIssuer {
		return "", ErrIssuerOff
	}
	s, err := i.source("", token.ZoneKeyPrefix).signer(ctx)
	if err != nil {
		return "", err
	}
	return s.Zone(token.ZoneClaims{Zone: r.Zone, Scope: r.Scope}, life)
}

// User makes a user token. Errors are as for Dataplane.
func (i *Issuer) User(ctx context.Context, r UserRequest) (string, error) {
	var bad []errs.Field
	if r.Name == "" {
		bad = append(bad, errs.Field{Path: "name", Message: "cannot be empty"})
	}
	life, bad := validFor(r.ValidFor, bad)
	if r.ValidFor == "" {
		bad = append(bad, errs.Field{Path: "validFor", Message: "cannot be empty"})
	}
	if err := errs.Fields(bad...); err != nil {
		return "", err
	}
	if !i.cfg.Users.Tokens.EnableIssuer {
		return "", ErrIssuerOff
	}
	return i.user(ctx, r.Name, r.Groups, life)
}

// AdminToken makes the administrator's own token, whether users may have
// tokens issued or not: for the GlobalSecret admin-user-token.
func (i *Issuer) AdminToken(ctx context.Context) (string, error) {
	return i.user(ctx, AdminName, []string{AdminGroup}, token.DefaultValidity)
}

func (i *Issuer) user(ctx context.Context, name string, groups []string, life time.Duration) (string, error) {
	s, err := i.source("", token.UserKeyPrefix).signer(ctx)
	if err != nil {
		return "", err
	}
	return s.User(token.UserClaims{Name: name, Groups: groups}, life)
}

// Users tells whether user tokens count for anything: not where callers show
// client certificates instead, and then there is no route for them.
func (i *Issuer) Users() bool { return i.cfg.Users.Type != AdminClientCerts }

func (i *Issuer) source(mesh, prefix string) *keySource {
	return &keySource{secrets: i.cfg.Secrets, material: i.material, useSecrets: true, mesh: mesh, prefix: prefix, log: i.cfg.Log}
}

// validFor reads a life; empty means the default.
func validFor(s string, bad []errs.Field) (time.Duration, []errs.Field) {
	if s == "" {
		return token.DefaultValidity, bad
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return 0, append(bad, errs.Field{Path: "validFor", Message: "is invalid: " + err.Error()})
	case d == 0:
		return 0, append(bad, errs.Field{Path: "validFor", Message: "cannot be empty or nil"})
	}
	return d, bad
}
