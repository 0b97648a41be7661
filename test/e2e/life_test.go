//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kuma/test/lab"
)

// temp gives proxies a temporary directory of the test's own.
func (r *room) temp() string {
	r.Helper()
	dir := filepath.Join(r.Dir, "t")
	r.must(os.MkdirAll(dir, 0o700))
	r.Cleanup(func() {
		for _, pid := range envoys(dir) { // those of a kuma-dp that failed its test
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return dir
}

// envoys returns the processes of Envoys whose working directories are in a
// directory.
func envoys(dir string) []int {
	var out []int
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		args := strings.Split(string(b), "\x00")
		if len(args) > 2 && args[1] == "--config-path" && strings.HasPrefix(args[2], dir+"/") {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
				out = append(out, pid)
			}
		}
	}
	return out
}

// load calls a port all the time, over several connections that stay open, and
// on the way over new ones.
type load struct {
	stop chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex
	served map[string]int
	failed []string
}

func (r *room) load(port int) *load {
	l := &load{stop: make(chan struct{}), served: map[string]int{}}
	for worker := range 4 {
		l.wg.Go(func() {
			c := client(worker%2 == 1)
			defer c.CloseIdleConnections()
			pace := time.NewTicker(5 * time.Millisecond)
			defer pace.Stop()
			for n := 0; ; n++ {
				select {
				case <-l.stop:
					return
				case <-pace.C:
				}
				if n%50 == 49 {
					c.CloseIdleConnections()
				}
				a, err := r.fetch(c, port, "/")
				l.mu.Lock()
				switch {
				case err != nil:
					l.failed = append(l.failed, err.Error())
				case a.status != http.StatusOK:
					l.failed = append(l.failed, fmt.Sprintf("%s %d %s", time.Now().UTC().Format("05.000"), a.status, a.body))
				default:
					l.served[a.told.Site]++
				}
				l.mu.Unlock()
			}
		})
	}
	r.Cleanup(l.end)
	return l
}

// by returns how many requests a site has answered.
func (l *load) by(site string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.served[site]
}

// answeredBy waits until a site answers (more of) the load.
func (r *room) answeredBy(l *load, sites ...string) {
	r.Helper()
	for _, s := range sites {
		before := l.by(s)
		r.await(s+" answers", func() error {
			if l.by(s) < before+10 {
				return fmt.Errorf("%d requests until now", l.by(s))
			}
			return nil
		})
	}
}

func (l *load) end() {
	select {
	case <-l.stop:
	default:
		close(l.stop)
	}
	l.wg.Wait()
}

// clean ends the load and checks that nothing of it failed.
func (r *room) clean(l *load) {
	r.Helper()
	l.end()
	if len(l.failed) > 0 {
		r.Errorf("%d requests failed, the first with %s (served: %v)", len(l.failed), l.failed[0], l.served)
	}
}

// TestLeavingLosesNothing stops one of two backends under load, with a drain
// time far shorter than any health check, and starts it again: no request fails,
// since the others know before it drains, and hear of the next one when it can
// serve.
func TestLeavingLosesNothing(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	proxies := map[string]*lab.Proxy{}
	start := func(name string) {
		proxies[name] = r.join(cp, name, dataplane(name, []in{{service: "backend", protocol: "http", port: r.port(), local: r.site(name).port}}),
			lab.ProxyOptions{Env: []string{"TMPDIR=" + r.temp(), "KUMA_DATAPLANE_DRAIN_TIME=3s"}})
	}
	start("one")
	start("two")
	to := out{port: r.port(), service: "backend"}
	r.ready(proxies["one"], proxies["two"], r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)
	l := r.load(to.port)
	r.answeredBy(l, "one", "two")
	for range 3 {
		p := proxies["one"]
		r.must(p.Signal(syscall.SIGTERM))
		if code := p.ExitCode(); code != 0 {
			t.Errorf("it ended with exit code %d", code)
		}
		log := p.Log()
		told, drained := strings.Index(log, "taken this proxy's endpoints out"), strings.Index(log, "draining Envoy connections")
		if told < 0 || drained < told {
			t.Error("draining began before the leaving was known")
		}
		r.answeredBy(l, "two")
		if left := envoys(r.temp()); len(left) != 1 {
			t.Errorf("%d Envoys run beside the other one", len(left)-1)
		}
		start("one")
		r.ready(proxies["one"])
		r.answeredBy(l, "one", "two")
	}
	r.clean(l)
	// Nor was anything saved by trying again: who leaves listens until the others
	// know, and who comes gets traffic when it can serve.
	if n := r.stat(cp, "web", `cluster\.backend\.upstream_cx_connect_fail`); n > 0 {
		t.Errorf("%d connections were tried where nobody listens", n)
	}
	t.Logf("served: %v", l.served)
	if dirs, _ := filepath.Glob(filepath.Join(r.temp(), "kuma-dp-*")); len(dirs) != 2 {
		t.Errorf("working directories: %v", dirs)
	}
}

// TestReturningProxy kills kuma-dp with SIGKILL: its Envoy dies with it, and who
// comes back under the same name is served at once.
func TestReturningProxy(t *testing.T) {
	r := open(t)
	// So long that the test fails if anybody waits for it.
	cp := r.controlPlane("KUMA_XDS_DATAPLANE_DEREGISTRATION_DELAY=1h")
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	site, to := r.site("backend"), out{port: r.port(), service: "backend"}
	yaml := dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: site.port}})
	options := lab.ProxyOptions{Env: []string{"TMPDIR=" + r.temp()}}
	backend := r.join(cp, "backend", yaml, options)
	r.ready(backend, r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)
	for range 3 {
		if n := len(envoys(r.temp())); n != 1 {
			t.Fatalf("%d Envoys run", n)
		}
		backend.Kill()
		r.await("Envoy is gone", func() error {
			if left := envoys(r.temp()); len(left) > 0 {
				return fmt.Errorf("processes %v", left)
			}
			return nil
		})
		began := time.Now()
		backend = r.join(cp, "backend", yaml, options)
		r.ready(backend)
		r.answers(to.port, http.StatusOK)
		t.Logf("back after %s", time.Since(began).Round(time.Millisecond))
		r.logged(backend.Process, "removed a working directory that an earlier run left")
		if dirs, _ := filepath.Glob(filepath.Join(r.temp(), "kuma-dp-*")); len(dirs) != 1 {
			t.Errorf("working directories: %v", dirs)
		}
	}
}

// TestTwoHolders: of two proxies of one name that live, the newcomer is refused
// with the reason and tries again; it is let in when the first one is gone.
func TestTwoHolders(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to := out{port: r.port(), service: "backend"}
	start := func(site string) *lab.Proxy {
		return r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site(site).port}}),
			lab.ProxyOptions{As: site, Env: []string{"KUMA_CONTROL_PLANE_RETRY_BACKOFF=300ms"}})
	}
	first := start("first")
	r.ready(first, r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)
	l := r.load(to.port)
	second := start("second")
	const reason = "there is already an active stream from this node"
	r.logged(second.Process, reason)
	if _, body, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", second.Readiness)); err != nil || !strings.Contains(body, reason) {
		t.Errorf("the newcomer's /ready says %q %v", body, err)
	}
	r.answeredBy(l, "first")
	if l.by("second") > 0 {
		t.Error("the newcomer serves")
	}
	if n := len(loggedLines(first.Process, "the link to the control plane is down")); n > 0 {
		t.Errorf("the first one lost its link %d times", n)
	}
	if n := len(loggedLines(second.Process, reason)); n != 1 {
		t.Errorf("the refusal was logged %d times", n)
	}
	r.clean(l)
	first.Stop(10 * time.Second)
	r.ready(second)
	if a := r.answers(to.port, http.StatusOK); a.told.Site != "second" {
		t.Errorf("%s answers", a.told.Site)
	}
}

// TestStop: a second request to stop cuts the drain short; an Envoy that is
// killed ends kuma-dp with the reason.
func TestStop(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	env := lab.ProxyOptions{Env: []string{"KUMA_DATAPLANE_DRAIN_TIME=1h", "TMPDIR=" + r.temp()}}
	p := r.join(cp, "one", r.caller("one"), env)
	r.ready(p)
	ready := fmt.Sprintf("http://127.0.0.1:%d/ready", p.Readiness)
	r.must(p.Signal(syscall.SIGTERM))
	r.logged(p.Process, "waiting for connections to be drained")
	if code, body, err := lab.Get(ready); code != http.StatusServiceUnavailable || body != "TERMINATING" {
		t.Errorf("/ready while it drains: %d %q %v", code, body, err)
	}
	r.must(p.Signal(syscall.SIGTERM))
	if code := p.ExitCode(); code != 0 {
		t.Errorf("two requests to stop: exit code %d", code)
	}
	r.logged(p.Process, "received second signal, stopping instance")

	p = r.join(cp, "two", r.caller("two"), env)
	r.ready(p)
	list := envoys(r.temp())
	if len(list) != 1 {
		t.Fatalf("Envoys: %v", list)
	}
	r.must(syscall.Kill(list[0], syscall.SIGKILL))
	if code := p.ExitCode(); code != 1 {
		t.Errorf("Envoy was killed: exit code %d", code)
	}
	r.logged(p.Process, "Error: ", "signal: killed")
	if dirs, _ := filepath.Glob(filepath.Join(r.temp(), "kuma-dp-*")); len(dirs) != 0 {
		t.Errorf("working directories: %v", dirs)
	}
}

// TestDeregistration: a Dataplane that a stream registered goes at once after an
// announced leaving, and after the delay when kuma-dp was killed. One that was
// made by the API stays, and is out of load balancing meanwhile.
func TestDeregistration(t *testing.T) {
	r := open(t)
	const delay = 3 * time.Second
	cp := r.controlPlane("KUMA_XDS_DATAPLANE_DEREGISTRATION_DELAY=" + delay.String())
	get := func(name string) (int, string) {
		code, body, err := lab.Get(cp.URL() + "/meshes/default/dataplanes/" + name)
		r.must(err)
		return code, body
	}
	one := r.join(cp, "one", r.caller("one"))
	two := r.join(cp, "two", r.caller("two"))
	local, port := r.site("three").port, r.port()
	r.apply(cp, dataplane("three", []in{{service: "three", protocol: "http", port: port, local: local}}))
	three := r.join(cp, "three", "")
	to := out{port: r.port(), service: "three"}
	r.ready(one, two, three, r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)

	r.must(one.Signal(syscall.SIGTERM))
	r.logged(one.Process, "taken this proxy's endpoints out")
	if code, _ := get("one"); code != http.StatusNotFound {
		t.Errorf("after it was announced that it leaves: %d", code)
	}

	killed := time.Now()
	two.Kill()
	three.Kill()
	r.await("two is deregistered", func() error {
		if code, _ := get("two"); code != http.StatusNotFound {
			return fmt.Errorf("%d", code)
		}
		return nil
	})
	if d := time.Since(killed); d < delay {
		t.Errorf("it was deregistered %s after it was killed, not %s", d, delay)
	}
	if code, _ := get("three"); code != http.StatusOK {
		t.Errorf("one made by the API, after its proxy was killed: %d", code)
	}

	three = r.join(cp, "three", "")
	r.ready(three)
	r.answers(to.port, http.StatusOK)
	three.Stop(10 * time.Second)
	if code, body := get("three"); code != http.StatusOK || !strings.Contains(body, `"NotReady"`) {
		t.Errorf("one made by the API, after its proxy has left: %d %s", code, body)
	}
	r.answers(to.port, http.StatusServiceUnavailable)
	three = r.join(cp, "three", "")
	r.ready(three)
	r.answers(to.port, http.StatusOK)
}

// TestControlPlaneAway: proxies come, go and change while the control plane is
// away; when it is back over the same store, it steers by how things are now.
func TestControlPlaneAway(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to := out{port: r.port(), service: "backend"}
	start := func(site string) *lab.Proxy {
		y := dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site(site).port}})
		return r.join(cp, "backend", strings.Replace(y, "tags: {", "tags: {version: "+site+", ", 1))
	}
	first := start("v1")
	web := r.join(cp, "web", r.caller("web", to))
	r.ready(first, web)
	r.answers(to.port, http.StatusOK)

	cp.Kill()
	first.Kill() // it can tell nobody
	second := func() *lab.Proxy {
		// Its token is there already: nobody could make one now.
		y := dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site("v2").port}})
		b, err := os.ReadFile(first.TokenFile)
		r.must(err)
		return r.join(cp, "backend", strings.Replace(y, "tags: {", "tags: {version: v2, ", 1), lab.ProxyOptions{Token: string(b), Env: []string{"KUMA_CONTROL_PLANE_RETRY_BACKOFF=300ms"}})
	}()
	r.logged(second.Process, "could not fetch bootstrap configuration, trying again")
	r.must(cp.Start(r.ctx))
	r.ready(second)
	if a := r.answers(to.port, http.StatusOK); a.told.Site != "v2" {
		t.Errorf("%s answers", a.told.Site)
	}
	if n := len(loggedLines(second.Process, "could not fetch bootstrap configuration")); n > 2 {
		t.Errorf("a control plane that is away was logged %d times", n)
	}
	// The certificate is that of the Dataplane as it is.
	a, err := r.get(to.port, "/")
	r.must(err)
	if !strings.Contains(a.told.Caller, "By=kuma://version/v2") || strings.Contains(a.told.Caller, "v1") {
		t.Errorf("the backend's names: %s", a.told.Caller)
	}
}

// TestRenewal has certificates that live for ten seconds renewed under load.
func TestRenewal(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT", "    dpCert:\n      rotation:\n        expiration: 10s\n"))
	r.apply(cp, permitAll)
	site, to := r.site("backend"), out{port: r.port(), service: "backend"}
	backend := r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: site.port}}))
	web := r.join(cp, "web", r.caller("web", to))
	r.ready(backend, web)
	r.answers(to.port, http.StatusOK)
	l := r.load(to.port)
	for _, p := range []*lab.Proxy{backend, web} {
		r.await(p.Name+" has had four certificates", func() error {
			if n := len(loggedLines(p.Process, "certificate received")); n < 4 {
				return fmt.Errorf("%d until now", n)
			}
			return nil
		})
	}
	r.answeredBy(l, "backend")
	r.clean(l)
	t.Logf("served: %v; web's certificates:\n%s", l.served, strings.Join(loggedLines(web.Process, "certificate received"), "\n"))
}
