// Package auth says who is calling, and what they may do: users of the API by
// their token or by being on this machine, proxies by their dataplane token.
//
// A Caller can only be had from a credential that was verified here, so a
// function that takes one can't be handed a header. The rules are the
// contract's, closed by default where it is open.
package auth

import (
	"slices"
	"strings"

	"kuma/internal/token"
)

// Names and groups of the system's own identities.
const (
	// AdminName is the administrator: who holds the admin token, or who is on
	// this machine as the control plane's own user.
	AdminName = "mesh-system:admin"
	// AdminGroup is the administrators' group.
	AdminGroup = "mesh-system:admin"
	// AnonymousName is who showed no credential.
	AnonymousName = "mesh-system:anonymous"
	// AnonymousGroup is the group of those who showed no credential.
	AnonymousGroup = "mesh-system:unauthenticated"
	// AuthenticatedGroup is the group of those who showed a valid credential.
	AuthenticatedGroup = "mesh-system:authenticated"
	// ControlPlaneName is the control plane itself.
	ControlPlaneName = "mesh-system:control-plane"
)

// Caller is an identity that was verified. The zero value is anonymous.
type Caller struct {
	name   string
	groups []string
	system bool
}

// Anonymous is who showed no credential.
func Anonymous() Caller { return Caller{} }

// Admin is the administrator: for start-up and tests. Requests get it from an
// Authenticator.
func Admin() Caller { return Caller{name: AdminName, groups: []string{AdminGroup, AuthenticatedGroup}} }

// ControlPlane is the control plane itself, when it writes on its own behalf.
func ControlPlane() Caller { return Caller{name: ControlPlaneName, system: true} }

// User is the owner of a verified user token. A token that names the control
// plane is a user like others: being the system is no matter of names.
func User(u token.User) Caller {
	if u.Name() == "" {
		return Caller{}
	}
	c := Caller{name: u.Name(), groups: u.Groups()}
	if !slices.Contains(c.groups, AuthenticatedGroup) {
		c.groups = append(c.groups, AuthenticatedGroup)
	}
	c.groups = slices.DeleteFunc(c.groups, func(g string) bool { return g == AnonymousGroup })
	return c
}

// Name is the caller's name.
func (c Caller) Name() string {
	if c.name == "" {
		return AnonymousName
	}
	return c.name
}

// Groups are the caller's groups.
func (c Caller) Groups() []string {
	if c.name == "" {
		return []string{AnonymousGroup}
	}
	return slices.Clone(c.groups)
}

// IsAnonymous reports whether no credential was shown.
func (c Caller) IsAnonymous() bool { return c.name == "" }

// IsControlPlane reports whether the control plane itself calls.
func (c Caller) IsControlPlane() bool { return c.system }

// String is "name/group1,group2", as the contract's messages have it.
func (c Caller) String() string {
	s := c.Name()
	if g := c.Groups(); len(g) > 0 {
		s += "/" + strings.Join(g, ",")
	}
	return s
}

// in reports whether the caller is one of the principals. Nobody is anonymous
// by a list: that is another setting's business.
func (c Caller) in(p Principals) bool {
	if c.IsAnonymous() {
		return false
	}
	return slices.Contains(p.Users, c.name) || slices.ContainsFunc(c.groups, func(g string) bool { return slices.Contains(p.Groups, g) })
}
