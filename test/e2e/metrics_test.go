//go:build e2e

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"kuma/test/lab"
)

// gauges is a workload that serves metrics at /stats, and nothing else.
func (r *room) gauges() int {
	r.Helper()
	l := r.listen()
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path != "/stats" || q.URL.RawQuery != "" {
			http.NotFound(w, q)
			return
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		fmt.Fprint(w, "# TYPE app_orders_total counter\napp_orders_total{mesh=\"of the app\"} 5\n")
	})}
	go func() { _ = srv.Serve(l) }()
	r.Cleanup(func() { _ = srv.Close() })
	return port(l)
}

// families are the metrics that a URL serves, as an independent program reads
// them.
func (r *room) families(c *http.Client, url string) (map[string]*dto.MetricFamily, error) {
	a, err := r.fetchURL(c, url)
	if err != nil {
		return nil, err
	}
	if a.status != http.StatusOK {
		return nil, fmt.Errorf("%d %s", a.status, a.body)
	}
	p := expfmt.NewTextParser(model.UTF8Validation)
	return p.TextToMetricFamilies(strings.NewReader(a.body))
}

// series is the value of the one series of a family that has these labels.
func series(all map[string]*dto.MetricFamily, family string, labels ...string) (float64, error) {
	f := all[family]
	if f == nil {
		return 0, fmt.Errorf("there is no %s among %d families", family, len(all))
	}
	for _, m := range f.GetMetric() {
		has := map[string]string{}
		for _, l := range m.GetLabel() {
			has[l.GetName()] = l.GetValue()
		}
		fits := true
		for i := 0; i < len(labels); i += 2 {
			fits = fits && has[labels[i]] == labels[i+1]
		}
		if fits {
			return m.GetCounter().GetValue() + m.GetGauge().GetValue() + m.GetUntyped().GetValue(), nil
		}
	}
	return 0, fmt.Errorf("no series of %s has %q: %v", family, labels, f.GetMetric())
}

// closed waits until nobody listens on a port.
func (r *room) closed(port int) {
	r.Helper()
	r.await(fmt.Sprintf("port %d is closed", port), func() error {
		c, err := net.DialTimeout("tcp4", "127.0.0.1:"+strconv.Itoa(port), time.Second)
		if err == nil {
			_ = c.Close()
			return fmt.Errorf("it is open")
		}
		return nil
	})
}

// TestMeshMetric: the policy opens a port on which Prometheus finds Envoy's
// metrics with the workload's, follows its changes, and goes with it.
func TestMeshMetric(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to, app := out{port: r.port(), service: "backend"}, r.gauges()
	pair := filepath.Join(r.Dir, "metrics")
	_, err := cp.Kumactl("", "generate", "tls-certificate", "--type=server", "--hostname=127.0.0.1", "--cert-file="+pair+".crt", "--key-file="+pair+".key")
	r.must(err)
	web := r.join(cp, "web", r.caller("web", to), lab.ProxyOptions{Args: []string{"--metrics-cert-path=" + pair + ".crt", "--metrics-key-path=" + pair + ".key"}})
	r.ready(web, r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site("backend").port}})))
	r.answers(to.port, http.StatusOK)

	policy := func(port int, tlsMode, sidecar string) {
		t.Helper()
		r.apply(cp, fmt.Sprintf(`type: MeshMetric
mesh: default
name: metrics
spec:
  targetRef: {kind: Dataplane, labels: {app: web}}
  default:
%s    applications: [{name: orders, port: %d, path: /stats}]
    backends: [{type: Prometheus, prometheus: {port: %d, path: /m, tls: {mode: %s}}}]
`, sidecar, app, port, tlsMode))
	}
	plain := r.port()
	policy(plain, "Disabled", "")
	c := client(false)
	url := func(scheme string, port int) string { return fmt.Sprintf("%s://127.0.0.1:%d/m", scheme, port) }
	r.await("metrics of Envoy and of the workload are served", func() error {
		all, err := r.families(c, url("http", plain)+"?name=ignored")
		if err == nil {
			_, err = series(all, "envoy_cluster_upstream_rq_total", "envoy_cluster_name", "backend", "mesh", "default", "dataplane", "web", "service", "web", "kuma_proxy_role", "sidecar", "kuma_io_mesh_traffic", "true")
		}
		if err == nil {
			var n float64
			if n, err = series(all, "app_orders_total", "mesh", "default", "exported_mesh", "of the app", "service", "web"); err == nil && n != 5 {
				err = fmt.Errorf("there are %v orders", n)
			}
		}
		if err == nil && all["envoy_cluster_manager_cluster_added"] != nil {
			err = fmt.Errorf("there is more than the profile Basic has")
		}
		if err == nil {
			if _, inner := series(all, "envoy_cluster_upstream_rq_total", "envoy_cluster_name", "ads_cluster"); inner == nil {
				err = fmt.Errorf("there are metrics of the connection to the control plane")
			}
		}
		return err
	})
	if a, err := r.fetch(c, plain, "/other"); err != nil || a.status != http.StatusNotFound {
		t.Errorf("another path: %d, error %v", a.status, err)
	}

	for range 20 {
		_, err := r.families(c, url("http", plain))
		r.must(err)
	}
	r.await("kuma-dp stays small", func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", web.Cmd.Process.Pid))
		if err != nil {
			return err
		}
		_, after, _ := strings.Cut(string(b), "VmRSS:")
		var kib int
		if _, err := fmt.Sscan(after, &kib); err != nil || kib > 30<<10 {
			return fmt.Errorf("it has %d KiB of resident memory, error %v", kib, err)
		}
		t.Logf("kuma-dp has %d KiB of resident memory", kib)
		return nil
	})

	policy(plain, "Disabled", "    sidecar: {profiles: {appendProfiles: [{name: None}], include: [{type: Prefix, match: envoy_cluster_manager_}]}}\n")
	r.await("a change of the profile is followed", func() error {
		all, err := r.families(c, url("http", plain))
		switch {
		case err != nil:
			return err
		case all["envoy_cluster_upstream_rq_total"] != nil || all["envoy_cluster_manager_cluster_added"] == nil || all["app_orders_total"] == nil:
			return fmt.Errorf("there are %d families", len(all))
		}
		return nil
	})

	secured := r.port()
	policy(secured, "ProvidedTLS", "")
	ca, err := os.ReadFile(pair + ".crt")
	r.must(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	over := func(config *tls.Config) *http.Client {
		tr := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
		return &http.Client{Timeout: attempt, Transport: tr}
	}
	r.await("metrics are served with the provided certificate", func() error {
		all, err := r.families(over(&tls.Config{RootCAs: roots}), url("https", secured))
		if err == nil {
			_, err = series(all, "app_orders_total", "mesh", "default")
		}
		return err
	})
	if all, err := r.families(c, url("http", secured)); err == nil {
		t.Errorf("they are served without TLS too: %d families", len(all))
	}
	r.closed(plain)
	next, both := filepath.Join(r.Dir, "next"), ""
	_, err = cp.Kumactl("", "generate", "tls-certificate", "--type=server", "--hostname=127.0.0.1", "--cert-file="+next+".crt", "--key-file="+next+".key")
	r.must(err)
	for _, ending := range []string{".key", ".crt"} { // one after the other, as users do
		text, err := os.ReadFile(next + ending)
		r.must(err)
		r.must(os.WriteFile(pair+ending, text, 0o600))
		both += string(text)
	}
	renewed := x509.NewCertPool()
	renewed.AppendCertsFromPEM([]byte(both))
	r.await("a certificate that is replaced is served", func() error {
		_, err := r.families(over(&tls.Config{RootCAs: renewed}), url("https", secured))
		return err
	})

	mutual := r.port()
	policy(mutual, "ActiveMTLSBackend", "")
	inMesh := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{r.member(cp, "spiffe://default/prometheus")}}
	r.await("metrics are served to a member of the mesh", func() error {
		_, err := r.families(over(inMesh), url("https", mutual))
		return err
	})
	if _, err := r.families(over(&tls.Config{InsecureSkipVerify: true}), url("https", mutual)); err == nil {
		t.Error("they are served to who shows no certificate too")
	}

	_, err = cp.Kumactl("", "delete", "meshmetric", "metrics")
	r.must(err)
	r.closed(mutual)
	r.answers(to.port, http.StatusOK)
	r.logged(web.Process, "metrics are no longer configured by MeshMetric")
	if log := web.Log(); strings.Contains(log, "can't be used") || strings.Count(log, "metrics are configured by MeshMetric") != 1 {
		t.Errorf("what kuma-dp says of its configuration:\n%s", log)
	}
}

// TestMeshMetricsBackend: the mesh's own metrics, with a workload's endpoint
// that the mesh names and one that the Dataplane does.
func TestMeshMetricsBackend(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	app, own, at := r.gauges(), r.gauges(), r.port()
	r.apply(cp, fmt.Sprintf(`type: Mesh
name: default
metrics:
  enabledBackend: p
  backends:
  - name: p
    type: prometheus
    conf:
      port: %d
      path: /m
      tls: {mode: disabled}
      envoy: {filterRegex: "^(cluster|server)\\..*"}
      aggregate:
      - {name: app, port: %d, path: /stats}
      - {name: gone, port: %d, path: /stats}
`, at, app, r.port()))
	y := r.caller("web") + fmt.Sprintf("metrics:\n  type: prometheus\n  conf:\n    aggregate:\n    - {name: app, port: %d, path: /stats}\n", own)
	web := r.join(cp, "web", y)
	r.ready(web)
	r.await("metrics of Envoy and of the workload are served", func() error {
		all, err := r.families(client(false), fmt.Sprintf("http://127.0.0.1:%d/m", at))
		if err == nil {
			_, err = series(all, "app_orders_total", "mesh", "of the app")
		}
		if err == nil {
			_, err = series(all, "envoy_server_live")
		}
		if err == nil && all["envoy_listener_manager_listener_added"] != nil {
			err = fmt.Errorf("the filter has no effect")
		}
		return err
	})
	r.logged(web.Process, "an application's metrics are left out", "gone")
	r.apply(cp, "type: Mesh\nname: default\n")
	r.closed(at)
}

// TestMetricsPairRefused: a pair that does not belong together is told at once.
func TestMetricsPairRefused(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	for _, name := range []string{"a", "b"} {
		at := filepath.Join(r.Dir, name)
		_, err := cp.Kumactl("", "generate", "tls-certificate", "--type=server", "--hostname=127.0.0.1", "--cert-file="+at+".crt", "--key-file="+at+".key")
		r.must(err)
	}
	p := r.join(cp, "web", r.caller("web"), lab.ProxyOptions{Env: []string{
		"KUMA_DATAPLANE_RUNTIME_METRICS_CERT_PATH=" + filepath.Join(r.Dir, "a.crt"), "KUMA_DATAPLANE_RUNTIME_METRICS_KEY_PATH=" + filepath.Join(r.Dir, "b.key"),
	}})
	select {
	case <-p.Done():
	case <-r.ctx.Done():
		t.Fatal("kuma-dp goes on")
	}
	if log := p.Log(); p.ExitCode() != 1 || !strings.Contains(log, "KUMA_DATAPLANE_RUNTIME_METRICS_CERT_PATH") || !strings.Contains(log, "is not the key of certificate file") {
		t.Errorf("exit code %d:\n%s", p.ExitCode(), log)
	}
}
