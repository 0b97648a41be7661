//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kuma/internal/cp/cptest"
	"kuma/test/lab"
)

// link is a proxy without Envoy that is given an authority.
func (r *room) link(cp *lab.ControlPlane, name string, ca []byte) *cptest.LinkProxy {
	r.Helper()
	token, err := cp.Kumactl("", "generate", "dataplane-token", "--mesh", "default", "--name", name, "--valid-for", "1h")
	r.must(err)
	p := cptest.NewLinkProxy(cptest.LinkConfig{
		Address: fmt.Sprintf("127.0.0.1:%d", cp.DP), CA: ca, Mesh: "default", Name: name, Token: strings.TrimSpace(token),
		Dataplane: cptest.Dataplane("default", name, "many"),
	})
	r.Cleanup(p.Close)
	return p
}

// links connects many such proxies.
func (r *room) links(cp *lab.ControlPlane, n int, ca []byte) []*cptest.LinkProxy {
	r.Helper()
	out := make([]*cptest.LinkProxy, n)
	var wg sync.WaitGroup
	for i := range out {
		out[i] = r.link(cp, fmt.Sprintf("link-%02d", i), ca)
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(r.ctx, patience)
			defer cancel()
			if err := out[i].Connect(ctx); err != nil {
				r.Errorf("link %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	return out
}

// undropped checks that no link has ended.
func (r *room) undropped(when string, links []*cptest.LinkProxy) {
	r.Helper()
	for i, l := range links {
		if v := l.View(); !v.Open || v.Streams != 1 {
			r.Errorf("%s: link %d has had %d streams, open %t: %v", when, i, v.Streams, v.Open, v.Err)
		}
	}
}

// acknowledged waits until all proxies hold what is current.
func (r *room) acknowledged(cp *lab.ControlPlane, step string, all int) {
	r.Helper()
	r.await("all have acknowledged, "+step, func() error {
		text, err := cp.Kumactl("", "ca", "rotate", "control-plane", "--status", "-o", "json")
		if err != nil {
			return err
		}
		var s struct {
			Step                  string
			Acknowledged, Pending []struct{ Name, Reason string }
		}
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return err
		}
		if s.Step != step || len(s.Pending) > 0 || len(s.Acknowledged) != all {
			return fmt.Errorf("%s, %d acknowledged, pending %.300v", s.Step, len(s.Acknowledged), s.Pending)
		}
		return nil
	})
}

// A hundred proxies, one of them a real Envoy under load, through three
// rotations of the control plane's authority that are aborted and one that is
// not: no request fails, and no stream ends. A proxy that was off meanwhile, and
// has nothing but the authority of old, comes back by itself before the old one
// is retired, and after a restart once more when it is.
func TestRotationUnderLoad(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	first, err := os.ReadFile(cp.CA)
	r.must(err)
	old := filepath.Join(r.Dir, "old.crt")
	r.must(os.WriteFile(old, first, 0o600))
	oldCA := []string{"--ca-cert-file", old}

	site, to := r.site("backend"), out{port: r.port(), service: "backend"}
	r.ready(
		r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: site.port}}), lab.ProxyOptions{Args: oldCA}),
		r.join(cp, "web", r.caller("web", to), lab.ProxyOptions{Args: oldCA}),
	)
	late := r.join(cp, "late", r.caller("late"), lab.ProxyOptions{Args: oldCA})
	r.ready(late)
	late.Stop(10 * time.Second)
	links := r.links(cp, 98, first)
	const all = 100
	r.answers(to.port, http.StatusOK)
	r.acknowledged(cp, "steady", all)
	before := r.stat(cp, "web", `cluster\.ads_cluster\.upstream_cx_total`)
	l := r.load(to.port)
	r.answeredBy(l, "backend")

	kumactl := func(args ...string) string {
		t.Helper()
		said, err := cp.Kumactl("", append([]string{"ca", "rotate", "control-plane"}, args...)...)
		r.must(err)
		return said
	}
	anchors := func() string {
		b, err := os.ReadFile(cp.CA)
		r.must(err)
		return string(b)
	}
	steps := []string{"prepare", "distribute", "switch"}
	for n := range steps {
		for _, step := range steps[:n+1] {
			if step == "switch" {
				r.acknowledged(cp, "distributed", all)
			}
			kumactl("--step", step)
		}
		if c := strings.Count(anchors(), "BEGIN CERTIFICATE"); c != 2 {
			t.Errorf("%s: %d authorities for clients", steps[n], c)
		}
		kumactl("--abort")
		if anchors() != string(first) {
			t.Errorf("aborted after %s: clients are given other authorities than at the start", steps[n])
		}
		r.acknowledged(cp, "steady", all)
		r.undropped("aborted after "+steps[n], links)
	}

	links[0].Deaf(true)
	if said, err := cp.Kumactl("", "ca", "rotate", "control-plane", "--timeout", "100ms"); err == nil || !strings.Contains(err.Error(), "link-00 in mesh default (it has not acknowledged") || !strings.Contains(said, "distributed: both authorities are being sent to 100 proxies") {
		t.Errorf("with a proxy that does not answer: %q, %v", said, err)
	}
	links[0].Deaf(false)
	r.must(links[0].Connect(r.ctx))
	if said := kumactl(); !strings.Contains(said, "going on") || !strings.Contains(said, "acknowledged by all that have a link: 100 proxies") || !strings.Contains(said, "switched:") {
		t.Errorf("the rotation says %q", said)
	}
	// Who was off all the while has the old authority alone.
	late = r.join(cp, "late", r.caller("late"), lab.ProxyOptions{Args: oldCA})
	r.ready(late)
	offline := r.link(cp, "offline", first)
	r.must(offline.Connect(r.ctx))
	r.acknowledged(cp, "switched", all+2)
	// Envoys that never hear of a change connect with the old authority alone, and
	// with the new one alone; the old one is not retired behind their backs.
	young := filepath.Join(r.Dir, "young.crt")
	r.must(os.WriteFile(young, []byte(strings.TrimPrefix(anchors(), string(first))), 0o600))
	var deaf []*lab.Proxy
	for name, ca := range map[string]string{"deaf-old": old, "deaf-young": young} {
		deaf = append(deaf, r.join(cp, name, r.caller(name), lab.ProxyOptions{
			Args: []string{"--ca-cert-file", ca}, Env: []string{"KUMA_DATAPLANE_RUNTIME_LINK_ENABLED=false"},
		}))
	}
	r.ready(deaf...)
	if _, err := cp.Kumactl("", "ca", "rotate", "control-plane", "--step", "retire"); err == nil || !strings.Contains(err.Error(), "2 proxies would not trust") || !strings.Contains(err.Error(), "deaf-old in mesh default (it has no link") {
		t.Errorf("retired though proxies without a link are there: %v", err)
	}
	for _, p := range deaf {
		p.Stop(10 * time.Second)
	}
	offline.Close()
	r.await("who is gone is no longer waited for", func() error {
		_, err := cp.Kumactl("", "ca", "rotate", "control-plane", "--step", "retire")
		return err
	})
	if now := anchors(); strings.Count(now, "BEGIN CERTIFICATE") != 1 || now == string(first) {
		t.Error("clients are not given the new authority alone")
	}
	r.acknowledged(cp, "steady", all+1)
	r.answeredBy(l, "backend")
	r.clean(l)
	r.undropped("at the end", links[1:])
	if after := r.stat(cp, "web", `cluster\.ads_cluster\.upstream_cx_total`); after != before {
		t.Errorf("Envoy has connected to the control plane %d times, %d before", after, before)
	}
	t.Logf("served: %v", l.served)

	// Nobody who connects now is helped by the old authority: not Envoy, whose
	// trust has changed while it ran, not kuma-dp, not one that starts anew.
	cp.Kill()
	r.must(cp.Start(r.ctx))
	for _, name := range []string{"web", "backend", "late"} {
		r.await(name+" is back", func() error {
			text, err := cp.Kumactl("", "inspect", "dataplane", name, "--type", "stats")
			if err == nil && !strings.Contains(text, "control_plane.connected_state: 1\n") {
				err = errors.New("its Envoy is not connected")
			}
			return err
		})
	}
	r.must(links[1].Connect(r.ctx))
	if err := r.link(cp, "stranger", first).Connect(r.ctx); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("who knows the old authority alone: %v", err)
	}
	late.Stop(10 * time.Second)
	r.ready(r.join(cp, "late", r.caller("late"), lab.ProxyOptions{Args: oldCA}))
}
