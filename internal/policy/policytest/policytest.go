package policytest

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"sigs.k8s.io/yaml"

	"kuma/internal/envoy"
	"kuma/internal/envoy/envoytest"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/proxy"
	"kuma/internal/resource"
)

var update = flag.Bool("update", false, "rewrite what the cases in testdata want")

// Run runs the cases in testdata/*.txtar. A case begins with a sentence and has
// these files:
//
//	in.yaml    the resources; those of the first Dataplane's mesh make a picture
//	want.yaml  lines of the first Dataplane's configuration that matter
//	calls.txt  "<request> [by <names of the caller>] -> <what becomes of it>"
//	issues.txt what is left out, "<resource>: <reason>", a line each; without it there is to be nothing
//	proxy.yaml what the proxy says of itself, "metricsCert" and "metricsKey"
//
// or, for a policy that must be refused:
//
//	bad.yaml   the policy
//	want.txt   the fields at fault, "<path>: <message>", a line each
//
// Where it runs one policy alone, the examples in example.yaml must be accepted.
func Run(t *testing.T, policies ...policy.Policy) {
	if len(policies) == 1 {
		t.Run("example.yaml", func(t *testing.T) {
			raw, err := os.ReadFile("example.yaml")
			if err != nil {
				t.Fatal(err)
			}
			rs, err := Read(string(raw), policies[0].Kind())
			if err != nil {
				t.Error(err)
			}
			if len(rs) == 0 {
				t.Error("there is no example")
			}
		})
	}
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("there are no cases in testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			c := testCase{t: t, archive: a, policies: policies}
			c.run()
			if *update {
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

type testCase struct {
	t        *testing.T
	archive  *txtar.Archive
	policies []policy.Policy
}

func (c *testCase) file(name string) *txtar.File {
	for i := range c.archive.Files {
		if c.archive.Files[i].Name == name {
			return &c.archive.Files[i]
		}
	}
	return nil
}

// need is a file without which the case says nothing.
func (c *testCase) need(name string) *txtar.File {
	c.t.Helper()
	f := c.file(name)
	if f == nil {
		c.t.Fatalf("the case has no part \"-- %s --\"", name)
	}
	return f
}

// want compares, or rewrites.
func (c *testCase) want(f *txtar.File, got string) {
	c.t.Helper()
	if *update {
		f.Data = []byte(got)
		return
	}
	if diff := cmp.Diff(string(f.Data), got); diff != "" {
		c.t.Errorf("%s (-want +got):\n%s", f.Name, diff)
	}
}

func (c *testCase) run() {
	var kinds []*resource.Kind
	for _, p := range c.policies {
		kinds = append(kinds, p.Kind())
	}
	if len(bytes.TrimSpace(c.archive.Comment)) == 0 {
		c.t.Error("the case has no sentence that says what it shows")
	}
	if bad := c.file("bad.yaml"); bad != nil {
		_, err := Read(string(bad.Data), kinds...)
		if err == nil {
			c.t.Fatal("the policy is accepted")
		}
		var got strings.Builder
		for _, f := range errs.FieldsOf(err) {
			fmt.Fprintf(&got, "%s: %s\n", f.Path, f.Message)
		}
		c.want(c.need("want.txt"), got.String())
		return
	}
	rs, err := Read(string(c.need("in.yaml").Data), kinds...)
	if err != nil {
		c.t.Fatal(err)
	}
	first := slices.IndexFunc(rs, func(r *resource.Resource) bool { return r.Kind == mesh.Dataplanes.Kind })
	if first < 0 {
		c.t.Fatal("in.yaml has no Dataplane")
	}
	p := proxy.Proxy{Key: rs[first].Key(), Workdir: workdir}
	if f := c.file("proxy.yaml"); f != nil {
		var says struct {
			MetricsCert, MetricsKey string
			Features                []string
		}
		if err := yaml.UnmarshalStrict(f.Data, &says); err != nil {
			c.t.Fatal(err)
		}
		p.MetricsCert, p.MetricsKey, p.Features = says.MetricsCert, says.MetricsKey, map[string]bool{}
		for _, name := range says.Features {
			p.Features[name] = true
		}
	}
	res, issues := generate(c.t, c.policies, rs, p)
	if f := c.file("issues.txt"); f != nil {
		var got strings.Builder
		for _, i := range issues {
			fmt.Fprintf(&got, "%s: %s\n", i.Resource, i.Message)
		}
		c.want(f, got.String())
	} else {
		for _, i := range issues {
			c.t.Errorf("issue with %s: %s", i.Resource, i.Message)
		}
	}
	if f := c.file("want.yaml"); f != nil {
		tree, err := envoytest.Tree(res)
		if err != nil {
			c.t.Fatal(err)
		}
		var want any
		if err := yaml.Unmarshal(f.Data, &want); err != nil {
			c.t.Fatal(err)
		}
		got, err := yaml.Marshal(prune(tree, want))
		if err != nil {
			c.t.Fatal(err)
		}
		if !*update {
			// The case may be written in any style.
			norm, err := yaml.Marshal(want)
			if err != nil {
				c.t.Fatal(err)
			}
			f.Data = norm
		}
		c.want(f, string(got))
	}
	if f := c.file("calls.txt"); f != nil {
		var got strings.Builder
		for line := range strings.Lines(string(f.Data)) {
			call, _, _ := strings.Cut(strings.TrimSpace(line), "->")
			if call = strings.TrimSpace(call); call == "" || strings.HasPrefix(call, "#") {
				got.WriteString(line)
				continue
			}
			fmt.Fprintf(&got, "%s -> %s\n", call, c.call(res, call))
		}
		c.want(f, got.String())
	}
}

func (c *testCase) call(res envoy.Resources, call string) string {
	request, by, _ := strings.Cut(call, " by ")
	var caller envoytest.Caller
	for _, n := range strings.Fields(by) {
		if sni, ok := strings.CutPrefix(n, "sni="); ok {
			caller.ServerName = sni
			continue
		}
		if n == "foreign" {
			caller.Foreign = true
			continue
		}
		caller.Names = append(caller.Names, n)
	}
	d, err := envoytest.Call(res, request, caller)
	if err != nil {
		c.t.Fatalf("%s: %v", call, err)
	}
	s := d.String()
	if d.Refused && d.Policy != "" {
		s += " by " + d.Policy
	}
	if d.Shadow {
		s += " (shadow denied)"
	}
	return s
}

// workdir is where the proxies' kuma-dp and Envoy meet.
const workdir = "/tmp/kuma-dp"

// Generate makes and packs the configuration of a Dataplane, twice, and fails
// if the two are not the same or if something is left out.
func Generate(t testing.TB, policies []policy.Policy, rs []*resource.Resource, dataplane resource.Key) envoy.Resources {
	t.Helper()
	out, issues := generate(t, policies, rs, proxy.Proxy{Key: dataplane, Workdir: workdir})
	for _, i := range issues {
		t.Errorf("issue with %s: %s", i.Resource, i.Message)
	}
	return out
}

func generate(t testing.TB, policies []policy.Policy, rs []*resource.Resource, p proxy.Proxy) (out envoy.Resources, issues []envoy.Issue) {
	t.Helper()
	pic := NewWorld(t).Put(rs...)
	var printed string
	for range 2 {
		c, err := proxy.New(proxy.Config{Policies: policies, Zone: "default"}).Generate(pic, p)
		if err != nil {
			t.Fatal(err)
		}
		issues = c.Issues
		if _, err = c.Encode(); err != nil {
			t.Fatal(err)
		}
		// Packing changes nothing that is packed again.
		if out, err = c.Encode(); err != nil {
			t.Fatal(err)
		}
		if err := envoytest.Validate(out); err != nil {
			t.Errorf("Envoy would refuse it: %v", err)
		}
		s, err := envoytest.Print(out)
		if err != nil {
			t.Fatal(err)
		}
		if printed != "" && printed != s {
			t.Error("the same inputs give two configurations")
		}
		printed = s
	}
	return out, issues
}

// prune leaves of got what want speaks of. Lists are kept whole.
func prune(got, want any) any {
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok || len(w) == 0 {
			return got
		}
		out := map[string]any{}
		for k, v := range w {
			if x, ok := g[k]; ok {
				out[k] = prune(x, v)
			}
		}
		return out
	case []any:
		g, ok := got.([]any)
		if !ok {
			return got
		}
		out := slices.Clone(g)
		for i := range out {
			if i < len(w) {
				out[i] = prune(out[i], w[i])
			}
		}
		return out
	}
	return got
}
