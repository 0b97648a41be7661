//go:build e2e

package e2e

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"kuma/internal/rest"
	"kuma/test/lab"
)

// TestTLSReport: the report tells how real Envoys and kuma-dps are connected to
// the control plane, and to each other, with the key exchange that they agreed
// on (HRD-02).
func TestTLSReport(t *testing.T) {
	r := open(t)
	cp := r.controlPlane("KUMA_DIAGNOSTICS_TLS_ENABLED=true", "KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_ENABLED=true")
	r.apply(cp, mtls("STRICT"))
	r.apply(cp, permitAll)
	site, inbound, to := r.site("backend"), r.port(), out{port: r.port(), service: "backend"}
	r.ready(
		r.join(cp, "backend", dataplane("backend", []in{{service: "backend", protocol: "http", port: inbound, local: site.port}})),
		r.join(cp, "web", r.caller("web", to)),
	)
	r.answers(to.port, http.StatusOK)

	report := func(args ...string) rest.TLSReport {
		t.Helper()
		text, err := cp.Kumactl("", append([]string{"tls", "report", "-o", "json"}, args...)...)
		r.must(err)
		var out rest.TLSReport
		r.must(json.Unmarshal([]byte(text), &out))
		return out
	}
	find := func(rep rest.TLSReport, name string) rest.TLSEnvoy {
		t.Helper()
		for _, e := range rep.Envoys {
			if e.Proxy == name {
				return e
			}
		}
		t.Fatalf("%s is not in the report: %+v", name, rep.Envoys)
		return rest.TLSEnvoy{}
	}
	first := report("--mesh", "default")
	streams := map[string]bool{}
	for _, l := range first.Links {
		if l.Kind != "proxy" {
			continue
		}
		for _, s := range l.Streams {
			streams[l.Peer+" "+s] = true
		}
		if l.Version != "TLS 1.3" || l.Group != "X25519MLKEM768" || l.VerifiedBy != "dataplane token over TLS" || l.Certificate == nil {
			t.Errorf("link %+v", l)
		}
	}
	for _, want := range []string{"default/backend ads", "default/backend link", "default/web ads", "default/web link"} {
		if !streams[want] {
			t.Errorf("%s is not in the report: %v", want, streams)
		}
	}
	backend := find(first, "backend")
	if backend.Error != "" || backend.Versions["TLSv1.3"] == 0 || len(backend.Versions) != 1 || backend.Groups["X25519MLKEM768"] == 0 || len(backend.Groups) != 1 || len(backend.Ciphers) != 1 {
		t.Errorf("between Envoys: %+v", backend)
	}
	if c := backend.Certificate; c == nil || c.Subject != "spiffe://default/backend" || !c.NotAfter.After(first.Time) {
		t.Errorf("the certificate of backend: %+v", c)
	}
	// Nothing is wrong on this machine: what listens is closed to others, or has
	// TLS.
	for _, f := range first.Findings {
		if f.Severity != rest.SeverityNote {
			t.Errorf("found %+v", f)
		}
	}
	_, err := cp.Kumactl("", "tls", "report", "--check")
	r.must(err)

	// A member of the mesh without the post-quantum key exchange, and a stranger.
	c := client(false)
	c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{
		Certificates: []tls.Certificate{r.member(cp, "spiffe://default/web")}, InsecureSkipVerify: true, NextProtos: []string{"kuma"},
		MaxVersion: tls.VersionTLS12, CurvePreferences: []tls.CurveID{tls.CurveP256},
	}
	a, err := r.fetchURL(c, fmt.Sprintf("https://127.0.0.1:%d/", inbound))
	if err != nil || a.status != http.StatusOK {
		t.Fatal(a.status, err)
	}
	c.CloseIdleConnections()
	_, _ = tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", inbound), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"kuma"}, MaxVersion: tls.VersionTLS12})
	r.await("the report counts them", func() error {
		backend := find(report(), "backend")
		if backend.Versions["TLSv1.2"] != 1 || backend.Groups["P-256"] != 1 || backend.Groups["X25519MLKEM768"] == 0 || backend.Refused == 0 {
			return fmt.Errorf("%+v", backend)
		}
		return nil
	})
	_, err = cp.Kumactl("", "tls", "report", "--check")
	if err == nil {
		t.Error("--check is content with TLS 1.2 between proxies")
	}
	text, err := cp.Kumactl("", "tls", "report")
	r.must(err)
	for _, want := range []string{"TLSv1.3: ", "X25519MLKEM768: ", "P-256: 1", "connections between proxies have TLSv1.2", "connections between proxies have no post-quantum key exchange", "connections were refused because of the caller's certificate"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	if code, body, err := lab.Get(cp.URL() + "/tls-report"); err != nil || code != http.StatusOK || !strings.Contains(body, "X25519MLKEM768") {
		t.Errorf("GET /tls-report: %d %v", code, err)
	}
}
