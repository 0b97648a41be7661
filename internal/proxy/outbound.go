package proxy

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/policy"
	"kuma/internal/resource"
	"kuma/internal/state"
)

// catchAll is the contract's name of the route that takes every request.
const catchAll = "9Zuf5Tg79OuZcQITwBbQykxAk2u4fRKrwYn3//AL4Yo="

// target is a destination with all that its cluster needs.
type target struct {
	envoy.Destination
	// cluster, routes and unified are names.
	cluster, routes, unified string
	sni                      string
	// peers are the SPIFFE ids that may answer; none means any of the mesh.
	peers []string
	// ready says that all peers have certificates.
	ready bool
	// service is the MeshService, for its endpoints.
	service *mesh.MeshService
	port    *mesh.ServicePort
}

// unit is one outbound with policies applied, which proxies share.
type unit struct {
	// out is nil where there is nothing to make.
	out    *envoy.Outbound
	target *target
	issues []string
	failed policy.Prepared
	err    error
}

// unitKey is all that a unit depends on besides the mesh's rules, that is, its
// resources other than Dataplanes and their insights.
type unitKey struct {
	g        *Generator
	link     bool
	identity bool
	address  string
	port     uint32
	to       string
	policies string
	peers    peerFacts
}

// peerFacts is what an outbound depends on of the proxies behind a service.
type peerFacts struct {
	protocol string
	// ready says that all have certificates.
	ready bool
}

// facts finds out about the proxies behind an outbound. A MeshService says these
// things of itself.
func (w *work) facts(o *mesh.Outbound) peerFacts {
	if o.BackendRef != nil {
		return peerFacts{}
	}
	service := o.Tags[mesh.TagService]
	return peerFacts{w.protocol(service), w.mesh.TLSReady(service)}
}

// outbounds makes each outbound. Proxies with the same inputs share it: they see
// the same rules, and nothing else than the key goes in.
func (w *work) outbounds(policies []policy.Prepared, except []resource.Key, share bool) (failed policy.Prepared, err error) {
	if len(w.net.Outbound) == 0 {
		return nil, nil
	}
	key := unitKey{g: w.Generator, link: w.proxy.Link, identity: len(w.dp.Spec.Services()) > 0}
	if share {
		var b []byte
		for _, p := range policies {
			b = p.Towards(b, w.dp)
		}
		key.policies = string(b)
	}
	sets := map[string]bool{}
	for i := range w.net.Outbound {
		o := &w.net.Outbound[i]
		key.peers = w.facts(o)
		compute := func() *unit { return w.unit(o, key.peers, key.identity, policies, except) }
		var u *unit
		if share {
			key.address, key.port, key.to = o.ListenAddress(), o.Port, describe(o)
			u = state.SharedByRules(w.mesh, key, func() *unit {
				u := compute()
				if u.err == nil && u.out != nil {
					u.err = u.out.Seal()
				}
				return u
			})
		} else {
			u = compute()
		}
		if u.err != nil {
			return u.failed, u.err
		}
		for _, m := range u.issues {
			w.out.Report(w.dp.Key(), "%s", m)
		}
		if u.out == nil {
			continue
		}
		w.out.Outbounds = append(w.out.Outbounds, u.out)
		if u.out.Cluster != nil && !sets[u.target.cluster] {
			sets[u.target.cluster] = true
			w.out.Endpoints = append(w.out.Endpoints, w.endpoints(u.target))
		}
	}
	return nil, nil
}

// describe tells where an outbound leads from where any other does.
func describe(o *mesh.Outbound) string {
	if r := o.BackendRef; r != nil {
		return fmt.Sprintf("%q %q %d %q", r.Kind, r.Name, r.Port, mesh.FormatTags(r.Labels))
	}
	if len(o.Tags) == 1 {
		return o.Tags[mesh.TagService]
	}
	return mesh.FormatTags(o.Tags)
}

// unit makes one outbound and applies policies to it alone.
func (w *work) unit(o *mesh.Outbound, peers peerFacts, identity bool, policies []policy.Prepared, except []resource.Key) *unit {
	t, err := w.target(o, peers)
	if err != nil {
		return &unit{issues: []string{fmt.Sprintf("outbound %d is left out: %s", o.Port, err)}}
	}
	u := &unit{out: w.outbound(o, t), target: t}
	if w.secured(t) && !identity {
		u.issues = append(u.issues, fmt.Sprintf("can't reach %s: this proxy has no %s tag, so it gets no certificate; give it an inbound or a gateway with that tag", t.Name(), mesh.TagService))
	} else {
		u.out.Cluster = w.cluster(t)
	}
	c := &envoy.Config{Mesh: w.mesh.Name, Outbounds: []*envoy.Outbound{u.out}}
	for _, p := range policies {
		if err := p.Apply(c, w.dp, except); err != nil {
			return &unit{failed: p, err: err}
		}
	}
	return u
}

// secured reports whether connections to the destination use mutual TLS. They
// don't only where the mesh has none, or is PERMISSIVE and not all peers have
// certificates.
func (w *work) secured(t *target) bool {
	return w.backend != nil && (w.backend.Mode != mesh.Permissive || t.ready)
}

// target finds out where an outbound leads.
func (w *work) target(o *mesh.Outbound, peers peerFacts) (*target, error) {
	if o.BackendRef != nil {
		return w.realTarget(o)
	}
	service := o.Tags[mesh.TagService]
	t := &target{
		Destination: envoy.Destination{Service: service, Tags: o.Tags, Protocol: peers.protocol},
		cluster:     service, routes: "outbound:" + service,
		peers: []string{names.SPIFFE(w.mesh.Name, service)},
		ready: peers.ready,
	}
	subset := maps.Clone(o.Tags)
	delete(subset, mesh.TagService)
	if len(subset) > 0 {
		h := fnv.New64a()
		_, _ = h.Write([]byte(mesh.FormatTags(subset)))
		t.cluster = fmt.Sprintf("%s-%016x", service, h.Sum64())
	}
	t.sni = bounded(names.TagSNI(service, w.mesh.Name, subset))
	return t, nil
}

// bounded keeps a server name within the 255 bytes that Envoy takes. Proxies
// don't route by it.
func bounded(sni string) string {
	if len(sni) <= 255 {
		return sni
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(sni))
	return fmt.Sprintf("%s%016x", sni[:239], h.Sum64())
}

// protocol is what a service's endpoints speak, or spoke when there were any.
func (w *work) protocol(service string) string {
	type key struct{ service string }
	p := state.SharedByDataplanes(w.mesh, key{service}, func() string { return w.mesh.Protocol(service) })
	if p == "" {
		p = w.mesh.Remembered(service)
	}
	if p == "" {
		p = envoy.TCP
	}
	return p
}

// find returns the MeshService that an outbound refers to, or nil.
func find(m *state.Mesh, o *mesh.Outbound) *mesh.MeshService {
	if o.BackendRef.Name != "" {
		if r := m.Get(mesh.MeshServices.Name, o.BackendRef.Name); r != nil {
			s := mesh.MeshServices.From(r)
			return &s
		}
		return nil
	}
	for _, r := range m.List(mesh.MeshServices.Name) {
		if refers(o, r) {
			s := mesh.MeshServices.From(r)
			return &s
		}
	}
	return nil
}

// refers reports whether an outbound may mean the MeshService.
func refers(o *mesh.Outbound, r *resource.Resource) bool {
	switch {
	case o.BackendRef == nil:
		return false
	case o.BackendRef.Name != "":
		return o.BackendRef.Name == r.Name
	default:
		return mesh.MatchTags(o.BackendRef.Labels, r.Labels)
	}
}

func (w *work) realTarget(o *mesh.Outbound) (*target, error) {
	s := find(w.mesh, o)
	if s == nil {
		if o.BackendRef.Name != "" {
			return nil, fmt.Errorf("MeshService %q does not exist", o.BackendRef.Name)
		}
		return nil, fmt.Errorf("no MeshService has the labels %s", mesh.FormatTags(o.BackendRef.Labels))
	}
	i := slices.IndexFunc(s.Spec.Ports, func(p mesh.ServicePort) bool { return p.Port == o.BackendRef.Port })
	if i < 0 {
		return nil, fmt.Errorf("MeshService %q has no port %d", s.Name, o.BackendRef.Port)
	}
	port := &s.Spec.Ports[i]
	zone := s.Labels[mesh.LabelZone]
	kri := s.KRI()
	kri.Section = port.Section()
	t := &target{
		Destination: envoy.Destination{
			MeshService: s.DisplayName(), Namespace: s.Labels[mesh.LabelNamespace], Zone: zone, Labels: s.Labels,
			Section: port.Section(), Port: port.Port, KRI: kri, Protocol: port.Protocol(),
		},
		cluster: names.Destination(w.mesh.Name, s.DisplayName(), s.Labels[mesh.LabelNamespace], zone, mesh.MeshServices.Short, port.Port),
		routes:  kri.String(), unified: kri.String(),
		sni:     bounded(names.HashSNI(s.DisplayName(), w.mesh.Name, port.Port, "ms", nil)),
		service: s, port: port,
	}
	for _, id := range s.Spec.Identities {
		switch id.Type {
		case mesh.IdentityTag:
			t.peers = append(t.peers, names.SPIFFE(w.mesh.Name, id.Value))
		case mesh.IdentitySPIFFE:
			t.peers = append(t.peers, id.Value)
		}
	}
	if status, ok := s.Status.(*mesh.MeshServiceStatus); ok && status.TLS != nil {
		t.ready = status.TLS.Status == "Ready"
	}
	return t, nil
}

func (w *work) outbound(o *mesh.Outbound, t *target) *envoy.Outbound {
	address := o.ListenAddress()
	out := &envoy.Outbound{
		Address: address, Port: o.Port, To: t.Destination,
		Listener: &listenerv3.Listener{
			Name: names.Outbound(address, o.Port), Address: envoy.Address(address, o.Port), TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		},
	}
	if t.Service != "" {
		out.Metadata = tagsMetadata(map[string]string{mesh.TagService: t.Service}, "")
	} else {
		out.Metadata = tagsMetadata(nil, t.unified)
	}
	if !envoy.IsHTTP(t.Protocol) {
		out.Stream = &tcpproxyv3.TcpProxy{
			StatPrefix:       names.StatPrefix(t.cluster),
			ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: t.cluster},
			IdleTimeout:      durationpb.New(outboundIdle),
			// The next attempt may go to another endpoint; none is made once a
			// connection stands.
			MaxConnectAttempts: wrapperspb.UInt32(5),
		}
		return out
	}
	out.HTTP = w.http(names.StatPrefix(t.cluster), t.routes, t.cluster, t.Protocol, &routev3.Route{
		Name: catchAll, Match: anyPath(),
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: t.cluster},
			Timeout:          durationpb.New(outboundRequest),
			IdleTimeout:      durationpb.New(outboundStreamIdle),
			RetryPolicy:      neverArrived(),
		}},
	})
	out.HTTP.NormalizePath = wrapperspb.Bool(true)
	out.HTTP.StreamIdleTimeout = durationpb.New(outboundStreamIdle)
	return out
}

// neverArrived tries again, on another endpoint where there is one, only what
// never reached the workload, within the time of the whole request: a refusal
// or an answer is never multiplied.
func neverArrived() *routev3.RetryPolicy {
	return &routev3.RetryPolicy{
		RetryOn: "connect-failure,refused-stream", NumRetries: wrapperspb.UInt32(2),
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name: "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: &anypb.Any{
				TypeUrl: "type.googleapis.com/" + string(new(previoushostsv3.PreviousHostsPredicate).ProtoReflect().Descriptor().FullName()),
			}},
		}},
		HostSelectionRetryMaxAttempts: 5,
	}
}

// cluster leads to a service's proxies.
func (w *work) cluster(t *target) *envoy.Cluster {
	cl := &envoy.Cluster{
		Cluster: &clusterv3.Cluster{
			Name:                 t.cluster,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig: &clusterv3.Cluster_EdsClusterConfig{EdsConfig: &corev3.ConfigSource{
				ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
				ResourceApiVersion:    corev3.ApiVersion_V3,
			}},
			ConnectTimeout: durationpb.New(outboundConnect),
			// As many retries as requests: what is tried again never burdened a
			// workload, so there is no storm to hold back.
			CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
				MaxConnections: wrapperspb.UInt32(1024), MaxPendingRequests: wrapperspb.UInt32(1024),
				MaxRequests: wrapperspb.UInt32(1024), MaxRetries: wrapperspb.UInt32(1024), TrackRemaining: true,
			}}},
		},
		Protocol: &httpv3.HttpProtocolOptions{UpstreamProtocolOptions: explicitHTTP(true)},
	}
	if envoy.IsHTTP(t.Protocol) {
		cl.Protocol.CommonHttpProtocolOptions = &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(outboundIdle)}
	}
	if w.secured(t) {
		cl.TLS = envoy.ClientTLS(w.mesh.Name, w.proxy.Link, t.sni, t.peers)
	}
	return cl
}
