package proxy

import (
	"maps"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/state"
)

// endpointSet is a packed endpoint set. Where names had to be resolved it holds
// for one generation only.
type endpointSet struct {
	packed   *envoy.Packed
	resolved bool
	missing  []string
}

// endpoints packs a destination's endpoints, once for all proxies.
func (w *work) endpoints(t *target) *envoy.Packed {
	local := ""
	if w.mesh.Spec.Routing != nil && w.mesh.Spec.Routing.LocalityAwareLoadBalancing {
		local = w.cfg.Zone
	}
	type key struct {
		g                       *Generator
		cluster, service, local string
	}
	k := key{g: w.Generator, cluster: t.cluster, local: local}
	if t.service != nil {
		k.service = t.service.Name
	}
	compute := func() endpointSet { return w.pack(t, local) }
	var set endpointSet
	if t.service != nil {
		set = state.Shared(w.mesh, k, compute)
	} else {
		set = state.SharedByDataplanes(w.mesh, k, compute)
	}
	if set.resolved {
		set = compute()
	}
	for _, host := range set.missing {
		w.out.Report(w.dp.Key(), "an endpoint of %s is left out: the address %q of its proxy can't be resolved", t.Name(), host)
	}
	return set.packed
}

// peers returns the ready inbounds behind a destination.
func (w *work) peers(t *target) []state.Endpoint {
	var out []state.Endpoint
	if t.service == nil {
		for _, e := range w.mesh.Endpoints(t.Service) {
			if e.Inbound.IsReady() && mesh.MatchTags(t.Tags, e.Inbound.Tags) {
				out = append(out, e)
			}
		}
		return out
	}
	for _, r := range w.mesh.List(mesh.Dataplanes.Name) {
		d := mesh.Dataplanes.From(r)
		if d.Spec.Networking == nil {
			continue
		}
		for i := range d.Spec.Networking.Inbound {
			in := &d.Spec.Networking.Inbound[i]
			if in.IsReady() && t.port.Target(in) && t.service.Spec.Selects(d.Name, d.Labels, in) {
				out = append(out, state.Endpoint{Dataplane: d, Inbound: in})
			}
		}
	}
	return out
}

func (w *work) pack(t *target, local string) (set endpointSet) {
	zones := map[string]*endpointv3.LocalityLbEndpoints{}
	for _, e := range w.peers(t) {
		host := e.Inbound.ReachAddress(e.Dataplane.Spec.Networking)
		ips := w.addresses(host)
		if len(ips) != 1 || ips[0] != host {
			set.resolved = true
		}
		if len(ips) == 0 {
			set.missing = append(set.missing, host)
		}
		zone := e.Inbound.Tags[mesh.TagZone]
		group := zones[zone]
		if group == nil {
			group = &endpointv3.LocalityLbEndpoints{}
			if zone != "" {
				group.Locality = &corev3.Locality{Zone: zone}
			}
			if local != "" && zone != local {
				group.Priority = 1
			}
			zones[zone] = group
		}
		for _, ip := range ips {
			group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: envoy.Address(ip, e.Inbound.Port)}},
				Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
					"envoy.lb":                     {Fields: stringFields(e.Inbound.Tags, mesh.TagService)},
					"envoy.transport_socket_match": {Fields: stringFields(e.Inbound.Tags, mesh.TagService)},
					"io.kuma.labels":               {Fields: stringFields(e.Dataplane.Labels)},
				}},
				LoadBalancingWeight: wrapperspb.UInt32(1),
			})
		}
	}
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: t.cluster}
	lowest := uint32(1)
	for _, z := range slices.Sorted(maps.Keys(zones)) {
		if len(zones[z].LbEndpoints) > 0 {
			cla.Endpoints = append(cla.Endpoints, zones[z])
			lowest = min(lowest, zones[z].Priority)
		}
	}
	// Priorities start at 0.
	for _, z := range cla.Endpoints {
		z.Priority -= lowest
	}
	packed, err := envoy.Pack(t.cluster, cla)
	if err != nil {
		// Only text that is not UTF-8 can't be packed, and JSON has none.
		packed = &envoy.Packed{Name: t.cluster}
	}
	set.packed = packed
	return set
}
