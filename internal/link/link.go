// Package link is the control plane's side of kuma-dp's own stream: it
// registers the proxy, signs its certificates, tells it what its Envoy refused,
// notes that it leaves, and asks it to show Envoy's admin interface.
package link

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kuma/internal/errs"
	"kuma/internal/identity"
	"kuma/internal/insight"
	"kuma/internal/mesh"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/proto/linkpb"
)

// Issuer signs certificates for keys that stay with kuma-dp.
type Issuer interface {
	Wanted(pic *state.Picture, d mesh.Dataplane) []identity.Wanted
	Sign(ctx context.Context, pic *state.Picture, d mesh.Dataplane, secret string, csr []byte) (identity.Certificate, error)
}

// Trust are the anchors by which proxies verify the control plane.
type Trust interface {
	// Trust returns them as PEM, and the revision that names exactly these.
	Trust() (bundle []byte, revision int64)
	// Subscribe returns a channel that gets a signal after they may have changed.
	Subscribe() (changed <-chan struct{}, stop func())
}

// Config is what a Server needs.
type Config struct {
	Tracker  *state.Tracker
	Sessions *session.Registry
	Issuer   Issuer
	Insights *insight.Recorder
	// Trust are the control plane's own anchors, which proxies are told; nil where
	// it shows a certificate of somebody else's authority: proxies are then told to
	// forget those of before.
	Trust Trust
	// ShareTrust records what proxies have taken of it in their insights, for
	// other control planes that share it.
	ShareTrust bool
	// Instance is this control plane's id, told to the proxy.
	Instance string
	// RetryBase and RetryMax bound the back-off after a certificate could not
	// be issued; the defaults are 5 s and 5 min.
	RetryBase, RetryMax time.Duration
	// FirstMessage is how long a stream may stay silent at its start; the
	// default is 10 s.
	FirstMessage time.Duration
	// Settle is how long the answer to Leaving waits at most for the other
	// proxies to be sent what follows; the default is 200 ms.
	Settle time.Duration
	// Log may be nil.
	Log *slog.Logger
}

// Limits of what a proxy may say.
const (
	maxName      = 253
	maxInstance  = 512
	maxDataplane = 1 << 20
	maxRequest   = 16 << 10 // a certificate signing request
	maxReason    = 1 << 10
	maxPage      = 64 << 20 // an inspected page
	maxSigning   = 4        // requests answered at once, per stream
	maxInspects  = 4        // pages asked for at once, per stream
	maxDenials   = 100      // per message
	maxField     = 256      // of a denial
	maxRejected  = 50       // told in one status
)

// Server serves the link.
type Server struct {
	linkpb.UnimplementedLinkServer

	cfg   Config
	stats Stats

	mu    sync.Mutex
	conns map[session.Key]*conn
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
	if c.Settle == 0 {
		c.Settle = 200 * time.Millisecond
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: c, conns: map[session.Key]*conn{}}
	s.stats.open()
	return s
}

// Register adds the link to a gRPC server.
func (s *Server) Register(g grpc.ServiceRegistrar) { linkpb.RegisterLinkServer(g, s) }

// Stats returns the server's counters, which are its metrics, too.
func (s *Server) Stats() *Stats { return &s.stats }

// stream is kuma-dp's.
type stream = grpc.BidiStreamingServer[linkpb.FromProxy, linkpb.ToProxy]

// Stream serves one kuma-dp.
func (s *Server) Stream(g stream) (err error) {
	var node *session.Node
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		s.stats.Panics.Add(1)
		log := s.cfg.Log
		if node != nil {
			log = log.With("mesh", node.Mesh, "name", node.Name)
		}
		log.Error("a stream ended by a fault of the control plane; please report it", "stream", "link", "panic", p, "stack", string(debug.Stack()))
		err = status.Error(codes.Internal, "a fault of the control plane ended this stream; its log says more")
	}()
	messages, failed := receive(g)
	hello, err := s.hello(g.Context(), messages, failed)
	if err != nil {
		return refuse(g, err)
	}
	if node, err = nodeOf(hello, session.Remote(g.Context())); err != nil {
		return refuse(g, err)
	}
	token, err := s.cfg.Sessions.Token(g.Context())
	if err != nil {
		return refuse(g, err)
	}
	st, err := s.cfg.Sessions.Open(g.Context(), session.Link, node, token)
	if err != nil {
		if g.Context().Err() == nil {
			s.cfg.Log.Info("a proxy was refused", "stream", "link", "mesh", node.Mesh, "name", node.Name, "reason", err)
		}
		return refuse(g, err)
	}
	defer st.Close()
	c := newConn(s, g, st)
	s.mu.Lock()
	s.conns[node.Key] = c
	s.mu.Unlock()
	s.stats.Streams.Add(1)
	defer func() {
		close(c.over)
		s.stats.Streams.Add(-1)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.conns[node.Key] == c {
			delete(s.conns, node.Key)
		}
	}()
	return refuse(g, c.run(messages, failed))
}

// receive reads a stream's messages until it ends.
func receive(g stream) (<-chan *linkpb.FromProxy, <-chan error) {
	messages, failed := make(chan *linkpb.FromProxy), make(chan error, 1)
	go func() {
		for {
			m, err := g.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case messages <- m:
			case <-g.Context().Done():
				failed <- status.FromContextError(g.Context().Err()).Err()
				return
			}
		}
	}()
	return messages, failed
}

// hello waits for a stream's first message.
func (s *Server) hello(ctx context.Context, messages <-chan *linkpb.FromProxy, failed <-chan error) (*linkpb.Hello, error) {
	t := time.NewTimer(s.cfg.FirstMessage)
	defer t.Stop()
	select {
	case m := <-messages:
		if h := m.GetHello(); h != nil {
			return h, nil
		}
		return nil, errs.New(errs.Invalid, "the first message of a link must be Hello")
	case err := <-failed:
		return nil, err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.C:
		return nil, errs.New(errs.Invalid, "no Hello came within %s", s.cfg.FirstMessage)
	}
}

// nodeOf is who says hello.
func nodeOf(h *linkpb.Hello, remote string) (*session.Node, error) {
	for _, f := range []struct {
		name, value string
		limit       int
	}{
		{"mesh", h.GetMesh(), maxName},
		{"name", h.GetName(), maxName},
		{"instance", h.GetInstance(), maxInstance},
		{"dataplane", h.GetDataplane(), maxDataplane},
		{"version", h.GetVersion(), maxName},
		{"envoy_version", h.GetEnvoyVersion(), maxName},
	} {
		if len(f.value) > f.limit {
			return nil, errs.New(errs.Invalid, "%s in Hello has %d bytes, the limit is %d", f.name, len(f.value), f.limit)
		}
	}
	if h.GetMesh() == "" || h.GetName() == "" {
		return nil, errs.New(errs.Invalid, "Hello must name the proxy and its mesh")
	}
	n := &session.Node{
		Key: session.Key{Mesh: h.GetMesh(), Name: h.GetName()}, Instance: h.GetInstance(), Link: true, Dataplane: h.GetDataplane(),
		Features: []string{session.FeatureLink},
	}
	if n.Instance == "" {
		n.Instance = "link from " + remote
	}
	return n, nil
}

// refuse ends a stream with a reason, said so that kuma-dp can print it. Its
// normal end is none.
func refuse(g stream, err error) error {
	switch {
	case err == nil, errors.Is(err, io.EOF), status.Code(err) == codes.Canceled, g.Context().Err() != nil:
		return nil
	}
	if _, ok := errors.AsType[*errs.Error](err); !ok {
		if _, ok := status.FromError(err); ok {
			return err
		}
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		_ = g.Send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Refusal{Refusal: &linkpb.Refusal{Reason: err.Error(), Retry: retryable(err)}}})
	}()
	select {
	case <-sent:
	case <-time.After(time.Second): // who does not read need not be told
	}
	return status.Error(codes.Unknown, err.Error())
}

// retryable tells whether waiting can help.
func retryable(err error) bool {
	switch errs.KindOf(err) {
	case errs.Conflict, errs.Unavailable, errs.Internal, errs.NotFound:
		return true
	}
	return false
}
