package mesh_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// decode reads and checks a resource; the errors are a line each.
func decode(t *testing.T, k *resource.Kind, doc string) (*resource.Resource, string) {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	r, err := resource.Decode(k, raw, false)
	if err != nil {
		return nil, err.Error()
	}
	var out strings.Builder
	for _, f := range k.Check(r.Spec) {
		fmt.Fprintf(&out, "%s: %s\n", f.Path, f.Message)
	}
	return r, out.String()
}

func TestMetricsDefaults(t *testing.T) {
	for _, c := range []struct{ conf, want string }{
		{``, `{"port":5670,"path":"/metrics","tags":{"kuma.io/service":"dataplane-metrics"},"tls":{"mode":"activeMTLSBackend"}}`},
		{`skipMTLS: true`, `{"port":5670,"path":"/metrics","tags":{"kuma.io/service":"dataplane-metrics"},"skipMTLS":true,"tls":{"mode":"disabled"}}`},
		{`skipMTLS: false`, `{"port":5670,"path":"/metrics","tags":{"kuma.io/service":"dataplane-metrics"},"skipMTLS":false,"tls":{"mode":"activeMTLSBackend"}}`},
		{`skipMTLS: true, tls: {mode: providedTLS}, envoy: {}`, `{"port":5670,"path":"/metrics","tags":{"kuma.io/service":"dataplane-metrics"},"tls":{"mode":"providedTLS"},"envoy":{}}`},
		{
			`port: 1, path: /x, tags: {kuma.io/service: m}, tls: {mode: disabled}, aggregate: [{name: app, port: 80}]`,
			`{"port":1,"path":"/x","tags":{"kuma.io/service":"m"},"tls":{"mode":"disabled"},"aggregate":[{"name":"app","port":80,"path":"/metrics"}]}`,
		},
	} {
		doc := "type: Mesh\nname: default\nmetrics:\n  enabledBackend: prom\n  backends:\n  - name: prom\n    type: prometheus\n"
		if c.conf != "" {
			doc += "    conf: {" + c.conf + "}\n"
		}
		r, bad := decode(t, mesh.Meshes.Kind, doc)
		if bad != "" {
			t.Errorf("%s: %s", c.conf, bad)
			continue
		}
		got, err := resource.Marshal(mesh.Meshes.From(r).Spec.Metrics.Backends[0].Conf)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, strings.TrimSpace(string(got))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.conf, diff)
		}
		// What is stored is taken again as it is.
		if bad := mesh.Meshes.Check(r.Spec); len(bad) > 0 {
			t.Errorf("%s: stored, then refused: %v", c.conf, bad)
		}
	}
}

func TestBadMetrics(t *testing.T) {
	_, got := decode(t, mesh.Meshes.Kind, `
type: Mesh
name: default
metrics:
  enabledBackend: nobody
  backends:
  - {name: a, type: prometheus, conf: {port: 70000, path: metrics, skipMTLS: true, tls: {mode: activeMTLSBackend}, tags: {"a b": c}}}
  - {name: a, type: datadog}
  - {name: b, type: prometheus, conf: {skipMTLS: false, tls: {mode: disabled}, envoy: {filterRegex: "("}, aggregate: [{port: 1}, {name: x}, {name: x, port: 1, path: "/?", address: "::"}, {name: none, enabled: false}]}}
`)
	want := `metrics.backends[0].conf.port: port must be in the range [1, 65535]
metrics.backends[0].conf.path: must begin with /
metrics.backends[0].conf: skipMTLS and tls configuration cannot be defined together
metrics.backends[0].conf.tags["a b"]: tag name must consist of alphanumeric characters, dots, dashes, slashes, colons and underscores
metrics.backends[1].type: unknown backend type "datadog". Available backends: "prometheus"
metrics.backends[2].conf: skipMTLS and tls configuration cannot be defined together
metrics.backends[2].conf.envoy.filterRegex: is no regular expression: error parsing regexp: missing closing ): ` + "`(`" + `
metrics.backends[2].conf.aggregate[0].name: cannot be empty
metrics.backends[2].conf.aggregate[1].port: port must be in the range [1, 65535]
metrics.backends[2].conf.aggregate[2].name: duplicate entry "x": names must be unique
metrics.backends[2].conf.aggregate[2].path: must be a path alone, without ? and #
metrics.backends[2].conf.aggregate[2].address: address has to be valid IP address or domain name
metrics.backends[1].name: "a" name is already used for another backend
metrics.enabledBackend: has to be set to one of the metrics backend in mesh
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	_, got = decode(t, mesh.Dataplanes.Kind, "type: Dataplane\nmesh: default\nname: a\nnetworking: {address: 127.0.0.1, inbound: [{port: 80, tags: {kuma.io/service: a}}]}\nmetrics: {type: prometheus, conf: {port: 99999}}\n")
	if got != "metrics.conf.port: port must be in the range [1, 65535]\n" {
		t.Errorf("a Dataplane's own: %q", got)
	}
}
