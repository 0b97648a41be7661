package proxy

import (
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
)

// Admin is how the control plane gets at Envoy's admin interface where kuma-dp
// keeps no link: in the contract's way, by a listener on the network.
type Admin struct {
	// Problem, where set, is why there is no certificate. It is reported, and no
	// listener is made.
	Problem string
	// Listen is the port of the listener, on the Dataplane's address.
	Listen uint32
	// Socket is the Unix socket of Envoy's admin interface. Where it is empty,
	// Address and Port are. The address must be one of this machine's alone: else
	// a proxy could be made a gateway to another machine.
	Socket  string
	Address string
	Port    uint32
	// Readiness is the port on loopback where kuma-dp says whether the proxy is
	// ready; 0 means that Envoy's own answer is given.
	Readiness uint32
	// Chain and Key are the listener's certificate and private key, CA the
	// certificates by which it knows callers, and Caller the DNS name that a caller
	// must have there. The first three are PEM.
	Chain, Key, CA []byte
	Caller         string
}

// String keeps the key out of logs.
func (*Admin) String() string { return "*****" }

// GoString keeps the key out of %#v.
func (*Admin) GoString() string { return "*****" }

// AdminPort is the port of a Dataplane's admin listener: its own, else the one
// that the proxy was told when it started, else def.
func AdminPort(d mesh.Dataplane, told, def uint32) uint32 {
	if n := d.Spec.Networking; n != nil && n.Admin != nil && n.Admin.Port != 0 {
		return n.Admin.Port
	}
	if told != 0 {
		return told
	}
	return def
}

const (
	// adminTimeout bounds what a caller may take its time with.
	adminTimeout = 10 * time.Second
	// maxSocketPath is how long Linux lets the path of a Unix socket be, in bytes.
	maxSocketPath = 107
)

// admin adds the listener. In plaintext it says whether the proxy is ready, and
// nothing else; to a caller with the control plane's certificate it is Envoy's
// whole admin interface.
func (w *work) admin() {
	a := w.proxy.Admin
	if a == nil || w.proxy.Link {
		return
	}
	closed := func(format string, args ...any) {
		w.out.Report(w.dp.Key(), "the admin listener is left out, so that the proxy can't be inspected: "+format, args...)
	}
	if a.Problem != "" {
		closed("%s", a.Problem)
		return
	}
	own := w.addresses(w.net.Address)
	if len(own) == 0 {
		closed("the address %q can't be resolved; write an IP address", w.net.Address)
		return
	}
	at := own[0]
	upstream, why := a.upstream(at)
	if why != "" {
		closed("%s", why)
		return
	}
	if a.Listen < 1 || a.Listen > 65535 {
		closed("%d is not a port", a.Listen)
		return
	}
	if w.taken(at, a.Listen) {
		closed("%s port %d belongs to an inbound or outbound; set networking.admin.port to another", at, a.Listen)
		return
	}
	s := &envoy.System{
		Listener: &listenerv3.Listener{
			Name: names.EnvoyAdmin, Address: envoy.Address(at, a.Listen), TrafficDirection: corev3.TrafficDirection_INBOUND,
			// Two proxies must not share a port: who asks one would be answered by
			// the other.
			EnableReusePort: wrapperspb.Bool(false),
		},
		TLS:      envoy.AdminTLS(a.Chain, a.Key, a.CA, a.Caller),
		Clusters: []*envoy.Cluster{systemCluster(names.EnvoyAdmin, upstream)},
	}
	ready := names.EnvoyAdmin
	if a.Readiness != 0 {
		ready = names.Readiness
		s.Clusters = append(s.Clusters, systemCluster(ready, envoy.Address("127.0.0.1", a.Readiness)))
	}
	s.Plain = adminHTTP(&routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Path{Path: "/ready"}}, ready)
	s.Secure = adminHTTP(anyPath(), names.EnvoyAdmin)
	w.out.System = append(w.out.System, s)
}

// upstream is where Envoy's admin interface is, or why it can't be there. The
// listener's own address is at.
func (a *Admin) upstream(at string) (upstream *corev3.Address, why string) {
	if a.Socket != "" {
		if a.Socket[0] != '/' || len(a.Socket) > maxSocketPath {
			return nil, "the path of Envoy's admin socket must be absolute and have at most 107 bytes"
		}
		return envoy.Address("unix://"+a.Socket, 0), ""
	}
	address := map[string]string{"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::": "::1", "::1": "::1"}[a.Address]
	switch {
	case address == "":
		return nil, "envoy admin cluster is not allowed to have addresses other than \"\", \"127.0.0.1\", \"0.0.0.0\", \"::1\", \"::\"; set KUMA_BOOTSTRAP_SERVER_PARAMS_ADMIN_ADDRESS to one of them"
	case a.Port < 1 || a.Port > 65535:
		return nil, "the port of Envoy's admin interface is not known"
	case a.Port == a.Listen && (at == address || a.Address == "0.0.0.0" || a.Address == "::"):
		return nil, "Envoy's admin interface has the listener's port; keep it on a Unix socket with KUMA_BOOTSTRAP_SERVER_PARAMS_ENVOY_ADMIN_UNIX_SOCKET=true"
	}
	return envoy.Address(address, a.Port), ""
}

// taken reports whether an inbound or outbound has the address.
func (w *work) taken(address string, port uint32) bool {
	same := func(other string) bool {
		a, errA := netip.ParseAddr(address)
		b, errB := netip.ParseAddr(other)
		return errA == nil && errB == nil && (a == b || b.IsUnspecified())
	}
	return slices.ContainsFunc(w.net.Inbound, func(in mesh.Inbound) bool {
		return in.Port == port && slices.ContainsFunc(w.addresses(in.ListenAddress(w.net)), same)
	}) || slices.ContainsFunc(w.net.Outbound, func(o mesh.Outbound) bool { return o.Port == port && same(o.ListenAddress()) })
}

// adminHTTP leads the requests that match to a cluster; all others get 404.
func adminHTTP(match *routev3.RouteMatch, cluster string) *envoy.HTTP {
	return &envoy.HTTP{
		HttpConnectionManager: &hcmv3.HttpConnectionManager{
			StatPrefix: "kuma_envoy_admin",
			InternalAddressConfig: &hcmv3.HttpConnectionManager_InternalAddressConfig{CidrRanges: []*corev3.CidrRange{
				{AddressPrefix: "127.0.0.1", PrefixLen: wrapperspb.UInt32(32)}, {AddressPrefix: "::1", PrefixLen: wrapperspb.UInt32(128)},
			}},
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(adminTimeout)},
			RequestHeadersTimeout:     durationpb.New(adminTimeout),
			StreamIdleTimeout:         durationpb.New(adminTimeout),
		},
		Routes: &routev3.RouteConfiguration{
			Name: names.EnvoyAdmin, ValidateClusters: wrapperspb.Bool(false),
			VirtualHosts: []*routev3.VirtualHost{{Name: names.EnvoyAdmin, Domains: []string{"*"}, Routes: []*routev3.Route{{
				Match:  match,
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}}},
			}}}},
		},
	}
}

// systemCluster leads to one place on this machine.
func systemCluster(name string, at *corev3.Address) *envoy.Cluster {
	return &envoy.Cluster{Cluster: &clusterv3.Cluster{
		Name: name, AltStatName: names.StatPrefix(name),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(time.Second),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: at}}}},
		}}},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{TrackRemaining: true}}},
	}}
}
