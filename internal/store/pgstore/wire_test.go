package pgstore_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"

	"kuma/internal/store/pgstore"
	"kuma/test/lab"
)

// wire carries connections to a server, and breaks.
type wire struct {
	port     int
	listener net.Listener

	mu   sync.Mutex
	open map[net.Conn]bool
	// to is the server's address.
	to string
	// down: new connections are refused. mute: nothing is carried any more.
	down bool
	mute chan struct{}
	// onCommit, where set, is called for a COMMIT before it is carried on; it
	// tells whether to carry it.
	onCommit func() bool
	// first, where set, is a statement that each new session begins with.
	first string
	// answerless: what the server says is not carried any more.
	answerless bool
	// budget is after how many bytes all connections are cut; negative: never.
	budget int
}

// newWire returns a wire to the server of the configuration, and that changed
// to go over it.
func newWire(t testing.TB, c pgstore.Config) (*wire, pgstore.Config) {
	t.Helper()
	w := &wire{port: lab.FreePort(t), to: net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port))), open: map[net.Conn]bool{}, budget: -1}
	var err error
	if w.listener, err = net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(w.port))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.listener.Close()
		w.cut()
	})
	go func() {
		for {
			from, err := w.listener.Accept()
			if err != nil {
				return
			}
			go w.carry(from)
		}
	}()
	c.Host, c.Port = "127.0.0.1", uint32(w.port)
	return w, c
}

func (w *wire) carry(from net.Conn) {
	defer from.Close()
	w.mu.Lock()
	server := w.to
	w.mu.Unlock()
	to, err := net.Dial("tcp4", server)
	if err != nil {
		return
	}
	defer to.Close()
	w.mu.Lock()
	if w.down {
		w.mu.Unlock()
		return
	}
	w.open[from], w.open[to] = true, true
	w.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { w.copy(to, from, true) })
	both.Go(func() { w.copy(from, to, false) })
	both.Wait()
	w.mu.Lock()
	delete(w.open, from)
	delete(w.open, to)
	w.mu.Unlock()
}

// copy carries one direction; its end is that of both.
func (w *wire) copy(dst, src net.Conn, query bool) {
	defer dst.Close()
	defer src.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := src.Read(b)
		if n > 0 && !w.passes(b[:n], query) {
			_, _ = io.Copy(io.Discard, src)
			return
		}
		if _, wrote := dst.Write(w.lead(b[:n], query)); err != nil || wrote != nil {
			return
		}
	}
}

// lead puts the statement first into the query by which a session begins: a byte,
// the length of what comes, the text, and a zero.
func (w *wire) lead(b []byte, query bool) []byte {
	w.mu.Lock()
	first := w.first
	w.mu.Unlock()
	if !query || first == "" || !bytes.HasPrefix(b, []byte("Q")) || !bytes.Contains(b, []byte("set statement_timeout")) {
		return b
	}
	text := first + "; " + string(b[5:])
	return append(binary.BigEndian.AppendUint32([]byte("Q"), uint32(len(text)+4)), text...)
}

// passes tells whether bytes are to be carried on.
func (w *wire) passes(b []byte, query bool) bool {
	w.mu.Lock()
	onCommit, answerless, mute := w.onCommit, w.answerless, w.mute
	spent := false
	if w.budget >= 0 {
		w.budget -= len(b)
		if spent = w.budget < 0; spent {
			w.budget = -1
		}
	}
	w.mu.Unlock()
	if spent {
		w.cut()
		return false
	}
	if mute != nil {
		<-mute
	}
	if query && onCommit != nil && bytes.Contains(b, []byte("commit\x00")) {
		return onCommit()
	}
	return query || !answerless
}

// cut cuts all connections.
func (w *wire) cut() { w.set(w.cutAll) }

// cutAll is cut, within set.
func (w *wire) cutAll() {
	for c := range w.open {
		_ = c.Close()
	}
}

// set changes how the wire behaves.
func (w *wire) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// sever cuts all connections and refuses new ones; mend takes them again.
func (w *wire) sever() {
	w.set(func() { w.down = true })
	w.cut()
}

func (w *wire) mend() { w.set(func() { w.down = false }) }
