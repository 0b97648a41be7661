// Package catalog is the one list of what exists: every kind, and every policy
// in the order in which policies apply.
package catalog

import (
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/policy/meshmetric"
	"kuma/internal/policy/meshtimeout"
	"kuma/internal/policy/meshtrafficpermission"
	"kuma/internal/resource"
)

// Policies returns the policies in the order in which they apply (contract).
func Policies() []policy.Policy {
	return []policy.Policy{
		meshtimeout.Policy,
		meshtrafficpermission.Policy,
		meshmetric.Policy,
	}
}

// Kinds returns every kind.
func Kinds() []*resource.Kind {
	kinds := []*resource.Kind{
		mesh.Meshes.Kind,
		mesh.Dataplanes.Kind,
		mesh.DataplaneInsights.Kind,
		mesh.Zones.Kind,
		mesh.Secrets.Kind,
		mesh.GlobalSecrets.Kind,
		mesh.MeshServices.Kind,
		mesh.TrafficPermissions.Kind,
	}
	for _, p := range Policies() {
		kinds = append(kinds, p.Kind())
	}
	return kinds
}
