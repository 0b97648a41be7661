package cp_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"kuma/internal/auth"
	"kuma/internal/catalog"
	"kuma/internal/conf"
	"kuma/internal/cp"
	"kuma/internal/cp/cptest"
	"kuma/internal/envoy"
	"kuma/internal/mads"
	"kuma/internal/rest"
)

// leaks finds planted secrets in texts, in the forms in which they might be
// written.
type leaks map[string]string

// plant notes a secret. Of a key in PEM each line counts.
func (l leaks) plant(what string, secret []byte) {
	add := func(form, text string) {
		if len(text) >= 12 {
			l[text] = what + form
		}
	}
	text := strings.TrimSpace(string(secret))
	if block, _ := pem.Decode(secret); block != nil {
		if block.Type == "CERTIFICATE" {
			return
		}
		// Of what PEM holds, a bundle's certificates are no secret.
		for line := range strings.Lines(string(pem.EncodeToMemory(block))) {
			if !strings.HasPrefix(line, "---") && len(line) > 40 {
				// The first line of a key says only of what kind it is.
				add(", a line of it", strings.TrimSpace(line)[8:])
			}
		}
		secret = block.Bytes
	} else {
		add("", text)
	}
	for _, form := range [][]byte{secret, []byte(text)} {
		middle := form[len(form)/3:]
		middle = middle[:min(len(middle), 29)]
		add(", in hexadecimal", hex.EncodeToString(middle))
		for shift := range 3 { // base64 depends on where it begins
			if n := (len(middle) - shift) / 3 * 3; n > 0 {
				add(", in base64", base64.RawStdEncoding.EncodeToString(middle[shift:shift+n]))
				add(", in base64", base64.RawURLEncoding.EncodeToString(middle[shift:shift+n]))
			}
		}
	}
}

func (l leaks) find(text string) []string {
	var out []string
	for needle, what := range l {
		if strings.Contains(text, needle) {
			out = append(out, what)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// legitimate are the routes that give secrets to administrators, which is what
// they are for.
func legitimate(path string) bool {
	return slices.Contains([]string{
		"/secrets", "/meshes/{mesh}/secrets", "/meshes/{mesh}/secrets/{name}", "/_kri/{kri}",
		"/global-secrets", "/global-secrets/{name}", "/globalsecrets", "/globalsecrets/{name}",
	}, path)
}

// TestNothingLeaks is HRD-20 and HRD-32: secrets of every sort are planted, and
// every route of every port is asked, as an administrator and as nobody, rightly
// and wrongly. No answer holds any of them, and neither does the log.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	const password, body, nodeToken = "planted-password-of-the-database", "planted-body-of-a-request", "planted-token-in-the-node"
	// A value of no secret field is told to who sent it, and to nobody else.
	const field = "planted-value-of-a-field"
	cfg := config(t)
	cfg.Store.Type = "memory"
	cfg.Store.Postgres.Password = conf.NewSecret(password)
	cfg.Diagnostics.DebugEndpoints = true
	older := true
	cfg.AdminServer.Enabled, cfg.AdminServer.Local.Port = &older, config(t).Diagnostics.ServerPort
	log := &watcher{what: "msg=ready ", seen: make(chan struct{})}
	logger := slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	_, warnings, err := cp.Load("", []string{"KUMA_STORE_POSTGRES_PASSWORD=" + password, "KUMA_STORE_POSTGRES_PASWORD=" + password})
	logger.Info("settings", "warnings", warnings, "error", err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	c, err := cp.New(ctx, cfg, logger)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-log.seen:
	case <-time.After(patience):
		t.Fatal("the control plane is not ready")
	}

	ca, err := os.ReadFile(filepath.Join(cfg.General.WorkDir, "kuma-cp.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	web := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "localhost"}}, Timeout: patience}
	api := fmt.Sprintf("http://127.0.0.1:%d", cfg.APIServer.HTTP.Port)
	// Authorization "Basic" is nobody's credential, and not that of a local
	// administrator either.
	do := func(admin bool, method, url, body string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		if !admin {
			r.Header.Set("Authorization", "Basic bm9ib2R5")
		}
		resp, err := web.Do(r)
		if err != nil {
			t.Fatalf("%s %s: %v", method, url, err)
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatalf("%s %s: %v", method, url, err)
		}
		var b strings.Builder
		_ = resp.Header.Write(&b)
		return resp.StatusCode, b.String() + string(text)
	}
	must := func(method, path, body string, codes ...int) string {
		t.Helper()
		code, said := do(true, method, api+path, body)
		if !slices.Contains(codes, code) {
			t.Fatalf("%s %s: %d %s", method, path, code, said)
		}
		_, said, _ = strings.Cut(said, "\r\n")
		return said[strings.LastIndex(said, "\r\n")+1:]
	}

	// What is planted.
	planted := leaks{}
	planted.plant("the database's password", []byte(password))
	planted.plant("a request's body", []byte(body))
	planted.plant("a token in the node", []byte(nodeToken))
	must("PUT", "/meshes/default", `{"type":"Mesh","name":"default","mtls":{"enabledBackend":"ca","backends":[{"name":"ca","type":"builtin"}]}}`, 200, 201)
	must("PUT", "/meshes/default/secrets/planted", `{"type":"Secret","mesh":"default","name":"planted","data":"`+base64.StdEncoding.EncodeToString([]byte("planted-value-of-a-secret-of-a-mesh"))+`"}`, 201)
	must("PUT", "/global-secrets/planted", `{"type":"GlobalSecret","name":"planted","data":"`+base64.StdEncoding.EncodeToString([]byte("planted-value-of-a-secret-of-all"))+`"}`, 201)
	for _, list := range []string{"/secrets", "/global-secrets"} {
		var all struct {
			Items []struct {
				Name string
				Data []byte
			}
		}
		if err := json.Unmarshal([]byte(must("GET", list, "", 200)), &all); err != nil || len(all.Items) < 2 {
			t.Fatalf("%s: %v, %d secrets", list, err, len(all.Items))
		}
		for _, s := range all.Items {
			planted.plant("the secret "+s.Name, s.Data)
		}
	}
	files, _ := filepath.Glob(filepath.Join(cfg.General.WorkDir, "*.key"))
	if len(files) == 0 {
		t.Fatal("the control plane has no key in its work directory: this test looks at the wrong place")
	}
	for _, f := range files {
		key, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		planted.plant("the file "+filepath.Base(f), key)
	}
	must("PUT", "/meshes/default/dataplanes/planted", cptest.Dataplane("default", "planted", "web", "web"), 201)
	token := strings.TrimSpace(must("POST", "/tokens/dataplane", `{"mesh":"default","name":"planted"}`, 200))
	planted.plant("a dataplane token", []byte(token))
	user := strings.TrimSpace(must("POST", "/tokens/user", `{"name":"jane","groups":["team"],"validFor":"1h"}`, 200))
	planted.plant("a user token", []byte(user))

	// A proxy without a link: its key was made by the control plane.
	conn, err := grpc.NewClient(fmt.Sprintf("localhost:%d", cfg.DPServer.Port), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots})))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	md := cptest.Metadata("i1", "")
	md["dataplane.token"] = nodeToken
	ads := cptest.NewADS(cptest.ADSConfig{Conn: conn, Mesh: "default", Name: "planted", Token: token, Metadata: md})
	if err := ads.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer ads.Close()
	within, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	view, err := ads.Wait(within, func(v cptest.View) bool { return len(v.Resources[envoy.SecretType]) > 0 })
	if err != nil {
		t.Fatal(err)
	}
	keys := 0
	for _, r := range view.Resources[envoy.SecretType] {
		var s tlsv3.Secret
		if err := r.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		if key := s.GetTlsCertificate().GetPrivateKey().GetInlineBytes(); len(key) > 0 {
			planted.plant("a proxy's key", key)
			keys++
		}
	}
	if keys == 0 || len(planted) < 30 {
		t.Fatalf("%d keys were sent to the proxy, %d needles in all: nothing is tested", keys, len(planted))
	}

	// Every route of the API.
	asked := 0
	look := func(what, said string) {
		asked++
		if found := planted.find(said); len(found) > 0 {
			t.Errorf("%s shows %s", what, strings.Join(found, "; "))
		}
	}
	server, err := rest.New(rest.Config{Kinds: catalog.Kinds(), Issuer: new(auth.Issuer)})
	if err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("{mesh}", "default", "{name}", "planted", "{kri}", "kri_dp_default_default__planted_", "{service}", "web", "{key}", "1", "{zone}", "default")
	bad := []string{
		`"` + field + `"`, `{"type":"` + field + `"}`, `{"data":"` + body + `"`, `{"name":"planted","mesh":"default","data":"` + body + `!","` + "x" + `":{"y":"` + body + `"}}`,
		`{"name":"` + `a` + `","mesh":"default","type":"dataplane","validFor":"` + field + `"}`,
	}
	for _, route := range server.Routes() {
		path := fill.Replace(route.Path)
		if strings.Contains(path, "{") {
			path = strings.NewReplacer("{", "", "}", "").Replace(path)
		}
		switch route.Method {
		case http.MethodGet:
			for _, query := range []string{"", "?format=json&include=all&shadow=true"} {
				_, said := do(false, "GET", api+path+query, "")
				look("GET "+path+query+" by nobody", said)
				if _, said := do(true, "GET", api+path+query, ""); !legitimate(route.Path) {
					look("GET "+path+query+" by an administrator", said)
				}
			}
		case http.MethodDelete:
			_, said := do(false, "DELETE", api+path, "")
			look("DELETE "+path+" by nobody", said)
		default:
			for _, b := range bad {
				_, said := do(false, route.Method, api+path, b)
				look(route.Method+" "+path+" by nobody", said)
				if strings.HasSuffix(path, "planted") { // what is there stays as it is
					continue
				}
				_, said = do(true, route.Method, api+path, b)
				look(route.Method+" "+path+" by an administrator", said)
			}
		}
	}
	for _, b := range bad {
		for _, path := range []string{"/meshes/default/secrets/other", "/global-secrets/other", "/meshes/default/meshtimeouts/other", "/meshes/other", "/no/such/route", "/meshes/default/dataplanes/other"} {
			for _, admin := range []bool{true, false} {
				code, said := do(admin, "PUT", api+path, b)
				if code < 400 {
					t.Errorf("PUT %s with %s: %d", path, b, code)
				}
				look("PUT "+path, said)
			}
		}
	}
	// A credential that is wrong is not said again, nor one that is right and
	// not enough.
	for _, credential := range []string{"Bearer " + user + "x", "Bearer " + user, "Bearer " + body} {
		for _, path := range []string{"/meshes", "/secrets", "/who-am-i", "/config", "/tls-report"} {
			r, _ := http.NewRequestWithContext(t.Context(), "GET", api+path, http.NoBody)
			r.Header.Set("Authorization", credential)
			resp, err := web.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			said, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			look("GET "+path+" with a credential", string(said))
		}
	}

	// The other ports.
	https := fmt.Sprintf("https://localhost:%d", cfg.APIServer.HTTPS.Port)
	proxies := fmt.Sprintf("https://localhost:%d", cfg.DPServer.Port)
	diagnostics := fmt.Sprintf("http://127.0.0.1:%d", cfg.Diagnostics.ServerPort)
	monitoring := fmt.Sprintf("http://127.0.0.1:%d", cfg.MonitoringAssignmentServer.Port)
	tokens := fmt.Sprintf("http://127.0.0.1:%d", cfg.AdminServer.Local.Port)
	for _, admin := range []bool{true, false} {
		for _, url := range []string{
			https + "/", https + "/config", https + "/meshes/default/dataplanes/planted/_overview", https + "/meshes/default/dataplanes/planted/_config",
			proxies + "/", proxies + "/bootstrap", proxies + "/config", proxies + "/metrics", proxies + "/secrets",
			diagnostics + "/", diagnostics + "/healthy", diagnostics + "/ready", diagnostics + "/metrics", diagnostics + "/config", diagnostics + "/logging",
			diagnostics + "/secrets", diagnostics + "/debug/pprof/", diagnostics + "/debug/pprof/cmdline", diagnostics + "/debug/pprof/goroutine?debug=2",
			diagnostics + "/debug/pprof/heap?debug=1", diagnostics + "/debug/pprof/allocs?debug=1", diagnostics + "/debug/pprof/threadcreate?debug=1", diagnostics + "/debug/vars",
			monitoring + "/", monitoring + mads.Path, monitoring + "/metrics", monitoring + "/config", tokens + "/", tokens + "/tokens", tokens + "/config", tokens + "/secrets",
		} {
			code, said := do(admin, "GET", url, "")
			look("GET "+url, said)
			if strings.Contains(url, "/debug/pprof") && (code == http.StatusOK) != admin {
				t.Errorf("%s by an administrator (%t): %d", url, admin, code)
			}
		}
		for _, b := range append(bad, `{"mesh":"default","name":"planted","dataplaneToken":"`+body+`","dataplaneResource":"`+body+`"}`,
			`{"mesh":"default","name":"planted","dataplaneToken":"`+token+`x"}`) {
			_, said := do(admin, "POST", proxies+"/bootstrap", b)
			look("POST /bootstrap", said)
			_, said = do(admin, "PUT", diagnostics+"/logging", b)
			look("PUT /logging", said)
			for _, url := range []string{monitoring + mads.Path, tokens + "/tokens", tokens + "/tokens/dataplane"} {
				_, said = do(admin, "POST", url, b)
				look("POST "+url, said)
			}
		}
	}
	if asked < 300 {
		t.Errorf("only %d answers were looked at", asked)
	}
	planted.plant("a field", []byte(field))
	if found := planted.find(log.String()); len(found) > 0 {
		t.Errorf("the log shows %s", strings.Join(found, "; "))
	}
	t.Logf("%d answers and %d bytes of log hold none of %d needles", asked, len(log.String()), len(planted))
}

// A needle that is there is found, in each of its forms.
func TestLeaksAreFound(t *testing.T) {
	secret := []byte("planted-value-of-a-secret-of-a-mesh")
	l := leaks{}
	l.plant("it", secret)
	for _, text := range []string{
		"a " + string(secret) + " b", base64.StdEncoding.EncodeToString(secret), base64.StdEncoding.EncodeToString(append([]byte("x"), secret...)),
		base64.URLEncoding.EncodeToString(append([]byte("xy"), secret...)), hex.EncodeToString(secret),
	} {
		if len(l.find(text)) == 0 {
			t.Errorf("%q is not found", text)
		}
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte(strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyz", 5))})
	l = leaks{}
	l.plant("a key", key)
	quoted, _ := json.Marshal(string(key))
	for _, text := range []string{string(key), string(quoted), base64.StdEncoding.EncodeToString(key), base64.StdEncoding.EncodeToString(append([]byte("z"), key...))} {
		if len(l.find(text)) == 0 {
			t.Errorf("%q is not found", text)
		}
	}
	if found := l.find("nothing of it"); len(found) > 0 {
		t.Errorf("found %s where there is nothing", found)
	}
}
