package cptest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/envoy"
	"kuma/internal/identity"
	"kuma/internal/insight"
	"kuma/internal/link"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/pki/builtin"
	"kuma/internal/resource"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/token"
	"kuma/internal/xds"
)

// DoorsConfig says what differs from the usual.
type DoorsConfig struct {
	// Store is one that is there already, as after a restart.
	Store *memstore.Store
	// Tokens: proxies need a token.
	Tokens bool
	// Generate replaces the configuration that is made; see Plain.
	Generate func(pic *state.Picture, n *session.Node) (envoy.Resources, error)
	// Again says when a configuration ages; nil: never.
	Again func(n *session.Node) time.Time
	// Delay, Grace and Patience are the sessions'.
	Delay, Grace, Patience time.Duration
	// Every is the insights'.
	Every time.Duration
	// FirstMessage is how long streams may be silent at their start.
	FirstMessage time.Duration
	// Log is that of ADS; nil discards it.
	Log *slog.Logger
}

// Doors is what proxies connect to, with all that is behind it but the real
// configuration: store, gate, picture, sessions, insights, ADS, HDS and link.
type Doors struct {
	t     *testing.T
	Store *memstore.Store
	// Counted is Store as all parts here have it, and Asked what they ask of it.
	Counted  store.Store
	Asked    *store.Metrics
	Tracker  *state.Tracker
	Gate     *admit.Gate
	Sessions *session.Registry
	Insights *insight.Recorder
	XDS      *xds.Server
	Link     *link.Server
	tokens   *auth.Issuer
	listener *bufconn.Listener
	// Affected counts how often it was asked for.
	Affected atomic.Int64
	stop     func()
}

type storedSecrets struct{ store store.Store }

func (s storedSecrets) kind(meshName string) string {
	if meshName == "" {
		return mesh.GlobalSecrets.Name
	}
	return mesh.Secrets.Name
}

func (s storedSecrets) Secret(ctx context.Context, meshName, name string) ([]byte, error) {
	r, err := s.store.Get(ctx, resource.Key{Kind: s.kind(meshName), Mesh: meshName, Name: name})
	if err != nil {
		return nil, err
	}
	return r.Spec.(*mesh.SecretSpec).Data, nil
}

func (s storedSecrets) SecretNames(ctx context.Context, meshName, prefix string) (out []string, _ error) {
	all, _, err := s.store.List(ctx, s.kind(meshName), meshName)
	for _, r := range all {
		if strings.HasPrefix(r.Name, prefix) {
			out = append(out, r.Name)
		}
	}
	return out, err
}

// OpenDoors starts all of it. It ends with the test.
func OpenDoors(t *testing.T, c DoorsConfig) *Doors {
	t.Helper()
	d := &Doors{t: t, Store: c.Store, listener: bufconn.Listen(1 << 20)}
	if d.Store == nil {
		d.Store = memstore.New()
	}
	d.Asked = store.NewMetrics([]*resource.Kind{mesh.Meshes.Kind, mesh.Dataplanes.Kind, mesh.DataplaneInsights.Kind, mesh.Secrets.Kind})
	d.Counted = d.Asked.Wrap(d.Store)
	if c.Generate == nil {
		c.Generate = Plain
	}
	log := slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	d.Tracker = state.New(state.Config{Store: d.Counted, Quiet: time.Millisecond, Log: log})
	d.Gate = admit.New(admit.Config{Store: d.Counted, Zone: "default"})
	proxies := auth.DefaultProxies()
	if !c.Tokens {
		proxies.DPProxy.Type = auth.ProxyNone
	}
	checker, err := auth.NewProxyChecker(auth.ProxyCheckerConfig{Proxies: proxies, Secrets: storedSecrets{d.Counted}})
	if err != nil {
		t.Fatal(err)
	}
	d.tokens = auth.NewIssuer(auth.IssuerConfig{Proxies: proxies, Secrets: storedSecrets{d.Counted}})
	d.Sessions = session.New(session.Config{
		Tracker: d.Tracker, Store: d.Counted, Gate: d.Gate, Credentials: checker, Delay: c.Delay, Grace: c.Grace, Patience: c.Patience,
	})
	d.Insights = insight.New(insight.Config{Store: d.Counted, Tracker: d.Tracker, Instance: "cp-test", Every: c.Every, Soon: time.Millisecond, Grace: c.Grace})
	issuer := identity.New(identity.Config{Picture: d.Tracker.Now})
	d.XDS = xds.New(xds.Config{
		Tracker: d.Tracker, Sessions: d.Sessions, Generator: generator{c.Generate, c.Again, d}, Issuer: issuer, Insights: d.Insights, RetryBase: 20 * time.Millisecond,
		FirstMessage: c.FirstMessage, Log: c.Log,
	})
	d.Link = link.New(link.Config{Tracker: d.Tracker, Sessions: d.Sessions, Issuer: issuer, Insights: d.Insights, Instance: "cp-test", RetryBase: 20 * time.Millisecond, FirstMessage: c.FirstMessage})
	server := grpc.NewServer(xds.ServerOptions()...)
	d.XDS.Register(server)
	d.Link.Register(server)
	running := make(chan error, 4)
	go func() { running <- d.Tracker.Run(ctx) }()
	go func() { running <- d.Sessions.Run(ctx) }()
	go func() { running <- d.Insights.Run(ctx) }()
	go func() { running <- server.Serve(d.listener) }()
	stopped := false
	d.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		server.Stop()
		for range cap(running) {
			if err := <-running; err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(d.stop)
	<-d.Tracker.Ready()
	return d
}

// Stop ends the control plane as its graceful end does.
func (d *Doors) Stop() { d.stop() }

// Conn makes a connection of its own.
func (d *Doors) Conn() *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient("passthrough:///doors", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return d.listener.DialContext(ctx) }))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Put stores resources and returns when the picture shows them.
func (d *Doors) Put(rs ...*resource.Resource) {
	d.t.Helper()
	var w []store.Write
	for _, r := range rs {
		w = append(w, store.Set(r))
	}
	d.write(w...)
}

// Remove deletes a resource and returns when the picture shows that.
func (d *Doors) Remove(k resource.Key) {
	d.t.Helper()
	d.write(store.Remove(k))
}

func (d *Doors) write(w ...store.Write) {
	d.t.Helper()
	rev, err := d.Store.Put(d.t.Context(), w...)
	if err == nil {
		err = d.Tracker.Await(d.t.Context(), rev)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// Mesh stores a mesh with a signing key, and with mutual TLS if mtls is set.
func (d *Doors) Mesh(name string, mtls bool) {
	d.t.Helper()
	spec := &mesh.MeshSpec{}
	key, err := token.NewSigningKey()
	if err != nil {
		d.t.Fatal(err)
	}
	rs := []*resource.Resource{
		mesh.Meshes.Make("", name, spec),
		mesh.Secrets.Make(name, token.KeyName(token.DataplaneKeyPrefix(name), 1), &mesh.SecretSpec{Data: key}),
	}
	if mtls {
		spec.MTLS = &mesh.MTLS{EnabledBackend: "ca", Backends: []mesh.Backend{{Name: "ca", Type: "builtin"}}}
		root, err := builtin.NewRoot(name, builtin.Conf{})
		if err != nil {
			d.t.Fatal(err)
		}
		rs = append(rs, mesh.Secrets.Make(name, mesh.BuiltinCertSecret(name, "ca"), &mesh.SecretSpec{Data: root.Cert}),
			mesh.Secrets.Make(name, mesh.BuiltinKeySecret(name, "ca"), &mesh.SecretSpec{Data: root.Key}))
	}
	d.Put(rs...)
}

// Token makes a dataplane token.
func (d *Doors) Token(r auth.DataplaneRequest) string {
	d.t.Helper()
	t, err := d.tokens.Dataplane(d.t.Context(), r)
	if err != nil {
		d.t.Fatal(err)
	}
	return t
}

// Dataplane is a Dataplane document with an inbound for the service and
// outbounds to others.
func Dataplane(meshName, name, service string, outbounds ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `{"type":"Dataplane","mesh":%q,"name":%q,"networking":{"address":"127.0.0.1","inbound":[{"port":8080,"servicePort":9090,"tags":{"kuma.io/service":%q,"kuma.io/protocol":"http"}}]`, meshName, name, service)
	for i, o := range outbounds {
		sep := ","
		if i == 0 {
			sep = `,"outbound":[`
		}
		fmt.Fprintf(&b, `%s{"port":%d,"tags":{"kuma.io/service":%q}}`, sep, 10000+i, o)
	}
	if len(outbounds) > 0 {
		b.WriteString("]")
	}
	b.WriteString("}}")
	return b.String()
}

// Metadata is node metadata as bootstrap gives it out.
func Metadata(instance, dataplane string, features ...string) map[string]any {
	md := map[string]any{
		"dataplane.proxyType": "dataplane", "workdir": "/tmp/" + instance,
		"version": map[string]any{"kumaDp": map[string]any{"version": "2.14.3"}, "envoy": map[string]any{"version": "1.40.0"}},
	}
	if dataplane != "" {
		md["dataplane.resource"] = dataplane
	}
	if instance != "" {
		md["dataplane.instance"] = instance
	}
	var list []any
	for _, f := range features {
		list = append(list, f)
	}
	md["features"] = list
	return md
}

// generator makes configurations by a function.
type generator struct {
	generate func(pic *state.Picture, n *session.Node) (envoy.Resources, error)
	again    func(n *session.Node) time.Time
	doors    *Doors
}

func (g generator) Generate(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
	return g.generate(pic, n)
}

func (g generator) Again(n *session.Node) time.Time {
	if g.again == nil {
		return time.Time{}
	}
	return g.again(n)
}

// Affected: insights, secrets, and whatever is in other meshes matters to nobody.
func (g generator) Affected(_ *state.Picture, n *session.Node, changes []state.Change) bool {
	g.doors.Affected.Add(1)
	for _, c := range changes {
		if c.Key.Kind == mesh.DataplaneInsights.Name || c.Key.Mesh != "" && c.Key.Mesh != n.Mesh {
			continue
		}
		return true
	}
	return false
}

// Plain makes a small configuration of the usual shape: a cluster with endpoints
// and a listener for each outbound; for each inbound a listener whose HTTP
// filter comes by extension discovery, with the proxy's certificate if the mesh
// has mutual TLS.
func Plain(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
	m := pic.Mesh(n.Mesh)
	d, ok := m.Dataplane(n.Name)
	if !ok {
		return nil, fmt.Errorf("no Dataplane %s", n.Key)
	}
	out := envoy.Resources{}
	add := func(url, name string, msg proto.Message) error {
		p, err := envoy.Pack(name, msg)
		if err != nil {
			return err
		}
		if out[url] == nil {
			out[url] = map[string]*envoy.Packed{}
		}
		out[url][name] = p
		return nil
	}
	ads := &corev3.ConfigSource{ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
	for i := range d.Spec.Networking.Outbound {
		o := &d.Spec.Networking.Outbound[i]
		name := o.Service()
		cluster := &clusterv3.Cluster{
			Name: name, AltStatName: m.Resource.Labels["stat"],
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
			EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads},
		}
		eds := &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{}}}
		for _, e := range m.Endpoints(name) {
			if !e.Inbound.IsReady() {
				continue
			}
			eds.Endpoints[0].LbEndpoints = append(eds.Endpoints[0].LbEndpoints, &endpointv3.LbEndpoint{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Hostname: e.Dataplane.Name}},
			})
		}
		for _, err := range []error{
			add(envoy.ClusterType, name, cluster), add(envoy.EndpointType, name, eds),
			add(envoy.ListenerType, names.Outbound(o.ListenAddress(), o.Port), &listenerv3.Listener{Name: names.Outbound(o.ListenAddress(), o.Port), StatPrefix: name}),
		} {
			if err != nil {
				return nil, err
			}
		}
	}
	for i := range d.Spec.Networking.Inbound {
		in := &d.Spec.Networking.Inbound[i]
		filter := "rbac:" + strconv.Itoa(int(in.Port))
		hcm, err := anypb.New(&hcmv3.HttpConnectionManager{HttpFilters: []*hcmv3.HttpFilter{{
			Name: filter, ConfigType: &hcmv3.HttpFilter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{ConfigSource: ads}},
		}}})
		if err != nil {
			return nil, err
		}
		chain := &listenerv3.FilterChain{Filters: []*listenerv3.Filter{{Name: "hcm", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: hcm}}}}
		if m.Spec.EnabledBackend() != nil && !n.Link {
			socket, err := anypb.New(&tlsv3.DownstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
				TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: names.IdentitySecret(n.Mesh), SdsConfig: ads}},
			}})
			if err != nil {
				return nil, err
			}
			chain.TransportSocket = &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: socket}}
		}
		name := names.Inbound(in.ListenAddress(d.Spec.Networking), in.Port)
		rules, err := anypb.New(&rbacv3.RBAC{ShadowRulesStatPrefix: m.Resource.Labels["rules"]})
		if err != nil {
			return nil, err
		}
		for _, err := range []error{
			add(envoy.ListenerType, name, &listenerv3.Listener{Name: name, StatPrefix: m.Resource.Labels["listener"], FilterChains: []*listenerv3.FilterChain{chain}}),
			add(envoy.ExtensionType, filter, &corev3.TypedExtensionConfig{Name: filter, TypedConfig: rules}),
		} {
			if err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}
