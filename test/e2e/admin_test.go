//go:build e2e

package e2e

import (
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"kuma/internal/pki"
	"kuma/test/lab"
)

// linkless is how a kuma-dp is run that keeps no link, as one of Kuma's own.
var linkless = lab.ProxyOptions{Env: []string{"KUMA_DATAPLANE_RUNTIME_LINK_ENABLED=false"}}

// adminCA reads the authority of the admin listeners.
func (r *room) adminCA(cp *lab.ControlPlane) *pki.AdminCA {
	r.Helper()
	text, err := cp.Kumactl("", "get", "globalsecret", "envoy-admin-ca", "-o", "json")
	r.must(err)
	var secret struct{ Data []byte }
	r.must(json.Unmarshal([]byte(text), &secret))
	ca, err := pki.OpenAdminCA(secret.Data)
	r.must(err)
	return ca
}

// adminClient is an HTTP client for web's admin listener.
func (r *room) adminClient(ca *pki.AdminCA) (*http.Client, *tls.Config) {
	r.Helper()
	config, err := ca.Client("default", "web")
	r.must(err)
	t := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
	return &http.Client{Transport: t, Timeout: attempt}, config
}

// inspected checks that kumactl shows all pages of a proxy.
func (r *room) inspected(cp *lab.ControlPlane, name string) {
	r.Helper()
	for _, c := range []struct{ kind, has string }{
		{"config-dump", `"inbound:127.0.0.`}, {"stats", "listener_manager.listener_added"}, {"clusters", "kuma:envoy:admin::"},
	} {
		var out string
		r.await(c.kind+" is shown", func() error {
			var err error
			if out, err = cp.Kumactl("", "inspect", "dataplane", name, "--type", c.kind); err == nil && !strings.Contains(out, c.has) {
				err = fmt.Errorf("%q is not in %d bytes of %s", c.has, len(out), c.kind)
			}
			return err
		})
		if strings.Contains(out, "PRIVATE KEY") || strings.Contains(out, base64.StdEncoding.EncodeToString([]byte("-----BEGIN EC PRIVATE KEY"))[:20]) {
			r.Errorf("%s shows a private key", c.kind)
		}
	}
}

// TestInspectWithoutLink is HRD-30: a proxy whose kuma-dp keeps no link is
// inspected in the contract's way, by a listener that knows the control plane by
// its certificate. To all others it says whether the proxy is ready, no more.
func TestInspectWithoutLink(t *testing.T) {
	r := open(t)
	cp := r.controlPlane()
	r.apply(cp, mtls("STRICT"))
	at := r.port()
	yaml := strings.Replace(r.caller("web"), "networking:\n", fmt.Sprintf("networking:\n  admin: {port: %d}\n", at), 1)
	web := r.join(cp, "web", yaml, linkless)
	r.ready(web)
	r.inspected(cp, "web")

	// In plaintext.
	plain, secure := fmt.Sprintf("http://127.0.0.1:%d", at), fmt.Sprintf("https://127.0.0.1:%d", at)
	if code, body, err := lab.Get(plain + "/ready"); err != nil || code != http.StatusOK || body != "LIVE\n" {
		t.Errorf("/ready: %d %q %v", code, body, err)
	}
	for _, path := range []string{"/", "/config_dump", "/stats", "/ready/", "/ready/../stats", "/readyz", "/READY", "//ready"} {
		if code, body, err := lab.Get(plain + path); err != nil || code != http.StatusNotFound || body != "" {
			t.Errorf("GET %s: %d %q %v", path, code, body, err)
		}
	}
	resp, err := http.Post(plain+"/quitquitquit", "", nil)
	r.must(err)
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("POST /quitquitquit: %s", resp.Status)
	}

	// With certificates.
	ca := r.adminCA(cp)
	get := func(c *http.Client, path string) (int, string, error) {
		resp, err := c.Get(secure + path)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b), err
	}
	good, config := r.adminClient(ca)
	for path, has := range map[string]string{"/ready": "LIVE", "/server_info": "command_line_options", "/stats": "server.live"} {
		if code, body, err := get(good, path); err != nil || code != http.StatusOK || !strings.Contains(body, has) {
			t.Errorf("%s: %d, %d bytes, %v", path, code, len(body), err)
		}
	}
	nobody := config.Clone()
	nobody.Certificates = nil
	own, err := pki.NewAdminCA()
	r.must(err)
	stranger, err := pki.OpenAdminCA(own)
	r.must(err)
	foreign, err := stranger.Client("default", "web")
	r.must(err)
	// It is sent whatever authorities the listener asks for.
	forged := config.Clone()
	forged.Certificates, forged.GetClientCertificate = nil, func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &foreign.Certificates[0], nil }
	made, err := ca.Server("default", "other", "127.0.0.1")
	r.must(err)
	key, err := made.Key.PEM()
	r.must(err)
	pair, err := tls.X509KeyPair(made.Chain, key)
	r.must(err)
	proxys := config.Clone()
	proxys.Certificates, proxys.GetClientCertificate = nil, func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	for name, c := range map[string]*tls.Config{"no certificate": nobody, "another authority's": forged, "a proxy's own": proxys} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}, Timeout: attempt}
		for _, path := range []string{"/ready", "/stats"} {
			if code, _, err := get(client, path); err == nil {
				t.Errorf("%s is answered on %s: %d", name, path, code)
			}
		}
	}

	// The key is in the configuration, and shown to nobody.
	shown, err := cp.Kumactl("", "inspect", "dataplane", "web", "--type", "config")
	r.must(err)
	if !strings.Contains(shown, "kuma:envoy:admin") || !strings.Contains(shown, "[redacted]") || strings.Contains(shown, base64.StdEncoding.EncodeToString([]byte("-----BEGIN EC PRIVATE KEY"))[:20]) {
		t.Error("the computed configuration lacks the listener, or shows its key")
	}

	// Another authority counts at once, without a restart.
	r.apply(cp, "type: GlobalSecret\nname: envoy-admin-ca\ndata: "+base64.StdEncoding.EncodeToString(own)+"\n")
	r.inspected(cp, "web")
	if _, _, err := get(good, "/stats"); err == nil {
		t.Error("the authority that was replaced still counts")
	}

	// A control plane that was restarted makes new certificates.
	cp.Stop(10 * time.Second)
	if _, err := cp.Kumactl("", "inspect", "dataplane", "web", "--type", "stats"); err == nil {
		t.Error("a control plane that does not run inspects")
	}
	r.must(cp.Start(r.ctx))
	r.inspected(cp, "web")

	web.Stop(10 * time.Second)
	r.await("who is gone is not inspected", func() error {
		_, err := cp.Kumactl("", "inspect", "dataplane", "web", "--type", "stats")
		if err == nil {
			return fmt.Errorf("it is")
		}
		return nil
	})
}

// TestInspectWithoutLinkOverTCP is the same where Envoy's own admin interface is
// no Unix socket, and a linked proxy beside it, which has no listener at all.
func TestInspectWithoutLinkOverTCP(t *testing.T) {
	r := open(t)
	cp := r.controlPlane("KUMA_BOOTSTRAP_SERVER_PARAMS_ENVOY_ADMIN_UNIX_SOCKET=false")
	at, linked := r.port(), r.port()
	admin := func(yaml string, port int) string {
		yaml = strings.Replace(yaml, "address: 127.0.0.1\n", "address: 127.0.0.21\n", 1)
		return strings.Replace(yaml, "networking:\n", fmt.Sprintf("networking:\n  admin: {port: %d}\n", port), 1)
	}
	web := r.join(cp, "web", admin(r.caller("web"), at), linkless)
	ours := r.join(cp, "ours", admin(r.caller("ours"), linked))
	r.ready(web, ours)
	r.inspected(cp, "web")
	if code, body, err := lab.Get(fmt.Sprintf("http://127.0.0.21:%d/ready", at)); err != nil || code != http.StatusOK || body != "LIVE\n" {
		t.Errorf("/ready: %d %q %v", code, body, err)
	}
	if _, _, err := lab.Get(fmt.Sprintf("http://127.0.0.21:%d/ready", linked)); err == nil {
		t.Error("a linked proxy has an admin listener")
	}
	out, err := cp.Kumactl("", "inspect", "dataplane", "ours", "--type", "config-dump")
	r.must(err)
	if strings.Contains(out, "kuma:envoy:admin") {
		t.Error("a linked proxy has an admin listener")
	}
}
