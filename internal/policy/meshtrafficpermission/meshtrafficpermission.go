// Package meshtrafficpermission is the policy MeshTrafficPermission: who may
// call whom.
package meshtrafficpermission

import (
	"fmt"

	"kuma/internal/errs"
	"kuma/internal/policy"
	"kuma/internal/resource"
)

// Conf says what callers may do. An entry of "from" has an Action, an entry of
// "rules" has lists.
type Conf struct {
	// Action is for the callers that the entry of "from" names.
	Action Action `json:"action,omitempty"`
	// Allow lists callers who may call.
	Allow []policy.Match `json:"allow,omitempty"`
	// Deny lists callers who may not, whatever any policy allows.
	Deny []policy.Match `json:"deny,omitempty"`
	// AllowWithShadowDeny lists callers who may call, and whose calls are counted
	// as if they were denied.
	AllowWithShadowDeny []policy.Match `json:"allowWithShadowDeny,omitempty"`
}

// FromWarning is what a user of "from" is told.
func (Conf) FromWarning() string {
	return "'from' field is deprecated, use 'rules' with MeshIdentity and 'spiffeID' instead; 'from' will be removed in 3.0"
}

// Action is what becomes of a call.
type Action string

// Actions.
const (
	Allow               Action = "Allow"
	Deny                Action = "Deny"
	AllowWithShadowDeny Action = "AllowWithShadowDeny"
)

// Values lists the actions.
func (Action) Values() []string {
	return []string{string(Allow), string(Deny), string(AllowWithShadowDeny)}
}

// Policy is the kind MeshTrafficPermission.
var Policy = policy.New(resource.Kind{
	Name: "MeshTrafficPermission", Plural: "meshtrafficpermissions", Short: "mtp", Federated: true,
	Policy: &resource.PolicyTraits{From: true, Rules: true},
}, check, apply)

func check(s *policy.Spec[Conf]) []errs.Field {
	bad := policy.CheckRefs(s, policy.Allowed{
		Top:     []string{policy.KindMesh, policy.KindDataplane, policy.KindMeshSubset, policy.KindMeshService, policy.KindMeshServiceSubset},
		From:    []string{policy.KindMesh, policy.KindMeshSubset, policy.KindMeshService, policy.KindMeshServiceSubset},
		Section: true,
	})
	if len(s.From) == 0 && len(s.Rules) == 0 {
		bad = append(bad, errs.Field{Path: "spec", Message: "at least one of 'from' or 'rules' has to be defined"})
	}
	for i := range s.From {
		at := fmt.Sprintf("spec.from[%d].default", i)
		c := &s.From[i].Default
		if c.Action == "" {
			bad = append(bad, errs.Field{Path: at + ".action", Message: "must be defined"})
		}
		for _, l := range c.lists() {
			if len(l.matches) > 0 {
				bad = append(bad, errs.Field{Path: at + "." + l.name, Message: "must not be set in 'from', use 'rules'"})
			}
		}
	}
	for i := range s.Rules {
		at := fmt.Sprintf("spec.rules[%d]", i)
		r := &s.Rules[i]
		if len(r.Matches) > 0 {
			bad = append(bad, errs.Field{Path: at + ".matches", Message: "is not supported by MeshTrafficPermission, put matches into 'allow', 'deny' or 'allowWithShadowDeny'"})
		}
		if r.Default.Action != "" {
			bad = append(bad, errs.Field{Path: at + ".default.action", Message: "must not be set in 'rules', use 'allow', 'deny' or 'allowWithShadowDeny'"})
		}
		entries := 0
		for _, l := range r.Default.lists() {
			entries += len(l.matches)
			if len(l.matches) > policy.MaxItems {
				bad = append(bad, errs.Field{Path: at + ".default." + l.name, Message: fmt.Sprintf("has %d entries, the limit is %d", len(l.matches), policy.MaxItems)})
				continue
			}
			for j, m := range l.matches {
				// The contract leaves "default" out of this path.
				bad = append(bad, m.Check(fmt.Sprintf("%s.%s[%d]", at, l.name, j))...)
			}
		}
		if entries == 0 {
			bad = append(bad, errs.Field{Path: at, Message: "at least one of 'allow', 'allowWithShadowDeny', 'deny' has to be defined"})
		}
	}
	return bad
}

type list struct {
	name    string
	matches []policy.Match
}

func (c *Conf) lists() []list {
	return []list{{"allow", c.Allow}, {"allowWithShadowDeny", c.AllowWithShadowDeny}, {"deny", c.Deny}}
}
