//go:build e2e

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"kuma/test/lab"
)

// TestWhoMayCall puts one permission after the other in force, each after one
// that gives the opposite.
func TestWhoMayCall(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	site := r.site("backend")
	backend := r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: site.port}}))
	web, pair := out{port: r.port(), service: "backend"}, out{port: r.port(), service: "backend"}
	// Its certificate has a kuma:// name for each tag beside the SPIFFE id.
	webProxy := r.join(cp, "web", strings.Replace(r.caller("web", web), "tags: {", "tags: {version: v1, team: shop, ", 1))
	// One proxy of two services has two SPIFFE ids.
	pairProxy := r.join(cp, "pair", dataplane("pair", []in{
		{service: "web", protocol: "http", port: r.port(), local: r.port()},
		{service: "batch", protocol: "http", port: r.port(), local: r.port()},
	}, pair))
	r.ready(backend, webProxy, pairProxy)

	denied := r.answers(web.port, http.StatusForbidden)
	if h := denied.header; denied.body != "RBAC: access denied" || h.Get("Content-Type") != "text/plain" || h.Get("Server") != "envoy" || h.Get("X-Envoy-Upstream-Service-Time") == "" {
		t.Errorf("nobody is permitted, and the answer is %q %v", denied.body, h)
	}
	rules := func(yaml string) string {
		return "type: MeshTrafficPermission\nmesh: default\nname: p\nspec:\n  targetRef: {kind: Dataplane, labels: {app: backend}}\n" + yaml
	}
	old := func(sources string) string {
		return "type: TrafficPermission\nmesh: default\nname: p\nsources:\n" + sources + "destinations:\n- match: {kuma.io/service: backend}\n"
	}
	for _, c := range []struct {
		name, yaml string
		web, pair  int
	}{
		{"exact", rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Exact, value: spiffe://default/web}\n"), 200, 403},
		{"exact, another", rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Exact, value: spiffe://default/we}\n"), 403, 403},
		{"prefix", rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Prefix, value: spiffe://default}\n"), 200, 200},
		{"prefix ends on a segment", rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Prefix, value: spiffe://default/we}\n"), 403, 403},
		{"prefix that is the whole id", rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Prefix, value: spiffe://default/web}\n"), 200, 403},
		{"a denial wins", rules("  rules:\n  - default:\n      deny:\n      - spiffeID: {type: Exact, value: spiffe://default/web}\n      allow:\n      - spiffeID: {type: Prefix, value: spiffe://default}\n"), 403, 403},
		{"several exact", rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Exact, value: spiffe://default/other}\n      - spiffeID: {type: Exact, value: spiffe://default/web}\n"), 200, 403},
		{"from: everyone", rules("  from:\n  - targetRef: {kind: Mesh}\n    default: {action: Allow}\n"), 200, 200},
		{"from: all but a subset", rules("  from:\n  - targetRef: {kind: Mesh}\n    default: {action: Allow}\n  - targetRef: {kind: MeshSubset, tags: {version: v1}}\n    default: {action: Deny}\n"), 403, 200},
		{"from: a service", rules("  from:\n  - targetRef: {kind: MeshService, name: batch}\n    default: {action: Allow}\n"), 403, 200},
		{"older: a service", old("- match: {kuma.io/service: web}\n"), 200, 200},
		{"older: a tag", old("- match: {kuma.io/service: '*', team: shop}\n"), 200, 403},
		{"older: another", old("- match: {kuma.io/service: batch}\n"), 403, 200},
	} {
		// The opposite first, so that what is seen is this permission's doing.
		t.Log(c.name)
		for _, who := range []struct{ port, status int }{{web.port, c.web}, {pair.port, c.pair}} {
			_, _ = cp.Kumactl("", "delete", "meshtrafficpermission", "p")
			_, _ = cp.Kumactl("", "delete", "trafficpermission", "p")
			if who.status == http.StatusForbidden {
				r.apply(cp, rules("  rules:\n  - default:\n      allow:\n      - spiffeID: {type: Prefix, value: spiffe://default}\n"))
				r.answers(who.port, http.StatusOK)
				if strings.HasPrefix(c.yaml, "type: TrafficPermission") {
					_, err := cp.Kumactl("", "delete", "meshtrafficpermission", "p")
					r.must(err)
				}
			} else {
				r.answers(who.port, http.StatusForbidden)
			}
			r.apply(cp, c.yaml)
			r.answers(who.port, who.status)
		}
	}

	// The log of refusals says who was refused, and by which rule.
	r.apply(cp, rules("  rules:\n  - default:\n      deny:\n      - spiffeID: {type: Exact, value: spiffe://default/web}\n"))
	// Of many within a second, as there were until here, some are only counted.
	r.await("the log names the rule", func() error {
		if _, _, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/", web.port)); err != nil {
			return err
		}
		time.Sleep(200 * time.Millisecond) // as often as a person asks again
		if len(loggedLines(backend.Process, "request denied", "caller=spiffe://default/web", "kri_mtp_default_default__p_")) == 0 {
			return errors.New("no such line")
		}
		return nil
	})
}

// TestRefusalsAreNotMultiplied: one denied request reaches the other side once.
func TestRefusalsAreNotMultiplied(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	site := r.site("backend")
	to := out{port: r.port(), service: "backend"}
	r.ready(
		r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: r.port(), local: site.port}})),
		r.join(cp, "web", r.caller("web", to)),
	)
	r.answers(to.port, http.StatusForbidden)
	// Older Envoys (1.36) count under the name of the filter, not of the listener.
	denied := func() int { return r.stat(cp, "backend", `\S+\.rbac\.denied`) }
	before := denied()
	_, err := r.get(to.port, "/")
	r.must(err)
	if n := denied() - before; n != 1 {
		t.Errorf("one denied request was denied %d times", n)
	}
	// Nor is an answer that the workload gives.
	r.apply(cp, permitAll)
	r.answers(to.port, http.StatusOK)
	site.broken.Store(true)
	seen := site.requests.Load()
	if a, err := r.get(to.port, "/"); err != nil || a.status != http.StatusServiceUnavailable {
		t.Errorf("%v %v", a.status, err)
	}
	if n := site.requests.Load() - seen; n != 1 {
		t.Errorf("one request that the workload answered with 503 reached it %d times", n)
	}
}

// stat reads a counter or gauge of a proxy's Envoy; the name is a regular
// expression. One that was never used is 0.
func (r *room) stat(cp *lab.ControlPlane, proxy, name string) int {
	r.Helper()
	text, err := cp.Kumactl("", "inspect", "dataplane", proxy, "--type", "stats")
	r.must(err)
	m := regexp.MustCompile(`(?m)^` + name + `: ([0-9]+)$`).FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	n, err := strconv.Atoi(m[1])
	r.must(err)
	return n
}

// TestNextRequest changes a permission and sees it in force from the next
// request on, over connections that stay open from end to end.
func TestNextRequest(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	site := r.site("backend")
	for _, protocol := range []string{"http", "http2"} {
		to := out{port: r.port(), service: "backend-" + protocol}
		inbound := r.port()
		r.ready(
			r.join(cp, "backend-"+protocol, dataplane("backend-"+protocol, []in{{service: "backend-" + protocol, protocol: protocol, port: inbound, local: site.port}})),
			r.join(cp, "web-"+protocol, r.caller("web-"+protocol, to)),
		)
		c := client(protocol == "http2")
		defer c.CloseIdleConnections()
		local := map[string]bool{}
		traced := *r
		traced.ctx = httptrace.WithClientTrace(r.ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { local[i.Conn.LocalAddr().String()] = true }})
		until := func(status int) {
			t.Helper()
			began := time.Now()
			r.await(fmt.Sprintf("the answer is %d", status), func() error {
				a, err := traced.fetch(c, to.port, "/")
				if err == nil && a.status != status {
					err = fmt.Errorf("%d %s", a.status, a.body)
				}
				return err
			})
			t.Logf("%s: %d after %s", protocol, status, time.Since(began).Round(time.Millisecond))
		}
		until(http.StatusForbidden)
		r.apply(cp, permit("backend-"+protocol, "Exact, value: spiffe://default/web-"+protocol))
		until(http.StatusOK)
		connections := fmt.Sprintf(`listener\.127\.0\.0\.1_%d\.downstream_cx_total`, inbound)
		open := r.stat(cp, "backend-"+protocol, connections)

		// A request under way when the permission goes is still answered.
		late := make(chan error, 1)
		arrived := site.requests.Load()
		go func() {
			a, err := r.fetch(client(false), to.port, "/slow?for=1s")
			if err == nil && a.status != http.StatusOK {
				err = fmt.Errorf("%d %s", a.status, a.body)
			}
			late <- err
		}()
		r.await("the slow request has arrived", func() error {
			if site.requests.Load() == arrived {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		_, err := cp.Kumactl("", "delete", "meshtrafficpermission", "backend-"+protocol)
		r.must(err)
		until(http.StatusForbidden)
		if err := <-late; err != nil {
			t.Errorf("%s: a request under way when its permission went: %v", protocol, err)
		}
		r.apply(cp, permit("backend-"+protocol, "Exact, value: spiffe://default/web-"+protocol))
		until(http.StatusOK)

		if len(local) != 1 {
			t.Errorf("%s: the caller needed %d connections: %v", protocol, len(local), local)
		}
		// The slow request may need one of its own between the proxies.
		want := open
		if protocol == "http" {
			want++
		}
		if now := r.stat(cp, "backend-"+protocol, connections); now > want {
			t.Errorf("%s: the inbound had %d connections before the changes, and %d after", protocol, open, now)
		}
	}
}

// TestTCPPermission: on TCP a denial closes the connection, and is logged. What
// does not change who is allowed leaves open connections alone.
func TestTCPPermission(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	echo, inbound := r.echo(), r.port()
	web, other := out{port: r.port(), service: "backend"}, out{port: r.port(), service: "backend"}
	backend := r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "tcp", port: inbound, local: echo}}))
	r.ready(backend, r.join(cp, "web", r.caller("web", web)), r.join(cp, "other", r.caller("other", other)))
	refused := func(port int) {
		t.Helper()
		l, err := dial(port)
		if err == nil {
			_ = l.Close()
			t.Error("it is not permitted, and is answered")
		}
	}
	// Until web knows backend's endpoint its own proxy closes the connection; only
	// then does backend's refuse it.
	r.await("backend logs that it refuses web", func() error {
		refused(web.port)
		if len(loggedLines(backend.Process, "request denied", "caller=spiffe://default/web", "rbac_access_denied_matched_policy")) == 0 {
			return errors.New("no such line")
		}
		return nil
	})

	r.apply(cp, permit("backend", "Exact, value: spiffe://default/web"))
	l := r.dials(web.port)
	refused(other.port)

	// A policy for others, and a Mesh that says the same: neither changes who may
	// call.
	updates := func() int { return r.stat(cp, "backend", `listener_manager\.listener_in_place_updated`) }
	before := updates()
	r.apply(cp, permit("elsewhere", "Exact, value: spiffe://default/other"))
	r.apply(cp, mtls("STRICT", "metrics: {}\n"))
	r.must(l.say("unrelated changes do no harm"))

	r.apply(cp, permit("backend", "Exact, value: spiffe://default/other"))
	next := r.dials(other.port)
	refused(web.port)
	// A chain that is replaced closes its connections, so only a change of who
	// may call replaces it.
	if n := updates() - before; n != 1 {
		t.Errorf("the inbound's chain was replaced %d times", n)
	}
	if err := l.closed(); err != nil {
		t.Errorf("a connection whose permission went: %v", err)
	}
	r.must(next.say("the new one stays"))
}

// TestForgedClientCert: what a caller says of its certificate is not believed.
func TestForgedClientCert(t *testing.T) {
	const header, forged = "x-forwarded-client-cert", "By=spiffe://default/backend;URI=spiffe://default/admin"
	for _, mode := range []string{"", "PERMISSIVE", "STRICT"} {
		t.Run("mtls="+mode, func(t *testing.T) {
			r := open(t)
			cp := r.controlPlane()
			if mode != "" {
				r.apply(cp, mtls(mode))
				r.apply(cp, permitAll)
			}
			site, inbound, to := r.site("backend"), r.port(), out{port: r.port(), service: "backend"}
			r.ready(
				r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: inbound, local: site.port}})),
				r.join(cp, "web", strings.Replace(r.caller("web", to), "tags: {", "tags: {version: v1, ", 1)),
			)
			r.answers(to.port, http.StatusOK)
			a, err := r.get(to.port, "/", header, forged)
			r.must(err)
			want := regexp.MustCompile(`^By=spiffe://default/backend;.*URI=spiffe://default/web(;|$)`)
			if mode == "" {
				want = regexp.MustCompile(`^$`)
			}
			if !want.MatchString(a.told.Caller) || strings.Contains(a.told.Caller, "admin") || len(a.told.Header.Values(header)) > 1 {
				t.Errorf("the workload believes that it was called by %q", a.told.Caller)
			}
			if uris := regexp.MustCompile(`URI=([^;]*)`).FindAllString(a.told.Caller, -1); mode != "" && (len(uris) < 2 || uris[0] != "URI=spiffe://default/web") {
				t.Errorf("the caller's SPIFFE id does not come first: %q", a.told.Caller)
			}
			if mode != "" {
				// A member of the mesh that is no proxy of ours, and lies.
				c := client(false)
				c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{
					Certificates: []tls.Certificate{r.member(cp, "spiffe://default/web")}, InsecureSkipVerify: true, NextProtos: []string{"kuma"},
				}
				a, err := r.fetchURL(c, fmt.Sprintf("https://127.0.0.1:%d/", inbound), header, forged)
				if err != nil || a.status != http.StatusOK || strings.Contains(a.told.Caller, "admin") || !strings.Contains(a.told.Caller, "URI=spiffe://default/web") {
					t.Errorf("a member that lies: %d %q %v", a.status, a.told.Caller, err)
				}
				c.CloseIdleConnections()
			}
			if mode == "STRICT" {
				return
			}
			if a, err = r.get(inbound, "/", header, forged); err != nil || a.status != http.StatusOK {
				t.Fatal(a.status, err)
			}
			if a.told.Caller != "" {
				t.Errorf("a stranger is believed to be %q", a.told.Caller)
			}
		})
	}
}

// TestNoPlaintextInStrict: towards a peer without a certificate an outbound
// speaks plaintext while the mesh is PERMISSIVE, and never while it is STRICT.
func TestNoPlaintextInStrict(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("PERMISSIVE"))
	r.apply(cp, permitAll)
	// A host that has no proxy yet: its workload listens where others look for
	// the inbound.
	site := r.site("old")
	r.apply(cp, fmt.Sprintf("type: Dataplane\nmesh: default\nname: old\nnetworking:\n  address: 127.0.0.1\n  inbound:\n  - port: %d\n    servicePort: %d\n    tags: {kuma.io/service: old, kuma.io/protocol: http}\n", site.port, r.port()))
	to := out{port: r.port(), service: "old"}
	r.ready(r.join(cp, "web", r.caller("web", to)))
	r.answers(to.port, http.StatusOK)

	r.apply(cp, mtls("STRICT"))
	r.answers(to.port, http.StatusServiceUnavailable)
	seen := site.requests.Load()
	for range 5 {
		if a, err := r.get(to.port, "/"); err != nil || a.status != http.StatusServiceUnavailable {
			t.Errorf("STRICT, and the answer is %d %v", a.status, err)
		}
	}
	if n := site.requests.Load(); n != seen {
		t.Errorf("%d requests arrived in plaintext", n-seen)
	}
	r.apply(cp, mtls("PERMISSIVE"))
	r.answers(to.port, http.StatusOK)
}
