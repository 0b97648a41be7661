package mesh

import (
	"fmt"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// TrafficPermissionSpec lets sources call destinations, both chosen by tags.
// It is the older form of MeshTrafficPermission, kept because the contract's
// users have it; where any MeshTrafficPermission targets an inbound, this kind
// has no say there.
type TrafficPermissionSpec struct {
	// Sources are the callers.
	Sources []Selector `json:"sources"`
	// Destinations are the inbounds that may be called.
	Destinations []Selector `json:"destinations"`
}

// Selector chooses by tags; "*" is any value.
type Selector struct {
	Match map[string]string `json:"match"`
}

// TrafficPermissions is the kind TrafficPermission.
var TrafficPermissions = resource.Define(resource.Kind{
	Name: "TrafficPermission", Plural: "traffic-permissions", Singular: "traffic-permission", Scope: resource.Mesh, Shape: resource.Flat,
	Sync: resource.GlobalToZone, Federated: true, Policy: &resource.PolicyTraits{},
}, checkTrafficPermission)

// TrafficPermission is a TrafficPermission resource.
type TrafficPermission = resource.Object[TrafficPermissionSpec]

func checkTrafficPermission(s *TrafficPermissionSpec) (bad []errs.Field) {
	for _, l := range []struct {
		name string
		list []Selector
	}{{"sources", s.Sources}, {"destinations", s.Destinations}} {
		if len(l.list) == 0 {
			bad = append(bad, errs.Field{Path: l.name, Message: "must have at least one element"})
		}
		for i, sel := range l.list {
			at := fmt.Sprintf("%s[%d].match", l.name, i)
			if len(sel.Match) == 0 {
				bad = append(bad, errs.Field{Path: at, Message: "must have at least one tag"})
			} else if sel.Match[TagService] == "" {
				bad = append(bad, errs.Field{Path: at, Message: fmt.Sprintf("mandatory tag %q is missing", TagService)})
			}
			bad = append(bad, checkTags(at, sel.Match, true)...)
		}
	}
	return bad
}
