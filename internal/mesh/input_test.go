package mesh_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// kinds are the kinds that this package declares.
func kinds() []*resource.Kind {
	return []*resource.Kind{
		mesh.Meshes.Kind, mesh.Dataplanes.Kind, mesh.DataplaneInsights.Kind, mesh.MeshServices.Kind, mesh.TrafficPermissions.Kind,
		mesh.Secrets.Kind, mesh.GlobalSecrets.Kind, mesh.Zones.Kind,
	}
}

// read decodes and checks a document as the server does.
func read(t *testing.T, doc string) (*resource.Resource, error) {
	t.Helper()
	raw, err := yaml.YAMLToJSONStrict([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	h, err := resource.Peek(raw)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(kinds(), func(k *resource.Kind) bool { return k.Name == h.Type })
	if i < 0 {
		t.Fatalf("there is no kind %q", h.Type)
	}
	r, err := resource.Decode(kinds()[i], raw, false)
	if err != nil {
		return nil, err
	}
	if check := r.Kind.Check; check != nil {
		return r, errs.Fields(check(r.Spec)...)
	}
	return r, nil
}

var separator = regexp.MustCompile(`(?m)^---$`)

// TestGoodInput: every document in testdata/*.good.yaml is accepted, and is
// the same after it was written and read again.
func TestGoodInput(t *testing.T) {
	files, err := filepath.Glob("testdata/*.good.yaml")
	if err != nil || len(files) < 7 {
		t.Fatalf("only %d files: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".good.yaml"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, doc := range separator.Split(string(raw), -1) {
				r, err := read(t, doc)
				if err != nil {
					t.Fatalf("%v:\n%s", err, doc)
				}
				written, err := resource.Encode(r)
				if err != nil {
					t.Fatal(err)
				}
				again, err := read(t, string(written))
				if err != nil {
					t.Fatalf("its own answer: %v:\n%s", err, written)
				}
				if diff := cmp.Diff(r.Spec, again.Spec); diff != "" {
					t.Errorf("after it was written and read (-first +again):\n%s", diff)
				}
			}
		})
	}
}

// TestBadInput: the first line of each testdata/*.bad.yaml says what is wrong
// with the document, in the words that a user is told.
func TestBadInput(t *testing.T) {
	files, err := filepath.Glob("testdata/*.bad.yaml")
	if err != nil || len(files) < 20 {
		t.Fatalf("only %d files: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".bad.yaml"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			first, doc, _ := strings.Cut(string(raw), "\n")
			want, ok := strings.CutPrefix(first, "# ")
			if !ok {
				t.Fatal("the first line is no comment")
			}
			switch _, err := read(t, doc); {
			case err == nil:
				t.Error("it is accepted")
			case err.Error() != want:
				t.Errorf("it is refused with\n# %s", err)
			}
		})
	}
}
