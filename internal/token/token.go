// Package token mints and verifies the credentials of proxies, zones and
// users: JSON Web Tokens (RFC 7519) signed with RS256.
//
// The package is pure: it reads no store. A Verifier asks its Keys for public
// keys and revocations. What comes out of a Verifier is one value (Dataplane,
// Zone or User) that nobody else can make; its zero value allows nothing. So
// whoever holds one holds claims that were verified, and nothing else is ever
// read from the token's text.
package token

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kuma/internal/errs"
)

const (
	// MaxSize is the longest token that is read or made, in bytes.
	MaxSize = 8 << 10
	// DefaultValidity is the life of a dataplane or zone token whose request
	// names none: ten years of 365 days.
	DefaultValidity = 10 * 365 * 24 * time.Hour
	// Backdate is how far before its making a token starts to be valid, so
	// that clocks a little behind take it at once.
	Backdate = 5 * time.Second
)

// The contract's names of proxy types and zone scopes in claims.
const (
	ScopeIngress = "ingress"
	ScopeEgress  = "egress"

	serviceTag = "kuma.io/service"
)

// DataplaneClaims say which data plane proxies a token is for. An empty claim
// limits nothing.
type DataplaneClaims struct {
	// Name is the only Dataplane that may use the token.
	Name string
	// Mesh is the only mesh in which the token counts.
	Mesh string
	// Tags lists for each tag the values that the Dataplane may have. It must
	// have the tag.
	Tags map[string][]string
	// Type is the proxy's type: dataplane, ingress or egress.
	Type string
	// Workload is the value that the label kuma.io/workload must have.
	Workload string
}

// ZoneClaims say which zone's proxies a token is for.
type ZoneClaims struct {
	// Zone is the only zone in which the token counts; empty means any.
	Zone string
	// Scope lists what the token may be used for, such as "ingress".
	Scope []string
}

// UserClaims say who a caller of the API is.
type UserClaims struct {
	// Name is the user's name. It is never empty in a verified token.
	Name string
	// Groups are the groups that the user belongs to.
	Groups []string
}

// Stamp is what a verified token says about itself.
type Stamp struct {
	// ID is the claim jti, by which a token is revoked. Foreign tokens may
	// lack it.
	ID string
	// KID is the number of the key that signed the token, normalised.
	KID string
	// Expires is when the token ends.
	Expires time.Time
}

// Dataplane is a verified dataplane token. Only Verifier.Dataplane makes one;
// the zero value allows nothing.
type Dataplane struct {
	claims   DataplaneClaims
	stamp    Stamp
	verified bool
}

// Zone is a verified zone token. Only Verifier.Zone makes one; the zero value
// allows nothing.
type Zone struct {
	claims   ZoneClaims
	stamp    Stamp
	verified bool
}

// User is a verified user token. Only Verifier.User makes one; the zero value
// has no name.
type User struct {
	claims UserClaims
	stamp  Stamp
}

// Claims returns a copy of the token's claims, to show or log. Whether a
// proxy may use the token is for Allows to say.
func (d Dataplane) Claims() DataplaneClaims {
	c := d.claims
	c.Tags = maps.Clone(c.Tags)
	for tag, values := range c.Tags {
		c.Tags[tag] = slices.Clone(values)
	}
	return c
}

// Stamp returns the token's own id, key and end.
func (d Dataplane) Stamp() Stamp { return d.stamp }

// Proxy is what a dataplane token is held against: the fields of a Dataplane
// that claims can name.
type Proxy struct {
	Mesh, Name string
	// Type is the proxy's type; empty means dataplane.
	Type string
	// Workload is the value of the label kuma.io/workload, or empty.
	Workload string
	// Tags holds for each tag every value that any inbound, or the gateway,
	// has.
	Tags map[string][]string
}

// Allows returns nil if every claim that the token carries holds for the
// proxy. A claim that the token lacks limits nothing. Call it for the
// Dataplane that is to be written and for the one that it replaces or
// removes. Errors are Denied.
func (d Dataplane) Allows(p Proxy) error {
	c := d.claims
	if !d.verified {
		return errs.New(errs.Unauthenticated, "authentication failed: no verified token")
	}
	if c.Mesh != "" && c.Mesh != p.Mesh {
		return errs.New(errs.Denied, "authentication failed: proxy mesh from requestor: %s is different than in token: %s", p.Mesh, c.Mesh)
	}
	if c.Name != "" && c.Name != p.Name {
		return errs.New(errs.Denied, "authentication failed: proxy name from requestor: %s is different than in token: %s", p.Name, c.Name)
	}
	if kind := orDataplane(p.Type); c.Type != "" && c.Type != kind {
		return errs.New(errs.Denied, "authentication failed: proxy type from requestor: %s is different than in token: %s", kind, c.Type)
	}
	for _, tag := range slices.Sorted(maps.Keys(c.Tags)) {
		have, want := p.Tags[tag], c.Tags[tag]
		if len(have) == 0 {
			return errs.New(errs.Denied, "dataplane has no tag %q required by the token", tag)
		}
		for _, value := range have {
			if !slices.Contains(want, value) {
				return errs.New(errs.Denied, "dataplane contains tag %q with value %q which is not allowed with this token. Allowed values in token are %q", tag, value, want)
			}
		}
	}
	switch {
	case c.Workload == "" || c.Workload == p.Workload:
		return nil
	case p.Workload == "":
		return errs.New(errs.Denied, "dataplane has no workload label required by the token")
	default:
		return errs.New(errs.Denied, "dataplane workload %q is not allowed with this token. Allowed workload in token is %q", p.Workload, c.Workload)
	}
}

// Bound returns nil if the token names one proxy and its services. Where the
// operator demands bound tokens, others are refused with this error.
func (d Dataplane) Bound() error {
	var lacks []string
	if d.claims.Name == "" {
		lacks = append(lacks, "a name (--name)")
	}
	if len(d.claims.Tags[serviceTag]) == 0 {
		lacks = append(lacks, "services (--tag "+serviceTag+"=...)")
	}
	if d.verified && len(lacks) == 0 {
		return nil
	}
	return errs.New(errs.Denied, "this control plane takes only dataplane tokens that are bound to a name and to services; this one lacks %s", strings.Join(lacks, " and "))
}

func orDataplane(kind string) string {
	if kind == "" {
		return "dataplane"
	}
	return kind
}

// Claims returns a copy of the token's claims, to show or log.
func (z Zone) Claims() ZoneClaims {
	return ZoneClaims{Zone: z.claims.Zone, Scope: slices.Clone(z.claims.Scope)}
}

// Stamp returns the token's own id, key and end.
func (z Zone) Stamp() Stamp { return z.stamp }

// Allows returns nil if the token may be used in the zone for the scope, such
// as ScopeIngress. Errors are Denied.
func (z Zone) Allows(zone, scope string) error {
	if !z.verified {
		return errs.New(errs.Unauthenticated, "authentication failed: no verified token")
	}
	if !slices.Contains(z.claims.Scope, scope) {
		return errs.New(errs.Denied, "token cannot be used to authenticate zone entity (%s is out of token's scope: %s)", scope, fmt.Sprint(z.claims.Scope))
	}
	if z.claims.Zone != "" && z.claims.Zone != zone {
		return errs.New(errs.Denied, "zone from requestor: %s is different than in token: %s", zone, z.claims.Zone)
	}
	return nil
}

// Name returns the user's name; it is empty only for the zero User.
func (u User) Name() string { return u.claims.Name }

// Groups returns the user's groups, a copy.
func (u User) Groups() []string { return slices.Clone(u.claims.Groups) }

// Stamp returns the token's own id, key and end.
func (u User) Stamp() Stamp { return u.stamp }
