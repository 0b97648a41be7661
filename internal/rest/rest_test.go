package rest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/rest"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/token"
)

// kinds are those of package mesh: policies come from packages that this one
// must not need.
func kinds() []*resource.Kind {
	return []*resource.Kind{
		mesh.Meshes.Kind, mesh.Dataplanes.Kind, mesh.DataplaneInsights.Kind, mesh.Zones.Kind, mesh.Secrets.Kind,
		mesh.GlobalSecrets.Kind, mesh.MeshServices.Kind, mesh.TrafficPermissions.Kind,
	}
}

// api is an API in front of a store in memory.
type api struct {
	t      *testing.T
	store  store.Store
	issuer *auth.Issuer
	server *rest.Server
	h      http.Handler
	log    *bytes.Buffer
	// admin is a token of the administrator, user one of somebody.
	admin, user string
}

func newAPI(t *testing.T, change ...func(*rest.Config, *auth.AccessConfig)) *api {
	t.Helper()
	a := &api{t: t, store: memstore.New(), log: &bytes.Buffer{}}
	log := slog.New(slog.NewTextHandler(a.log, nil))
	secrets := admit.Secrets{Store: a.store}
	var writes []store.Write
	for _, prefix := range []string{token.UserKeyPrefix, token.ZoneKeyPrefix} {
		writes = append(writes, store.Create(mesh.GlobalSecrets.Make("", token.KeyName(prefix, 1), &mesh.SecretSpec{Data: signingKey(t)})))
	}
	writes = append(writes,
		store.Create(mesh.Meshes.Make("", "default", &mesh.MeshSpec{})),
		store.Create(mesh.Secrets.Make("default", token.KeyName(token.DataplaneKeyPrefix("default"), 1), &mesh.SecretSpec{Data: signingKey(t)})))
	if _, err := a.store.Put(t.Context(), writes...); err != nil {
		t.Fatal(err)
	}
	users, proxies := auth.DefaultUsers(), auth.DefaultProxies()
	// One sort of token is not issued, for the answer to that.
	proxies.ZoneProxy.ZoneToken.EnableIssuer = t.Name() != "TestIssuerOff"
	a.issuer = auth.NewIssuer(auth.IssuerConfig{Users: users, Proxies: proxies, Secrets: secrets, Log: log})
	var err error
	if a.admin, err = a.issuer.AdminToken(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a.user, err = a.issuer.User(t.Context(), auth.UserRequest{Name: "alice", Groups: []string{"team-a"}, ValidFor: "1h"}); err != nil {
		t.Fatal(err)
	}
	authn, err := auth.NewAuthenticator(auth.AuthenticatorConfig{
		Users: users, Secrets: secrets, Log: log,
		Owner: func(netip.AddrPort, netip.AddrPort) (uint32, bool) { return uint32(os.Getuid()), true },
	})
	if err != nil {
		t.Fatal(err)
	}
	cfg := rest.Config{
		Kinds: kinds(), Store: a.store, Authn: authn, Issuer: a.issuer, Log: log,
		Index:    rest.Index{Product: "Kuma", Version: "1.2.3", InstanceID: "cp-1", ClusterID: "c", Hostname: "h"},
		Settings: func() ([]byte, error) { return []byte(`{"store":{"type":"memory","password":"hunter2"}}`), nil },
	}
	access := auth.DefaultAccess()
	for _, c := range change {
		c(&cfg, &access)
	}
	if cfg.Access, err = auth.NewAccess(access); err != nil {
		t.Fatal(err)
	}
	cfg.Gate = admit.New(admit.Config{Store: a.store, Access: cfg.Access, Zone: "zone-1", Log: log})
	if a.server, err = rest.New(cfg); err != nil {
		t.Fatal(err)
	}
	a.h = a.server.Handler()
	return a
}

// oneKey serves all tests: making RSA keys is slow.
var oneKey = sync.OnceValues(token.NewSigningKey)

func signingKey(t *testing.T) []byte {
	t.Helper()
	b, err := oneKey()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// do sends a request as the holder of a token; headers are "Name: value".
func (a *api) do(bearer, method, path, body string, headers ...string) *httptest.ResponseRecorder {
	a.t.Helper()
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Host = "cp.example:5681"
	if method == http.MethodPut || method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Set(k, v)
	}
	w := httptest.NewRecorder()
	a.h.ServeHTTP(w, r.WithContext(context.WithoutCancel(a.t.Context())))
	return w
}

// want checks an answer's status and, if given, its body.
func (a *api) want(w *httptest.ResponseRecorder, status int, body ...string) {
	a.t.Helper()
	if w.Code != status {
		a.t.Fatalf("status %d, want %d; body:\n%s", w.Code, status, w.Body)
	}
	if len(body) > 0 {
		if d := cmp.Diff(body[0], w.Body.String()); d != "" {
			a.t.Fatalf("body (-want +got):\n%s", d)
		}
	}
}

func (a *api) put(path, body string, headers ...string) *httptest.ResponseRecorder {
	return a.do(a.admin, http.MethodPut, path, body, headers...)
}

func (a *api) get(path string) *httptest.ResponseRecorder {
	return a.do(a.admin, http.MethodGet, path, "")
}

const dataplane = `{"type":"Dataplane","mesh":"default","name":"web-1","networking":{"address":"192.0.2.1","inbound":[{"port":8080,"tags":{"kuma.io/service":"web","kuma.io/protocol":"http"}}]}}`

func TestCRUD(t *testing.T) {
	a := newAPI(t)
	w := a.put("/meshes/m1", `{"type":"Mesh","name":"m1"}`)
	a.want(w, 201, "{}\n")
	if ct := w.Header().Get("Content-Type"); ct != "application/json" {
		t.Errorf("content type %q", ct)
	}
	a.want(a.put("/meshes/m1", `{"type":"Mesh","name":"m1"}`), 200, "{}\n")
	a.want(a.put("/meshes/default/dataplanes/web-1", dataplane), 201, "{}\n")

	w = a.get("/meshes/default/dataplanes/web-1")
	a.want(w, 200)
	var got map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	delete(got, "creationTime")
	delete(got, "modificationTime")
	want := map[string]any{
		"type": "Dataplane", "mesh": "default", "name": "web-1", "kri": "kri_dp_default_zone-1__web-1_",
		"labels": map[string]any{
			"kuma.io/mesh": "default", "kuma.io/origin": "zone", "kuma.io/zone": "zone-1", "kuma.io/env": "universal", "kuma.io/proxy-type": "sidecar",
		},
		"networking": map[string]any{"address": "192.0.2.1", "inbound": []any{map[string]any{
			"port": 8080.0, "tags": map[string]any{"kuma.io/service": "web", "kuma.io/protocol": "http", "kuma.io/zone": "zone-1"},
		}}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("dataplane (-want +got):\n%s", d)
	}
	if !strings.HasPrefix(w.Body.String(), "{\n \"type\": \"Dataplane\",\n \"mesh\": \"default\",\n") {
		t.Errorf("form: %q", w.Body.String()[:60])
	}

	// What was read can be written back as it is.
	a.want(a.put("/meshes/default/dataplanes/web-1", w.Body.String()), 200, "{}\n")
	w = a.get("/meshes/default/dataplanes/_overview")
	a.want(w, 200)
	for _, part := range []string{`"type": "DataplaneOverview"`, `"dataplane": {`, `"dataplaneInsight": {}`, `"total": 1`, `"next": null`} {
		if !strings.Contains(w.Body.String(), part) {
			t.Errorf("overview lacks %s:\n%s", part, w.Body)
		}
	}
	for _, path := range []string{"/dataplanes/_overview", "/dataplanes+insights", "/meshes/default/dataplanes+insights", "/meshes/default/dataplanes/web-1/_overview", "/meshes/default/dataplanes+insights/web-1", "/_kri/kri_dp_default_zone-1__web-1_", "/zones/_overview", "/global-insight"} {
		a.want(a.get(path), 200)
	}

	a.want(a.do(a.admin, "DELETE", "/meshes/default/dataplanes/web-1", ""), 200, "{}\n")
	a.want(a.do(a.admin, "DELETE", "/meshes/default/dataplanes/web-1", ""), 404)
	a.want(a.do(a.admin, "DELETE", "/meshes/m1", ""), 200, "{}\n")
	a.want(a.get("/meshes/m1"), 404)
}

// stdError is the contract's standard error, without its older duplicates.
type stdError struct {
	Status        int
	Title, Detail string
	// Invalid are "field: reason".
	Invalid []string
}

func parseError(t *testing.T, w *httptest.ResponseRecorder) stdError {
	t.Helper()
	var e struct {
		Type              string `json:"type"`
		Status            int    `json:"status"`
		Title             string `json:"title"`
		Detail            string `json:"detail"`
		Details           string `json:"details"`
		InvalidParameters []struct{ Field, Reason string }
		Params            []struct{ Field, Reason string }  `json:"invalid_parameters"`
		Causes            []struct{ Field, Message string } `json:"causes"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil {
		t.Fatalf("not a standard error: %v\n%s", err, w.Body)
	}
	if e.Type != "/std-errors" || e.Status != w.Code || e.Details != e.Detail || len(e.Causes) != len(e.Params) {
		t.Fatalf("not a whole standard error: %s", w.Body)
	}
	out := stdError{Status: e.Status, Title: e.Title, Detail: e.Detail}
	for i, p := range e.Params {
		if e.Causes[i].Field != p.Field || e.Causes[i].Message != p.Reason {
			t.Fatalf("causes differ from invalid_parameters: %s", w.Body)
		}
		out.Invalid = append(out.Invalid, p.Field+": "+p.Reason)
	}
	return out
}

// TestErrors holds the errors that were captured from the original (contract), and ours for bad input.
func TestErrors(t *testing.T) {
	a := newAPI(t)
	a.want(a.put("/meshes/default/dataplanes/web-1", dataplane), 201)
	const invalid = "Resource is not valid"
	for _, c := range []struct {
		name, token, method, path, body string
		want                            stdError
	}{
		{"no such mesh", a.admin, "GET", "/meshes/nope", "", stdError{404, "Could not retrieve a resource", "Not found", nil}},
		{"under no such mesh", a.admin, "GET", "/meshes/nope/dataplanes", "", stdError{404, "Failed to retrieve Mesh", "Not found", nil}},
		{"write under no such mesh", a.admin, "PUT", "/meshes/nope/dataplanes/a", "{", stdError{404, "Failed to retrieve Mesh", "Not found", nil}},
		{"other name", a.admin, "PUT", "/meshes/m2", `{"type":"Mesh","name":"m1"}`, stdError{400, "Could not process a resource", invalid, []string{"name: name from the URL has to be the same as in body"}}},
		{"other mesh", a.admin, "PUT", "/meshes/default/secrets/a", `{"type":"Secret","mesh":"m1","name":"a"}`, stdError{400, "Could not process a resource", invalid, []string{"mesh: mesh from the URL has to be the same as in body"}}},
		{"a mesh where there is none", a.admin, "PUT", "/zones/a", `{"type":"Zone","mesh":"m1","name":"a"}`, stdError{400, "Could not process a resource", invalid, []string{"mesh: Zone is not part of a mesh: leave this out"}}},
		{"no type", a.admin, "PUT", "/meshes/m2", `{"name":"m2"}`, stdError{400, "Could not process a resource", invalid, []string{"type: type from the URL has to be the same as in body"}}},
		{"broken JSON", a.admin, "PUT", "/meshes/m2", ``, stdError{400, "Bad Request", `invalid Mesh object: "unexpected end of JSON input"`, nil}},
		{"unknown field", a.admin, "PUT", "/meshes/m2", `{"type":"Mesh","name":"m2","mtsl":{}}`, stdError{400, "Could not process a resource", invalid, []string{`mtsl: unknown field; did you mean "mtls"?`}}},
		{"wrong type", a.admin, "PUT", "/meshes/m2", `{"type":"Mesh","name":"m2","mtls":"on"}`, stdError{400, "Bad Request", `invalid Mesh object: "must be an object, not \"on\""`, []string{`mtls: must be an object, not "on"`}}},
		{"no base64", a.admin, "PUT", "/global-secrets/s", `{"type":"GlobalSecret","name":"s","data":"-"}`, stdError{400, "Bad Request", `invalid GlobalSecret object: "illegal base64 data at input byte 0"`, []string{"data: illegal base64 data at input byte 0"}}},
		{"no such mode", a.admin, "PUT", "/meshes/m2", `{"type":"Mesh","name":"m2","mtls":{"backends":[{"name":"a","type":"builtin","mode":"ON"}]}}`, stdError{400, "Bad Request", `invalid Mesh object: "value 'ON' is not supported, it must be one of: STRICT, PERMISSIVE"`, []string{"mtls.backends[0].mode: value 'ON' is not supported, it must be one of: STRICT, PERMISSIVE"}}},
		{"other type", a.admin, "PUT", "/meshes/m2", `{"type":"Zone","name":"m2","enabled":true}`, stdError{400, "Could not process a resource", invalid, []string{"type: type from the URL has to be the same as in body"}}},
		{"a bad specification hides a bad name", a.admin, "PUT", "/meshes/m2", `{"type":"Mesh","name":"m1","mtls":{"enabledBackend":"x"}}`, stdError{400, "Could not process a resource", invalid, []string{"mtls.enabledBackend: has to be set to one of the backends in the mesh"}}},
		{"mesh name too long", a.admin, "PUT", "/meshes/" + strings.Repeat("a", 64), `{"type":"Mesh","name":"` + strings.Repeat("a", 64) + `"}`, stdError{400, "Could not process a resource", invalid, []string{"name: cannot be longer than 63 characters"}}},
		{"upper case", a.admin, "PUT", "/zones/A", `{"type":"Zone","name":"A"}`, stdError{400, "Could not process a resource", invalid, []string{"name: invalid characters: it must consist of lower case letters, digits, '-' and '.', and each part between dots must start and end with a letter or digit"}}},
		{"bad label", a.admin, "PUT", "/zones/a", `{"type":"Zone","name":"a","labels":{"a b":"c"}}`, stdError{400, "Could not process a resource", invalid, []string{`labels["a b"]: the label's name must have at most 63 letters, digits, '-', '_' and '.', and start and end with a letter or digit; a DNS name and '/' may stand before it`}}},
		{"size 0", a.admin, "GET", "/meshes?size=0", "", stdError{400, "Could not retrieve resources", invalid, []string{"size: must be greater than 0"}}},
		{"size abc", a.admin, "GET", "/meshes?size=abc", "", stdError{400, "Could not retrieve resources", invalid, []string{"size: invalid format"}}},
		{"size 1001", a.admin, "GET", "/meshes?size=1001", "", stdError{400, "Could not retrieve resources", "Invalid page size", []string{"size: invalid page size of 1001. Maximum page size is 1000"}}},
		{"offset zz", a.admin, "GET", "/meshes?offset=zz", "", stdError{400, "Bad Request", `invalid: invalid offset: strconv.Atoi: parsing "zz": invalid syntax`, nil}},
		{"filter by name", a.admin, "GET", "/meshes?filter[name]=x", "", stdError{400, "Could not retrieve resources", invalid, []string{"/meshes.filter[name]: filters are only supported on labels"}}},
		{"form of resource", a.admin, "GET", "/meshes/default?format=xml", "", stdError{400, "Could not retrieve a resource", invalid, []string{`format: "xml" is not available on this control plane; use "universal"`}}},
		{"secret as anonymous", "", "GET", "/meshes/default/secrets", "", stdError{403, "Access Denied", `user "mesh-system:anonymous/mesh-system:unauthenticated" cannot access the resource of type "Secret"`, nil}},
		{"bad bearer", "x.y.z", "GET", "/meshes", "", stdError{401, "Invalid authentication data", "Unauthenticated", nil}},
		{"read-only kind", a.admin, "PUT", "/meshes/default/dataplane-insights/a", "{}", stdError{405, "Method not allowed", "On zone control plane you can only modify zone resources. DataplaneInsight is written by the control plane alone.\n", nil}},
		{"mesh in use", a.admin, "DELETE", "/meshes/default", "", stdError{400, "Could not delete a resource", invalid, []string{"mesh: unable to delete mesh, there are still some dataplanes attached"}}},
		{"unknown short name", a.admin, "GET", "/_kri/kri_zz____a_", "", stdError{400, "Bad Request", `no kind has the short name "zz", which the KRI "kri_zz____a_" names`, nil}},
		{"no KRI", a.admin, "GET", "/_kri/x", "", stdError{400, "Bad Request", `"x" is not a KRI: it has the form kri_<short>_<mesh>_<zone>_<namespace>_<name>_<section>`, nil}},
		{"bad dry-run", a.admin, "PUT", "/meshes/m2?dry-run=ja", `{"type":"Mesh","name":"m2"}`, stdError{400, "Could not process a resource", invalid, []string{`dry-run: "ja" is neither true nor false`}}},
		{"admin view", a.admin, "GET", "/meshes/default/dataplanes/web-1/heap", "", stdError{404, "Could not execute admin operation", "Not found", nil}},
		{"admin view of none", a.admin, "GET", "/meshes/default/dataplanes/nope/xds", "", stdError{404, "Could not get dataplane resource", "Not found", nil}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if d := cmp.Diff(c.want, parseError(t, a.do(c.token, c.method, c.path, c.body))); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
	a.want(a.get("/meshes/m2"), 404)
}

func TestRouter(t *testing.T) {
	a := newAPI(t)
	a.want(a.get("/nope"), 404, "404: Page Not Found")
	a.want(a.get("/versions"), 404, "404: Page Not Found")
	a.want(a.get("/meshes/../meshes"), 404, "404: Page Not Found")
	a.want(a.do(a.admin, "PATCH", "/meshes/default", ""), 405, "405: Method Not Allowed")
	a.want(a.do(a.admin, "GET", "/tokens/user", ""), 405, "405: Method Not Allowed")
	a.want(a.put("/meshes/m1", `type: Mesh`, "Content-Type: application/yaml"), 415, "415: Unsupported Media Type")
	a.want(a.put("/meshes/m1/", `{"type":"Mesh","name":"m1"}`, "Content-Type: application/json; charset=utf-8"), 201)
	a.want(a.get("/meshes/"), 200)
}

func TestPages(t *testing.T) {
	a := newAPI(t)
	for i := range 5 {
		name := fmt.Sprintf("z%d", i)
		label := map[bool]string{true: "even", false: "odd"}[i%2 == 0]
		a.want(a.put("/zones/"+name, fmt.Sprintf(`{"type":"Zone","name":%q,"labels":{"parity":%q}}`, name, label)), 201)
	}
	type page struct {
		Total int
		Items []struct{ Name string }
		Next  *string
	}
	read := func(path string) (p page, found string) {
		t.Helper()
		w := a.get(path)
		a.want(w, 200)
		if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
			t.Fatal(err)
		}
		for _, i := range p.Items {
			found += i.Name + " "
		}
		return p, strings.TrimSpace(found)
	}
	p, found := read("/zones?size=2")
	if p.Total != 5 || found != "z0 z1" || p.Next == nil || *p.Next != "http://cp.example:5681/zones?offset=2&size=2" {
		t.Fatalf("first page: %+v", p)
	}
	for want := range strings.SplitSeq("z2 z3|z4", "|") {
		next := strings.TrimPrefix(*p.Next, "http://cp.example:5681")
		if p, found = read(next); found != want {
			t.Fatalf("%s: %q, want %q", next, found, want)
		}
	}
	if p.Next != nil {
		t.Errorf("the last page has a next one: %s", *p.Next)
	}
	if p, found := read("/zones?filter[labels.parity]=even&name=z"); found != "z0 z2 z4" || p.Total != 3 {
		t.Errorf("filtered: %q, total %d", found, p.Total)
	}
	a.want(a.get("/zones?filter[labels.parity]x=even"), 400)
	a.want(a.get("/zones?name=nope"), 200, "{\n \"total\": 0,\n \"items\": [],\n \"next\": null\n}\n")
	a.want(a.put("/meshes/default/dataplanes/web-1", dataplane), 201)
	for query, want := range map[string]int{
		"tag=kuma.io/service:we": 1, "tag=kuma.io/service:we&tag=kuma.io/protocol:tcp": 0, "tag=nonsense": 1,
		"gateway=true": 0, "gateway=false": 1, "gateway=delegated": 0,
	} {
		if p, _ := read("/dataplanes?" + query); p.Total != want {
			t.Errorf("%s: %d, want %d", query, p.Total, want)
		}
	}
}

func TestVersions(t *testing.T) {
	a := newAPI(t)
	const body = `{"type":"Zone","name":"z"}`
	w := a.put("/zones/z", body, "If-None-Match: *")
	a.want(w, 201)
	first := w.Header().Get("ETag")
	w = a.get("/zones/z")
	if got := w.Header().Get("ETag"); got != first || first == "" {
		t.Fatalf("ETag %q after PUT %q", got, first)
	}
	a.want(a.do(a.admin, "GET", "/zones/z", "", "If-None-Match: "+first), 304)
	a.want(a.put("/zones/z", body, "If-None-Match: *"), 409)
	w = a.put("/zones/z", body, "If-Match: "+first)
	a.want(w, 200)
	second := w.Header().Get("ETag")

	got := parseError(t, a.put("/zones/z", body, "If-Match: "+first))
	is, was := strings.Trim(second, `"`), strings.Trim(first, `"`)
	if got.Status != 409 || got.Title != "Conflict" || !strings.Contains(got.Detail, "has version "+is+"; version "+was+" was expected") {
		t.Errorf("conflict: %+v", got)
	}
	a.want(a.do(a.admin, "DELETE", "/zones/z", "", "If-Match: "+first), 409)
	a.want(a.put("/zones/z", body, "If-Match: W/x"), 400)
	a.want(a.put("/zones/y", `{"type":"Zone","name":"y"}`, "If-Match: *"), 409)
	a.want(a.do(a.admin, "DELETE", "/zones/z", "", "If-Match: "+second), 200)
}

func TestDryRun(t *testing.T) {
	a := newAPI(t)
	_, before, err := a.store.List(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	a.want(a.put("/zones/z?dry-run=true", `{"type":"Zone","name":"z"}`), 201, "{}\n")
	a.want(a.put("/zones/z?dry-run=true", `{"type":"Zone","name":"y"}`), 400)
	// Without its mesh, a resource is checked all the same; a real write says
	// at once that there is no such mesh.
	const noMesh = "{\n \"type\": \"/std-errors\",\n \"status\": 404,\n \"title\": \"Failed to retrieve Mesh\",\n \"detail\": \"Not found\",\n \"details\": \"Not found\"\n}\n"
	a.want(a.put("/meshes/none/dataplanes/d", `{"type":"Dataplane","mesh":"none","name":"d"}`), 404, noMesh)
	a.want(a.put("/meshes/none/dataplanes/d?dry-run=false", `{"type":"Dataplane","mesh":"none","name":"d"}`), 404, noMesh)
	const sound = `"networking":{"address":"192.0.2.1","inbound":[{"port":80,"tags":{"kuma.io/service":"a"}}]}`
	for _, c := range []struct{ name, body, want string }{
		{"spec", `{"type":"Dataplane","mesh":"none","name":"d"}`, `"field": "networking"`},
		{"unknown field", `{"type":"Dataplane","mesh":"none","name":"d","netwrking":{}}`, `"field": "netwrking"`},
		{"type", `{"type":"Secret","mesh":"none","name":"d"}`, `"field": "type"`},
		{"name", `{"type":"Dataplane","mesh":"none","name":"e",` + sound + `}`, `"field": "name"`},
		{"mesh", `{"type":"Dataplane","mesh":"other","name":"d",` + sound + `}`, `"field": "mesh"`},
		{"label", `{"type":"Dataplane","mesh":"none","name":"d","labels":{"kuma.io/zone":"moon"},` + sound + `}`, `kuma.io/zone`},
		{"JSON", `{`, `"title": "Bad Request"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := a.put("/meshes/none/dataplanes/d?dry-run=true", c.body)
			if w.Code != 400 || !strings.Contains(w.Body.String(), c.want) {
				t.Errorf("%d %s, want 400 and %s", w.Code, w.Body, c.want)
			}
		})
	}
	a.want(a.put("/meshes/none/dataplanes/d?dry-run=true", `{"type":"Dataplane","mesh":"none","name":"d",`+sound+`}`), 404, noMesh)
	if _, after, _ := a.store.List(t.Context(), "", ""); after != before {
		t.Errorf("a dry run wrote: revision %d, was %d", after, before)
	}
}

func TestAbout(t *testing.T) {
	a := newAPI(t)
	a.want(a.do("", "GET", "/", ""), 200, "{\n \"clusterId\": \"c\",\n \"dryRun\": true,\n \"gui\": \"\",\n \"hostname\": \"h\",\n \"instanceId\": \"cp-1\",\n \"product\": \"Kuma\",\n \"version\": \"1.2.3\"\n}\n")
	a.want(a.do("garbage", "GET", "/", ""), 200)
	a.want(a.do(a.user, "GET", "/who-am-i", ""), 200, "{\n \"name\": \"alice\",\n \"groups\": [\n  \"team-a\",\n  \"mesh-system:authenticated\"\n ]\n}\n")
	a.want(a.get("/config"), 200, "{\n \"store\": {\n  \"password\": \"*****\",\n  \"type\": \"memory\"\n }\n}\n")
	w := a.get("/_resources")
	a.want(w, 200)
	var list struct {
		Resources []struct {
			Name, Path, Scope, ShortName, SingularDisplayName, PluralDisplayName string
			ReadOnly                                                             bool
		}
	}
	if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil {
		t.Fatal(err)
	}
	if got := list.Resources[0]; got.Name != "Dataplane" || got.Path != "dataplanes" || got.Scope != "Mesh" || got.ShortName != "dp" || got.PluralDisplayName != "Dataplanes" || len(list.Resources) != len(kinds()) {
		t.Errorf("resources: %+v", got)
	}
	a.want(a.get("/policies"), 200, "{\n \"policies\": [\n  {\n   \"isExperimental\": false,\n   \"isInbound\": false,\n   \"isOutbound\": false,\n   \"isTargetRefBased\": false,\n   \"name\": \"TrafficPermission\",\n   \"path\": \"traffic-permissions\",\n   \"pluralDisplayName\": \"Traffic Permissions\",\n   \"readOnly\": false,\n   \"singularDisplayName\": \"Traffic Permission\"\n  }\n ]\n}\n")
}

func TestTokens(t *testing.T) {
	a := newAPI(t)
	post := func(bearer, path, body string) *httptest.ResponseRecorder { return a.do(bearer, "POST", path, body) }
	w := post(a.admin, "/tokens/dataplane", `{"name":"web-1","mesh":"default","tags":{"kuma.io/service":["web"]},"validFor":"1h"}`)
	a.want(w, 200)
	if w.Header().Get("Content-Type") != "text/plain" || strings.Count(w.Body.String(), ".") != 2 || strings.HasSuffix(w.Body.String(), "\n") {
		t.Errorf("token: %v %q", w.Header(), w.Body)
	}
	a.want(post(a.admin, "/tokens/zone", `{"zone":"z1","scope":["ingress"]}`), 200)
	w = post(a.admin, "/tokens/user/", `{"name":"bob","groups":["x"],"validFor":"1h"}`)
	a.want(w, 200)
	a.want(a.do(w.Body.String(), "GET", "/meshes", ""), 200)
	if strings.Contains(a.log.String(), w.Body.String()) {
		t.Error("a token is in the log")
	}
	w = post(a.admin, "/tokens/user", `{"name":"bob","validFor":"-1h"}`)
	a.want(w, 200)
	a.want(a.do(w.Body.String(), "GET", "/meshes", ""), 401)

	const request, invalid = "Invalid request", "Resource is not valid"
	for _, c := range []struct {
		bearer, path, body string
		want               stdError
	}{
		{a.admin, "/tokens/dataplane", `{}`, stdError{400, request, invalid, []string{"mesh: cannot be empty"}}},
		{a.admin, "/tokens/dataplane", `{"mesh":"default","type":"foo"}`, stdError{400, request, invalid, []string{"type: foo is not a valid proxy type"}}},
		{a.admin, "/tokens/dataplane", `{"mesh":"default","nmae":"web-1"}`, stdError{400, request, invalid, []string{`nmae: unknown field; did you mean "name"?`}}},
		{a.admin, "/tokens/dataplane", `{"mesh":"default","tags":{"kuma.io/service":"web"}}`, stdError{400, request, invalid, []string{`tags["kuma.io/service"]: must be a list, not "web"`}}},
		{a.admin, "/tokens/dataplane", `{"mesh"`, stdError{400, "Bad Request", "the request's body is not the JSON that was expected: unexpected end of JSON input", nil}},
		{a.admin, "/tokens/dataplane", `{"mesh":"default","validFor":"abc"}`, stdError{400, request, invalid, []string{`validFor: is invalid: time: invalid duration "abc"`}}},
		{a.admin, "/tokens/dataplane", `{"mesh":"nope"}`, stdError{404, "Signing Key not found", `there is no signing key with KID 1. Secret of name "dataplane-token-signing-key-nope-1" in mesh "nope" is not found. If signing key was rotated, regenerate the token`, nil}},
		{a.admin, "/tokens/zone", `{"zone":"z1"}`, stdError{400, request, invalid, []string{"scope: cannot be empty"}}},
		{a.admin, "/tokens/user", `{}`, stdError{400, request, invalid, []string{"name: cannot be empty", "validFor: cannot be empty"}}},
		{"", "/tokens/dataplane", `{}`, stdError{403, "Access Denied", `user "mesh-system:anonymous/mesh-system:unauthenticated" cannot access generate dataplane token`, nil}},
		{a.user, "/tokens/zone", `{"zone":"z1","scope":["ingress"]}`, stdError{403, "Access Denied", `user "alice/team-a,mesh-system:authenticated" cannot access generate zone token for zone 'z1'`, nil}},
		{a.user, "/tokens/user", `{}`, stdError{403, "Access Denied", "action not allowed", nil}},
	} {
		if d := cmp.Diff(c.want, parseError(t, post(c.bearer, c.path, c.body))); d != "" {
			t.Errorf("%s %s (-want +got):\n%s", c.path, c.body, d)
		}
	}
}

func TestIssuerOff(t *testing.T) {
	a := newAPI(t)
	got := parseError(t, a.do(a.admin, "POST", "/tokens/zone", `{"zone":"z1","scope":["ingress"]}`))
	if d := cmp.Diff(stdError{400, "Could not issue a token", "issuing tokens using the control plane is disabled.", nil}, got); d != "" {
		t.Error(d)
	}
}

// TestSecret holds the contract's JSON of a secret.
func TestSecret(t *testing.T) {
	a := newAPI(t)
	a.want(a.put("/meshes/default/secrets/x", `{"type":"Secret","mesh":"default","name":"x","data":"aGVsbG8="}`), 201, "{}\n")
	a.want(a.put("/meshes/default/secrets/x", `{"type":"Secret","mesh":"default","name":"x","data":"aGVsbG8="}`), 200, "{}\n")
	var got map[string]any
	if err := json.Unmarshal(a.get("/meshes/default/secrets/x").Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	delete(got, "creationTime")
	delete(got, "modificationTime")
	if d := cmp.Diff(map[string]any{"type": "Secret", "mesh": "default", "name": "x", "data": "aGVsbG8=", "labels": map[string]any{"kuma.io/mesh": "default"}}, got); d != "" {
		t.Error(d)
	}
	for _, path := range []string{"/global-secrets", "/globalsecrets", "/secrets", "/meshes/default/secrets", "/global-secrets/user-token-signing-key-1"} {
		a.want(a.get(path), 200)
	}
	a.want(a.put("/global-secrets/empty", `{"type":"GlobalSecret","name":"empty"}`), 201)
}

func TestLenient(t *testing.T) {
	a := newAPI(t, func(c *rest.Config, _ *auth.AccessConfig) { c.Lenient = true })
	a.want(a.put("/meshes/m", `{"type":"Mesh","name":"m","mtsl":{}}`), 201)
	// Fields that the server itself gives out are never unknown.
	strict := newAPI(t)
	strict.want(strict.put("/zones/z", `{"type":"Zone","name":"z","kri":"x","creationTime":"2020-01-01T00:00:00Z","status":{}}`), 201)
}
