package session_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// plane is a control plane without doors, in a bubble of synthetic time.
type plane struct {
	*testing.T
	store    *memstore.Store
	tracker  *state.Tracker
	sessions *session.Registry
	ctx      context.Context
	stop     func()
}

func start(t *testing.T, s *memstore.Store) *plane {
	t.Helper()
	p := &plane{T: t, store: s}
	ctx, cancel := context.WithCancel(t.Context())
	p.ctx = ctx
	p.tracker = state.New(state.Config{Store: s, Log: slog.New(slog.DiscardHandler)})
	proxies := auth.DefaultProxies()
	proxies.DPProxy.Type = auth.ProxyNone
	checker, err := auth.NewProxyChecker(auth.ProxyCheckerConfig{Proxies: proxies})
	if err != nil {
		t.Fatal(err)
	}
	p.sessions = session.New(session.Config{
		Tracker: p.tracker, Store: s, Gate: admit.New(admit.Config{Store: s, Zone: "default"}), Credentials: checker,
	})
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{p.tracker.Run, p.sessions.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		})
	}
	p.stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(p.stop)
	<-p.tracker.Ready()
	if _, err := s.Get(ctx, mesh.Meshes.Key("", "default")); err != nil {
		p.put(mesh.Meshes.Make("", "default", &mesh.MeshSpec{}))
	}
	return p
}

func (p *plane) put(r *resource.Resource) {
	p.Helper()
	rev, err := p.store.Put(p.ctx, store.Set(r))
	if err == nil {
		err = p.tracker.Await(p.ctx, rev)
	}
	if err != nil {
		p.Fatal(err)
	}
}

func document(name, extra string) string {
	return fmt.Sprintf(`{"type":"Dataplane","mesh":"default","name":%q,"networking":{"address":"127.0.0.1","inbound":[{"port":8080,"tags":{"kuma.io/service":"web"}%s}]}}`, name, extra)
}

func node(name, instance string) *session.Node {
	return &session.Node{Key: session.Key{Mesh: "default", Name: name}, Instance: instance, Dataplane: document(name, "")}
}

func (p *plane) open(kind session.Kind, n *session.Node) *session.Stream {
	p.Helper()
	st, err := p.sessions.Open(p.ctx, kind, n, "")
	if err != nil {
		p.Fatal(err)
	}
	return st
}

func (p *plane) there(name string) bool {
	synctest.Wait()
	_, err := p.store.Get(p.ctx, mesh.Dataplanes.Key("default", name))
	return err == nil
}

func TestDeregistrationIsDelayed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		st := p.open(session.ADS, node("web", "i"))
		hds := p.open(session.HDS, node("web", "i"))
		st.Close()
		time.Sleep(time.Minute)
		if !p.there("web") {
			t.Fatal("removed although a stream is open")
		}
		hds.Close()
		time.Sleep(9 * time.Second)
		if !p.there("web") {
			t.Error("removed after 9 s")
		}
		back := p.open(session.ADS, node("web", "i"))
		time.Sleep(time.Minute)
		if !p.there("web") {
			t.Error("removed although the proxy is back")
		}
		back.Close()
		time.Sleep(11 * time.Second)
		if p.there("web") {
			t.Error("still there after 11 s")
		}
		if p.sessions.Count() != 0 {
			t.Error("a session without streams counts")
		}
	})
}

func TestLeavingIsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		other := p.open(session.ADS, node("other", "o")) // never handles a picture
		st := p.open(session.Link, node("web", "i"))
		begin := time.Now()
		if err := st.Leave(p.ctx, 200*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 200*time.Millisecond || took > 230*time.Millisecond {
			t.Errorf("it took %s with a stream that does not answer", took)
		}
		if p.there("web") {
			t.Error("still there")
		}
		// Its streams come back while it drains: nothing is registered anew.
		p.open(session.Link, node("web", "i")).Close()
		if p.there("web") {
			t.Error("registered again while it leaves")
		}
		// The answer is quick where all others are.
		again := p.open(session.Link, node("web-2", "i"))
		other.Handled(p.tracker.Now().Revision)
		done := make(chan time.Duration, 1)
		go func() {
			begin := time.Now()
			if err := again.Leave(p.ctx, 200*time.Millisecond); err != nil {
				t.Error(err)
			}
			done <- time.Since(begin)
		}()
		changed, stop := p.tracker.Subscribe()
		defer stop()
		for p.tracker.Now().Get(mesh.Dataplanes.Key("default", "web-2")) != nil {
			<-changed
		}
		other.Handled(p.tracker.Now().Revision)
		if took := <-done; took > 50*time.Millisecond {
			t.Errorf("it took %s", took)
		}
	})
}

func TestOthersDataplanesStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		r, err := resource.Decode(mesh.Dataplanes.Kind, []byte(document("made", "")), false)
		if err != nil {
			t.Fatal(err)
		}
		p.put(r)
		brings := node("made", "i") // and brings its own, which replaces it without making it a stream's
		brings.Dataplane = strings.Replace(brings.Dataplane, "8080", "8081", 1)
		p.open(session.ADS, brings).Close()
		time.Sleep(time.Hour)
		if !p.there("made") {
			t.Fatal("a Dataplane that the API made was removed")
		}
		got, err := p.store.Get(p.ctx, r.Key())
		if err != nil || got.Labels[mesh.LabelRegisteredBy] != "" || mesh.Dataplanes.From(got).Spec.Networking.Inbound[0].Port != 8081 {
			t.Errorf("got %+v, %v", got, err)
		}
	})
}

func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		p := start(t, s)
		p.open(session.ADS, node("back", "i"))
		p.open(session.ADS, node("gone", "i")).Close()
		p.stop() // a graceful end removes nothing
		time.Sleep(time.Hour)
		p = start(t, s)
		if !p.there("gone") || !p.there("back") {
			t.Fatal("the end of the control plane removed Dataplanes")
		}
		time.Sleep(30 * time.Second)
		p.open(session.ADS, node("back", "i"))
		time.Sleep(29 * time.Second)
		if !p.there("gone") {
			t.Error("removed before the time of grace was over")
		}
		time.Sleep(2 * time.Second)
		if p.there("gone") || !p.there("back") {
			t.Errorf("after the time of grace: gone %t, back %t", p.there("gone"), p.there("back"))
		}
	})
}

// Who holds a name, and who may take it.
func TestNames(t *testing.T) {
	for _, c := range []struct {
		name   string
		before func(p *plane) // what the holder "a" did
		by     string
		ok     bool
		after  time.Duration // how long the newcomer waited
	}{
		{"free", func(*plane) {}, "b", true, 0},
		{"same instance", func(p *plane) { p.open(session.ADS, node("web", "a")) }, "a", true, 0},
		{"live holder", func(p *plane) { p.open(session.ADS, node("web", "a")) }, "b", false, time.Second},
		{"holder with another stream", func(p *plane) { p.open(session.Link, node("web", "a")) }, "b", false, time.Second},
		{"holder gone", func(p *plane) { p.open(session.ADS, node("web", "a")).Close() }, "b", true, 0},
		{"holder leaves", func(p *plane) {
			if err := p.open(session.Link, node("web", "a")).Leave(p.ctx, 0); err != nil {
				p.Fatal(err)
			}
		}, "b", true, 0},
		{"holder ends meanwhile", func(p *plane) {
			st := p.open(session.ADS, node("web", "a"))
			time.AfterFunc(500*time.Millisecond, st.Close)
		}, "b", true, 500 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := start(t, memstore.New())
				c.before(p)
				begin := time.Now()
				st, err := p.sessions.Open(p.ctx, session.ADS, node("web", c.by), "")
				if (err == nil) != c.ok || err != nil && !errs.Is(err, errs.Conflict) {
					t.Fatalf("got %v, want ok %t", err, c.ok)
				}
				if took := time.Since(begin); took < c.after || took > c.after+50*time.Millisecond {
					t.Errorf("it took %s, want %s", took, c.after)
				}
				if c.ok {
					select {
					case <-st.Ended():
						t.Errorf("the newcomer was ended: %v", st.Cause())
					default:
					}
				}
			})
		})
	}
}

func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		a, b := p.open(session.ADS, node("a", "i")), p.open(session.ADS, node("b", "i"))
		reason := errors.New("because")
		if n := p.sessions.End(func(i session.Info) bool { return i.Key.Name == "a" }, reason); n != 1 {
			t.Errorf("%d proxies ended", n)
		}
		<-a.Ended()
		if a.Cause() != reason {
			t.Errorf("cause %v", a.Cause())
		}
		select {
		case <-b.Ended():
			t.Error("the other ended too")
		default:
		}
	})
}

// A proxy that comes back keeps the states that were measured.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		n := node("web", "i")
		n.Dataplane = document("web", `,"serviceProbe":{"tcp":{}}`)
		st := p.open(session.HDS, n)
		get := func() mesh.Dataplane {
			synctest.Wait()
			time.Sleep(time.Second)
			d, ok := st.Dataplane(p.tracker.Now())
			if !ok {
				t.Fatal("no Dataplane")
			}
			return d
		}
		d := get()
		if d.Spec.Networking.Inbound[0].IsReady() {
			t.Error("an inbound with a probe is ready before it was measured")
		}
		if wrote, done, err := st.SetHealth(p.ctx, d, map[int]bool{0: true}); !wrote || !done || err != nil {
			t.Errorf("wrote %t, done %t, %v", wrote, done, err)
		}
		if wrote, done, err := st.SetHealth(p.ctx, d, map[int]bool{0: true}); wrote || done || err != nil {
			t.Errorf("over an old version: wrote %t, done %t, %v", wrote, done, err)
		}
		d = get()
		if !d.Spec.Networking.Inbound[0].IsReady() {
			t.Error("the state was not stored")
		}
		if wrote, done, err := st.SetHealth(p.ctx, d, map[int]bool{0: true, 7: true}); wrote || !done || err != nil {
			t.Errorf("without a change: wrote %t, done %t, %v", wrote, done, err)
		}
		p.open(session.HDS, n)
		if now := get(); now.Version != d.Version {
			t.Error("its return changed the Dataplane")
		}
	})
}

// Many streams of few names come and go at once; run with -race.
func TestManyAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memstore.New())
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				for j := range 5 {
					n := node(fmt.Sprint("dp-", i%4), fmt.Sprint("i-", (i+j)%3))
					st, err := p.sessions.Open(p.ctx, session.Kind(i%3), n, "")
					if err != nil {
						if !errs.Is(err, errs.Conflict) {
							t.Error(err)
						}
						continue
					}
					st.SetStatus(session.Status{Complete: true})
					st.Handled(p.tracker.Now().Revision)
					if j == 3 {
						_ = st.Leave(p.ctx, time.Millisecond)
					}
					time.Sleep(time.Duration(i) * time.Millisecond)
					st.Close()
				}
			})
		}
		wg.Wait()
		if p.sessions.Count() != 0 {
			t.Errorf("%d sessions are left", p.sessions.Count())
		}
		time.Sleep(11 * time.Second)
		for i := range 4 {
			if p.there(fmt.Sprint("dp-", i)) {
				t.Errorf("dp-%d is left", i)
			}
		}
	})
}
