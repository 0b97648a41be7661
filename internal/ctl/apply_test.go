package ctl

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const twoMeshes = `# a comment
type: Mesh
name: m1
---
# nothing here
---
type: Mesh
name: m2
`

// dryRunIndex is that of a control plane which tries before it writes.
func dryRunIndex() string {
	return `{"product":"Kuma","version":"` + clientVersion() + `","dryRun":true}`
}

func TestApply(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"PUT /meshes/m1": {201, `{}`},
		"PUT /meshes/m2": {200, `{"warnings":["tracing is deprecated"]}`},
	})
	m := newMachine(t).using(s.URL)
	want := "resource type=\"Mesh\" mesh=\"\" name=\"m1\" Created\nresource type=\"Mesh\" mesh=\"\" name=\"m2\" Updated\n"
	warning := "Warning: tracing is deprecated\n"

	m.run("apply", "-f", m.file("a.yaml", twoMeshes)).want(t, 0, want, warning)
	if d := cmp.Diff([]string{"PUT /meshes/m1", "PUT /meshes/m2"}, s.requests()); d != "" {
		t.Errorf("requests to a server that can't try (-want +got):\n%s", d)
	}
	if got := s.bodies["PUT /meshes/m1"]; got != `{"name":"m1","type":"Mesh"}` {
		t.Errorf("body %s", got)
	}
	if got := s.headers.Get("Content-Type"); got != "application/json" {
		t.Errorf("content type %q", got)
	}

	m.stdin = twoMeshes
	m.run("apply", "-f", "-").want(t, 0, want, warning)

	m.file("dir/b.yml", "type: Mesh\nname: m2\n")
	m.file("dir/a.json", "{\n\t\"type\": \"Mesh\",\n\t\"name\": \"m1\"}")
	m.file("dir/readme.md", "not a resource")
	m.file("dir/sub/c.yaml", "type: Mesh\nname: m3\n")
	m.run("apply", "-f", m.home+"/dir").want(t, 0, want, warning)

	m.run("apply", "-f", m.home+"/dir/a.json", "-f", m.home+"/dir/b.yml").want(t, 0, want, warning)

	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/a.yaml" {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials were sent to a third party")
		}
		_, _ = w.Write([]byte(twoMeshes))
	}))
	defer web.Close()
	m.run("apply", "-f", web.URL+"/a.yaml").want(t, 0, want, warning)
	m.run("apply", "-f", web.URL+"/b.yaml").want(t, 1, "", "…the answer is 204 No Content, not 200")
}

func TestApplyTriesAllBeforeItWrites(t *testing.T) {
	t.Parallel()
	answers := map[string]answer{
		"GET /":                       {200, dryRunIndex()},
		"PUT /meshes/m1":              {201, `{}`},
		"PUT /meshes/m2":              {201, `{}`},
		"PUT /meshes/m1?dry-run=true": {201, `{}`},
		"PUT /meshes/m2?dry-run=true": stdError(400, "Could not process a resource", "Resource is not valid", "mtls.enabledBackend", "unknown backend", "mtls", "bad"),
	}
	s := newServer(t, answers)
	m := newMachine(t).using(s.URL)
	f := m.file("a.yaml", twoMeshes)
	m.run("apply", "-f", f).want(t, 1, "",
		"resource[1]: a.yaml line 7: resource type=\"Mesh\" mesh=\"\" name=\"m2\": failed server side: Could not process a resource (Resource is not valid);mtls.enabledBackend=unknown backend\n  ;mtls=bad\n"+
			"Error: failed to validate some resources (1 of 2); nothing was changed\n")
	if d := cmp.Diff([]string{"PUT /meshes/m1?dry-run=true", "PUT /meshes/m2?dry-run=true"}, s.requests()); d != "" {
		t.Errorf("requests (-want +got):\n%s", d)
	}

	answers["PUT /meshes/m2?dry-run=true"] = answer{200, `{}`}
	m.run("apply", "-f", f).want(t, 0, "…m1\" Created…m2\" Created", "")
}

// A resource of a mesh that the same apply makes can't be tried: the mesh is
// not there yet. In another mesh that is missing it is a mistake.
func TestApplyTriesWhatItCan(t *testing.T) {
	t.Parallel()
	missing := stdError(404, "Failed to retrieve Mesh", "Not found")
	s := newServer(t, map[string]answer{
		"GET /":                                    {200, dryRunIndex()},
		"PUT /meshes/m1?dry-run=true":              {201, `{}`},
		"PUT /meshes/m1/secrets/a?dry-run=true":    missing,
		"PUT /meshes/other/secrets/b?dry-run=true": missing,
		"PUT /meshes/m1":                           {201, `{}`},
		"PUT /meshes/m1/secrets/a":                 {201, `{}`},
	})
	m := newMachine(t).using(s.URL)
	good := "type: Mesh\nname: m1\n---\n{type: Secret, mesh: m1, name: a, data: YWJj}\n"
	m.run("apply", "-f", m.file("a.yaml", good)).want(t, 0, "…Secret\" mesh=\"m1\" name=\"a\" Created", "")
	// What the control plane refuses for another reason is refused, be the mesh new or not.
	bad := stdError(400, "Could not process a resource", "Resource is not valid", "data", "cannot be empty")
	gone := stdError(404, "Could not retrieve a resource", "Not found")
	for _, a := range []answer{bad, gone} {
		s := newServer(t, map[string]answer{
			"GET /": {200, dryRunIndex()}, "PUT /meshes/m1?dry-run=true": {201, `{}`}, "PUT /meshes/m1/secrets/a?dry-run=true": a,
		})
		m.using(s.URL).run("apply", "-f", m.file("a.yaml", good)).want(t, 1, "", "…resource[1]: a.yaml line 4:…(1 of 2); nothing was changed")
	}
	m.using(s.URL)
	// The mesh has to be made first, as the documents are written in order.
	m.run("apply", "-f", m.file("b.yaml", "{type: Secret, mesh: m1, name: a, data: YWJj}\n---\ntype: Mesh\nname: m1\n")).want(t, 1, "", "…resource[0]: b.yaml line 1:…Failed to retrieve Mesh (Not found)…nothing was changed")
	m.run("apply", "-f", m.file("a.yaml", good+"---\n{type: Secret, mesh: other, name: b}")).want(t, 1, "", "…resource[2]: a.yaml line 6:…Failed to retrieve Mesh (Not found)…(1 of 3); nothing was changed")
}

// A new mesh's constraints are held against its Dataplanes here, since the
// control plane has not got them yet, unless they need what it alone knows.
func TestApplyHoldsConstraints(t *testing.T) {
	t.Parallel()
	const dp = "\n---\n{type: Dataplane, mesh: m1, name: d, networking: {address: 192.0.2.1, inbound: [{port: 80, tags: {kuma.io/service: a, team: red}}]}}\n"
	for _, c := range []struct {
		name, constraints string
		code              int
		stderr            string
	}{
		{"none", "{}", 0, ""},
		{"fulfilled", "{dataplaneProxy: {requirements: [{tags: {team: red}}], restrictions: [{tags: {team: blue}}]}}", 0, ""},
		{"required", "{dataplaneProxy: {requirements: [{tags: {team: blue}}]}}", 1, `…resource[1]: a.yaml line 3:…does not fulfill any requirements…(1 of 2); nothing was changed`},
		{"restricted", "{dataplaneProxy: {restrictions: [{tags: {team: '*'}}]}}", 1, "…resource[1]: a.yaml line 3:…matches restricted tags…nothing was changed"},
		{"of the zone", "{dataplaneProxy: {requirements: [{tags: {kuma.io/zone: east}}]}}", 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, map[string]answer{
				"GET /":                       {200, dryRunIndex()},
				"PUT /meshes/m1?dry-run=true": {201, `{}`},
				"PUT /meshes/m1/dataplanes/d?dry-run=true": stdError(404, "Failed to retrieve Mesh", "Not found"),
				"PUT /meshes/m1":              {201, `{}`},
				"PUT /meshes/m1/dataplanes/d": {201, `{}`},
			})
			m := newMachine(t).using(s.URL)
			stdout := ""
			if c.code == 0 {
				stdout = "…Dataplane\" mesh=\"m1\" name=\"d\" Created"
			}
			f := m.file("a.yaml", "{type: Mesh, name: m1, constraints: "+c.constraints+"}"+dp)
			m.run("apply", "-f", f).want(t, c.code, stdout, c.stderr)
			// The mesh is there, with other constraints.
			s = newServer(t, map[string]answer{
				"GET /":                       {200, dryRunIndex()},
				"PUT /meshes/m1?dry-run=true": {200, `{}`},
				"PUT /meshes/m1/dataplanes/d?dry-run=true": {201, `{}`},
				"PUT /meshes/m1":              {200, `{}`},
				"PUT /meshes/m1/dataplanes/d": {201, `{}`},
			})
			m.using(s.URL).run("apply", "-f", f).want(t, c.code, stdout, c.stderr)
		})
	}
}

func TestApplyStopsAtTheFirstFailure(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		answer
		err string
	}{
		{"401", stdError(401, "Invalid authentication data", "Unauthenticated"), "…failed server side: Invalid authentication data (Unauthenticated)…kumactl config control-planes add"},
		{"403", stdError(403, "Access Denied", "user \"x\" cannot access the resource of type \"Mesh\""), "…failed server side: Access Denied (user \"x\" cannot access"},
		{"403 without credential", stdError(403, "Access Denied", "user \"mesh-system:anonymous/mesh-system:unauthenticated\" cannot"), "…Access Denied…log in with"},
		{"404", answer{404, "404: Page Not Found"}, "…does not have the kind Mesh"},
		{"405", stdError(405, "Method not allowed", "On zone\n"), "…Method not allowed (On zone)\n"},
		{"409", stdError(409, "Conflict", "it was changed"), "…Conflict (it was changed)"},
		{"415", answer{415, "415: Unsupported Media Type"}, "…answered: 415: Unsupported Media Type"},
		{"500", stdError(500, "Could not process a resource", "Internal Server Error"), "…Could not process a resource (Internal Server Error)"},
		{"502 of a proxy", answer{502, "<html>\nBad Gateway"}, "…answered: <html>"},
		{"503 empty", answer{503, ""}, "…answered: 503 Service Unavailable"},
		{"redirect without place", answer{302, ""}, "…"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, map[string]answer{"PUT /meshes/m1": {201, "{}"}, "PUT /meshes/m2": c.answer})
			m := newMachine(t).using(s.URL)
			text := twoMeshes + "---\ntype: Mesh\nname: m3\n"
			m.run("apply", "-f", m.file("a.yaml", text)).want(t, 1, "resource type=\"Mesh\" mesh=\"\" name=\"m1\" Created\n",
				c.err+"…1 of 3 resources were applied before it")
			if n := len(s.requests()); n != 2 {
				t.Errorf("%d requests, want 2: %v", n, s.requests())
			}
		})
	}
}

func TestApplyVariables(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	f := m.file("a.yaml", "type: Mesh\nname: \"{{ a.b }}\"\nlabels:\n  x: '{{{ raw }}}'\n  w: '{{ raw }}'\n  z: '{{ none }}'\n")
	m.run("apply", "-f", f, "--dry-run", "-v", "a.b=m1", "--var", "raw=a<b").want(t, 0,
		"labels:\n  w: a&lt;b\n  x: a<b\n  z: \"\"\nname: m1\ntype: Mesh\n", "")
	// Without a variable the text is no template.
	m.run("apply", "-f", f, "--dry-run").want(t, 1, "", `…name: "{{ a.b }}" must be`)

	for _, c := range []struct{ pair, text, err string }{
		{"novalue", "", `…--var "novalue": must be NAME=VALUE`},
		{"a=1", "{{ #x }}", "…a.yaml: template:"},
		{"a=1", "{{", "…a.yaml: template:"},
		{"a=1", "{{> /etc/passwd }}", "…templates can't include files"},
	} {
		m.run("apply", "-f", m.file("a.yaml", c.text), "--dry-run", "-v", c.pair).want(t, 1, "", c.err)
	}
	m.run("apply", "-f", f, "--dry-run", "-v", "a=1", "-v", "a.b=2").want(t, 1, "", `…"a" is a value already`)
}

func TestApplyDryRunAsksNobody(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	m := newMachine(t).using(s.URL)
	m.run("apply", "--dry-run", "-f", m.file("a.yaml", twoMeshes)).want(t, 0, "name: m1\ntype: Mesh\n---\nname: m2\ntype: Mesh\n", "")
	if len(s.asked) > 0 {
		t.Errorf("requests: %v", s.asked)
	}
}

func TestApplyBadInput(t *testing.T) {
	t.Parallel()
	const dp = "type: Dataplane\nmesh: default\nname: web\nnetworking:\n  address: 127.0.0.1\n"
	for _, c := range []struct{ name, text, err string }{
		{"empty", "", "Error: no resource(s) passed to apply\n"},
		{"comments", "# a\n---\n\n", "Error: no resource(s) passed to apply\n"},
		{"yaml", "type: Mesh\nname: a\n---\ntype: Mesh\nname: b: c\n", "…resource[1]: failed to parse resource: a.yaml line 4: …line 5"},
		{"tab", "type: Mesh\n\tname: a\n", "…a.yaml line 1: …line 2"},
		{"json", "{\"type\": \"Mesh\",,}", "…resource[0]: failed to parse resource: a.yaml line 1"},
		{"twice the key", "type: Mesh\nname: a\nname: b\n", `…line 3: key "name" already set in map`},
		{"twice the resource", twoMeshes + "---\ntype: Mesh\nname: m1\n", `…resource[2]: failed to parse resource: a.yaml line 10: resource type="Mesh" mesh="" name="m1" stands at a.yaml line 1 already`},
		{"list", "- type: Mesh\n", "…must be an object with type and name, not a list"},
		{"text", "hello\n", `…must be an object with type and name, not "hello"`},
		{"no type", "name: a\n", "…type: cannot be empty"},
		{"null type", "type:\nname: a\n", "…type: cannot be empty"},
		{"type is a number", "type: 1\n", "…type: must be a string, not 1"},
		{"unknown type", "type: Meshh\nname: a\n", `…unknown kind "Meshh"; did you mean "Mesh"?`},
		{"case of type", "type: mesh\nname: a\n", `…unknown kind "mesh"; did you mean "Mesh"?`},
		{"kubernetes", "apiVersion: kuma.io/v1alpha1\nkind: Mesh\nmetadata: {name: a}\n", "…Kubernetes' form"},
		{"no name", "type: Mesh\n", "…name: cannot be empty"},
		{"name is a number", "type: Mesh\nname: 1\n", "…a.yaml line 2: name: must be a string, not 1; put it in quotes"},
		{"bad name", "type: Mesh\nname: A_b\n", `…name: "A_b" must be at most 253 lower-case letters`},
		{"no mesh", "type: Secret\nname: a\n", "…mesh: cannot be empty"},
		{"mesh is a list", "type: Secret\nname: a\nmesh: [a]\n", "…mesh: must be a string, not a list"},
		{"yes and no", "type: Secret\nname: a\nmesh: no\n", "…mesh: must be a string, not false; put it in quotes"},
		{"labels", "type: Mesh\nname: a\nlabels: {a: 1}\n", `…labels["a"]: must be a string, not 1`},
		{"read-only", "type: DataplaneInsight\nname: a\nmesh: m\n", "…type: DataplaneInsight is read-only"},
		{"unknown field", dp + "  adress: a\n", `…a.yaml line 6: networking.adress: unknown field; did you mean "address"?`},
		{"unknown at the top", dp + "network: a\n", `…a.yaml line 6: network: unknown field; did you mean "networking"?`},
		{"wrong type", dp + "  inbound: {port: 1}\n", "…networking.inbound: must be a list, not an object"},
		{"wrong number", dp + "  inbound:\n  - port: 1.5\n", "…line 7: networking.inbound[0].port: must be a whole number, not 1.5"},
		{"enum", dp + "  inbound:\n  - port: 1\n    state: up\n", "…line 8: networking.inbound[0].state: value 'up' is not supported, it must be one of: Ready, NotReady"},
		{"duration", dp + "  inbound:\n  - port: 1\n    serviceProbe:\n      interval: soon\n", `…interval: "soon" is not a duration`},
		{"base64", "type: Secret\nmesh: m\nname: a\ndata: '***'\n", "…line 4: data: must be base64"},
		{"spec beside", "type: MeshService\nmesh: m\nname: a\nspek: {}\n", `…spek: unknown field; did you mean "spec"?`},
		{"spec is a list", "type: MeshService\nmesh: m\nname: a\nspec: []\n", "…spec: must be an object, not a list"},
		{"deep", "type: Mesh\nname: a\nx: " + strings.Repeat("[", 20000), "…failed to parse resource"},
		{"alias bomb", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n", "…failed to parse resource: a.yaml line 1"},
		{"binary", "\x00\x01\xff", "…failed to parse resource: a.yaml line 1"},
		{"large document", "type: Mesh\nname: a\nx: " + strings.Repeat("a", maxDocument), "…the limit is 4 MiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, nil)
			m := newMachine(t).using(s.URL)
			m.run("apply", "-f", m.file("a.yaml", c.text)).want(t, 1, "", c.err)
			for _, r := range s.requests() {
				if !strings.HasPrefix(r, "GET ") {
					t.Errorf("%s was sent", r)
				}
			}
		})
	}
}

func TestApplyBadFiles(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	m := newMachine(t).using(s.URL)
	m.file("empty/notes.txt", "x")
	big := m.file("big.yaml", "")
	if err := os.Truncate(big, maxInput+1); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ file, err string }{
		{"", "…--file must not be empty"},
		{m.home + "/none.yaml", `…there is no file or directory "none.yaml"`},
		{m.home + "/empty", "…no resource(s) passed to apply: empty has no .yaml, .yml or .json file"},
		{big, "…big.yaml is larger than the limit of 32 MiB"},
		{"http://127.0.0.1:1/x.yaml", "…connection refused"},
		{"http://[bad/x.yaml", "…http://[bad/x.yaml"},
	} {
		m.run("apply", "-f", c.file).want(t, 1, "", c.err)
	}
}

// What the server adds to its answers may come back.
func TestApplyTakesWhatGetPrints(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"GET /meshes/m/meshservices/a": {200, `{"type":"MeshService","mesh":"m","name":"a","creationTime":"2026-01-02T03:04:05Z","modificationTime":"2026-01-02T03:04:05Z",` +
			`"labels":{"kuma.io/mesh":"m"},"kri":"kri_msvc_m___a_","snis":[{"port":80,"sni":"x"}],"spec":{},"status":{"anything":1}}`},
		"PUT /meshes/m/meshservices/a": {200, "{}"},
	})
	m := newMachine(t).using(s.URL)
	r := m.run("get", "meshservice", "a", "-m", "m", "-o", "yaml")
	r.want(t, 0, "…creationTime…kri: kri_msvc_m___a_", "")
	m.stdin = r.stdout
	m.run("apply", "-f", "-").want(t, 0, "resource type=\"MeshService\" mesh=\"m\" name=\"a\" Updated\n", "")
}

// A kind that only the control plane knows is sent as it is; a field that is
// unknown here is left to a control plane of another version.
func TestApplyToAnotherVersion(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"GET /":                        {200, `{"product":"Kuma","version":"2.14.3"}`},
		"GET /_resources":              {200, `{"resources":[{"name":"MeshNew","path":"meshnews","scope":"Mesh","shortName":"mn"}]}`},
		"PUT /meshes/m/meshnews/a":     {201, "{}"},
		"PUT /meshes/m1":               {201, "{}"},
		"GET /meshes/default/meshnews": {200, `{"items":[{"type":"MeshNew","mesh":"default","name":"n"}]}`},
	})
	m := newMachine(t).using(s.URL)
	m.run("apply", "-f", m.file("a.yaml", "type: MeshNew\nmesh: m\nname: a\nspec: {x: 1}\n---\ntype: Mesh\nname: m1\nfuture: 1\n")).
		want(t, 0, "…MeshNew\" mesh=\"m\" name=\"a\" Created…m1\" Created", "…Warning: resource[1]: a.yaml line 6: future: unknown field…another version")
	for _, word := range []string{"meshnews", "meshnew", "mn", "MeshNew"} {
		m.run("get", word).want(t, 0, "MESH      NAME   AGE\ndefault   n      never\n", "")
	}
}

func FuzzDocuments(f *testing.F) {
	f.Add([]byte(twoMeshes))
	f.Add([]byte("type: Dataplane\nmesh: m\nname: a\nnetworking:\n  inbound: [{port: 1, tags: {on: y}}]\n"))
	f.Add([]byte("{\"type\":\"Mesh\"}\n--- x\n- a"))
	kinds, err := embedded()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		lines := strings.Count(string(text), "\n") + 1
		for _, d := range split(input{"x", text}) {
			if d.line < 1 || d.line > lines {
				t.Fatalf("document at line %d of %d", d.line, lines)
			}
			tree, err := d.parse()
			if err != nil {
				continue
			}
			if k, err := kindOf(tree, kinds); err == nil {
				for _, f := range k.check(tree) {
					if n := d.lineOf(f.path); n < 1 || n > lines {
						t.Fatalf("finding at line %d of %d", n, lines)
					}
				}
			}
			if _, err := json.Marshal(tree); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzRender(f *testing.F) {
	f.Add("{{ a }}{{{ b.c }}}{{#a}}x{{/a}}{{^a}}y{{/a}}{{! c }}{{=<% %>=}}<% a %>")
	f.Add("{{> p }}{{#a.b}}{{/a.b}}")
	f.Fuzz(func(t *testing.T, text string) {
		out, err := render(input{"x", []byte(text)}, map[string]string{"a": "1", "b.c": "{{ a }}"})
		if err == nil && len(out.text) > maxInput {
			t.Fatal("the limit does not hold")
		}
	})
}
