package bootstrap

import (
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	metricsv3 "github.com/envoyproxy/go-control-plane/envoy/config/metrics/v3"
	filelogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	re2v3 "github.com/envoyproxy/go-control-plane/envoy/extensions/regex_engines/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"sigs.k8s.io/yaml"

	"kuma/internal/mesh"
	"kuma/internal/names"
)

// params is all that a bootstrap is made of, already checked.
type params struct {
	req       *Request
	dataplane mesh.Dataplane
	// resource is the Dataplane's JSON, for the node's metadata; empty where it
	// was created beforehand.
	resource string
	host     string
	port     uint32
	ca       []byte
	cfg      *Config
}

// render makes Envoy's first configuration, as YAML (contract).
func render(p params) ([]byte, error) {
	sockets := names.Sockets{Dir: p.req.Workdir, Proxy: p.req.Name, Mesh: p.req.Mesh}
	ads := func() *corev3.ConfigSource {
		return &corev3.ConfigSource{
			ResourceApiVersion:    corev3.ApiVersion_V3,
			InitialFetchTimeout:   durationpb.New(0),
			ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		}
	}
	var pack packer
	boot := &bootstrapv3.Bootstrap{
		Node:  &corev3.Node{Id: p.req.Mesh + "." + p.req.Name, Cluster: clusterName(p), Metadata: metadata(p, sockets)},
		Admin: pack.admin(p, sockets),
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			AdsConfig: p.grpc(corev3.ApiConfigSource_DELTA_GRPC),
			CdsConfig: ads(), LdsConfig: ads(),
		},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{
			Clusters: []*clusterv3.Cluster{pack.pipe("access_log_sink", sockets.AccessLog()), pack.controlPlane(p)},
		},
		LayeredRuntime: &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name: "kuma",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: &structpb.Struct{Fields: map[string]*structpb.Value{
				"re2.max_program_size.error_level": structpb.NewNumberValue(4294967295),
				"re2.max_program_size.warn_level":  structpb.NewNumberValue(1000),
			}}},
		}}},
		DefaultRegexEngine: &corev3.TypedExtensionConfig{Name: "envoy.regex_engines.google_re2", TypedConfig: pack.any(&re2v3.GoogleRE2{})},
		StatsConfig:        &metricsv3.StatsConfig{StatsTags: statsTags()},
	}
	if p.cfg.HDS {
		boot.HdsConfig = p.grpc(corev3.ApiConfigSource_GRPC)
	}
	if !p.trustFile() {
		boot.StaticResources.Secrets = []*tlsv3.Secret{{
			Name: names.ControlPlaneTrust,
			Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
				TrustedCa:                 &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: p.ca}},
				MatchTypedSubjectAltNames: sanMatchers(p.host),
			}},
		}}
	}
	if p.linked() {
		boot.StaticResources.Clusters = append(boot.StaticResources.Clusters, pack.pipe(SDSCluster, sockets.SDS()))
	}
	if pack.err != nil {
		return nil, pack.err
	}
	raw, err := protojson.Marshal(boot)
	if err != nil {
		return nil, err
	}
	return yaml.JSONToYAML(raw)
}

const controlPlaneCluster = "ads_cluster"

func (p params) linked() bool {
	return p.req.Workdir != "" && slices.Contains(p.req.Features, FeatureLink)
}

// trustFile: kuma-dp writes the control plane's authorities into a file, so that
// they can change while Envoy runs.
func (p params) trustFile() bool {
	return p.req.Workdir != "" && slices.Contains(p.req.Features, FeatureTrustFile)
}

// verifyControlPlane says by which authorities and names Envoy verifies the
// control plane. From a file only the authorities come: which names are right
// is never up to it.
func (p params) verifyControlPlane(c *tlsv3.CommonTlsContext) *tlsv3.CommonTlsContext {
	secret := &tlsv3.SdsSecretConfig{Name: names.ControlPlaneTrust}
	if !p.trustFile() {
		c.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: secret}
		return c
	}
	sockets := names.Sockets{Dir: p.req.Workdir, Proxy: p.req.Name, Mesh: p.req.Mesh}
	secret.SdsConfig = &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{
			Path: sockets.Trust(), WatchedDirectory: &corev3.WatchedDirectory{Path: p.req.Workdir},
		}},
	}
	c.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
		DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: sanMatchers(p.host)},
		ValidationContextSdsSecretConfig: secret,
	}}
	return c
}

// clusterName is the node's "cluster": the first inbound's service, else the
// proxy's name.
func clusterName(p params) string {
	if n := p.dataplane.Spec.Networking; n != nil {
		for i := range n.Inbound {
			if s := n.Inbound[i].Service(); s != "" {
				return s
			}
		}
		if n.Gateway != nil && n.Gateway.Tags[mesh.TagService] != "" {
			return n.Gateway.Tags[mesh.TagService]
		}
	}
	return p.req.Name
}

func (k *packer) admin(p params, sockets names.Sockets) *bootstrapv3.Admin {
	a := &bootstrapv3.Admin{
		Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: p.cfg.AdminAddress, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: adminPort(p)},
		}}},
	}
	if path := p.cfg.AdminAccessLogPath; path != "" && path != "/dev/null" {
		a.AccessLog = []*accesslogv3.AccessLog{{
			Name:       "envoy.access_loggers.file",
			ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: k.any(&filelogv3.FileAccessLog{Path: path})},
		}}
	}
	if p.cfg.AdminUnixSocket && p.req.Workdir != "" {
		a.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: sockets.Admin(), Mode: 0o600}}}
	}
	return a
}

func adminPort(p params) uint32 {
	if n := p.dataplane.Spec.Networking; n != nil && n.Admin != nil && n.Admin.Port != 0 {
		return n.Admin.Port
	}
	return p.cfg.AdminPort
}

// metadata is what the control plane learns of the proxy on its streams. All
// numbers are strings, as the contract has them.
func metadata(p params, sockets names.Sockets) *structpb.Struct {
	m := map[string]*structpb.Value{
		"dataplane.admin.port":    structpb.NewStringValue(strconv.Itoa(int(adminPort(p)))),
		"dataplane.admin.address": structpb.NewStringValue(p.cfg.AdminAddress),
		"dataplane.proxyType":     structpb.NewStringValue("dataplane"),
		"dynamicMetadata":         structpb.NewStructValue(stringStruct(p.req.DynamicMetadata)),
		"features":                structpb.NewListValue(stringList(p.req.Features)),
		"workdir":                 structpb.NewStringValue(p.req.Workdir),
		"ipv6Enabled":             structpb.NewBoolValue(p.req.IPv6Enabled),
	}
	set := func(key, value string) {
		if value != "" && value != "0" {
			m[key] = structpb.NewStringValue(value)
		}
	}
	if p.cfg.AdminUnixSocket && p.req.Workdir != "" {
		set("dataplane.admin.socketPath", sockets.Admin())
	}
	set("dataplane.dns.port", strconv.Itoa(int(p.req.DNSPort)))
	set("dataplane.readinessReporter.port", strconv.Itoa(int(readinessPort(p))))
	set("dataplane.resource", p.resource)
	set("dataplane.instance", p.req.Instance)
	set("metricsCertPath", p.req.MetricsResources.CertPath)
	set("metricsKeyPath", p.req.MetricsResources.KeyPath)
	set("systemCaPath", p.req.SystemCAPath)
	if p.req.AppProbeProxyDisabled {
		set("dataplane.appProbeProxy.enabled", "true")
	}
	if len(p.req.Version) > 0 {
		v := new(structpb.Value)
		if protojson.Unmarshal(p.req.Version, v) == nil && v.GetStructValue() != nil {
			m["version"] = v
		}
	}
	return &structpb.Struct{Fields: m}
}

func readinessPort(p params) uint32 {
	if p.req.ReadinessPort != 0 {
		return p.req.ReadinessPort
	}
	return p.cfg.ReadinessPort
}

func stringStruct(m map[string]string) *structpb.Struct {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range m {
		out.Fields[k] = structpb.NewStringValue(v)
	}
	return out
}

func stringList(list []string) *structpb.ListValue {
	out := &structpb.ListValue{}
	for _, s := range list {
		out.Values = append(out.Values, structpb.NewStringValue(s))
	}
	return out
}

// grpc is a stream to the control plane. Envoy's config dump redacts the value
// of "authorization" by itself.
func (p params) grpc(kind corev3.ApiConfigSource_ApiType) *corev3.ApiConfigSource {
	service := &corev3.GrpcService{
		TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: controlPlaneCluster}},
	}
	if p.req.DataplaneToken != "" {
		service.InitialMetadata = []*corev3.HeaderValue{{Key: "authorization", Value: p.req.DataplaneToken}}
	}
	return &corev3.ApiConfigSource{
		ApiType: kind, TransportApiVersion: corev3.ApiVersion_V3, SetNodeOnFirstMessageOnly: kind != corev3.ApiConfigSource_GRPC,
		GrpcServices: []*corev3.GrpcService{service},
	}
}

// sanMatchers accept exactly the host that kuma-dp itself used.
func sanMatchers(host string) []*tlsv3.SubjectAltNameMatcher {
	exact := &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: host}}
	return []*tlsv3.SubjectAltNameMatcher{
		{SanType: tlsv3.SubjectAltNameMatcher_DNS, Matcher: exact},
		{SanType: tlsv3.SubjectAltNameMatcher_IP_ADDRESS, Matcher: exact},
	}
}

// packer packs messages and keeps the first error.
type packer struct{ err error }

func (k *packer) any(m proto.Message) *anypb.Any {
	a, err := anypb.New(m)
	if err != nil && k.err == nil {
		k.err = fmt.Errorf("pack %T: %w", m, err)
	}
	return a
}

func (k *packer) http2() map[string]*anypb.Any {
	return map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": k.any(&httpv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
		}},
	})}
}

func endpoints(name string, a *corev3.Address) *endpointv3.ClusterLoadAssignment {
	return &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
		LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: a}}}},
	}}}
}

// pipe is a gRPC cluster behind a Unix socket.
func (k *packer) pipe(name, path string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name: name, ConnectTimeout: durationpb.New(time.Second),
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		TypedExtensionProtocolOptions: k.http2(),
		LoadAssignment:                endpoints(name, &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}}),
	}
}

// controlPlane is the cluster of ADS and health discovery.
func (k *packer) controlPlane(p params) *clusterv3.Cluster {
	discovery := clusterv3.Cluster_STRICT_DNS
	if net.ParseIP(p.host) != nil {
		discovery = clusterv3.Cluster_STATIC
	}
	keepalive := wrapperspb.UInt32
	return &clusterv3.Cluster{
		Name: controlPlaneCluster, ConnectTimeout: durationpb.New(p.cfg.ConnectTimeout),
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: discovery},
		TypedExtensionProtocolOptions: k.http2(),
		UpstreamConnectionOptions: &clusterv3.UpstreamConnectionOptions{
			TcpKeepalive: &corev3.TcpKeepalive{KeepaliveProbes: keepalive(3), KeepaliveTime: keepalive(10), KeepaliveInterval: keepalive(10)},
		},
		TransportSocket: &corev3.TransportSocket{
			Name: "envoy.transport_sockets.tls",
			ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: k.any(&tlsv3.UpstreamTlsContext{
				Sni: p.host,
				CommonTlsContext: p.verifyControlPlane(&tlsv3.CommonTlsContext{
					TlsParams: &tlsv3.TlsParameters{
						TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2,
						TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
						EcdhCurves:                []string{"X25519MLKEM768", "X25519", "P-256"},
					},
				}),
			})},
		},
		LoadAssignment: endpoints(controlPlaneCluster, &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: p.host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: p.port},
		}}}),
	}
}

// statsTags are the labels that dashboards expect (contract).
func statsTags() []*metricsv3.TagSpecifier {
	var out []*metricsv3.TagSpecifier
	for _, t := range [][2]string{
		{"name", `^grpc\.((.+)\.)`},
		{"status", `^grpc.*streams_closed(_([0-9]+))`},
		{"kafka_name", `^kafka(\.(\S*[0-9]))\.`},
		{"kafka_type", `^kafka\..*\.(.*?(?=_duration|$))`},
		{"worker", `(worker_([0-9]+)\.)`},
		// Anchored, which means the same for a lazy match from the start: without
		// it Envoy tries every name from each of its letters (44 ms at its start).
		{"listener", `^((.+?)\.)rbac\.`},
	} {
		out = append(out, &metricsv3.TagSpecifier{TagName: t[0], TagValue: &metricsv3.TagSpecifier_Regex{Regex: t[1]}})
	}
	return out
}

// compact is the Dataplane's document for the node's metadata, as JSON.
func compact(doc []byte) (string, error) {
	var v any
	if err := json.Unmarshal(doc, &v); err != nil {
		return "", err
	}
	raw, err := json.Marshal(v)
	return string(raw), err
}
