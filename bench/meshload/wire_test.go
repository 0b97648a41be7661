package main

import (
	"slices"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

func mustAny(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var ads = &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{}, ResourceApiVersion: corev3.ApiVersion_V3}

// local is the socket of a helper beside the proxy.
var local = &corev3.ConfigSource{
	ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
		ApiType: corev3.ApiConfigSource_GRPC,
		GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
			EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: "local-sds"},
		}}},
	}},
	ResourceApiVersion: corev3.ApiVersion_V3,
}

func sds(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: ads}
}

func commonTLS() *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{sds("identity"), {Name: "static"}, {Name: "key", SdsConfig: local}},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				ValidationContextSdsSecretConfig: sds("ca"),
			},
		},
	}
}

func socket(t *testing.T, m proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: mustAny(t, m)}}
}

func testCluster(t *testing.T) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 "web",
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads, ServiceName: "web-endpoints"},
		ConnectTimeout:       durationpb.New(7*time.Second + 3*time.Millisecond),
		TransportSocket:      socket(t, &tlsv3.UpstreamTlsContext{CommonTlsContext: commonTLS()}),
		TransportSocketMatches: []*clusterv3.Cluster_TransportSocketMatch{{
			Name: "m",
			TransportSocket: socket(t, &tlsv3.UpstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
				ValidationContextType: &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: sds("other-ca")},
			}}),
		}},
	}
}

func testListener(t *testing.T) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name: "inbound",
		FilterChains: []*listenerv3.FilterChain{{
			Filters: []*listenerv3.Filter{{
				Name:       "net-rbac",
				ConfigType: &listenerv3.Filter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{ConfigSource: ads}},
			}, {
				Name:       "net-local",
				ConfigType: &listenerv3.Filter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{ConfigSource: local}},
			}, {
				Name: "hcm",
				ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: mustAny(t, &hcmv3.HttpConnectionManager{
					StatPrefix:     "x",
					RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: "routes", ConfigSource: ads}},
					HttpFilters: []*hcmv3.HttpFilter{{
						Name:       "http-rbac",
						ConfigType: &hcmv3.HttpFilter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{ConfigSource: ads}},
					}, {
						Name: "router",
					}},
				})},
			}},
			TransportSocket: socket(t, &tlsv3.DownstreamTlsContext{CommonTlsContext: commonTLS()}),
		}},
		DefaultFilterChain: &listenerv3.FilterChain{},
	}
}

func testAssignment(ports ...uint32) *endpointv3.ClusterLoadAssignment {
	a := &endpointv3.ClusterLoadAssignment{ClusterName: "web-endpoints"}
	for _, p := range ports {
		a.Endpoints = append(a.Endpoints, &endpointv3.LocalityLbEndpoints{LbEndpoints: []*endpointv3.LbEndpoint{{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: &corev3.Address{
				Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
					Address: "10.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: p},
				}},
			}}},
		}}})
	}
	return a
}

func TestParseInfo(t *testing.T) {
	c := parseInfo(typeCDS, marshal(t, testCluster(t)))
	if c.name != "web" || c.eds != "web-endpoints" || c.timeout != 7003*time.Millisecond {
		t.Errorf("cluster: %+v", c)
	}
	if want := []string{"identity", "ca", "other-ca"}; !slices.Equal(c.secrets, want) {
		t.Errorf("cluster secrets %v, want %v", c.secrets, want)
	}
	l := parseInfo(typeLDS, marshal(t, testListener(t)))
	if l.name != "inbound" || !slices.Equal(l.routes, []string{"routes"}) || !slices.Equal(l.secrets, []string{"identity", "ca"}) {
		t.Errorf("listener: %+v", l)
	}
	if want := []string{"net-rbac", "http-rbac"}; !slices.Equal(l.extensions, want) {
		t.Errorf("listener extensions %v, want %v", l.extensions, want)
	}
	e := parseInfo(typeEDS, marshal(t, testAssignment(1, 2)))
	if e.name != "web-endpoints" || e.count != 2 || e.endpoints != endpointHash("10.0.0.1", 2)+endpointHash("10.0.0.1", 1) {
		t.Errorf("assignment: %+v", e)
	}
	s := parseInfo(typeSDS, marshal(t, &tlsv3.Secret{Name: "identity", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{}}}))
	if s.name != "identity" || !s.cert {
		t.Errorf("secret: %+v", s)
	}
}

func TestParseResponses(t *testing.T) {
	a := mustAny(t, testCluster(t))
	m, ok := parseSotW(marshal(t, &discoveryv3.DiscoveryResponse{VersionInfo: "v", TypeUrl: a.TypeUrl, Nonce: "n", Resources: []*anypb.Any{a}}))
	if !ok || m.version != "v" || m.nonce != "n" || m.typeURL != typeURLs[typeCDS] || len(m.resources) != 1 || !slices.Equal(m.resources[0].value, a.Value) {
		t.Errorf("SotW: %v %+v", ok, m)
	}
	m, ok = parseDelta(marshal(t, &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: "v", TypeUrl: a.TypeUrl, Nonce: "n", RemovedResources: []string{"gone"},
		Resources: []*discoveryv3.Resource{{Name: "web", Version: "7", Resource: a}},
	}))
	if !ok || m.nonce != "n" || !slices.Equal(m.removed, []string{"gone"}) || len(m.resources) != 1 || m.resources[0].name != "web" || m.resources[0].version != "7" {
		t.Errorf("delta: %v %+v", ok, m)
	}
	if _, ok := parseSotW([]byte{0x0a, 0x05, 'x'}); ok {
		t.Error("truncated message accepted")
	}
}

func TestMarker(t *testing.T) {
	c := newInfoCache()
	b := marshal(t, testCluster(t))
	c.setMarker(&marker{id: 4, timeout: 7003 * time.Millisecond})
	if i := c.get(typeCDS, b); i.marker != 4 {
		t.Errorf("timeout marker not seen: %+v", i)
	}
	c.setMarker(&marker{id: 5, text: []byte("inbound")})
	if i := c.get(typeLDS, marshal(t, testListener(t))); i.marker != 5 {
		t.Errorf("text marker not seen: %+v", i)
	}
	if first, second := c.get(typeCDS, b), c.get(typeCDS, b); first != second {
		t.Error("equal resources are parsed twice")
	}
}

func TestDist(t *testing.T) {
	var ds []time.Duration
	for i := 100; i > 0; i-- {
		ds = append(ds, time.Duration(i)*time.Millisecond)
	}
	d := distOf(ds)
	if d.P50 != 50 || d.P99 != 99 || d.Max != 100 || d.Min != 1 || d.Mean != 50.5 {
		t.Errorf("%+v", d)
	}
	if distOf(nil) != (dist{}) {
		t.Error("no values")
	}
	if m := median([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Error(m)
	}
	if s := slope([]float64{0, 1, 2}, []float64{1, 3, 5}); s != 2 {
		t.Error(s)
	}
}
