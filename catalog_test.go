package kuma_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kuma/internal/catalog"
)

// TestEveryPolicyIsInTheCatalog finds policies that nobody serves, and those
// without a test, a case or an example.
func TestEveryPolicyIsInTheCatalog(t *testing.T) {
	var listed []string
	for _, p := range catalog.Policies() {
		listed = append(listed, strings.ToLower(p.Kind().Name))
	}
	folders, err := os.ReadDir("internal/policy")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range folders {
		name := f.Name()
		if !f.IsDir() || name == "policytest" {
			continue
		}
		if i := slices.Index(listed, name); i >= 0 {
			listed = slices.Delete(listed, i, i+1)
		} else {
			t.Errorf("internal/policy/%s is not in catalog.Policies(): add it where it should apply; its folder and its kind in lower case are one word", name)
		}
		for _, want := range []string{name + "_test.go", "example.yaml", "testdata/*.txtar"} {
			if found, _ := filepath.Glob(filepath.Join("internal/policy", name, want)); len(found) == 0 {
				t.Errorf("internal/policy/%s has no %s", name, want)
			}
		}
	}
	for _, name := range listed {
		t.Errorf("catalog.Policies() lists %s, but there is no folder internal/policy/%s", name, name)
	}
}

// TestEveryKindHasAnExample finds kinds that users write and the manual shows
// no example of.
func TestEveryKindHasAnExample(t *testing.T) {
	for _, k := range catalog.Kinds() {
		name := strings.ToLower(k.Name)
		if k.ReadOnly {
			continue
		}
		_, errKind := os.Stat(filepath.Join("internal/mesh/testdata", name+".good.yaml"))
		_, errPolicy := os.Stat(filepath.Join("internal/policy", name, "example.yaml"))
		if errKind != nil && errPolicy != nil {
			t.Errorf("%s has no example: write internal/mesh/testdata/%s.good.yaml, or internal/policy/%s/example.yaml for a policy", k.Name, name, name)
		}
	}
}
