// Package prometheus_test asks a control plane which proxies to scrape as
// Prometheus does: by Prometheus's own discovery client.
package prometheus_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/discovery"
	"github.com/prometheus/prometheus/discovery/targetgroup"
	"github.com/prometheus/prometheus/discovery/xds"
	"go.yaml.in/yaml/v2"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// bin holds the programs, which are built once.
var bin string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "kuma-prometheus")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	bin = dir
	build := exec.Command("go", "build", "-o", dir, "./cmd/kuma-cp", "./cmd/kumactl")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// controlPlane is one that runs.
type controlPlane struct {
	t         *testing.T
	dir       string
	api, mads int
}

// block returns the first of five ports that nobody listens on, and that nobody
// else is given until the test ends. They are of a block as package lab has them,
// which is not of this module: who listens on a block's first port owns it.
func block(t *testing.T) int {
	t.Helper()
	const firstPort, lastPort, size, want = 10240, 32768, 32, 5
	const blocks = (lastPort - firstPort) / size
next:
	for n := range blocks {
		p := firstPort + (os.Getpid()+n)%blocks*size
		owner, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", p))
		if err != nil {
			continue
		}
		for n := range want {
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", p+1+n))
			if err != nil {
				_ = owner.Close()
				continue next
			}
			_ = l.Close()
		}
		t.Cleanup(func() { _ = owner.Close() })
		return p + 1
	}
	t.Fatal("all ports for tests are in use")
	return 0
}

func start(t *testing.T, env ...string) *controlPlane {
	t.Helper()
	c := &controlPlane{t: t, dir: t.TempDir()}
	ports := map[string]int{}
	first := block(t)
	for i, name := range []string{"KUMA_API_SERVER_HTTP_PORT", "KUMA_API_SERVER_HTTPS_PORT", "KUMA_DP_SERVER_PORT", "KUMA_DIAGNOSTICS_SERVER_PORT", "KUMA_MONITORING_ASSIGNMENT_SERVER_PORT"} {
		ports[name] = first + i
		env = append(env, fmt.Sprintf("%s=%d", name, ports[name]))
	}
	c.api, c.mads = ports["KUMA_API_SERVER_HTTP_PORT"], ports["KUMA_MONITORING_ASSIGNMENT_SERVER_PORT"]
	var log bytes.Buffer
	p := exec.Command(filepath.Join(bin, "kuma-cp"), "run")
	p.Env = append([]string{"HOME=" + c.dir, "KUMA_GENERAL_WORK_DIR=" + c.dir, "KUMA_STORE_TYPE=memory"}, env...)
	p.Stderr = &log
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = p.Wait()
	}()
	t.Cleanup(func() {
		_ = p.Process.Signal(os.Interrupt)
		<-ended
		if t.Failed() {
			t.Logf("kuma-cp said:\n%s", log.String())
		}
	})
	c.until("the control plane is ready", func() bool {
		select {
		case <-ended:
			t.Fatalf("kuma-cp ended:\n%s", log.String())
		default:
		}
		res, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", ports["KUMA_DIAGNOSTICS_SERVER_PORT"]))
		if err != nil {
			return false
		}
		_ = res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return c
}

func (c *controlPlane) until(what string, ok func() bool) {
	c.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("not in time: %s", what)
		}
	}
}

// write puts or deletes a resource.
func (c *controlPlane) write(method, path, body string) {
	c.t.Helper()
	r, err := http.NewRequest(method, fmt.Sprintf("http://127.0.0.1:%d%s", c.api, path), strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if said, _ := io.ReadAll(res.Body); res.StatusCode > 299 {
		c.t.Fatalf("%s %s: %d %s", method, path, res.StatusCode, said)
	}
}

func (c *controlPlane) proxy(mesh, name, address string) {
	c.t.Helper()
	c.write("PUT", "/meshes/"+mesh+"/dataplanes/"+name, fmt.Sprintf(
		`{"type":"Dataplane","mesh":%q,"name":%q,"networking":{"address":%q,"inbound":[{"port":80,"tags":{"kuma.io/service":"web","team":"a"}}]}}`, mesh, name, address))
}

func (c *controlPlane) gone(mesh, name string) {
	c.t.Helper()
	c.write("DELETE", "/meshes/"+mesh+"/dataplanes/"+name, "")
}

const meshMetric = `{"type":"MeshMetric","mesh":"default","name":"all","spec":{"default":{"backends":[{"type":"Prometheus","prometheus":{"clientId":"one","port":6000,"path":"/m"}}]}}}`

// discoverer is Prometheus's own.
type discoverer struct {
	t   *testing.T
	log *syncBuffer

	mu      sync.Mutex
	targets []string
	updates int
}

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// discover runs Prometheus's discovery with a configuration as it stands under
// kuma_sd_configs.
func discover(t *testing.T, config string) *discoverer {
	t.Helper()
	var c xds.KumaSDConfig
	if err := yaml.UnmarshalStrict([]byte(config), &c); err != nil {
		t.Fatalf("Prometheus refuses its configuration: %v\n%s", err, config)
	}
	registry := prometheus.NewRegistry()
	metrics := c.NewDiscovererMetrics(registry, discovery.NewRefreshMetrics(registry))
	if err := metrics.Register(); err != nil {
		t.Fatal(err)
	}
	d := &discoverer{t: t, log: &syncBuffer{}}
	one, err := c.NewDiscoverer(discovery.DiscovererOptions{Logger: slog.New(slog.NewTextHandler(d.log, nil)), Metrics: metrics})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	groups := make(chan []*targetgroup.Group)
	var running sync.WaitGroup
	running.Go(func() { one.Run(ctx, groups) })
	running.Go(func() {
		for {
			select {
			case all := <-groups:
				d.take(all)
			case <-ctx.Done():
				return
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
		metrics.Unregister()
	})
	return d
}

// take keeps the targets as "<dataplane> <scheme>://<address><path> <labels>".
func (d *discoverer) take(groups []*targetgroup.Group) {
	var out []string
	for _, g := range groups {
		for _, target := range g.Targets {
			labels := g.Labels.Merge(target)
			s := fmt.Sprintf("%s %s://%s%s", labels["__meta_kuma_dataplane"], labels["__scheme__"], labels["__address__"], labels["__metrics_path__"])
			for _, name := range slices.Sorted(maps.Keys(labels)) {
				if user, ok := strings.CutPrefix(string(name), "__meta_kuma_"); ok && user != "dataplane" {
					s += fmt.Sprintf(" %s=%s", user, labels[name])
				}
			}
			if labels[model.InstanceLabel] != labels["__meta_kuma_dataplane"] {
				s += " instance=" + string(labels[model.InstanceLabel])
			}
			out = append(out, s)
		}
	}
	slices.Sort(out)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.targets, d.updates = out, d.updates+1
}

func (d *discoverer) now() ([]string, int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.targets, d.updates
}

// sees waits until the targets are these.
func (d *discoverer) sees(want ...string) {
	d.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		got, updates := d.now()
		if updates > 0 && slices.Equal(got, want) {
			return
		}
		if time.Now().After(end) {
			d.t.Fatalf("after %d updates it sees\n%s\nwanted\n%s\nand says\n%s", updates, strings.Join(got, "\n"), strings.Join(want, "\n"), d.log)
		}
	}
}

// fails waits until discovery says why it fails, and checks that it never
// worked.
func (d *discoverer) fails(reason string) {
	d.t.Helper()
	for end := time.Now().Add(patience); !strings.Contains(d.log.String(), reason); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("it does not say %q, but\n%s", reason, d.log)
		}
	}
	if _, updates := d.now(); updates > 0 {
		d.t.Error("it learned of targets")
	}
}

// Proxies come and go, policies change, and the targets follow.
func TestTargetsFollow(t *testing.T) {
	t.Parallel()
	c := start(t)
	config := func(client string) string {
		return fmt.Sprintf("server: http://127.0.0.1:%d\nclient_id: %s\nrefresh_interval: 50ms\nfetch_timeout: 5s\n", c.mads, client)
	}
	one, other := discover(t, config("one")), discover(t, config("other"))
	one.sees()
	other.sees()

	// Without a policy nothing is served.
	c.proxy("default", "web-1", "10.0.0.1")
	c.write("PUT", "/meshes/default/meshmetrics/all", meshMetric)
	const first, second = "web-1 http://10.0.0.1:6000/m mesh=default service=web", "web-2 http://[2001:db8::2]:6000/m mesh=default service=web"
	one.sees(first)
	c.proxy("default", "web-2", "2001:db8::2")
	one.sees(first, second)
	other.sees()

	// What does not change is not sent: the request waits.
	_, before := one.now()
	time.Sleep(500 * time.Millisecond)
	if _, after := one.now(); after != before {
		t.Errorf("%d updates without a change", after-before)
	}

	c.gone("default", "web-1")
	one.sees(second)

	// A mesh with Mesh.metrics beside: each proxy counts by what holds for it.
	c.write("PUT", "/meshes/older", `{"type":"Mesh","name":"older","metrics":{"enabledBackend":"p","backends":[{"name":"p","type":"prometheus","conf":{"tls":{"mode":"providedTLS"}}}]}}`)
	c.proxy("older", "old-1", "10.0.0.9")
	const old = "old-1 https://10.0.0.9:5670/metrics label_kuma_io_service=web label_kuma_io_services=,web, label_kuma_io_zone=default label_kuma_io_zones=,default, label_team=a label_teams=,a, mesh=older service=web"
	one.sees(old, second)
	other.sees(old)

	c.write("DELETE", "/meshes/default/meshmetrics/all", "")
	one.sees(old)
	c.gone("older", "old-1")
	one.sees()
	other.sees()
}

// authority makes certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	// file is its certificate, PEM.
	file string
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(raw); err != nil {
		t.Fatal(err)
	}
	a.file = write(t, "CERTIFICATE", raw)
	return a
}

// leaf makes a pair for this machine and returns its files.
func (a *authority) leaf() (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "leaf"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, KeyUsage: x509.KeyUsageDigitalSignature,
	}, a.cert, k.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return write(a.t, "CERTIFICATE", raw), write(a.t, "PRIVATE KEY", der)
}

func write(t *testing.T, kind string, der []byte) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "*.pem")
	if err == nil {
		err = errors.Join(pem.Encode(f, &pem.Block{Type: kind, Bytes: der}), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// With TLS, Prometheus verifies the control plane, and the control plane
// Prometheus where it is set to.
func TestDiscoveryWithTLS(t *testing.T) {
	t.Parallel()
	ca, stranger := newAuthority(t, "ca"), newAuthority(t, "stranger")
	serverCert, serverKey := ca.leaf()
	clientCert, clientKey := ca.leaf()
	foreignCert, foreignKey := stranger.leaf()
	setting := "KUMA_MONITORING_ASSIGNMENT_SERVER_"
	own := start(t, setting+"TLS_ENABLED=true", setting+"TLS_CERT_FILE="+serverCert, setting+"TLS_KEY_FILE="+serverKey)
	general := start(t, setting+"TLS_ENABLED=true")
	strict := start(t, setting+"TLS_ENABLED=true", setting+"TLS_CERT_FILE="+serverCert, setting+"TLS_KEY_FILE="+serverKey,
		setting+"REQUIRE_CLIENT_CERT=true", setting+"TLS_CA_FILE="+ca.file)
	const seen = "web-1 http://10.0.0.1:6000/m mesh=default service=web"
	for _, c := range []*controlPlane{own, general, strict} {
		c.proxy("default", "web-1", "10.0.0.1")
		c.write("PUT", "/meshes/default/meshmetrics/all", meshMetric)
	}
	for _, c := range []struct {
		name   string
		cp     *controlPlane
		scheme string
		tls    map[string]string
		// fails is what is said, empty where it works.
		fails string
	}{
		{"a certificate of its own", own, "https", map[string]string{"ca_file": ca.file}, ""},
		{"the general certificate", general, "https", map[string]string{"ca_file": filepath.Join(general.dir, "kuma-cp.crt")}, ""},
		{"another authority", own, "https", map[string]string{"ca_file": stranger.file}, "certificate signed by unknown authority"},
		{"another name", own, "https", map[string]string{"ca_file": ca.file, "server_name": "elsewhere"}, "not elsewhere"},
		{"no TLS", own, "http", nil, "400"},
		{"a client's certificate", strict, "https", map[string]string{"ca_file": ca.file, "cert_file": clientCert, "key_file": clientKey}, ""},
		{"no client's certificate", strict, "https", map[string]string{"ca_file": ca.file}, "certificate required"},
		{"a stranger's certificate", strict, "https", map[string]string{"ca_file": ca.file, "cert_file": foreignCert, "key_file": foreignKey}, "tls: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			config := fmt.Sprintf("server: %s://127.0.0.1:%d\nclient_id: one\nrefresh_interval: 50ms\nfetch_timeout: 5s\n", c.scheme, c.cp.mads)
			if c.tls != nil {
				config += "tls_config:\n"
				for k, v := range c.tls {
					config += "  " + k + ": " + v + "\n"
				}
			}
			d := discover(t, config)
			if c.fails != "" {
				d.fails(c.fails)
				return
			}
			d.sees(seen)
		})
	}
}

// What kumactl prints is taken by Prometheus's own reader, and works.
func TestGeneratedConfig(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	serverCert, serverKey := ca.leaf()
	clientCert, clientKey := ca.leaf()
	setting := "KUMA_MONITORING_ASSIGNMENT_SERVER_"
	c := start(t, setting+"TLS_ENABLED=true", setting+"TLS_CERT_FILE="+serverCert, setting+"TLS_KEY_FILE="+serverKey,
		setting+"REQUIRE_CLIENT_CERT=true", setting+"TLS_CA_FILE="+ca.file)
	c.proxy("default", "web-1", "10.0.0.1")
	c.write("PUT", "/meshes/default/meshmetrics/all", meshMetric)
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, fmt.Appendf(nil, "contexts: [{name: s, controlPlane: s}]\ncontrolPlanes: [{name: s, coordinates: {apiServer: {url: 'http://127.0.0.1:%d'}}}]\ncurrentContext: s\n", c.api), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(bin, "kumactl"), "--config-file", file, "generate", "prometheus-config",
		"--ca-file", ca.file, "--cert-file", clientCert, "--key-file", clientKey, "--refresh-interval", "1s").Output()
	if err != nil {
		t.Fatalf("%v: %s", err, err.(*exec.ExitError).Stderr)
	}
	var printed struct {
		ScrapeConfigs []struct {
			KumaSDConfigs []yaml.MapSlice `yaml:"kuma_sd_configs"`
		} `yaml:"scrape_configs"`
	}
	if err := yaml.Unmarshal(out, &printed); err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if len(printed.ScrapeConfigs) != 1 || len(printed.ScrapeConfigs[0].KumaSDConfigs) != 1 {
		t.Fatalf("printed:\n%s", out)
	}
	config, err := yaml.Marshal(printed.ScrapeConfigs[0].KumaSDConfigs[0])
	if err != nil {
		t.Fatal(err)
	}
	discover(t, string(config)).sees("web-1 http://10.0.0.1:6000/m mesh=default service=web")
}

// Certificates are replaced while Prometheus waits; it goes on, and its next
// connection gets the new one.
func TestCertificateIsReplaced(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "ca")
	cert, key := ca.leaf()
	setting := "KUMA_MONITORING_ASSIGNMENT_SERVER_"
	c := start(t, "KUMA_GENERAL_TLS_RELOAD_INTERVAL=100ms", setting+"TLS_ENABLED=true", setting+"TLS_CERT_FILE="+cert, setting+"TLS_KEY_FILE="+key)
	c.write("PUT", "/meshes/default/meshmetrics/all", meshMetric)
	d := discover(t, fmt.Sprintf("server: https://127.0.0.1:%d\nclient_id: one\nrefresh_interval: 50ms\nfetch_timeout: 5s\ntls_config: {ca_file: %s}\n", c.mads, ca.file))
	d.sees()
	newCert, newKey := ca.leaf()
	for from, to := range map[string]string{newKey: key, newCert: cert} {
		raw, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(newCert)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(raw)
	c.until("the new certificate is served", func() bool {
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", c.mads), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		return bytes.Equal(conn.ConnectionState().PeerCertificates[0].Raw, block.Bytes)
	})
	c.proxy("default", "web-1", "10.0.0.1")
	d.sees("web-1 http://10.0.0.1:6000/m mesh=default service=web")
}
