package cptest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"kuma/proto/linkpb"
)

// LinkConfig is who opens a link.
type LinkConfig struct {
	// Address is the control plane's server for proxies, such as
	// 127.0.0.1:5678; its certificate must be for localhost.
	Address string
	// CA is what the proxy was given to verify it by, PEM.
	CA []byte
	// Mesh and Name say who it is, Dataplane what it brings along, Token by what
	// it proves itself.
	Mesh, Name, Dataplane, Token string
}

// A LinkProxy is a client of the link over TLS that does with the control
// plane's authorities what kuma-dp does: it believes those that it is sent
// beside what it was given, says so, and keeps them over its streams. It runs no
// Envoy.
type LinkProxy struct {
	cfg LinkConfig

	mu      sync.Mutex
	kept    []byte
	view    LinkView
	deaf    bool
	changed chan struct{}
	cancel  context.CancelFunc
	done    chan struct{}
}

// LinkView is what a LinkProxy knows at one moment.
type LinkView struct {
	// Streams counts those that were welcomed; Open says whether the last one is
	// open, and Err why not.
	Streams int
	Open    bool
	Err     error
	// Revision names the authorities that it was sent last, Bundle has them.
	Revision int64
	Bundle   []byte
	// Noted is the revision that it has acknowledged last.
	Noted int64
}

// NewLinkProxy makes a client; Connect opens its stream.
func NewLinkProxy(c LinkConfig) *LinkProxy {
	return &LinkProxy{cfg: c, changed: make(chan struct{})}
}

// Deaf has the proxy acknowledge nothing (or, with false, what it has been sent
// when it connects anew, and all that comes).
func (p *LinkProxy) Deaf(deaf bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = deaf
}

// Connect opens a connection and a stream, and returns when it is welcomed.
func (p *LinkProxy) Connect(ctx context.Context) error {
	p.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.cfg.CA)
	p.mu.Lock()
	roots.AppendCertsFromPEM(p.kept)
	p.mu.Unlock()
	conn, err := grpc.NewClient("passthrough:///"+p.cfg.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: "localhost"})),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10), grpc.WithDisableServiceConfig())
	if err != nil {
		return err
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	if p.cfg.Token != "" {
		life = metadata.AppendToOutgoingContext(life, "authorization", p.cfg.Token)
	}
	p.mu.Lock()
	before := p.view.Streams
	p.view.Err = nil
	p.cancel, p.done = cancel, make(chan struct{})
	done := p.done
	p.mu.Unlock()
	go func() {
		defer close(done)
		defer conn.Close()
		err := p.serve(life, conn)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.view.Open, p.view.Err = false, err
		p.tell()
	}()
	_, err = p.Wait(ctx, func(v LinkView) bool { return v.Streams > before })
	return err
}

// serve opens the stream and answers until it ends.
func (p *LinkProxy) serve(ctx context.Context, conn *grpc.ClientConn) error {
	s, err := linkpb.NewLinkClient(conn).Stream(ctx)
	if err != nil {
		return err
	}
	hello := &linkpb.Hello{Mesh: p.cfg.Mesh, Name: p.cfg.Name, Instance: "link proxy " + p.cfg.Name, Dataplane: p.cfg.Dataplane, Version: "test"}
	if err := s.Send(&linkpb.FromProxy{Message: &linkpb.FromProxy_Hello{Hello: hello}}); err != nil && ctx.Err() != nil {
		return err
	}
	for {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		p.mu.Lock()
		var answer *linkpb.FromProxy
		switch m := m.GetMessage().(type) {
		case *linkpb.ToProxy_Welcome:
			p.view.Streams++
			p.view.Open = true
		case *linkpb.ToProxy_Refusal:
			err = errors.New(m.Refusal.GetReason())
		case *linkpb.ToProxy_Trust:
			p.kept = m.Trust.GetBundle()
			p.view.Bundle, p.view.Revision = p.kept, m.Trust.GetRevision()
			if !p.deaf {
				p.view.Noted = p.view.Revision
				answer = &linkpb.FromProxy{Message: &linkpb.FromProxy_TrustNoted{TrustNoted: &linkpb.TrustNoted{Revision: p.view.Revision}}}
			}
		}
		p.tell()
		p.mu.Unlock()
		if err != nil {
			return err
		}
		if answer != nil {
			if err := s.Send(answer); err != nil {
				return err
			}
		}
	}
}

// tell wakes those who wait. The lock is held.
func (p *LinkProxy) tell() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// View returns what the proxy knows now.
func (p *LinkProxy) View() LinkView {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.view
}

// Wait returns when the condition holds. It fails when ctx ends, or the stream.
func (p *LinkProxy) Wait(ctx context.Context, condition func(LinkView) bool) (LinkView, error) {
	for {
		p.mu.Lock()
		v, changed := p.view, p.changed
		p.mu.Unlock()
		switch {
		case condition(v):
			return v, nil
		case v.Err != nil:
			return v, v.Err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return v, fmt.Errorf("what was waited for did not happen: %w", ctx.Err())
		}
	}
}

// Close ends the stream, and returns when it has ended.
func (p *LinkProxy) Close() {
	p.mu.Lock()
	cancel, done := p.cancel, p.done
	p.mu.Unlock()
	if cancel == nil {
		return
	}
	cancel()
	<-done
}
