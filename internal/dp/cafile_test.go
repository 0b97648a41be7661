package dp

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func caFile(t *testing.T, text ...[]byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.crt")
	put(t, file, text...)
	return file
}

func put(t *testing.T, file string, text ...[]byte) {
	t.Helper()
	if err := os.WriteFile(file, bytes.Join(text, nil), 0o600); err != nil {
		t.Fatal(err)
	}
}

func believing(t *testing.T, c ControlPlane, log io.Writer) (*trust, error) {
	t.Helper()
	cfg := Default()
	cfg.ControlPlane, cfg.Log = c, slog.New(slog.NewTextHandler(log, nil))
	tr, err := cfg.openTrust()
	if err == nil {
		tr.restore(filepath.Join(t.TempDir(), "state"), cfg.Log)
	}
	return tr, err
}

// What the user gives is read strictly, since Envoy refuses a bad part of it
// without a word; what Envoy and the control plane get is nothing but PEM.
func TestGivenAuthority(t *testing.T) {
	t.Parallel()
	one, leaf := ownAuthority(t)
	for name, c := range map[string]struct{ text, want string }{
		"empty":             {"\n", "it is empty"},
		"rubbish":           {"rubbish", "it is not PEM"},
		"rubbish after it":  {string(one) + "rubbish", "after its last PEM block"},
		"a broken block":    {string(one) + string(one[:200]), "damaged or cut off"},
		"a key":             {string(one) + "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n", "private key"},
		"a block of others": {string(one) + "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "not a valid certificate"},
	} {
		file := caFile(t, []byte(c.text))
		for from, given := range map[string]ControlPlane{
			"--ca-cert-file (KUMA_CONTROL_PLANE_CA_CERT_FILE): certificate file " + file: {CACertFile: file},
			"KUMA_CONTROL_PLANE_CA_CERT": {CACert: c.text},
		} {
			_, err := believing(t, given, io.Discard)
			if err == nil || !strings.HasPrefix(err.Error(), from+": ") || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "as PEM") {
				t.Errorf("%s, %s: %v", from, name, err)
			}
		}
	}
	for from, given := range map[string]ControlPlane{"file": {CACertFile: caFile(t, []byte("# words\n"), one)}, "text": {CACert: "# words\n" + string(one)}} {
		tr, err := believing(t, given, io.Discard)
		if err != nil || !tr.trusts(t, leaf) || string(tr.request()) != string(one) {
			t.Errorf("%s: %v", from, err)
		}
	}
}

// A file with authorities that is replaced counts from then on, for kuma-dp and
// for Envoy; a bad one is refused with one line (HRD-33).
func TestAuthorityReplaced(t *testing.T) {
	t.Parallel()
	one, leafOne := ownAuthority(t)
	two, leafTwo := ownAuthority(t)
	sent, leafSent := ownAuthority(t)
	file, envoy := caFile(t, one), filepath.Join(t.TempDir(), "envoy.json")
	var log bytes.Buffer
	tr, err := believing(t, ControlPlane{CACertFile: file}, &log)
	if err == nil {
		err = tr.serveEnvoy(envoy, nil, "")
	}
	if err == nil {
		err = tr.take(sent)
	}
	if err != nil {
		t.Fatal(err)
	}
	look := func() {
		t.Helper()
		if err := tr.look(); err != nil {
			t.Fatal(err)
		}
	}
	version, anchors := envoysAnchors(t, envoy)
	look()
	if v, now := envoysAnchors(t, envoy); v != version || now != anchors || anchors != string(one)+string(sent) {
		t.Errorf("nothing has changed, and yet version %s, not %s: %s", v, version, now)
	}
	put(t, file, one, two)
	look()
	if v, now := envoysAnchors(t, envoy); v == version || now != string(one)+string(two)+string(sent) || string(tr.request()) != now {
		t.Errorf("Envoy has %s", now)
	}
	if !tr.trusts(t, leafOne) || !tr.trusts(t, leafTwo) || !tr.trusts(t, leafSent) {
		t.Error("kuma-dp does not trust all three")
	}
	put(t, file, one, []byte("rubbish"))
	log.Reset()
	for range 10 {
		look()
	}
	if strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), file) || !tr.trusts(t, leafTwo) {
		t.Errorf("the log has %s", &log)
	}
	put(t, file, two)
	look()
	if _, now := envoysAnchors(t, envoy); now != string(two)+string(sent) || tr.trusts(t, leafOne) || !tr.trusts(t, leafTwo) {
		t.Errorf("what the user has taken out is still trusted: %s", now)
	}

	// What Envoy could not be told is told when that can be.
	tr.envoy = filepath.Join(t.TempDir(), "missing", "envoy.json")
	put(t, file, one, two)
	if err := tr.look(); err == nil || !tr.trusts(t, leafOne) {
		t.Errorf("kuma-dp itself trusts, and Envoy can't be told: %v", err)
	}
	tr.envoy = envoy
	look()
	if _, now := envoysAnchors(t, envoy); now != string(one)+string(two)+string(sent) {
		t.Errorf("Envoy has %s", now)
	}
}

// A proxy that waits for its control plane takes the new authorities into the
// next attempt.
func TestAuthorityReplacedWhileWaiting(t *testing.T) {
	t.Parallel()
	one, two := newAuthority(t), newAuthority(t)
	file := caFile(t, one.pem)
	tr, err := believing(t, ControlPlane{CACertFile: file}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var asked bootstrapRequest
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || asked.CACert != string(one.pem)+string(two.pem) {
			t.Errorf("the control plane is told that Envoy has %s, %v", asked.CACert, err)
		}
		_, _ = io.WriteString(w, `{"bootstrap":"e30="}`)
	}))
	s.Listener = &closing{Listener: s.Listener, first: func() {
		put(t, file, one.pem, two.pem)
		if err := tr.look(); err != nil {
			t.Error(err)
		}
	}}
	s.TLS = &tls.Config{Certificates: []tls.Certificate{two.server(t)}}
	s.StartTLS()
	t.Cleanup(s.Close)
	cfg := Default()
	cfg.Log, cfg.ControlPlane.URL = slog.New(slog.DiscardHandler), s.URL
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	if _, err := bootstrap(ctx, &cfg, tr, new(bootstrapRequest)); err != nil {
		t.Error(err)
	}
}

// closing ends its first connection.
type closing struct {
	net.Listener
	first func()
}

func (c *closing) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil && c.first != nil {
		c.first()
		c.first = nil
		_ = conn.Close()
		return c.Listener.Accept()
	}
	return conn, err
}

// The authorities that a machine comes with pass.
func TestSystemBundleAsFile(t *testing.T) {
	t.Parallel()
	cfg := Default()
	file := cfg.systemCA()
	if file == "" {
		t.Skip("this machine has no bundle")
	}
	tr, err := believing(t, ControlPlane{CACertFile: file}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(tr.request()) {
		t.Error("nothing is left of it")
	}
}
