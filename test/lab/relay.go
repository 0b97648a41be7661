package lab

import (
	"bytes"
	"io"
	"net"
	"slices"
	"sync"
)

// Relay is a wire that somebody listens in on: it carries TCP connections from
// one address to another, and keeps every byte of both directions.
type Relay struct {
	// Addr is where it listens, host:port.
	Addr string

	to       string
	listener net.Listener
	wg       sync.WaitGroup

	mu    sync.Mutex
	done  bool
	open  map[net.Conn]bool
	tapes []*tapes
}

// Conversation is what went over one connection.
type Conversation struct {
	// Sent is what the side said that connected, Answered the other's part.
	Sent, Answered []byte
}

// tape keeps what is written.
type tape struct {
	mu  sync.Mutex
	all bytes.Buffer
}

type tapes struct{ sent, answered tape }

// NewRelay opens a relay from one address to another, both host:port. With port
// 0 it listens on any. Nobody needs to listen at the other end yet.
func NewRelay(at, to string) (*Relay, error) {
	l, err := net.Listen("tcp4", at)
	if err != nil {
		return nil, err
	}
	r := &Relay{Addr: l.Addr().String(), to: to, listener: l, open: map[net.Conn]bool{}}
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.carry(c) })
		}
	})
	return r, nil
}

// Port is where it listens.
func (r *Relay) Port() int { return r.listener.Addr().(*net.TCPAddr).Port }

// Conversations returns what went over it so far, a connection each.
func (r *Relay) Conversations() []Conversation {
	r.mu.Lock()
	all := slices.Clone(r.tapes)
	r.mu.Unlock()
	out := make([]Conversation, 0, len(all))
	for _, t := range all {
		out = append(out, Conversation{t.sent.bytes(), t.answered.bytes()})
	}
	return out
}

// Close cuts all connections.
func (r *Relay) Close() {
	_ = r.listener.Close()
	r.mu.Lock()
	r.done = true
	for c := range r.open {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

// keep takes note of a connection, unless the relay is closed already.
func (r *Relay) keep(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done {
		_ = c.Close()
		return false
	}
	r.open[c] = true
	return true
}

func (r *Relay) drop(c net.Conn) {
	_ = c.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, c)
}

func (r *Relay) carry(from net.Conn) {
	if !r.keep(from) {
		return
	}
	defer r.drop(from)
	to, err := net.Dial("tcp4", r.to)
	if err != nil || !r.keep(to) {
		return
	}
	defer r.drop(to)
	t := new(tapes)
	r.mu.Lock()
	r.tapes = append(r.tapes, t)
	r.mu.Unlock()
	var both sync.WaitGroup
	one := func(dst, src net.Conn, kept *tape) {
		_, err := io.Copy(io.MultiWriter(kept, dst), src)
		if half, ok := dst.(*net.TCPConn); ok && err == nil {
			_ = half.CloseWrite()
			return
		}
		_, _ = from.Close(), to.Close()
	}
	both.Go(func() { one(to, from, &t.sent) })
	both.Go(func() { one(from, to, &t.answered) })
	both.Wait()
}

func (t *tape) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.all.Write(b)
}

func (t *tape) bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Clone(t.all.Bytes())
}
