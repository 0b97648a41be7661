// Package envoy holds one proxy's configuration while it is being built:
// Envoy's own messages, not yet packed into Any.
//
// The generator makes a Config, policies set fields on its open messages, and
// Encode packs each resource once.
package envoy

import (
	"fmt"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"

	"kuma/internal/names"
	"kuma/internal/resource"
)

// Protocols that a proxy understands; every other is bytes.
const (
	HTTP1 = "http"
	HTTP2 = "http2"
	GRPC  = "grpc"
	Kafka = "kafka"
	TCP   = "tcp"
)

// IsHTTP reports whether a proxy reads requests of the protocol.
func IsHTTP(protocol string) bool {
	return protocol == HTTP1 || protocol == HTTP2 || protocol == GRPC
}

// Config is one proxy's configuration, open to change until Encode.
//
// Policies see it in parts: once with the inbounds, and once for each outbound
// alone, for proxies whose inputs are the same share outbounds.
type Config struct {
	// Mesh is the proxy's mesh; its name is the trust domain.
	Mesh string
	// Self is the proxy; nil where the configuration is that of an outbound alone.
	Self *Self
	// Inbounds and Outbounds are in the order of the Dataplane.
	Inbounds  []*Inbound
	Outbounds []*Outbound
	// System are listeners for the proxy's own sake; policies leave them alone.
	System []*System
	// Doors lead to programs beside the proxy.
	Doors []*Door
	// Documents are what kuma-dp asks its Envoy for.
	Documents []Document
	// Endpoints are the endpoint sets of the outbounds' clusters. They are packed
	// already, for proxies share them.
	Endpoints []*Packed
	// Secrets are those that this generator fills in itself: trust anchors.
	Secrets []*tlsv3.Secret
	// Issues are what could not be done. The rest of the configuration holds.
	Issues []Issue
}

// Issue is something that was left out of a configuration, and why.
type Issue struct {
	// Resource is the one at fault.
	Resource resource.Key
	// Message says what is wrong and what was done about it.
	Message string
}

// Report adds an issue.
func (c *Config) Report(k resource.Key, format string, args ...any) {
	c.Issues = append(c.Issues, Issue{k, fmt.Sprintf(format, args...)})
}

// Guard is what an inbound demands of those who connect.
type Guard uint8

const (
	// Open inbounds take plaintext: the mesh has no mutual TLS.
	Open Guard = iota
	// Strict inbounds take mutual TLS alone.
	Strict
	// Permissive inbounds take mutual TLS, and for migration plaintext and the
	// workload's own TLS too. Those two pass without permission: no caller's name
	// is known.
	Permissive
)

// An Inbound is a port on which other proxies reach the workload.
type Inbound struct {
	*listenerv3.Listener
	// Service is the inbound's kuma.io/service, or "".
	Service string
	// Section is the inbound's name, or its port as text.
	Section string
	// Port is where the proxy listens, and Tags are the inbound's.
	Port uint32
	Tags map[string]string
	// Protocol is what the workload speaks.
	Protocol string
	// HTTP is set for HTTP protocols, Stream for the others.
	HTTP   *HTTP
	Stream *tcpproxyv3.TcpProxy
	// Cluster leads to the workload.
	Cluster *Cluster
	// TLS is used unless Guard is Open.
	Guard Guard
	TLS   *tlsv3.DownstreamTlsContext
	// Access says who may call, unless Guard is Open.
	Access Access
	// DenialLog is the file into which refusals are written, a line of JSON each;
	// "" means they are not.
	DenialLog string
}

// An Outbound is a local port that leads to a service.
type Outbound struct {
	*listenerv3.Listener
	// Address and Port are where the proxy listens.
	Address string
	Port    uint32
	// To is where it leads.
	To Destination
	// HTTP is set for HTTP protocols, Stream for the others.
	HTTP   *HTTP
	Stream *tcpproxyv3.TcpProxy
	// Cluster leads to the destination. It is the same for all outbounds that lead
	// there. It is nil where nothing can be reached; an Issue says why.
	Cluster *Cluster

	// sealed is what Seal packed.
	sealed *sealed
}

// sealed is an outbound that many proxies share, packed once for all of them.
type sealed struct{ listener, cluster *Packed }

// Seal packs the outbound, so that many Configs may hold it. What was packed is
// let go, all but names and addresses; nobody may change the rest afterwards.
func (o *Outbound) Seal() error {
	e := newEncoder()
	if o.Cluster != nil {
		e.cluster(o.Cluster)
	}
	e.outbound(o)
	if e.err != nil {
		return e.err
	}
	o.sealed = &sealed{listener: e.out[ListenerType][o.Name]}
	o.Listener = &listenerv3.Listener{Name: o.Name}
	o.HTTP, o.Stream = nil, nil
	if o.Cluster != nil {
		o.sealed.cluster = e.out[ClusterType][o.Cluster.Name]
		o.Cluster = &Cluster{Cluster: &clusterv3.Cluster{Name: o.Cluster.Name}}
	}
	return nil
}

// A Destination is a service as policies see it.
type Destination struct {
	// Service is the kuma.io/service of a destination by tag, else "".
	Service string
	// Tags are an outbound's, where it is by tag.
	Tags map[string]string
	// MeshService names a real destination: its display name, with its namespace,
	// zone, labels, and the port's name (or number as text) and number. Empty for
	// a destination by tag.
	MeshService string
	Namespace   string
	Zone        string
	Labels      map[string]string
	Section     string
	Port        uint32
	// KRI is that of the real destination's port.
	KRI names.KRI
	// Protocol is what the service speaks.
	Protocol string
}

// Name is the destination as people know it.
func (d *Destination) Name() string {
	if d.MeshService != "" {
		return d.MeshService
	}
	return d.Service
}

// A Cluster is a set of endpoints and how to talk to them.
type Cluster struct {
	*clusterv3.Cluster
	// Protocol is packed into the cluster's protocol options; nil: none.
	Protocol *httpv3.HttpProtocolOptions
	// TLS is packed into its transport socket; nil: plaintext.
	TLS *tlsv3.UpstreamTlsContext
}

// HTTP is how a listener treats requests.
type HTTP struct {
	*hcmv3.HttpConnectionManager
	// Routes is packed in line.
	Routes *routev3.RouteConfiguration
	// Filters run before the router.
	Filters []*hcmv3.HttpFilter
}

// EachRoute calls f for every route that leads to a cluster.
func (h *HTTP) EachRoute(f func(*routev3.Route, *routev3.RouteAction)) {
	for _, v := range h.Routes.VirtualHosts {
		for _, r := range v.Routes {
			if a := r.GetRoute(); a != nil {
				f(r, a)
			}
		}
	}
}

// Clusters returns the distinct clusters, inbounds' first.
func (c *Config) Clusters() []*Cluster {
	seen := map[string]bool{}
	var out []*Cluster
	add := func(cl *Cluster) {
		if cl != nil && !seen[cl.Name] {
			seen[cl.Name] = true
			out = append(out, cl)
		}
	}
	for _, in := range c.Inbounds {
		add(in.Cluster)
	}
	for _, o := range c.Outbounds {
		add(o.Cluster)
	}
	return out
}

// Address is a socket's address: an IP address or "unix://<path>".
func Address(host string, port uint32) *corev3.Address {
	if path, ok := strings.CutPrefix(host, "unix://"); ok {
		return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}}
	}
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}
