package mitm_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kuma/internal/cp"
	"kuma/internal/ctl"
	"kuma/internal/dp"
	"kuma/internal/pki"
	"kuma/test/lab"
	"kuma/test/mitm"
	"kuma/test/postgres"
)

// as makes the test binary one of the programs.
const as = "TEST_AS"

func TestMain(m *testing.M) {
	ctx := context.Background()
	switch os.Getenv(as) {
	case "kuma-cp":
		os.Exit(cp.Main(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
	case "kumactl":
		os.Exit(ctl.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv))
	case "kuma-dp":
		// kuma-dp starts this binary again as its Envoy, which is not asked to do
		// more than to start.
		switch os.Args[1] {
		case "--version":
			fmt.Println("\nenvoy  version: abc/1.40.0/Clean/RELEASE/BoringSSL")
			os.Exit(0)
		case "--config-path":
			os.Exit(0)
		}
		os.Exit(dp.Main(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// A client is a program that connects to a control plane, and what it does
// there that matters.
type client struct {
	name string
	// to is what it goes to.
	to func(*testing.T, *bench) mitm.DoorConfig
	// shown tells which of its connections are shown the certificate in question;
	// the others are shown a good one. Nil means all.
	shown func(*tls.ClientHelloInfo) bool
	// command does it. What it needs is in the bench.
	command func(t *testing.T, b *bench, url, ca string) *exec.Cmd
	// skip has the command leave the verification out, as its user asked for.
	skip func(*exec.Cmd)
}

// clients are all there are. A further one is one line.
var clients = []client{
	{"kumactl", toAPI, nil, kumactl, inConfig("caCertFile:", "skipVerify: true, caCertFile:")},
	{"kumactl with an http:// address", toAPI, nil, kumactlOverTLS, inConfig("caCertFile:", "skipVerify: true, caCertFile:")},
	{"kuma-dp with an http:// address", toProxies, offersHTTP, kumaDPByAPI, withFlag("--skip-verify")},
	{"kuma-dp's bootstrap", toProxies, offersHTTP, kumaDP, withFlag("--skip-verify")},
	{"kuma-dp's link", toProxies, offersGRPC, kumaDP, withFlag("--skip-verify")},
	{"kuma-cp's store in PostgreSQL", toDatabase, nil, kumaCP, withEnv("KUMA_STORE_POSTGRES_TLS_MODE=verifyNone")},
}

func toAPI(_ *testing.T, b *bench) mitm.DoorConfig {
	return mitm.DoorConfig{To: fmt.Sprintf("localhost:%d", b.cfg.APIServer.HTTPS.Port), TLS: &tls.Config{RootCAs: b.ca}}
}

func toProxies(_ *testing.T, b *bench) mitm.DoorConfig {
	return mitm.DoorConfig{To: fmt.Sprintf("localhost:%d", b.cfg.DPServer.Port), TLS: &tls.Config{RootCAs: b.ca}}
}

// toDatabase starts a PostgreSQL server. It takes passwords as they are: SCRAM
// is bound to the server's certificate, and so would notice the door by itself.
func toDatabase(t *testing.T, _ *bench) mitm.DoorConfig {
	t.Helper()
	cert, key, err := pki.GenerateTLS("server", []string{"localhost"}, "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	s := postgres.Start(t, postgres.Options{
		HBA: []string{"hostssl all all 0.0.0.0/0 password"}, CertFile: write(t, "db.crt", string(cert)), KeyFile: write(t, "db.key", string(key)),
	})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return mitm.DoorConfig{To: fmt.Sprintf("localhost:%d", s.Port), TLS: &tls.Config{RootCAs: pool}, Postgres: true}
}

func kumaCP(t *testing.T, b *bench, address, ca string) *exec.Cmd {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	c := b.program("kuma-cp", "migrate", "up")
	c.Env = append(c.Env, "KUMA_STORE_TYPE=postgres", "KUMA_STORE_POSTGRES_HOST="+u.Hostname(), "KUMA_STORE_POSTGRES_PORT="+u.Port(), "KUMA_STORE_POSTGRES_USER="+postgres.User,
		"KUMA_STORE_POSTGRES_PASSWORD="+postgres.Password, "KUMA_STORE_POSTGRES_DB_NAME=postgres", "KUMA_STORE_POSTGRES_TLS_MODE=verifyFull", "KUMA_STORE_POSTGRES_TLS_CA_PATH="+ca)
	return c
}

func withEnv(entry string) func(*exec.Cmd) {
	return func(c *exec.Cmd) { c.Env = append(c.Env, entry) }
}

func withFlag(flag string) func(*exec.Cmd) {
	return func(c *exec.Cmd) { c.Args = append(c.Args, flag) }
}

// inConfig replaces text in the file that --config-file names.
func inConfig(old, with string) func(*exec.Cmd) {
	return func(c *exec.Cmd) {
		file := c.Args[slices.Index(c.Args, "--config-file")+1]
		text, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, []byte(strings.Replace(string(text), old, with, 1)), 0o600)
		}
		if err != nil {
			panic(err)
		}
	}
}

// A client of the port for proxies that offers HTTP/2 alone speaks gRPC.
func offersGRPC(h *tls.ClientHelloInfo) bool { return slices.Equal(h.SupportedProtos, []string{"h2"}) }
func offersHTTP(h *tls.ClientHelloInfo) bool { return !offersGRPC(h) }

func kumactl(t *testing.T, b *bench, url, ca string) *exec.Cmd {
	t.Helper()
	config := write(t, "config", fmt.Sprintf(
		"contexts: [{name: a, controlPlane: a}]\ncurrentContext: a\ncontrolPlanes: [{name: a, coordinates: {apiServer: {url: %q, caCertFile: %q, authType: tokens, authConf: {token: %s}}}}]\n", url, ca, b.user))
	return b.program("kumactl", "--config-file", config, "get", "meshes")
}

func kumaDP(t *testing.T, b *bench, url, ca string) *exec.Cmd {
	t.Helper()
	n := b.proxies.Add(1)
	c := b.program("kuma-dp", "run", "--cp-address", url, "--ca-cert-file", ca, "--dataplane-token-file", write(t, "token", b.proxy), "--binary-path", b.self, "--dataplane-file",
		write(t, "dp.yaml", fmt.Sprintf("type: Dataplane\nmesh: default\nname: web-%d\nnetworking: {address: 127.0.0.1, inbound: [{port: %d, servicePort: %d, tags: {kuma.io/service: web}}]}\n", n, 20000+n, 30000+n)))
	c.Env = append(c.Env, fmt.Sprint("KUMA_READINESS_PORT=", free(t)), "KUMA_CONTROL_PLANE_RETRY_MAX_DURATION=100ms", "KUMA_CONTROL_PLANE_RETRY_BACKOFF=50ms")
	return c
}

// plainAPI is an API's port without TLS, which says one thing. It returns its URL
// by the name that leads to the door.
func plainAPI(t *testing.T, door, answer string) string {
	t.Helper()
	u, err := url.Parse(door)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, strings.NewReplacer("URL", door, "PORT", u.Port()).Replace(answer))
	}))
	t.Cleanup(s.Close)
	return strings.Replace(s.URL, "127.0.0.1", u.Hostname(), 1)
}

// kumactlOverTLS has a client certificate, and so goes where the API says that it
// speaks TLS.
func kumactlOverTLS(t *testing.T, b *bench, url, ca string) *exec.Cmd {
	t.Helper()
	cert, key, err := pki.GenerateTLS("client", nil, "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	config := write(t, "config", fmt.Sprintf(
		"contexts: [{name: a, controlPlane: a}]\ncurrentContext: a\ncontrolPlanes: [{name: a, coordinates: {apiServer: {url: %q, caCertFile: %q, clientCertFile: %q, clientKeyFile: %q, authType: tokens, authConf: {token: %s}}}}]\n",
		plainAPI(t, url, `{"product":"Kuma","version":"2.14.0","httpsPort":PORT}`), ca, write(t, "client.pem", string(cert)), write(t, "client.key", string(key)), b.user))
	return b.program("kumactl", "--config-file", config, "get", "meshes")
}

// kumaDPByAPI is told by the API's port where to go and whom to trust; what its
// user says of that wins.
func kumaDPByAPI(t *testing.T, b *bench, url, ca string) *exec.Cmd {
	t.Helper()
	return kumaDP(t, b, plainAPI(t, url, `{"url":"URL","caCert":""}`), ca)
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// free is a port that nobody listens on.
func free(t *testing.T) int {
	t.Helper()
	l := lab.New(t.TempDir(), "", "")
	t.Cleanup(l.Close)
	ports, err := l.Ports(1)
	if err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

// bench is a control plane and what its clients need.
type bench struct {
	set         *mitm.Set
	cfg         cp.Config
	ca          *x509.CertPool
	self        string
	system      string
	user, proxy string
	proxies     atomic.Int64
}

// program is this binary as another, with a machine's pool of authorities that
// holds one alone.
func (b *bench) program(name string, args ...string) *exec.Cmd {
	c := exec.Command(b.self, args...)
	c.Env = []string{as + "=" + name, "SSL_CERT_FILE=" + b.system, "SSL_CERT_DIR=" + filepath.Dir(b.system), "HOME=" + filepath.Dir(b.system), "PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir()}
	return c
}

func newBench(t *testing.T, change ...func(*cp.Config)) *bench {
	t.Helper()
	set, err := mitm.Make()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{set: set, self: self, system: write(t, "system.pem", string(set.System)), cfg: cp.Default()}
	b.cfg.General.WorkDir = filepath.Join(t.TempDir(), "cp")
	b.cfg.Store.Type = "memory"
	b.cfg.APIServer.HTTP.Interface, b.cfg.APIServer.HTTPS.Interface = "127.0.0.1", "127.0.0.1"
	for _, port := range []*uint32{&b.cfg.APIServer.HTTP.Port, &b.cfg.APIServer.HTTPS.Port, &b.cfg.DPServer.Port, &b.cfg.Diagnostics.ServerPort, &b.cfg.MonitoringAssignmentServer.Port} {
		*port = uint32(free(t))
	}
	for _, c := range change {
		c(&b.cfg)
	}
	ctx, stop := context.WithCancel(context.Background())
	plane, err := cp.New(ctx, b.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		stop()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- plane.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	pem, err := os.ReadFile(filepath.Join(b.cfg.General.WorkDir, "kuma-cp.crt"))
	if err != nil {
		t.Fatal(err)
	}
	b.ca = x509.NewCertPool()
	b.ca.AppendCertsFromPEM(pem)
	eventually(t, "the control plane is ready", func() bool {
		r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", b.cfg.Diagnostics.ServerPort))
		if err != nil {
			return false
		}
		_ = r.Body.Close()
		return r.StatusCode == http.StatusOK
	})
	b.user = b.token(t, "user", `{"name":"jane","validFor":"1h"}`)
	b.proxy = b.token(t, "dataplane", `{"mesh":"default","validFor":"1h"}`)
	return b
}

// eventually waits for a start that says nothing of itself.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(30 * time.Second); !is(); <-tick.C {
		if time.Now().After(end) {
			t.Fatal("not in time: " + what)
		}
	}
}

func (b *bench) token(t *testing.T, sort, body string) string {
	t.Helper()
	r, err := http.Post(fmt.Sprintf("http://127.0.0.1:%d/tokens/%s", b.cfg.APIServer.HTTP.Port, sort), "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	var out bytes.Buffer
	if _, err := out.ReadFrom(r.Body); err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("no token: %s %s %v", r.Status, &out, err)
	}
	return out.String()
}

// try has a client meet a certificate, and returns what it wrote and whether it
// came through; heard is how many bytes the man in the middle got of it.
func (b *bench) try(t *testing.T, c client, to mitm.DoorConfig, show mitm.Case, change ...func(*exec.Cmd)) (output string, through bool, heard int64, refused bool) {
	t.Helper()
	good := b.set.Good[slices.IndexFunc(b.set.Good, func(g mitm.Case) bool { return g.Host == show.Host })]
	to.Show = func(h *tls.ClientHelloInfo) (mitm.Case, bool) {
		if c.shown == nil || c.shown(h) {
			return show, true
		}
		return good, false
	}
	door, err := mitm.Open(to)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = door.Close() }()
	cmd := c.command(t, b, fmt.Sprintf("https://%s:%d", show.Host, door.Port()), write(t, "ca.pem", string(b.set.CA)))
	for _, f := range change {
		f(cmd)
	}
	out, err := cmd.CombinedOutput()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		t.Fatal(err)
	}
	if err != nil {
		select {
		case <-door.Refused():
			refused = true
		case <-time.After(30 * time.Second):
		}
	}
	return string(out), err == nil, door.Heard(), refused
}

// TestManInTheMiddle is HRD-02: no client speaks to one whose certificate is not
// its control plane's, however near it comes; and each speaks to its control
// plane by way of the same door.
func TestManInTheMiddle(t *testing.T) {
	b := newBench(t)
	if len(b.set.Bad) < 12 {
		t.Fatalf("only %d bad certificates", len(b.set.Bad))
	}
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			to := c.to(t, b)
			for _, show := range b.set.Good {
				t.Run(show.Name, func(t *testing.T) {
					t.Parallel()
					out, through, heard, _ := b.try(t, c, to, show)
					if !through || heard == 0 {
						t.Errorf("did not get what it came for (%d bytes were heard):\n%s", heard, out)
					}
				})
			}
			// The check of the check: who asks for no verification, by a flag that
			// says so, is heard, and is told.
			t.Run("not verified", func(t *testing.T) {
				t.Parallel()
				out, through, heard, _ := b.try(t, c, to, b.set.Bad[0], c.skip)
				if !through || heard == 0 || !strings.Contains(out, "not verified") {
					t.Errorf("through %v, heard %d bytes:\n%s", through, heard, out)
				}
			})
			for _, show := range b.set.Bad {
				t.Run(show.Name, func(t *testing.T) {
					t.Parallel()
					out, through, heard, refused := b.try(t, c, to, show)
					if through || heard != 0 || !refused {
						t.Errorf("through %v, heard %d bytes, refused in the handshake %v:\n%s", through, heard, refused, out)
					}
					if text := strings.ToLower(out); !strings.Contains(text, "tls") && !strings.Contains(text, "x509") && !strings.Contains(text, "certificate") {
						t.Errorf("the reason is not said:\n%s", out)
					}
				})
			}
		})
	}
}

// TestManInTheMiddleOfPostgres: without a look at names, as verifyCa asks for, a
// certificate is taken that has no other fault; whatever else may be wrong, it is
// refused all the same.
func TestManInTheMiddleOfPostgres(t *testing.T) {
	b := newBench(t)
	c := client{"", toDatabase, nil, kumaCP, withEnv("KUMA_STORE_POSTGRES_TLS_MODE=verifyCa")}
	to := c.to(t, b)
	names := []string{
		"for another host", "with a name in its subject alone", "with a wildcard that does not reach", "with a bare wildcard", "for another address", "with the address as a name",
	}
	for _, show := range slices.Concat(b.set.Good, b.set.Bad) {
		i := slices.Index(names, show.Name)
		if i >= 0 {
			names = slices.Delete(names, i, i+1)
		}
		taken := i >= 0 || strings.HasPrefix(show.Name, "good")
		t.Run(show.Name, func(t *testing.T) {
			t.Parallel()
			out, through, heard, refused := b.try(t, c, to, show, c.skip)
			if through != taken || (heard > 0) != taken || refused == taken {
				t.Errorf("through %v, heard %d bytes, refused in the handshake %v:\n%s", through, heard, refused, out)
			}
		})
	}
	if len(names) > 0 {
		t.Errorf("there are no certificates %q", names)
	}
}

// kuma-dp as 0.7's manual starts it, against a real control plane: it is told
// where to go on this machine, and its token goes there over TLS alone.
func TestProxyByTheAPIPort(t *testing.T) {
	b := newBench(t)
	api := fmt.Sprintf("http://127.0.0.1:%d", b.cfg.APIServer.HTTP.Port)
	body := `{"type":"Dataplane","mesh":"default","name":"dp-echo-1","networking":{"address":"127.0.0.1","inbound":[{"port":21001,"servicePort":21002,"tags":{"kuma.io/service":"backend"}}]}}`
	r, err := http.NewRequest(http.MethodPut, api+"/meshes/default/dataplanes/dp-echo-1", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatal(resp.Status)
	}
	c := b.program("kuma-dp", "run", "--name=dp-echo-1", "--mesh=default", "--cp-address="+api, "--dataplane-token-file="+write(t, "token", b.proxy), "--binary-path", b.self)
	c.Env = append(c.Env, fmt.Sprint("KUMA_READINESS_PORT=", free(t)))
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"a deprecated form was used", fmt.Sprintf("control_plane=https://127.0.0.1:%d", b.cfg.DPServer.Port), "the control plane has taken this proxy in"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the log lacks %q:\n%s", want, out)
		}
	}
}
