package proxy

import (
	"maps"
	"slices"
	"strings"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/policy"
	"kuma/internal/resource"
)

// permissions says who may call each inbound by the older TrafficPermissions.
// The most specific one decides alone. MeshTrafficPermission, where any selects
// the inbound, takes its place. With neither nobody may call.
func (w *work) permissions() {
	if w.backend == nil {
		return
	}
	for _, in := range w.out.Inbounds {
		p := w.permission(in.Tags)
		if p == nil {
			continue
		}
		for _, s := range p.Spec.Sources {
			in.Access.Allow = append(in.Access.Allow, envoy.Grant{Policy: p.Name, Callers: sourceOf(w.mesh.Name, s)})
		}
	}
}

// Permits reports whether a TrafficPermission has a destination among the
// Dataplane's inbounds.
func Permits(p *mesh.TrafficPermissionSpec, d *mesh.DataplaneSpec) bool {
	for _, tags := range d.TagSets() {
		if _, ok := rank(p, tags); ok {
			return true
		}
	}
	return false
}

// permission returns the most specific TrafficPermission for an inbound, or nil.
// Among equals the one made last decides.
func (w *work) permission(tags map[string]string) *mesh.TrafficPermission {
	var best *mesh.TrafficPermission
	var bestRank [2]int
	for _, r := range w.mesh.List(mesh.TrafficPermissions.Name) {
		p := mesh.TrafficPermissions.From(r)
		n, ok := rank(p.Spec, tags)
		if !ok {
			continue
		}
		if best == nil || slices.Compare(n[:], bestRank[:]) > 0 || n == bestRank && p.Created.After(best.Created) {
			best, bestRank = &p, n
		}
	}
	return best
}

// rank says how specific a permission is for an inbound with these tags: tags
// with values, then tags with any value, of the best destination. It is false
// where none matches.
func rank(p *mesh.TrafficPermissionSpec, tags map[string]string) (best [2]int, ok bool) {
	for _, d := range p.Destinations {
		if !mesh.MatchTags(d.Match, tags) {
			continue
		}
		n := [2]int{}
		for _, v := range d.Match {
			if v == "*" {
				n[1]++
			} else {
				n[0]++
			}
		}
		if !ok || slices.Compare(n[:], best[:]) > 0 {
			best, ok = n, true
		}
	}
	return best, ok
}

// sourceOf is the condition that a certificate has all the tags.
func sourceOf(meshName string, s mesh.Selector) envoy.Caller {
	var all []envoy.Caller
	for _, k := range slices.Sorted(maps.Keys(s.Match)) {
		if v := s.Match[k]; v == "*" {
			all = append(all, envoy.Caller{NamePrefix: strings.TrimSuffix(names.Tag(meshName, k, ""), "/") + "/"})
		} else {
			all = append(all, envoy.Caller{Name: names.Tag(meshName, k, v)})
		}
	}
	if len(all) == 1 {
		return all[0]
	}
	return envoy.Caller{All: all}
}

// explainPermissions says which TrafficPermissions count.
func (w *work) explainPermissions() policy.Applied {
	out := policy.Applied{Kind: mesh.TrafficPermissions.Kind}
	if w.backend == nil {
		return out
	}
	seen := map[resource.Key]bool{}
	for _, in := range w.out.Inbounds {
		p := w.permission(in.Tags)
		if p == nil {
			continue
		}
		if !seen[p.Key()] {
			seen[p.Key()] = true
			out.Policies = append(out.Policies, p.Resource)
		}
		out.Inbounds = append(out.Inbounds, policy.AppliedInbound{Inbound: in, Conf: p.Spec, Origins: []policy.Origin{{Resource: p.Resource}}})
	}
	return out
}
