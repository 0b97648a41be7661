package cp

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"
)

// from dials from one of this machine's own addresses.
func from(t *testing.T, source, address string, clients *tls.Config) (net.Conn, error) {
	t.Helper()
	d := &tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}, Config: clients}
	return d.DialContext(t.Context(), "tcp", address)
}

// HRD-25: one address can't keep the others out.
func TestOneAddressHasALimit(t *testing.T) {
	var log bytes.Buffer
	address, clients, s := portWith(t, &limit{max: 100, each: 2, eachSetting: "KUMA_THE_SETTING", log: slog.New(slog.NewTextHandler(&log, nil))})
	for range 2 {
		c, err := from(t, "127.0.0.1", address, clients)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for range 3 {
		if c, err := from(t, "127.0.0.1", address, clients); err == nil {
			t.Error("a third connection of the address was let in")
			_ = c.Close()
		}
	}
	c, err := from(t, "127.0.0.2", address, clients)
	if err != nil {
		t.Skipf("this machine has no second address: %v", err)
	}
	_ = c.Close()
	s.limit.mu.Lock()
	defer s.limit.mu.Unlock()
	if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "KUMA_THE_SETTING") || !strings.Contains(log.String(), "127.0.0.1/32") {
		t.Errorf("the log: %s", log.String())
	}
}

func TestSource(t *testing.T) {
	for _, c := range []struct{ a, b string }{{"10.0.0.1", "::ffff:10.0.0.1"}, {"2001:db8::1", "2001:db8::2:3"}} {
		a, b := source(&net.TCPAddr{IP: net.ParseIP(c.a)}), source(&net.TCPAddr{IP: net.ParseIP(c.b)})
		if a != b || !a.IsValid() {
			t.Errorf("%s is %s, %s is %s", c.a, a, c.b, b)
		}
	}
	if a, b := source(&net.TCPAddr{IP: net.ParseIP("10.0.0.1")}), source(&net.TCPAddr{IP: net.ParseIP("10.0.0.2")}); a == b {
		t.Error("two addresses are one")
	}
	if a := source(&net.UnixAddr{}); a != (netip.Prefix{}) {
		t.Errorf("no IP address is %s", a)
	}
}

// HRD-25: an API port has a limit too, and closing makes room.
func TestLimitedListener(t *testing.T) {
	l, err := listen("the test", "NOTHING", "127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	most := &limit{max: 2, each: 2, log: slog.New(slog.DiscardHandler)}
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })}
	done := make(chan struct{})
	go func() { defer close(done); _ = web.Serve(limited{l, most}) }()
	t.Cleanup(func() { _ = web.Close(); <-done })
	ask := func() (net.Conn, error) {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		_, err = io.ReadFull(c, make([]byte, 12))
		return c, err
	}
	for range 2 {
		c, err := ask()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	c, err := ask()
	if err == nil {
		t.Error("a third connection is served")
	}
	_ = c.Close()
	if most.held() != 2 {
		t.Errorf("%d connections are held", most.held())
	}
}

// flooder is a stranger that speaks HTTP/2 as it likes.
type flooder struct {
	net.Conn
	*http2.Framer
	block bytes.Buffer
	hpack *hpack.Encoder
}

func flood(t *testing.T, address string, clients *tls.Config) *flooder {
	t.Helper()
	conn, err := tls.Dial("tcp", address, offering(clients))
	if err != nil {
		t.Fatal(err)
	}
	return floodOn(t, conn)
}

// offering is a configuration of a client that speaks HTTP/2 alone.
func offering(clients *tls.Config) *tls.Config {
	c := clients.Clone()
	c.NextProtos = []string{"h2"}
	return c
}

func floodOn(t *testing.T, conn net.Conn) *flooder {
	t.Helper()
	t.Cleanup(func() { _ = conn.Close() })
	f := &flooder{Conn: conn, Framer: http2.NewFramer(conn, conn)}
	f.hpack = hpack.NewEncoder(&f.block)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return f
}

// headers are those of a stream that lasts until it is cancelled.
func (f *flooder) headers() []byte {
	f.block.Reset()
	for _, h := range [][2]string{
		{":method", "POST"},
		{":scheme", "https"},
		{":path", "/grpc.health.v1.Health/Watch"},
		{":authority", "x"},
		{"content-type", "application/grpc"},
		{"te", "trailers"},
	} {
		_ = f.hpack.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	return f.block.Bytes()
}

// HRD-25: a connection on which no stream is opened does not stay.
func TestSilentHTTP2IsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := memory{bufconn.Listen(64 << 10)}
		clients, s := portOn(t, l, &limit{max: 100, each: 100, log: slog.New(slog.DiscardHandler)})
		conn, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		f := floodOn(t, tls.Client(conn, offering(clients)))
		_ = f.SetReadDeadline(time.Now().Add(25 * time.Second))
		for {
			if _, err := f.ReadFrame(); err != nil {
				if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
					t.Fatal("it is still open")
				}
				break
			}
		}
		_ = f.Close()
		synctest.Wait()
		if n := s.limit.held(); n > 0 {
			t.Errorf("%d connections are held", n)
		}
	})
}

// memory is a listener whose connections are in memory, so that time can be the
// test's.
type memory struct{ *bufconn.Listener }

// Accept is a net.Listener's, with the error that says that it is closed.
func (m memory) Accept() (net.Conn, error) {
	c, err := m.Listener.Accept()
	if err != nil {
		return nil, net.ErrClosed
	}
	return c, nil
}

// HRD-25: streams that are opened and reset at once, and headers that never
// end: memory and goroutines stay bounded and others are served.
func TestHTTP2Floods(t *testing.T) {
	const floods, frames = 8, 20_000
	reset := func(f *flooder) error {
		for i := range uint32(frames) {
			err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: f.headers(), EndHeaders: true})
			if err == nil {
				err = f.WriteRSTStream(2*i+1, http2.ErrCodeCancel)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	continuation := func(f *flooder) error {
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.headers()}); err != nil {
			return err
		}
		for i := range frames {
			f.block.Reset()
			_ = f.hpack.WriteField(hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: strings.Repeat("v", 4000)})
			if err := f.WriteContinuation(1, false, f.block.Bytes()); err != nil {
				return err
			}
		}
		return nil
	}
	for _, c := range []struct {
		name   string
		send   func(*flooder) error
		reads  bool
		closed bool
	}{
		{name: "rapid reset", send: reset, reads: true},
		{name: "rapid reset by who does not read", send: reset},
		{name: "endless headers", send: continuation, reads: true, closed: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			address, clients, _ := port(t, 1000, 1000)
			conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(clients)))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			check := func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				if _, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
					t.Errorf("another client: %v", err)
				}
			}
			check()
			// What is in use is the least of three readings: each holds what was
			// thrown away since its collection, too.
			use := func() (least int64, routines int) {
				for range 3 {
					var m runtime.MemStats
					runtime.GC()
					runtime.ReadMemStats(&m)
					if now := int64(m.HeapInuse + m.StackInuse); least == 0 || now < least {
						least = now
					}
				}
				return least, runtime.NumGoroutine()
			}
			before, routines := use()
			var senders, readers sync.WaitGroup
			var all []*flooder
			for range floods {
				f := flood(t, address, clients)
				all = append(all, f)
				_ = f.SetWriteDeadline(time.Now().Add(2 * time.Second)) // who is made to wait has been stopped
				if c.reads {
					readers.Go(func() { _, _ = io.Copy(io.Discard, f.Conn) })
				}
				senders.Go(func() {
					if err := c.send(f); (err == nil) && c.closed {
						t.Errorf("all %d frames were taken", frames)
					}
				})
			}
			sent := make(chan struct{})
			go func() { senders.Wait(); close(sent) }()
			var most int64
			var mostRoutines int
			for going := true; going; {
				check()
				now, n := use()
				most, mostRoutines = max(most, now-before), max(mostRoutines, n-routines)
				select {
				case <-sent:
					going = false
				default:
				}
			}
			for _, f := range all {
				_ = f.Close()
			}
			readers.Wait()
			if limit := int64(64 << 20); most > limit {
				t.Errorf("it cost %d MiB, more than %d MiB", most>>20, limit>>20)
			}
			// Sixteen streams a connection, and what serves the connections.
			if mostRoutines > floods*64 {
				t.Errorf("it cost %d goroutines", mostRoutines)
			}
			t.Logf("at most %d MiB and %d goroutines", most>>20, mostRoutines)
		})
	}
}
