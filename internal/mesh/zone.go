package mesh

import "kuma/internal/resource"

// ZoneSpec is a zone: a part of the mesh with a control plane of its own.
type ZoneSpec struct {
	// Enabled lets the zone take part; the default is true.
	Enabled *bool `json:"enabled,omitempty"`
}

// Zones is the kind Zone.
var Zones = resource.Define[ZoneSpec](resource.Kind{
	Name: "Zone", Plural: "zones", Short: "z", Scope: resource.Global, Shape: resource.Flat,
}, nil)
