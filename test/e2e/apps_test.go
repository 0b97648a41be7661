//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"kuma/test/lab"
)

// site is a workload that speaks HTTP/1.1, and HTTP/2 without TLS.
type site struct {
	name string
	port int
	// requests counts those that reached it.
	requests atomic.Int64
	// broken makes it answer 503.
	broken atomic.Bool
}

// told is a site's answer: what it saw of a request.
type told struct {
	Site, Protocol, Caller string
	Header                 http.Header
}

// site starts a workload. /slow?for=1s answers late.
func (r *room) site(name string) *site {
	r.Helper()
	s := &site{name: name}
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 5 * time.Second, Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	l := r.listen()
	s.port = port(l)
	go func() { _ = srv.Serve(l) }()
	r.Cleanup(func() { _ = srv.Close() })
	return s
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.requests.Add(1)
	if d, err := time.ParseDuration(r.URL.Query().Get("for")); err == nil {
		select {
		case <-time.After(d):
		case <-r.Context().Done():
		}
	}
	if s.broken.Load() {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	_ = json.NewEncoder(w).Encode(told{Site: s.name, Protocol: r.Proto, Caller: r.Header.Get("x-forwarded-client-cert"), Header: r.Header})
}

// listen opens a free port for a workload in this process.
func (r *room) listen() net.Listener {
	r.Helper()
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", r.port()))
	r.must(err)
	return l
}

func port(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

// echo starts a workload that says back what it hears over TCP.
func (r *room) echo() int {
	r.Helper()
	l := r.listen()
	r.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return port(l)
}

// healthService starts a workload that serves grpc.health.v1.
func (r *room) healthService() int {
	r.Helper()
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, health.NewServer())
	l := r.listen()
	go func() { _ = srv.Serve(l) }()
	r.Cleanup(srv.Stop)
	return port(l)
}

// checkHealth calls grpc.health.v1 through a port of this host.
func (r *room) checkHealth(port int) error {
	conn, err := grpc.NewClient(fmt.Sprintf("passthrough:///127.0.0.1:%d", port), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(r.ctx, attempt)
	defer cancel()
	out, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err == nil && out.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		err = fmt.Errorf("it says %s", out.GetStatus())
	}
	return err
}

// answer is what came back for a request.
type answer struct {
	status int
	body   string
	told   told
	header http.Header
}

// client keeps its connections.
func client(two bool) *http.Client {
	t := &http.Transport{Protocols: new(http.Protocols)}
	t.Protocols.SetHTTP1(!two)
	t.Protocols.SetUnencryptedHTTP2(two)
	return &http.Client{Timeout: attempt, Transport: t}
}

// fetch makes a request to a port of this host.
func (r *room) fetch(c *http.Client, port int, path string, header ...string) (answer, error) {
	return r.fetchURL(c, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), header...)
}

func (r *room) fetchURL(c *http.Client, url string, header ...string) (answer, error) {
	req, err := http.NewRequestWithContext(r.ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	res, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return answer{}, err
	}
	a := answer{status: res.StatusCode, body: string(b), header: res.Header}
	_ = json.Unmarshal(b, &a.told)
	return a, nil
}

// get makes a request over a connection of its own.
func (r *room) get(port int, path string, header ...string) (answer, error) {
	c := client(false)
	defer c.CloseIdleConnections()
	return r.fetch(c, port, path, header...)
}

// answers waits until a GET through the port has the status.
func (r *room) answers(port, status int) answer {
	r.Helper()
	var a answer
	r.await(fmt.Sprintf("port %d answers %d", port, status), func() error {
		var err error
		if a, err = r.get(port, "/"); err == nil && a.status != status {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
		return err
	})
	return a
}

// line is a TCP connection to an echo.
type line struct {
	net.Conn
	r *bufio.Reader
}

// dial connects to an echo and hears it once.
func dial(port int) (*line, error) {
	c, err := net.DialTimeout("tcp4", "127.0.0.1:"+strconv.Itoa(port), attempt)
	if err != nil {
		return nil, err
	}
	l := &line{c, bufio.NewReader(c)}
	if err := l.say("hello"); err != nil {
		_ = c.Close()
		return nil, err
	}
	return l, nil
}

// say says something and expects it to come back.
func (l *line) say(s string) error {
	_ = l.SetDeadline(time.Now().Add(attempt))
	if _, err := io.WriteString(l, s+"\n"); err != nil {
		return err
	}
	back, err := l.r.ReadString('\n')
	if err == nil && back != s+"\n" {
		err = fmt.Errorf("%q came back for %q", back, s)
	}
	return err
}

// dials waits until an echo behind the port is heard.
func (r *room) dials(port int) *line {
	r.Helper()
	var l *line
	r.await(fmt.Sprintf("port %d echoes", port), func() (err error) {
		l, err = dial(port)
		return err
	})
	r.Cleanup(func() { _ = l.Close() })
	return l
}

// closed waits until the peer ends the connection.
func (l *line) closed() error {
	_ = l.SetReadDeadline(time.Now().Add(patience))
	_, err := l.r.ReadByte()
	if err == nil {
		return errors.New("it still speaks")
	}
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
		return fmt.Errorf("it is still open: %w", err)
	}
	return nil
}

// member makes a certificate of the mesh's authority, for a client that is no
// proxy of ours: it knows the authority's key, as only an admin can.
func (r *room) member(cp *lab.ControlPlane, uris ...string) tls.Certificate {
	r.Helper()
	secret := func(what string) []byte {
		var s struct{ Data []byte }
		r.must(lab.GetJSON(cp.URL()+"/meshes/default/secrets/default.ca-builtin-"+what+"-ca-1", &s))
		b, _ := pem.Decode(s.Data)
		if b == nil {
			r.Fatalf("the authority's %s is no PEM", what)
		}
		return b.Bytes
	}
	ca, err := x509.ParseCertificate(secret("cert"))
	r.must(err)
	der := secret("key")
	caKey, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		caKey, err = x509.ParseECPrivateKey(der)
	}
	r.must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	r.must(err)
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, u := range uris {
		id, err := url.Parse(u)
		r.must(err)
		t.URIs = append(t.URIs, id)
	}
	leaf, err := x509.CreateCertificate(rand.Reader, t, ca, &key.PublicKey, caKey)
	r.must(err)
	return tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: key}
}
