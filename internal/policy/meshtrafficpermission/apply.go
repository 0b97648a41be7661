package meshtrafficpermission

import (
	"maps"
	"slices"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/policy"
)

// apply says who may call each inbound that policies select. What an inbound
// had before, such as older permissions, no longer counts there.
//
// Entries of "from" are ordered: for each caller the last one that names it
// decides. Entries of "rules" stand side by side, and a denial wins.
func apply(c *envoy.Config, r policy.Rules[Conf]) error {
	for _, in := range c.Inbounds {
		sources := r.Sources(in)
		if in.Guard == envoy.Open || len(sources) == 0 {
			continue
		}
		var access envoy.Access
		var items []item
		for _, s := range sources {
			name := s.Resource.KRI().String()
			for i := range s.Spec.From {
				f := &s.Spec.From[i]
				items = append(items, item{name, tagsOf(&f.TargetRef), f.Default.Action})
			}
			for i := range s.Spec.Rules {
				d := &s.Spec.Rules[i].Default
				access.Deny = append(access.Deny, grants(name, d.Deny, true)...)
				access.Allow = append(access.Allow, grants(name, d.Allow, false)...)
				access.Allow = append(access.Allow, grants(name, d.AllowWithShadowDeny, false)...)
				access.Shadow = append(access.Shadow, grants(name, d.AllowWithShadowDeny, false)...)
			}
		}
		disjoint(c.Mesh, items, &access)
		in.Access = access
	}
	return nil
}

// grants turns matches into grants. An empty match is refused at the gate; one
// that was stored otherwise means everyone where it denies, else no one.
func grants(policyName string, matches []policy.Match, deny bool) []envoy.Grant {
	var out []envoy.Grant
	for _, m := range matches {
		if m == (policy.Match{}) && !deny {
			continue
		}
		out = append(out, envoy.Grant{Policy: policyName, Callers: m.Caller(), ServerName: m.ServerName()})
	}
	return out
}

// item is an entry of "from": the callers with all these tags.
type item struct {
	policy string
	tags   map[string]string
	action Action
}

// tagsOf turns a targetRef into tags; none means every caller.
func tagsOf(t *policy.TargetRef) map[string]string {
	switch t.Kind {
	case policy.KindMeshSubset:
		return t.Tags
	case policy.KindMeshService:
		return map[string]string{mesh.TagService: t.Name}
	case policy.KindMeshServiceSubset:
		tags := maps.Clone(t.Tags)
		if tags == nil {
			tags = map[string]string{}
		}
		tags[mesh.TagService] = t.Name
		return tags
	}
	return nil
}

// disjoint turns ordered entries into denials and allowances that need no
// order. A denial, and a shadow one, leaves out the callers for whom a later
// entry decides otherwise; an allowance needs no such care, for denials are
// looked at first.
func disjoint(meshName string, items []item, access *envoy.Access) {
	for i, it := range items {
		later := items[i+1:]
		// Nobody is left where a later entry names all these callers.
		if slices.ContainsFunc(later, func(l item) bool { return contains(l.tags, it.tags) }) {
			continue
		}
		callers := caller(meshName, it.tags)
		if it.action == Allow || it.action == AllowWithShadowDeny {
			access.Allow = append(access.Allow, envoy.Grant{Policy: it.policy, Callers: callers})
		}
		if it.action == Allow {
			continue
		}
		all := []envoy.Caller{callers}
		for _, l := range later {
			if l.action != it.action && intersect(l.tags, it.tags) {
				not := caller(meshName, l.tags)
				all = append(all, envoy.Caller{Not: &not})
			}
		}
		if len(all) > 1 {
			callers = envoy.Caller{All: all}
		}
		g := envoy.Grant{Policy: it.policy, Callers: callers}
		if it.action == AllowWithShadowDeny {
			access.Shadow = append(access.Shadow, g)
		} else {
			access.Deny = append(access.Deny, g)
		}
	}
}

// contains reports whether every caller with the tags of small has those of big.
func contains(big, small map[string]string) bool {
	for k, v := range big {
		if w, ok := small[k]; !ok || w != v {
			return false
		}
	}
	return true
}

// intersect reports whether some caller may have both sets of tags. Two values
// of one tag exclude one another, as in the contract; a proxy whose inbounds have
// both is denied if either is.
func intersect(a, b map[string]string) bool {
	for k, v := range a {
		if w, ok := b[k]; ok && w != v {
			return false
		}
	}
	return true
}

// caller is the condition that a certificate has all the tags.
func caller(meshName string, tags map[string]string) envoy.Caller {
	var all []envoy.Caller
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		all = append(all, envoy.Caller{Name: names.Tag(meshName, k, tags[k])})
	}
	switch len(all) {
	case 0:
		return envoy.Caller{}
	case 1:
		return all[0]
	}
	return envoy.Caller{All: all}
}
