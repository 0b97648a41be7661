package kuma_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// unverified lists the only places that may turn off the check of a server's
// certificate, with the reason. Each of them is behind a flag or setting with
// "skip" in its name, warns when it is used, or verifies in another way.
var unverified = map[string]string{
	"internal/dp/trust.go":   "kuma-dp run --skip-verify, which the contract names and kuma-dp warns of",
	"internal/ctl/client.go": "kumactl config control-planes add --skip-verify, which warns",
	"internal/pki/client.go": "the mode verifyNone of the store's database, which the contract names and kuma-cp warns of; and verifyCa, and a name that is not sent, which it verifies itself",
}

// TestServersAreVerified is HRD-02: no client of ours skips the verification of
// a server, in any file that is part of a program.
func TestServersAreVerified(t *testing.T) {
	used := map[string]bool{}
	for name := range sourceFiles(t, ".go") {
		if strings.HasSuffix(name, "_test.go") || isTestOnly(relative("kuma/"+filepath.ToSlash(filepath.Dir(name)))) {
			continue
		}
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		places, err := skipsVerification(name, source)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range places {
			if _, allowed := unverified[filepath.ToSlash(name)]; !allowed {
				t.Errorf("%s turns off the check of a server's certificate (HRD-02): verify it, or put the place and the reason into the list here", at)
			}
			used[filepath.ToSlash(name)] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(unverified)) {
		if _, err := os.Stat(name); err == nil && !used[name] {
			t.Errorf("%s does not turn off the check of certificates: take it off the list", name)
		}
	}
}

// skipsVerification returns the places in a Go file that set
// InsecureSkipVerify to anything but false.
func skipsVerification(name string, source []byte) (places []string, err error) {
	positions := token.NewFileSet()
	tree, err := parser.ParseFile(positions, name, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	set := func(target, value ast.Expr) {
		var field *ast.Ident
		switch e := target.(type) {
		case *ast.Ident:
			field = e
		case *ast.SelectorExpr:
			field = e.Sel
		}
		if constant, ok := value.(*ast.Ident); field == nil || field.Name != "InsecureSkipVerify" || ok && constant.Name == "false" {
			return
		}
		places = append(places, fmt.Sprintf("%s:%d", name, positions.Position(target.Pos()).Line))
	}
	ast.Inspect(tree, func(node ast.Node) bool {
		switch n := node.(type) {
		case *ast.KeyValueExpr:
			set(n.Key, n.Value)
		case *ast.AssignStmt:
			for i, target := range n.Lhs {
				set(target, n.Rhs[min(i, len(n.Rhs)-1)])
			}
		}
		return true
	})
	return places, nil
}

// TestSkippedVerificationIsFound shows that the check finds what it is for.
func TestSkippedVerificationIsFound(t *testing.T) {
	source := `package p

var a = tls.Config{InsecureSkipVerify: true}
var b = tls.Config{InsecureSkipVerify: cfg.Skip}
var c = tls.Config{InsecureSkipVerify: false}

func f() {
	a.InsecureSkipVerify = skip
	a.InsecureSkipVerify = false
	a.ServerName, a.InsecureSkipVerify = "x", true
}
`
	got, err := skipsVerification("p.go", []byte(source))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"p.go:3", "p.go:4", "p.go:8", "p.go:10"}; !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
}
