package cptest_test

import (
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/cp/cptest"
	"kuma/internal/mesh"
	"kuma/internal/upkeep"
)

// TestNothingIsReadAtRest leaves a control plane with connected proxies alone
// for an hour: nothing is read from the store, and nothing written. Whatever
// polls shows here.
func TestNothingIsReadAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := cptest.OpenDoors(t, cptest.DoorsConfig{})
		keeper := upkeep.New(upkeep.Config{Store: d.Counted, Tracker: d.Tracker, Zone: "default", Log: slog.New(slog.DiscardHandler)})
		done := make(chan error, 1)
		go func() { done <- keeper.Run(t.Context()) }()
		t.Cleanup(func() {
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		d.Mesh("default", true)
		for i := range 3 {
			name := fmt.Sprint("web-", i)
			a := cptest.NewADS(cptest.ADSConfig{
				Conn: d.Conn(), Mesh: "default", Name: name, Metadata: cptest.Metadata("i"+name, cptest.Dataplane("default", name, "web", "web")),
			})
			if err := a.Connect(t.Context()); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(a.Close)
			if _, err := a.WaitComplete(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		// What follows from their coming is over: insights are written, and the
		// time is past in which proxies of an earlier life may come back.
		time.Sleep(5 * time.Minute)
		reads, writes := d.Asked.Reads(), d.Asked.Writes()
		if reads == 0 || writes == 0 {
			t.Fatalf("%d reads and %d writes were counted while proxies came: the counter is broken", reads, writes)
		}
		time.Sleep(time.Hour)
		if r, w := d.Asked.Reads()-reads, d.Asked.Writes()-writes; r != 0 || w != 0 {
			t.Errorf("in an hour at rest the store was read %d times and written %d times", r, w)
		}
		if d.Tracker.Now().Count(mesh.DataplaneInsights.Name) != 3 {
			t.Error("the proxies are not there any more")
		}
	})
}
