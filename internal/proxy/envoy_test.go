//go:build e2e

package proxy_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/internal/envoy"
	"kuma/internal/envoy/envoytest"
	"kuma/internal/policy/policytest"
	"kuma/test/lab"
)

// binary is the Envoy under test; the e2e target of the Makefile sets it.
func binary(t *testing.T) string {
	t.Helper()
	p := os.Getenv("ENVOY")
	if p == "" {
		t.Fatal("set ENVOY to the path of an Envoy, or run make e2e")
	}
	return p
}

// authority issues certificates for a mesh.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  string
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, key, cert, pemOf("CERTIFICATE", der)}
}

func pemOf(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func (a *authority) issue(uris ...string) (cert, key string) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			a.t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return pemOf("CERTIFICATE", der), pemOf("PRIVATE KEY", raw)
}

// static writes a bootstrap that Envoy can run without a control plane.
func (a *authority) static(res envoy.Resources, uris ...string) string {
	a.t.Helper()
	cert, key := a.issue(uris...)
	raw, err := envoytest.Static(res, cert, key, a.pem)
	if err != nil {
		a.t.Fatal(err)
	}
	path := filepath.Join(a.t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// patience is how long a test waits for what takes milliseconds on a machine
// with nothing else to do.
const patience = 30 * time.Second

// run starts Envoy and waits until its workers serve. It returns the path of
// its admin socket.
func run(t *testing.T, config string) string {
	t.Helper()
	raw, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	admin := filepath.Join(t.TempDir(), "admin")
	var tree map[string]any
	if err := json.Unmarshal(raw, &tree); err != nil {
		t.Fatal(err)
	}
	tree["admin"] = map[string]any{"address": map[string]any{"pipe": map[string]any{"path": admin}}}
	if raw, err = json.Marshal(tree); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary(t), "-c", config, "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning", "--file-flush-interval-msec", "10")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var logged strings.Builder
	go func() {
		defer close(done)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			logged.WriteString(s.Text() + "\n")
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(logged.String())
		}
	})
	deadline := time.Now().Add(patience)
	for {
		if s, err := adminGet(admin, "/ready"); err == nil && strings.HasPrefix(s, "LIVE") {
			return admin
		}
		if time.Now().After(deadline) {
			t.Fatal("Envoy is not ready")
		}
		select {
		case <-done:
			t.Fatal("Envoy ended")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func adminGet(socket, path string) (string, error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	resp, err := c.Get("http://admin" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// variants are the worlds that Envoy must accept.
var variants = map[string]string{
	"strict, nobody allowed": "",
	"from": `
---
type: MeshTrafficPermission
name: web
spec:
  from:
  - {targetRef: {kind: Mesh}, default: {action: Deny}}
  - {targetRef: {kind: MeshSubset, tags: {kuma.io/service: web, version: v1}}, default: {action: Allow}}
  - {targetRef: {kind: MeshService, name: other}, default: {action: AllowWithShadowDeny}}
`,
	"rules": `
---
type: MeshTrafficPermission
name: web
spec:
  rules:
  - default:
      deny: [{spiffeID: {type: Exact, value: spiffe://default/bad}}]
      allow: [{spiffeID: {type: Prefix, value: spiffe://default/web}}, {sni: {type: Exact, value: a.b}, spiffeID: {type: Exact, value: spiffe://default/x}}]
      allowWithShadowDeny: [{spiffeID: {type: Exact, value: spiffe://default/y}}]
---
type: MeshTrafficPermission
name: from
spec:
  from:
  - {targetRef: {kind: MeshSubset, tags: {kuma.io/service: web, version: v1}}, default: {action: Allow}}
`,
	"timeouts": `
---
type: MeshTimeout
name: t
spec:
  rules:
  - {default: {connectionTimeout: 3s, idleTimeout: 0s, http: {requestTimeout: 5s, maxStreamDuration: 1m, requestHeadersTimeout: 1s, maxConnectionDuration: 1h}}}
  - {matches: [{spiffeID: {type: Exact, value: spiffe://default/web}}], default: {http: {requestTimeout: 1s}}}
`,
}

func TestEnvoyAccepts(t *testing.T) {
	for name, more := range variants {
		for _, mode := range []string{"STRICT", "PERMISSIVE", "none"} {
			t.Run(name+"/"+mode, func(t *testing.T) {
				docs := strings.Replace(twoServices, "type: builtin", "type: builtin, mode: "+mode, 1)
				if mode == "none" {
					docs = strings.Replace(twoServices, "enabledBackend: ca-1", "enabledBackend: ''", 1)
				}
				pic := policytest.Picture(t, docs+more, kinds()...)
				a := newAuthority(t)
				for _, dp := range []string{"web-1", "backend-1"} {
					_, res := generate(t, generator(), pic, dp)
					path := a.static(res, "spiffe://default/web")
					out, err := exec.Command(binary(t), "--mode", "validate", "-c", path, "-l", "warning").CombinedOutput()
					if err != nil {
						s, _ := envoytest.Print(res)
						t.Fatalf("%v: %s\n%s", err, out, s)
					}
				}
			})
		}
	}
}

// TestEnvoyRefuses runs two Envoys: who is allowed gets through, who is not is
// refused and logged, and a workload's own 403 is not.
func TestEnvoyRefuses(t *testing.T) {
	var seen http.Header
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header.Clone()
		if r.URL.Path == "/forbidden" {
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	defer app.Close()
	appPort := app.Listener.Addr().(*net.TCPAddr).Port
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	httpPort, tcpPort := lab.FreePort(t), lab.FreePort(t)
	docs := `
type: Mesh
name: default
mtls: {enabledBackend: ca-1, backends: [{name: ca-1, type: builtin}]}
---
type: Secret
name: default.ca-builtin-cert-ca-1
data: LS0tLS1CRUdJTg==
---
type: Dataplane
name: backend
networking:
  address: 127.0.0.12
  inbound:
  - {port: %[1]d, servicePort: %[2]d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: backend, kuma.io/protocol: http}}
  - {port: %[3]d, servicePort: %[4]d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: echo, kuma.io/protocol: tcp}}
---
type: MeshTrafficPermission
name: allow
spec:
  from:
  - {targetRef: {kind: MeshSubset, tags: {kuma.io/service: web}}, default: {action: Allow}}
  - {targetRef: {kind: MeshSubset, tags: {kuma.io/service: bad}}, default: {action: Deny}}
`
	docs = fmt.Sprintf(docs, httpPort, appPort, tcpPort, echo.Addr().(*net.TCPAddr).Port)
	callers := map[string][3]int{}
	for i, c := range []string{"web", "intruder", "bad"} {
		address := fmt.Sprintf("127.0.0.%d", 20+i)
		callers[c] = [3]int{lab.FreePort(t), lab.FreePort(t), lab.FreePort(t)}
		docs += fmt.Sprintf(`
---
type: Dataplane
name: %[1]s
networking:
  address: %[2]s
  inbound: [{port: %[3]d, servicePort: 1, serviceAddress: 127.0.0.1, tags: {kuma.io/service: %[1]s, kuma.io/protocol: http}}]
  outbound:
  - {port: %[4]d, tags: {kuma.io/service: backend}}
  - {port: %[5]d, tags: {kuma.io/service: echo}}
`, c, address, callers[c][0], callers[c][1], callers[c][2])
	}
	pic := policytest.Picture(t, docs, kinds()...)
	a := newAuthority(t)
	denials := filepath.Join(t.TempDir(), "denials")
	g := generator()
	_, res := generateTo(t, g, pic, "backend", denials)
	admin := run(t, a.static(res, "spiffe://default/backend", "spiffe://default/echo", "kuma://kuma.io/service/backend"))
	for c := range callers {
		_, res := generateTo(t, g, pic, c, "")
		run(t, a.static(res, "spiffe://default/"+c, "kuma://kuma.io/service/"+c))
	}
	get := func(caller, path string) int {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("http://127.0.0.1:%d%s", callers[caller][1], path), nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://default/forged")
		r.Header.Set("X-Kuma-Tags", "&forged&")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if got := get("web", "/"); got != 200 {
		t.Errorf("web gets %d, want 200", got)
	}
	if x := seen.Get("X-Forwarded-Client-Cert"); !strings.Contains(x, "URI=spiffe://default/web") || strings.Contains(x, "forged") || seen.Get("X-Kuma-Tags") != "" {
		t.Errorf("the workload sees %q and %q", x, seen.Get("X-Kuma-Tags"))
	}
	if got := get("web", "/forbidden"); got != 403 {
		t.Errorf("web gets %d from the workload, want 403", got)
	}
	if got := get("intruder", "/secret?token=s3cret"); got != 403 {
		t.Errorf("intruder gets %d, want 403", got)
	}
	if got := get("bad", "/"); got != 403 {
		t.Errorf("bad gets %d, want 403", got)
	}
	talk := func(caller string) string {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", callers[caller][2]))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(c, "hello")
		b := make([]byte, 5)
		n, _ := io.ReadFull(c, b)
		return string(b[:n])
	}
	if got := talk("web"); got != "hello" {
		t.Errorf("web hears %q", got)
	}
	if got := talk("intruder"); got != "" {
		t.Errorf("intruder hears %q", got)
	}
	var lines []map[string]any
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		raw, err := os.ReadFile(denials)
		if err != nil {
			t.Fatal(err)
		}
		lines = nil
		for l := range strings.Lines(string(raw)) {
			var m map[string]any
			if err := json.Unmarshal([]byte(l), &m); err == nil {
				lines = append(lines, m)
			}
		}
		if len(lines) >= 3 || time.Now().After(deadline) {
			if strings.Contains(string(raw), "s3cret") {
				t.Error("the log has the query string")
			}
			t.Log(string(raw))
			break
		}
	}
	if len(lines) != 3 {
		t.Errorf("%d refusals are logged, want 3", len(lines))
	}
	stats, err := adminGet(admin, "/stats/prometheus?filter=rbac")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(stats)
	stats, err = adminGet(admin, "/stats?filter=ssl.(curves|versions)")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ssl.curves.X25519MLKEM768", "ssl.versions.TLSv1.3"} {
		if !strings.Contains(stats, want) {
			t.Errorf("no connection has %s:\n%s", want, stats)
		}
	}
}
