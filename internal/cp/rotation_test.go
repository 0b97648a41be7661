package cp

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// Two control planes that start at once on one store have one authority, and a
// rotation by one is the other's, too.
func TestSharedAuthority(t *testing.T) {
	s := memstore.New()
	var certs [2]*pki.ControlPlane
	dirs := [2]string{t.TempDir(), t.TempDir()}
	var wg sync.WaitGroup
	for i := range certs {
		wg.Go(func() {
			c, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dirs[i], Vault: caVault{s}})
			if err != nil {
				t.Error(err)
			}
			certs[i] = c
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	same := func() {
		t.Helper()
		if string(certs[0].CA()) != string(certs[1].CA()) {
			t.Fatal("they have different authorities")
		}
		for i, dir := range dirs {
			if b, err := os.ReadFile(filepath.Join(dir, pki.CAFile)); err != nil || string(b) != string(certs[i].CA()) {
				t.Errorf("kuma-cp.crt: %s, %v", b, err)
			}
		}
	}
	same()
	if certs[0].Made() == certs[1].Made() {
		t.Error("both have made the authority, or none")
	}
	for n, order := range []pki.Order{pki.OrderPrepare, pki.OrderDistribute, pki.OrderSwitch, pki.OrderRetire} {
		if _, err := pki.NewRotator(pki.RotatorConfig{Certs: certs[n%2]}).Do(order, false); err != nil {
			t.Fatal(err)
		}
		if err := certs[1-n%2].Refresh(); err != nil {
			t.Fatal(err)
		}
		same()
	}
	// Both at once: one of them wins, the other one is told.
	var failures [2]error
	for i := range certs {
		wg.Go(func() {
			_, failures[i] = pki.NewRotator(pki.RotatorConfig{Certs: certs[i]}).Do(pki.OrderPrepare, false)
		})
	}
	wg.Wait()
	if (failures[0] == nil) == (failures[1] == nil) || failures[0] != nil && !errs.Is(failures[0], errs.Conflict) || failures[1] != nil && !errs.Is(failures[1], errs.Conflict) {
		t.Errorf("two preparations at once: %v, %v", failures[0], failures[1])
	}
	same()
	if _, err := s.Put(t.Context(), store.Remove(mesh.GlobalSecrets.Key("", mesh.ControlPlaneCA))); err != nil {
		t.Fatal(err)
	}
	if err := certs[0].Refresh(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), mesh.GlobalSecrets.Key("", mesh.ControlPlaneCA)); err != nil {
		t.Errorf("a removed authority is not put back: %v", err)
	}
}

// What a proxy has acknowledged to another control plane counts here.
func TestRecipientsElsewhere(t *testing.T) {
	for _, c := range []struct {
		insight  *mesh.TrustInsight
		link     bool
		revision int64
		why      string
	}{
		{nil, false, 0, "connected to the control plane cp-2"},
		{&mesh.TrustInsight{Revision: "77"}, true, 77, ""},
		{&mesh.TrustInsight{Revision: "77", Error: "read-only"}, true, 0, "read-only"},
		{&mesh.TrustInsight{Revision: "x"}, true, 0, ""},
	} {
		if p := elsewhere("m", "p", "cp-2", c.insight); p.Link != c.link || p.Revision != c.revision || !strings.Contains(p.Why, c.why) || p.Mesh != "m" || p.Name != "p" {
			t.Errorf("%+v: %+v", c.insight, p)
		}
	}
}

// After a start, proxies that an earlier one has left as connected are waited for,
// and until what is stored was read and they had time to come back, nobody knows.
func TestRecipientsAfterStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		ago := time.Now().Add(-time.Hour)
		open := mesh.Subscription{ID: "1", ControlPlaneInstanceID: "cp-before", ConnectTime: &ago}
		gone, own := open, open
		gone.DisconnectTime, own.ControlPlaneInstanceID = &ago, "cp-now"
		for name, sub := range map[string]mesh.Subscription{"open": open, "gone": gone, "own": own} {
			r := mesh.DataplaneInsights.Make("default", name, &mesh.DataplaneInsightSpec{Subscriptions: []mesh.Subscription{sub}})
			if _, err := s.Put(t.Context(), store.Set(mesh.Meshes.Make("", "default", &mesh.MeshSpec{})), store.Set(r)); err != nil {
				t.Fatal(err)
			}
		}
		c := &ControlPlane{log: slog.New(slog.DiscardHandler), cfg: Default(), tracker: state.New(state.Config{Store: s})}
		c.sessions = session.New(session.Config{Tracker: c.tracker, Store: s})
		dir := t.TempDir()
		for _, first := range []bool{true, false} {
			var err error
			if c.certs, err = pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir}); err != nil {
				t.Fatal(err)
			}
			r := c.newRotator(c.certs, "cp-now", c.log)
			if status, err := r.Status(); err != nil || status.Settles.IsZero() != first {
				t.Errorf("first %t: it settles at %v, %v", first, status.Settles, err)
			}
			c.rotator = r
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = c.runRotator(ctx) })
		time.Sleep(time.Hour)
		synctest.Wait()
		if s, err := c.rotator.Status(); err != nil || !s.Settles.After(time.Now()) {
			t.Errorf("though nothing could be read it settled at %v, %v", s.Settles, err)
		}
		running.Go(func() { _ = c.tracker.Run(ctx) })
		time.Sleep(c.cfg.XDSServer.ReturnDelay - time.Second)
		synctest.Wait()
		status, err := c.rotator.Status()
		if err != nil || !status.Settles.After(time.Now()) {
			t.Errorf("it settled at %v, %v", status.Settles, err)
		}
		if len(status.Pending) != 1 || status.Pending[0].Name != "open" || !strings.Contains(status.Pending[0].Why, "has not come back") {
			t.Errorf("pending are %+v", status.Pending)
		}
		time.Sleep(2 * time.Second)
		if s, err := c.rotator.Status(); err != nil || !s.Settles.IsZero() {
			t.Errorf("it has not settled: %v, %v", s.Settles, err)
		}
		cancel()
		running.Wait()
	})
}
