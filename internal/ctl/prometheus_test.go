package ctl

import (
	"strings"
	"testing"
)

func TestGeneratePrometheusConfig(t *testing.T) {
	t.Parallel()
	mesh := func(metrics string) string { return `{"type":"Mesh","name":"default"` + metrics + `}` }
	policies := func(backends ...string) string {
		return `{"total":1,"items":[{"type":"MeshMetric","mesh":"default","name":"all","spec":{"default":{"backends":[` + strings.Join(backends, ",") + `]}}}],"next":null}`
	}
	const (
		none     = `{"total":0,"items":[],"next":null}`
		enabled  = `{"monitoringAssignmentServer":{"enabled":true,"port":5676,"tlsEnabled":false}}`
		secured  = `{"monitoringAssignmentServer":{"enabled":true,"port":1234,"tlsEnabled":true}}`
		provided = `,"metrics":{"enabledBackend":"p","backends":[{"name":"p","type":"prometheus","conf":{"tls":{"mode":"providedTLS"}}}]}`
	)
	for _, c := range []struct {
		name, config, mesh, policies string
		args                         []string
		// out and err are what is in the output and what is said.
		out, err []string
		code     int
	}{
		{
			name: "what there is to know is asked", config: enabled, mesh: mesh(""), policies: policies(`{"type":"Prometheus","prometheus":{"clientId":"one"}}`),
			out: []string{"# Prometheus scrapes", `server: "http://127.0.0.1:5676"`, `client_id: "one"`, `job_name: "kuma-dataplanes"`, "scrape_interval: 15s", "refresh_interval: 5s", `regex: "default", action: keep`, "labelmap"},
		},
		{
			name: "TLS with a client's certificate", config: secured, mesh: mesh(""), policies: policies(`{"type":"Prometheus"}`),
			args: []string{"--ca-file=/etc/ca.pem", "--cert-file=/etc/c.pem", "--key-file=/etc/k.pem", "--scrape-interval=1500ms"},
			out:  []string{`server: "https://127.0.0.1:1234"`, "    tls_config:\n      ca_file: \"/etc/ca.pem\"\n      cert_file: \"/etc/c.pem\"\n      key_file: \"/etc/k.pem\"\n", `client_id: "prometheus"`, "scrape_interval: 1500ms"},
		},
		{
			name: "certificates of the proxies' own", config: enabled, mesh: mesh(provided), policies: none,
			args: []string{"--metrics-ca-file=/etc/m.pem", "--metrics-server-name=proxy"},
			out:  []string{"  tls_config:\n    ca_file: \"/etc/m.pem\"\n    server_name: \"proxy\"\n"},
		},
		{
			name: "certificates of the proxies' own, which nothing verifies", config: enabled, mesh: mesh(provided), policies: none,
			code: 1, err: []string{`metrics of Mesh "default"`, "--metrics-ca-file"},
		},
		{
			name: "members of the mesh alone", config: enabled, mesh: mesh(""), policies: policies(`{"type":"Prometheus","prometheus":{"tls":{"mode":"ActiveMTLSBackend"}}}`),
			out: []string{"scrape_configs:"}, err: []string{`Warning: proxies serve metrics to members of the mesh alone (MeshMetric "all" says so)`},
		},
		{
			name: "several clients", config: enabled, mesh: mesh(""), policies: policies(`{"type":"Prometheus","prometheus":{"clientId":"b"}}`, `{"type":"Prometheus","prometheus":{"clientId":"a"}}`),
			code: 1, err: []string{"a, b", "--client-id"},
		},
		{
			name: "a policy that is only tried out", config: enabled, mesh: mesh(""),
			policies: strings.Replace(policies(`{"type":"Prometheus","prometheus":{"clientId":"b"}}`), `"name":"all"`, `"name":"all","labels":{"kuma.io/effect":"shadow"}`, 1),
			out:      []string{`client_id: "prometheus"`}, err: []string{"has no metrics"},
		},
		{
			name: "no metrics", config: enabled, mesh: mesh(""), policies: none,
			out: []string{"scrape_configs:"}, err: []string{`Warning: mesh "default" has no metrics for the client "prometheus"`},
		},
		{
			name: "a control plane that tells nothing", config: `{"monitoringAssignmentServer":{"enabled":false}}`, mesh: mesh(""), policies: none,
			code: 1, err: []string{"KUMA_MONITORING_ASSIGNMENT_SERVER_ENABLED=true", "--server"},
		},
		{
			name: "another server", mesh: mesh(""), policies: policies(`{"type":"Prometheus"}`), args: []string{"--server=http://cp:1"},
			out: []string{`server: "http://cp:1"`},
		},
		{
			name: "TLS files without TLS", config: enabled, mesh: mesh(""), policies: none, args: []string{"--ca-file=x"},
			code: 1, err: []string{"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_ENABLED=true"},
		},
		{name: "a server that is no URL", mesh: mesh(""), args: []string{"--server=cp:1"}, code: 1, err: []string{"--server"}},
		{name: "half a pair", args: []string{"--cert-file=x"}, code: 1, err: []string{"--key-file"}},
		{name: "both ways", args: []string{"--ca-file=x", "--skip-verify"}, code: 1, err: []string{"--skip-verify"}},
		{name: "no time", args: []string{"--scrape-interval=0s"}, code: 1, err: []string{"--scrape-interval"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			answers := map[string]answer{"GET /meshes/default": {200, c.mesh}, "GET /meshes/default/meshmetrics?size=1000": {200, c.policies}}
			if c.config != "" {
				answers["GET /config"] = answer{200, c.config}
			}
			s := newServer(t, answers)
			r := newMachine(t).using(s.URL).run(append([]string{"generate", "prometheus-config"}, c.args...)...)
			if r.code != c.code || c.code != 0 && r.stdout != "" {
				t.Errorf("exit code %d, output %q, errors %q", r.code, r.stdout, r.stderr)
			}
			for _, want := range c.out {
				if !strings.Contains(r.stdout, want) {
					t.Errorf("the output lacks %q:\n%s", want, r.stdout)
				}
			}
			for _, want := range c.err {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("%q is not said, but %q", want, r.stderr)
				}
			}
			if len(c.err) == 0 && r.stderr != "" {
				t.Errorf("said: %q", r.stderr)
			}
		})
	}
}
