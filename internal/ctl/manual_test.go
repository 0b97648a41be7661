package ctl

import (
	"os"
	"strings"
	"testing"
	"time"
)

// TestManual runs the manual: it writes the files that it shows, runs every
// command against a server with these answers, and compares the output.
func TestManual(t *testing.T) {
	raw, err := os.ReadFile("../../docs/kumactl.md")
	if err != nil {
		t.Fatal(err)
	}
	ago := func(d time.Duration) string { return time.Now().Add(-d).UTC().Format(time.RFC3339Nano) }
	const web = "/meshes/default/meshservices/web"
	s := newServer(t, map[string]answer{
		"GET /":                                 {200, `{"product":"Kuma","version":"` + clientVersion() + `","dryRun":true}`},
		"PUT /meshes/default":                   {200, "{}"},
		"PUT " + web:                            {201, "{}"},
		"DELETE " + web:                         {200, "{}"},
		"DELETE " + web + "2":                   stdError(404, "Could not delete a resource", "Not found"),
		"PUT " + web + "?dry-run=true":          {201, "{}"},
		"PUT /meshes/default?dry-run=true":      {200, "{}"},
		"GET /meshes/default/meshservices/none": stdError(404, "Could not retrieve a resource", "Not found"),
		"GET /meshes":                           {200, `{"items":[{"name":"default","creationTime":"` + ago(5*time.Minute) + `","mtls":{"enabledBackend":"ca-1","backends":[{"name":"ca-1","type":"builtin"}]}}]}`},
		"GET /meshes/default/dataplanes": {200, `{"items":[{"mesh":"default","name":"web","creationTime":"` + ago(80*time.Hour) + `","networking":{"address":"10.0.0.1",
 "inbound":[{"port":80,"tags":{"kuma.io/service":"web","kuma.io/protocol":"http"}},{"port":81,"tags":{"kuma.io/service":"adm"}}]}}]}`},
		"GET /meshes/default/dataplanes/web": {200, `{"type":"Dataplane","mesh":"default","name":"web","creationTime":"2026-01-02T03:04:05Z","networking":{"address":"10.0.0.1"}}`},
		"GET /meshes/default/dataplanes/_overview?size=1000&tag=kuma.io%2Fservice%3Aweb": {200, `{"items":[{"mesh":"default","name":"web",
 "dataplane":{"networking":{"inbound":[{"port":80,"tags":{"kuma.io/service":"web"}}]}},
 "dataplaneInsight":{"subscriptions":[{"connectTime":"` + ago(61*time.Minute) + `","status":{"lastUpdateTime":"` + ago(90*time.Second) + `","total":{"responsesSent":"10","responsesAcknowledged":"10"}},
  "version":{"kumaDp":{"version":"2.14.0"},"envoy":{"version":"1.40.0"}}}],
 "mTLS":{"certificateExpirationTime":"2026-05-06T07:08:09Z","lastCertificateRegeneration":"` + ago(61*time.Minute) + `","certificateRegenerations":1,"issuedBackend":"ca-1","supportedBackends":["ca-1"]}}}]}`},
		"GET /meshes/default/dataplanes/web/policies": {200, `{"items":[{"type":"dataplane","matchedPolicies":{"MeshTimeout":[{"name":"mesh-timeout-all-default"}]}},
 {"type":"inbound","name":"10.0.0.1:80:8080","service":"web","matchedPolicies":{"TrafficPermission":[{"name":"allow-all-default"}]}}]}`},
		"GET /meshes/default/dataplanes/web/clusters": {200, "localhost:8080::default_priority::max_connections::1024\n"},
		"POST /tokens/dataplane":                      {200, "a.b.c"},
		"POST /tokens/zone":                           {200, "a.b.c"},
		"POST /tokens/user":                           {200, "a.b.c"},
	})
	m := newMachine(t)
	m.file(".kumactl/config", "contexts: [{name: local, controlPlane: local}]\ncontrolPlanes: [{name: local, coordinates: {apiServer: {url: '"+s.URL+"'}}}]\ncurrentContext: local\n")
	t.Chdir(m.home)

	const where = "http://localhost:5681"
	commands := 0
	for kind, block := range blocks(string(raw)) {
		if name, ok := strings.CutPrefix(kind, "yaml file="); ok {
			m.file(name, block)
			continue
		}
		if kind != "console" {
			continue
		}
		for example := range strings.SplitSeq(strings.TrimPrefix(block, "$ "), "\n$ ") {
			command, want, _ := strings.Cut(example, "\n")
			commands++
			command, file, redirected := strings.Cut(command, " > ")
			args := strings.Fields(strings.ReplaceAll(command, where, s.URL))
			if args[0] != "kumactl" {
				t.Fatalf("%q is not a command of kumactl", command)
			}
			r := m.run(args[1:]...)
			got := r.stdout + r.stderr
			if redirected {
				if r.code != 0 || r.stdout == "" {
					t.Errorf("%s: exit code %d: %s", command, r.code, r.stderr)
				}
				m.file(file, r.stdout)
				got = r.stderr
			}
			got = strings.ReplaceAll(got, s.URL, where)
			got = strings.ReplaceAll(got, "Kuma "+clientVersion(), "Kuma 2.14.0")
			compare(t, command, strings.TrimSuffix(got, "\n"), strings.TrimSuffix(want, "\n"))
		}
	}
	if commands < 20 {
		t.Errorf("only %d commands were found in the manual", commands)
	}
}

// blocks yields the fenced blocks of a Markdown text with what follows their
// opening fence.
func blocks(text string) func(yield func(kind, block string) bool) {
	return func(yield func(kind, block string) bool) {
		parts := strings.Split("\n"+text, "\n```")
		for i := 1; i+1 < len(parts); i += 2 {
			kind, block, _ := strings.Cut(parts[i], "\n")
			if !yield(kind, block+"\n") {
				return
			}
		}
	}
}
