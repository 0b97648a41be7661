package rest_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/rest"
)

// everything has all optional parts, so that all routes are there.
func everything(c *rest.Config, _ *auth.AccessConfig) {
	c.GUI = fstest.MapFS{"index.html": {Data: []byte("<!doctype html>")}, "app.js": {Data: []byte("1")}}
	c.Inspector, c.Explainer, c.TLSReporter = fakeProxy{}, fakeProxy{}, fakeProxy{}
}

// fakeProxy is what stands behind the inspecting routes.
type fakeProxy struct{}

func (fakeProxy) Inspect(_ context.Context, mesh, name string, q rest.Inspection) ([]byte, error) {
	if name == "gone" {
		return nil, errs.New(errs.Unavailable, "the proxy %q of mesh %q is not connected", name, mesh)
	}
	if q.What != "config_dump" {
		return []byte("a::b::1\n"), nil
	}
	return []byte(`{"configs":[{"headers":[{"key":"authorization","value":"tok"}],"privateKey":{"inlineBytes":"S0VZ"},"n":12345678901234567890}]}`), nil
}

func (fakeProxy) Config(_ context.Context, _, _ string, shadow bool) (json.RawMessage, error) {
	if shadow {
		return json.RawMessage(`{"t":{"a":{"v":2},"c/d":[1,2]}}`), nil
	}
	return json.RawMessage(`{"t":{"a":{"v":1,"privateKey":{"inlineString":"-----BEGIN EC PRIVATE KEY-----"}},"c/d":[1]}}`), nil
}

func (fakeProxy) Attachments(context.Context, string, string) ([]rest.Attachment, error) {
	return []rest.Attachment{{Type: "inbound", Name: "192.0.2.1:8080:8080", Service: "web"}}, nil
}

func (fakeProxy) Rules(context.Context, string, string) ([]rest.RuleSet, error) {
	return []rest.RuleSet{{Type: "MeshTimeout", ToRules: []any{map[string]any{"conf": 1}}}}, nil
}

func (fakeProxy) Selected(context.Context, *resource.Resource) ([]*resource.Resource, error) {
	return nil, nil
}

func (fakeProxy) TLSReport(_ context.Context, mesh string) (rest.TLSReport, error) {
	if mesh == "gone" {
		return rest.TLSReport{}, errs.New(errs.NotFound, "there is no mesh %q", mesh)
	}
	return rest.TLSReport{Store: "memory", Links: []rest.TLSLink{{Kind: "proxy", Mesh: mesh}}}, nil
}

// TestAccess is HRD-03: every route, every method, every role. A route that is
// not in the table fails, so a new one needs an entry here as well as a rule.
func TestAccess(t *testing.T) {
	// may: anonymous, user, administrator.
	const (
		all, users, admins = "yyy", "-yy", "--y"
	)
	rules := map[string]string{
		"everyone": all, "any user": users, "view metadata": users, "view xds": users, "view stats": users, "view clusters": users,
		"generate dataplane token": admins, "generate user token": admins, "generate zone token": admins, "read the KRI's kind": users, "view the TLS report": admins,
		"rotate the control plane's authority": admins,
		"read Secret":                          admins, "write Secret": admins, "read GlobalSecret": admins, "write GlobalSecret": admins,
	}
	for _, k := range kinds() {
		if !k.Admin {
			rules["read "+k.Name], rules["write "+k.Name] = users, users
		}
	}
	// Few routes are for everyone, and these are they.
	open := map[string]bool{"GET /": true, "GET /gui": true, "GET /gui/{file...}": true}
	closed := newAPI(t, everything)
	contract := newAPI(t, everything, func(_ *rest.Config, c *auth.AccessConfig) { c.Anonymous = auth.AnonymousContract })
	seen := 0
	for _, route := range closed.server.Routes() {
		want, ok := rules[route.Access]
		if !ok {
			t.Errorf("%s %s: the rule %q is not in the table", route.Method, route.Path, route.Access)
			continue
		}
		if (want == all) != open[route.Method+" "+route.Path] {
			t.Errorf("%s %s: open is %v", route.Method, route.Path, want == all)
		}
		path := strings.NewReplacer("{mesh}", "default", "{name}", "x", "{view}", "xyz", "{kri}", "kri_m____default_", "{file...}", "app.js").Replace(route.Path)
		for _, method := range []string{"GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"} {
			got := ""
			for _, bearer := range []string{"", closed.user, closed.admin} {
				w := closed.do(bearer, method, path, "{}")
				switch {
				case w.Code == http.StatusForbidden || w.Code == http.StatusUnauthorized:
					got += "-"
				case w.Code == http.StatusMethodNotAllowed && w.Body.String() == "405: Method Not Allowed" || w.Code == http.StatusNotFound && strings.HasPrefix(w.Body.String(), "404: "):
					got += "0"
				default:
					got += "y"
				}
			}
			switch {
			case method == route.Method || method == "HEAD" && route.Method == "GET":
				seen++
				if got != want {
					t.Errorf("%s %s: %s, want %s", method, path, got, want)
				}
			case got != "000" && !has(closed, method, route.Path):
				t.Errorf("%s %s is no route, and answers %s", method, path, got)
			}
		}
		// What the contract leaves open is open with its setting, and no more.
		loose := want
		if want == users {
			loose = all
		}
		w := contract.do("", route.Method, path, "{}")
		if refused := w.Code == http.StatusForbidden || w.Code == http.StatusUnauthorized; refused != (loose == admins) {
			t.Errorf("as the contract, anonymous %s %s: %d", route.Method, path, w.Code)
		}
		// A credential that does not verify opens nothing.
		if w := contract.do("x.y.z", route.Method, path, "{}"); want != all && w.Code != http.StatusUnauthorized {
			t.Errorf("bad credential, %s %s: %d", route.Method, path, w.Code)
		}
	}
	if seen < 60 {
		t.Errorf("only %d routes were seen", seen)
	}
}

func has(a *api, method, path string) bool {
	for _, r := range a.server.Routes() {
		if r.Path == path && (r.Method == method || r.Method == "GET" && method == "HEAD") {
			return true
		}
	}
	return false
}

// TestLocalAdmin: what package auth decides reaches the routes (HRD-01).
func TestLocalAdmin(t *testing.T) {
	a := newAPI(t)
	var body string
	web := httptest.NewServer(a.h)
	defer web.Close()
	get := func(headers ...string) int {
		r, err := http.NewRequestWithContext(t.Context(), "GET", web.URL+"/meshes/default/secrets", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range headers {
			k, v, _ := strings.Cut(h, ": ")
			r.Header.Set(k, v)
			if k == "Host" {
				r.Host = v
			}
		}
		resp, err := web.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		b := make([]byte, 4096)
		n, _ := resp.Body.Read(b)
		body = string(b[:n])
		if resp.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("CORS is open: %v", resp.Header)
		}
		return resp.StatusCode
	}
	if code := get(); code != 200 {
		t.Errorf("local: %d %s", code, body)
	}
	for _, h := range []string{"Origin: https://evil.example", "Host: evil.example", "X-Forwarded-For: 127.0.0.1", "Sec-Fetch-Site: cross-site", "Origin: null"} {
		if code := get(h); code != 403 {
			t.Errorf("%s: %d %s", h, code, body)
		}
	}
	// A credential wins over being local, the worse one too.
	if code := get("Authorization: Bearer " + a.user); code != 403 {
		t.Errorf("as alice: %d", code)
	}
	if code := get("Authorization: Bearer x"); code != 401 {
		t.Errorf("bad credential: %d", code)
	}
}

func TestCORS(t *testing.T) {
	a := newAPI(t, func(c *rest.Config, _ *auth.AccessConfig) {
		c.CORSAllowedDomains = []string{`https://.*\.good\.example`}
	})
	for origin, allowed := range map[string]bool{
		"https://a.good.example": true, "https://a.good.example.evil.example": false, "http://a.good.example": false, "https://evil.example/?https://a.good.example": false,
	} {
		w := a.do(a.user, "GET", "/meshes", "", "Origin: "+origin)
		if got := w.Header().Get("Access-Control-Allow-Origin"); (got == origin) != allowed || got != "" && !allowed {
			t.Errorf("%s: %q", origin, got)
		}
	}
	w := a.do("", "OPTIONS", "/meshes", "", "Origin: https://a.good.example", "Access-Control-Request-Method: PUT")
	if w.Code != 200 || !strings.Contains(w.Header().Get("Access-Control-Allow-Methods"), "PUT") || w.Header().Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("preflight: %d %v", w.Code, w.Header())
	}
}

// TestLimits is HRD-25: what is too large is refused, at its limit.
func TestLimits(t *testing.T) {
	a := newAPI(t)
	pad := strings.Repeat("a", resource.MaxSize)
	w := a.put("/zones/z", `{"type":"Zone","name":"`+pad+`"}`)
	if got := parseError(t, w); got.Status != 413 || got.Detail != "the request's body is too large, the limit is 4194304 bytes" {
		t.Errorf("body: %+v", got)
	}
	if got := parseError(t, a.do(a.admin, "POST", "/tokens/dataplane", `{"mesh":"default","name":"`+strings.Repeat("a", 65<<10)+`"}`)); got.Status != 413 {
		t.Errorf("token request: %+v", got)
	}
	a.want(a.put("/zones/z", strings.Repeat("[", 100_000)), 400)
	a.want(a.put("/meshes/m", `{"type":"Mesh","name":"m","mtls":`+strings.Repeat(`{"a":`, 5000)+"1"+strings.Repeat("}", 5001)), 400)
}

// panicky panics.
type panicky struct{ fakeProxy }

func (panicky) Inspect(context.Context, string, string, rest.Inspection) ([]byte, error) {
	panic("a slip")
}

// TestPanic is HRD-09: a handler's panic is answered and logged, and ends
// nothing.
func TestPanic(t *testing.T) {
	a := newAPI(t, func(c *rest.Config, _ *auth.AccessConfig) { c.Inspector = panicky{} })
	a.want(a.put("/meshes/default/dataplanes/web-1", dataplane), 201)
	got := parseError(t, a.get("/meshes/default/dataplanes/web-1/xds"))
	if d := cmp.Diff(stdError{500, "Internal Server Error", "Internal Server Error", nil}, got); d != "" {
		t.Error(d)
	}
	if !strings.Contains(a.log.String(), "a slip") {
		t.Error("the panic is not in the log")
	}
	a.want(a.get("/meshes"), 200)
}

// TestNoSecretsInLogs is HRD-32: whatever goes wrong with a secret, neither the
// log nor the answer holds it.
func TestNoSecretsInLogs(t *testing.T) {
	a := newAPI(t)
	const planted = "UExBTlRFRC1TRUNSRVQ" // not a whole base64 text
	for _, body := range []string{
		`{"type":"Secret","mesh":"default","name":"s","data":"` + planted + `"}`,
		`{"type":"Secret","mesh":"default","name":"s","dta":"` + planted + `"}`,
		`{"type":"Secret","mesh":"default","name":"s","data":"` + planted,
		`{"type":"Secret","mesh":"default","name":"other","data":"` + planted + `="}`,
		`{"type":"Secret","mesh":"default","name":"s","data":"` + planted + `="}`,
	} {
		w := a.put("/meshes/default/secrets/s", body)
		if strings.Contains(w.Body.String(), planted) {
			t.Errorf("the answer holds the secret: %s", w.Body)
		}
		a.do(planted+".e30.e30", "PUT", "/meshes/default/secrets/s", body)
	}
	a.want(a.get("/meshes/default/secrets/s"), 200)
	if strings.Contains(a.log.String(), planted) {
		t.Errorf("the log holds the secret:\n%s", a.log)
	}
}

func TestInspect(t *testing.T) {
	a := newAPI(t, everything)
	a.want(a.put("/meshes/default/dataplanes/web-1", dataplane), 201)
	a.want(a.put("/meshes/default/dataplanes/gone", strings.Replace(dataplane, "web-1", "gone", 1)), 201)
	const one = "/meshes/default/dataplanes/web-1"
	w := a.get(one + "/xds")
	a.want(w, 200, `{"configs":[{"headers":[{"key":"authorization","value":"[redacted]"}],"n":12345678901234567890,"privateKey":{"inlineBytes":"[redacted]"}}]}`)
	if ct := w.Header().Get("Content-Type"); ct != "application/json" {
		t.Errorf("xds is %q", ct)
	}
	a.want(a.get(one+"/stats"), 200, "a::b::1\n")
	if ct := a.get(one + "/stats?format=json").Header().Get("Content-Type"); ct != "application/json" {
		t.Errorf("stats as JSON is %q", ct)
	}
	a.want(a.get("/meshes/default/dataplanes/gone/clusters"), 503)
	a.want(a.get(one+"/_config"), 200, `{
 "xds": {
  "t": {
   "a": {
    "privateKey": {
     "inlineString": "[redacted]"
    },
    "v": 1
   },
   "c/d": [
    1
   ]
  }
 }
}
`)
	w = a.get(one + "/_config?shadow=true&include=diff")
	a.want(w, 200)
	var diff struct {
		Diff []struct {
			Op, Path string
			Value    any
		}
	}
	if err := json.Unmarshal(w.Body.Bytes(), &diff); err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, d := range diff.Diff {
		got += d.Op + " " + d.Path + "\n"
	}
	if want := "remove /t/a/privateKey\nreplace /t/a/v\nadd /t/c~1d/-\n"; got != want {
		t.Errorf("diff:\n%s", got)
	}
	a.want(a.get(one+"/_config?include=all"), 400)
	a.want(a.get(one+"/_config?shadow=maybe"), 400)
	a.want(a.get(one+"/policies"), 200, "{\n \"total\": 1,\n \"items\": [\n  {\n   \"type\": \"inbound\",\n   \"name\": \"192.0.2.1:8080:8080\",\n   \"service\": \"web\",\n   \"matchedPolicies\": {}\n  }\n ],\n \"kind\": \"SidecarDataplane\"\n}\n")
	w = a.get(one + "/_rules")
	a.want(w, 200)
	for _, part := range []string{`"httpMatches": []`, `"type": "MeshTimeout"`, `"fromRules": []`, `"warnings": []`, `"kri": "kri_dp_default_zone-1__web-1_"`} {
		if !strings.Contains(w.Body.String(), part) {
			t.Errorf("rules lack %s:\n%s", part, w.Body)
		}
	}
	a.want(a.put("/meshes/default/meshservices/web", `{"type":"MeshService","mesh":"default","name":"web","spec":{"selector":{"dataplaneTags":{"kuma.io/service":"web"}},"ports":[{"port":80}]}}`), 201)
	for _, path := range []string{"/meshes/default/meshservices/web/_dataplanes", "/meshes/default/meshservices/web/_resources/dataplanes"} {
		w := a.get(path)
		a.want(w, 200)
		if !strings.Contains(w.Body.String(), `"total": 2`) {
			t.Errorf("%s: %s", path, w.Body)
		}
	}
	none := newAPI(t)
	none.want(none.put("/meshes/default/dataplanes/web-1", dataplane), 201)
	for _, path := range []string{"/xds", "/_config", "/policies", "/_rules"} {
		none.want(none.get(one+path), 503)
	}
}

// The TLS report is for administrators; a caller is noted once it is known who
// it is.
func TestTLSReport(t *testing.T) {
	var called []string
	a := newAPI(t, everything, func(c *rest.Config, _ *auth.AccessConfig) {
		c.Called = func(_ *http.Request, who auth.Caller) { called = append(called, who.Name()) }
	})
	w := a.get("/tls-report?mesh=default")
	a.want(w, 200)
	if !strings.Contains(w.Body.String(), `"store": "memory"`) || !strings.Contains(w.Body.String(), `"mesh": "default"`) {
		t.Errorf("report: %s", w.Body)
	}
	a.want(a.get("/tls-report?mesh=gone"), 404)
	a.want(a.do(a.user, "GET", "/tls-report", ""), 403)
	a.want(a.do("", "GET", "/tls-report", ""), 403)
	a.want(a.do("x.y.z", "GET", "/tls-report", ""), 401)
	if d := cmp.Diff([]string{"mesh-system:admin", "mesh-system:admin", "alice", auth.AnonymousName}, called); d != "" {
		t.Error(d)
	}
	newAPI(t).want(newAPI(t).get("/tls-report"), 503)
}

func TestGUI(t *testing.T) {
	a := newAPI(t, everything)
	for path, want := range map[string]string{"/gui": "<!doctype html>", "/gui/": "<!doctype html>", "/gui/meshes/default": "<!doctype html>", "/gui/app.js": "1"} {
		w := a.do("", "GET", path, "")
		a.want(w, 200, want)
		if csp := w.Header().Get("Content-Security-Policy"); !strings.Contains(csp, "script-src 'self'") || strings.Contains(csp, "unsafe") {
			t.Errorf("%s: %q", path, csp)
		}
	}
	if w := a.do("", "GET", "/", ""); !strings.Contains(w.Body.String(), `"gui": "/gui"`) {
		t.Errorf("index: %s", w.Body)
	}
}

func TestBasePath(t *testing.T) {
	a := newAPI(t, func(c *rest.Config, _ *auth.AccessConfig) { c.BasePath = "/kuma/" })
	a.want(a.get("/kuma/meshes/default"), 200)
	a.want(a.get("/kuma"), 200)
	a.want(a.get("/meshes/default"), 404, "404: Page Not Found")
	a.want(a.get("/kumaX/meshes"), 404, "404: Page Not Found")
	a.want(a.put("/kuma/zones/a", `{"type":"Zone","name":"a"}`), 201)
	a.want(a.put("/kuma/zones/b", `{"type":"Zone","name":"b"}`), 201)
	if w := a.get("/kuma/zones?size=1"); !strings.Contains(w.Body.String(), `"next": "http://cp.example:5681/kuma/zones?offset=1&size=1"`) {
		t.Errorf("next: %s", w.Body)
	}
}
