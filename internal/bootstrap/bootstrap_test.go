package bootstrap_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	"kuma/internal/bootstrap"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// credentials take the token of a name, which is for that name alone, and for
// no service named "foreign".
type credentials struct{ off bool }

func (c credentials) Required() bool { return !c.off }

func (c credentials) Verify(_ context.Context, token, _, name string) (bootstrap.Credential, error) {
	switch {
	case token == "garbled":
		return nil, errs.New(errs.Unauthenticated, "not a token")
	case token != "token-of-"+name:
		return nil, errs.New(errs.Denied, "proxy name from requestor: %s is different than in token: other", name)
	}
	return credential{}, nil
}

type credential struct{}

func (credential) Covers(d mesh.Dataplane) error {
	for _, service := range d.Spec.Tags()[mesh.TagService] {
		if service == "foreign" {
			return errs.New(errs.Denied, "the service %s is not in the token", service)
		}
	}
	return nil
}

const dataplane = `type: Dataplane
mesh: default
name: web-1
networking:
  address: 127.0.0.1
  inbound:
  - port: 8080
    servicePort: 80
    tags: {kuma.io/service: web, kuma.io/protocol: http}
`

func server(t testing.TB, change func(*bootstrap.Config)) http.Handler {
	t.Helper()
	s := memstore.New()
	for _, r := range []store.Write{
		store.Set(mesh.Meshes.Make("", "default", &mesh.MeshSpec{})),
		store.Set(mesh.Dataplanes.Make("default", "made-before", &mesh.DataplaneSpec{Networking: &mesh.Networking{Address: "127.0.0.2"}})),
		store.Set(mesh.Meshes.Make("", "picky", &mesh.MeshSpec{Constraints: &mesh.Constraints{DataplaneProxy: &mesh.ProxyConstraints{
			Restrictions: []mesh.TagRule{{Tags: map[string]string{mesh.TagService: "*"}}},
		}}})),
	} {
		if _, err := s.Put(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	cfg := bootstrap.Config{
		Store: s, Credentials: credentials{}, CA: func() []byte { return []byte("OUR CA") },
		Hosts: func() []string { return []string{"localhost", "127.0.0.1", "*.cp.example"} }, Port: 5678,
		AdminAddress: "127.0.0.1", AdminPort: 9901, AdminUnixSocket: true, AdminAccessLogPath: "/dev/null", ReadinessPort: 9902, HDS: true, ConnectTimeout: time.Second,
		Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	return bootstrap.New(cfg)
}

func ask(h http.Handler, host string, body any) *httptest.ResponseRecorder {
	raw, ok := body.(string)
	if !ok {
		b, err := json.Marshal(body)
		if err != nil {
			panic(err)
		}
		raw = string(b)
	}
	r := httptest.NewRequest(http.MethodPost, "/bootstrap", strings.NewReader(raw))
	r.Host = host
	r.Header.Set("Accept", "application/json")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func request(change func(*bootstrap.Request)) *bootstrap.Request {
	r := &bootstrap.Request{
		Mesh: "default", Name: "web-1", ProxyType: "dataplane", DataplaneToken: "token-of-web-1", DataplaneResource: dataplane,
		Workdir: "/tmp/kuma-dp-1", Features: []string{bootstrap.FeatureLink}, Instance: "i-1", ReadinessPort: 9902,
		Version: json.RawMessage(`{"kumaDp":{"version":"1"},"envoy":{"version":"1.40.0"}}`),
	}
	if change != nil {
		change(r)
	}
	return r
}

// read returns Envoy's configuration from an answer.
func read(t *testing.T, w *httptest.ResponseRecorder) *bootstrapv3.Bootstrap {
	t.Helper()
	if w.Code != http.StatusOK {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	var res bootstrap.Response
	if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	raw, err := yaml.YAMLToJSON(res.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	b := new(bootstrapv3.Bootstrap)
	if err := protojson.Unmarshal(raw, b); err != nil {
		t.Fatal(err)
	}
	if err := b.ValidateAll(); err != nil {
		t.Fatal(err)
	}
	return b
}

// Where kuma-dp writes the authorities into a file, Envoy has them from there
// alone, with a link or without.
func TestTrustFromAFile(t *testing.T) {
	for name, features := range map[string][]string{"link": {bootstrap.FeatureLink, bootstrap.FeatureTrustFile}, "no link": {bootstrap.FeatureTrustFile}} {
		w := ask(server(t, nil), "localhost:5678", request(func(r *bootstrap.Request) { r.Features = features }))
		b := read(t, w)
		var res bootstrap.Response
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil || len(res.Trust) == 0 || len(b.StaticResources.Secrets) > 0 {
			t.Errorf("%s: secrets %v, trust %q, %v", name, b.StaticResources.Secrets, res.Trust, err)
		}
	}
}

func TestBootstrap(t *testing.T) {
	b := read(t, ask(server(t, nil), "localhost:5678", request(nil)))
	meta := b.Node.Metadata.AsMap()
	for _, c := range []struct{ what, got, want string }{
		{"node id", b.Node.Id, "default.web-1"},
		{"node cluster", b.Node.Cluster, "web"},
		{"admin socket", b.Admin.GetAddress().GetPipe().GetPath(), "/tmp/kuma-dp-1/kuma-envoy-admin.sock"},
		{"instance", meta["dataplane.instance"].(string), "i-1"},
		{"admin port", meta["dataplane.admin.port"].(string), "9901"},
		{"ads", b.DynamicResources.AdsConfig.ApiType.String(), "DELTA_GRPC"},
		{"token", b.DynamicResources.AdsConfig.GrpcServices[0].InitialMetadata[0].Value, "token-of-web-1"},
		{"hds", b.HdsConfig.GetApiType().String(), "GRPC"},
	} {
		if c.got != c.want {
			t.Errorf("%s: %q, want %q", c.what, c.got, c.want)
		}
	}
	var doc map[string]any
	if err := json.Unmarshal([]byte(meta["dataplane.resource"].(string)), &doc); err != nil || doc["name"] != "web-1" {
		t.Errorf("dataplane.resource: %v %v", meta["dataplane.resource"], err)
	}
	clusters := map[string]string{}
	for _, c := range b.StaticResources.Clusters {
		clusters[c.Name] = c.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetPipe().GetPath()
	}
	if clusters["kuma:sds"] != "/tmp/kuma-dp-1/kuma-sds.sock" || clusters["access_log_sink"] != "/tmp/kuma-dp-1/kuma-al-web-1-default.sock" {
		t.Errorf("static clusters: %v", clusters)
	}
	secret := b.StaticResources.Secrets[0].GetValidationContext()
	if got := string(secret.TrustedCa.GetInlineBytes()); got != "OUR CA" {
		t.Errorf("trusted CA %q", got)
	}
	for _, m := range secret.MatchTypedSubjectAltNames {
		if m.Matcher.GetExact() != "localhost" {
			t.Errorf("the control plane may be any of %v", secret.MatchTypedSubjectAltNames)
		}
	}
}

func TestVariants(t *testing.T) {
	b := read(t, ask(server(t, nil), "127.0.0.1:5678", request(func(r *bootstrap.Request) { r.Features = nil })))
	for _, c := range b.StaticResources.Clusters {
		if c.Name == bootstrap.SDSCluster {
			t.Error("a kuma-dp without link has no secrets of its own")
		}
	}
	b = read(t, ask(server(t, func(c *bootstrap.Config) { c.HDS, c.AdminUnixSocket = false, false }), "a.cp.example", request(nil)))
	if b.HdsConfig != nil || b.Admin.Address.GetSocketAddress().GetPortValue() != 9901 {
		t.Error("the settings for health checks and the admin interface have no effect")
	}
	b = read(t, ask(server(t, nil), "localhost", request(func(r *bootstrap.Request) {
		r.Name, r.DataplaneResource, r.DataplaneToken = "made-before", "", "token-of-made-before"
	})))
	if b.Node.Cluster != "made-before" || b.Node.Metadata.Fields["dataplane.resource"] != nil {
		t.Errorf("a Dataplane that was made before: %v", b.Node)
	}
	b = read(t, ask(server(t, func(c *bootstrap.Config) { c.XDSHost, c.XDSPort = "localhost", 1 }), "elsewhere", request(nil)))
	var ads *corev3.SocketAddress
	for _, c := range b.StaticResources.Clusters {
		if c.Name == "ads_cluster" {
			ads = c.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetSocketAddress()
		}
	}
	if ads.GetAddress() != "localhost" || ads.GetPortValue() != 1 {
		t.Errorf("xdsHost and xdsPort have no effect: %v", ads)
	}
	r := httptest.NewRequest(http.MethodPost, "/bootstrap", strings.NewReader(mustJSON(t, request(nil))))
	r.Host = "localhost"
	w := httptest.NewRecorder()
	server(t, nil).ServeHTTP(w, r)
	if w.Header().Get("Content-Type") != "text/x-yaml" || !strings.Contains(w.Body.String(), "dynamicResources") {
		t.Errorf("without accept: %s %s", w.Header(), w.Body)
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestRefusals(t *testing.T) {
	leaf := filepath.Join(t.TempDir(), "leaf.crt")
	certs, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: filepath.Dir(leaf)})
	if err != nil {
		t.Fatal(err)
	}
	notCA, err := os.ReadFile(filepath.Join(filepath.Dir(leaf), pki.ServerFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, host string
		body       any
		status     int
		text       string
	}{
		{"not JSON", "localhost", "{", 400, ""},
		{"no token", "localhost", request(func(r *bootstrap.Request) { r.DataplaneToken = "" }), 422, "Dataplane Token is required. Generate token using 'kumactl generate dataplane-token"},
		{"garbled token", "localhost", request(func(r *bootstrap.Request) { r.DataplaneToken = "garbled" }), 401, "not a token"},
		{"token of another", "localhost", request(func(r *bootstrap.Request) { r.DataplaneToken = "token-of-other" }), 403, "different than in token"},
		{"token of another service", "localhost", request(func(r *bootstrap.Request) {
			r.DataplaneResource = strings.Replace(dataplane, "service: web", "service: foreign", 1)
		}), 403, "the service foreign is not in the token"},
		{"no name", "localhost", request(func(r *bootstrap.Request) { r.Name = "" }), 422, "mesh and name of the Dataplane must be given"},
		{"unknown mesh", "localhost", request(func(r *bootstrap.Request) {
			r.Mesh, r.DataplaneResource = "nomesh", strings.Replace(dataplane, "mesh: default", "mesh: nomesh", 1)
		}), 422, `mesh: mesh "nomesh" does not exist`},
		{"unknown Dataplane", "localhost", request(func(r *bootstrap.Request) { r.DataplaneResource = "" }), 404, ""},
		{"another name", "localhost", request(func(r *bootstrap.Request) { r.Name, r.DataplaneToken = "web-2", "token-of-web-2" }), 422, `the Dataplane is "web-1"`},
		{"bad port", "localhost", request(func(r *bootstrap.Request) { r.DataplaneResource = strings.Replace(dataplane, "8080", "0", 1) }), 422, "networking.inbound[0].port: port must be in the range [1, 65535]"},
		{"unknown field", "localhost", request(func(r *bootstrap.Request) {
			r.DataplaneResource = strings.Replace(dataplane, "servicePort", "servicePrt", 1)
		}), 422, `did you mean "servicePort"?`},
		{"not YAML", "localhost", request(func(r *bootstrap.Request) { r.DataplaneResource = "a: [" }), 422, "not valid YAML"},
		{"not admitted", "localhost", request(func(r *bootstrap.Request) {
			r.Mesh, r.DataplaneResource = "picky", strings.Replace(dataplane, "mesh: default", "mesh: picky", 1)
		}), 422, "restricted tags"},
		{"a host that the certificate lacks", "10.1.1.1:5678", request(nil), 400, `A data plane proxy is trying to connect to the control plane using "10.1.1.1" address`},
		{"a CA that is none", "localhost", request(func(r *bootstrap.Request) { r.CACert = string(notCA) }), 400, "basic constraint 'CA' is set to 'false'"},
		{"a CA that is no PEM", "localhost", request(func(r *bootstrap.Request) { r.CACert = "hello" }), 400, "no PEM block"},
		{"a zone proxy", "localhost", request(func(r *bootstrap.Request) { r.ProxyType = "ingress" }), 422, "proxyType"},
		{"too large", "localhost", strings.Repeat(" ", bootstrap.MaxRequest+1), 413, "at most"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := ask(server(t, nil), c.host, c.body)
			if w.Code != c.status || !strings.Contains(w.Body.String(), c.text) || c.text == "" && w.Body.Len() > 0 {
				t.Errorf("%d %q, want %d %q", w.Code, w.Body, c.status, c.text)
			}
		})
	}
	if w := ask(server(t, func(c *bootstrap.Config) { c.Credentials = credentials{off: true} }), "localhost", request(func(r *bootstrap.Request) { r.DataplaneToken = "" })); w.Code != 200 {
		t.Errorf("where proxies need no token: %d %s", w.Code, w.Body)
	}
	if w := ask(server(t, nil), "localhost", request(func(r *bootstrap.Request) { r.CACert = string(certs.CA()) })); w.Code != 200 {
		t.Errorf("a good CA: %d %s", w.Code, w.Body)
	}
	g := httptest.NewRecorder()
	server(t, nil).ServeHTTP(g, httptest.NewRequest(http.MethodGet, "/bootstrap", nil))
	if g.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", g.Code)
	}
}

// Who has no token for a name gets the same answer whatever there is: nothing is
// looked up or read for strangers.
func TestStrangersLearnNothing(t *testing.T) {
	for _, token := range []struct {
		value  string
		status int
	}{{"garbled", http.StatusUnauthorized}, {"token-of-stranger", http.StatusForbidden}} {
		for _, c := range []struct {
			name   string
			change func(*bootstrap.Request)
		}{
			{"a Dataplane that is there", func(r *bootstrap.Request) { r.Name, r.DataplaneResource = "made-before", "" }},
			{"a Dataplane that is not there", func(r *bootstrap.Request) { r.DataplaneResource = "" }},
			{"a mesh that is not there", func(r *bootstrap.Request) { r.Mesh = "nomesh" }},
			{"a mesh that does not admit it", func(r *bootstrap.Request) {
				r.Mesh, r.DataplaneResource = "picky", strings.Replace(dataplane, "mesh: default", "mesh: picky", 1)
			}},
			{"a Dataplane that can't be read", func(r *bootstrap.Request) { r.DataplaneResource = "a: [" }},
			{"a Dataplane that is not valid", func(r *bootstrap.Request) { r.DataplaneResource = strings.Replace(dataplane, "8080", "0", 1) }},
			{"a CA that is none", func(r *bootstrap.Request) { r.CACert = "hello" }},
		} {
			w := ask(server(t, nil), "localhost", request(func(r *bootstrap.Request) {
				c.change(r)
				r.DataplaneToken = token.value
			}))
			if w.Code != token.status {
				t.Errorf("%s, with the token %s: %d %s, want %d", c.name, token.value, w.Code, w.Body, token.status)
			}
		}
	}
}

// HRD-09: whatever is sent before authentication, the server answers.
func FuzzRequest(f *testing.F) {
	for _, r := range []*bootstrap.Request{request(nil), request(func(r *bootstrap.Request) { r.CACert = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----" })} {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add("localhost:5678", b)
	}
	f.Add("[::1]:1", []byte(`{"mesh":"default","name":"x","dataplaneToken":"t","dataplaneResource":"a: &a [*a]","version":7,"dynamicMetadata":{"":""}}`))
	f.Add("", []byte(`null`))
	h := server(f, nil)
	f.Fuzz(func(t *testing.T, host string, body []byte) {
		if w := ask(h, host, string(body)); w.Code == http.StatusInternalServerError {
			t.Errorf("500 for %q", body)
		}
	})
}
