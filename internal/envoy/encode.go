package envoy

import (
	"fmt"
	"slices"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	fileaccesslogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	celfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	netrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"kuma/internal/names"
)

// Encode packs everything once. The Config must not be changed afterwards.
func (c *Config) Encode() (Resources, error) {
	e := newEncoder()
	for _, p := range c.Endpoints {
		e.out[EndpointType][p.Name] = p
	}
	for _, s := range c.Secrets {
		e.add(SecretType, s.Name, s)
	}
	for _, in := range c.Inbounds {
		if e.out[ClusterType][in.Cluster.Name] == nil {
			e.cluster(in.Cluster)
		}
		e.inbound(in)
	}
	for _, s := range c.System {
		e.system(s)
	}
	for _, o := range c.Outbounds {
		known := o.Cluster == nil || e.out[ClusterType][o.Cluster.Name] != nil
		switch {
		case o.sealed == nil:
			if !known {
				e.cluster(o.Cluster)
			}
			e.outbound(o)
		default:
			if !known {
				e.out[ClusterType][o.Cluster.Name] = o.sealed.cluster
			}
			e.put(ListenerType, o.sealed.listener)
		}
	}
	for _, d := range c.Doors {
		e.door(d)
	}
	e.documents(c)
	if e.err != nil {
		return nil, e.err
	}
	return e.out, nil
}

// encoder packs and keeps the first error, so that the code reads straight.
type encoder struct {
	out Resources
	err error
}

func newEncoder() *encoder {
	e := &encoder{out: Resources{}}
	for _, t := range Types() {
		e.out[t] = map[string]*Packed{}
	}
	return e
}

func (e *encoder) add(typ, name string, m proto.Message) {
	p, err := Pack(name, m)
	if err != nil {
		e.fail(name, err)
		return
	}
	e.put(typ, p)
}

func (e *encoder) put(typ string, p *Packed) {
	if e.out[typ][p.Name] != nil {
		e.fail(p.Name, fmt.Errorf("there are two of this name"))
		return
	}
	e.out[typ][p.Name] = p
}

func (e *encoder) fail(name string, err error) {
	if e.err == nil {
		e.err = fmt.Errorf("pack %s: %w", name, err)
	}
}

func (e *encoder) any(m proto.Message) *anypb.Any {
	a := new(anypb.Any)
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		e.fail(string(m.ProtoReflect().Descriptor().Name()), err)
	}
	return a
}

func (e *encoder) socket(m proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name:       "envoy.transport_sockets.tls",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: e.any(m)},
	}
}

func (e *encoder) cluster(cl *Cluster) {
	if cl.Protocol != nil {
		cl.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": e.any(cl.Protocol)}
	}
	if cl.TLS != nil {
		cl.TransportSocket = e.socket(cl.TLS)
	}
	e.add(ClusterType, cl.Name, cl.Cluster)
}

func (e *encoder) outbound(o *Outbound) {
	filter := e.terminal(o.HTTP, nil, o.Stream)
	o.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{filter}}}
	e.add(ListenerType, o.Name, o.Listener)
}

// inbound makes one filter chain, or three where the mesh is PERMISSIVE:
// plaintext, the workload's own TLS, and mutual TLS among proxies.
func (e *encoder) inbound(in *Inbound) {
	if in.Guard == Open {
		in.FilterChains = []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{e.terminal(in.HTTP, nil, in.Stream)}}}
		e.add(ListenerType, in.Name, in.Listener)
		return
	}
	guarded := &listenerv3.FilterChain{TransportSocket: e.socket(in.TLS)}
	if in.HTTP != nil {
		guarded.Filters = []*listenerv3.Filter{e.terminal(in.HTTP, in, nil)}
		e.permissions(in)
	} else {
		guarded.Filters = e.streamGuard(in)
	}
	if in.Guard == Permissive {
		open := e.terminal(in.HTTP, nil, in.Stream)
		guarded.FilterChainMatch = &listenerv3.FilterChainMatch{TransportProtocol: "tls", ApplicationProtocols: []string{ALPN}}
		in.FilterChains = []*listenerv3.FilterChain{
			{FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer"}, Filters: []*listenerv3.Filter{open}},
			{FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: "tls"}, Filters: []*listenerv3.Filter{open}},
			guarded,
		}
	} else {
		in.FilterChains = []*listenerv3.FilterChain{guarded}
	}
	own := in.ListenerFilters
	if in.Guard == Permissive || in.Access.wantsServerName() {
		in.ListenerFilters = append(slices.Clip(own), tlsInspector())
	}
	if in.Guard == Permissive && in.Stream != nil {
		// In plaintext the workload may be the one who speaks first; then nothing
		// comes that could be inspected.
		in.ListenerFiltersTimeout = durationpb.New(inspectTimeout)
		in.ContinueOnListenerFiltersTimeout = true
	}
	e.add(ListenerType, in.Name, in.Listener)
	in.ListenerFilters = own
}

// inspectTimeout is how long a PERMISSIVE inbound without HTTP waits for the
// first bytes that show whether a connection is TLS, before it takes it for
// plaintext in which the workload speaks first.
const inspectTimeout = 2 * time.Second

// terminal is the filter that ends a chain. A guard is the inbound whose
// permissions and log of refusals an HTTP chain gets.
func (e *encoder) terminal(h *HTTP, guard *Inbound, stream proto.Message) *listenerv3.Filter {
	if h == nil {
		return &listenerv3.Filter{
			Name:       "envoy.filters.network.tcp_proxy",
			ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: e.any(stream)},
		}
	}
	h.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: h.Routes}
	own, logs := h.HttpFilters, h.AccessLog
	h.HttpFilters = nil
	if guard != nil {
		h.HttpFilters = append(h.HttpFilters, discovered(denyName(guard)), discovered(allowName(guard)))
		if guard.DenialLog != "" {
			h.AccessLog = append([]*accesslogv3.AccessLog{e.denialLog(guard, true)}, logs...)
		}
	}
	h.HttpFilters = append(h.HttpFilters, h.Filters...)
	h.HttpFilters = append(h.HttpFilters, router())
	filter := &listenerv3.Filter{
		Name:       "envoy.filters.network.http_connection_manager",
		ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: e.any(h.HttpConnectionManager)},
	}
	h.HttpFilters, h.AccessLog = own, logs
	return filter
}

// denyName and allowName are the names of the two extension configurations of
// an inbound with HTTP. They are filters' names too, so they never change.
func denyName(in *Inbound) string  { return "kuma:rbac:deny:" + in.Name }
func allowName(in *Inbound) string { return "kuma:rbac:allow:" + in.Name }

// permissions adds what the two filters of an HTTP inbound discover. Both are
// always there: a listener waits for what it names.
func (e *encoder) permissions(in *Inbound) {
	for _, f := range []struct {
		name, prefix string
		rbac         rbac
	}{{denyName(in), "deny.", in.Access.denials()}, {allowName(in), "", in.Access.allowances()}} {
		e.add(ExtensionType, f.name, &corev3.TypedExtensionConfig{
			Name:        f.name,
			TypedConfig: e.any(&httprbacv3.RBAC{RulesStatPrefix: f.prefix, Rules: f.rbac.rules, Matcher: f.rbac.matcher, ShadowRules: f.rbac.shadow}),
		})
	}
}

// streamGuard is the chain of an inbound without HTTP. It changes only when who
// may connect does, for a changed chain closes its connections.
//
// Envoy decides at the first byte that the caller sends. Where the workload speaks
// first, a caller who is not allowed hears that much, and is cut off before
// anything of its own arrives.
func (e *encoder) streamGuard(in *Inbound) []*listenerv3.Filter {
	var out []*listenerv3.Filter
	for _, r := range []rbac{in.Access.denials(), in.Access.allowances()} {
		if r.empty() {
			continue
		}
		out = append(out, &listenerv3.Filter{
			Name: "envoy.filters.network.rbac",
			ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: e.any(&netrbacv3.RBAC{
				Rules: r.rules, Matcher: r.matcher, ShadowRules: r.shadow,
				// The dot at the end is the contract's.
				StatPrefix: names.StatPrefix(in.Name) + ".",
			})},
		})
	}
	logs := in.Stream.AccessLog
	if in.DenialLog != "" {
		in.Stream.AccessLog = append([]*accesslogv3.AccessLog{e.denialLog(in, false)}, logs...)
	}
	out = append(out, e.terminal(nil, nil, in.Stream))
	in.Stream.AccessLog = logs
	return out
}

// denialLog writes a line for every refusal by permission, and for nothing
// else: a workload's own 403 has other details. Query strings are left out.
func (e *encoder) denialLog(in *Inbound, http bool) *accesslogv3.AccessLog {
	fields := map[string]string{
		"kuma":    "denied",
		"inbound": in.Name,
		"caller":  "%DOWNSTREAM_PEER_URI_SAN%",
		"peer":    "%DOWNSTREAM_REMOTE_ADDRESS%",
		"start":   "%START_TIME%",
	}
	attribute := "connection.termination_details"
	if http {
		attribute = "response.code_details"
		fields["method"] = "%REQ(:METHOD)%"
		fields["path"] = "%REQ_WITHOUT_QUERY(:PATH):1024%"
		fields["authority"] = "%REQ(:AUTHORITY):256%"
		fields["protocol"] = "%PROTOCOL%"
		fields["reason"] = "%RESPONSE_CODE_DETAILS%"
	} else {
		fields["protocol"] = "tcp"
		fields["reason"] = "%CONNECTION_TERMINATION_DETAILS%"
	}
	format := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range fields {
		format.Fields[k] = structpb.NewStringValue(v)
	}
	filter := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ExtensionFilter{ExtensionFilter: &accesslogv3.ExtensionFilter{
		Name: "envoy.access_loggers.extension_filters.cel",
		ConfigType: &accesslogv3.ExtensionFilter_TypedConfig{TypedConfig: e.any(&celfilterv3.ExpressionFilter{
			Expression: "has(" + attribute + ") && " + attribute + ".startsWith('" + denialPrefix + "')",
		})},
	}}}
	if http {
		// The expression is dear. This is cheap and met by a refusal alone, be it
		// 403 or gRPC's own status; Envoy stops at the first filter that is not met.
		refused := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_GrpcStatusFilter{GrpcStatusFilter: &accesslogv3.GrpcStatusFilter{
			Statuses: []accesslogv3.GrpcStatusFilter_Status{accesslogv3.GrpcStatusFilter_PERMISSION_DENIED},
		}}}
		filter = &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{AndFilter: &accesslogv3.AndFilter{
			Filters: []*accesslogv3.AccessLogFilter{refused, filter},
		}}}
	}
	return &accesslogv3.AccessLog{
		Name:   "envoy.access_loggers.file",
		Filter: filter,
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: e.any(&fileaccesslogv3.FileAccessLog{
			Path: in.DenialLog,
			AccessLogFormat: &fileaccesslogv3.FileAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
				Format: &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: format},
				Formatters: []*corev3.TypedExtensionConfig{{
					Name:        "envoy.formatter.req_without_query",
					TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery"},
				}},
			}},
		})},
	}
}

func router() *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{
		Name:       "envoy.filters.http.router",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}},
	}
}

// discovered is an HTTP RBAC filter whose configuration comes on its own, so
// that a change of it touches no listener and counts from the next request.
func discovered(name string) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{
		Name: name,
		ConfigType: &hcmv3.HttpFilter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{
			ConfigSource: adsSource(),
			TypeUrls:     []string{"type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC"},
		}},
	}
}

func tlsInspector() *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{
		Name:       "envoy.filters.listener.tls_inspector",
		ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: &anypb.Any{TypeUrl: "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"}},
	}
}
