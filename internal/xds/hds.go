package xds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	healthv3 "github.com/envoyproxy/go-control-plane/envoy/service/health/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/resource"
	"kuma/internal/session"
	"kuma/internal/state"
)

// HealthConfig is about health checks (key "dpServer.hds"). Zero values mean
// the defaults of the contract.
type HealthConfig struct {
	// Disabled: no health checks are asked for.
	Disabled bool
	// Interval is how often Envoy reports; 5 s.
	Interval time.Duration
	// Timeout, CheckInterval and NoTrafficInterval of one check; 2 s, 1 s, 1 s.
	Timeout, CheckInterval, NoTrafficInterval time.Duration
	// HealthyThreshold and UnhealthyThreshold are how many results in a row
	// count; 1 and 1.
	HealthyThreshold, UnhealthyThreshold uint32
}

func (h HealthConfig) withDefaults() HealthConfig {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&h.Interval, 5 * time.Second}, {&h.Timeout, 2 * time.Second}, {&h.CheckInterval, time.Second}, {&h.NoTrafficInterval, time.Second}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	h.HealthyThreshold, h.UnhealthyThreshold = max(1, h.HealthyThreshold), max(1, h.UnhealthyThreshold)
	return h
}

// adminCluster is the name under which Envoy's own readiness is checked.
const adminCluster = "kuma:envoy:admin"

type (
	healthStream  = healthv3.HealthDiscoveryService_StreamHealthCheckServer
	healthMessage = healthv3.HealthCheckRequestOrEndpointHealthResponse
)

// check is one endpoint that Envoy is asked to check. Inbound is the place of
// the inbound behind it, or -1 for Envoy itself.
type check struct {
	cluster string
	address string
	port    uint32
	inbound int
	// seen: Envoy has reported; healthy is what.
	seen, healthy bool
}

// hdsStream is one HDS stream. All of it belongs to the stream's loop.
type hdsStream struct {
	srv     *Server
	grpc    healthStream
	session *session.Stream
	log     *slog.Logger

	picture   *state.Picture
	dataplane mesh.Dataplane
	known     bool
	sent      *healthv3.HealthCheckSpecifier
	checks    []check
	// settled: the states stored are those measured.
	settled bool
}

// StreamHealthCheck serves one Envoy.
func (s *Server) StreamHealthCheck(g healthStream) (err error) {
	var node *session.Node
	defer s.guard("hds", func() *session.Node { return node }, &err)
	messages, failed := receive(g.Context(), g.Recv)
	first, err := firstOf(g.Context(), messages, failed, s.cfg.FirstMessage)
	if err != nil {
		return toStatus(err)
	}
	node, token, err := s.identify(g.Context(), first.GetHealthCheckRequest().GetNode())
	if err != nil {
		return toStatus(err)
	}
	st, err := s.cfg.Sessions.Open(g.Context(), session.HDS, node, token)
	if err != nil {
		return toStatus(err)
	}
	defer st.Close()
	s.stats.HealthRequests.Add(1)
	s.stats.HealthStreams.Add(1)
	defer s.stats.HealthStreams.Add(-1)
	h := &hdsStream{srv: s, grpc: g, session: st, log: s.cfg.Log.With("mesh", node.Mesh, "name", node.Name)}
	return toStatus(h.run(messages, failed))
}

// FetchHealthCheck is the variant without a stream, which is not served.
func (s *Server) FetchHealthCheck(context.Context, *healthMessage) (*healthv3.HealthCheckSpecifier, error) {
	return nil, status.Error(codes.Unimplemented, "health checks are served as a stream alone")
}

// run is the stream's loop.
func (h *hdsStream) run(messages <-chan *healthMessage, failed <-chan error) error {
	changed, stop := h.srv.cfg.Tracker.Subscribe()
	defer stop()
	for {
		select {
		case m := <-messages:
			if r := m.GetEndpointHealthResponse(); r != nil {
				h.srv.stats.Reports.Add(1)
				h.report(r)
			}
		case err := <-failed:
			return ended(err)
		case <-changed:
			if err := h.look(); err != nil {
				return err
			}
		case <-h.session.Ended():
			return h.session.Cause()
		}
		h.apply()
	}
}

// look takes the present picture in and asks Envoy for other checks if the
// Dataplane calls for them.
func (h *hdsStream) look() error {
	pic := h.srv.cfg.Tracker.Now()
	old := h.picture
	h.picture = pic
	if pic == old || h.srv.cfg.Health.Disabled || h.session.Leaving() {
		return nil
	}
	if changes, all := pic.Since(old); all && !slices.ContainsFunc(changes, func(c state.Change) bool {
		return c.Key.Name == h.session.Node.Name && c.Key.Mesh == h.session.Node.Mesh && c.Key.Kind == mesh.Dataplanes.Name
	}) {
		return nil
	}
	d, ok := h.session.Dataplane(pic)
	if !ok {
		h.known = false
		if h.session.Node.Link {
			return nil
		}
		return errs.New(errs.NotFound, "resource %q not found; create a Dataplane in Kuma CP first or pass it as an argument to kuma-dp", h.session.Node.Key)
	}
	if err := h.session.Covers(d); err != nil {
		return err
	}
	h.dataplane, h.known, h.settled = d, true, false
	start := time.Now()
	spec, checks := h.srv.cfg.Health.specify(h.session.Node, d.Spec)
	h.srv.stats.health.Observe(since(start))
	if h.sent == nil && len(checks) == 0 || h.sent != nil && proto.Equal(spec, h.sent) {
		// What was measured stays true; only places may have moved.
		h.checks = carry(h.checks, checks)
		return nil
	}
	h.sent, h.checks = spec, carry(h.checks, checks)
	sent := make(chan error, 1)
	go func() { sent <- h.grpc.Send(spec) }()
	select {
	case err := <-sent:
		if err != nil {
			h.srv.stats.HealthFailed.Add(1)
		}
		return ended(err)
	case <-h.session.Ended():
		return h.session.Cause()
	}
}

// carry takes over what was measured of the same endpoints.
func carry(old, checks []check) []check {
	for i := range checks {
		for _, o := range old {
			if o.cluster == checks[i].cluster && o.address == checks[i].address && o.port == checks[i].port {
				checks[i].seen, checks[i].healthy = o.seen, o.healthy
			}
		}
	}
	return checks
}

// report takes in what Envoy measured.
func (h *hdsStream) report(r *healthv3.EndpointHealthResponse) {
	for _, c := range r.GetClusterEndpointsHealth() {
		for _, l := range c.GetLocalityEndpointsHealth() {
			for _, e := range l.GetEndpointsHealth() {
				if e.GetHealthStatus() == corev3.HealthStatus_UNKNOWN {
					continue
				}
				h.measured(c.GetClusterName(), e.GetEndpoint().GetAddress(), e.GetHealthStatus() == corev3.HealthStatus_HEALTHY)
			}
		}
	}
}

func (h *hdsStream) measured(cluster string, a *corev3.Address, healthy bool) {
	for i := range h.checks {
		c := &h.checks[i]
		if c.cluster != cluster || c.inbound >= 0 && (c.address != a.GetSocketAddress().GetAddress() || c.port != a.GetSocketAddress().GetPortValue()) {
			continue
		}
		if !c.seen || c.healthy != healthy {
			c.seen, c.healthy = true, healthy
			h.settled = false
		}
	}
}

// apply has the states stored that were measured, where they differ.
func (h *hdsStream) apply() {
	if h.settled || !h.known || len(h.checks) == 0 {
		return
	}
	envoy := check{seen: true, healthy: true}
	probes := map[int]check{}
	for _, c := range h.checks {
		if c.inbound < 0 {
			envoy = c
		} else {
			probes[c.inbound] = c
		}
	}
	ready := map[int]bool{}
	for i := range h.dataplane.Spec.Networking.Inbound {
		probe, probed := probes[i]
		switch {
		case probed && probe.seen && envoy.seen:
			ready[i] = probe.healthy && envoy.healthy
		case !probed && !h.session.Node.Link && envoy.seen:
			ready[i] = envoy.healthy
		}
	}
	ctx, cancel := context.WithTimeout(h.grpc.Context(), 10*time.Second)
	defer cancel()
	wrote, done, err := h.session.SetHealth(ctx, h.dataplane, ready)
	if err != nil {
		if h.grpc.Context().Err() == nil {
			h.log.Warn("the measured health of a proxy could not be stored; it will be tried again with the next report", "error", err)
		}
		return
	}
	if wrote {
		h.srv.stats.Flips.Add(1)
	}
	h.settled = done // if not, the next picture shows the Dataplane as it is now
}

// specify says what Envoy is to check: of our own proxies, which announce when
// they leave, only inbounds with a probe; of others Envoy's readiness too.
func (h HealthConfig) specify(n *session.Node, d *mesh.DataplaneSpec) (*healthv3.HealthCheckSpecifier, []check) {
	spec := &healthv3.HealthCheckSpecifier{Interval: durationpb.New(h.Interval)}
	var checks []check
	if d.Networking == nil {
		return spec, nil
	}
	if !n.Link {
		spec.ClusterHealthChecks = append(spec.ClusterHealthChecks, &healthv3.ClusterHealthCheck{
			ClusterName:       adminCluster,
			LocalityEndpoints: []*healthv3.LocalityEndpoints{{Endpoints: []*endpointv3.Endpoint{{Address: adminAddress(n)}}}},
			HealthChecks: []*corev3.HealthCheck{h.check(nil, &corev3.HealthCheck{HealthChecker: &corev3.HealthCheck_HttpHealthCheck_{
				HttpHealthCheck: &corev3.HealthCheck_HttpHealthCheck{Path: "/ready"},
			}})},
		})
		checks = append(checks, check{cluster: adminCluster, inbound: -1})
	}
	clusters := map[string]*healthv3.ClusterHealthCheck{}
	for i := range d.Networking.Inbound {
		in := &d.Networking.Inbound[i]
		if in.ServiceProbe == nil || in.State == mesh.Ignored {
			continue
		}
		address, port := in.Workload(d.Networking)
		c := clusters[names.LocalCluster(port)]
		if c == nil {
			c = &healthv3.ClusterHealthCheck{
				ClusterName:       names.LocalCluster(port),
				LocalityEndpoints: []*healthv3.LocalityEndpoints{{}},
				HealthChecks: []*corev3.HealthCheck{h.check(in.ServiceProbe, &corev3.HealthCheck{HealthChecker: &corev3.HealthCheck_TcpHealthCheck_{
					TcpHealthCheck: &corev3.HealthCheck_TcpHealthCheck{},
				}})},
			}
			if n.Transparent || d.Networking.TransparentProxying != nil {
				c.UpstreamBindConfig = &corev3.BindConfig{SourceAddress: &corev3.SocketAddress{
					Address: passthroughSource(address), PortSpecifier: &corev3.SocketAddress_PortValue{},
				}}
			}
			clusters[c.ClusterName] = c
			spec.ClusterHealthChecks = append(spec.ClusterHealthChecks, c)
		}
		if !slices.ContainsFunc(checks, func(x check) bool { return x.inbound >= 0 && x.address == address && x.port == port }) {
			c.LocalityEndpoints[0].Endpoints = append(c.LocalityEndpoints[0].Endpoints, &endpointv3.Endpoint{Address: socket(address, port)})
		}
		checks = append(checks, check{cluster: c.ClusterName, address: address, port: port, inbound: i})
	}
	return spec, checks
}

// check fills in how often and how long, from the inbound's probe or else the
// defaults.
func (h HealthConfig) check(p *mesh.ServiceProbe, c *corev3.HealthCheck) *corev3.HealthCheck {
	if p == nil {
		p = new(mesh.ServiceProbe)
	}
	duration := func(d *resource.ProtoDuration, def time.Duration) *durationpb.Duration {
		if d != nil {
			def = d.Duration
		}
		return durationpb.New(def)
	}
	count := func(n *uint32, def uint32) *wrapperspb.UInt32Value {
		if n != nil {
			def = *n
		}
		return wrapperspb.UInt32(def)
	}
	c.Timeout, c.Interval = duration(p.Timeout, h.Timeout), duration(p.Interval, h.CheckInterval)
	c.NoTrafficInterval = durationpb.New(h.NoTrafficInterval)
	c.HealthyThreshold, c.UnhealthyThreshold = count(p.HealthyThreshold, h.HealthyThreshold), count(p.UnhealthyThreshold, h.UnhealthyThreshold)
	return c
}

func adminAddress(n *session.Node) *corev3.Address {
	if n.AdminSocket != "" {
		return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: n.AdminSocket}}}
	}
	address, port := n.AdminAddress, n.AdminPort
	if address == "" {
		address = "127.0.0.1"
	}
	if port == 0 {
		port = 9901
	}
	return socket(address, port)
}

func socket(address string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// passthroughSource is the address that redirection lets through to the
// workload.
func passthroughSource(workload string) string {
	if ip, err := netip.ParseAddr(workload); err == nil && ip.Is6() {
		return "::6"
	}
	return "127.0.0.6"
}

// ended makes the normal end of a stream no error.
func ended(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}
