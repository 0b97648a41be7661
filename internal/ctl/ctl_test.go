package ctl

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// server answers as the contract says, out of a table of "METHOD path" to
// status and body. It keeps what it was asked.
type server struct {
	*httptest.Server
	mu      sync.Mutex
	answers map[string]answer
	asked   []string
	bodies  map[string]string
	headers http.Header
}

type answer struct {
	status int
	body   string
}

// theIndex is the answer of a control plane of this version.
func theIndex() string {
	return `{"product":"Kuma","version":"` + clientVersion() + `","instanceId":"i1","clusterId":"c1"}`
}

func newServer(t *testing.T, answers map[string]answer) *server {
	s := &server{answers: answers, bodies: map[string]string{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	what := r.Method + " " + r.URL.RequestURI()
	body, _ := io.ReadAll(r.Body)
	s.asked = append(s.asked, what)
	s.bodies[what] = string(body)
	s.headers = r.Header
	a, ok := s.answers[what]
	switch {
	case ok:
	case what == "GET /":
		a = answer{200, theIndex()}
	default:
		a = answer{404, "404: Page Not Found"}
	}
	w.WriteHeader(a.status)
	_, _ = io.WriteString(w, a.body)
}

// requests are those made so far, apart from that for the index.
func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.asked), func(r string) bool { return r == "GET /" })
}

// result is what one run of kumactl left.
type result struct {
	code           int
	stdout, stderr string
}

// machine is a home directory in which kumactl runs.
type machine struct {
	t     *testing.T
	home  string
	stdin string
}

func newMachine(t *testing.T) *machine { return &machine{t: t, home: t.TempDir()} }

// using writes a configuration for the server.
func (m *machine) using(url string) *machine {
	m.file(".kumactl/config", "contexts: [{name: s, controlPlane: s}]\ncontrolPlanes: [{name: s, coordinates: {apiServer: {url: '"+url+"'}}}]\ncurrentContext: s\n")
	return m
}

func (m *machine) file(name, content string) string {
	m.t.Helper()
	p := filepath.Join(m.home, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return p
}

func (m *machine) run(args ...string) result {
	m.t.Helper()
	var out, errOut bytes.Buffer
	code := Main(args, strings.NewReader(m.stdin), &out, &errOut, func(k string) string {
		if k == "HOME" {
			return m.home
		}
		return ""
	})
	clean := func(b bytes.Buffer) string { return strings.ReplaceAll(b.String(), m.home+"/", "") }
	return result{code, clean(out), clean(errOut)}
}

// want compares a run with what it should leave. A stderr of "…text…" has to
// be contained; the others have to be equal.
func (r result) want(t *testing.T, code int, stdout, stderr string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d\nstdout: %s\nstderr: %s", r.code, code, r.stdout, r.stderr)
	}
	compare(t, "stdout", r.stdout, stdout)
	compare(t, "stderr", r.stderr, stderr)
}

func compare(t *testing.T, what, got, want string) {
	t.Helper()
	if part, ok := strings.CutPrefix(want, "…"); ok {
		for part := range strings.SplitSeq(part, "…") {
			if !strings.Contains(got, part) {
				t.Errorf("%s lacks %q:\n%s", what, part, got)
			}
		}
		return
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func stdError(status int, title, detail string, fields ...string) answer {
	p := map[string]any{"type": "/std-errors", "status": status, "title": title, "detail": detail}
	var list []map[string]string
	for i := 0; i+1 < len(fields); i += 2 {
		list = append(list, map[string]string{"field": fields[i], "reason": fields[i+1]})
	}
	if list != nil {
		p["invalid_parameters"] = list
	}
	b, err := json.Marshal(p)
	if err != nil {
		panic(err)
	}
	return answer{status, string(b)}
}

func TestCommandLineMistakes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		err  string
	}{
		{[]string{"aply"}, `…unknown command "aply" for "kumactl"…apply`},
		{[]string{"config", "viev"}, `Error: unknown command "viev" for "kumactl config"; did you mean "view"?` + "\n"},
		{[]string{"inspect", "nothing-like-it"}, `…known: dataplane, dataplanes`},
		{[]string{"version", "--log-level", "loud"}, "Error: unknown log level \"loud\": must be off, info or debug\n"},
		{[]string{"version", "--api-timeout", "-1s"}, "Error: --api-timeout must not be negative\n"},
		{[]string{"apply"}, "Error: required flag(s) \"file\" not set\n"},
		{[]string{"get", "meshes", "-o", "xml"}, "Error: unknown output format \"xml\": must be table, yaml or json\n"},
		{[]string{"get", "meshes", "--size", "0"}, "Error: --size must be 1 to 1000, not 0\n"},
		{[]string{"get", "meshs", "--no-config"}, `…unknown TYPE: meshs (did you mean "mesh"?). Allowed values: dataplane, `},
		{[]string{"completion", "powershell"}, "Error: unknown shell \"powershell\": must be bash, fish, zsh\n"},
		{[]string{"delete", "dataplane-insight", "x"}, "…Error: DataplaneInsight is read-only"},
		{[]string{"version", "--config-file", "/nowhere/at/all"}, `…configuration file "/nowhere/at/all" does not exist`},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			t.Parallel()
			m := newMachine(t).using("http://127.0.0.1:1")
			r := m.run(c.args...)
			if c.args[0] == "version" && strings.Contains(c.err, "does not exist") {
				r.want(t, 0, "Client: Kuma "+clientVersion()+"\n", c.err)
				return
			}
			r.want(t, 1, "", c.err)
		})
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	m := newMachine(t).using(s.URL)
	v := clientVersion()
	m.run("version").want(t, 0, "Client: Kuma "+v+"\nServer: Kuma "+v+"\n", "")
	m.run("version", "-a").want(t, 0, "…Client:\n  Product:    Kuma\n  Version:    "+v+"…Server:\n  Product:    Kuma\n  Version:    "+v+"\n", "")
	m.using("http://127.0.0.1:1").run("version").want(t, 0, "Client: Kuma "+v+"\n", "…Warning: unable to connect to the control plane")
}

func TestOtherProductOrVersionIsWarnedOf(t *testing.T) {
	t.Parallel()
	s := newServer(t, map[string]answer{
		"GET /":       {200, `{"product":"Konvoy","version":"2.14.0"}`},
		"GET /meshes": {200, `{"total":0,"items":[],"next":null}`},
	})
	newMachine(t).using(s.URL).run("get", "meshes").want(t, 0, "NAME   mTLS   LOCALITY   ZONEEGRESS   AGE\n",
		fmt.Sprintf("Warning: the control plane at %s is a \"Konvoy\", this is kumactl of \"Kuma\"\n", s.URL))
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "fish", "zsh"} {
		newMachine(t).run("completion", shell).want(t, 0, "…kumactl…__complete", "")
	}
	s := newServer(t, map[string]answer{"GET /meshes": {200, `{"items":[{"name":"one"},{"name":"two"}]}`}})
	m := newMachine(t).using(s.URL)
	m.run("__complete", "get", "mesh", "").want(t, 0, "one\ntwo\n:4\n", "…")
	m.run("__complete", "inspect", "dataplane", "--type", "").want(t, 0, "policies\nconfig-dump\nstats\nclusters\nconfig\n:4\n", "…")
	m.run("__complete", "delete", "").want(t, 0, "…\nsecret\n", "…")
}

// BenchmarkVersion runs the program: what a user waits for.
func BenchmarkVersion(b *testing.B) {
	bin := filepath.Join(b.TempDir(), "kumactl")
	if out, err := exec.CommandContext(b.Context(), "go", "build", "-o", bin, "kuma/cmd/kumactl").CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	home := b.TempDir()
	for b.Loop() {
		c := exec.CommandContext(b.Context(), bin, "version")
		c.Env = []string{"HOME=" + home}
		if out, err := c.CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
}
