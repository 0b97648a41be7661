package kuma_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// TestArchitectureRulesCanFail shows for each rule a tree that breaks it, so
// that a rule which no longer finds anything is noticed.
func TestArchitectureRulesCanFail(t *testing.T) {
	// good is a package that breaks nothing.
	good := func(rel string, own ...string) pkg {
		name := rel[strings.LastIndexByte(rel, '/')+1:]
		if strings.HasPrefix(rel, "cmd/") {
			name = "main"
		}
		return pkg{Rel: rel, Name: name, Own: own, Files: []file{{Name: name + ".go", Documented: true}}}
	}
	with := func(p pkg, change func(*pkg)) pkg { change(&p); return p }
	many := func(n int) (out []pkg) {
		for i := range n {
			out = append(out, good(fmt.Sprintf("policy/mesh%d", i)))
		}
		return out
	}
	names := func(pkgs []pkg) (out []string) {
		for _, p := range pkgs {
			out = append(out, p.Rel)
		}
		return out
	}
	chain := func(rels ...string) (out []pkg) {
		for i, rel := range rels {
			out = append(out, good(rel, rels[i+1:min(i+2, len(rels))]...))
		}
		return out
	}

	cases := []struct {
		name string
		pkgs []pkg
		want string // part of the only finding; none where it is empty
	}{
		{"a tree without fault", []pkg{good("errs"), good("resource", "errs"), good("mesh", "resource", "errs"), good("cp", "mesh"), good("cmd/kuma-cp", "cp")}, ""},
		{"an unknown folder", []pkg{good("wishes")}, "wishes is in no layer"},
		{"an import upwards", []pkg{good("mesh", "store"), good("store")}, "mesh (layer 2, nouns and materials) imports store (layer 3"},
		{"a neighbour", []pkg{good("policy/meshtimeout", "policy/meshretry"), good("policy/meshretry")}, "imports its neighbour policy/meshretry"},
		{"a variant below the noun", []pkg{good("store", "store/memstore"), good("store/memstore")}, "store (layer 3, rules and keeping) imports store/memstore"},
		{"kumactl with the control plane's parts", []pkg{good("ctl", "store"), good("store")}, "kumactl learns of kinds"},
		{"kuma-dp with the control plane's parts", []pkg{good("dp", "state"), good("state")}, "kuma-dp runs beside every workload"},
		{"a command that does more", []pkg{good("cmd/kuma-cp", "store"), good("store")}, "a command parses its arguments"},
		{"a picture that interprets", []pkg{good("state", "policy/meshtimeout"), good("policy/meshtimeout")}, "does not interpret"},
		{"the catalog fetched", []pkg{good("rest", "catalog"), good("catalog")}, "a list is handed over"},
		{"a test package in the product", []pkg{good("rest", "cp/cptest"), good("cp/cptest", "cp"), good("cp")}, "is for tests alone"},
		{"test packages import what they like", []pkg{good("policy/policytest", "proxy"), good("proxy"), good("test/demo", "cp"), good("cp")}, ""},
		{"a model that is Envoy's", []pkg{with(good("mesh"), func(p *pkg) { p.Deps = []string{"github.com/envoyproxy/go-control-plane/envoy/config/core/v3"} })}, "the model is not Envoy's"},
		{"a store that knows Envoy", []pkg{with(good("store/boltstore"), func(p *pkg) { p.Deps = []string{"github.com/envoyproxy/go-control-plane/envoy/type/v3"} })}, "the model is not Envoy's"},
		{"a cluster library in the wrong place", []pkg{with(good("rest"), func(p *pkg) { p.Deps = []string{"k8s.io/client-go/rest"} })}, "without a cluster library"},
		{"a cluster library in its place", []pkg{with(good("kube"), func(p *pkg) { p.Deps = []string{"k8s.io/client-go/rest"} })}, ""},
		{"testing in a command", []pkg{with(good("cmd/kumactl"), func(p *pkg) { p.Deps = []string{"fmt", "testing"} })}, "test code has no place"},
		{"two packages of one name", []pkg{good("token"), good("pki/token")}, "both package token"},
		{"folder and package differ", []pkg{with(good("xds"), func(p *pkg) { p.Name = "server" })}, "folder and package have one name"},
		{"a banned name", []pkg{good("policy/util")}, "says nothing about what the package holds"},
		{"a name of two words", []pkg{good("policy/mesh_retry")}, "one lower-case word"},
		{"no package comment", []pkg{with(good("errs"), func(p *pkg) { p.Files = []file{{Name: "errs.go"}} })}, "no package comment"},
		{"generated Go", []pkg{with(good("mesh"), func(p *pkg) { p.Files = append(p.Files, file{Name: "z.go", Generated: true}) })}, "z.go is generated"},
		{"generated Go in its place", []pkg{with(good("proto/linkpb"), func(p *pkg) { p.Files = append(p.Files, file{Name: "z.pb.go", Generated: true}) })}, ""},
		{"a file without a noun", []pkg{with(good("mesh"), func(p *pkg) { p.Files = append(p.Files, file{Name: "types.go"}) })}, "a file is named by its noun"},
		{"too many packages", append(many(budgets.packages), good("errs")), "the budget is 90"},
		{"a long chain", chain("cmd/kuma-cp", "cp", "rest", "explain", "proxy", "state", "admit", "auth", "token", "resource", "errs"), ""},
		{"too wide", append(many(13), good("proxy", names(many(13))...)), "proxy imports 13 packages of ours, the budget is 12"},
		{"wide where it is its job", append(many(13), good("cp", names(many(13))...)), ""},
		{
			"a policy that reaches too far", append(chain("policy/meshx", "policy", "mesh", "resource", "errs"),
				good("store", "token"), good("token"), good("auth", "pki", "seal", "audit"), good("pki"), good("seal"), good("audit"),
				good("policy/meshy", "policy", "store", "auth")), "policy/meshy reaches 10 packages of ours, the budget is 8",
		},
		{
			"a fat interface",
			[]pkg{with(good("xds"), func(p *pkg) { p.Files[0].Interfaces = map[string]int{"Everything": 6} })},
			"the interface Everything has 6 methods",
		},
		{"too many interfaces", []pkg{with(good("xds"), func(p *pkg) {
			p.Files[0].Interfaces = map[string]int{}
			for i := range budgets.interfaces + 1 {
				p.Files[0].Interfaces[fmt.Sprint("I", i)] = 1
			}
		})}, "there are 31 interfaces"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			found := check(c.pkgs)
			switch {
			case c.want == "" && len(found) > 0:
				t.Errorf("nothing is wrong here, but found:\n%s", strings.Join(found, "\n"))
			case c.want != "" && !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, c.want) }):
				t.Errorf("no finding says %q; found:\n%s", c.want, strings.Join(found, "\n"))
			}
		})
	}
}

// TestLongestChain measures a chain that is one too long. The layers alone make
// such a chain impossible, as long as no layer is added.
func TestLongestChain(t *testing.T) {
	own := map[string][]string{}
	for i := range 12 {
		own[fmt.Sprint("p", i)] = []string{fmt.Sprint("p", i+1)}
	}
	own["p3"] = append(own["p3"], "p11") // a short cut changes nothing
	if got := len(longestChain(own)); got != 13 {
		t.Errorf("the chain has %d packages, want 13", got)
	}
	if len(layers) > budgets.chain {
		t.Errorf("%d layers make chains longer than %d possible", len(layers), budgets.chain)
	}
}

// TestFactsOfFiles reads what a file with every fault has, and none from one
// without.
func TestFactsOfFiles(t *testing.T) {
	bad, err := parseSource("bad.go", []byte(`package bad

import (
	other "kuma/internal/mesh"
	_ "kuma/internal/names"
	yaml "sigs.k8s.io/yaml"
)

var mu sync.Mutex

var count = 0

var table = map[string]int{}

type Open struct{}

type Config struct {
	// Fine is documented.
	Fine int
	Too  int

	Bare int

	Store store.Store
}

type Doer interface {
	Do()
	Undo()
}

type number interface{ ~int | ~float64 }

func init() {}

func Exported() {
	count++
	table["a"] = 1
}

func (Open) Method() {}
`))
	if err != nil {
		t.Fatal(err)
	}
	for what, got := range map[string]int{
		"renamed imports": len(bad.Renamed) - 2,
		"inits":           len(bad.Inits) - 1,
		"mutable":         len(bad.Mutable) - 3,
		"undocumented":    len(bad.Undocumented) - 6, // Open, Config, Config.Bare, Doer, Exported, Method
		"interfaces":      len(bad.Interfaces) - 1,
		"methods":         bad.Interfaces["Doer"] - 2,
	} {
		if got != 0 {
			t.Errorf("%s: %+d of what is there: %+v", what, got, bad)
		}
	}
	if bad.Documented || bad.Generated || bad.Test {
		t.Errorf("documented, generated or test: %+v", bad)
	}
	good, err := parseSource("good.go", []byte(`// Package good is good.
package good

import "kuma/internal/mesh"

// Limit is the limit.
const Limit = 1

var table = map[string]int{"a": 1}

// Do does it.
func Do() int {
	table := map[string]int{}
	table["b"] = Limit
	return mesh.X
}

type private struct{}

func (private) Method() {}
`))
	if err != nil {
		t.Fatal(err)
	}
	if len(good.Renamed)+len(good.Inits)+len(good.Mutable)+len(good.Undocumented)+len(good.Interfaces) > 0 || !good.Documented {
		t.Errorf("faults where there are none: %+v", good)
	}
}
