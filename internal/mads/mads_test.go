package mads_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/mads"
	"kuma/internal/mesh"
	"kuma/internal/policy/meshmetric"
	"kuma/internal/policy/policytest"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// world is a server whose picture follows a store.
type world struct {
	*mads.Server
	t       testing.TB
	store   *memstore.Store
	tracker *state.Tracker
	end     func()
}

func open(t testing.TB, cfg mads.Config) *world {
	w := &world{t: t, store: memstore.New()}
	w.tracker = state.New(state.Config{Store: w.store, Quiet: time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() {
		if err := w.tracker.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	<-w.tracker.Ready()
	cfg.Tracker = w.tracker
	if cfg.Every == 0 {
		cfg.Every = 1 // these tests look at what is there at once
	}
	w.Server = mads.New(cfg)
	w.end = func() {
		w.Close()
		cancel()
		running.Wait()
	}
	return w
}

func (w *world) write(writes ...store.Write) {
	w.t.Helper()
	rev, err := w.store.Put(w.t.Context(), writes...)
	if err == nil {
		err = w.tracker.Await(w.t.Context(), rev)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) put(docs string) {
	w.t.Helper()
	rs, err := policytest.Read(docs, meshmetric.Policy.Kind())
	if err != nil {
		w.t.Fatal(err)
	}
	var writes []store.Write
	for _, r := range rs {
		writes = append(writes, store.Set(r))
	}
	w.write(writes...)
}

func (w *world) remove(k resource.Key) { w.t.Helper(); w.write(store.Remove(k)) }

// ask posts a body and returns the answer.
func (w *world) ask(query, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequestWithContext(w.t.Context(), http.MethodPost, mads.Path+query, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	out := httptest.NewRecorder()
	w.ServeHTTP(out, r)
	return out
}

type answer struct {
	Version   string            `json:"version_info"`
	Type      string            `json:"type_url"`
	Resources []mads.Assignment `json:"resources"`
}

// targets asks once and returns "<mesh>/<name> <scheme>://<address><path> <labels>"
// for each target.
func (w *world) targets(client string) ([]string, string) {
	w.t.Helper()
	res := w.ask("?fetch-timeout=0s", fmt.Sprintf(`{"node":{"id":%q}}`, client))
	if res.Code != http.StatusOK {
		w.t.Fatalf("status %d: %s", res.Code, res.Body)
	}
	var a answer
	if err := json.Unmarshal(res.Body.Bytes(), &a); err != nil {
		w.t.Fatal(err)
	}
	if a.Type != "type.googleapis.com/kuma.observability.v1.MonitoringAssignment" {
		w.t.Errorf("type_url %q", a.Type)
	}
	var out []string
	for _, r := range a.Resources {
		if r.Type != a.Type || len(r.Targets) != 1 {
			w.t.Errorf("resource %+v", r)
		}
		for _, x := range r.Targets {
			s := fmt.Sprintf("%s/%s %s %s://%s%s", r.Mesh, x.Name, r.Service, x.Scheme, x.Address, x.MetricsPath)
			if len(x.Labels) > 0 {
				raw, _ := json.Marshal(x.Labels)
				s += " " + string(raw)
			}
			out = append(out, s)
		}
	}
	return out, a.Version
}

const two = `
type: Mesh
name: default
metrics: {enabledBackend: prom, backends: [{name: prom, type: prometheus, conf: {skipMTLS: true}}]}
---
type: Dataplane
name: backend
networking:
  address: 10.1.1.1
  inbound:
  - {port: 80, tags: {kuma.io/service: backend, kuma.io/protocol: http, a.b/c-d: "1"}}
  - {port: 81, tags: {kuma.io/service: backend-admin, a.b/c-d: "2"}}
---
type: Dataplane
name: web
networking:
  address: 10.1.1.2
  advertisedAddress: 192.0.2.7
  inbound: [{port: 80, tags: {kuma.io/service: web}}]
metrics: {type: prometheus, conf: {port: 1234, path: /stats, tls: {mode: providedTLS}}}
---
type: Mesh
name: other
---
type: Dataplane
mesh: other
name: quiet
networking:
  address: 10.1.1.3
  inbound: [{port: 80, tags: {kuma.io/service: quiet}}]
`

const backendByMesh = `default/backend backend http://10.1.1.1:5670/metrics {"a_b_c_d":"1","a_b_c_ds":",1,2,","kuma_io_protocol":"http","kuma_io_protocols":",http,","kuma_io_service":"backend","kuma_io_services":",backend,backend-admin,"}`

const webByMesh = `default/web web https://192.0.2.7:1234/stats {"kuma_io_service":"web","kuma_io_services":",web,"}`

func TestTargets(t *testing.T) {
	for _, c := range []struct {
		name, docs string
		want       map[string][]string
	}{
		{"Mesh.metrics is for everyone", "", map[string][]string{
			"": {backendByMesh, webByMesh}, "prometheus-1": {backendByMesh, webByMesh},
		}},
		{"a MeshMetric takes the place of Mesh.metrics for the proxies that it selects, and for no others", `
type: MeshMetric
name: web
spec:
  targetRef: {kind: Dataplane, name: web}
  default:
    backends:
    - {type: Prometheus, prometheus: {clientId: one, port: 6000, path: /m, tls: {mode: ProvidedTLS}}}
    - {type: Prometheus, prometheus: {clientId: two, port: 6001, tls: {mode: ActiveMTLSBackend}}}
`, map[string][]string{
			"":        {backendByMesh},
			"unknown": {backendByMesh},
			"one":     {"default/web web https://192.0.2.7:6000/m", backendByMesh},
			"two":     {"default/web web http://192.0.2.7:6001/metrics", backendByMesh},
		}},
		{"a MeshMetric without a client is for those that no backend names; other meshes are not touched", `
type: MeshMetric
mesh: other
name: all
spec:
  default: {backends: [{type: Prometheus}]}
---
type: MeshMetric
name: web
spec:
  targetRef: {kind: Dataplane, name: web}
  default: {backends: [{type: Prometheus, prometheus: {clientId: one}}]}
`, map[string][]string{
			"":    {backendByMesh, "other/quiet quiet http://10.1.1.3:5670/metrics"},
			"one": {"default/web web http://192.0.2.7:5670/metrics", backendByMesh},
		}},
		{"a MeshMetric without a backend leaves Mesh.metrics", `
type: MeshMetric
name: web
spec:
  default: {sidecar: {includeUnused: true}}
`, map[string][]string{"": {backendByMesh, webByMesh}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := open(t, mads.Config{})
			defer w.end()
			w.put(two)
			if c.docs != "" {
				w.put(c.docs)
			}
			for client, want := range c.want {
				got, _ := w.targets(client)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("client %q (-want +got):\n%s", client, diff)
				}
			}
		})
	}
}

// The original keeps targets of the default client when the last policy goes
// over to another client, until it is restarted.
func TestNothingIsStale(t *testing.T) {
	w := open(t, mads.Config{})
	defer w.end()
	w.put(two)
	w.remove(mesh.Dataplanes.Key("default", "web"))
	if got, _ := w.targets(""); len(got) != 1 {
		t.Errorf("after a proxy has gone: %q", got)
	}
	policy := func(client string) string {
		return "type: MeshMetric\nname: all\nspec: {default: {backends: [{type: Prometheus, prometheus: {clientId: " + client + "}}]}}\n"
	}
	w.put(policy("one"))
	if got, _ := w.targets(""); len(got) != 0 {
		t.Errorf("of another client: %q", got)
	}
	w.put(policy("two"))
	if got, _ := w.targets("one"); len(got) != 0 {
		t.Errorf("of a client that is no longer named: %q", got)
	}
	w.remove(resource.Key{Kind: "MeshMetric", Mesh: "default", Name: "all"})
	if got, _ := w.targets("two"); len(got) != 1 {
		t.Errorf("Mesh.metrics counts again: %q", got)
	}
}

func TestVersionFollowsContent(t *testing.T) {
	w := open(t, mads.Config{})
	defer w.end()
	w.put(two)
	_, first := w.targets("")
	if len(first) != 36 {
		t.Errorf("version %q is no UUID", first)
	}
	w.put("type: Dataplane\nname: backend\nnetworking: {address: 10.1.1.1, inbound: [{port: 8080, tags: {kuma.io/service: backend, kuma.io/protocol: http, a.b/c-d: '1'}}, {port: 81, tags: {kuma.io/service: backend-admin, a.b/c-d: '2'}}]}\n")
	if _, v := w.targets(""); v != first {
		t.Error("the version changed though no target did")
	}
	w.put("type: Dataplane\nname: backend\nnetworking: {address: 10.9.9.9, inbound: [{port: 80, tags: {kuma.io/service: backend}}]}\n")
	if _, v := w.targets(""); v == first {
		t.Error("the version is the same though a target changed")
	}
}

func TestAnswers(t *testing.T) {
	w := open(t, mads.Config{})
	defer w.end()
	_, empty := w.targets("")
	for _, c := range []struct {
		name, method, path, contentType, body string
		status                                int
		want                                  string
	}{
		{"nothing to scrape", "POST", "", "application/json", `{}`, 200, `{"version_info":"` + empty + `","type_url":"type.googleapis.com/kuma.observability.v1.MonitoringAssignment"}`},
		{"a type with parameters", "POST", "", "application/json; charset=utf-8", `{}`, 200, "*"},
		{"what else a client says", "POST", "?fetch-timeout=2m", "application/json", `{"node":{"id":"p","metadata":{}},"type_url":"x","response_nonce":"n","resource_names":[]}`, 200, "*"},
		{"what it has, in snake case", "POST", "?fetch-timeout=0s", "application/json", `{"version_info":"` + empty + `"}`, 304, ""},
		{"what it has, in camel case", "POST", "?fetch-timeout=0s", "application/json", `{"versionInfo":"` + empty + `"}`, 304, ""},
		{"another method", "GET", "", "application/json", ``, 405, "405: Method Not Allowed"},
		{"another path", "POST", "/x", "application/json", `{}`, 404, "404: Page Not Found"},
		{"another type", "POST", "", "text/plain", `{}`, 415, "415: Unsupported Media Type"},
		{"no type", "POST", "", "", `{}`, 415, "415: Unsupported Media Type"},
		{"no JSON", "POST", "", "application/json", `{`, 400, `{"type":"","status":0,"title":"Could not parse request body","detail":"unexpected end of JSON input","details":"unexpected end of JSON input"}`},
		{"JSON of another shape", "POST", "", "application/json", `{"node":[]}`, 400, "*"},
		{"too much", "POST", "", "application/json", `{"node":{"id":"` + strings.Repeat("x", 1<<20) + `"}}`, 400, `{"type":"","status":0,"title":"Could not parse request body","detail":"http: request body too large","details":"http: request body too large"}`},
		{"no timeout", "POST", "?fetch-timeout=soon", "application/json", `{}`, 400, `{"type":"","status":0,"title":"Could not parse fetch-timeout","detail":"time: invalid duration \"soon\"","details":"time: invalid duration \"soon\""}`},
		{"a timeout below zero", "POST", "?fetch-timeout=-1s", "application/json", `{}`, 400, "*"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := httptest.NewRequestWithContext(t.Context(), c.method, mads.Path+c.path, strings.NewReader(c.body))
			if c.contentType != "" {
				r.Header.Set("Content-Type", c.contentType)
			}
			res := httptest.NewRecorder()
			w.ServeHTTP(res, r)
			if res.Code != c.status {
				t.Errorf("status %d, want %d: %s", res.Code, c.status, res.Body)
			}
			if c.want != "*" && res.Body.String() != c.want {
				t.Errorf("body\n%s\nwant\n%s", res.Body, c.want)
			}
			if kind := res.Header().Get("Content-Type"); c.status == 200 && kind != "text/plain; charset=utf-8" {
				t.Errorf("content type %q", kind)
			}
			if res.Header().Get("X-Content-Type-Options") != "nosniff" {
				t.Error("browsers may look for more than text in it")
			}
		})
	}
}

func TestLongPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, mads.Config{Timeout: 30 * time.Second})
		defer w.end()
		w.put(two)
		_, version := w.targets("")
		body := fmt.Sprintf(`{"version_info":%q}`, version)

		start := time.Now()
		if res := w.ask("", body); res.Code != 304 || res.Body.Len() != 0 || time.Since(start) != 30*time.Second {
			t.Errorf("without a change: %d after %v", res.Code, time.Since(start))
		}
		start = time.Now()
		if res := w.ask("?fetch-timeout=5s", body); res.Code != 304 || time.Since(start) != 5*time.Second {
			t.Errorf("with a timeout of its own: %d after %v", res.Code, time.Since(start))
		}
		start = time.Now()
		if res := w.ask("?fetch-timeout=1000h", body); res.Code != 304 || time.Since(start) != 10*time.Minute {
			t.Errorf("with a timeout beyond the limit: %d after %v", res.Code, time.Since(start))
		}

		// A change that concerns no target wakes nobody; one that does answers at
		// once.
		var late sync.WaitGroup
		late.Go(func() {
			time.Sleep(2 * time.Second)
			w.put("type: Dataplane\nmesh: other\nname: new\nnetworking: {address: 10.1.1.9, inbound: [{port: 80, tags: {kuma.io/service: new}}]}\n")
			time.Sleep(2 * time.Second)
			w.remove(mesh.Dataplanes.Key("default", "web"))
		})
		start = time.Now()
		res := w.ask("", body)
		if took := time.Since(start).Truncate(time.Second); res.Code != 200 || took != 4*time.Second {
			t.Errorf("with a change: %d after %v", res.Code, took)
		}
		late.Wait()

		// The end of the server ends the wait.
		_, version = w.targets("")
		late.Go(func() {
			time.Sleep(time.Second)
			w.Close()
		})
		start = time.Now()
		if res := w.ask("", fmt.Sprintf(`{"version_info":%q}`, version)); res.Code != 304 || time.Since(start) != time.Second {
			t.Errorf("at the end: %d after %v", res.Code, time.Since(start))
		}
		late.Wait()
	})
}

// While proxies come and go, assignments are renewed once in a while; the last
// change is never missed, and the first one is told at once.
func TestRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, mads.Config{Every: time.Second})
		defer w.end()
		w.put(two)
		_, version := w.targets("")
		time.Sleep(time.Minute)
		var joining sync.WaitGroup
		joining.Go(func() {
			for i := range 100 {
				time.Sleep(50 * time.Millisecond)
				w.put(fmt.Sprintf("type: Dataplane\nname: dp-%d\nnetworking: {address: 10.2.0.%d, inbound: [{port: 80, tags: {kuma.io/service: web}}]}\n", i, i+1))
			}
		})
		start, renewals, targets := time.Now(), 0, 0
		for targets < 102 && renewals < 200 {
			res := w.ask("", fmt.Sprintf(`{"version_info":%q}`, version))
			var a answer
			if err := json.Unmarshal(res.Body.Bytes(), &a); res.Code != 200 || err != nil {
				t.Fatalf("%d: %v", res.Code, err)
			}
			version, targets, renewals = a.Version, len(a.Resources), renewals+1
			if took := time.Since(start); renewals == 1 && took > 100*time.Millisecond {
				t.Errorf("the first change is told after %v", took)
			}
		}
		joining.Wait()
		// 100 changes within 5 s.
		if took := time.Since(start); renewals < 3 || renewals > 8 || took > 7*time.Second {
			t.Errorf("%d renewals in %v, %d targets", renewals, took, targets)
		}
	})
}

func TestTooManyWaitForNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := open(t, mads.Config{MaxWaiting: 3})
		defer w.end()
		w.put(two)
		_, version := w.targets("")
		body := fmt.Sprintf(`{"version_info":%q}`, version)
		start := time.Now()
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() { w.ask("", body) })
		}
		synctest.Wait()
		if res := w.ask("", body); res.Code != 304 || time.Since(start) != 0 {
			t.Errorf("one more: %d after %v", res.Code, time.Since(start))
		}
		if res := w.ask("", "{}"); res.Code != 200 {
			t.Errorf("whoever has nothing is answered: %d", res.Code)
		}
		all.Wait()
	})
}

func BenchmarkRender(b *testing.B) {
	w := open(b, mads.Config{})
	defer w.end()
	w.put("type: Mesh\nname: default\n---\ntype: MeshMetric\nname: all\nspec: {default: {backends: [{type: Prometheus}]}}\n")
	var writes []store.Write
	for i := range 10_000 {
		writes = append(writes, store.Set(mesh.Dataplanes.Make("default", fmt.Sprintf("dp-%d", i), &mesh.DataplaneSpec{Networking: &mesh.Networking{
			Address: "10.0.0.1", Inbound: []mesh.Inbound{{Port: 80, Tags: map[string]string{mesh.TagService: "web"}}},
		}})))
	}
	w.write(writes...)
	for i := 0; b.Loop(); i++ {
		w.put(fmt.Sprintf("type: Dataplane\nname: dp-0\nnetworking: {address: 10.0.%d.1, inbound: [{port: 80, tags: {kuma.io/service: web}}]}\n", i%250))
		w.targets("")
	}
}
