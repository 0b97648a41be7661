package cp_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/internal/cp"
	"kuma/internal/pki"
)

// seed is the request that 0.7's manual shows, with the quote that it lacks.
const seed = `{"name": "dp-echo-1", "mesh": "default", "type": "dataplane", "tags": {"kuma.io/service": ["backend", "backend-admin"]}}`

// clientPair makes a pair as kumactl generate tls-certificate does.
func clientPair(t *testing.T, dir, name, kind string, hosts ...string) (cert, key string) {
	t.Helper()
	c, k, err := pki.GenerateTLS(kind, hosts, "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".pem"), filepath.Join(t.TempDir(), name+".key")
	for file, text := range map[string][]byte{cert: c, key: k} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// caller is an HTTP client that trusts one certificate and may show another.
func caller(t *testing.T, ca string, show ...string) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: new(tls.Config), DisableKeepAlives: true}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			t.Fatal(err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem)
	}
	if len(show) == 2 {
		pair, err := tls.LoadX509KeyPair(show[0], show[1])
		if err != nil {
			t.Fatal(err)
		}
		transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return &http.Client{Timeout: patience, Transport: transport}
}

// ask sends a request; status 0 is one that got no answer.
func ask(t *testing.T, c *http.Client, method, url, body string, headers ...string) (status int, answer string) {
	t.Helper()
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		if k == "Host" {
			r.Host = v
			continue
		}
		r.Header.Set(k, v)
	}
	resp, err := c.Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("%s is open to pages of other origins", url)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// claims are what a token says.
func claims(t *testing.T, text string) map[string]any {
	t.Helper()
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is no token", text)
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// The admin server of 0.7 on this machine: who may have a token there is who may
// have one of the API. Foreign origins and names, and proxies, get none: HRD-01.
func TestAdminServerHere(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.AdminServer.Local.Port = freePort(t) // which opens it
	cfg.General.AdvertisedHostname = "control-plane"
	cfg.APIServer.CORSAllowedDomains = []string{".*"}
	run(t, cfg)
	url := fmt.Sprintf("http://127.0.0.1:%d/tokens", cfg.AdminServer.Local.Port)
	plain := caller(t, "")

	status, text := ask(t, plain, http.MethodPost, url, seed)
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, text)
	}
	c := claims(t, text)
	if fmt.Sprintf("%v %v %v %v", c["Name"], c["Mesh"], c["Type"], c["Tags"]) != "dp-echo-1 default dataplane map[kuma.io/service:[backend backend-admin]]" {
		t.Errorf("the token says %v", c)
	}
	if life := time.Until(time.Unix(int64(c["exp"].(float64)), 0)); life < 9*365*24*time.Hour || life > 11*365*24*time.Hour {
		t.Errorf("the token lives for %s", life)
	}
	for name, x := range map[string]struct {
		method, url, body string
		headers           []string
		status            int
	}{
		"localhost":                  {http.MethodPost, url, seed, []string{"Host: localhost:5679"}, 200},
		"the advertised name":        {http.MethodPost, url, seed, []string{"Host: control-plane:5679"}, 200},
		"an ingress":                 {http.MethodPost, url, `{"mesh":"default","type":"ingress"}`, nil, 200},
		"what the manual prints":     {http.MethodPost, url, strings.Replace(seed, `"tags"`, `tags"`, 1), nil, 400},
		"an unknown claim":           {http.MethodPost, url, `{"mesh":"default","tag":{"a":["b"]}}`, nil, 400},
		"an unknown type":            {http.MethodPost, url, `{"mesh":"default","type":"x"}`, nil, 400},
		"an unknown mesh":            {http.MethodPost, url, `{"mesh":"x"}`, nil, 404},
		"GET":                        {http.MethodGet, url, "", nil, 405},
		"text":                       {http.MethodPost, url, seed, []string{"Content-Type: text/plain"}, 415},
		"another path":               {http.MethodGet, strings.TrimSuffix(url, "/tokens") + "/meshes", "", nil, 404},
		"today's path":               {http.MethodPost, strings.TrimSuffix(url, "s") + "s/user", `{"name":"a","validFor":"1h"}`, nil, 404},
		"too long":                   {http.MethodPost, url, `{"mesh":"` + strings.Repeat("a", 100_000) + `"}`, nil, 413},
		"a foreign page":             {http.MethodPost, url, seed, []string{"Origin: http://evil.example"}, 403},
		"a foreign page, as fetched": {http.MethodPost, url, seed, []string{"Sec-Fetch-Site: cross-site"}, 403},
		"a page of the chosen name":  {http.MethodPost, url, seed, []string{"Host: control-plane:5679", "Origin: http://control-plane:5679"}, 403},
		"a rebound name":             {http.MethodPost, url, seed, []string{"Host: rebind.evil.example:5679"}, 403},
		"a proxy":                    {http.MethodPost, url, seed, []string{"X-Forwarded-For: 192.0.2.1"}, 403},
		"a proxy of another sort":    {http.MethodPost, url, seed, []string{"Via: 1.1 x"}, 403},
		"a bad token":                {http.MethodPost, url, seed, []string{"Authorization: Bearer x"}, 401},
		"a preflight":                {http.MethodOptions, url, "", []string{"Origin: http://evil.example", "Access-Control-Request-Method: POST"}, 405},
	} {
		if status, text := ask(t, plain, x.method, x.url, x.body, x.headers...); status != x.status {
			t.Errorf("%s: status %d, want %d: %s", name, status, x.status, text)
		}
	}
	// It is for this machine alone, and without TLS.
	if status, text := ask(t, plain, http.MethodPost, strings.Replace(url, "http", "https", 1), seed); status != 0 {
		t.Errorf("TLS was answered: %d %s", status, text)
	}
	for _, ip := range addresses(t) {
		if status, _ := ask(t, plain, http.MethodPost, strings.Replace(url, "127.0.0.1", ip, 1), seed); status != 0 {
			t.Errorf("it is open at %s", ip)
		}
	}
	// kumactl of 0.7 finds it by the catalog.
	if status, text := ask(t, plain, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/catalog", cfg.APIServer.HTTP.Port), ""); status != 200 || !strings.Contains(text, fmt.Sprintf("http://localhost:%d", cfg.AdminServer.Local.Port)) || strings.Contains(text, "publicUrl") {
		t.Errorf("catalog: %d %s", status, text)
	}
}

// addresses are this machine's, but for loopback.
func addresses(t *testing.T) (out []string) {
	t.Helper()
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
			out = append(out, n.IP.String())
		}
	}
	return out
}

// The public form of the admin server: TLS, and a certificate of the directory,
// which may change while it runs. The local one goes on beside it, on the same
// port.
func TestAdminServerPublic(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct {
		ownPort bool
		at      string
	}{"one port, all interfaces": {at: ""}, "one port, one interface": {at: "127.0.0.2"}, "one port, loopback": {at: "127.0.0.1"}, "two ports": {ownPort: true, at: "127.0.0.1"}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			serverCert, serverKey := clientPair(t, t.TempDir(), "server", "server", "localhost", "127.0.0.1", "127.0.0.2")
			mine, mineKey := clientPair(t, dir, "mine", "client")
			other, otherKey := clientPair(t, t.TempDir(), "other", "client")
			cfg := config(t)
			a := &cfg.AdminServer
			a.Local.Port = freePort(t)
			a.Public = cp.AdminPublic{Enabled: true, Interface: x.at, TLSCertFile: serverCert, TLSKeyFile: serverKey, ClientCertsDir: dir}
			port := a.Local.Port
			if x.ownPort {
				port = freePort(t)
				a.Public.Port = port
			}
			cfg.General.TLSReloadInterval = 20 * time.Millisecond
			run(t, cfg)
			host := x.at
			if host == "" {
				host = "localhost"
			}
			url := fmt.Sprintf("https://%s:%d/tokens", host, port)
			first := caller(t, serverCert, mine, mineKey)
			if status, text := ask(t, first, http.MethodPost, url, seed); status != 200 || claims(t, text)["Name"] != "dp-echo-1" {
				t.Errorf("with a certificate: %d %s", status, text)
			}
			if status, text := ask(t, caller(t, serverCert), http.MethodPost, url, seed); status != 0 {
				t.Errorf("without a certificate: %d %s", status, text)
			}
			if status, text := ask(t, caller(t, serverCert, other, otherKey), http.MethodPost, url, seed); status != 0 {
				t.Errorf("with another certificate: %d %s", status, text)
			}
			if status, text := ask(t, caller(t, serverCert, serverCert, serverKey), http.MethodPost, url, seed); status != 0 {
				t.Errorf("with the server's certificate: %d %s", status, text)
			}
			local := fmt.Sprintf("http://127.0.0.1:%d/tokens", a.Local.Port)
			if status, text := ask(t, caller(t, ""), http.MethodPost, local, seed); status != 200 {
				t.Errorf("on this machine: %d %s", status, text)
			}
			if x.at == "" {
				for _, ip := range addresses(t) {
					if status, _ := ask(t, caller(t, ""), http.MethodPost, fmt.Sprintf("http://%s:%d/tokens", ip, port), seed); status != 0 {
						t.Errorf("without TLS it is open at %s", ip)
					}
				}
			}
			var index struct{ AdminServerPort, HTTPSPort uint32 }
			if _, text := ask(t, caller(t, ""), http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", cfg.APIServer.HTTP.Port), ""); json.Unmarshal([]byte(text), &index) != nil || index.AdminServerPort != port || index.HTTPSPort != cfg.APIServer.HTTPS.Port {
				t.Errorf("the index says %s", text)
			}
			// Another certificate is put there in place of the first.
			text, err := os.ReadFile(other)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, "mine.pem"), text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(patience); ; {
				if status, _ := ask(t, caller(t, serverCert, other, otherKey), http.MethodPost, url, seed); status == 200 {
					break
				}
				if time.Now().After(end) {
					t.Fatal("the new certificate is not taken")
				}
			}
			if status, text := ask(t, first, http.MethodPost, url, seed); status != 0 {
				t.Errorf("with the certificate that was taken out: %d %s", status, text)
			}
		})
	}
}

// A door that can't be opened is not said to be open.
func TestAdminServerPortInUse(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	cfg, yes := config(t), true
	cfg.AdminServer.Enabled, cfg.AdminServer.Local.Port = &yes, uint32(taken.Addr().(*net.TCPAddr).Port)
	var log bytes.Buffer
	if _, err := cp.New(t.Context(), cfg, slog.New(slog.NewTextHandler(&log, nil))); err == nil || !strings.Contains(err.Error(), "KUMA_ADMIN_SERVER_LOCAL_PORT") {
		t.Errorf("%v", err)
	}
	if strings.Contains(log.String(), "is open") {
		t.Errorf("the log says %s", &log)
	}
}

// Where one of its two ports can't be had, the other is not kept.
func TestAdminServerKeepsNoPort(t *testing.T) {
	t.Parallel()
	for name, same := range map[string]bool{"one number": true, "two numbers": false} {
		dir := t.TempDir()
		cert, key := clientPair(t, t.TempDir(), "server", "server", "localhost")
		clientPair(t, dir, "mine", "client")
		cfg := config(t)
		cfg.AdminServer.Local.Port = freePort(t)
		public := cfg.AdminServer.Local.Port
		if !same {
			public = freePort(t)
		}
		cfg.AdminServer.Public = cp.AdminPublic{Enabled: true, Interface: "127.0.0.2", Port: public, TLSCertFile: cert, TLSKeyFile: key, ClientCertsDir: dir}
		taken, err := net.Listen("tcp", fmt.Sprint("127.0.0.2:", public))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := cp.New(t.Context(), cfg, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "KUMA_ADMIN_SERVER_PUBLIC_PORT") {
			t.Errorf("%s: %v", name, err)
		}
		_ = taken.Close()
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", cfg.AdminServer.Local.Port))
		if err != nil {
			t.Fatal(name, err)
		}
		_ = l.Close()
	}
}

// What opens the admin server, and what of its settings is refused.
func TestAdminServerSettings(t *testing.T) {
	t.Parallel()
	port := fmt.Sprint("KUMA_ADMIN_SERVER_LOCAL_PORT=", freePort(t))
	for name, c := range map[string]struct {
		env  []string
		open bool
		log  string
		err  string
	}{
		"nothing":                {},
		"its port":               {env: []string{port}, open: true, log: "it is deprecated"},
		"its port, but off":      {env: []string{port, "KUMA_ADMIN_SERVER_ENABLED=false"}},
		"on":                     {env: []string{"KUMA_ADMIN_SERVER_ENABLED=true", port}, open: true},
		"its API":                {env: []string{"KUMA_ADMIN_SERVER_APIS_DATAPLANE_TOKEN_ENABLED=true", port}, open: true},
		"no tokens":              {env: []string{"KUMA_ADMIN_SERVER_APIS_DATAPLANE_TOKEN_ENABLED=false", port}, log: "set KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE=none instead"},
		"no tokens, but tokens":  {env: []string{"KUMA_ADMIN_SERVER_APIS_DATAPLANE_TOKEN_ENABLED=false", "KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE=dpToken"}, log: "says otherwise and wins"},
		"a port too high":        {env: []string{"KUMA_ADMIN_SERVER_LOCAL_PORT=65536"}, err: "KUMA_ADMIN_SERVER_LOCAL_PORT"},
		"public without pair":    {env: []string{"KUMA_ADMIN_SERVER_PUBLIC_ENABLED=true", "KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR=/tmp"}, err: "KUMA_ADMIN_SERVER_PUBLIC_TLS_CERT_FILE"},
		"public without clients": {env: []string{"KUMA_ADMIN_SERVER_PUBLIC_ENABLED=true", "KUMA_ADMIN_SERVER_PUBLIC_TLS_CERT_FILE=a", "KUMA_ADMIN_SERVER_PUBLIC_TLS_KEY_FILE=b"}, err: "KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR"},
		"certificates of nobody": {env: []string{"KUMA_API_SERVER_AUTHN_TYPE=adminClientCerts"}, err: "KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, warnings, err := cp.Load("", c.env)
			if err == nil && c.err != "" || err != nil && (c.err == "" || !strings.Contains(err.Error(), c.err)) {
				t.Fatalf("got error %v, want one with %q", err, c.err)
			}
			if err != nil {
				return
			}
			if len(warnings) > 0 {
				t.Errorf("warnings: %q", warnings)
			}
			here := config(t)
			cfg.General.WorkDir, cfg.APIServer.HTTP, cfg.APIServer.HTTPS, cfg.DPServer.Port, cfg.Diagnostics.ServerPort = here.General.WorkDir, here.APIServer.HTTP, here.APIServer.HTTPS, here.DPServer.Port, here.Diagnostics.ServerPort
			cfg.Store.Type = "memory"
			var log bytes.Buffer
			plane, err := cp.New(t.Context(), cfg, slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			_, digits, _ := strings.Cut(port, "=")
			conn, err := net.Dial("tcp", "127.0.0.1:"+digits)
			if (err == nil) != c.open {
				t.Errorf("open %v, want %v: %v", err == nil, c.open, err)
			}
			if conn != nil {
				_ = conn.Close()
			}
			if !strings.Contains(log.String(), c.log) {
				t.Errorf("the log lacks %q:\n%s", c.log, &log)
			}
			ctx, stop := context.WithCancel(t.Context())
			stop()
			if err := plane.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// Administrators by certificate, and what stays of tokens then.
func TestAdminClientCertificates(t *testing.T) {
	dir := t.TempDir()
	mine, mineKey := clientPair(t, dir, "mine", "client")
	gate, gateKey := clientPair(t, t.TempDir(), "gate", "client")
	cfg := config(t)
	cfg.APIServer.Authn.Type, cfg.APIServer.Auth.ClientCertsDir, cfg.APIServer.HTTPS.TLSCAFile = "adminClientCerts", dir, gate
	run(t, cfg)
	ca := filepath.Join(cfg.General.WorkDir, pki.CAFile)
	url := fmt.Sprintf("https://localhost:%d", cfg.APIServer.HTTPS.Port)
	far := "X-Forwarded-For: 192.0.2.1" // not the administrator by being here
	for name, x := range map[string]struct {
		c            *http.Client
		method, path string
		status       int
		want         string
	}{
		"with a certificate":                   {caller(t, ca, mine, mineKey), http.MethodGet, "/who-am-i", 200, "mesh-system:admin"},
		"secrets":                              {caller(t, ca, mine, mineKey), http.MethodGet, "/global-secrets", 200, ""},
		"without":                              {caller(t, ca), http.MethodGet, "/global-secrets", 403, "mesh-system:anonymous"},
		"with one that is let in and no more":  {caller(t, ca, gate, gateKey), http.MethodGet, "/who-am-i", 401, ""},
		"user tokens are not issued":           {caller(t, ca, mine, mineKey), http.MethodPost, "/tokens/user", 404, ""},
		"proxies' tokens are, to the one only": {caller(t, ca), http.MethodPost, "/tokens/dataplane", 403, ""},
	} {
		if status, text := ask(t, x.c, x.method, url+x.path, `{"mesh":"default"}`, far); status != x.status || !strings.Contains(text, x.want) {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}
	if _, text := ask(t, caller(t, ca, mine, mineKey), http.MethodGet, url+"/global-secrets", ""); strings.Contains(text, "admin-user-token") {
		t.Error("an administrator's token was made, which counts for nothing")
	}
}

// Bootstrap by way of the API's port is for programs on this machine (HRD-01);
// others are told where to go.
func TestBootstrapOnAPIPort(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.APIServer.HTTP.Interface = "0.0.0.0"
	run(t, cfg)
	base := fmt.Sprintf("http://127.0.0.1:%d", cfg.APIServer.HTTP.Port)
	plain := caller(t, "")
	status, text := ask(t, plain, http.MethodGet, base+"/bootstrap", "")
	var at struct{ URL, CACert string }
	if err := json.Unmarshal([]byte(text), &at); err != nil || status != 200 || at.URL != fmt.Sprintf("https://127.0.0.1:%d", cfg.DPServer.Port) || !strings.Contains(at.CACert, "BEGIN CERTIFICATE") {
		t.Errorf("%d %s", status, text)
	}
	// What is asked with a token belongs on the other port, which has the link too.
	want := fmt.Sprintf(":%d", cfg.DPServer.Port)
	secure := caller(t, filepath.Join(cfg.General.WorkDir, pki.CAFile))
	for _, at := range []string{base, fmt.Sprintf("https://localhost:%d", cfg.APIServer.HTTPS.Port)} {
		if status, text := ask(t, secure, http.MethodPost, at+"/bootstrap", `{"mesh":"default","name":"a"}`); status != 404 || !strings.Contains(text, want) {
			t.Errorf("%s: %d %s", at, status, text)
		}
	}
	for name, headers := range map[string][]string{
		"a rebound name": {"Host: rebind.evil.example"}, "a foreign page": {"Origin: https://evil.example"}, "a proxy": {"X-Forwarded-For: 192.0.2.1"},
		"a page as fetched": {"Sec-Fetch-Site: same-site"}, "a proxy's name": {"Forwarded: for=192.0.2.1"},
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if status, text := ask(t, plain, method, base+"/bootstrap", "{}", headers...); status != 404 || !strings.Contains(text, want) || strings.Contains(text, "CERTIFICATE") {
				t.Errorf("%s, %s: %d %s", method, name, status, text)
			}
		}
	}
	for _, ip := range addresses(t) {
		if status, text := ask(t, plain, http.MethodPost, fmt.Sprintf("http://%s:%d/bootstrap", ip, cfg.APIServer.HTTP.Port), "{}"); status != 404 || !strings.Contains(text, fmt.Sprintf("https://%s:%d", ip, cfg.DPServer.Port)) {
			t.Errorf("from %s: %d %s", ip, status, text)
		}
	}
	if status, _ := ask(t, plain, http.MethodGet, base+"/catalog", ""); status != 404 {
		t.Errorf("there is a catalog without an admin server: %d", status)
	}
}
