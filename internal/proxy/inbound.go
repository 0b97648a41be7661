package proxy

import (
	"net/netip"
	"slices"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	grpcstatsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_stats/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
)

// Timeouts where no MeshTimeout says otherwise (contract).
const (
	inboundConnect     = 10 * time.Second
	inboundIdle        = 2 * time.Hour
	inboundStreamIdle  = time.Hour
	outboundConnect    = 5 * time.Second
	outboundIdle       = time.Hour
	outboundRequest    = 15 * time.Second
	outboundStreamIdle = 30 * time.Minute
)

// featureReusePort is announced by a kuma-dp that wants inbounds to have a
// socket for each of Envoy's workers.
const featureReusePort = "feature-reuse-port"

func (w *work) inbounds() {
	clusters := map[string]*envoy.Cluster{}
	for i := range w.net.Inbound {
		in := &w.net.Inbound[i]
		address, port := in.ListenAddress(w.net), in.Port
		workload, workloadPort := in.Workload(w.net)
		own, theirs := w.addresses(address), w.addresses(workload)
		if len(own) == 0 || len(theirs) == 0 {
			w.out.Report(w.dp.Key(), "inbound %s is left out: the address %q can't be resolved; write an IP address", in.Section(), address)
			continue
		}
		w.out.Inbounds = append(w.out.Inbounds, w.inbound(in, own[0], port, localCluster(clusters, theirs[0], workloadPort, in.EffectiveProtocol()), workloadPort))
		if theirs[0] == own[0] && workloadPort == port {
			w.out.Report(w.dp.Key(), "inbound %s leads back to itself: set servicePort or serviceAddress to where the workload listens", in.Section())
		}
	}
}

func (w *work) inbound(in *mesh.Inbound, address string, port uint32, local *envoy.Cluster, workloadPort uint32) *envoy.Inbound {
	name := names.Inbound(address, port)
	out := &envoy.Inbound{
		Service: in.Service(), Section: in.Section(), Port: port, Tags: in.Tags, Protocol: in.EffectiveProtocol(), Cluster: local,
		Listener: &listenerv3.Listener{
			Name: name, Address: envoy.Address(address, port), TrafficDirection: corev3.TrafficDirection_INBOUND,
			Metadata: tagsMetadata(in.Tags, "self_inbound_dp_"+in.Section()),
		},
	}
	if w.proxy.Features[featureReusePort] {
		out.EnableReusePort = wrapperspb.Bool(true)
	}
	statPrefix := "localhost_" + strconv.FormatUint(uint64(workloadPort), 10)
	if envoy.IsHTTP(out.Protocol) {
		host := out.Service
		if host == "" {
			host = "self_inbound_dp_" + out.Section
		}
		out.HTTP = w.http(statPrefix, "inbound:"+host, host, out.Protocol, &routev3.Route{
			Match: anyPath(),
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{
				ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: out.Cluster.Name},
				Timeout:          durationpb.New(0),
				IdleTimeout:      durationpb.New(inboundStreamIdle),
			}},
		})
		out.HTTP.Routes.RequestHeadersToRemove = []string{"x-kuma-tags"}
		out.HTTP.StreamIdleTimeout = durationpb.New(inboundStreamIdle)
		out.HTTP.RequestHeadersTimeout = durationpb.New(0)
	} else {
		out.Stream = &tcpproxyv3.TcpProxy{
			StatPrefix:       statPrefix,
			ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: out.Cluster.Name},
			IdleTimeout:      durationpb.New(inboundIdle),
		}
	}
	if w.backend == nil {
		return out
	}
	out.Guard, out.TLS, out.DenialLog = envoy.Strict, envoy.ServerTLS(w.mesh.Name, w.proxy.Link), w.proxy.AccessLogPath
	if w.backend.Mode == mesh.Permissive {
		out.Guard = envoy.Permissive
	}
	if out.HTTP != nil {
		// What a caller says of itself is thrown away; what its certificate says
		// is told to the workload.
		out.HTTP.ForwardClientCertDetails = hcmv3.HttpConnectionManager_SANITIZE_SET
		out.HTTP.SetCurrentClientCertDetails = &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{Uri: true}
	}
	return out
}

// http is what all listeners with HTTP have in common: one virtual host with
// one route.
func (w *work) http(statPrefix, routes, host, protocol string, route *routev3.Route) *envoy.HTTP {
	h := &envoy.HTTP{
		HttpConnectionManager: &hcmv3.HttpConnectionManager{
			StatPrefix:                statPrefix,
			InternalAddressConfig:     w.internal,
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(0)},
		},
		Routes: &routev3.RouteConfiguration{
			Name:             routes,
			ValidateClusters: wrapperspb.Bool(false),
			VirtualHosts:     []*routev3.VirtualHost{{Name: host, Domains: []string{"*"}, Routes: []*routev3.Route{route}}},
		},
	}
	if protocol == envoy.GRPC {
		h.Filters = append(h.Filters, grpcStats())
	}
	return h
}

func grpcStats() *hcmv3.HttpFilter {
	packed, err := anypb.New(&grpcstatsv3.FilterConfig{EmitFilterState: true, PerMethodStatSpecifier: &grpcstatsv3.FilterConfig_StatsForAllMethods{StatsForAllMethods: wrapperspb.Bool(true)}})
	if err != nil {
		packed = &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.http.grpc_stats.v3.FilterConfig"}
	}
	return &hcmv3.HttpFilter{Name: "envoy.filters.http.grpc_stats", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed}}
}

// localCluster leads to the workload. Inbounds before one workload share it.
func localCluster(clusters map[string]*envoy.Cluster, address string, port uint32, protocol string) *envoy.Cluster {
	name := names.LocalCluster(port)
	target := address + "|" + protocol
	if c := clusters[name+"|"+target]; c != nil {
		return c
	}
	// The contract's name has no address. Where two workloads have one port, the
	// second one's cluster shows its address.
	if _, taken := clusters[name]; taken {
		name += ":" + address + ":" + protocol
	}
	cl := &envoy.Cluster{Cluster: &clusterv3.Cluster{
		Name: name, AltStatName: names.StatPrefix(name),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(inboundConnect),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: envoy.Address(address, port)}}}},
		}}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{TrackRemaining: true}}},
	}}
	if envoy.IsHTTP(protocol) {
		cl.Protocol = &httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: explicitHTTP(protocol != envoy.HTTP1),
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
				IdleTimeout: durationpb.New(inboundIdle), MaxConnectionDuration: durationpb.New(0), MaxStreamDuration: durationpb.New(0),
			},
		}
	}
	clusters[names.LocalCluster(port)], clusters[names.LocalCluster(port)+"|"+target] = cl, cl
	return cl
}

func explicitHTTP(two bool) *httpv3.HttpProtocolOptions_ExplicitHttpConfig_ {
	explicit := &httpv3.HttpProtocolOptions_ExplicitHttpConfig{}
	if two {
		explicit.ProtocolConfig = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}}
	} else {
		explicit.ProtocolConfig = &httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}}
	}
	return &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: explicit}
}

func anyPath() *routev3.RouteMatch {
	return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
}

// tagsMetadata shows tags on a listener, or its name where there are none.
func tagsMetadata(tags map[string]string, name string) *corev3.Metadata {
	fields := stringFields(tags)
	if len(fields) == 0 {
		fields = map[string]*structpb.Value{"kuma.io/unified-name": structpb.NewStringValue(name)}
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"io.kuma.tags": {Fields: fields}}}
}

func stringFields(m map[string]string, except ...string) map[string]*structpb.Value {
	out := map[string]*structpb.Value{}
	for k, v := range m {
		if !slices.Contains(except, k) {
			out[k] = structpb.NewStringValue(v)
		}
	}
	return out
}

// addresses returns the IP addresses of a host, which may be one itself.
func (g *Generator) addresses(host string) []string {
	if _, err := netip.ParseAddr(host); err == nil {
		return []string{host}
	}
	return g.cfg.Resolve(host)
}
