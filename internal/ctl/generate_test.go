package ctl

import (
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"

	"kuma/internal/token"
)

func TestGenerateTokens(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"POST /tokens/dataplane": {200, "dp.to.ken"},
		"POST /tokens/zone":      {200, "zone.to.ken\n"},
		"POST /tokens/user":      {200, "user.to.ken"},
	})
	m := newMachine(t).using(s.URL)
	for _, c := range []struct {
		args   []string
		path   string
		body   string
		out    string
		stderr string
	}{
		{[]string{"dataplane-token", "--valid-for", "24h"}, "/tokens/dataplane", `{"mesh":"default","name":"","tags":null,"type":"","validFor":"24h0m0s","workload":""}`, "dp.to.ken", ""},
		{
			[]string{"dataplane-token", "--valid-for=1h", "--name=web-1", "-m", "m1", "--proxy-type=dataplane", "--tag", "kuma.io/service=a,b", "--tag", "kuma.io/service=b,c", "--tag=x=y", "--workload=w"},
			"/tokens/dataplane", `{"mesh":"m1","name":"web-1","tags":{"kuma.io/service":["a","b","c"],"x":["y"]},"type":"dataplane","validFor":"1h0m0s","workload":"w"}`, "dp.to.ken", "",
		},
		{[]string{"dataplane-token", "--valid-for=1h", "--type=ingress"}, "/tokens/dataplane", `{"mesh":"default","name":"","tags":null,"type":"ingress","validFor":"1h0m0s","workload":""}`, "dp.to.ken", "Warning: --type is deprecated; use --proxy-type\n"},
		{[]string{"zone-token", "--valid-for=1h", "--zone=z1"}, "/tokens/zone", `{"scope":["ingress","egress"],"validFor":"1h0m0s","zone":"z1"}`, "zone.to.ken", ""},
		{[]string{"user-token", "--valid-for=1h", "--name=jane", "--group=a,b", "--group=c"}, "/tokens/user", `{"groups":["a","b","c"],"name":"jane","validFor":"1h0m0s"}`, "user.to.ken", ""},
	} {
		m.run(append([]string{"generate"}, c.args...)...).want(t, 0, c.out, c.stderr)
		if d := cmp.Diff(c.body, s.bodies["POST "+c.path]); d != "" {
			t.Errorf("%v: body (-want +got):\n%s", c.args, d)
		}
	}
}

func TestGenerateTokenMistakes(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"POST /tokens/dataplane": stdError(404, "Signing Key not found", "there is no signing key with KID 1"),
		"POST /tokens/user":      stdError(403, "Access Denied", "action not allowed"),
	})
	m := newMachine(t).using(s.URL)
	m.file("text", "hello")
	ec := m.run("generate", "tls-certificate", "--type=server", "--hostname=a", "--key-type=ecdsa", "--cert-file=-", "--key-file="+m.home+"/ec.key")
	if ec.code != 0 {
		t.Fatal(ec.stderr)
	}
	for _, c := range []struct{ args, err string }{
		{"dataplane-token", `Error: required flag(s) "valid-for" not set` + "\n"},
		{"dataplane-token --valid-for=0", "Error: You must set a token validFor value\n"},
		{"dataplane-token --valid-for=-1h", "Error: --valid-for must not be negative\n"},
		{"dataplane-token --valid-for=soon", "…invalid argument \"soon\" for \"--valid-for\""},
		{"dataplane-token --valid-for=1h --tag=a", "…must be KEY=VALUE[,VALUE]"},
		{"dataplane-token --valid-for=1h --tag=a=", "…must be KEY=VALUE[,VALUE]"},
		{"dataplane-token --valid-for=1h --proxy-type=foo", "…must be dataplane, ingress or egress"},
		{"dataplane-token --valid-for=1h -m nope", "Error: failed to generate a token: Signing Key not found (there is no signing key with KID 1)\n"},
		{"dataplane-token --valid-for=1h --kid=1", "…--kid cannot be used without --signing-key-path"},
		{"dataplane-token --valid-for=1h --signing-key-path=x", "Error: --kid is required when --signing-key-path is used\n"},
		{"dataplane-token --valid-for=1h --kid=1 --signing-key-path=HOME/none", "…read the signing key: …no such file"},
		{"dataplane-token --valid-for=1h --kid=1 --signing-key-path=HOME/text", "…text: key is not PEM"},
		{"dataplane-token --valid-for=1h --kid=1 --signing-key-path=HOME/ec.key", "…invalid key encoding"},
		{"zone-token --valid-for=1h", `Error: required flag(s) "zone" not set` + "\n"},
		{"zone-token --valid-for=1h --zone=z --scope=cp", `…--scope "cp": must be ingress or egress`},
		{"zone-token --valid-for=1h --zone=z", "…does not issue tokens of this sort"},
		{"user-token --valid-for=1h", `Error: required flag(s) "name" not set` + "\n"},
		{"user-token --valid-for=1h --name=", "Error: --name must not be empty\n"},
		{"user-token --valid-for=1h --name=a", "Error: failed to generate a token: Access Denied (action not allowed)\n"},
		{"public-key", `Error: required flag(s) "signing-key-path" not set` + "\n"},
		{"signing-key --format=der", "…must be pem or pem-base64"},
		{"tls-certificate", `Error: required flag(s) "hostname", "type" not set` + "\n"},
		{"tls-certificate --type=x --hostname=a", `Error: invalid certificate type "x"` + "\n"},
		{"tls-certificate --type=client --hostname=a --key-type=dsa", `Error: invalid key type "dsa"` + "\n"},
		{"tls-certificate --type=server", `Error: required flag(s) "hostname" not set` + "\n"},
		{"tls-certificate --hostname=a", `Error: required flag(s) "type" not set` + "\n"},
		{"tls-certificate --type=server --hostname=https://a:5682", "…without scheme and port"},
		{"tls-certificate --type=server --hostname=a,,b", "…neither a host name nor an IP address"},
		{"tls-certificate --type=server --hostname=a.*.b", "…such as cp.example or *.cp.example"},
		{"tls-certificate --type=server --hostname=a # the name", "…the backslash must be the last of its line"},
		{"tls-certificate --type=server --hostname=a b", `…unknown command "b" for "kumactl generate tls-certificate"`},
		{"tls-certificate --type=server --hostname=a --key-file=HOME", "…no regular file"},
		{"tls-certificate --type=server --hostname=a --cert-file=HOME/x --key-file=HOME/./x", "…must name two files"},
		{"tls-certificate --type=client --hostname=a --cert-file=x --key-file=x", "…must name two files"},
		{"tls-certificate --type=client --hostname=a --cert-file=- --key-file=/nowhere/x", "…save /nowhere/x"},
	} {
		args := strings.Fields(strings.ReplaceAll(c.args, "HOME", m.home))
		m.run(append([]string{"generate"}, args...)...).want(t, 1, "", c.err)
	}
}

// The key that kumactl makes signs what the verifying half of it accepts.
func TestGenerateOffline(t *testing.T) {
	t.Parallel()
	m := newMachine(t).using("http://127.0.0.1:1")
	key := m.run("generate", "signing-key", "--format=pem")
	if key.code != 0 {
		t.Fatal(key.stderr)
	}
	file := m.file("key.pem", key.stdout)
	public := m.run("generate", "public-key", "--signing-key-path", file)
	public.want(t, 0, "…-----BEGIN RSA PUBLIC KEY-----", "")
	verify, err := token.ParsePublicKey([]byte(public.stdout))
	if err != nil {
		t.Fatal(err)
	}
	m.run("generate", "signing-key").want(t, 0, "…LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVktLS0tL", "")

	for _, c := range []struct {
		args string
		want map[string]any
	}{
		{"dataplane-token --name=web-1 --tag=kuma.io/service=a,b --type=dataplane", map[string]any{"Name": "web-1", "Mesh": "default", "Tags": map[string]any{"kuma.io/service": []any{"a", "b"}}, "Type": "dataplane", "Workload": ""}},
		{"zone-token --zone=z1 --scope=egress", map[string]any{"Zone": "z1", "Scope": []any{"egress"}}},
		{"user-token --name=jane --group=g", map[string]any{"Name": "jane", "Groups": []any{"g"}}},
	} {
		args := append([]string{"generate"}, strings.Fields(c.args)...)
		r := m.run(append(args, "--valid-for=1h", "--kid=7", "--signing-key-path", file)...)
		if r.code != 0 || strings.HasSuffix(r.stdout, "\n") {
			t.Fatalf("%s: %+v", c.args, r)
		}
		claims := readToken(t, r.stdout, verify)
		if d := cmp.Diff(c.want, claims); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.args, d)
		}
	}
}

// readToken verifies a token and returns its own claims, without the
// registered ones.
func readToken(t *testing.T, text string, key *rsa.PublicKey) map[string]any {
	t.Helper()
	claims := jwt.MapClaims{}
	parsed, err := jwt.ParseWithClaims(text, claims, func(*jwt.Token) (any, error) { return key, nil }, jwt.WithValidMethods([]string{"RS256"}), jwt.WithExpirationRequired())
	if err != nil {
		t.Fatal(err)
	}
	if parsed.Header["kid"] != "7" {
		t.Errorf("kid %v", parsed.Header["kid"])
	}
	if e, err := claims.GetExpirationTime(); err != nil || time.Until(e.Time) > time.Hour {
		t.Errorf("expires %v, %v", e, err)
	}
	for _, c := range []string{"exp", "nbf", "iat", "jti"} {
		delete(claims, c)
	}
	return claims
}

func TestGenerateTLSCertificate(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	cert, key := filepath.Join(m.home, "tls.crt"), filepath.Join(m.home, "tls.key")
	for _, keyType := range []string{"rsa", "ecdsa"} { // the second run replaces what the first made
		m.run("generate", "tls-certificate", "--type=server", "--hostname=localhost,127.0.0.1", "--cert-file", cert, "--key-file", key, "--key-type", keyType).
			want(t, 0, "Private key saved in tls.key\nCertificate saved in tls.crt\n", "")
		for f, mode := range map[string]os.FileMode{cert: 0o600, key: 0o400} {
			if st, err := os.Stat(f); err != nil || st.Mode().Perm() != mode {
				t.Errorf("%s: %v, %v", f, st.Mode(), err)
			}
		}
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		if err := pair.Leaf.VerifyHostname("127.0.0.1"); err != nil {
			t.Error(err)
		}
	}
	// The older names, and a backslash with a space behind it.
	old, oldKey := filepath.Join(m.home, "old.crt"), filepath.Join(m.home, "old.key")
	m.run("generate", "tls-certificate", " ", "--type=server", "--cp-hostname=cp.example", "--key-type=ecdsa", "--cert-file", old, "--key-file", oldKey).
		want(t, 0, "Private key saved in old.key\nCertificate saved in old.crt\n", "Warning: --cp-hostname is deprecated; use --hostname\n")
	m.run("generate", "tls-certificate", "--type=client", "--key-type=ecdsa", "--cert-file", old, "--key-file", oldKey).
		want(t, 0, "Private key saved in old.key\nCertificate saved in old.crt\n", "")
	if _, err := tls.LoadX509KeyPair(old, oldKey); err != nil {
		t.Error(err)
	}
	// With one file on standard output, nothing else is.
	r := m.run("generate", "tls-certificate", "--type=client", "--key-type=ecdsa", "--cert-file=-", "--key-file", oldKey)
	if block, rest := pem.Decode([]byte(r.stdout)); block == nil || block.Type != "CERTIFICATE" || len(rest) != 0 {
		t.Errorf("standard output: %q", r.stdout)
	}
	r = m.run("generate", "tls-certificate", "--type=client", "--hostname=a", "--cert-file=-", "--key-file=-")
	first, rest := pem.Decode([]byte(r.stdout))
	second, _ := pem.Decode(rest)
	if first == nil || second == nil || first.Type != "RSA PRIVATE KEY" || second.Type != "CERTIFICATE" {
		t.Fatalf("not a key and a certificate:\n%s", r.stdout)
	}
	c, err := x509.ParseCertificate(second.Bytes)
	if err != nil || c.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("usage %v, %v", c.ExtKeyUsage, err)
	}
}

// A pair is replaced whole or not at all.
func TestGenerateTLSCertificateWhole(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	key := m.file("tls.key", "the old key")
	other := filepath.Join(m.home, "dir")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	m.run("generate", "tls-certificate", "--type=client", "--key-type=ecdsa", "--key-file", key, "--cert-file", other).want(t, 1, "", "…no regular file")
	m.run("generate", "tls-certificate", "--type=client", "--key-type=ecdsa", "--key-file", key, "--cert-file", m.home+"/none/x").want(t, 1, "", "…no such file")
	if raw, err := os.ReadFile(key); err != nil || string(raw) != "the old key" {
		t.Errorf("the key is %q, %v", raw, err)
	}
	// The last step can fail alone: then the first is taken back.
	a, err := stage(key, []byte("new"), 0o400)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.commit(); err != nil {
		t.Fatal(err)
	}
	if err := a.undo(); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(key); err != nil || string(raw) != "the old key" {
		t.Errorf("the key is %q, %v", raw, err)
	}
	if left, err := filepath.Glob(m.home + "/.tls*"); err != nil || len(left) != 0 {
		t.Errorf("left beside: %v, %v", left, err)
	}
}

// Certificates are verified, unless a flag with "skip" in its name says
// otherwise, and that is warned of (HRD-02).
func TestTLS(t *testing.T) {
	m := newMachine(t)
	cert, key := filepath.Join(m.home, "tls.crt"), filepath.Join(m.home, "tls.key")
	other, otherKey := filepath.Join(m.home, "other.crt"), filepath.Join(m.home, "other.key")
	m.run("generate", "tls-certificate", "--type=server", "--hostname=127.0.0.1", "--key-type=ecdsa", "--cert-file", cert, "--key-file", key)
	m.run("generate", "tls-certificate", "--type=server", "--hostname=127.0.0.1", "--key-type=ecdsa", "--cert-file", other, "--key-file", otherKey)
	client, clientKey := filepath.Join(m.home, "client.crt"), filepath.Join(m.home, "client.key")
	m.run("generate", "tls-certificate", "--type=client", "--hostname=jane", "--key-type=ecdsa", "--cert-file", client, "--key-file", clientKey)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	var seen *http.Request
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = r
		_, _ = w.Write([]byte(theIndex()))
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	s.StartTLS()
	defer s.Close()
	add := func(extra ...string) result {
		return m.run(append([]string{"config", "control-planes", "add", "--overwrite", "--name=x", "--address", s.URL}, extra...)...)
	}

	add().want(t, 1, "", "…could not connect to the Control Plane API Server…name the CA that signed its certificate")
	add("--ca-cert-file", other).want(t, 1, "", "…other.crt is not the CA that signed its certificate")
	add("--ca-cert-file", other, "--client-cert-file", client, "--client-key-file", clientKey).want(t, 1, "", "…the certificate seen is of \"CN=127.0.0.1\", issued by \"CN=127.0.0.1\", for 127.0.0.1, until …")
	add("--ca-cert-file", key).want(t, 1, "", `…tls.key holds a PEM block of type "EC PRIVATE KEY", where only CERTIFICATE may be`)
	add("--ca-cert-file", m.file("text", "hello")).want(t, 1, "", "…text holds no PEM certificate")
	add("--ca-cert-file", m.file("half", "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n"), "--skip-check").want(t, 1, "", "…half holds a certificate that can't be read")
	add("--ca-cert-file", "/nowhere").want(t, 1, "", "…read the CA certificate: …no such file")
	add("--client-cert-file", client).want(t, 1, "", "Error: Both --client-cert-file and --client-key-file needs to be specified: --client-key-file is missing\n")
	add("--admin-client-key", client).want(t, 1, "", "…Both --client-cert-file and --client-key-file needs to be specified: --client-cert-file is missing")
	add("--admin-client-key", client, "--client-key-file", client).want(t, 1, "", "…--admin-client-key is an older name of --client-key-file; give one of them")
	add("--headers", "a b=c").want(t, 1, "", `…"a b" is not a header's name`)
	add("--skip-check", "--ca-cert-file", cert, "--client-cert-file", client, "--client-key-file", key).want(t, 1, "", "…private key does not match public key")
	add("--skip-check", "# the name").want(t, 1, "", "…the backslash must be the last of its line")
	add("--ca-cert-file", cert, "--client-cert-file", client, "--client-key-file", key).want(t, 1, "", "…read the client's certificate")

	ok := "added Control Plane \"x\"\nswitched active Control Plane to \"x\"\n"
	add("--ca-cert-file", cert, "--client-cert-file", client, "--client-key-file", clientKey, "--headers", "x-a=b",
		"--auth-type=tokens", "--auth-conf", "token=my.jwt").want(t, 0, ok, "")
	if len(seen.TLS.PeerCertificates) != 1 || seen.TLS.PeerCertificates[0].DNSNames[0] != "jane" {
		t.Error("the client's certificate was not shown")
	}
	if seen.Header.Get("Authorization") != "Bearer my.jwt" || seen.Header.Get("X-A") != "b" {
		t.Errorf("headers %v", seen.Header)
	}
	// The older names, a blank argument as of a backslash with a space behind it,
	// and a path that is right from elsewhere too.
	seen = nil
	t.Chdir(m.home)
	add("--ca-cert-file", "tls.crt", "--admin-client-cert", client, "--admin-client-key", clientKey, " ").
		want(t, 0, ok, "Warning: --admin-client-cert is deprecated; use --client-cert-file\nWarning: --admin-client-key is deprecated; use --client-key-file\n")
	if len(seen.TLS.PeerCertificates) != 1 {
		t.Error("the client's certificate was not shown")
	}
	t.Chdir("/")
	m.run("version").want(t, 0, "…Server: Kuma", "")
	add("--skip-verify").want(t, 0, ok, "…is not verified (skipVerify)")
	add("--skip-verify", "--skip-check").want(t, 0, ok, "…is not verified (skipVerify)")
	add("--skip-check", "--address=http://127.0.0.1:1", "--admin-client-cert", client, "--admin-client-key", clientKey).want(t, 0, ok, "…a client certificate can't be shown without TLS")
	add("--skip-check", "--address=http://127.0.0.1:1", "--ca-cert-file", cert).want(t, 0, ok, "…is without TLS, so no certificate is verified")
	add("--skip-verify")
	m.run("version").want(t, 0, "…Server: Kuma", "…is not verified (skipVerify)")

	if err := os.Chmod(clientKey, 0o444); err != nil {
		t.Fatal(err)
	}
	add("--ca-cert-file", cert, "--client-cert-file", client, "--client-key-file", clientKey).want(t, 0, ok, "…client.key can be read by other users (mode 0444); run: chmod 600")
	if err := os.Chmod(clientKey, 0o400); err != nil {
		t.Fatal(err)
	}
	// A server that demands a certificate, and one that trusts another's.
	pool := x509.NewCertPool()
	pool.AddCert(pair.Leaf)
	strict := httptest.NewUnstartedServer(s.Config.Handler)
	strict.Config.ErrorLog = log.New(io.Discard, "", 0)
	strict.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	strict.StartTLS()
	defer strict.Close()
	add("--address", strict.URL, "--ca-cert-file", cert).want(t, 1, "", "…it wants a client certificate")
	add("--address", strict.URL, "--ca-cert-file", cert, "--client-cert-file", client, "--client-key-file", clientKey).want(t, 1, "", "…does the control plane know its authority?")

	plain := strings.Replace(s.URL, "https://", "http://", 1)
	m.run("config", "control-planes", "add", "--name=y", "--address", plain).want(t, 1, "", "…")
	h := newServer(t, nil)
	m.run("config", "control-planes", "add", "--name=y", "--address", strings.Replace(h.URL, "http://", "https://", 1)).
		want(t, 1, "", "…this port speaks plain HTTP")
}

// A credential goes nowhere but to the control plane.
func TestRedirects(t *testing.T) {
	t.Parallel()
	var leaked []string
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		leaked = append(leaked, r.Header.Get("Authorization"))
	}))
	defer other.Close()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/":
			_, _ = w.Write([]byte(theIndex()))
		case "/meshes":
			http.Redirect(w, r, other.URL+"/meshes", http.StatusFound)
		case "/zones":
			http.Redirect(w, r, "/zones", http.StatusFound)
		}
	}))
	defer s.Close()
	m := newMachine(t)
	m.run("config", "control-planes", "add", "--name=x", "--address", s.URL, "--auth-type=tokens", "--auth-conf=token=secret").want(t, 0, "…added", "")
	m.run("get", "meshes").want(t, 1, "", "…it redirects to "+other.URL+", where kumactl does not send credentials")
	m.run("get", "zones").want(t, 1, "", "…it redirects in a circle")
	if len(leaked) > 0 {
		t.Errorf("the other host was asked, with %q", leaked)
	}
}

// Nothing that logs a user in is printed or logged unasked (HRD-32).
func TestSecretsStayHidden(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{"GET /meshes": stdError(401, "Invalid authentication data", "Unauthenticated")})
	m := newMachine(t)
	m.run("config", "control-planes", "add", "--name=x", "--address", s.URL, "--auth-type=tokens", "--auth-conf=token=planted-1", "--headers=x-key=planted-2").want(t, 0, "…added", "")
	for _, args := range []string{"get meshes --log-level debug", "config view", "config control-planes list", "version --log-level info"} {
		r := m.run(strings.Fields(args)...)
		if strings.Contains(r.stdout+r.stderr, "planted") {
			t.Errorf("%s shows a secret:\n%s%s", args, r.stdout, r.stderr)
		}
	}
	m.run("config", "view", "--show-secrets").want(t, 0, "…planted-1…planted-2", "")
	if got := s.headers.Get("Authorization"); got != "Bearer planted-1" {
		t.Errorf("sent %q", got)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	m := newMachine(t)
	file := filepath.Join(m.home, ".kumactl", "config")

	m.run("config", "control-planes", "list").want(t, 0, "ACTIVE   NAME    ADDRESS\n*        local   http://localhost:5681\n", "")
	m.run("config", "control-planes", "add", "--name=one", "--address", s.URL).want(t, 0, "added Control Plane \"one\"\nswitched active Control Plane to \"one\"\n", "")
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("file: %v %v", st, err)
	}
	if st, err := os.Stat(filepath.Dir(file)); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("directory: %v %v", st, err)
	}
	m.run("config", "control-planes", "add", "--name=two", "--address=https://127.0.0.1:1", "--skip-check", "--auth-type=tokens", "--auth-conf=token=t").
		want(t, 0, "…added Control Plane \"two\"", "")
	m.run("config", "control-planes", "list").want(t, 0, "ACTIVE   NAME    ADDRESS\n         local   http://localhost:5681\n         one     "+s.URL+"\n*        two     https://127.0.0.1:1\n", "")
	m.run("config", "control-planes", "switch", "--name=one").want(t, 0, "switched active Control Plane to \"one\"\n", "")
	m.run("version").want(t, 0, "…Server: Kuma", "")
	m.run("config", "control-planes", "remove", "--name=local").want(t, 0, "removed Control Plane \"local\"\n", "")
	m.run("config", "view").want(t, 0, `contexts:
- controlPlane: one
  name: one
- controlPlane: two
  name: two
controlPlanes:
- coordinates:
    apiServer:
      url: `+s.URL+`
  name: one
- coordinates:
    apiServer:
      authConf:
        token: '*****'
      authType: tokens
      url: https://127.0.0.1:1
  name: two
currentContext: one
`, "")
	m.run("config", "control-planes", "remove", "--name=one").want(t, 0, "removed Control Plane \"one\"\n", "…no control plane is active now")
	m.run("get", "meshes").want(t, 1, "", "…no control plane is chosen; run kumactl config control-planes switch --name NAME")
	m.run("get", "meshes", "--context=to").want(t, 1, "", `…there is no context with name "to"; did you mean "two"?`)
	m.run("get", "meshes", "--context=two").want(t, 1, "", "…https://127.0.0.1:1…connection refused…is it running?")
	m.run("get", "meshes", "--no-config", "--context=two").want(t, 1, "", `…there is no context with name "two"`)

	// A file of one's own is made where it does not exist.
	own := filepath.Join(m.home, "own", "cfg")
	m.run("config", "control-planes", "add", "--config-file", own, "--name=one", "--address", s.URL).want(t, 0, "…added", "")
	m.run("version", "--config-file", own).want(t, 0, "…Server: Kuma", "")
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	m.run("config", "control-planes", "list").want(t, 0, "…", "…can be read by other users (mode 0644); run: chmod 600")
}

func TestConfigMistakes(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{"GET /": {200, `{"product":"Other","version":"1"}`}})
	odd := newServer(t, map[string]answer{"GET /": {200, `hello`}})
	m := newMachine(t)
	const add = "config control-planes add --name=x "
	for _, c := range []struct{ args, err string }{
		{"config control-planes add", `Error: required flag(s) "address", "name" not set` + "\n"},
		{add + "--address=localhost:5681", "…API Server URL is invalid: "},
		{add + "--address=ftp://h", "…must start with http:// or https://"},
		{add + "--address=http://", "…has no host"},
		{add + "--address=http://u:p@h", "…must not hold a user or password"},
		{add + "--address=http://127.0.0.1:1", "…could not connect to the Control Plane API Server: could not reach the control plane at http://127.0.0.1:1: …connection refused…--skip-check"},
		{add + "--address=" + s.URL, `…this kumactl is for "Kuma", but `},
		{add + "--address=" + odd.URL, "…does not answer like a control plane's API"},
		{add + "--address=http://h --auth-type=foo", `…authentication plugin of type "foo" is not found`},
		{add + "--address=http://h --auth-type=tokens", "Error: --auth-conf is not valid: provide token=YOUR_TOKEN\n"},
		{add + "--address=http://h --auth-type=tokens --auth-conf=tokn=x", "Error: --auth-conf is not valid: provide token=YOUR_TOKEN\n"},
		{add + "--address=http://h --auth-conf=token=x", "…--auth-conf needs --auth-type"},
		{"config control-planes add --name=local --address=http://h --skip-check", "Error: Control Plane with name \"local\" already exists. Use --overwrite to replace an existing one.\n"},
		{"config control-planes remove --name=loca", `…there is no Control Plane with name "loca"; did you mean "local"?`},
		{"config control-planes switch --name=loca", `…there is no Control Plane with name "loca"`},
		{"config control-planes switch", `Error: required flag(s) "name" not set` + "\n"},
		{"config control-planes switch --name=local --no-config", "…--no-config leaves no file to change"},
	} {
		m.run(strings.Fields(c.args)...).want(t, 1, "", c.err)
	}
	m.run(strings.Fields(add+"--address=http://cp.example --auth-type=tokens --auth-conf=token=x --skip-check")...).
		want(t, 0, "…added", "…the token will be sent without encryption")
	for text, want := range map[string]string{
		"contexts: {":              "…configuration file .kumactl/config: ",
		"contexts: 1":              "…configuration file .kumactl/config: ",
		"context: []":              `…unknown field "context"`,
		"currentContext: [a":       "…line 1",
		strings.Repeat("#", 2<<20): "…larger than the limit of 1 MiB",
		"contexts: [{name: a, controlPlane: b}]\ncurrentContext: a": `…context "a" names the control plane "b", which the configuration does not have`,
	} {
		m.file(".kumactl/config", text)
		m.run("get", "meshes").want(t, 1, "", want)
	}
	m.file(".kumactl/config", "")
	m.run("config", "view").want(t, 0, "…currentContext: local", "")
}
