package rest_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// FuzzRequest sends anything to any path (HRD-09): no request may make the
// server fail, and none without a credential may get in.
func FuzzRequest(f *testing.F) {
	for _, seed := range []struct{ method, path, body, header string }{
		{"GET", "/meshes?size=1&offset=0&filter[labels.a]=b", "", ""},
		{"PUT", "/meshes/m", `{"type":"Mesh","name":"m","mtls":{"backends":[{"name":"a","type":"builtin","conf":{"caCert":{}}}]}}`, "If-Match: \"1\""},
		{"PUT", "/meshes/default/dataplanes/web-1?dry-run=true", dataplane, "If-None-Match: *"},
		{"PUT", "/meshes/default/secrets/s", `{"type":"Secret","mesh":"default","name":"s","data":"eA=="}`, "Content-Type: application/json;a=b"},
		{"DELETE", "/meshes/default/meshservices/a", "", "Origin: null"},
		{"POST", "/tokens/dataplane", `{"mesh":"default","validFor":"1h","tags":{"a":["b"]}}`, "Authorization: Bearer a.b.c"},
		{"GET", "/_kri/kri_dp_default_z__a_", "", "X-Forwarded-For: a"},
		{"GET", "/meshes/default/dataplanes/a/_config?shadow=true&include=diff", "", ""},
		{"GET", "/meshes/%2e%2e/%2f//dataplanes+insights", "", ""},
	} {
		f.Add(seed.method, seed.path, seed.body, seed.header)
	}
	a := (*api)(nil)
	f.Fuzz(func(t *testing.T, method, path, body, header string) {
		if a == nil {
			a = newAPI(t, everything)
		}
		a.t = t
		for _, bearer := range []string{"", a.admin} {
			r, err := http.NewRequest(method, "http://cp.example:5681/"+strings.TrimPrefix(path, "/"), strings.NewReader(body))
			if err != nil {
				return
			}
			r.RequestURI, r.RemoteAddr = r.URL.RequestURI(), "192.0.2.7:1234"
			r.Header.Set("Content-Type", "application/json")
			if k, v, ok := strings.Cut(header, ": "); ok {
				r.Header.Set(k, v)
			}
			if bearer != "" {
				r.Header.Set("Authorization", "Bearer "+bearer)
			} else {
				r.Header.Del("Authorization")
			}
			w := httptest.NewRecorder()
			a.h.ServeHTTP(w, r)
			switch {
			case w.Code >= 500 && w.Code != http.StatusServiceUnavailable:
				t.Fatalf("%s %s: %d %s\n%s", method, path, w.Code, w.Body, a.log)
			case bearer == "" && w.Code < 300 && !strings.HasPrefix(strings.TrimLeft(r.URL.Path, "/"), "gui") && strings.Trim(r.URL.Path, "/") != "":
				t.Fatalf("anonymous %s %s: %d", method, path, w.Code)
			}
		}
		a.log.Reset()
	})
}
