package cp_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"kuma/internal/cp/cptest"
)

// TestMetricNames reads the metrics of a control plane with a proxy: the names
// and labels that dashboards ask for are there, each has the zone, and nothing
// has a label for each proxy.
func TestMetricNames(t *testing.T) {
	cfg := config(t)
	cfg.Store.Type = "memory"
	cfg.Multizone.Zone.Name = "east"
	run(t, cfg)
	api := fmt.Sprintf("http://127.0.0.1:%d", cfg.APIServer.HTTP.Port)
	send := func(method, path, body string) string {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, api+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode > 201 {
			t.Fatalf("%s %s: %d %v", method, path, resp.StatusCode, err)
		}
		return string(text)
	}
	send("PUT", "/meshes/default", `{"type":"Mesh","name":"default","mtls":{"enabledBackend":"ca","backends":[{"name":"ca","type":"builtin"}]}}`)
	send("PUT", "/meshes/default/dataplanes/proxy-of-mine", cptest.Dataplane("default", "proxy-of-mine", "web", "web"))
	token := send("POST", "/tokens/dataplane", `{"mesh":"default","name":"proxy-of-mine"}`)
	ca, err := os.ReadFile(filepath.Join(cfg.General.WorkDir, "kuma-cp.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conn, err := grpc.NewClient(fmt.Sprintf("localhost:%d", cfg.DPServer.Port), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ads := cptest.NewADS(cptest.ADSConfig{Conn: conn, Mesh: "default", Name: "proxy-of-mine", Token: strings.TrimSpace(token), Metadata: cptest.Metadata("i1", "")})
	if err := ads.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ads.Close)
	within, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	if _, err := ads.WaitComplete(within); err != nil {
		t.Fatal(err)
	}

	_, page := get(t, fmt.Sprintf("http://127.0.0.1:%d/metrics", cfg.Diagnostics.ServerPort))
	kinds, labels := map[string]string{}, map[string]string{}
	for line := range strings.Lines(page) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			kinds[name] = kind
			continue
		}
		if strings.HasPrefix(line, "#") {
			continue
		}
		name, rest, ok := strings.Cut(line, "{")
		if !ok || !strings.Contains(rest, `zone="east"`) {
			t.Errorf("%s: there is no zone", line)
		}
		if strings.Contains(rest, "proxy-of-mine") {
			t.Errorf("%s: a series for a proxy", line)
		}
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base := strings.TrimSuffix(name, suffix); kinds[base] == "histogram" {
				name = base
			}
		}
		found := []string{}
		for part := range strings.SplitSeq(rest[:strings.LastIndex(rest, "}")], `",`) {
			key, _, _ := strings.Cut(part, "=")
			if key != "zone" && key != "le" {
				found = append(found, key)
			}
		}
		labels[name] = strings.Join(found, " ")
	}
	for name, want := range map[string]string{
		"cp_info": "gauge build_date cluster_id git_commit git_tag instance_id product version", "leader": "gauge",
		"api_server_http_request_duration_seconds": "histogram code handler method service",
		"api_server_http_response_size_bytes":      "histogram code handler method service",
		"api_server_http_requests_inflight":        "gauge handler service",
		"store":                                    "histogram operation resource_type",
		"resources_count":                          "gauge resource_type tenant",
		"component_dp_gc":                          "histogram", "component_meshservice_generator": "histogram", "component_store_counter": "histogram",
		"events_dropped": "counter", "kuma_cp_log_lines_total": "counter level logger",
		"xds_streams_active": "gauge", "xds_delivery": "histogram", "xds_generation": "histogram proxy_type result", "xds_generation_errors": "counter",
		"xds_requests_received": "counter confirmation type_url", "xds_responses_sent": "counter type_url", "xds_snapshot_resources": "histogram resource_type",
		"xds_dataplane_config_regenerated_total": "counter mesh",
		"hds_streams_active":                     "gauge", "hds_generation": "histogram", "hds_generation_errors": "counter", "hds_requests_received": "counter", "hds_responses_sent": "counter",
		"cert_generation": "counter mesh", "ca_manager_get_cert": "histogram backend_name",
		"certwatcher_read_certificate_total": "counter", "certwatcher_read_certificate_errors_total": "counter",
		"go_goroutines": "gauge", "process_cpu_seconds_total": "counter", "promhttp_metric_handler_requests_total": "counter code",
		"kuma_proxies": "gauge", "kuma_links_active": "gauge", "kuma_tls_handshake_errors_total": "counter server", "kuma_certificate_expiry_timestamp_seconds": "gauge certificate", "kuma_picture_revision": "gauge",
	} {
		if got := strings.TrimSpace(kinds[name] + " " + labels[name]); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	for _, line := range []string{
		`xds_streams_active{zone="east"} 1`, `kuma_proxies{zone="east"} 1`, `cert_generation{mesh="default",zone="east"} 1`, `leader{zone="east"} 1`,
		`resources_count{resource_type="Dataplane",tenant="",zone="east"} 1`, `xds_generation_errors{zone="east"} 0`,
	} {
		if !strings.Contains(page, "\n"+line+"\n") {
			t.Errorf("there is no line %s", line)
		}
	}
	for _, counted := range []string{`xds_generation_count{proxy_type="dataplane",result="changed",zone="east"} `, `xds_delivery_count{zone="east"} `} {
		if _, after, ok := strings.Cut(page, counted); !ok || after[0] == '0' {
			t.Errorf("%snothing, after a configuration was taken", counted)
		}
	}
	if t.Failed() {
		t.Logf("there are %s", slices.Sorted(maps.Keys(kinds)))
	}
}
