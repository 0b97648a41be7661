//go:build e2e

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"kuma/test/lab"
)

// TestProtocols calls a workload of each protocol through two Envoys, in each
// mode of the mesh, and looks at what a stranger without a certificate gets.
func TestProtocols(t *testing.T) {
	for _, mode := range []string{"", "PERMISSIVE", "STRICT"} {
		t.Run("mtls="+mode, func(t *testing.T) {
			r := open(t)
			cp := r.controlPlane()
			if mode != "" {
				r.apply(cp, mtls(mode))
				r.apply(cp, permitAll)
			}
			one, two := r.site("one"), r.site("two")
			ins := []in{
				{service: "one", protocol: "http", port: r.port(), local: one.port},
				{service: "two", protocol: "http2", port: r.port(), local: two.port},
				{service: "checked", protocol: "grpc", port: r.port(), local: r.healthService()},
				{service: "echo", protocol: "tcp", port: r.port(), local: r.echo()},
			}
			outs := []out{{port: r.port(), service: "one"}, {port: r.port(), service: "two"}, {port: r.port(), service: "checked"}, {port: r.port(), service: "echo"}}
			backend := r.join(cp, "backend", dataplane("backend", ins))
			web := r.join(cp, "web", r.caller("web", outs...))
			r.ready(backend, web)

			check := func(name string, a answer, protocol string) {
				t.Helper()
				if a.told.Site != name || a.told.Protocol != protocol {
					t.Errorf("%s was reached as %s with %s", name, a.told.Site, a.told.Protocol)
				}
				if got, want := strings.Contains(a.told.Caller, "URI=spiffe://default/web"), mode != ""; got != want {
					t.Errorf("%s saw the caller %q", name, a.told.Caller)
				}
			}
			check("one", r.answers(outs[0].port, http.StatusOK), "HTTP/1.1")
			check("two", r.answers(outs[1].port, http.StatusOK), "HTTP/2.0")
			h2 := client(true)
			defer h2.CloseIdleConnections()
			a, err := r.fetch(h2, outs[1].port, "/")
			r.must(err)
			check("two", a, "HTTP/2.0")
			r.await("the gRPC service answers", func() error { return r.checkHealth(outs[2].port) })
			r.must(r.dials(outs[3].port).say("to and fro"))

			for i, in := range ins {
				if err := stranger(r, in); (err == nil) != (mode != "STRICT") {
					t.Errorf("a plaintext caller of %s: %v", in.service, err)
				}
				if mode != "" {
					encrypted(t, backend, in.port)
				}
				if mode == "" || t.Failed() {
					continue
				}
				// What went through the mesh was mutual TLS, as counted by web.
				stats, err := cp.Kumactl("", "inspect", "dataplane", "web", "--type", "stats")
				r.must(err)
				if want := fmt.Sprintf("cluster.%s.ssl.versions.TLSv1.3: ", outs[i].service); !strings.Contains(stats, want) {
					t.Errorf("no %q in web's statistics", want)
				}
			}
		})
	}
}

// stranger calls an inbound from outside the mesh, without TLS.
func stranger(r *room, in in) error {
	switch in.protocol {
	case "tcp":
		l, err := dial(in.port)
		if err == nil {
			_ = l.Close()
		}
		return err
	case "grpc":
		return r.checkHealth(in.port)
	}
	a, err := r.get(in.port, "/")
	if err == nil && a.status != http.StatusOK {
		err = fmt.Errorf("%d %s", a.status, a.body)
	}
	if err == nil && a.told.Caller != "" {
		err = fmt.Errorf("the workload saw the caller %q", a.told.Caller)
	}
	return err
}

// encrypted checks that an inbound speaks TLS 1.3 within the mesh and serves
// nobody without a certificate.
func encrypted(t *testing.T, p *lab.Proxy, port int) {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: attempt}, "tcp4", fmt.Sprintf("127.0.0.1:%d", port), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"kuma"}})
	if err != nil {
		t.Errorf("%s: no handshake at %d: %v", p.Name, port, err)
		return
	}
	defer c.Close()
	if v := c.ConnectionState().Version; v != tls.VersionTLS13 {
		t.Errorf("%s speaks %s at %d", p.Name, tls.VersionName(v), port)
	}
	_ = c.SetDeadline(time.Now().Add(attempt))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	_, err = io.ReadAll(c)
	if alert, ok := errors.AsType[tls.AlertError](err); !ok && (err == nil || !strings.Contains(err.Error(), "certificate required")) {
		t.Errorf("%s at %d without a client certificate: %v %v", p.Name, port, alert, err)
	}
}
