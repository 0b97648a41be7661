// Package xds serves configuration (delta ADS) and health checks (HDS) to
// Envoy: one loop per stream, driven by requests, pictures and what happens to
// the proxy's session; nothing is polled.
package xds

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"runtime"
	"runtime/debug"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	healthv3 "github.com/envoyproxy/go-control-plane/envoy/service/health/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"kuma/internal/envoy"
	"kuma/internal/identity"
	"kuma/internal/insight"
	"kuma/internal/mesh"
	"kuma/internal/session"
	"kuma/internal/state"
)

// Generator makes a proxy's configuration from a picture. It is a pure
// function, called by many streams at once.
type Generator interface {
	// Generate makes all of the proxy's configuration.
	Generate(pic *state.Picture, node *session.Node) (envoy.Resources, error)
	// Affected reports whether these changes may alter it. It may err on the
	// side of true.
	Affected(pic *state.Picture, node *session.Node, changes []state.Change) bool
	// Again says when the configuration made last has to be made again although
	// nothing has changed; zero means never.
	Again(node *session.Node) time.Time
}

// Issuer issues certificates with keys to proxies that have no link.
type Issuer interface {
	Wanted(pic *state.Picture, d mesh.Dataplane) []identity.Wanted
	Keyed(ctx context.Context, pic *state.Picture, d mesh.Dataplane, secret string) (identity.Certificate, []byte, error)
}

// Config is what a Server needs.
type Config struct {
	Tracker   *state.Tracker
	Sessions  *session.Registry
	Generator Generator
	Issuer    Issuer
	Insights  *insight.Recorder
	// Health is about health checks.
	Health HealthConfig
	// RetryBase and RetryMax bound the back-off after a certificate could not
	// be issued; the defaults are 5 s and 5 min.
	RetryBase, RetryMax time.Duration
	// FirstMessage is how long a stream may stay silent at its start; the
	// default is 10 s.
	FirstMessage time.Duration
	// Concurrency is how many configurations are made at once; the default is
	// the number of processors in use.
	Concurrency int
	// Log may be nil.
	Log *slog.Logger
}

// Server serves ADS and HDS.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	healthv3.UnimplementedHealthDiscoveryServiceServer

	cfg   Config
	slots chan struct{}
	stats Stats
}

// New makes a Server; Register adds it to a gRPC server.
func New(c Config) *Server {
	if c.RetryBase == 0 {
		c.RetryBase = 5 * time.Second
	}
	if c.RetryMax == 0 {
		c.RetryMax = 5 * time.Minute
	}
	if c.FirstMessage == 0 {
		c.FirstMessage = 10 * time.Second
	}
	if c.Concurrency == 0 {
		c.Concurrency = runtime.GOMAXPROCS(0)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Health = c.Health.withDefaults()
	s := &Server{cfg: c, slots: make(chan struct{}, c.Concurrency)}
	s.stats.open()
	return s
}

// Register adds ADS and HDS to a gRPC server.
func (s *Server) Register(g grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	healthv3.RegisterHealthDiscoveryServiceServer(g, s)
}

// Stats returns the server's counters, which are its metrics, too.
func (s *Server) Stats() *Stats { return &s.stats }

// StreamAggregatedResources is the protocol's other variant, which is not
// served: the bootstrap of this control plane asks for the delta variant.
func (s *Server) StreamAggregatedResources(discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, "this control plane serves delta xDS alone; start the proxy with the bootstrap that it gives out, which has api_type DELTA_GRPC")
}

// ServerOptions are the options that suit the streams of many proxies: small
// buffers, since streams are quiet most of the time, and limits on all that a
// client decides. Messages of a proxy have at most 4 MiB.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(4 << 20),
		grpc.MaxConcurrentStreams(16),
		grpc.MaxHeaderListSize(32 << 10),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.ReadBufferSize(4 << 10),
		grpc.WriteBufferSize(16 << 10),
		grpc.StaticStreamWindowSize(64 << 10),
		grpc.StaticConnWindowSize(128 << 10),
		// A proxy opens its stream at once: a connection without one is a stranger's.
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// ListenConfig makes listeners whose connections notice within eight seconds
// that the other side is gone without a word, so that its name is free.
func ListenConfig() net.ListenConfig {
	return net.ListenConfig{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 3},
		Control:         userTimeout(8 * time.Second),
	}
}

// toStatus makes the gRPC status by which a stream ends. The contract's is
// Unknown with the reason as text.
func toStatus(err error) error {
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unknown, err.Error())
}

// guard turns a panic in a stream's own work into the end of that stream.
func (s *Server) guard(what string, node func() *session.Node, err *error) {
	p := recover()
	if p == nil {
		return
	}
	s.stats.Panics.Add(1)
	log := s.cfg.Log
	if n := node(); n != nil {
		log = log.With("mesh", n.Mesh, "name", n.Name)
	}
	log.Error("a stream ended by a fault of the control plane; please report it", "stream", what, "panic", p, "stack", string(debug.Stack()))
	*err = status.Error(codes.Internal, "a fault of the control plane ended this stream; its log says more")
}
