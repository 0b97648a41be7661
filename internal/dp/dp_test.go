package dp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/proto/linkpb"
)

// answerAll is a link that serves as a control plane should; more sees each
// message first.
func answerAll(more func(*stream, *linkpb.FromProxy) error) func(*stream) error {
	return func(s *stream) error {
		if err := s.welcome(); err != nil {
			return err
		}
		if s.p.secret != "" {
			if err := s.want(s.p.secret, "1"); err != nil {
				return err
			}
		}
		if err := s.status(true); err != nil {
			return err
		}
		for {
			m, err := s.Recv()
			if err != nil {
				return err
			}
			if m.GetSigningRequest() != nil {
				if err := s.sign(m.GetSigningRequest(), "spiffe://default/web", time.Hour); err != nil {
					return err
				}
			}
			if more != nil {
				if err := more(s, m); err != nil {
					return err
				}
			}
			if m.GetLeaving() != nil {
				if err := s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_LeaveNoted{LeaveNoted: &linkpb.LeaveNoted{}}}); err != nil {
					return err
				}
			}
		}
	}
}

// A start, the requests that it makes, readiness, and an orderly end: leaving is
// announced before Envoy is told to drain.
func TestRunAndStop(t *testing.T) {
	t.Parallel()
	hello := make(chan *stream, 1)
	readiness := make(chan *linkpb.Readiness, 16)
	var r *ran
	p := &plane{}
	told := make(chan bool, 1)
	p.serve = func(s *stream) error {
		hello <- s
		return answerAll(func(_ *stream, m *linkpb.FromProxy) error {
			if m.GetReadiness() != nil {
				readiness <- m.GetReadiness()
			}
			if m.GetLeaving() != nil {
				told <- r.logs("draining Envoy connections")
			}
			return nil
		})(s)
	}
	p.start(t)
	r = launch(t, p, func(c *Config) { c.DrainTime = 300 * time.Millisecond })
	r.until("ready", func() bool { code, body, by := r.ready(); return code == 200 && body == "LIVE\n" && by == "" })
	s := <-hello
	if want := []string{aToken}; !cmp.Equal(s.token, want) {
		t.Errorf("authorization: %q", s.token)
	}
	if s.hello.GetMesh() != "default" || s.hello.GetName() != "web-1" || s.hello.GetEnvoyVersion() != "1.40.0" || s.hello.GetVersion() != "0.0.0-test" {
		t.Errorf("hello: %v", s.hello)
	}
	var doc struct {
		Networking struct{ Inbound []struct{ Port int } }
	}
	if err := json.Unmarshal([]byte(s.hello.GetDataplane()), &doc); err != nil || len(doc.Networking.Inbound) != 1 || doc.Networking.Inbound[0].Port != 18080 {
		t.Errorf("dataplane in hello: %s (%v)", s.hello.GetDataplane(), err)
	}
	p.mu.Lock()
	req := p.request
	p.mu.Unlock()
	if req.Instance == "" || req.Instance != s.hello.GetInstance() {
		t.Errorf("instance %q in the bootstrap request, %q in hello", req.Instance, s.hello.GetInstance())
	}
	if req.Mesh != "default" || req.Name != "web-1" || req.DataplaneToken != aToken || req.DataplaneResource != s.hello.GetDataplane() || req.CACert != string(p.pem) ||
		req.Version.Envoy.Build != "abc/1.40.0/Clean/RELEASE/BoringSSL" || !req.Version.Envoy.Compatible || req.ReadinessPort != r.cfg.ReadinessPort || req.DNSPort != 15054 {
		t.Errorf("bootstrap request: %+v", req)
	}
	if b, err := os.ReadFile(req.DataplaneTokenPath); err != nil || string(b) != aToken {
		t.Errorf("token file %q: %q, %v", req.DataplaneTokenPath, b, err)
	}
	if want := []string{"feature-tcp-accesslog-via-named-pipe", "feature-link", "feature-trust-file", "feature-strict-inbound-ports", "feature-reuse-port"}; !cmp.Equal(req.Features, want) {
		t.Errorf("features: %s", cmp.Diff(want, req.Features))
	}
	for last := (*linkpb.Readiness)(nil); !last.GetReady(); {
		select {
		case last = <-readiness:
		case <-time.After(patience):
			t.Fatal("readiness was not told")
		}
	}
	began := time.Now()
	r.signals <- syscall.SIGTERM
	if draining := <-told; draining && !r.logs("draining anyway") {
		t.Error("draining began before leaving was announced")
	}
	if err := r.end(); err != nil {
		t.Errorf("ended with %v", err)
	}
	if d := time.Since(began); d < r.cfg.DrainTime {
		t.Errorf("the end took %s with a drain time of %s", d, r.cfg.DrainTime)
	}
	if !r.logs("healthcheck failed") {
		t.Error("Envoy was not told to fail its health check")
	}
	if left, _ := os.ReadDir(r.cfg.TempDir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if r.logs(aToken) {
		t.Error("the token is in the log")
	}
}

// While connections are waited for, nobody should be sent here; a second request
// to stop ends the wait.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p := &plane{serve: answerAll(nil)}
	p.start(t)
	r := launch(t, p, func(c *Config) { c.DrainTime = time.Hour })
	r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
	r.signals <- syscall.SIGTERM
	r.until("draining", func() bool { return r.logs("waiting for connections") })
	if code, body, by := r.ready(); code != 503 || body != "TERMINATING" || by != "kuma-dp" {
		t.Errorf("while it drains: %d %q by %q", code, body, by)
	}
	r.signals <- os.Interrupt
	if err := r.end(); err != nil {
		t.Errorf("ended with %v", err)
	}
}

// An answer that can't come any more is not waited for.
func TestLinkEndsWhileLeaving(t *testing.T) {
	t.Parallel()
	p := &plane{serve: answerAll(func(_ *stream, m *linkpb.FromProxy) error {
		if m.GetLeaving() != nil {
			return errors.New("the control plane ends as well")
		}
		return nil
	})}
	p.start(t)
	r := launch(t, p, nil)
	r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
	r.signals <- syscall.SIGTERM
	if err := r.end(); err != nil {
		t.Errorf("ended with %v", err)
	}
	if !r.logs("the link ended before the control plane had answered that this proxy leaves") {
		t.Error("it was waited for")
	}
}

// Without the link's feature, or with a control plane that does not know it,
// kuma-dp runs in the contract's way.
func TestContractsWay(t *testing.T) {
	t.Parallel()
	for name, link := range map[string]bool{"unknown to the control plane": true, "turned off": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := &plane{} // answers Unimplemented
			p.start(t)
			r := launch(t, p, func(c *Config) { c.Link = link })
			r.until("ready", func() bool { code, body, _ := r.ready(); return code == 200 && body == "LIVE\n" })
			p.mu.Lock()
			defer p.mu.Unlock()
			if has := strings.Contains(fmt.Sprint(p.request.Features), "feature-link"); has != link {
				t.Errorf("features: %v", p.request.Features)
			}
		})
	}
}

// Until the first complete configuration, ready says what is missing; later
// refusals leave it alone.
func TestReadyMeansAble(t *testing.T) {
	t.Parallel()
	next := make(chan func(*stream) error)
	p := &plane{serve: func(s *stream) error {
		if err := s.welcome(); err != nil {
			return err
		}
		for {
			select {
			case f := <-next:
				if err := f(s); err != nil {
					return err
				}
			case <-s.Context().Done():
				return nil
			}
		}
	}}
	p.start(t)
	r := launch(t, p, nil)
	bad := &linkpb.ConfigStatus_Rejection{TypeUrl: "type.googleapis.com/envoy.config.listener.v3.Listener", Resource: "inbound:127.0.0.1:18080", Message: "cannot bind '127.0.0.1:18080': Address already in use"}
	r.until("incomplete", func() bool {
		code, body, by := r.ready()
		return code == 503 && body == "envoy has not received its complete configuration yet" && by == "kuma-dp"
	})
	next <- func(s *stream) error { return s.status(false, bad) }
	r.until("the reason", func() bool {
		code, body, _ := r.ready()
		return code == 503 && strings.Contains(body, "Listener inbound:127.0.0.1:18080: cannot bind '127.0.0.1:18080': Address already in use")
	})
	next <- func(s *stream) error { return s.status(true) }
	r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
	next <- func(s *stream) error { return s.status(false, bad) }
	r.until("the refusal in the log", func() bool {
		return r.logs("envoy refused a part of its first configuration") && r.logs("envoy refused a part of its configuration; the last good one serves")
	})
	if code, body, _ := r.ready(); code != 200 {
		t.Errorf("a later refusal: %d %s", code, body)
	}
	const noPair = "metrics are not served on port 5670: a certificate is missing"
	leftOut := func(list ...string) {
		next <- func(s *stream) error {
			return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_ConfigStatus{ConfigStatus: &linkpb.ConfigStatus{Complete: true, LeftOut: list}}})
		}
	}
	leftOut(noPair)
	leftOut(noPair, "another thing")
	leftOut()
	r.until("what is left out", func() bool { return r.logs("nothing is left out of this proxy's configuration any more") })
	for _, what := range []string{noPair, "another thing"} {
		if n := strings.Count(r.log.String(), what); n != 1 {
			t.Errorf("%q is logged %d times", what, n)
		}
	}
}

// What Envoy ends with, kuma-dp ends with, after it has told the control plane
// that nobody should be sent here any more.
func TestEnvoyEnds(t *testing.T) {
	t.Parallel()
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		left := make(chan struct{}, 1)
		p := &plane{serve: answerAll(func(_ *stream, m *linkpb.FromProxy) error {
			if m.GetLeaving() != nil {
				left <- struct{}{}
			}
			return nil
		})}
		p.start(t)
		r := launch(t, p, nil)
		r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
		if err := syscall.Kill(<-r.pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := r.end(); err == nil || err.Error() != "signal: killed" {
			t.Errorf("ended with %v", err)
		}
		select {
		case <-left:
		case <-time.After(patience):
			t.Error("leaving was not announced")
		}
	})
	t.Run("terminated", func(t *testing.T) {
		t.Parallel()
		p := &plane{serve: answerAll(nil)}
		p.start(t)
		r := launch(t, p, nil)
		r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
		if err := syscall.Kill(<-r.pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := r.end(); err != nil {
			t.Errorf("ended with %v", err)
		}
	})
	t.Run("can't start", func(t *testing.T) {
		t.Parallel()
		p := &plane{serve: answerAll(nil)}
		p.config = func(r bootstrapRequest) string {
			return pretendConfig(r, `pretend: {exit: 1, say: "[2026-11-21 15:11:41.280][1][critical][main] [source/server/server.cc:463] error initializing configuration: no such field"}`)
		}
		p.start(t)
		r := launch(t, p, nil)
		if err := r.end(); err == nil || err.Error() != "envoy ended with exit status 1: error initializing configuration: no such field" {
			t.Errorf("ended with %v", err)
		}
	})
}

// What can't get better by waiting ends kuma-dp with the reason and the mend,
// before Envoy is started.
func TestFailuresAtStart(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = busy.Close() })
	busyPort := uint32(busy.Addr().(*net.TCPAddr).Port)
	api := &plane{answer: func(w http.ResponseWriter, _ *http.Request, _ bootstrapRequest) {
		http.Error(w, "404: Page Not Found", http.StatusNotFound)
	}}
	invalid := &plane{answer: func(w http.ResponseWriter, _ *http.Request, _ bootstrapRequest) {
		http.Error(w, `mesh: mesh "nomesh" does not exist`, http.StatusUnprocessableEntity)
	}}
	refused := &plane{serve: func(s *stream) error {
		return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Refusal{Refusal: &linkpb.Refusal{Reason: "the token is for proxy \"other\""}}})
	}}
	fine := &plane{serve: answerAll(nil)}
	for _, p := range []*plane{api, invalid, refused, fine} {
		p.start(t)
	}
	other := newAuthority(t)
	file := filepath.Join(t.TempDir(), "missing")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const tokenText = "dataplane token is invalid, in Kubernetes you must mount a serviceAccount token, in universal you must start your proxy with a generated token.: "
	for _, c := range []struct {
		name   string
		plane  *plane
		change func(*Config)
		want   []string
	}{
		{"another authority", fine, func(c *Config) { c.ControlPlane.CACert = string(other.pem) }, []string{"Failed to fetch Envoy bootstrap config. ", "tls: failed to verify certificate", "--ca-cert-file", `asked for as "127.0.0.1" and verified by the authority given as text`, `issued by "CN=test authority"`}},
		{"no authority", fine, func(c *Config) { c.ControlPlane.CACert = "" }, []string{"x509: certificate signed by unknown authority", "--ca-cert-file"}},
		{"name not in certificate", fine, func(c *Config) {
			c.ControlPlane.URL = strings.Replace(c.ControlPlane.URL, "127.0.0.1", "localhost", 1)
		}, []string{"x509: certificate is not valid for any names, but wanted to match localhost", "by a name that its certificate has"}},
		{"CA file missing", fine, func(c *Config) { c.ControlPlane.CACert, c.ControlPlane.CACertFile = "", file }, []string{"could not read certificate file " + file + ": open " + file + ": no such file or directory"}},
		{"CA file is none", fine, func(c *Config) { c.ControlPlane.CACert = "nonsense" }, []string{"KUMA_CONTROL_PLANE_CA_CERT: it is not PEM"}},
		{"plain address", fine, func(c *Config) { c.ControlPlane.URL = "http://192.0.2.1:5678" }, []string{"--cp-address", "must start with https://"}},
		{"API port", api, nil, []string{"There is no /bootstrap endpoint for provided CP address"}},
		{"mesh unknown", invalid, nil, []string{`Failed to fetch Envoy bootstrap config. Invalid request: mesh: mesh "nomesh" does not exist`}},
		{"refused by the link", refused, nil, []string{`the control plane refuses this proxy: the token is for proxy "other"`}},
		{"readiness port in use", fine, func(c *Config) { c.ReadinessPort = busyPort }, []string{fmt.Sprintf("listen tcp 127.0.0.1:%d: bind: address already in use", busyPort), "KUMA_READINESS_PORT"}},
		{"token file missing", fine, func(c *Config) { c.Token, c.TokenPath = "", file }, []string{tokenText + "could not read file " + file}},
		{"token file empty", fine, func(c *Config) { c.Token, c.TokenPath = "", empty }, []string{tokenText + "token under file " + empty + " is empty"}},
		{"token garbled", fine, func(c *Config) { c.Token = "garbled" }, []string{tokenText + "not valid JWT token. Can't parse it."}},
		{"no Envoy", fine, func(c *Config) { c.BinaryPath, c.Path = "no-such-envoy", "/nowhere" }, []string{"could not find executable binary in any of the following paths: [/nowhere/no-such-envoy", "--binary-path"}},
		{"not Envoy", fine, func(c *Config) { c.BinaryPath = "/bin/echo" }, []string{"is it Envoy?"}},
		{"bad port", fine, func(c *Config) { c.Vars = map[string]string{"port": "70000"} }, []string{"networking.inbound[0].port: port must be in the range [1, 65535]"}},
		{"same port", fine, func(c *Config) {
			c.Vars = map[string]string{"port": "8080"}
			c.Resource = strings.Replace(webDataplane, "servicePort", "serviceAddress: 127.0.0.1\n    servicePort", 1)
		}, []string{"serviceAddress and servicePort has to differ from address and port"}},
		{"wrong kind", fine, func(c *Config) { c.Resource = "type: Mesh\nname: default\n" }, []string{"type: is \"Mesh\"", "Dataplane"}},
		{"bad name", fine, func(c *Config) { c.Resource = strings.Replace(webDataplane, "web-1", "Web_1", 1) }, []string{"name: must not be empty"}},
		{"unknown field", fine, func(c *Config) { c.Resource = strings.Replace(webDataplane, "servicePort", "servicePrt", 1) }, []string{"networking.inbound[0].servicePrt", "servicePort"}},
		{"not YAML", fine, func(c *Config) { c.Resource = "{" }, []string{"read the Dataplane from --dataplane"}},
		{"nothing to run", fine, func(c *Config) { c.Resource = "" }, []string{"--dataplane-file", "--name and --mesh"}},
		{"name and template", fine, func(c *Config) { c.Name = "web" }, []string{"--name and --mesh can't be given together with a Dataplane"}},
		{"work dir not a directory", fine, func(c *Config) { c.WorkDir = empty }, []string{"make working directory " + empty, "--work-dir"}},
		{"work dir too long", fine, func(c *Config) { c.WorkDir = filepath.Join(c.TempDir, strings.Repeat("d", 90)) }, []string{"too long for Unix sockets", "--work-dir"}},
		{"ingress", fine, func(c *Config) { c.ProxyType = "ingress" }, []string{"--proxy-type", "not part of this version"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := launch(t, c.plane, c.change)
			err := r.end()
			if err == nil {
				t.Fatal("it ended without an error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q lacks %q", err, w)
				}
			}
			if r.logs("starting envoy") {
				t.Error("Envoy was started")
			}
			if left, _ := os.ReadDir(r.cfg.TempDir); len(left) != 0 && c.name != "work dir too long" {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// A control plane that is down is waited for, and the log says so once.
func TestControlPlaneDown(t *testing.T) {
	t.Parallel()
	p := &plane{serve: answerAll(nil)}
	var refusals int
	p.answer = func(w http.ResponseWriter, r *http.Request, req bootstrapRequest) {
		p.mu.Lock()
		refusals++
		n := refusals
		p.mu.Unlock()
		if n < 4 {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"bootstrap": []byte(pretendConfig(req, ""))})
	}
	p.start(t)
	r := launch(t, p, func(c *Config) { c.ControlPlane.RetryBackoff = 20 * time.Millisecond })
	r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
	if n := strings.Count(r.log.String(), "could not fetch bootstrap configuration"); n != 1 {
		t.Errorf("%d lines for one change of state", n)
	}

	gone := &plane{url: "https://127.0.0.1:1"}
	r = launch(t, gone, func(c *Config) {
		c.ControlPlane.RetryBackoff, c.ControlPlane.RetryMaxDuration = 10*time.Millisecond, 100*time.Millisecond
	})
	if err := r.end(); err == nil || !strings.Contains(err.Error(), "KUMA_CONTROL_PLANE_RETRY_MAX_DURATION") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("ended with %v", err)
	}
	r = launch(t, gone, nil)
	r.until("the first attempt", func() bool { return r.logs("connection refused") })
	r.signals <- os.Interrupt
	if err := r.end(); err == nil || err.Error() != "Failed to fetch Envoy bootstrap config. context canceled" {
		t.Errorf("ended with %v", err)
	}
}

// The link comes back with the same instance, keeps its certificates, and a
// refusal then ends nothing.
func TestLinkReconnects(t *testing.T) {
	t.Parallel()
	type meeting struct{ instance, token string }
	meetings := make(chan meeting, 16)
	requests := make(chan string, 16)
	back := make(chan struct{})
	p := &plane{}
	p.serve = func(s *stream) error {
		meetings <- meeting{s.hello.GetInstance(), s.token[0]}
		if s.number == 2 {
			return s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Refusal{Refusal: &linkpb.Refusal{Reason: "the token has expired"}}})
		}
		if err := s.welcome(); err != nil {
			return err
		}
		if err := s.want("identity_cert:secret:default", "1"); err != nil {
			return err
		}
		if s.number == 3 {
			close(back)
			<-s.Context().Done()
			return nil
		}
		m, err := s.Recv()
		for ; err == nil && m.GetSigningRequest() == nil; m, err = s.Recv() {
		}
		if err != nil {
			return err
		}
		requests <- m.GetSigningRequest().GetSecret()
		if err := s.sign(m.GetSigningRequest(), "", time.Hour); err != nil {
			return err
		}
		if err := s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Credential{Credential: &linkpb.Credential{Token: "next." + aToken}}}); err != nil {
			return err
		}
		if err := s.status(true); err != nil {
			return err
		}
		for {
			// Readiness says that kuma-dp has read all that was said before.
			m, err := s.Recv()
			if err != nil || m.GetReadiness().GetReady() {
				return err
			}
		}
	}
	p.start(t)
	r := launch(t, p, nil)
	select {
	case <-back:
	case <-time.After(patience):
		t.Fatal("the link did not come back")
	}
	first, second, third := <-meetings, <-meetings, <-meetings
	if first.token != aToken || second.token != "next."+aToken || third.token != "next."+aToken {
		t.Errorf("tokens: %v %v %v", first, second, third)
	}
	if first.instance != second.instance || first.instance != third.instance {
		t.Errorf("instances: %v %v %v", first, second, third)
	}
	if len(requests) != 1 {
		t.Errorf("%d requests for certificates, want 1: the one that it has is good", len(requests))
	}
	if !r.logs("the token has expired") {
		t.Error("the refusal is not in the log")
	}
	if code, body, _ := r.ready(); code != 200 {
		t.Errorf("ready: %d %s", code, body)
	}
}

// Pages of Envoy's admin interface come in chunks.
func TestInspect(t *testing.T) {
	t.Parallel()
	type result struct {
		page   bytes.Buffer
		chunks int
		err    string
	}
	results := make(chan *result, 2)
	p := &plane{serve: answerAll(func(s *stream, m *linkpb.FromProxy) error {
		if !m.GetReadiness().GetReady() {
			return nil
		}
		for _, q := range []*linkpb.Inspect{{Id: 7, Page: linkpb.Inspect_STATS, Json: true}, {Id: 8, Page: linkpb.Inspect_CONFIG_DUMP, All: true}} {
			if err := s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_Inspect{Inspect: q}}); err != nil {
				return err
			}
			var got result
			for {
				m, err := s.Recv()
				if err != nil {
					return err
				}
				a := m.GetInspectReply()
				if a.GetId() != q.GetId() {
					continue
				}
				if len(a.GetChunk()) > 256<<10 {
					t.Errorf("a chunk of %d bytes", len(a.GetChunk()))
				}
				if len(a.GetChunk()) > 0 {
					got.chunks++
					got.page.Write(a.GetChunk())
				}
				if got.err = a.GetError(); a.GetDone() || got.err != "" {
					break
				}
			}
			results <- &got
		}
		return nil
	})}
	p.start(t)
	launch(t, p, nil)
	stats, dump := <-results, <-results
	if text := stats.page.String(); stats.err != "" || !strings.HasPrefix(text, "query: usedonly&format=json\n") || len(text) < 600<<10 || stats.chunks != 3 {
		t.Errorf("stats: %q, %d bytes in %d chunks", stats.err, stats.page.Len(), stats.chunks)
	}
	if dump.err != "ask Envoy for /config_dump?include_eds: status 404" {
		t.Errorf("config dump: %q", dump.err)
	}
}

// HRD-32: refusals that Envoy writes into the pipe reach the log and the control
// plane, limited in number, and can't forge lines.
func TestDenials(t *testing.T) {
	t.Parallel()
	sent := make(chan *linkpb.Denials, 64)
	p := &plane{serve: answerAll(func(_ *stream, m *linkpb.FromProxy) error {
		if m.GetDenials() != nil {
			sent <- m.GetDenials()
		}
		return nil
	})}
	p.start(t)
	collector, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer collector.Close()
	r := launch(t, p, nil)
	r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
	pipes, err := filepath.Glob(filepath.Join(r.cfg.TempDir, "*", "kuma-al-web-1-default.sock"))
	if err != nil || len(pipes) != 1 {
		t.Fatalf("pipes: %v, %v", pipes, err)
	}
	f, err := os.OpenFile(pipes[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const total = 300
	began := time.Now()
	line := `{"kuma":"denied","inbound":"inbound:127.0.0.1:18080","caller":"spiffe://default/intruder","method":"GET","path":"/a\nlevel=ERROR msg=forged","reason":"rbac_access_denied_matched_policy[none]","peer":"127.0.0.1:5","start":"2026-11-21T15:00:00.123Z","authority":"web","protocol":"HTTP/2"}` + "\n"
	for range total {
		if _, err := f.WriteString(line); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range []string{
		"not json\n", "{broken\n", "{}\n", strings.Repeat("x", 100<<10) + "\n",
		fmt.Sprintf(`{"address":%q,"message":"one"}`+"\n", collector.Addr()),
		fmt.Sprintf(`{"address":%q,"message":{"two":2}}`+"\n", collector.Addr()),
		fmt.Sprintf("%s;three\n", collector.Addr()),
	} {
		if _, err := f.WriteString(l); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := collector.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const forwarded = "one\n{\"two\":2}\nthree\n"
	got := make([]byte, len(forwarded))
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(got); {
		m, err := conn.Read(got[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	if string(got) != forwarded {
		t.Errorf("forwarded %q", got)
	}
	count := 0
	for count < total {
		select {
		case d := <-sent:
			count += len(d.GetDenials()) + int(d.GetDropped())
			if len(d.GetDenials()) > denialsSent {
				t.Errorf("%d refusals in one message", len(d.GetDenials()))
			}
			want := &linkpb.Denials_Denial{UnixMs: 1795273200123, Inbound: "inbound:127.0.0.1:18080", Caller: "spiffe://default/intruder", Reason: "rbac_access_denied_matched_policy[none]", Request: "GET web/a\nlevel=ERROR msg=forged HTTP/2"}
			if got := d.GetDenials()[0]; got.String() != want.String() {
				t.Errorf("got %v, want %v", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("%d of %d refusals reached the control plane", count, total)
		}
	}
	r.until("the count of those not shown", func() bool { return r.logs("more requests were denied than are shown") })
	text := r.log.String()
	most := denialsShown + int(denialsShown*time.Since(began).Seconds()) + 1
	if n := strings.Count(text, `msg="request denied"`); n < denialsShown || n > most {
		t.Errorf("%d refusals in the log, want %d to %d", n, denialsShown, most)
	}
	if !strings.Contains(text, `caller=spiffe://default/intruder method=GET`) || strings.Contains(text, "\nlevel=ERROR") {
		t.Errorf("log: %s", text)
	}
}

// Envoy never outlives kuma-dp, and the next start of the same proxy removes
// what a killed one left.
func TestKilled(t *testing.T) {
	t.Parallel()
	t.Run("stand-in", func(t *testing.T) {
		t.Parallel()
		killed(t, os.Args[0], &plane{serve: answerAll(nil)})
	})
	t.Run("Envoy", func(t *testing.T) {
		t.Parallel()
		port := freePort(t)
		killed(t, realEnvoy(t), &plane{serve: answerAll(nil), secret: "identity_cert:secret:default", config: func(r bootstrapRequest) string { return tlsConfig(r, port) }})
	})
}

func killed(t *testing.T, binary string, p *plane) {
	p.start(t)
	temp := shortTemp(t)
	run := func() (*exec.Cmd, string) {
		port := freePort(t)
		ca := filepath.Join(t.TempDir(), "ca.crt")
		if err := os.WriteFile(ca, p.pem, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "run", "--cp-address", p.url, "--ca-cert-file", ca, "--dataplane", webDataplane, "-v", "port=18081",
			"--dataplane-token", aToken, "--binary-path", binary, "--drain-time", "10ms")
		cmd.Env = append(os.Environ(), "TMPDIR="+temp, "XDG_CACHE_HOME="+t.TempDir(), fmt.Sprintf("KUMA_READINESS_PORT=%d", port))
		cmd.Stderr = &journal{}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, fmt.Sprintf("http://127.0.0.1:%d/ready", port)
	}
	ready := func(url string) bool {
		resp, err := http.Get(url)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == 200
	}
	w := &ran{t: t}
	cmd, url := run()
	w.until("ready", func() bool { return ready(url) })
	dirs, _ := filepath.Glob(filepath.Join(temp, "kuma-dp-default.web-1-*"))
	if len(dirs) != 1 {
		t.Fatalf("working directories: %v", dirs)
	}
	alive := func() bool {
		c, err := net.Dial("unix", filepath.Join(dirs[0], "kuma-envoy-admin.sock"))
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	if !alive() {
		t.Fatal("Envoy does not run")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	w.until("the end of Envoy", func() bool { return !alive() })
	cmd, url = run()
	w.until("ready again", func() bool { return ready(url) })
	now, _ := filepath.Glob(filepath.Join(temp, "kuma-dp-default.web-1-*"))
	if len(now) != 1 || now[0] == dirs[0] {
		t.Errorf("working directories: %v, before: %v", now, dirs)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v: %s", err, cmd.Stderr)
	}
	if left, _ := os.ReadDir(temp); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A working directory has one owner, and what a killed one left in it is
// removed, and nothing else.
func TestNamedWorkDir(t *testing.T) {
	t.Parallel()
	p := &plane{serve: answerAll(nil)}
	p.start(t)
	dir := shortTemp(t)
	own := filepath.Join(dir, "keep-me")
	stale := filepath.Join(dir, "kuma-envoy-admin.sock")
	for _, f := range []string{own, stale} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := launch(t, p, func(c *Config) { c.WorkDir = dir })
	r.until("ready", func() bool { code, _, _ := r.ready(); return code == 200 })
	second := launch(t, p, func(c *Config) { c.WorkDir = dir })
	if err := second.end(); err == nil || !strings.Contains(err.Error(), "in use by another kuma-dp") {
		t.Errorf("a second owner: %v", err)
	}
	if code, _, _ := r.ready(); code != 200 {
		t.Error("the second one disturbed the first")
	}
	r.signals <- os.Interrupt
	if err := r.end(); err != nil {
		t.Error(err)
	}
	entries, _ := os.ReadDir(dir)
	if len(entries) != 1 || entries[0].Name() != "keep-me" {
		t.Errorf("left in the directory: %v", entries)
	}
}
