package insight_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/envoy"
	"kuma/internal/insight"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// counted is a store that counts transactions.
type counted struct {
	*memstore.Store
	mu   sync.Mutex
	puts int
}

func (c *counted) Put(ctx context.Context, w ...store.Write) (uint64, error) {
	c.mu.Lock()
	c.puts++
	c.mu.Unlock()
	return c.Store.Put(ctx, w...)
}

func (c *counted) take() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.puts
	c.puts = 0
	return n
}

type fixture struct {
	*testing.T
	store *counted
	rec   *insight.Recorder
	stop  func()
}

func start(t *testing.T, s *memstore.Store, proxies ...string) *fixture {
	t.Helper()
	f := &fixture{T: t, store: &counted{Store: s}}
	ctx, cancel := context.WithCancel(t.Context())
	tracker := state.New(state.Config{Store: f.store, Log: slog.New(slog.DiscardHandler)})
	f.rec = insight.New(insight.Config{Store: f.store, Tracker: tracker, Instance: "cp"})
	var wg sync.WaitGroup
	wg.Go(func() { _ = tracker.Run(ctx) })
	wg.Go(func() { _ = f.rec.Run(ctx) })
	f.stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(f.stop)
	<-tracker.Ready()
	f.put(mesh.Meshes.Make("", "default", &mesh.MeshSpec{}))
	for _, p := range proxies {
		f.put(mesh.Dataplanes.Make("default", p, &mesh.DataplaneSpec{Networking: &mesh.Networking{Address: "127.0.0.1"}}))
	}
	time.Sleep(time.Second)
	f.store.take()
	return f
}

func (f *fixture) put(r *resource.Resource) {
	f.Helper()
	if _, err := f.store.Put(f.Context(), store.Set(r)); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) get(name string) *mesh.DataplaneInsightSpec {
	f.Helper()
	r, err := f.store.Get(f.Context(), mesh.DataplaneInsights.Key("default", name))
	if err != nil {
		return nil
	}
	return mesh.DataplaneInsights.From(r).Spec
}

func TestLifeOfAnInsight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, memstore.New(), "web")
		st := f.rec.Connect("default", "web", json.RawMessage(`{"a":1}`), &mesh.Version{Envoy: &mesh.EnvoyVersion{Version: "1.40.0"}})
		time.Sleep(200 * time.Millisecond)
		got := f.get("web")
		if got == nil || !got.Online() || got.Subscriptions[0].ControlPlaneInstanceID != "cp" || string(got.Metadata) != `{"a":1}` || got.Subscriptions[0].Version.Envoy.Version != "1.40.0" {
			t.Fatalf("soon after it connected: %+v", got)
		}

		for range 3 { // acknowledgements wait for company
			st.Record(map[string]insight.Count{envoy.ClusterType: {Sent: 1, Acknowledged: 1}, envoy.SecretType: {Sent: 1, Acknowledged: 2}})
			time.Sleep(time.Second)
		}
		if n := f.store.take(); n != 1 {
			t.Errorf("%d writes, want that of the connection alone", n)
		}
		time.Sleep(10 * time.Second)
		s := f.get("web").Subscriptions[0].Status
		if s.CDS != (mesh.Responses{Sent: 3, Acknowledged: 3}) || s.Total != (mesh.Responses{Sent: 6, Acknowledged: 9}) || s.LDS != (mesh.Responses{}) || s.LastUpdateTime == nil {
			t.Errorf("counters %+v", s)
		}
		if n := f.store.take(); n != 1 {
			t.Errorf("%d writes for all acknowledgements, want 1", n)
		}
		time.Sleep(time.Hour)
		if n := f.store.take(); n != 0 {
			t.Errorf("%d writes at rest", n)
		}

		st.Rejections([]mesh.Rejection{{TypeURL: envoy.ListenerType, Message: "no"}})
		f.rec.Issued("default", "web", insight.Certificate{NotAfter: time.Now().Add(time.Hour), Backend: "ca", Supported: []string{"ca"}})
		f.rec.Issued("default", "web", insight.Certificate{NotAfter: time.Now().Add(2 * time.Hour), Backend: "ca", Supported: []string{"ca"}})
		f.rec.Readiness("default", "web", false, "because")
		time.Sleep(200 * time.Millisecond)
		got = f.get("web")
		if len(got.Rejections) != 1 || got.MTLS.CertificateRegenerations != 2 || got.MTLS.IssuedBackend != "ca" || got.Readiness.Reason != "because" {
			t.Errorf("what is urgent: %+v", got)
		}
		if n := f.store.take(); n != 1 {
			t.Errorf("%d writes for what came together, want 1", n)
		}

		// The next streams: the two newest are shown, and one is open.
		for range 3 {
			next := f.rec.Connect("default", "web", nil, nil)
			time.Sleep(time.Second)
			st.Close()
			st = next
		}
		time.Sleep(time.Second)
		got = f.get("web")
		if len(got.Subscriptions) != 2 || got.Subscriptions[0].DisconnectTime == nil || got.Subscriptions[1].DisconnectTime != nil || got.Subscriptions[1].Generation != 4 {
			t.Errorf("subscriptions %+v", got.Subscriptions)
		}
		st.Close()
		time.Sleep(200 * time.Millisecond)
		if got = f.get("web"); got.Online() || got.MTLS == nil {
			t.Errorf("after the end: %+v", got)
		}
	})
}

func TestManyProxiesShareTransactions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var names []string
		for i := range 1000 {
			names = append(names, fmt.Sprint("dp-", i))
		}
		f := start(t, memstore.New(), names...)
		for _, n := range names {
			f.rec.Connect("default", n, nil, nil)
		}
		time.Sleep(time.Second)
		if n := f.store.take(); n != 2 {
			t.Errorf("%d transactions for 1,000 proxies, want 2", n)
		}
	})
}

// An insight goes with its Dataplane and does not come back without it.
func TestNoInsightWithoutADataplane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, memstore.New(), "web")
		st := f.rec.Connect("default", "web", nil, nil)
		time.Sleep(time.Second)
		if _, err := f.store.Put(t.Context(), store.Remove(mesh.Dataplanes.Key("default", "web")), store.Remove(mesh.DataplaneInsights.Key("default", "web"))); err != nil {
			t.Fatal(err)
		}
		st.Record(map[string]insight.Count{envoy.ClusterType: {Sent: 1}})
		st.Close()
		time.Sleep(time.Minute)
		if got := f.get("web"); got != nil {
			t.Errorf("an insight without a Dataplane: %+v", got)
		}
	})
}

// What a crash left open is shown as gone, unless it comes back.
func TestAfterACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		f := start(t, s, "gone", "back")
		f.rec.Connect("default", "gone", nil, nil)
		f.rec.Connect("default", "back", nil, nil)
		time.Sleep(time.Second)
		f.stop()
		f = start(t, s)
		f.rec.Connect("default", "back", nil, nil)
		time.Sleep(50 * time.Second)
		if !f.get("gone").Online() {
			t.Error("shown as gone before its time")
		}
		time.Sleep(20 * time.Second)
		if f.get("gone").Online() || !f.get("back").Online() {
			t.Errorf("after a minute: gone online %t, back online %t", f.get("gone").Online(), f.get("back").Online())
		}
		if subs := f.get("back").Subscriptions; len(subs) != 2 || subs[0].DisconnectTime == nil {
			t.Errorf("subscriptions %+v", subs)
		}
	})
}

func TestTheLastIsWrittenAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, memstore.New(), "web")
		st := f.rec.Connect("default", "web", nil, nil)
		time.Sleep(time.Second)
		st.Record(map[string]insight.Count{envoy.ListenerType: {Sent: 7}})
		f.stop()
		if got := f.get("web").Subscriptions[0].Status.LDS.Sent; got != 7 {
			t.Errorf("LDS sent %d, want 7", got)
		}
	})
}
