package dp

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"kuma/internal/names"
	"kuma/internal/pki"
)

// bench is kuma-dp's metrics with a stand-in for Envoy's admin interface.
type bench struct {
	*testing.T
	*metrics
	log    *journal
	client *http.Client
	// asked is the query with which Envoy was asked last.
	asked atomic.Pointer[url.URL]
	// page is what Envoy's dynamic configuration answers; nil: it isn't there.
	page atomic.Pointer[string]
	// pages counts pages that were sent, unchanged those that were not.
	pages, unchanged atomic.Int32
}

func realStats(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("testdata/metrics/envoy-1.40.prom")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// newBench serves metrics; stats is what Envoy answers.
func newBench(t *testing.T, stats func(http.ResponseWriter)) *bench {
	t.Helper()
	dir := shortTemp(t)
	b := &bench{T: t, log: &journal{t: t}}
	log := slog.New(slog.NewTextHandler(b.log, nil))
	serve := func(path string, h http.HandlerFunc) {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
		srv.Start()
		t.Cleanup(srv.Close)
	}
	socket := filepath.Join(dir, "admin.sock")
	serve(socket, func(w http.ResponseWriter, r *http.Request) {
		b.asked.Store(r.URL)
		stats(w)
	})
	dynamicSocket := filepath.Join(dir, "dynamic.sock")
	serve(dynamicSocket, func(w http.ResponseWriter, r *http.Request) {
		page := b.page.Load()
		if page == nil || r.URL.Path != "/meshmetric" {
			http.NotFound(w, r)
			return
		}
		tag := fmt.Sprintf("%x", sha256.Sum256([]byte(*page)))
		w.Header()["etag"] = []string{tag}
		if r.Header.Get("If-None-Match") == tag {
			b.unchanged.Add(1)
			w.WriteHeader(http.StatusNotModified)
			return
		}
		b.pages.Add(1)
		_, _ = io.WriteString(w, *page)
	})
	b.metrics = newMetrics(log, newDynamic(dynamicSocket, log))
	b.dynamic.client.Timeout = patience
	a, err := newAdmin([]byte(`{"admin":{"address":{"pipe":{"path":"` + socket + `"}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	b.admin.Store(a)
	own := filepath.Join(dir, "mh.sock")
	if b.socket, err = listenMetrics(own); err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(own); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("socket: mode %v, error %v, want 0600", i.Mode(), err)
	}
	b.interval = time.Hour
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() { b.serve(ctx); close(done) }()
	t.Cleanup(func() {
		cancel()
		<-done
		b.metrics.client.CloseIdleConnections()
		a.client.CloseIdleConnections()
	})
	b.client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", own)
	}}}
	return b
}

func plainly(s string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) { _, _ = io.WriteString(w, s) }
}

// configure sets what MeshMetric says.
func (b *bench) configure(page string) {
	b.Helper()
	b.page.Store(&page)
	b.dynamic.refresh(b.Context())
}

// ample is the time for a scrape, in seconds, where how fast it is does not
// matter: the longest that is granted.
const ample = "60"

// scrape asks as Prometheus does.
func (b *bench) scrape(path, accept string) (status int, contentType, body string, err error) {
	req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, "http://kuma-dp"+path, nil)
	if err != nil {
		return 0, "", "", err
	}
	req.Header.Set("Accept", accept)
	req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", ample)
	resp, err := b.client.Do(req)
	if err != nil {
		return 0, "", "", err
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header.Get("Content-Type"), string(all), err
}

// good is a scrape that must succeed.
func (b *bench) good(path, accept string) (contentType, body string) {
	b.Helper()
	status, contentType, body, err := b.scrape(path, accept)
	if err != nil || status != http.StatusOK {
		b.Fatalf("scrape %s: status %d, error %v: %s", path, status, err, body)
	}
	return contentType, body
}

// app is an application that answers so.
func (b *bench) app(contentType string, h func(http.ResponseWriter, *http.Request)) uint32 {
	b.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if contentType != "" {
			w.Header().Set("Content-Type", contentType)
		} else {
			w.Header()["Content-Type"] = nil
		}
		h(w, r)
	}))
	b.Cleanup(srv.Close)
	return uint32(srv.Listener.Addr().(*net.TCPAddr).Port)
}

func says(body string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }
}

// parse reads metrics as an independent program does.
func parse(t *testing.T, body string) map[string]*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	f, err := p.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatalf("what kuma-dp answers is not in Prometheus's form: %v\n%s", err, body)
	}
	return f
}

// page is MeshMetric's page with these applications and a sidecar section.
func meshMetric(sidecar string, ports ...uint32) string {
	var apps []application
	for i, p := range ports {
		apps = append(apps, application{Name: fmt.Sprintf("app-%d", i), Port: p, Path: "/metrics", Address: "127.0.0.1"})
	}
	list, err := json.Marshal(apps)
	if err != nil {
		panic(err)
	}
	if sidecar != "" {
		sidecar = `"sidecar":` + sidecar + ","
	}
	return fmt.Sprintf(`{"observability":{"metrics":{"applications":%s,"backends":[],%s"extraLabels":{"mesh":"default","kuma.workload":"back\"end"}}}}`, list, sidecar)
}

func TestMetricsOfEnvoy(t *testing.T) {
	t.Parallel()
	b := newBench(t, plainly(realStats(t)))
	for _, c := range []struct{ name, sidecar string }{
		{"basic", ""},
		{"all", `{"profiles":{"appendProfiles":[{"name":"None"},{"name":"All"}]},"includeUnused":true}`},
	} {
		b.configure(meshMetric(c.sidecar))
		kind, body := b.good("/meshmetric?anything=else", "text/plain")
		if want := "text/plain; version=0.0.4; charset=utf-8"; kind != want {
			t.Errorf("content type %q, want %q", kind, want)
		}
		if got := b.asked.Load().Query(); got.Get("format") != "prometheus" || !got.Has("text_readouts") || got.Has("usedonly") != (c.name == "basic") || len(got) > 3 {
			t.Errorf("envoy was asked %v", got)
		}
		parse(t, body)
		want, err := os.ReadFile("testdata/metrics/" + c.name + ".prom")
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), body); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// The mesh's own metrics come by any other path, unfiltered and with no labels
// of MeshMetric's.
func TestLegacyMetrics(t *testing.T) {
	t.Parallel()
	b := newBench(t, plainly(realStats(t)))
	var got atomic.Pointer[http.Request]
	port := b.app("", func(w http.ResponseWriter, r *http.Request) {
		got.Store(r)
		_, _ = io.WriteString(w, "app_requests 7\n")
	})
	b.aggregate([]application{{Name: "a", Port: port, Path: "/m?secret=1"}, {Name: "no port"}})
	_, body := b.good("/?usedonly&filter=cluster.*&x=1?filter=other", "text/plain")
	f := parse(t, body)
	if f["app_requests"].GetMetric()[0].GetUntyped().GetValue() != 7 || f["envoy_cluster_manager_cluster_added"] == nil {
		t.Errorf("the application's or Envoy's metrics are missing:\n%s", body)
	}
	if strings.Contains(body, `mesh="default"`) {
		t.Error("there are labels of MeshMetric's")
	}
	if q := b.asked.Load().Query(); !q.Has("usedonly") || q.Get("filter") != "cluster.*" || q.Has("x") {
		t.Errorf("envoy was asked %v", q)
	}
	if r := got.Load(); r.URL.RawQuery != "" || r.URL.Path != "/m" {
		t.Errorf("the application was asked %s", r.URL)
	}
	if !strings.Contains(b.log.String(), "no port") {
		t.Error("the application without a port is not named")
	}
	b.good("/metrics", "text/plain")
	if b.asked.Load().Query().Has("usedonly") {
		t.Error("used-only was asked for by itself")
	}
}

// Series of several versions of one cluster become one, and nothing gets lost.
func TestMergeKeepsSums(t *testing.T) {
	t.Parallel()
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		var in strings.Builder
		want := map[string]float64{}
		for i := range 4 {
			kind := []string{"counter", "gauge", "untyped", "histogram"}[i]
			fmt.Fprintf(&in, "# TYPE m%d %s\n", i, kind)
			var clusters []string
			for range 1 + r.IntN(12) {
				c := fmt.Sprintf("svc%d", r.IntN(3))
				switch r.IntN(4) {
				case 0, 1:
					c += fmt.Sprintf("-%016x", r.Uint64())
				case 2:
					c += fmt.Sprintf("-%015x", r.Uint64()>>4) // one digit too few
				}
				if !slices.Contains(clusters, c) {
					clusters = append(clusters, c)
				}
			}
			for _, c := range clusters {
				suffixes := []string{""}
				if kind == "histogram" {
					suffixes = []string{"_bucket", "_sum", "_count"}
				}
				for _, s := range suffixes {
					le := ""
					if s == "_bucket" {
						le = `,le="+Inf"`
					}
					v := float64(r.IntN(1000))
					if r.IntN(5) == 0 {
						v += 0.25
					}
					fmt.Fprintf(&in, "m%d%s{code=\"%d\",envoy_cluster_name=%q%s} %v\n", i, s, i, c, le, v)
					short, _ := unversioned([]byte(c))
					want[fmt.Sprintf("m%d%s %s", i, s, short)] += v
				}
			}
		}
		b := newBench(t, plainly(in.String()))
		_, body := b.good("/", "text/plain")
		parse(t, body)
		got := map[string]float64{}
		lines := newMetricReader(strings.NewReader(body), plainText)
		for {
			l, err := lines.next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if l.kind == sampleLine {
				key := fmt.Sprintf("%s %s", l.name, l.label(clusterLabel))
				if _, twice := got[key]; twice {
					t.Fatalf("seed %d: %s is there twice:\n%s\nof:\n%s", seed, key, body, in.String())
				}
				var v float64
				if _, err := fmt.Sscan(string(l.value), &v); err != nil {
					t.Fatal(err)
				}
				got[key] = v
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("seed %d (-want +got):\n%s\nof:\n%s", seed, d, in.String())
		}
	}
}

func TestMetricSum(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		in   []string
		want string
	}{
		{[]string{"1", "2"}, "3"},
		{[]string{"9007199254740993", "1"}, "9007199254740994"}, // more than a float holds
		{[]string{"1.5", "2"}, "3.5"},
		{[]string{"-3", "1"}, "-2"},
		{[]string{"9223372036854775807", "1"}, "9.223372036854776e+18"},
		{[]string{"NaN", "1"}, "NaN"},
		{[]string{"+Inf", "1"}, "+Inf"},
	} {
		var s metricSum
		for _, v := range c.in {
			s.add([]byte(v))
		}
		if got := string(s.append(nil)); got != c.want {
			t.Errorf("%v: %s, want %s", c.in, got, c.want)
		}
	}
}

func TestSieve(t *testing.T) {
	t.Parallel()
	type want map[string]string // family: "" dropped, "+" kept, "-" kept without plumbing
	for _, c := range []struct {
		name, sidecar string
		want          want
	}{
		{"nothing said", `{}`, want{"envoy_cluster_upstream_rq": "-", "envoy_cluster_manager_cluster_added": "", "envoy_server_live": "-", "envoy_cluster_membership_total": "-", "envoy_cluster_membership_change": ""}},
		{"the broadest counts", `{"profiles":{"appendProfiles":[{"name":"None"},{"name":"Basic"}]}}`, want{"envoy_cluster_upstream_rq": "-", "envoy_runtime_num_layers": ""}},
		{"all", `{"profiles":{"appendProfiles":[{"name":"Basic"},{"name":"All"}]}}`, want{"envoy_cluster_upstream_rq": "+", "envoy_runtime_num_layers": "+"}},
		{"none", `{"profiles":{"appendProfiles":[{"name":"None"}]}}`, want{"envoy_cluster_upstream_rq": "", "envoy_server_live": ""}},
		{"excluded", `{"profiles":{"exclude":[{"type":"Prefix","match":"envoy_server"},{"type":"Exact","match":"envoy_cluster_upstream_rq"}]}}`, want{"envoy_server_live": "", "envoy_cluster_upstream_rq": "", "envoy_cluster_upstream_rq_xx": "-"}},
		{"included", `{"profiles":{"appendProfiles":[{"name":"None"}],"include":[{"type":"Contains","match":"runtime"},{"type":"Regex","match":"live$"}]}}`, want{"envoy_server_live": "+", "envoy_runtime_num_layers": "+", "envoy_server_uptime": ""}},
		{"included wins", `{"profiles":{"exclude":[{"type":"Regex","match":".*"}],"include":[{"type":"Exact","match":"envoy_server_live"}]}}`, want{"envoy_server_live": "+", "envoy_cluster_upstream_rq": ""}},
	} {
		p, err := readMeshMetric([]byte(`{"observability":{"metrics":{"sidecar":` + c.sidecar + `}}}`))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for family, want := range c.want {
			pass, inner := p.sieve.family(family)
			got := map[bool]string{true: "+", false: "-"}[inner]
			if !pass {
				got = ""
			}
			if got != want {
				t.Errorf("%s: %s: %q, want %q", c.name, family, got, want)
			}
		}
	}
}

func TestPlumbing(t *testing.T) {
	t.Parallel()
	for series, want := range map[string]struct{ plumbing, traffic bool }{
		`a{envoy_cluster_name="backend"}`:                                         {false, true},
		`a{envoy_cluster_name="admin"}`:                                           {false, true}, // a service may have that name
		`a{envoy_cluster_name="kuma_envoy_admin"}`:                                {true, false},
		`a{envoy_cluster_name="kuma_metrics_hijacker"}`:                           {true, false},
		`a{envoy_cluster_name="_kuma_metrics_hijacker"}`:                          {true, false},
		`a{envoy_cluster_name="system_ads"}`:                                      {true, false},
		`a{envoy_cluster_name="ads_cluster"}`:                                     {true, false},
		`a{envoy_cluster_name="access_log_sink"}`:                                 {true, false},
		`a{envoy_cluster_name="kuma_sds"}`:                                        {true, false},
		`a{envoy_cluster_name="tracing_zipkin"}`:                                  {true, false},
		`a{envoy_cluster_name="meshaccesslog_opentelemetry_0"}`:                   {true, false},
		`a{envoy_http_conn_manager_prefix="admin"}`:                               {true, false},
		`a{envoy_http_conn_manager_prefix="localhost_8080"}`:                      {false, true},
		`a{envoy_http_conn_manager_prefix="_kuma_dynamicconfig"}`:                 {true, false},
		`a{envoy_listener_address="127.0.0.1_80"}`:                                {false, false},
		`a{envoy_listener_address="/tmp/kuma-dp-1/kuma-mesh-metric-config.sock"}`: {true, false},
		`a{}`:                                  {false, false},
		`a{listener="inbound_127.0.0.1_8080"}`: {false, false},
	} {
		l, err := newMetricReader(strings.NewReader(series+" 1\n"), plainText).next()
		if err != nil {
			t.Fatal(err)
		}
		if got := plumbing(l); got != want.plumbing {
			t.Errorf("%s: plumbing is %v", series, got)
		}
		if got := traffic(l); got != want.traffic {
			t.Errorf("%s: traffic is %v", series, got)
		}
	}
}

// What applications answer is bounded, checked whole, and never spoils what the
// others say (HRD-25).
func TestHostileApplications(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it moves tens of megabytes")
	}
	release := make(chan struct{})
	endless := func(line string) func(http.ResponseWriter, *http.Request) {
		chunk := strings.Repeat(line, 1+(64<<10)/len(line))
		return func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, chunk); err != nil {
					return
				}
			}
		}
	}
	const silence = "silence"
	for _, c := range []struct {
		name, contentType string
		answer            func(http.ResponseWriter, *http.Request)
		want              string
	}{
		{"never ending", "text/plain", endless("a_metric{a=\"b\"} 1\n"), "bytes that are allowed"},
		{"one line without end", "text/plain", endless("a"), "bytes that are allowed"},
		{"short lines", "text/plain", says(strings.Repeat("a 1\n", maxApplicationBody/4+1)), "bytes that are allowed"},
		{"garbage", "text/plain", says("\x00\xff\xfe<>"), "not UTF-8"},
		{"a page", "text/html; charset=utf-8", says("<html>"), "content type"},
		{"json", "application/json", says("{}"), "content type"},
		{"protobuf", "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited", says("x"), "content type"},
		{"a page that claims to be metrics", "text/plain", says("<html></html>\n"), "does not begin with the name"},
		{"good, then bad", "text/plain", says("good 1\nbad{ 2\n"), "line 2"},
		{"a label twice", "text/plain", says(`a{b="1",b="2"} 1` + "\n"), "there twice"},
		{"no value", "text/plain", says("a\n"), "is no number"},
		{"OpenMetrics cut off", "application/openmetrics-text; version=1.0.0", says("# TYPE a counter\na_total 1\n"), "# EOF"},
		{"more after the end", "application/openmetrics-text; version=1.0.0", says("a 1\n# EOF\nb 2\n"), "behind # EOF"},
		{"an error", "text/plain", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }, "status 418"},
		// HRD-12: nobody is led elsewhere.
		{"a redirect", "text/plain", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/metrics", http.StatusFound)
		}, "status 302"},
		{silence, "text/plain", func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}, "deadline exceeded"},
		{"headers without end", "text/plain", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) }, "header"},
		{"a body shorter than said", "text/plain", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, "a 1\n")
		}, "unexpected EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, plainly(realStats(t)))
			bad := b.app(c.contentType, c.answer)
			fine := b.app("text/plain", says("fine_total 3\n"))
			b.configure(meshMetric("", bad, fine))
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://kuma-dp/meshmetric", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", ample)
			if c.name == silence {
				req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", "6")
			}
			for range 2 {
				resp, err := b.client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK {
					t.Fatalf("status %d, error %v", resp.StatusCode, err)
				}
				f := parse(t, string(body))
				if f["fine_total"] == nil || f["envoy_server_live"] == nil || f["good"] != nil || f["a"] != nil {
					t.Errorf("what is fine is missing, or what is not is there: %v", slices.Sorted(maps.Keys(f)))
				}
			}
			log := b.log.String()
			if !strings.Contains(log, c.want) || !strings.Contains(log, "app-0") {
				t.Errorf("the log does not say %q of app-0:\n%s", c.want, log)
			}
			if n := strings.Count(log, "are left out"); n != 1 {
				t.Errorf("it is said %d times, want once:\n%s", n, log)
			}
		})
	}
	t.Cleanup(func() { close(release) })
}

// A scrape of the largest answers that are let through keeps kuma-dp small, and
// so does what follows it (HRD-25).
func TestMetricsMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("it moves tens of megabytes")
	}
	line := fmt.Sprintf("some_metric_of_an_application{path=%q} 1\n", "/"+strings.Repeat("a", 400)) // few, for a slow machine
	body := strings.Repeat(line, maxApplicationBody/len(line)-1)
	b := newBench(t, plainly(realStats(t)))
	var ports []uint32
	for range 6 { // together half as much again as is allowed
		ports = append(ports, b.app("text/plain", says(body)))
	}
	b.configure(meshMetric("", ports...))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://kuma-dp/meshmetric", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", ample)
	resp, err := b.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if err != nil || n < maxApplicationBody {
		t.Fatalf("%d bytes, error %v", n, err)
	}
	if !strings.Contains(b.log.String(), "all applications together") {
		t.Errorf("nothing was left out:\n%s", b.log.String())
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if more := int64(after.HeapInuse) - int64(before.HeapInuse); more > 8<<20 {
		t.Errorf("after the scrape there are %d bytes more in use", more)
	}
	if left := b.left.Load(); left != maxBodies {
		t.Errorf("%d of %d bytes were given back", left, maxBodies)
	}
}

// HRD-12: a policy can't make the proxy call other machines.
func TestApplicationAddresses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		address string
		want    string // of the URL, empty: refused
	}{
		{"", "http://127.0.0.1:80/m"},
		{"localhost", "http://127.0.0.1:80/m"},
		{"127.0.0.1", "http://127.0.0.1:80/m"},
		{"127.8.7.6", "http://127.8.7.6:80/m"},
		{"::1", "http://[::1]:80/m"},
		{"::ffff:127.0.0.1", "http://127.0.0.1:80/m"},
		{"192.0.2.1", ""},
		{"169.254.169.254", ""},
		{"::ffff:169.254.169.254", ""},
		{"8.8.8.8", ""},
		{"2001:db8::1", ""},
		{"224.0.0.1", ""},
		{"127.0.0.1:80@192.0.2.1", ""},
		{"name.invalid", ""},
	} {
		a := application{Address: c.address, Port: 80, Path: "/m"}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		got, err := a.url(ctx)
		cancel()
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, error %v, want %q", c.address, got, err, c.want)
		}
	}
}

func TestNegotiation(t *testing.T) {
	t.Parallel()
	const (
		plain = "text/plain; version=0.0.4; charset=utf-8"
		old   = "application/openmetrics-text; version=0.0.1; charset=utf-8"
		open  = "application/openmetrics-text; version=1.0.0; charset=utf-8"
	)
	const prometheus3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
	const prometheus2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
	for _, c := range []struct {
		name, accept string
		apps         []string // what they offer where they may
		want         string
	}{
		{"no application", prometheus3, nil, open},
		{"no application, an old scraper", "text/plain;version=0.0.4", nil, plain},
		{"nothing said", "", nil, plain},
		{"anything", "*/*", nil, plain},
		{"the scraper prefers text", "application/openmetrics-text;version=1.0.0;q=0.1,text/plain;q=0.9", nil, plain},
		{"OpenMetrics refused", "application/openmetrics-text;version=1.0.0;q=0,text/plain", nil, plain},
		{"garbage", ";;;,,/", nil, plain},
		{"the best of the applications", prometheus2, []string{plain, open, old}, open},
		{"only text", prometheus3, []string{plain}, plain},
		{"the older OpenMetrics", prometheus3, []string{plain, old}, old},
		{"an application that does not listen", "text/plain", []string{open}, plain},
	} {
		b := newBench(t, plainly(realStats(t)))
		var ports []uint32
		for _, a := range c.apps {
			body := "# TYPE x counter\nx_total{a=\"1\"} 5 1000.5 # {t=\"1\"} 1\n# EOF\n"
			if a == plain {
				body = "# HELP y_total A \"y\".\n# TYPE y_total counter\ny_total 6 1000500\n"
			}
			ports = append(ports, b.app(a, says(body)))
		}
		b.configure(meshMetric("", ports...))
		kind, body := b.good("/meshmetric", c.accept)
		if kind != c.want {
			t.Errorf("%s: content type %q, want %q", c.name, kind, c.want)
		}
		form, err := expositionOf(kind)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(body, "# EOF"); n != 0 && !form.open() || n != 1 && form.open() || n == 1 && !strings.HasSuffix(body, "\n# EOF\n") {
			t.Errorf("%s: # EOF is there %d times", c.name, n)
		}
		if form.open() {
			for in := newMetricReader(strings.NewReader(body), form); ; {
				if _, err := in.next(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v", c.name, err)
				}
			}
			continue
		}
		f := parse(t, body)
		if slices.Contains(c.apps, open) {
			if m := f["x_total"].GetMetric()[0]; m.GetCounter().GetValue() != 5 || m.GetTimestampMs() != 1000500 {
				t.Errorf("%s: %v", c.name, m)
			}
		}
	}
}

func TestExpositionForms(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		from, to exposition
		in, want string
	}{
		{
			"labels are added, what is in the way steps aside", plainText, plainText,
			"a 1\nb{} 2\nc { x = \"1\" , } 3\nd{mesh=\"own\",exported_mesh=\"too\"} 4\n{\"e.e\",\"x.y\"=\"1\"} 5\n{\"f.f\"} 6\n",
			"a{mesh=\"m\"} 1\nb{mesh=\"m\"} 2\nc{x=\"1\",mesh=\"m\"} 3\nd{exported_exported_mesh=\"own\",exported_mesh=\"too\",mesh=\"m\"} 4\n{\"e.e\",\"x.y\"=\"1\",mesh=\"m\"} 5\n{\"f.f\",mesh=\"m\"} 6\n",
		},
		{
			"escapes stay as they are", plainText, plainText,
			"a{b=\"\\\\ \\\" \\n } , é\"} 1\n", "a{b=\"\\\\ \\\" \\n } , é\",mesh=\"m\"} 1\n",
		},
		{
			"comments and empty lines go", plainText, plainText,
			"# a word\n\n#\n# EOF\n# HELP a  b  c\n# TYPE a gauge\n  a   1   2  \n", "# HELP a b  c\n# TYPE a gauge\na{mesh=\"m\"} 1 2\n",
		},
		{
			"text to OpenMetrics", plainText, openMetrics100,
			"# HELP a_total An \"a\"\\n.\n# TYPE a_total counter\na_total 1 1500\n# TYPE b counter\nb 1\n# TYPE c untyped\nc 1 1000\n",
			"# HELP a An \\\"a\\\"\\n.\n# TYPE a counter\na_total{mesh=\"m\"} 1 1.5\n# TYPE b unknown\nb{mesh=\"m\"} 1\n# TYPE c unknown\nc{mesh=\"m\"} 1 1\n# EOF\n",
		},
		{
			"OpenMetrics to text", openMetrics100, plainText,
			"# TYPE a counter\n# UNIT a seconds\n# HELP a An \\\"a\\\".\na_total 1 1.5 # {id=\"1\"} 0.5 1.2\na_created 3\n# TYPE b info\nb_info{v=\"1\"} 1\n# TYPE c stateset\nc{c=\"x\"} 1\n# TYPE d gaugehistogram\nd_bucket{le=\"+Inf\"} 1\n# TYPE e unknown\ne 1\n# EOF\n",
			"# HELP a_total An \"a\".\n# TYPE a_total counter\na_total{mesh=\"m\"} 1 1500\na_created{mesh=\"m\"} 3\n# TYPE b_info gauge\nb_info{v=\"1\",mesh=\"m\"} 1\n# TYPE c gauge\nc{c=\"x\",mesh=\"m\"} 1\n# TYPE d untyped\nd_bucket{le=\"+Inf\",mesh=\"m\"} 1\n# TYPE e untyped\ne{mesh=\"m\"} 1\n",
		},
		{
			"OpenMetrics stays", openMetrics001, openMetrics100,
			"# TYPE a counter\n# UNIT a seconds\na_total 1 1.5 # {id=\"1\"} 0.5 1.2\n# EOF\n",
			"# TYPE a counter\n# UNIT a seconds\na_total{mesh=\"m\"} 1 1.5 # {id=\"1\"} 0.5 1.2\n# EOF\n",
		},
	} {
		got, err := rewrite(c.in, c.from, c.to)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// rewrite passes an exposition on as kuma-dp does.
func rewrite(in string, from, to exposition) (string, error) {
	var out bytes.Buffer
	w := &metricWriter{out: bufio.NewWriter(&out), form: to, add: []addedLabel{{"mesh", "m"}}}
	for r := newMetricReader(strings.NewReader(in), from); ; {
		l, err := r.next()
		if errors.Is(err, io.EOF) {
			err := w.end()
			return out.String(), err
		}
		if err == nil {
			err = w.write(l, from)
		}
		if err != nil {
			return "", err
		}
	}
}

// Whatever an application answers: it is refused, or what is passed on of it is
// well-formed in either form (HRD-25).
func FuzzExposition(f *testing.F) {
	for _, s := range []string{
		"a 1\n", "# TYPE a counter\na{b=\"c\"} 1 2\n", "{\"a\",b=\"c\",} NaN\n", "a_total{x=\"\\\\\"} 1 # {y=\"z\"} 1 1\n# EOF\n",
		"# HELP a x\\\"y\n", "# TYPE \"a.b\" histogram\n{\"a.b_bucket\",le=\"1\"} 1\n# EOF\n", "a{mesh=\"1\",exported_mesh=\"2\"} -Inf 12.5\n# EOF\n", "# UNIT a s\n# EOF",
	} {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, in string, open bool) {
		from := plainText
		if open {
			from = openMetrics100
		}
		for _, to := range []exposition{plainText, openMetrics001, openMetrics100} {
			out, err := rewrite(in, from, to)
			if err != nil {
				continue
			}
			for r := newMetricReader(strings.NewReader(out), to); ; {
				l, err := r.next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatalf("from %q: %v", in, err)
				}
				if l.kind == sampleLine && string(l.label("mesh")) != "m" {
					t.Fatalf("from %q: %q has no label of ours", in, out)
				}
			}
		}
	})
}

func TestAddedLabels(t *testing.T) {
	t.Parallel()
	got, err := addedLabels(map[string]string{"kuma.proxy_role": "a\"b\\c\nd", "1x": "y", "mesh": "é\xff", "kuma_proxy.role": "z"})
	if err != nil {
		t.Fatal(err)
	}
	want := []addedLabel{{"_x", "y"}, {"kuma_proxy_role", `a\"b\\c\nd`}, {"mesh", "é\uFFFD"}}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(addedLabel{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for _, bad := range []map[string]string{{"": "x"}, {"__name__": "x"}, {"a": strings.Repeat("x", 5000)}} {
		if _, err := addedLabels(bad); err == nil {
			t.Errorf("%.60v is accepted", bad)
		}
	}
}

// A bad page leaves the last good one in force and is named once; a page that
// goes away ends it.
func TestDynamicConfiguration(t *testing.T) {
	t.Parallel()
	b := newBench(t, plainly("# TYPE envoy_server_live gauge\nenvoy_server_live 1\n"))
	if status, _, body, _ := b.scrape("/meshmetric", ""); status != http.StatusServiceUnavailable || !strings.Contains(body, "no MeshMetric") {
		t.Errorf("without a page: %d %s", status, body)
	}
	page := meshMetric("")
	b.page.Store(&page) // and nobody asks in between
	if _, body := b.good("/meshmetric", ""); !strings.Contains(body, `mesh="default"`) {
		t.Errorf("the page has no effect:\n%s", body)
	}
	for range 3 {
		b.dynamic.refresh(t.Context())
	}
	if b.pages.Load() != 1 || b.unchanged.Load() != 3 {
		t.Errorf("%d pages and %d unchanged, want 1 and 3", b.pages.Load(), b.unchanged.Load())
	}
	for _, c := range []struct{ page, want string }{
		{"{", "JSON"},
		{"{}", "observability.metrics is missing"},
		{`{"observability":{"metrics":{"applications":[{"name":"x","port":0}]}}}`, "port 0"},
		{`{"observability":{"metrics":{"applications":[{"name":"x","port":70000}]}}}`, "port 70000"},
		{`{"observability":{"metrics":{"applications":[{"name":"x","port":1,"path":"metrics"}]}}}`, "begin with /"},
		{`{"observability":{"metrics":{"sidecar":{"profiles":{"appendProfiles":[{"name":"Some"}]}}}}}`, "no profile"},
		{`{"observability":{"metrics":{"sidecar":{"profiles":{"include":[{"type":"Regex","match":"("}]}}}}}`, "profiles.include: [0]"},
		{`{"observability":{"metrics":{"sidecar":{"profiles":{"exclude":[{"type":"Suffix","match":"x"}]}}}}}`, "no type of a selector"},
		{`{"observability":{"metrics":{"sidecar":{"profiles":{"exclude":[{"type":"Exact"}]}}}}}`, "match must have"},
		{`{"observability":{"metrics":{"extraLabels":{"__a":"b"}}}}`, "extraLabels"},
		{strings.Repeat(" ", maxDynamic+1), "more than"},
	} {
		before := strings.Count(b.log.String(), "can't be used")
		b.configure(c.page)
		b.dynamic.refresh(t.Context())
		b.dynamic.refresh(t.Context())
		if n := strings.Count(b.log.String(), "can't be used") - before; n != 1 {
			t.Errorf("%.60s: said %d times, want once", c.page, n)
		}
		if !strings.Contains(b.log.String(), c.want) {
			t.Errorf("%.60s: the log does not say %q", c.page, c.want)
		}
		if _, body := b.good("/meshmetric", ""); !strings.Contains(body, `mesh="default"`) {
			t.Errorf("%.60s: the last good page is gone", c.page)
		}
	}
	b.configure(strings.Replace(meshMetric(`{"profiles":{"appendProfiles":[{"name":"None"}]}}`), `"backends":[]`, `"backends":[{"type":"OpenTelemetry","name":"otel","openTelemetry":{"endpoint":"x"}}]`, 1))
	if !strings.Contains(b.log.String(), "metrics are not sent to this backend") {
		t.Error("the backend that is not served is not named")
	}
	if _, body := b.good("/meshmetric", ""); strings.Contains(body, "envoy_server_live") {
		t.Error("the new page has no effect")
	}
	b.page.Store(nil)
	b.dynamic.refresh(t.Context())
	if status, _, _, _ := b.scrape("/meshmetric", ""); status != http.StatusServiceUnavailable {
		t.Errorf("the page is gone, yet the status is %d", status)
	}
	b.configure(meshMetric(""))
	if err := os.Remove(b.dynamic.socket); err != nil {
		t.Fatal(err)
	}
	b.dynamic.refresh(t.Context())
	if status, _, _, _ := b.scrape("/meshmetric", ""); status != http.StatusServiceUnavailable {
		t.Errorf("the socket is gone, yet the status is %d", status)
	}
}

// Envoy's failures are the scraper's to see: a part must not pass for the whole.
func TestMetricsWithoutEnvoy(t *testing.T) {
	t.Parallel()
	b := newBench(t, func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) })
	if status, _, _, _ := b.scrape("/", ""); status != http.StatusServiceUnavailable {
		t.Errorf("status %d, want 503", status)
	}
	big := "# TYPE a gauge\n" + strings.Repeat("a{b=\"c\"} 1\n", 10000) + "# TYPE b gauge\nb 1\nbad line\n"
	b = newBench(t, plainly(big))
	if status, _, _, err := b.scrape("/", ""); status == http.StatusOK && err == nil {
		t.Error("a part passed for the whole")
	}
	resp, err := b.client.Post("http://kuma-dp/", "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: status %d", resp.StatusCode)
	}
}

func TestScrapePatience(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]time.Duration{
		"": 10 * time.Second, "x": 10 * time.Second, "-1": 10 * time.Second, "NaN": 10 * time.Second, "10": 9500 * time.Millisecond, "1e300": 57 * time.Second, "+Inf": 57 * time.Second,
	} {
		if got := scrapePatience(header); got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}

func TestMetricsPair(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := pki.WriteFile(p, b); err != nil {
			t.Fatal(err)
		}
		return p
	}
	pair := func(name string) (string, string) {
		cert, key, err := pki.GenerateTLS("server", []string{"127.0.0.1"}, "ecdsa")
		if err != nil {
			t.Fatal(err)
		}
		return write(name+".crt", cert), write(name+".key", key)
	}
	cert, key := pair("a")
	_, other := pair("b")
	rubbish := write("rubbish", []byte("rubbish"))
	for _, c := range []struct{ cert, key, want string }{
		{cert, other, "is not the key of certificate file"},
		{rubbish, key, rubbish},
		{cert, rubbish, rubbish},
		{filepath.Join(dir, "none"), key, "no such file"},
	} {
		cfg := Config{MetricsCert: c.cert, MetricsKey: c.key, Log: slog.New(slog.DiscardHandler)}
		_, err := cfg.openMetricsPair()
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "KUMA_DATAPLANE_RUNTIME_METRICS_CERT_PATH") {
			t.Errorf("%s %s: %v, want %q", c.cert, c.key, err, c.want)
		}
	}
	if m, err := new(Config).openMetricsPair(); m != nil || err != nil {
		t.Errorf("without files: %v, error %v", m, err)
	}

	// Envoy's file follows the user's, and only good ones.
	log := &journal{t: t}
	cfg := Config{MetricsCert: cert, MetricsKey: key, Log: slog.New(slog.NewTextHandler(log, nil))}
	m, err := cfg.openMetricsPair()
	if err != nil {
		t.Fatal(err)
	}
	m.file = filepath.Join(dir, "envoy.json")
	read := func() (version string, chain []byte) {
		t.Helper()
		m.files.Look()
		if err := m.write(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(m.file)
		if err != nil {
			t.Fatal(err)
		}
		var doc struct {
			Version   string `json:"version_info"`
			Resources []struct {
				Name string `json:"name"`
				TLS  struct {
					Chain struct {
						Bytes []byte `json:"inline_bytes"`
					} `json:"certificate_chain"`
					Key struct {
						Bytes []byte `json:"inline_bytes"`
					} `json:"private_key"`
				} `json:"tls_certificate"`
			} `json:"resources"`
		}
		if err := json.Unmarshal(b, &doc); err != nil || len(doc.Resources) != 1 {
			t.Fatalf("%v: %s", err, b)
		}
		r := doc.Resources[0]
		if _, err := tls.X509KeyPair(r.TLS.Chain.Bytes, r.TLS.Key.Bytes); err != nil || r.Name != names.MetricsSecret {
			t.Errorf("%s: %v", r.Name, err)
		}
		return doc.Version, r.TLS.Chain.Bytes
	}
	want := func(version string, file string) {
		t.Helper()
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if v, chain := read(); v != version || !bytes.Equal(chain, text) {
			t.Errorf("version %s, want %s with what is in %s", v, version, file)
		}
	}
	want("1", cert)
	want("1", cert)
	if i, err := os.Stat(m.file); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v, want 0600", i.Mode(), err)
	}
	first, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	kept := write("kept.crt", first)
	write("a.crt", []byte("rubbish"))
	for range 5 {
		want("1", kept)
	}
	if !strings.Contains(log.String(), "a.crt") {
		t.Errorf("the bad file is not named:\n%s", log.String())
	}
	pair("a")
	want("2", cert)
}

// A list that leads back to the proxy's own metrics ends at once.
func TestMetricsLoop(t *testing.T) {
	t.Parallel()
	b := newBench(t, plainly(realStats(t)))
	port := b.app("text/plain", func(w http.ResponseWriter, r *http.Request) { // as Envoy's listener does
		r.RequestURI, r.URL.Scheme, r.URL.Host, r.URL.Path = "", "http", "kuma-dp", "/meshmetric"
		resp, err := b.client.Do(r)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body)
	})
	b.configure(meshMetric("", port))
	if _, body := b.good("/meshmetric", ""); parse(t, body)["envoy_server_live"] == nil {
		t.Error("Envoy's metrics are missing")
	}
	if !strings.Contains(b.log.String(), "status 508") {
		t.Errorf("the loop is not noticed:\n%s", b.log.String())
	}
}

// Who scrapes too much is sent away before it costs memory (HRD-25), and what
// applications may answer with is given back.
func TestScrapeFlood(t *testing.T) {
	t.Parallel()
	b := newBench(t, plainly(realStats(t)))
	release := make(chan struct{})
	var waiting atomic.Int32
	port := b.app("text/plain", func(w http.ResponseWriter, r *http.Request) {
		waiting.Add(1)
		select {
		case <-release:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, "a 1\n")
	})
	b.configure(meshMetric("", port))
	got := make(chan int, 3*maxQueue)
	for range cap(got) {
		go func() {
			status, _, _, err := b.scrape("/meshmetric", "")
			if err != nil {
				status = -1
			}
			got <- status
		}()
	}
	counts := map[int]int{}
	for range cap(got) - maxQueue {
		counts[<-got]++
	}
	close(release)
	for range maxQueue {
		counts[<-got]++
	}
	if d := cmp.Diff(map[int]int{http.StatusOK: maxQueue, http.StatusServiceUnavailable: cap(got) - maxQueue}, counts); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if n := waiting.Load(); n != maxQueue {
		t.Errorf("the application was asked %d times, want %d", n, maxQueue)
	}
	if left := b.left.Load(); left != maxBodies {
		t.Errorf("%d of %d bytes were given back", left, maxBodies)
	}
}

func BenchmarkEnvoyFamilies(b *testing.B) {
	var in strings.Builder
	for f := range 40 {
		fmt.Fprintf(&in, "# TYPE envoy_cluster_upstream_rq_%d counter\n", f)
		for c := range 500 {
			fmt.Fprintf(&in, "envoy_cluster_upstream_rq_%d{envoy_response_code=\"200\",envoy_cluster_name=\"svc-%d-%016x\"} %d\n", f, c/2, c, c)
		}
	}
	s := &sieve{profile: basicMetrics}
	b.SetBytes(int64(in.Len()))
	b.ReportAllocs()
	for b.Loop() {
		w := &metricWriter{out: bufio.NewWriter(io.Discard)}
		if err := newEnvoyFamilies(w, s, []addedLabel{{"mesh", "default"}}).copy(strings.NewReader(in.String())); err != nil {
			b.Fatal(err)
		}
	}
}
