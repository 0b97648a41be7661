package cp

import (
	"bufio"
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"kuma/internal/errs"
	"kuma/internal/xds"
)

// doorway is a port that is to be opened: for what, by which setting, and where.
type doorway struct {
	what, setting, host string
	port                uint32
}

func (d doorway) listen() (net.Listener, error) { return listen(d.what, d.setting, d.host, d.port) }

// listen opens a TCP port whose connections notice within seconds that the
// other side is gone. The setting is named where the port can't be had.
func listen(what, setting, host string, port uint32) (net.Listener, error) {
	lc := xds.ListenConfig()
	l, err := lc.Listen(context.Background(), "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, errs.New(errs.Unavailable, "%s can't listen on port %d: another program does (another control plane?); end it, or choose another port with %s", what, port, setting)
	}
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%s can't listen: %w; see %s", what, err, setting)
	}
	return l, nil
}

const (
	// handshakeTimeout bounds how long a client of the proxies' port may take to
	// say what it is.
	handshakeTimeout = 10 * time.Second
	// maxHandshakes bounds how many clients may be at it at once. Beyond it the
	// one that has taken longest is dropped: whoever is quick gets in however
	// many others are slow.
	maxHandshakes = 2048
)

// splitter serves gRPC and HTTP/1.1 over TLS on one port. Which of them a
// client wants shows in the handshake: gRPC clients offer "h2" alone or nothing,
// HTTP clients offer "http/1.1" too, and are given that. It is simpler and, for
// a thousand streams, much cheaper than one HTTP/2 server for both.
type splitter struct {
	net.Listener
	tls        *tls.Config
	grpc, http *branch
	limit      *limit
	// door is where connections are noted.
	door *door

	mu sync.Mutex
	// pending are the connections in their handshake, the oldest first.
	pending list.List
}

func newSplitter(l net.Listener, c *tls.Config, most *limit) *splitter {
	s := &splitter{Listener: l, limit: most, door: new(connections).add(door{addr: l.Addr(), tls: c})}
	s.grpc = &branch{addr: l.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	s.http = &branch{addr: l.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
	forHTTP := c.Clone()
	forHTTP.NextProtos = []string{"http/1.1"}
	forGRPC := c.Clone()
	forGRPC.NextProtos = []string{"h2"}
	s.tls = c.Clone()
	s.tls.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(hello.SupportedProtos, "http/1.1") {
			return forHTTP, nil
		}
		return forGRPC, nil
	}
	return s
}

// run accepts connections until the listener is closed.
func (s *splitter) run() error {
	defer s.grpc.Close()
	defer s.http.Close()
	accept(s.Listener, func(c net.Conn) {
		if c = s.limit.admit(c); c == nil {
			return
		}
		done := s.begin(c)
		go func() {
			defer done()
			s.sort(c)
		}()
	})
	return nil
}

// accept hands connections over until the listener is closed.
func accept(l net.Listener, take func(net.Conn)) {
	for {
		c, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			// Out of file descriptors, most likely: what is open goes on.
			time.Sleep(50 * time.Millisecond)
		default:
			take(c)
		}
	}
}

// begin notes a handshake, and drops the oldest where there are too many.
func (s *splitter) begin(c net.Conn) (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending.Len() >= maxHandshakes {
		_ = s.pending.Remove(s.pending.Front()).(net.Conn).Close()
	}
	e := s.pending.PushBack(c)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pending.Remove(e)
	}
}

func (s *splitter) sort(accepted net.Conn) {
	raw := s.door.enter(accepted)
	c := tls.Server(raw, s.tls)
	_ = raw.SetDeadline(time.Now().Add(handshakeTimeout))
	if err := c.Handshake(); err != nil {
		s.door.refused(raw, err)
		_ = raw.Close()
		return
	}
	raw.secured(c.ConnectionState())
	to := s.grpc
	var conn net.Conn = c
	switch c.ConnectionState().NegotiatedProtocol {
	case "http/1.1":
		to = s.http
	case "":
		// No protocol was agreed on: HTTP/2 begins with "PRI".
		p := &peeked{Conn: c, r: bufio.NewReaderSize(c, 512)}
		start, err := p.r.Peek(3)
		if err != nil {
			_ = raw.Close()
			return
		}
		if conn = p; string(start) != "PRI" {
			to = s.http
		}
	}
	_ = raw.SetDeadline(time.Time{})
	to.give(conn)
}

// peeked is a connection whose first bytes were looked at.
type peeked struct {
	net.Conn
	r *bufio.Reader
}

// Read reads what was looked at first.
func (p *peeked) Read(b []byte) (int, error) {
	if p.r != nil {
		if p.r.Buffered() > 0 {
			return p.r.Read(b)
		}
		p.r = nil
	}
	return p.Conn.Read(b)
}

// branch is a listener for one sort of client.
type branch struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (b *branch) give(c net.Conn) {
	select {
	case b.conns <- c:
	case <-b.done:
		_ = c.Close()
	}
}

// Accept returns the next connection.
func (b *branch) Accept() (net.Conn, error) {
	select {
	case c := <-b.conns:
		return c, nil
	case <-b.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (b *branch) Close() error {
	b.once.Do(func() { close(b.done) })
	return nil
}

// Addr is the port's address.
func (b *branch) Addr() net.Addr { return b.addr }
