package cp

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"kuma/internal/pki"
	"kuma/internal/xds"
)

// patience is how long a test waits for what takes milliseconds on a machine
// with nothing else to do.
const patience = 30 * time.Second

// port is a splitter with an HTTP and a gRPC server behind it.
func port(t *testing.T, most, each int) (address string, clients *tls.Config, s *splitter) {
	t.Helper()
	return portWith(t, &limit{max: most, each: each, log: slog.New(slog.DiscardHandler)})
}

func portWith(t *testing.T, most *limit) (address string, clients *tls.Config, s *splitter) {
	t.Helper()
	l, err := listen("the test", "NOTHING", "127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	clients, s = portOn(t, l, most)
	return l.Addr().String(), clients, s
}

func portOn(t *testing.T, l net.Listener, most *limit) (clients *tls.Config, s *splitter) {
	t.Helper()
	certs, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	s = newSplitter(l, certs.TLS(), most)
	done := make(chan struct{}, 3)
	go func() { _ = s.run(); done <- struct{}{} }()
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto) })}
	go func() { _ = web.Serve(s.http); done <- struct{}{} }()
	g := grpc.NewServer(xds.ServerOptions()...)
	healthpb.RegisterHealthServer(g, health.NewServer())
	go func() { _ = g.Serve(s.grpc); done <- struct{}{} }()
	t.Cleanup(func() {
		_ = l.Close()
		_ = web.Close()
		g.Stop()
		for range 3 {
			<-done
		}
	})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certs.CA())
	return &tls.Config{RootCAs: pool, ServerName: "localhost"}, s
}

func TestOnePortServesHTTPAndGRPC(t *testing.T) {
	address, clients, _ := port(t, 100, 100)
	for _, offer := range [][]string{{"h2", "http/1.1"}, {"http/1.1"}, nil} {
		c := clients.Clone()
		c.NextProtos = offer
		conn, err := tls.Dial("tcp", address, c)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		answer, err := io.ReadAll(conn)
		if err != nil || len(answer) < 12 || string(answer[9:12]) != "200" {
			t.Errorf("a client that offers %q: %q %v", offer, answer, err)
		}
		_ = conn.Close()
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(clients)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("gRPC: %v", err)
	}
}

// HRD-25: 10,000 clients that connect and say nothing cost a fixed amount of
// memory, and don't keep a client who speaks from being served.
func TestSlowClients(t *testing.T) {
	clientsWanted := 9000 // two descriptors each, of 20,000 that a process commonly has
	if testing.Short() {
		clientsWanted = 3000
	}
	address, clients, s := port(t, 30_000, 30_000)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var slow []net.Conn
	defer func() {
		for _, c := range slow {
			_ = c.Close()
		}
	}()
	for range clientsWanted {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Skipf("this machine allows %d connections only: %v", len(slow), err)
		}
		slow = append(slow, c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), handshakeTimeout/2)
	defer cancel()
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: clients}}
	defer web.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := web.Do(req)
	if err != nil {
		t.Fatalf("a client who speaks is not served: %v", err)
	}
	_ = res.Body.Close()
	runtime.GC()
	runtime.ReadMemStats(&after)
	grown := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)
	if limit := int64(96 << 20); grown > limit {
		t.Errorf("%d slow clients cost %d MiB, more than %d MiB", len(slow), grown>>20, limit>>20)
	}
	s.mu.Lock()
	pending := s.pending.Len()
	s.mu.Unlock()
	if pending > maxHandshakes {
		t.Errorf("%d handshakes at once, more than %d", pending, maxHandshakes)
	}
	t.Logf("%d slow clients: %d MiB, %d connections held", len(slow), grown>>20, s.limit.held())
}

func TestConnectionsHaveALimit(t *testing.T) {
	address, clients, s := port(t, 2, 2)
	var held []net.Conn
	for range 2 {
		c, err := tls.Dial("tcp", address, clients)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	if c, err := tls.Dial("tcp", address, clients); err == nil {
		t.Error("a third connection was let in")
		_ = c.Close()
	}
	for _, c := range held {
		_ = c.Close()
	}
	for s.limit.held() > 0 {
		time.Sleep(time.Millisecond)
	}
	c, err := tls.Dial("tcp", address, clients)
	if err != nil {
		t.Fatalf("after the others have gone: %v", err)
	}
	_ = c.Close()
}

// short is a listener of a process that is out of file descriptors for a while.
type short struct {
	net.Listener
	left atomic.Int64
}

// Accept is a net.Listener's.
func (s *short) Accept() (net.Conn, error) {
	if s.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: syscall.EMFILE}
	}
	return s.Listener.Accept()
}

// HRD-25: a shared port outlives the moment in which nobody can be let in, and
// ends when it is closed.
func TestSharedPortGoesOn(t *testing.T) {
	l, err := listen("the test", "NOTHING", "127.0.0.1", 0)
	if err != nil {
		t.Fatal(err)
	}
	faulty := &short{Listener: l}
	faulty.left.Store(3)
	plain, encrypted := share(faulty)
	defer func() { _ = plain.Close() }()
	for want, first := range map[net.Listener]string{plain: "G", encrypted: "\x16"} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if _, err := io.WriteString(c, first); err != nil {
			t.Fatal(err)
		}
		got, err := want.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if b, err := bufio.NewReader(got).ReadByte(); err != nil || string(b) != first {
			t.Errorf("%q %v, want %q", b, err, first)
		}
		_ = got.Close()
	}
	if faulty.left.Load() > 0 {
		t.Error("nobody was kept out")
	}
	_ = encrypted.Close()
	for _, l := range []net.Listener{plain, encrypted} {
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
	}
}
