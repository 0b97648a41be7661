package state_test

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// in runs a test in a bubble with a tracker that follows a store.
func in(t *testing.T, f func(t *testing.T, s store.Store, tr *state.Tracker)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		tr := state.New(state.Config{Store: s, Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- tr.Run(ctx) }()
		<-tr.Ready()
		f(t, s, tr)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func put(t *testing.T, s store.Store, rs ...*resource.Resource) uint64 {
	t.Helper()
	var w []store.Write
	for _, r := range rs {
		w = append(w, store.Set(r))
	}
	rev, err := s.Put(t.Context(), w...)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func dataplane(name, service, protocol string) *resource.Resource {
	return mesh.Dataplanes.Make("default", name, &mesh.DataplaneSpec{Networking: &mesh.Networking{
		Address: "127.0.0.1",
		Inbound: []mesh.Inbound{{Port: 80, Tags: map[string]string{mesh.TagService: service, mesh.TagProtocol: protocol}}},
	}})
}

func TestChangesArriveTogetherAfterAQuietPeriod(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		changed, stop := tr.Subscribe()
		defer stop()
		<-changed
		before := tr.Now()
		start := time.Now()
		put(t, s, mesh.Meshes.Make("", "default", &mesh.MeshSpec{}))
		rev := put(t, s, dataplane("a", "web", "http"), dataplane("b", "web", "grpc"))
		<-changed
		if d := time.Since(start); d != 10*time.Millisecond {
			t.Errorf("the picture came after %v, want the quiet period of 10ms", d)
		}
		pic := tr.Now()
		if pic.Revision != rev {
			t.Errorf("revision %d, want %d", pic.Revision, rev)
		}
		changes, ok := pic.Since(before)
		if !ok || len(changes) != 3 {
			t.Errorf("Since = %d changes, %v; want 3", len(changes), ok)
		}
		m := pic.Mesh("default")
		if got := len(m.Endpoints("web")); got != 2 {
			t.Errorf("%d endpoints, want 2", got)
		}
		if got := m.Protocol("web"); got != "tcp" {
			t.Errorf("protocol of http and grpc mixed = %q, want tcp", got)
		}
		if before.Mesh("default") != nil {
			t.Error("an older picture changed")
		}
	})
}

func TestAStreamOfChangesIsNotHeldUpForEver(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		changed, stop := tr.Subscribe()
		defer stop()
		<-changed
		start := time.Now()
		go func() {
			for i := range 100 {
				put(t, s, dataplane(fmt.Sprint("d", i), "web", "http"))
				time.Sleep(5 * time.Millisecond)
			}
		}()
		<-changed
		if d := time.Since(start); d > 205*time.Millisecond || d < 195*time.Millisecond {
			t.Errorf("first picture after %v, want about 200ms", d)
		}
		time.Sleep(time.Second)
	})
}

func TestSharingAndTLSReady(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		spec := &mesh.MeshSpec{MTLS: &mesh.MTLS{EnabledBackend: "ca", Backends: []mesh.Backend{{Name: "ca", Type: "builtin"}}}}
		put(t, s, mesh.Meshes.Make("", "default", spec), dataplane("a", "web", "http"))
		insight := func(backend string) *resource.Resource {
			return mesh.DataplaneInsights.Make("default", "a", &mesh.DataplaneInsightSpec{MTLS: &mesh.MTLSInsight{IssuedBackend: backend}})
		}
		rev := put(t, s, insight(""))
		if err := tr.Await(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		p1 := tr.Now()
		if p1.Mesh("default").TLSReady("web") {
			t.Error("ready without a certificate")
		}
		if err := tr.Await(t.Context(), put(t, s, insight("ca"))); err != nil {
			t.Fatal(err)
		}
		p2 := tr.Now()
		if !p2.Mesh("default").TLSReady("web") || p1.Mesh("default").TLSReady("web") {
			t.Error("TLSReady does not follow the insight")
		}
		if c, ok := p2.Since(p1); !ok || len(c) != 1 {
			t.Errorf("a new issuer must be told: %v %v", c, ok)
		}
		if err := tr.Await(t.Context(), put(t, s, insight("ca"))); err != nil {
			t.Fatal(err)
		}
		p3 := tr.Now()
		if c, ok := p3.Since(p2); !ok || len(c) != 0 {
			t.Errorf("an insight that says the same of TLS was told: %v", c)
		}
		if !p3.InsightsSince(p2) || p3.InsightsSince(p3) {
			t.Error("InsightsSince is wrong")
		}
		if &p1.Mesh("default").Endpoints("web")[0] != &p3.Mesh("default").Endpoints("web")[0] {
			t.Error("the index of services was computed again although no Dataplane changed")
		}
		if diff := cmp.Diff([]string{"default"}, p3.Meshes()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestHistoryIsBounded(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		first := tr.Now()
		for i := range 80 {
			if err := tr.Await(t.Context(), put(t, s, mesh.Zones.Make("", fmt.Sprint("z", i), &mesh.ZoneSpec{}))); err != nil {
				t.Fatal(err)
			}
		}
		if _, ok := tr.Now().Since(first); ok {
			t.Error("a picture 80 steps back is still followed from")
		}
		if _, ok := tr.Now().Since(nil); ok {
			t.Error("nothing seen yet must mean everything may have changed")
		}
		if got := len(tr.Now().Global(mesh.Zones.Name)); got != 80 {
			t.Errorf("%d zones, want 80", got)
		}
	})
}

func TestAServiceWithoutEndpointsIsRemembered(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		if err := tr.Await(t.Context(), put(t, s, mesh.Meshes.Make("", "default", &mesh.MeshSpec{}), dataplane("a", "web", "grpc"))); err != nil {
			t.Fatal(err)
		}
		rev, err := s.Put(t.Context(), store.Remove(mesh.Dataplanes.Key("default", "a")))
		if err != nil {
			t.Fatal(err)
		}
		if err := tr.Await(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		m := tr.Now().Mesh("default")
		if m.Protocol("web") != "" || m.Remembered("web") != "grpc" || m.Remembered("other") != "" {
			t.Errorf("protocol %q, remembered %q", m.Protocol("web"), m.Remembered("web"))
		}
	})
}

// TestAs: a picture of what could be leaves the one that is as it was.
func TestAs(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		rev := put(t, s, mesh.Meshes.Make("", "default", &mesh.MeshSpec{}), dataplane("a", "web", "http"))
		if err := tr.Await(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		now := tr.Now()
		could := now.As(dataplane("a", "web", "grpc"), dataplane("b", "api", "http"))
		if p := could.Mesh("default").Protocol("web"); p != "grpc" || len(could.Mesh("default").Endpoints("api")) != 1 {
			t.Errorf("what could be: web speaks %s, api has %d endpoints", p, len(could.Mesh("default").Endpoints("api")))
		}
		if p := now.Mesh("default").Protocol("web"); p != "http" || len(now.Mesh("default").Endpoints("api")) != 0 || tr.Now() != now {
			t.Error("the picture of now has changed")
		}
	})
}

// TestRenew: what is renewed counts as changed, with what the store has.
func TestRenew(t *testing.T) {
	in(t, func(t *testing.T, s store.Store, tr *state.Tracker) {
		rev := put(t, s, mesh.Meshes.Make("", "default", &mesh.MeshSpec{}), dataplane("a", "web", "http"), dataplane("b", "web", "http"))
		if err := tr.Await(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		old := tr.Now()
		changed, stop := tr.Subscribe()
		defer stop()
		<-changed
		a := mesh.Dataplanes.Key("default", "a")
		tr.Renew(a, a, mesh.Dataplanes.Key("default", "gone"))
		<-changed
		now := tr.Now()
		changes, known := now.Since(old)
		if !known || len(changes) != 1 || changes[0].Key != a || changes[0].New != old.Get(a) || changes[0].Old != changes[0].New || now.Revision != rev {
			t.Errorf("%v, %+v, revision %d after %d", known, changes, now.Revision, rev)
		}
		// What changes anyway is not put back to what it was.
		tr.Renew(a)
		rev = put(t, s, dataplane("a", "web", "grpc"))
		tr.Renew(a)
		if err := tr.Await(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		if p := tr.Now().Mesh("default").Protocol("web"); p == "http" || tr.Now().Revision != rev {
			t.Errorf("web speaks %q at revision %d", p, tr.Now().Revision)
		}
	})
}

// lateStore has a change under way at the very end.
type lateStore struct{ store.Store }

// Watch is store.Store's.
func (s lateStore) Watch(ctx context.Context, _ uint64) iter.Seq2[[]store.Event, error] {
	return func(yield func([]store.Event, error) bool) {
		<-ctx.Done()
		yield([]store.Event{{Revision: 1}}, nil)
	}
}

// A change that arrives as the tracker is told to end doesn't keep it from
// ending.
func TestEndWithAChangeUnderWay(t *testing.T) {
	for range 50 { // which comes first is chance
		synctest.Test(t, func(t *testing.T) {
			tr := state.New(state.Config{Store: lateStore{memstore.New()}, Log: slog.New(slog.DiscardHandler)})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- tr.Run(ctx) }()
			<-tr.Ready()
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}
