package auth

import (
	"context"
	"log/slog"
	"strings"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/token"
)

// ProxiesConfig is how proxies are authenticated (key "dpServer.authn").
type ProxiesConfig struct {
	// DPProxy is about data plane proxies.
	DPProxy DPProxyConfig `json:"dpProxy"`
	// ZoneProxy is about zone ingresses and egresses.
	ZoneProxy ZoneProxyConfig `json:"zoneProxy"`
	// EnableReloadableTokens has Envoy read its token from a file, so that it
	// can change without a restart.
	EnableReloadableTokens bool `json:"enableReloadableTokens"`
}

// DPProxyConfig is about data plane proxies.
type DPProxyConfig struct {
	// Type is "dpToken" (empty means that), or "none": then any proxy may
	// claim to be any other.
	Type string `json:"type"`
	// DPToken is about dataplane tokens.
	DPToken DPTokenConfig `json:"dpToken"`
}

// DPTokenConfig is about dataplane tokens.
type DPTokenConfig struct {
	// EnableIssuer lets administrators have tokens issued by the API.
	EnableIssuer bool `json:"enableIssuer"`
	// RequireBound refuses tokens that do not name one proxy and its services.
	RequireBound bool `json:"requireBound"`
	// Validator says which keys verify tokens.
	Validator ValidatorConfig `json:"validator"`
}

// ZoneProxyConfig is about zone ingresses and egresses.
type ZoneProxyConfig struct {
	// Type is "zoneToken" (empty means that), or "none".
	Type string `json:"type"`
	// ZoneToken is about zone tokens.
	ZoneToken ZoneTokenConfig `json:"zoneToken"`
}

// ZoneTokenConfig is about zone tokens.
type ZoneTokenConfig struct {
	// EnableIssuer lets administrators have tokens issued by the API.
	EnableIssuer bool `json:"enableIssuer"`
	// Validator says which keys verify tokens.
	Validator ValidatorConfig `json:"validator"`
}

// Values of DPProxyConfig.Type.
const (
	ProxyTokens = "dpToken"
	ProxyNone   = "none"
)

// DefaultProxies is the contract's.
func DefaultProxies() ProxiesConfig {
	v := func() ValidatorConfig { return ValidatorConfig{UseSecrets: true, PublicKeys: []PublicKey{}} }
	return ProxiesConfig{
		DPProxy:   DPProxyConfig{DPToken: DPTokenConfig{EnableIssuer: true, Validator: v()}},
		ZoneProxy: ZoneProxyConfig{ZoneToken: ZoneTokenConfig{EnableIssuer: true, Validator: v()}},
	}
}

// ProxyCheckerConfig is what a ProxyChecker needs.
type ProxyCheckerConfig struct {
	// Proxies is the configuration.
	Proxies ProxiesConfig
	// Secrets is where keys and revocations are.
	Secrets Secrets
	// Hint is added to the error of a token that does not verify.
	Hint string
	// Log may be nil.
	Log *slog.Logger
}

// ProxyChecker verifies the credentials of data plane proxies.
type ProxyChecker struct {
	none, bound bool
	useSecrets  bool
	static      []parsedKey
	secrets     Secrets
	material    *material
	hint        string
	log         *slog.Logger
}

// NewProxyChecker makes a ProxyChecker. Errors are Invalid.
func NewProxyChecker(c ProxyCheckerConfig) (*ProxyChecker, error) {
	dp := c.Proxies.DPProxy
	switch dp.Type {
	case "", ProxyTokens, ProxyNone:
	default:
		return nil, errs.New(errs.Invalid, "dpServer.authn.dpProxy.type: there is no authentication named %q here; use %q or %q", dp.Type, ProxyTokens, ProxyNone)
	}
	static, err := parsePublicKeys("dpServer.authn.dpProxy.dpToken.validator", dp.DPToken.Validator.PublicKeys)
	if err != nil {
		return nil, err
	}
	return &ProxyChecker{
		none: dp.Type == ProxyNone, bound: dp.DPToken.RequireBound, useSecrets: dp.DPToken.Validator.UseSecrets,
		static: static, secrets: c.Secrets, material: newMaterial(), hint: c.Hint, log: logger(c.Log),
	}, nil
}

// Off reports whether proxies need no credential (type "none").
func (p *ProxyChecker) Off() bool { return p.none }

// Proxy is a data plane proxy whose credential was verified. Only a
// ProxyChecker makes one; the zero value covers nothing.
type Proxy struct {
	mesh, name string
	raw        string
	token      token.Dataplane
	none       bool
}

// Mesh is the mesh that the proxy asked for, and whose key its token has.
func (p Proxy) Mesh() string { return p.mesh }

// Name is the name that the proxy asked for.
func (p Proxy) Name() string { return p.name }

// Stamp is the token's id, key and end; zero where credentials are off.
func (p Proxy) Stamp() token.Stamp { return p.token.Stamp() }

// Claims are the token's claims; zero where credentials are off.
func (p Proxy) Claims() token.DataplaneClaims { return p.token.Claims() }

// Verify checks a raw token (no "Bearer") for the proxy of this mesh and name:
// key, signature, life, revocation, and the claims that name mesh and name.
// Whether it covers a Dataplane is for Covers. Errors are Unauthenticated or
// Denied.
func (p *ProxyChecker) Verify(ctx context.Context, mesh, name, raw string) (Proxy, error) {
	if p.none {
		return Proxy{mesh: mesh, name: name, none: true}, nil
	}
	raw = strings.TrimSpace(raw)
	if raw == "" {
		return Proxy{}, errs.New(errs.Unauthenticated, "authentication failed: the proxy sent no token")
	}
	keys := &keySource{
		secrets: p.secrets, material: p.material, static: p.static, useSecrets: p.useSecrets, mesh: mesh,
		prefix:      token.DataplaneKeyPrefix(mesh),
		revocations: []place{{mesh, token.DataplaneRevocations(mesh)}, {"", token.DataplaneRevocations(mesh)}},
		log:         p.log,
	}
	verified, err := token.New(token.Config{Keys: keys, Hint: p.hint}).Dataplane(ctx, raw)
	if err != nil {
		return Proxy{}, errs.New(errs.KindOf(err), "authentication failed: %w", err)
	}
	c := verified.Claims()
	if c.Mesh != "" && c.Mesh != mesh {
		return Proxy{}, errs.New(errs.Denied, "authentication failed: proxy mesh from requestor: %s is different than in token: %s", mesh, c.Mesh)
	}
	if c.Name != "" && c.Name != name {
		return Proxy{}, errs.New(errs.Denied, "authentication failed: proxy name from requestor: %s is different than in token: %s", name, c.Name)
	}
	if p.bound {
		if err := verified.Bound(); err != nil {
			return Proxy{}, err
		}
	}
	return Proxy{mesh: mesh, name: name, raw: raw, token: verified}, nil
}

// Again verifies the same token once more: after secrets changed, for a stream
// that was opened with it. An error means that the stream must end.
func (p *ProxyChecker) Again(ctx context.Context, proxy Proxy) error {
	if proxy.none != p.none {
		return errs.New(errs.Unauthenticated, "authentication failed: no verified token")
	}
	_, err := p.Verify(ctx, proxy.mesh, proxy.name, proxy.raw)
	return err
}

// Covers tells whether the proxy may be this Dataplane: every claim that its
// token carries must hold for every matching field. Ask for the Dataplane that
// is to be written and for the one that it replaces or deletes. Errors are
// Denied.
func (p Proxy) Covers(d mesh.Dataplane) error {
	if d.Mesh != p.mesh || d.Name != p.name || p.name == "" {
		return errs.New(errs.Denied, "the proxy %q of mesh %q can't be the Dataplane %q of mesh %q", p.name, p.mesh, d.Name, d.Mesh)
	}
	if p.none {
		return nil
	}
	return p.token.Allows(token.Proxy{
		Mesh: d.Mesh, Name: d.Name, Type: "dataplane",
		Workload: d.Labels[mesh.LabelWorkload], Tags: d.Spec.Tags(),
	})
}
