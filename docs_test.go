package kuma_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/catalog"
	"kuma/internal/mesh"
	"kuma/internal/pki/builtin"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/upkeep"
)

var (
	fenceForm   = regexp.MustCompile("^ *(```+|~~~+) *([^`]*)$")
	linkForm    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	headingForm = regexp.MustCompile(`^#{1,6} +(.+?) *#*$`)
	codeForm    = regexp.MustCompile("`[^`]*`")
)

// A block is a fenced block of a Markdown file.
type block struct {
	file string
	line int
	// info is the word after the fence, such as "yaml".
	info string
	text string
}

func (b block) String() string { return fmt.Sprintf("%s:%d", b.file, b.line) }

// split takes a Markdown file apart: its fenced blocks, and the lines outside
// them ("" for the lines inside, so that numbers stay right).
func split(name, text string) (blocks []block, prose []string) {
	var fence string
	var inside []string
	var current block
	for i, line := range strings.Split(text, "\n") {
		m := fenceForm.FindStringSubmatch(line)
		switch {
		case fence == "" && m != nil:
			fence, current = m[1], block{file: name, line: i + 1, info: strings.TrimSpace(m[2])}
			inside = nil
			prose = append(prose, "")
		case fence != "" && m != nil && strings.HasPrefix(m[1], fence) && strings.TrimSpace(m[2]) == "":
			current.text = strings.Join(inside, "\n") + "\n"
			blocks = append(blocks, current)
			fence = ""
			prose = append(prose, "")
		case fence != "":
			inside = append(inside, line)
			prose = append(prose, "")
		default:
			prose = append(prose, line)
		}
	}
	return blocks, prose
}

// anchor is what GitHub makes of a heading.
func anchor(heading string) string {
	var out strings.Builder
	for _, r := range strings.ToLower(heading) {
		switch {
		case r == ' ':
			out.WriteByte('-')
		case r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r > 127:
			out.WriteRune(r)
		}
	}
	return out.String()
}

// anchors lists the places in a Markdown file that a link can lead to.
func anchors(prose []string) (out []string) {
	for _, line := range prose {
		if m := headingForm.FindStringSubmatch(line); m != nil {
			out = append(out, anchor(strings.ReplaceAll(m[1], "`", "")))
		}
	}
	return out
}

// brokenLinks returns a line for each link of a file that leads nowhere. Links
// to other sites are left alone: this test needs no network.
func brokenLinks(root, name, text string) (out []string) {
	_, prose := split(name, text)
	for i, line := range prose {
		for _, m := range linkForm.FindAllStringSubmatch(codeForm.ReplaceAllString(line, "``"), -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			where := filepath.Join(root, filepath.Dir(name), target)
			if target == "" {
				where = filepath.Join(root, name)
			}
			if _, err := os.Stat(where); err != nil {
				out = append(out, fmt.Sprintf("%s:%d: %s does not exist", name, i+1, m[1]))
				continue
			}
			if fragment == "" || !strings.HasSuffix(where, ".md") {
				continue
			}
			data, err := os.ReadFile(where)
			if err != nil {
				out = append(out, fmt.Sprintf("%s:%d: %v", name, i+1, err))
				continue
			}
			if _, linked := split(where, string(data)); !slices.Contains(anchors(linked), fragment) {
				out = append(out, fmt.Sprintf("%s:%d: %s has no heading #%s", name, i+1, where, fragment))
			}
		}
	}
	return out
}

// TestLinks: every link from one document of the repository to another leads
// somewhere.
func TestLinks(t *testing.T) {
	count := 0
	for name := range sourceFiles(t, ".md") {
		count++
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, broken := range brokenLinks(".", name, string(data)) {
			t.Error(broken)
		}
	}
	if count == 0 {
		t.Error("no document found: the search is broken")
	}
}

// yamlBlocks lists the examples of the manual: blocks marked "yaml". What is
// no resource (a configuration file, a fragment) is marked "yml".
func yamlBlocks(t *testing.T) (out []block) {
	t.Helper()
	for name := range sourceFiles(t, ".md") {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		blocks, _ := split(name, string(data))
		for _, b := range blocks {
			if b.info == "yaml" {
				out = append(out, b)
			}
		}
	}
	return out
}

// TestExamples: every example of the manual is accepted, documents that belong
// to a kind which this version has.
func TestExamples(t *testing.T) {
	for _, b := range yamlBlocks(t) {
		for i, document := range documents(b.text) {
			if err := acceptable(t.Context(), catalog.Kinds(), document); err != nil {
				t.Errorf("%s, document %d: %v", b, i+1, err)
			}
		}
	}
}

// documents splits a YAML text at its separators.
func documents(text string) (out []string) {
	for _, document := range regexp.MustCompile(`(?m)^---.*$`).Split(text, -1) {
		if strings.TrimSpace(document) != "" {
			out = append(out, document)
		}
	}
	return out
}

// acceptable applies a resource as the server does: to a store that has its
// mesh, through the gate with all its rules.
func acceptable(ctx context.Context, kinds []*resource.Kind, document string) error {
	raw, err := yaml.YAMLToJSONStrict([]byte(document))
	if err != nil {
		return err
	}
	header, err := resource.Peek(raw)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(kinds, func(k *resource.Kind) bool { return k.Name == header.Type })
	if i < 0 {
		return fmt.Errorf("there is no kind %q; mark what is no resource as yml", header.Type)
	}
	decoded, err := resource.Decode(kinds[i], raw, false)
	if err != nil {
		return err
	}
	resources := memstore.New()
	if kinds[i].Scope == resource.Mesh && header.Mesh != "" {
		if _, err := resources.Put(ctx, store.Set(mesh.Meshes.Make("", header.Mesh, &mesh.MeshSpec{}))); err != nil {
			return err
		}
	}
	access, err := auth.NewAccess(auth.DefaultAccess())
	if err != nil {
		return err
	}
	keeper := upkeep.New(upkeep.Config{Store: resources, Kinds: kinds, Zone: "default", Authority: func(name string, _ *mesh.Backend) (cert, key []byte, err error) {
		root, err := builtin.NewRoot(name, builtin.Conf{})
		return root.Cert, root.Key, err
	}})
	gate := admit.New(admit.Config{Store: resources, Access: access, Zone: "default", Meshes: keeper})
	caller := auth.Admin()
	if kinds[i].ReadOnly {
		caller = auth.ControlPlane()
	}
	_, err = gate.Put(ctx, caller, admit.Change{Resource: decoded})
	return err
}

// TestDocumentChecksCanFail shows that broken documents are found.
func TestDocumentChecksCanFail(t *testing.T) {
	dir := t.TempDir()
	text := "# A `B` c!\n\n[here](#a-b-c) [gone](gone.md) [there](other.md#nowhere) [site](https://example.com/x) `[code](no.md)`\n\n```yaml\n[fenced](no.md)\n```\n"
	for name, content := range map[string]string{"a.md": text, "other.md": "# Other\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	broken := brokenLinks(dir, "a.md", text)
	if len(broken) != 2 || !strings.Contains(broken[0], "gone.md does not exist") || !strings.Contains(broken[1], "no heading #nowhere") {
		t.Errorf("broken links: %q", broken)
	}
	blocks, _ := split("a.md", text)
	if len(blocks) != 1 || blocks[0].info != "yaml" || blocks[0].line != 5 || blocks[0].text != "[fenced](no.md)\n" {
		t.Errorf("blocks: %+v", blocks)
	}
	for document, want := range map[string]string{
		"type: Zone\nname: east\n":                                             "",
		"type: Zone\nname: east\nenable: true\n":                               `did you mean "enabled"`,
		"type: Zoo\nname: east\n":                                              `no kind "Zoo"`,
		"type: Dataplane\nname: a\nmesh: default\nnetworking: {address: x/}\n": "address has to be valid",
		"type: Zone\ntype: Zone\n":                                             "already set",
		"type: Zone\nname: East\n":                                             "invalid characters",
		"type: Secret\nname: a\ndata: aGk=\n":                                  "cannot be empty",
		"type: Mesh\nname: a\nmtls: {backends: [{name: a, type: vault}]}\n":    "could not find installed plugin",
	} {
		err := acceptable(t.Context(), catalog.Kinds(), document)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q gives %v, want %q", document, err, want)
		}
	}
}
