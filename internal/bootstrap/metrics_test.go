package bootstrap_test

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/bootstrap"
	"kuma/internal/mesh"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// kuma-dp learns which endpoints of the workload Mesh.metrics names, as the
// Dataplane has it.
func TestAggregatedMetrics(t *testing.T) {
	s := memstore.New()
	no := false
	spec := &mesh.MeshSpec{Metrics: &mesh.Metrics{EnabledBackend: "prom", Backends: []mesh.MetricsBackend{{
		Name: "prom", Type: mesh.PrometheusType, Conf: &mesh.PrometheusConf{Aggregate: []mesh.PrometheusAggregate{
			{Name: "app", Port: 80}, {Name: "other", Port: 81}, {Name: "off", Port: 82},
		}},
	}}}}
	spec.Default()
	dp := &mesh.DataplaneSpec{
		Networking: &mesh.Networking{Address: "127.0.0.2"},
		Metrics: &mesh.MetricsBackend{Type: mesh.PrometheusType, Conf: &mesh.PrometheusConf{Aggregate: []mesh.PrometheusAggregate{
			{Name: "other", Port: 8081, Path: "/stats", Address: "127.0.0.9"}, {Name: "off", Enabled: &no}, {Name: "own", Port: 83},
		}}},
	}
	if _, err := s.Put(t.Context(), store.Set(mesh.Meshes.Make("", "default", spec)), store.Set(mesh.Dataplanes.Make("default", "made-before", dp))); err != nil {
		t.Fatal(err)
	}
	w := ask(server(t, func(c *bootstrap.Config) { c.Store = s }), "localhost", request(func(r *bootstrap.Request) {
		r.Name, r.DataplaneResource, r.DataplaneToken = "made-before", "", "token-of-made-before"
	}))
	var res bootstrap.Response
	if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	want := []bootstrap.Aggregate{
		{Name: "app", Port: 80, Path: "/metrics"}, {Name: "other", Address: "127.0.0.9", Port: 8081, Path: "/stats"}, {Name: "own", Port: 83, Path: "/metrics"},
	}
	if diff := cmp.Diff(want, res.Configuration.Metrics.Aggregate); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
