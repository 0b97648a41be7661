package envoy

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/names"
	"kuma/internal/resource"
)

// Self is what a configuration is for.
type Self struct {
	// Dataplane and Zone name it; Labels are the Dataplane's.
	Dataplane, Zone string
	Labels          map[string]string
	// Tags are all values of all tags of the Dataplane, sorted.
	Tags map[string][]string
	// Service is the one by which the proxy is known.
	Service string
	// Gateway says that the proxy has no inbounds of its own.
	Gateway bool
	// Address is the IP address at which others reach the proxy, or "" where it
	// can't be resolved.
	Address string
	// Taken reports whether an inbound or outbound has a port at the Address.
	Taken func(port uint32) bool
	// MutualTLS says that the mesh has an authority, and Link that the proxy's
	// keys come from kuma-dp.
	MutualTLS, Link bool
	// Sockets are where kuma-dp and its Envoy meet. They have no directory where
	// kuma-dp does not say which it is.
	Sockets names.Sockets
	// MetricsCert and MetricsKey are files, where kuma-dp runs, with which Envoy
	// serves metrics; both or neither.
	MetricsCert, MetricsKey string
	// MetricsFile says that kuma-dp checks those files and puts what is in them
	// into one that Envoy watches.
	MetricsFile bool
}

// A Door is a port of the proxy that is neither inbound nor outbound: it leads
// to a program beside the proxy, such as kuma-dp.
type Door struct {
	*listenerv3.Listener
	// Port is where the proxy listens, at its own address.
	Port uint32
	HTTP *HTTP
	// Cluster leads to the program. Doors may share it.
	Cluster *Cluster
	// TLS is nil for plaintext.
	TLS *tlsv3.DownstreamTlsContext
}

// A Document is what kuma-dp asks its own Envoy for at the path, so that it
// learns of a policy.
type Document struct {
	// Path begins with "/".
	Path string
	Body []byte
}

// MetricsTLS is how a door for metrics is secured.
type MetricsTLS uint8

const (
	// PlainMetrics are served to whoever reaches the port.
	PlainMetrics MetricsTLS = iota
	// FileMetricsTLS serves with the certificate that kuma-dp names.
	FileMetricsTLS
	// MeshMetricsTLS serves with the proxy's own certificate, to whoever shows one
	// of the mesh.
	MeshMetricsTLS
)

// MeshMetricsCluster leads to what Mesh.metrics serves (contract).
const MeshMetricsCluster = "kuma:metrics:hijacker"

// Metrics describes a door for Prometheus: one path, at the proxy's own address.
type Metrics struct {
	// Name and Cluster are those of the listener and of the cluster behind it.
	Name, Cluster string
	Port          uint32
	Path          string
	// Rewrite is what kuma-dp is asked for: a path, which may have a query.
	Rewrite string
	TLS     MetricsTLS
}

// OpenMetrics adds a door for Prometheus, which leads to kuma-dp. Where that is
// not possible as it is asked for, nothing is opened and because is reported: in
// no case is something served in plaintext that was to be secured.
func (c *Config) OpenMetrics(because resource.Key, m Metrics) bool {
	s := c.Self
	fail := func(format string, args ...any) bool {
		c.Report(because, "metrics are not served on port %d: "+format, append([]any{m.Port}, args...)...)
		return false
	}
	switch {
	case s.Sockets.Dir == "":
		return fail("the proxy does not say its working directory, in which kuma-dp listens")
	case s.Address == "":
		return fail("networking.address of the Dataplane can't be resolved; write an IP address")
	}
	if s.Taken != nil && s.Taken(m.Port) {
		return fail("an inbound or outbound of the Dataplane has that port; choose another one for metrics")
	}
	for _, d := range c.Doors {
		if d.Port == m.Port {
			return fail("%s has that port; choose another one", d.Name)
		}
	}
	var tls *tlsv3.DownstreamTlsContext
	switch m.TLS {
	case FileMetricsTLS:
		if s.MetricsCert == "" || s.MetricsKey == "" {
			return fail("providedTLS needs a certificate and a key beside the proxy; start kuma-dp with --metrics-cert-path and --metrics-key-path (KUMA_DATAPLANE_RUNTIME_METRICS_CERT_PATH, KUMA_DATAPLANE_RUNTIME_METRICS_KEY_PATH)")
		}
		if tls = FileTLS(s.MetricsCert, s.MetricsKey); s.MetricsFile {
			tls = watchedTLS(s.Sockets)
		}
	case MeshMetricsTLS:
		if !s.MutualTLS {
			return fail("they are to be secured by the mesh's mutual TLS, and the mesh has none; enable mtls, or choose another mode")
		}
		tls = ServerTLS(c.Mesh, s.Link)
	}
	d := metricsDoor(&m, s)
	d.TLS = tls
	c.Doors = append(c.Doors, d)
	return true
}

// CloseMetrics takes away the doors for Prometheus that lead through the
// cluster, and reports how many there were.
func (c *Config) CloseMetrics(cluster string) int {
	before := len(c.Doors)
	c.Doors = slices.DeleteFunc(c.Doors, func(d *Door) bool { return d.Cluster != nil && d.Cluster.Name == cluster })
	return before - len(c.Doors)
}

// maxScrape bounds how long an answer with metrics may take.
const maxScrape = 30 * time.Second

func metricsDoor(m *Metrics, s *Self) *Door {
	return &Door{
		Port: m.Port,
		Listener: &listenerv3.Listener{
			Name: m.Name, Address: Address(s.Address, m.Port), TrafficDirection: corev3.TrafficDirection_INBOUND,
		},
		HTTP: &HTTP{
			HttpConnectionManager: &hcmv3.HttpConnectionManager{
				StatPrefix:                names.StatPrefix(m.Name),
				InternalAddressConfig:     &hcmv3.HttpConnectionManager_InternalAddressConfig{},
				CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(5 * time.Minute)},
				RequestHeadersTimeout:     durationpb.New(10 * time.Second),
			},
			Routes: &routev3.RouteConfiguration{
				Name: m.Name, ValidateClusters: wrapperspb.Bool(false),
				VirtualHosts: []*routev3.VirtualHost{{Name: m.Name, Domains: []string{"*"}, Routes: []*routev3.Route{{
					Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Path{Path: m.Path}},
					Action: &routev3.Route_Route{Route: &routev3.RouteAction{
						ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: m.Cluster},
						PrefixRewrite:    m.Rewrite,
						Timeout:          durationpb.New(maxScrape),
					}},
				}}}},
			},
		},
		Cluster: &Cluster{Cluster: &clusterv3.Cluster{
			Name: m.Cluster, AltStatName: names.StatPrefix(m.Cluster),
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
			ConnectTimeout:       durationpb.New(5 * time.Second),
			LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: m.Cluster, Endpoints: []*endpointv3.LocalityLbEndpoints{{
				LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: Address("unix://"+s.Sockets.Metrics(), 0)}}}},
			}}},
		}},
	}
}

// FileTLS serves with a certificate that lies beside Envoy, and asks for none.
// Envoy reads it when the listener comes.
func FileTLS(cert, key string) *tlsv3.DownstreamTlsContext {
	file := func(path string) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: path}}
	}
	return &tlsv3.DownstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsParams:       tlsParams(),
		TlsCertificates: []*tlsv3.TlsCertificate{{CertificateChain: file(cert), PrivateKey: file(key)}},
		AlpnProtocols:   []string{"h2", "http/1.1"},
	}}
}

// watchedTLS serves with the certificate that kuma-dp keeps in a file, as it is
// at the moment, and asks for none.
func watchedTLS(s names.Sockets) *tlsv3.DownstreamTlsContext {
	return &tlsv3.DownstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsParams: tlsParams(),
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: names.MetricsSecret, SdsConfig: &corev3.ConfigSource{
			ResourceApiVersion: corev3.ApiVersion_V3,
			ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{
				Path: s.MetricsCertificate(), WatchedDirectory: &corev3.WatchedDirectory{Path: s.Dir},
			}},
		}}},
		AlpnProtocols: []string{"h2", "http/1.1"},
	}}
}

// dynamicConfig is the contract's name of the listener with the documents.
const dynamicConfig = "_kuma:dynamicconfig"

// documents packs the listener that answers kuma-dp, if there is anything to
// answer. It closes nothing that is open: kuma-dp asks anew each time.
func (e *encoder) documents(c *Config) {
	if len(c.Documents) == 0 || c.Self == nil {
		return
	}
	host := &routev3.VirtualHost{Name: dynamicConfig, Domains: []string{"*"}}
	for _, d := range c.Documents {
		sum := sha256.Sum256(d.Body)
		etag := hex.EncodeToString(sum[:])
		header := []*corev3.HeaderValueOption{{
			Header:       &corev3.HeaderValue{Key: "etag", Value: etag},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}}
		host.Routes = append(
			host.Routes,
			&routev3.Route{
				Name: dynamicConfig + ":" + d.Path + ":not_modified",
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Path{Path: d.Path}, Headers: []*routev3.HeaderMatcher{{
					Name: "if-none-match",
					HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{
						MatchPattern: &matcherv3.StringMatcher_Exact{Exact: etag},
					}},
				}}},
				Action:               &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 304}},
				ResponseHeadersToAdd: header,
			},
			&routev3.Route{
				Name:  dynamicConfig + ":" + d.Path,
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Path{Path: d.Path}},
				Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
					Status: 200, Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: string(d.Body)}},
				}},
				ResponseHeadersToAdd: header,
			},
		)
	}
	size := uint32(0)
	for _, d := range c.Documents {
		size = max(size, uint32(len(d.Body)))
	}
	routes := &routev3.RouteConfiguration{
		Name: dynamicConfig, VirtualHosts: []*routev3.VirtualHost{host}, ValidateClusters: wrapperspb.Bool(false),
		// Envoy's own limit is 4096.
		MaxDirectResponseBodySizeBytes: wrapperspb.UInt32(max(4096, size)),
	}
	h := &HTTP{HttpConnectionManager: &hcmv3.HttpConnectionManager{
		StatPrefix: names.StatPrefix(dynamicConfig), InternalAddressConfig: &hcmv3.HttpConnectionManager_InternalAddressConfig{},
	}, Routes: routes}
	l := &listenerv3.Listener{
		Name: dynamicConfig, TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{
			// The proxy and kuma-dp are one user.
			Path: c.Self.Sockets.DynamicConfig(), Mode: 0o600,
		}}},
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{e.terminal(h, nil, nil)}}},
	}
	e.add(ListenerType, l.Name, l)
}

// door packs one.
func (e *encoder) door(d *Door) {
	if d.Cluster != nil && e.out[ClusterType][d.Cluster.Name] == nil {
		e.cluster(d.Cluster)
	}
	chain := &listenerv3.FilterChain{Filters: []*listenerv3.Filter{e.terminal(d.HTTP, nil, nil)}}
	if d.TLS != nil {
		chain.TransportSocket = e.socket(d.TLS)
	}
	d.FilterChains = []*listenerv3.FilterChain{chain}
	e.add(ListenerType, d.Name, d.Listener)
}
