package upkeep_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/upkeep"
)

// absent is the insight of a proxy whose last stream ended then, after another.
func absent(name string, then time.Time) *resource.Resource {
	begun, before := then.Add(-time.Hour), then.Add(-time.Minute)
	return mesh.DataplaneInsights.Make("default", name, &mesh.DataplaneInsightSpec{Subscriptions: []mesh.Subscription{
		{ConnectTime: &begun, DisconnectTime: &then}, {ConnectTime: &begun, DisconnectTime: &before},
	}})
}

// TestCleanup follows Dataplanes whose proxies went without a word, over a
// restart of the control plane.
func TestCleanup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		var here sync.Map
		run := func() (stop func()) {
			tr := state.New(state.Config{Store: s, Log: slog.New(slog.DiscardHandler)})
			k := upkeep.New(upkeep.Config{
				Store: s, Tracker: tr, Zone: "default", Here: func(_, name string) bool { _, ok := here.Load(name); return ok }, Log: slog.New(slog.DiscardHandler),
			})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 2)
			go func() { done <- tr.Run(ctx) }()
			go func() { done <- k.Run(ctx) }()
			return func() {
				cancel()
				for range cap(done) {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
			}
		}
		there := func(name string) bool {
			t.Helper()
			_, err := s.Get(t.Context(), mesh.Dataplanes.Key("default", name))
			if err != nil && !errs.Is(err, errs.NotFound) {
				t.Fatal(err)
			}
			return err == nil
		}
		begun := time.Now()
		var writes []store.Write
		for _, name := range []string{"left", "never-came", "online", "returns", "unwritten"} {
			writes = append(writes, store.Set(dataplane(name, mesh.Ready)))
		}
		online := absent("online", begun)
		online.Spec.(*mesh.DataplaneInsightSpec).Subscriptions[1].DisconnectTime = nil
		writes = append(writes, store.Set(mesh.Meshes.Make("", "default", &mesh.MeshSpec{})), store.Set(online),
			store.Set(absent("left", begun)), store.Set(absent("returns", begun)), store.Set(absent("unwritten", begun)))
		if _, err := s.Put(t.Context(), writes...); err != nil {
			t.Fatal(err)
		}

		stop := run()
		time.Sleep(40 * time.Hour)
		stop()
		if !there("left") {
			t.Fatal("deleted after 40 hours")
		}
		stop = run() // the clock goes on where it was
		time.Sleep(32*time.Hour - time.Minute)
		if !there("left") {
			t.Error("deleted a minute too early")
		}
		back := absent("returns", begun)
		back.Spec.(*mesh.DataplaneInsightSpec).Subscriptions[0].DisconnectTime = nil
		if _, err := s.Put(t.Context(), store.Set(back)); err != nil {
			t.Fatal(err)
		}
		here.Store("unwritten", nil)
		time.Sleep(2 * time.Minute)
		for name, want := range map[string]bool{"left": false, "never-came": true, "online": true, "returns": true, "unwritten": true} {
			if there(name) != want {
				t.Errorf("after 72 hours %q is there: %t", name, !want)
			}
		}
		if _, err := s.Get(t.Context(), mesh.DataplaneInsights.Key("default", "left")); !errs.Is(err, errs.NotFound) {
			t.Error("the insight outlived its Dataplane")
		}
		here.Delete("unwritten")
		time.Sleep(2 * time.Minute)
		if there("unwritten") {
			t.Error("one that was here when its time came is never looked at again")
		}
		stop()
	})
}
