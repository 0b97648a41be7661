//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kuma/test/lab"
	"kuma/test/mitm"
)

// xdsPort stands in Envoy's first configuration for the door's.
const xdsPort = "59999"

// xdsClient is an Envoy on its way to its control plane, with nothing of
// kuma-dp beside it.
type xdsClient struct {
	*lab.Process
	dir string
}

// startXDS asks for an Envoy's first configuration and starts it with that, but
// for the port, which is the door's.
func (r *room) startXDS(cp *lab.ControlPlane, name, host string, ca []byte, port int) *xdsClient {
	r.Helper()
	token, err := cp.Kumactl("", "generate", "dataplane-token", "--name", name, "--mesh", "default", "--valid-for", "1h")
	r.must(err)
	dir := filepath.Join(r.Dir, name)
	r.must(os.Mkdir(dir, 0o700))
	body, err := json.Marshal(map[string]any{
		"mesh": "default", "name": name, "dataplaneToken": token, "dataplaneResource": dataplane(name, []in{{service: name, protocol: "http", port: r.port(), local: r.port()}}),
		"caCert": string(ca), "workdir": dir, "features": []string{}, "dynamicMetadata": map[string]string{},
	})
	r.must(err)
	c, err := cp.Verified()
	r.must(err)
	resp, err := c.Post(fmt.Sprintf("https://%s:%d/bootstrap", host, cp.DP), "application/json", bytes.NewReader(body))
	r.must(err)
	defer resp.Body.Close()
	config, err := io.ReadAll(resp.Body)
	r.must(err)
	if resp.StatusCode != http.StatusOK || strings.Count(string(config), xdsPort) != 1 {
		r.Fatalf("%s: %s", resp.Status, config)
	}
	file, err := r.File(name+"/bootstrap.yaml", strings.Replace(string(config), xdsPort, fmt.Sprint(port), 1))
	r.must(err)
	p, err := r.Start("envoy-"+name, nil, r.Envoy, "--config-path", file, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning")
	r.must(err)
	return &xdsClient{p, dir}
}

// ready asks Envoy's admin interface whether it has had its configuration.
func (x *xdsClient) ready() error {
	sockets, err := filepath.Glob(filepath.Join(x.dir, "*admin*.sock"))
	if err != nil || len(sockets) != 1 {
		return fmt.Errorf("admin sockets: %v, %v", sockets, err)
	}
	c := &http.Client{Timeout: attempt, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sockets[0])
	}}}
	resp, err := c.Get("http://envoy/ready")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}

// takenByEnvoy tells of a bad certificate that Envoy takes why it does, and why
// that does no harm: the authority that was named had to sign it in any case.
func takenByEnvoy(name string) string {
	switch name {
	case "with the address as a name":
		return "the contract's first configuration looks for the host among names and addresses alike"
	case "signed with SHA-1":
		return "BoringSSL takes the signature, and Envoy has no setting for it; our authorities sign with SHA-256, and files that don't are refused at the control plane's start"
	}
	return ""
}

// TestManInTheMiddleOfXDS is HRD-02 for Envoy: what it asks of its control
// plane, its token first, is never heard by one whose certificate is not the
// control plane's.
func TestManInTheMiddleOfXDS(t *testing.T) {
	r := open(t)
	set, err := mitm.Make()
	r.must(err)
	cp := r.controlPlane("KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_PORT=" + xdsPort)
	pool := x509.NewCertPool()
	own, err := os.ReadFile(cp.CA)
	r.must(err)
	pool.AppendCertsFromPEM(own)
	at := func(name string, show mitm.Case) (*mitm.Door, *xdsClient) {
		door, err := mitm.Open(mitm.DoorConfig{
			To: fmt.Sprintf("localhost:%d", cp.DP), TLS: &tls.Config{RootCAs: pool},
			Show: func(*tls.ClientHelloInfo) (mitm.Case, bool) { return show, true },
		})
		r.must(err)
		r.Cleanup(func() { _ = door.Close() })
		return door, r.startXDS(cp, name, show.Host, set.CA, door.Port())
	}
	for i, show := range set.Good {
		door, x := at(fmt.Sprintf("good-%d", i), show)
		r.await(show.Name, x.ready)
		if door.Heard() == 0 {
			t.Errorf("%s: nothing came by the door", show.Name)
		}
		x.Kill()
	}
	for i, show := range set.Bad {
		if reason := takenByEnvoy(show.Name); reason != "" {
			t.Logf("%s: left out: %s", show.Name, reason)
			continue
		}
		door, x := at(fmt.Sprintf("bad-%d", i), show)
		select {
		case said := <-door.Refused():
			t.Logf("%s: %s", show.Name, said)
		case <-time.After(patience):
			t.Errorf("%s: it was not refused", show.Name)
		}
		if n := door.Heard(); n != 0 {
			t.Errorf("%s: %d bytes were heard", show.Name, n)
		}
		x.Kill()
		_ = door.Close()
	}
}

// TestManInTheMiddleOfTheMesh is HRD-02 between Envoys: a caller sends nothing to
// one that is not the service, whatever certificate it shows.
func TestManInTheMiddleOfTheMesh(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	mesh := r.authority(cp)
	stranger, err := mitm.NewAuthority("default", nil, func(c *x509.Certificate) { c.URIs = mesh.Cert.URIs })
	r.must(err)
	id := func(uris ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.DNSNames = nil
			for _, text := range uris {
				u, err := url.Parse(text)
				r.must(err)
				c.URIs = append(c.URIs, u)
			}
		}
	}
	const backend = "spiffe://default/backend"
	both := func(a, b func(*x509.Certificate)) func(*x509.Certificate) {
		return func(c *x509.Certificate) { a(c); b(c) }
	}
	cases := []struct {
		name   string
		by     *mitm.Authority
		change func(*x509.Certificate)
		good   bool
	}{
		{"the service's own", mesh, id(backend), true},
		{"another service's", mesh, id("spiffe://default/other"), false},
		{"a service's whose name begins so", mesh, id(backend + "-2"), false},
		{"a service's below it", mesh, id(backend + "/x"), false},
		{"with a slash at its end", mesh, id(backend + "/"), false},
		{"in capitals", mesh, id("spiffe://default/Backend"), false},
		{"of another trust domain", mesh, id("spiffe://other/backend"), false},
		{"of another scheme", mesh, id("https://default/backend"), false},
		{"with a tag's name alone", mesh, id("kuma://kuma.io/service/backend"), false},
		{"with its name as a host's", mesh, func(c *x509.Certificate) { c.DNSNames = []string{"backend", backend} }, false},
		{"with its name in the subject", mesh, func(c *x509.Certificate) { c.DNSNames, c.Subject.CommonName = nil, backend }, false},
		{"expired", mesh, both(id(backend), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), false},
		{"not yet valid", mesh, both(id(backend), func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), false},
		{"of another mesh's authority", stranger, id(backend), false},
		{"for clients only", mesh, both(id(backend), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), false},
		{"the service's own, at the end", mesh, id(backend), true},
	}
	var shown atomic.Pointer[mitm.Case]
	door, err := mitm.Open(mitm.DoorConfig{
		Show: func(*tls.ClientHelloInfo) (mitm.Case, bool) { return *shown.Load(), true },
		Serve: func(c net.Conn) {
			_, _ = io.Copy(c, c)
		},
	})
	r.must(err)
	r.Cleanup(func() { _ = door.Close() })
	show := func(i int) {
		c := cases[i]
		cert, err := c.by.Leaf(c.change)
		r.must(err)
		shown.Store(&mitm.Case{Name: c.name, Cert: cert})
	}
	show(0)
	r.apply(cp, dataplane("backend", []in{{service: "backend", protocol: "tcp", port: door.Port(), local: r.port()}}))
	o := out{port: r.port(), service: "backend"}
	r.ready(r.join(cp, "web", r.caller("web", o)))
	for i, c := range cases {
		show(i)
		before := door.Heard()
		if c.good {
			if err := r.dials(o.port).say("the secret"); err != nil || door.Heard() == before {
				t.Errorf("%s: %v, %d bytes were heard", c.name, err, door.Heard()-before)
			}
			continue
		}
		if l, err := dial(o.port); err == nil {
			_ = l.Close()
			t.Errorf("%s: it was heard", c.name)
		}
		select {
		case said := <-door.Refused():
			t.Logf("%s: %s", c.name, said)
		case <-time.After(patience):
			t.Errorf("%s: it was not refused", c.name)
		}
		if n := door.Heard() - before; n != 0 {
			t.Errorf("%s: %d bytes were heard", c.name, n)
		}
	}
}

// authority is that of the mesh "default", as only an administrator can have it.
func (r *room) authority(cp *lab.ControlPlane) *mitm.Authority {
	r.Helper()
	secret := func(what string) []byte {
		var s struct{ Data []byte }
		r.must(lab.GetJSON(cp.URL()+"/meshes/default/secrets/default.ca-builtin-"+what+"-ca-1", &s))
		b, _ := pem.Decode(s.Data)
		if b == nil {
			r.Fatalf("the authority's %s is no PEM", what)
		}
		return b.Bytes
	}
	cert, err := x509.ParseCertificate(secret("cert"))
	r.must(err)
	der := secret("key")
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		key, err = x509.ParseECPrivateKey(der)
	}
	r.must(err)
	return &mitm.Authority{Cert: cert, Key: key.(crypto.Signer)}
}
