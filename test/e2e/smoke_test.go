//go:build e2e

package e2e

import (
	"net/http"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"kuma/test/lab"
)

// TestSmoke is what must hold with every Envoy that is supported: all protocols
// through mutual TLS, a permission that is changed, a refusal that is logged, and
// an orderly end.
func TestSmoke(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	site := r.site("backend")
	outs := []out{{port: r.port(), service: "backend"}, {port: r.port(), service: "checked"}, {port: r.port(), service: "echo"}}
	backend := r.join(cp, "backend", dataplane("backend", []in{
		{service: "backend", protocol: "http", port: r.port(), local: site.port},
		{service: "checked", protocol: "grpc", port: r.port(), local: r.healthService()},
		{service: "echo", protocol: "tcp", port: r.port(), local: r.echo()},
	}))
	web := r.join(cp, "web", r.caller("web", outs...))
	r.ready(backend, web)
	r.answers(outs[0].port, http.StatusForbidden)
	r.logged(backend.Process, "request denied", "caller=spiffe://default/web", "method=GET", "rbac_access_denied")
	r.apply(cp, permit("backend", "Exact, value: spiffe://default/web"))
	if a := r.answers(outs[0].port, http.StatusOK); !strings.Contains(a.told.Caller, "URI=spiffe://default/web") {
		t.Errorf("the caller is %q", a.told.Caller)
	}
	r.await("the gRPC service answers", func() error { return r.checkHealth(outs[1].port) })
	r.must(r.dials(outs[2].port).say("to and fro"))
	r.apply(cp, permit("backend", "Exact, value: spiffe://default/nobody"))
	r.answers(outs[0].port, http.StatusForbidden)

	stats, err := cp.Kumactl("", "inspect", "dataplane", "backend", "--type", "stats")
	r.must(err)
	for _, want := range []string{".ssl.versions.TLSv1.3: ", ".ssl.curves.X25519MLKEM768: "} {
		if !strings.Contains(stats, want) {
			t.Errorf("backend's statistics have no %q", want)
		}
	}
	for _, p := range []*lab.Proxy{backend, web} {
		r.must(p.Signal(syscall.SIGTERM))
		if code := p.ExitCode(); code != 0 {
			t.Errorf("%s ended with exit code %d", p.Name, code)
		}
		// One format, from the first line to the last, and no lists of extensions.
		format := regexp.MustCompile(`^time=\S+ level=(INFO|WARN|ERROR) msg=`)
		for line := range strings.Lines(p.Log()) {
			if !format.MatchString(line) || strings.Contains(line, "envoy.filters.http.router") || strings.Contains(line, "statically linked extensions") {
				t.Errorf("a line of another kind in %s's log: %s", p.Name, line)
			}
		}
	}
}
