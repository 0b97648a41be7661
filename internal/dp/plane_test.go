package dp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"sigs.k8s.io/yaml"

	"kuma/proto/linkpb"
	"kuma/test/lab"
)

// TestMain lets this test binary stand in for Envoy where a test is about the
// handling of a process and not about what Envoy does.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "--version":
			fmt.Println("\nenvoy  version: abc/1.40.0/Clean/RELEASE/BoringSSL")
			os.Exit(0)
		case "run":
			os.Exit(Main(context.Background(), os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
		case "--config-path":
			os.Exit(pretendEnvoy(os.Args[2]))
		}
	}
	os.Exit(m.Run())
}

// pretend is what a test tells its stand-in to do, in the configuration that
// the test's control plane serves.
type pretend struct {
	bootstrapAdmin
	Pretend struct {
		Say  string `json:"say"`
		Exit int    `json:"exit"`
	} `json:"pretend"`
}

func pretendEnvoy(config string) int {
	b, err := os.ReadFile(config)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 9
	}
	var c pretend
	if err := yaml.Unmarshal(b, &c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 9
	}
	if c.Pretend.Say != "" {
		fmt.Fprintln(os.Stderr, c.Pretend.Say)
	}
	if c.Pretend.Exit != 0 {
		return c.Pretend.Exit
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	l, err := net.Listen("unix", c.Admin.Address.Pipe.Path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 9
	}
	failing := make(chan struct{})
	var once sync.Once
	mux := http.NewServeMux()
	mux.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Server", "envoy")
		select {
		case <-failing:
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, "DRAINING")
		default:
			fmt.Fprintln(w, "LIVE")
		}
	})
	mux.HandleFunc("POST /healthcheck/fail", func(http.ResponseWriter, *http.Request) {
		once.Do(func() { close(failing) })
		fmt.Println("[2026-11-21 15:11:41.280][1][info][admin] [a.cc:1] healthcheck failed")
	})
	mux.HandleFunc("/stats", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "query: %s\n%s", r.URL.RawQuery, strings.Repeat("x", 600<<10))
	})
	go func() { _ = http.Serve(l, mux) }()
	<-term
	return 0
}

// authority is a small certificate authority.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: time.Now().Add(-time.Minute),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue signs a certificate for a public key.
func (a *authority) issue(public any, uri string, life time.Duration) (der []byte, err error) {
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if uri != "" {
		u, err := url.Parse(uri)
		if err != nil {
			return nil, err
		}
		tmpl.URIs = []*url.URL{u}
	}
	return x509.CreateCertificate(rand.Reader, tmpl, a.cert, public, a.key)
}

func (a *authority) server(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.issue(key.Public(), "", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// plane is a control plane as small as a test needs: /bootstrap and the link on
// one TLS port.
type plane struct {
	linkpb.UnimplementedLinkServer
	*authority
	url string
	// config makes Envoy's first configuration.
	config func(bootstrapRequest) string
	// answer, if set, is called for each bootstrap request instead.
	answer func(http.ResponseWriter, *http.Request, bootstrapRequest)
	// secret, if set, is what answerAll wants the proxy to have a certificate for.
	secret string
	// serve is one stream of the link, after its Hello.
	serve func(*stream) error

	mu      sync.Mutex
	request bootstrapRequest
	streams int
}

// stream is one link as the test's control plane sees it.
type stream struct {
	grpc.BidiStreamingServer[linkpb.FromProxy, linkpb.ToProxy]
	p     *plane
	hello *linkpb.Hello
	token []string
	// number counts the streams of this control plane from 1.
	number int
}

func (s *stream) say(t *linkpb.ToProxy) error { return s.Send(t) }

func (s *stream) welcome() error {
	return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Welcome{Welcome: &linkpb.Welcome{ControlPlaneInstance: "cp-1"}}})
}

func (s *stream) status(complete bool, rejections ...*linkpb.ConfigStatus_Rejection) error {
	return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_ConfigStatus{ConfigStatus: &linkpb.ConfigStatus{Complete: complete, Rejections: rejections}}})
}

func (s *stream) want(secret, revision string) error {
	return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Identities{Identities: &linkpb.Identities{
		Identities: []*linkpb.Identities_Identity{{Secret: secret, Revision: revision}},
	}}})
}

// sign answers a request with a certificate.
func (s *stream) sign(r *linkpb.SigningRequest, uri string, renewIn time.Duration) error {
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	der, err := s.p.issue(csr.PublicKey, uri, time.Hour)
	if err != nil {
		return err
	}
	return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Certificate{Certificate: &linkpb.Certificate{
		Secret: r.GetSecret(), Revision: r.GetRevision(), Chain: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		RenewAt: time.Now().Add(renewIn).Unix(), NotAfter: time.Now().Add(time.Hour).Unix(),
	}}})
}

// Stream serves the link.
func (p *plane) Stream(g grpc.BidiStreamingServer[linkpb.FromProxy, linkpb.ToProxy]) error {
	m, err := g.Recv()
	if err != nil {
		return err
	}
	if p.serve == nil {
		return status.Error(codes.Unimplemented, "unknown service kuma.link.v1.Link")
	}
	md, _ := metadata.FromIncomingContext(g.Context())
	p.mu.Lock()
	p.streams++
	n := p.streams
	p.mu.Unlock()
	return p.serve(&stream{g, p, m.GetHello(), md.Get("authorization"), n})
}

func (p *plane) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/bootstrap" {
		http.Error(w, "404: Page Not Found", http.StatusNotFound)
		return
	}
	var req bootstrapRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p.mu.Lock()
	p.request = req
	p.mu.Unlock()
	if p.answer != nil {
		p.answer(w, r, req)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"bootstrap": []byte(p.config(req))})
}

// start opens the control plane's port.
func (p *plane) start(t *testing.T) {
	t.Helper()
	if p.authority == nil {
		p.authority = newAuthority(t)
	}
	if p.config == nil {
		p.config = func(r bootstrapRequest) string { return pretendConfig(r, "") }
	}
	g := grpc.NewServer()
	linkpb.RegisterLinkServer(g, p)
	srv := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{p.server(t)}, NextProtos: []string{"h2", "http/1.1"}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
				g.ServeHTTP(w, r)
				return
			}
			p.ServeHTTP(w, r)
		}),
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo),
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.url = "https://" + l.Addr().String()
	go func() { _ = srv.ServeTLS(l, "", "") }()
	t.Cleanup(func() { _ = srv.Close(); g.Stop() })
}

// pretendConfig is a first configuration for the stand-in.
func pretendConfig(r bootstrapRequest, more string) string {
	return fmt.Sprintf("admin: {address: {pipe: {path: %q}}}\n%s", filepath.Join(r.Workdir, "kuma-envoy-admin.sock"), more)
}

// journal is a log that a test can read while it grows.
type journal struct {
	mu sync.Mutex
	b  bytes.Buffer
	t  *testing.T
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.String()
}

// ran is a kuma-dp that runs in this process.
type ran struct {
	t       *testing.T
	log     *journal
	cfg     Config
	signals chan os.Signal
	done    chan error
	pid     chan int
}

const webDataplane = `
type: Dataplane
mesh: default
name: web-1
networking:
  address: 127.0.0.1
  inbound:
  - port: {{ port }}
    servicePort: 8080
    tags: {kuma.io/service: web}
`

// aToken has the shape of a token and is none.
const aToken = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEiLCJ0eXAiOiJKV1QifQ.eyJNZXNoIjoiZGVmYXVsdCJ9.c2ln"

// launch runs a kuma-dp against the plane.
func launch(t *testing.T, p *plane, change func(*Config)) *ran {
	t.Helper()
	r := &ran{t: t, log: &journal{t: t}, signals: make(chan os.Signal, 4), done: make(chan error, 1), pid: make(chan int, 1)}
	cfg := Default()
	cfg.ControlPlane.URL = p.url
	if p.authority != nil {
		cfg.ControlPlane.CACert = string(p.pem)
	}
	cfg.Resource, cfg.Vars, cfg.Token = webDataplane, map[string]string{"port": "18080"}, aToken
	cfg.BinaryPath = os.Args[0]
	cfg.TempDir = shortTemp(t)
	cfg.DrainTime = 50 * time.Millisecond
	cfg.ReadinessPort = freePort(t)
	cfg.Log = slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelInfo}))
	cfg.Signals = r.signals
	cfg.Started = func(pid int) { r.pid <- pid }
	if change != nil {
		change(&cfg)
	}
	r.cfg = cfg
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	go func() { r.done <- Run(ctx, cfg, Build{Version: "0.0.0-test"}, "") }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-r.done:
		case <-time.After(patience):
			t.Error("kuma-dp did not end")
		}
		if t.Failed() {
			t.Log(r.log.String())
		}
	})
	return r
}

// end waits for the end of the run.
func (r *ran) end() error {
	r.t.Helper()
	select {
	case err := <-r.done:
		r.done <- err
		return err
	case <-time.After(patience):
		r.t.Fatal("kuma-dp did not end")
		return nil
	}
}

// ready asks for readiness.
func (r *ran) ready() (code int, body, by string) {
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", r.cfg.ReadinessPort))
	if err != nil {
		return 0, err.Error(), ""
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), resp.Header.Get("X-Powered-By")
}

// patience is how long a test waits for what takes milliseconds on a machine
// with nothing else to do.
const patience = 30 * time.Second

// until waits for a condition; it fails the test where that does not come.
func (r *ran) until(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			state := "kuma-dp runs"
			select {
			case err := <-r.done:
				r.done <- err
				state = fmt.Sprintf("kuma-dp has ended with error %v", err)
			default:
			}
			r.t.Fatalf("not within %v: %s; %s", patience, what, state)
		}
		<-tick.C
	}
}

func (r *ran) logs(s string) bool { return strings.Contains(r.log.String(), s) }

// shortTemp is a temporary directory whose path leaves room for sockets.
func shortTemp(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "dp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}

// freePort is a port for kuma-dp.
func freePort(t *testing.T) uint32 { return uint32(lab.FreePort(t)) }
