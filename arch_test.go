// Package kuma_test checks the repository as a whole: who imports whom, names,
// sizes and documents. docs/ARCHITECTURE.md explains the rules; every failure
// here says which of them is broken and why it exists.
package kuma_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// layers says who may import whom: a package imports packages of lower rows
// only. Packages of one row are neighbours and do not know each other.
// Directories are given without "internal/".
var layers = []struct {
	what     string
	packages []string
}{
	{"facts", []string{"errs", "names", "socket"}},
	{"what a resource is", []string{"resource", "conf", "proto/*", "gui", "deploy"}},
	{"nouns and materials", []string{"mesh", "envoy", "token", "pki", "seal", "audit", "tproxy"}},
	{"rules and keeping", []string{"policy", "store", "auth"}},
	{"variants, and the gate", []string{"policy/*", "store/*", "pki/*", "admit"}},
	{"the picture", []string{"catalog", "state"}},
	{"meaning", []string{"proxy", "session", "identity", "bootstrap", "insight", "upkeep"}},
	{"what follows from meaning", []string{"explain"}},
	{"doors", []string{"xds", "link", "rest", "multizone", "mads", "kube", "peer"}},
	{"the wholes", []string{"cp", "dp", "ctl", "cni"}},
	{"commands", []string{"cmd/*", "tools/gen"}},
}

// testOnly packages stand outside the layers: they may import everything, and
// only tests import them.
var testOnly = []string{"envoy/envoytest", "policy/policytest", "store/storetest", "cp/cptest", "test/*", "test/*/*", "bench/*"}

// narrow packages may import less than their layer allows.
var narrow = []struct {
	pattern string
	allowed func(imported string) bool
	why     string
}{
	{"dp", upTo(2), "kuma-dp runs beside every workload: it carries nothing of the control plane"},
	{"ctl", upTo(2), "kumactl learns of kinds from the server or its embedded index: it carries nothing of the control plane"},
	{"cni", upTo(2), "the CNI plugin runs as root on every node: it carries nothing of the control plane"},
	{"cmd/*", func(imported string) bool { return layerOf(imported) == 9 || imported == "conf" }, "a command parses its arguments and runs a whole; whatever more it does belongs there, where tests reach it"},
	{"state", func(imported string) bool { return !matches("policy/*", imported) }, "the picture holds policies, it does not interpret them"},
}

func upTo(layer int) func(string) bool {
	return func(imported string) bool { return layerOf(imported) >= 0 && layerOf(imported) <= layer }
}

// importers: a package that only some may import, directly.
var importers = []struct {
	imported string
	allowed  []string
	why      string
}{
	{"catalog", []string{"cp", "tools/gen"}, "a list is handed over, not fetched"},
}

// unreachable: what a package must not reach, directly or not.
var unreachable = []struct {
	from   []string
	except []string
	to     string
	why    string
}{
	{[]string{"resource", "mesh", "store", "store/*", "ctl"}, nil, "github.com/envoyproxy/go-control-plane", "the model is not Envoy's"},
	{[]string{"*", "*/*"}, []string{"cp", "kube", "store/kubestore", "cni", "cmd/kuma-cp", "cmd/kuma-cni"}, "k8s.io/client-go", "all but the parts for Kubernetes is built and tested without a cluster library"},
	{[]string{"cmd/*"}, nil, "testing", "test code has no place in a program that is shipped"},
}

// budgets are the sizes within which one person can know this code base.
var budgets = struct {
	packages, chain, policyReach, ctlReach, fanOut, interfaces, methods int
	fanOutExcept                                                        []string
}{
	packages: 90, chain: 11, policyReach: 8, ctlReach: 10, fanOut: 12, interfaces: 30, methods: 5,
	fanOutExcept: []string{"cp", "catalog", "rest"},
}

// bannedNames say nothing about what a package holds.
var bannedNames = []string{"util", "utils", "common", "core", "base", "types", "helper", "helpers", "model", "models", "api", "v1alpha1", "impl", "manager", "misc", "shared", "lib", "interfaces"}

// bannedFiles say nothing about what a file holds.
var bannedFiles = []string{"types.go", "utils.go", "util.go", "helpers.go", "common.go", "interfaces.go", "constants.go", "misc.go"}

// A pkg is what the rules look at of a package.
type pkg struct {
	// Rel is the directory below the module's root, without "internal/".
	Rel, Name string
	// Imports lists import paths of files that are no tests; Deps all that they reach.
	Imports, Deps []string
	// Own are the imports of this module, by Rel.
	Own []string
	// Files are facts about the Go files, whatever their build constraints.
	Files []file
}

// A file is what the rules look at of a Go file.
type file struct {
	Name       string
	Test       bool
	Generated  bool
	Documented bool // has a package comment
	// Each of these is a line of text that names a place.
	Renamed, Inits, Mutable, Undocumented []string
	// Interfaces maps the names of interface types with methods to their number.
	Interfaces map[string]int
}

// TestArchitecture holds the tree to the rules.
func TestArchitecture(t *testing.T) {
	pkgs := load(t)
	if len(pkgs) < 3 {
		t.Fatalf("only %d packages found: the loader is broken, and the rules would hold for nothing", len(pkgs))
	}
	for _, finding := range check(pkgs) {
		t.Error(finding)
	}
}

// check returns a line for each breach of a rule.
func check(pkgs []pkg) []string {
	var out []string
	out = append(out, checkLayers(pkgs)...)
	out = append(out, checkReach(pkgs)...)
	out = append(out, checkNames(pkgs)...)
	out = append(out, checkFiles(pkgs)...)
	out = append(out, checkBudgets(pkgs)...)
	return out
}

func checkLayers(pkgs []pkg) (out []string) {
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, p := range pkgs {
		outside := isTestOnly(p.Rel)
		layer := layerOf(p.Rel)
		if layer < 0 && !outside {
			add("%s is in no layer: a new folder needs a noun that nobody else has, a sentence without \"and\", and a row in the table; otherwise it is a file", p.Rel)
			continue
		}
		for _, imported := range p.Own {
			if isTestOnly(imported) {
				if !outside {
					add("%s imports %s outside its tests: that package is for tests alone", p.Rel, imported)
				}
				continue
			}
			if outside {
				continue
			}
			switch other := layerOf(imported); {
			case other < 0: // said where that package itself is looked at
			case other == layer && p.Rel != "tools/gen":
				add("%s imports its neighbour %s (both of layer %d, %s): what both need moves down a layer, what joins them is done higher up", p.Rel, imported, layer, layers[layer].what)
			case other > layer:
				add("%s (layer %d, %s) imports %s (layer %d, %s): data goes one way, nothing calls back", p.Rel, layer, layers[layer].what, imported, other, layers[other].what)
			}
			for _, rule := range narrow {
				if matches(rule.pattern, p.Rel) && !rule.allowed(imported) {
					add("%s imports %s: %s", p.Rel, imported, rule.why)
				}
			}
			for _, rule := range importers {
				if rule.imported == imported && !slices.Contains(rule.allowed, p.Rel) {
					add("%s imports %s, which only %s may: %s", p.Rel, imported, strings.Join(rule.allowed, " and "), rule.why)
				}
			}
		}
	}
	return out
}

func checkReach(pkgs []pkg) (out []string) {
	for _, p := range pkgs {
		if isTestOnly(p.Rel) {
			continue
		}
		for _, rule := range unreachable {
			if !matchesAny(rule.from, p.Rel) || matchesAny(rule.except, p.Rel) {
				continue
			}
			for _, dep := range p.Deps {
				if dep == rule.to || strings.HasPrefix(dep, rule.to+"/") && rule.to != "testing" {
					out = append(out, fmt.Sprintf("%s reaches %s: %s (go mod why does not show it; try: go list -deps)", p.Rel, dep, rule.why))
					break
				}
			}
		}
	}
	return out
}

func checkNames(pkgs []pkg) (out []string) {
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	seen := map[string]string{}
	for _, p := range pkgs {
		if p.Name == "main" || strings.HasSuffix(p.Name, "_test") {
			continue
		}
		if other, twice := seen[p.Name]; twice {
			add("%s and %s are both package %s: names are unique, so that no import of ours is ever renamed", other, p.Rel, p.Name)
		}
		seen[p.Name] = p.Rel
		if base := path.Base(p.Rel); base != p.Name {
			add("%s holds package %s: folder and package have one name", p.Rel, p.Name)
		}
		if p.Name != strings.ToLower(p.Name) || strings.ContainsAny(p.Name, "_-") {
			add("%s: a package's name is one lower-case word", p.Rel)
		}
		if slices.Contains(bannedNames, p.Name) {
			add("%s: %q says nothing about what the package holds; name the noun", p.Rel, p.Name)
		}
	}
	return out
}

func checkFiles(pkgs []pkg) (out []string) {
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, p := range pkgs {
		documented, sources := false, 0
		for _, f := range p.Files {
			if !f.Test {
				sources++
				documented = documented || f.Documented
			}
			if f.Generated {
				if !strings.HasPrefix(p.Rel, "proto/") {
					add("%s/%s is generated: outside proto, data and generics take the place of generated Go", p.Rel, f.Name)
				}
				continue
			}
			if slices.Contains(bannedFiles, f.Name) {
				add("%s/%s: a file is named by its noun", p.Rel, f.Name)
			}
			for _, at := range f.Renamed {
				add("%s/%s renames an import of ours: one of the packages is misnamed", p.Rel, at)
			}
			if f.Test {
				continue
			}
			for _, at := range f.Inits {
				add("%s/%s has an init function: what exists is written in one place, and nothing happens by importing", p.Rel, at)
			}
			for _, at := range f.Mutable {
				add("%s/%s: package variables do not change; state has an owner", p.Rel, at)
			}
			for _, at := range f.Undocumented {
				add("%s/%s has no comment: every exported name says what it promises", p.Rel, at)
			}
		}
		if sources > 0 && !documented {
			add("%s has no package comment: a package is a noun with one sentence", p.Rel)
		}
	}
	return out
}

func checkBudgets(pkgs []pkg) (out []string) {
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if len(pkgs) > budgets.packages {
		add("there are %d packages, the budget is %d: join those that always change together", len(pkgs), budgets.packages)
	}
	own := map[string][]string{}
	for _, p := range pkgs {
		if !isTestOnly(p.Rel) {
			own[p.Rel] = p.Own
		}
	}
	if chain := longestChain(own); len(chain) > budgets.chain {
		add("the longest import chain has %d packages, the budget is %d: %s", len(chain), budgets.chain, strings.Join(chain, " → "))
	}
	for _, rel := range slices.Sorted(maps.Keys(own)) {
		if n := len(own[rel]); n > budgets.fanOut && !slices.Contains(budgets.fanOutExcept, rel) {
			add("%s imports %d packages of ours, the budget is %d: %s", rel, n, budgets.fanOut, strings.Join(own[rel], " "))
		}
		limit := 0
		switch {
		case matches("policy/*", rel):
			limit = budgets.policyReach
		case rel == "cmd/kumactl":
			limit = budgets.ctlReach
		default:
			continue
		}
		if reached := reach(own, rel); len(reached) > limit {
			add("%s reaches %d packages of ours, the budget is %d: %s", rel, len(reached), limit, strings.Join(reached, " "))
		}
	}
	var interfaces []string
	for _, p := range pkgs {
		for _, f := range p.Files {
			if f.Generated || f.Test {
				continue
			}
			for _, name := range slices.Sorted(maps.Keys(f.Interfaces)) {
				interfaces = append(interfaces, p.Rel+"."+name)
				if n := f.Interfaces[name]; n > budgets.methods {
					add("%s/%s: the interface %s has %d methods, at most %d are allowed: ask for what you need", p.Rel, f.Name, name, n, budgets.methods)
				}
			}
		}
	}
	if len(interfaces) > budgets.interfaces {
		add("there are %d interfaces, the budget is %d: an interface arrives with its second implementation, not before: %s", len(interfaces), budgets.interfaces, strings.Join(interfaces, " "))
	}
	return out
}

// longestChain returns the longest path through the imports.
func longestChain(own map[string][]string) []string {
	longest := map[string][]string{}
	var from func(rel string) []string
	from = func(rel string) []string {
		if chain, known := longest[rel]; known {
			return chain
		}
		longest[rel] = []string{rel} // ends a cycle, which Go itself refuses
		var best []string
		for _, imported := range own[rel] {
			if chain := from(imported); len(chain) > len(best) {
				best = chain
			}
		}
		longest[rel] = append([]string{rel}, best...)
		return longest[rel]
	}
	var best []string
	for _, rel := range slices.Sorted(maps.Keys(own)) {
		if chain := from(rel); len(chain) > len(best) {
			best = chain
		}
	}
	return best
}

// reach lists all own packages that one depends on.
func reach(own map[string][]string, rel string) []string {
	seen := map[string]bool{}
	var walk func(string)
	walk = func(rel string) {
		for _, imported := range own[rel] {
			if !seen[imported] {
				seen[imported] = true
				walk(imported)
			}
		}
	}
	walk(rel)
	return slices.Sorted(maps.Keys(seen))
}

// layerOf returns the index of a package's layer, or -1.
func layerOf(rel string) int {
	for exact := range 2 { // a name in full wins over a pattern
		for i, layer := range layers {
			for _, pattern := range layer.packages {
				if exact == 0 && pattern == rel || exact == 1 && matches(pattern, rel) {
					return i
				}
			}
		}
	}
	return -1
}

func isTestOnly(rel string) bool { return matchesAny(testOnly, rel) }

// matches reports whether a package is meant by a pattern, in which "*" stands
// for one folder.
func matches(pattern, rel string) bool {
	ok, err := path.Match(pattern, rel)
	return ok && err == nil
}

func matchesAny(patterns []string, rel string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return matches(pattern, rel) })
}

// relative turns an import path into what the rules call a package, or "".
func relative(importPath string) string {
	rel, ours := strings.CutPrefix(importPath, "kuma/")
	if !ours {
		return ""
	}
	return strings.TrimPrefix(rel, "internal/")
}

// load reads the tree. The go command tells what depends on what; the files are
// walked and read here, since "go test" can't know what a command has read and
// would serve a cached pass after a change.
func load(t *testing.T) []pkg {
	t.Helper()
	byDir := map[string][]file{}
	for name := range sourceFiles(t, ".go") {
		dir := filepath.ToSlash(filepath.Dir(name))
		byDir[dir] = append(byDir[dir], parse(t, name))
	}
	if _, err := os.ReadFile("go.mod"); err != nil {
		t.Fatal(err)
	}
	command := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Imports,Deps,GoFiles", "./...")
	var messages strings.Builder
	command.Stderr = &messages
	list, err := command.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, messages.String())
	}
	var out []pkg
	for decoder := json.NewDecoder(strings.NewReader(string(list))); ; {
		var listed struct {
			ImportPath, Name       string
			Imports, Deps, GoFiles []string
		}
		if err := decoder.Decode(&listed); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		rel := relative(listed.ImportPath)
		if rel == "" || len(listed.GoFiles) == 0 && !slices.ContainsFunc(byDir[strings.TrimPrefix(listed.ImportPath, "kuma/")], func(f file) bool { return !f.Test }) {
			continue // the root, and folders with nothing but tests
		}
		p := pkg{Rel: rel, Name: listed.Name, Imports: listed.Imports, Deps: listed.Deps, Files: byDir[strings.TrimPrefix(listed.ImportPath, "kuma/")]}
		for _, imported := range listed.Imports {
			if own := relative(imported); own != "" {
				p.Own = append(p.Own, own)
			}
		}
		out = append(out, p)
	}
	return out
}

// sourceFiles yields the files of this module that end in suffix, relative to
// its root: no other modules, no hidden folders, nothing that was built.
func sourceFiles(t *testing.T, suffix string) func(yield func(string) bool) {
	t.Helper()
	return func(yield func(string) bool) {
		stop := errors.New("enough")
		err := filepath.WalkDir(".", func(name string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if entry.IsDir() {
				base := entry.Name()
				if name != "." && (strings.HasPrefix(base, ".") && base != ".ci" || name == "bin" || name == "build" || base == "testdata" || base == "node_modules") {
					return fs.SkipDir
				}
				if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil && name != "." && suffix == ".go" {
					return fs.SkipDir
				}
				return nil
			}
			if strings.HasSuffix(name, suffix) && !yield(name) {
				return stop
			}
			return nil
		})
		if err != nil && !errors.Is(err, stop) {
			t.Fatal(err)
		}
	}
}

// parse collects the facts about a Go file.
func parse(t *testing.T, name string) file {
	t.Helper()
	source, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := parseSource(filepath.Base(name), source)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func parseSource(name string, source []byte) (file, error) {
	positions := token.NewFileSet()
	tree, err := parser.ParseFile(positions, name, source, parser.ParseComments)
	if err != nil {
		return file{}, err
	}
	f := file{
		Name: name, Test: strings.HasSuffix(name, "_test.go"), Generated: ast.IsGenerated(tree),
		Documented: tree.Doc != nil, Interfaces: map[string]int{},
	}
	at := func(node ast.Node, what string) string {
		return fmt.Sprintf("%s:%d: %s", name, positions.Position(node.Pos()).Line, what)
	}
	lines := func(from, to token.Pos) int { return positions.Position(to).Line - positions.Position(from).Line }
	for _, imported := range tree.Imports {
		importPath := strings.Trim(imported.Path.Value, `"`)
		if relative(importPath) != "" && imported.Name != nil {
			f.Renamed = append(f.Renamed, at(imported, imported.Name.Name+" "+importPath))
		}
	}
	for _, declaration := range tree.Decls {
		switch d := declaration.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil && d.Name.Name == "init" {
				f.Inits = append(f.Inits, at(d, "func init"))
			}
			if d.Doc == nil && d.Name.IsExported() && exportedReceiver(d) {
				f.Undocumented = append(f.Undocumented, at(d, d.Name.Name))
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				f.addSpec(d, spec, at, lines)
			}
		}
	}
	f.addAssignments(tree, at)
	return f, nil
}

// addSpec looks at a declared type, constant or variable.
func (f *file) addSpec(d *ast.GenDecl, spec ast.Spec, at func(ast.Node, string) string, lines func(from, to token.Pos) int) {
	switch s := spec.(type) {
	case *ast.TypeSpec:
		if s.Name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
			f.Undocumented = append(f.Undocumented, at(s, s.Name.Name))
		}
		if i, ok := s.Type.(*ast.InterfaceType); ok && methods(i) > 0 {
			f.Interfaces[s.Name.Name] = methods(i)
		}
		if structure, ok := s.Type.(*ast.StructType); ok && s.Name.Name == "Config" {
			covered := token.NoPos // the end of what a comment before it covers, without a blank line between
			for _, field := range structure.Fields.List {
				switch {
				case field.Doc != nil || field.Comment != nil || covered.IsValid() && lines(covered, field.Pos()) <= 1:
					covered = field.End()
				case len(field.Names) > 0 && !saysItself(field):
					covered = token.NoPos
					f.Undocumented = append(f.Undocumented, at(field, "Config."+field.Names[0].Name))
				}
			}
		}
	case *ast.ValueSpec:
		for _, name := range s.Names {
			if name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
				f.Undocumented = append(f.Undocumented, at(name, name.Name))
			}
		}
		if d.Tok == token.VAR && isLock(s.Type) {
			f.Mutable = append(f.Mutable, at(s, s.Names[0].Name+" guards shared state of the package"))
		}
	}
}

// saysItself reports whether a field is a part that is handed in and whose type
// has its name, such as "Store store.Store". Settings never say themselves.
func saysItself(field *ast.Field) bool {
	if len(field.Names) != 1 {
		return false
	}
	noun := strings.ToLower(strings.TrimSuffix(field.Names[0].Name, "s"))
	_, selector := field.Type.(*ast.SelectorExpr)
	_, ident := field.Type.(*ast.Ident)
	_, pointer := field.Type.(*ast.StarExpr)
	_, list := field.Type.(*ast.ArrayType)
	return (selector || ident || pointer || list) && strings.Contains(strings.ToLower(types.ExprString(field.Type)), noun)
}

// addAssignments finds assignments to package variables of the same file.
func (f *file) addAssignments(tree *ast.File, at func(ast.Node, string) string) {
	global := func(target ast.Expr) *ast.Ident {
		for {
			switch e := target.(type) {
			case *ast.Ident:
				if e.Obj != nil && e.Obj.Kind == ast.Var && tree.Scope.Lookup(e.Name) == e.Obj {
					return e
				}
				return nil
			case *ast.SelectorExpr:
				target = e.X
			case *ast.IndexExpr:
				target = e.X
			case *ast.ParenExpr:
				target = e.X
			default:
				return nil
			}
		}
	}
	ast.Inspect(tree, func(node ast.Node) bool {
		var targets []ast.Expr
		switch s := node.(type) {
		case *ast.AssignStmt:
			if s.Tok != token.DEFINE {
				targets = s.Lhs
			}
		case *ast.IncDecStmt:
			targets = []ast.Expr{s.X}
		}
		for _, target := range targets {
			if name := global(target); name != nil {
				f.Mutable = append(f.Mutable, at(node, name.Name+" is assigned to"))
			}
		}
		return true
	})
}

// methods counts an interface's methods; embedded interfaces count as one, and
// what is only a constraint of type parameters as none.
func methods(i *ast.InterfaceType) int {
	n := 0
	for _, field := range i.Methods.List {
		switch field.Type.(type) {
		case *ast.FuncType:
			n += len(field.Names)
		case *ast.Ident, *ast.SelectorExpr:
			n++
		}
	}
	return n
}

func isLock(t ast.Expr) bool {
	selector, ok := t.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	from, ok := selector.X.(*ast.Ident)
	return ok && (from.Name == "sync" || from.Name == "atomic")
}

// exportedReceiver reports whether a function is a method of an exported type,
// or no method.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	t := d.Recv.List[0].Type
	for {
		switch e := t.(type) {
		case *ast.StarExpr:
			t = e.X
		case *ast.IndexExpr:
			t = e.X
		case *ast.IndexListExpr:
			t = e.X
		case *ast.Ident:
			return e.IsExported()
		default:
			return false
		}
	}
}
