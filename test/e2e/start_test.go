//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"kuma/test/lab"
)

// TestRefusals starts proxies that can't work: each ends with an exit code and
// says why, and what to do.
func TestRefusals(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	other := lab.New(filepath.Join(r.Dir, "other"), r.Bin, r.Envoy)
	r.must(os.Mkdir(other.Dir, 0o700))
	t.Cleanup(other.Close)
	stranger, err := other.ControlPlane(r.ctx)
	r.must(err)
	token := func(cp *lab.ControlPlane, args ...string) string {
		out, err := cp.Kumactl("", append([]string{"generate", "dataplane-token", "--valid-for"}, args...)...)
		r.must(err)
		return out
	}
	r.apply(cp, "type: Mesh\nname: other\n")
	expired := token(cp, "1s", "--name", "p")
	made := time.Now()
	taken := r.listen()
	t.Cleanup(func() { _ = taken.Close() })
	broken, err := r.File("broken-envoy", "#!/bin/sh\n[ \"$1\" = --version ] && echo 'envoy  version: abc/1.40.0/Clean/RELEASE/BoringSSL' && exit\necho 'it can not start here' >&2\nexit 3\n")
	r.must(err)
	r.must(os.Chmod(broken, 0o700))

	for _, c := range []struct {
		name string
		o    lab.ProxyOptions
		dp   string
		want []string
	}{
		{"token of another name", lab.ProxyOptions{Token: token(cp, "1h", "--name", "q")}, "", []string{"proxy name from requestor: p is different than in token: q"}},
		{"token of another mesh", lab.ProxyOptions{Token: token(cp, "1h", "--name", "p", "--mesh", "other")}, "", []string{"authentication failed"}},
		{"token for another service", lab.ProxyOptions{Token: token(cp, "1h", "--name", "p", "--tag", "kuma.io/service=elsewhere")}, "", []string{"kuma.io/service", "elsewhere"}},
		{"token of another control plane", lab.ProxyOptions{Token: token(stranger, "1h", "--name", "p")}, "", []string{"authentication failed", "token"}},
		{"expired token", lab.ProxyOptions{Token: expired}, "", []string{"authentication failed", "expired"}},
		{"garbled token", lab.ProxyOptions{Token: "rubbish"}, "", []string{"not valid JWT token. Can't parse it.", "token contains an invalid number of segments"}},
		{"empty token", lab.ProxyOptions{Token: "\n"}, "", []string{"token"}},
		{"missing token", lab.ProxyOptions{Args: []string{"--dataplane-token-file", filepath.Join(r.Dir, "none")}}, "", []string{"dataplane token is invalid", "could not read file", "none"}},
		{"unknown mesh", lab.ProxyOptions{}, "mesh: nomesh", []string{"authentication failed", `in mesh "nomesh" is not found`}},
		{"another control plane's CA", lab.ProxyOptions{Args: []string{"--ca-cert-file", stranger.CA}}, "", []string{"failed to verify certificate", "--ca-cert-file"}},
		{"no CA", lab.ProxyOptions{Args: []string{"--ca-cert-file", ""}}, "", []string{"failed to verify certificate", "--ca-cert-file"}},
		{"missing CA file", lab.ProxyOptions{Args: []string{"--ca-cert-file", "/nonexistent/ca.crt"}}, "", []string{"could not read certificate file /nonexistent/ca.crt"}},
		{"no Envoy", lab.ProxyOptions{Envoy: "/nonexistent/envoy"}, "", []string{"could not find executable binary", "/nonexistent/envoy", "--binary-path"}},
		{"another program as Envoy", lab.ProxyOptions{Envoy: "/bin/echo"}, "", []string{"is it Envoy?"}},
		{"an Envoy that can't start", lab.ProxyOptions{Envoy: broken}, "", []string{"exit status 3", "it can not start here"}},
		{"readiness port in use", lab.ProxyOptions{Env: []string{fmt.Sprint("KUMA_READINESS_PORT=", port(taken))}}, "", []string{fmt.Sprintf("127.0.0.1:%d: bind: address already in use", port(taken)), "KUMA_READINESS_PORT"}},
		{"the API's port", lab.ProxyOptions{Args: []string{"--cp-address", strings.Replace(cp.URLS(), "127.0.0.1", "localhost", 1)}}, "", []string{"There is no /bootstrap endpoint for provided CP address", "5678"}},
		{"no TLS", lab.ProxyOptions{Args: []string{"--cp-address", strings.Replace(cp.Address(), "https", "http", 1)}}, "", []string{"https://"}},
		{"a bad Dataplane", lab.ProxyOptions{}, "port: 0", []string{"networking.inbound[0].port", "[1, 65535]"}},
	} {
		yaml := dataplane("p", []in{{service: "p", protocol: "http", port: 12345, local: 12346}})
		if k, _, ok := strings.Cut(c.dp, ":"); ok {
			i := strings.Index(yaml, k+":")
			line, _, _ := strings.Cut(yaml[i:], "\n")
			yaml = strings.Replace(yaml, line, c.dp, 1)
		}
		if strings.HasPrefix(c.name, "expired") {
			r.await("the token has expired", func() error {
				if d := time.Since(made); d < 2*time.Second {
					return fmt.Errorf("it is %s old", d)
				}
				return nil
			})
		}
		c.o.As = strings.ReplaceAll(strings.ReplaceAll(c.name, " ", "-"), "'", "")
		c.o.Env = append(c.o.Env, "TMPDIR="+r.temp())
		p := r.join(cp, "p", yaml, c.o)
		select {
		case <-p.Done():
		case <-time.After(patience):
			t.Errorf("%s: it goes on:\n%s", c.name, p.Log())
			p.Kill()
			continue
		}
		log := strings.TrimSpace(p.Log())
		last := log[strings.LastIndexByte(log, '\n')+1:]
		t.Logf("%s: exit code %d: %s", c.name, p.ExitCode(), last)
		if p.ExitCode() != 1 {
			t.Errorf("%s: exit code %d", c.name, p.ExitCode())
		}
		for _, w := range append(c.want, "Error: ") {
			if !strings.Contains(last, w) {
				t.Errorf("%s: %q is not in what it says last: %s", c.name, w, last)
			}
		}
		if strings.Contains(log, "eyJ") {
			t.Errorf("%s: a token is in the log", c.name)
		}
	}
	if dirs, _ := filepath.Glob(filepath.Join(r.temp(), "*")); len(dirs) > 0 {
		t.Errorf("left behind: %v", dirs)
	}
	if code, body, err := lab.Get(cp.URL() + "/meshes/default/dataplanes"); err != nil || code != http.StatusOK || !strings.Contains(body, `"total": 0`) && !strings.Contains(body, `"total":0`) {
		t.Errorf("no Dataplane may be left: %d %s %v", code, body, err)
	}
}

// TestControlPlaneDown: kuma-dp waits for a control plane that is away, with one
// log line for each change of state, and stops when it is asked to.
func TestControlPlaneDown(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	cp.Kill()
	token := "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.e30.c2ln"
	env := []string{"KUMA_CONTROL_PLANE_RETRY_BACKOFF=250ms"}
	p := r.join(cp, "waits", r.caller("waits"), lab.ProxyOptions{Token: token, Env: env})
	const waiting = "could not fetch bootstrap configuration, trying again"
	r.logged(p.Process, waiting, "connection refused")

	// Attempts are counted where they arrive: on the control plane's port.
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", cp.DP))
	r.must(err)
	for range 4 {
		c, err := l.Accept()
		r.must(err)
		_, _ = c.Read(make([]byte, 16<<10)) // or the kernel resets it at times
		_ = c.Close()
	}
	_ = l.Close()
	r.await("it is refused again", func() error {
		if lines := loggedLines(p.Process, waiting); len(lines) < 3 || !strings.Contains(lines[len(lines)-1], "connection refused") {
			return fmt.Errorf("%d lines", len(lines))
		}
		return nil
	})
	if lines := loggedLines(p.Process, waiting); len(lines) > 4 {
		t.Errorf("%d lines for three changes of state:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	if code, body, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", p.Readiness)); err != nil || code != http.StatusServiceUnavailable {
		t.Errorf("/ready: %d %q %v", code, body, err)
	}
	r.must(p.Signal(syscall.SIGINT))
	if code := p.ExitCode(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	r.logged(p.Process, "Error: Failed to fetch Envoy bootstrap config. context canceled")
}

// TestReadyMeansAble: an inbound that can't be bound keeps a proxy from being
// ready, and its reason is in the answer, the insight and the log.
func TestReadyMeansAble(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	taken := r.listen()
	site := r.site("backend")
	p := r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: port(taken), local: site.port}}))
	url := fmt.Sprintf("http://127.0.0.1:%d/ready", p.Readiness)
	reason := fmt.Sprintf("cannot bind '127.0.0.1:%d': Address already in use", port(taken))
	r.await("the reason is in /ready", func() error {
		code, body, err := lab.Get(url)
		if err != nil || code != http.StatusServiceUnavailable || !strings.Contains(body, reason) {
			return fmt.Errorf("%d %q %v", code, body, err)
		}
		return nil
	})
	r.logged(p.Process, "envoy refused a part of its", reason)
	r.await("the reason is in the insight", func() error {
		_, body, err := lab.Get(cp.URL() + "/meshes/default/dataplanes+insights/backend")
		if err != nil || !strings.Contains(body, reason) || !strings.Contains(body, `"rejections"`) {
			return fmt.Errorf("%s %v", body, err)
		}
		return nil
	})
	r.must(taken.Close())
	r.ready(p)

	// A later refusal keeps it ready: the last good configuration serves.
	taken = r.listen()
	t.Cleanup(func() { _ = taken.Close() })
	to := out{port: r.port(), service: "backend"}
	r.ready(r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)
	made := dataplane("made", []in{{service: "made", protocol: "http", port: r.port(), local: site.port}})
	r.apply(cp, made)
	q := r.join(cp, "made", "")
	r.ready(q)
	r.apply(cp, strings.Replace(made, "  inbound:\n", fmt.Sprintf("  inbound:\n  - port: %d\n    servicePort: %d\n    serviceAddress: 127.0.0.1\n    tags: {kuma.io/service: more}\n", port(taken), site.port), 1))
	reason = fmt.Sprintf("cannot bind '127.0.0.1:%d': Address already in use", port(taken))
	r.logged(q.Process, "envoy refused a part of its", reason)
	if code, body, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/ready", q.Readiness)); err != nil || code != http.StatusOK {
		t.Errorf("a later refusal: /ready %d %q %v", code, body, err)
	}
	r.await("the later refusal is in the insight", func() error {
		_, body, err := lab.Get(cp.URL() + "/meshes/default/dataplanes+insights/made")
		if err != nil || !strings.Contains(body, reason) {
			return fmt.Errorf("%s %v", body, err)
		}
		return nil
	})
	_, metrics, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", cp.Diagnostics))
	r.must(err)
	if refused := regexp.MustCompile(`(?m)^xds_requests_received\{confirmation="NACK",.*zone="default"\} [1-9]`); !refused.MatchString(metrics) {
		t.Errorf("no metric counts the refusals:\n%s", metrics)
	}
}

// TestServiceWithoutEndpoints: an http service whose last proxy has gone still
// answers http.
func TestServiceWithoutEndpoints(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	to := out{port: r.port(), service: "backend"}
	backend := r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: r.site("backend").port}}))
	r.ready(backend, r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)
	backend.Stop(10 * time.Second)
	a, err := r.get(to.port, "/")
	if err != nil || a.status != http.StatusServiceUnavailable || a.body != "no healthy upstream" {
		t.Errorf("%d %q %v", a.status, a.body, err)
	}
}

// TestSecondControlPlaneOnOneStore: the second one says whose file it is and
// ends, and the first goes on.
func TestSecondControlPlaneOnOneStore(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	ports, err := r.Ports(5)
	r.must(err)
	p, err := r.Start("second", []string{
		"KUMA_GENERAL_WORK_DIR=" + cp.WorkDir,
		fmt.Sprint("KUMA_API_SERVER_HTTP_PORT=", ports[0]), fmt.Sprint("KUMA_API_SERVER_HTTPS_PORT=", ports[1]),
		fmt.Sprint("KUMA_DP_SERVER_PORT=", ports[2]), fmt.Sprint("KUMA_DIAGNOSTICS_SERVER_PORT=", ports[3]),
		fmt.Sprint("KUMA_MONITORING_ASSIGNMENT_SERVER_PORT=", ports[4]),
	}, filepath.Join(r.Bin, "kuma-cp"), "run")
	r.must(err)
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatal("a second control plane runs on the same file")
	}
	if p.ExitCode() == 0 || !strings.Contains(p.Log(), "kuma.db") {
		t.Errorf("exit code %d: %s", p.ExitCode(), p.Log())
	}
	t.Log(strings.TrimSpace(p.Log()))
	r.must(cp.Apply(permitAll))
}

// TestDamagedStore: a store file that is damaged is named, and left as it is.
func TestDamagedStore(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	cp.Kill()
	file := filepath.Join(cp.WorkDir, "kuma.db")
	info, err := os.Stat(file)
	r.must(err)
	damaged := bytes.Repeat([]byte("rubbish "), int(info.Size())/8)
	r.must(os.WriteFile(file, damaged, 0o600))
	if err := cp.Start(r.ctx); err == nil {
		t.Fatal("it serves")
	}
	log := strings.TrimSpace(cp.Log())
	last := log[strings.LastIndexByte(log, '\n')+1:]
	if cp.ExitCode() != 1 || !strings.HasPrefix(last, "Error: ") || !strings.Contains(last, file) {
		t.Errorf("exit code %d: %s", cp.ExitCode(), last)
	}
	t.Log(last)
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, damaged) {
		t.Errorf("the file was changed: %v", err)
	}
}
