package cp

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
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

func TestChoose(t *testing.T) {
	for _, test := range []struct{ found, inUse, want string }{
		{"10.0.0.2 10.0.0.1", "", "10.0.0.1"},
		{"10.0.0.2 10.0.0.1", "10.0.0.2", "10.0.0.2"},
		{"10.0.0.2", "10.0.0.9", "10.0.0.2"},
		{"fd00::1 10.0.0.2", "", "10.0.0.2"},
		{"fd00::2 fd00::1", "", "fd00::1"},
		{"::ffff:10.0.0.2", "10.0.0.2", "10.0.0.2"},
		{"0.0.0.0 224.0.0.1 ::", "", ""},
		{"fe80::1%eth0", "", "fe80::1"},
		{"", "10.0.0.1", ""},
	} {
		var found []netip.Addr
		for s := range strings.FieldsSeq(test.found) {
			found = append(found, netip.MustParseAddr(s))
		}
		var inUse netip.Addr
		if test.inUse != "" {
			inUse = netip.MustParseAddr(test.inUse)
		}
		got := ""
		if a := choose(found, inUse); a.IsValid() {
			got = a.String()
		}
		if got != test.want {
			t.Errorf("%q with %q in use: %q, want %q", test.found, test.inUse, got, test.want)
		}
	}
}

// TestResolver follows a name through its life: first asked for, changed, out of
// order, no longer in use.
func TestResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		answers, asked := map[string]string{"web.example": "10.0.0.1", "api.example": "fails", "slow.example": "10.0.0.3"}, map[string]int{}
		say := func(name, answer string) {
			mu.Lock()
			defer mu.Unlock()
			answers[name] = answer
		}
		count := func(name string) int {
			mu.Lock()
			defer mu.Unlock()
			return asked[name]
		}
		var out bytes.Buffer
		s := memstore.New()
		tracker := state.New(state.Config{Store: s, Log: slog.New(slog.DiscardHandler)})
		r := newResolver(tracker, 10*time.Second, slog.New(slog.NewTextHandler(&out, nil)))
		r.lookup = func(ctx context.Context, name string) ([]netip.Addr, error) {
			if name == "slow.example" {
				time.Sleep(3 * time.Second)
			}
			mu.Lock()
			defer mu.Unlock()
			asked[name]++
			if answers[name] == "fails" {
				return nil, errors.New("no such host")
			}
			return []netip.Addr{netip.MustParseAddr(answers[name])}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- tracker.Run(ctx) }()
		go func() { done <- r.run(ctx) }()
		put := func(rs ...*resource.Resource) {
			t.Helper()
			var w []store.Write
			for _, r := range rs {
				w = append(w, store.Set(r))
			}
			if _, err := s.Put(ctx, w...); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		at := func(name, address string) *resource.Resource {
			return mesh.Dataplanes.Make("default", name, &mesh.DataplaneSpec{Networking: &mesh.Networking{Address: address}})
		}
		want := func(name, address string) {
			t.Helper()
			if got := strings.Join(r.resolve(name), " "); got != address {
				t.Errorf("%s is at %q, want %q", name, got, address)
			}
		}
		renewed := func(since *state.Picture) (names []string) {
			changes, _ := tracker.Now().Since(since)
			for _, c := range changes {
				names = append(names, c.Key.Name)
			}
			return names
		}
		put(mesh.Meshes.Make("", "default", &mesh.MeshSpec{}), at("a", "web.example"), at("b", "web.example"), at("c", "api.example"), at("d", "10.0.0.4"), at("e", "slow.example"))
		time.Sleep(time.Hour)
		if len(asked) != 0 {
			t.Errorf("asked for %v, which nobody needs", asked)
		}

		want("web.example", "10.0.0.1")
		want("api.example", "")
		pic := tracker.Now()
		begun := time.Now()
		want("slow.example", "")
		want("slow.example", "")
		if waited := time.Since(begun); waited != firstLookup {
			t.Errorf("a slow name took %s", waited)
		}
		time.Sleep(3 * time.Second) // it comes, and is told to whom it matters
		want("slow.example", "10.0.0.3")
		if diff := cmp.Diff([]string{"e"}, renewed(pic)); diff != "" {
			t.Error(diff)
		}

		pic = tracker.Now()
		time.Sleep(20 * time.Second) // looked up again; nothing has changed
		if tracker.Now() != pic || count("web.example") < 2 {
			t.Errorf("asked %d times; renewed without a change: %t", count("web.example"), tracker.Now() != pic)
		}
		say("web.example", "10.0.0.7")
		say("api.example", "10.0.0.8")
		time.Sleep(11 * time.Second)
		want("web.example", "10.0.0.7")
		want("api.example", "10.0.0.8")
		if got := strings.Join(renewed(pic), " "); got != "a b c" && got != "c a b" {
			t.Errorf("renewed %q", got)
		}

		pic = tracker.Now()
		say("web.example", "fails") // what was there goes on
		time.Sleep(time.Minute)
		want("web.example", "10.0.0.7")
		if tracker.Now() != pic {
			t.Error("a failure changed something")
		}
		synctest.Wait()
		if n := strings.Count(out.String(), "web.example"); n != 1 {
			t.Errorf("told %d times:\n%s", n, out.String())
		}
		say("web.example", "10.0.0.7")
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if !strings.Contains(out.String(), "resolved again") {
			t.Errorf("its end is not told:\n%s", out.String())
		}

		put(at("a", "10.1.0.1"), at("b", "10.1.0.2"))
		time.Sleep(11 * time.Second)
		n := count("web.example")
		time.Sleep(time.Hour)
		if more := count("web.example") - n; more != 0 {
			t.Errorf("asked %d times for a name that nobody has any more", more)
		}
		cancel()
		for range cap(done) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		want("other.example", "") // after the end nothing is begun
	})
}
