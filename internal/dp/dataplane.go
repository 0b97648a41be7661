package dp

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/cbroglie/mustache"
	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// dataplane is what this proxy is called, and its resource where kuma-dp brings
// one along.
type dataplane struct {
	mesh, name string
	// doc is the rendered resource as JSON; empty where it was created
	// beforehand.
	doc string
}

// load reads the Dataplane from the configuration and checks it as the control
// plane will. A bad name falls back to that of the pod in which kuma-dp runs.
func (c *Config) load(pod string) (dataplane, []string, error) {
	text, source := c.Resource, "--dataplane"
	if c.ResourcePath != "" {
		source = c.ResourcePath
		var b []byte
		var err error
		if c.ResourcePath == "-" {
			if c.Stdin == nil {
				return dataplane{}, nil, errs.New(errs.Invalid, "read the Dataplane: there is no standard input")
			}
			source = "standard input"
			b, err = readAll(c.Stdin, maxDataplane)
		} else {
			b, err = readLimited(c.ResourcePath, maxDataplane)
		}
		if err != nil {
			return dataplane{}, nil, errs.New(errs.Invalid, "read the Dataplane from %s: %w", source, err)
		}
		if text = string(b); strings.TrimSpace(text) == "" {
			return dataplane{}, nil, errs.New(errs.Invalid, "read the Dataplane from %s: it is empty", source)
		}
	}
	if text == "" {
		return c.named(pod)
	}
	if c.Name != "" || c.Mesh != "" {
		return dataplane{}, nil, errs.New(errs.Invalid, "--name and --mesh can't be given together with a Dataplane: both are read from %s", source)
	}
	rendered, warnings, err := render(text, c.Vars)
	if err != nil {
		return dataplane{}, nil, errs.New(errs.Invalid, "fill in the template of %s: %w", source, err)
	}
	doc, err := yaml.YAMLToJSON([]byte(rendered))
	if err != nil {
		return dataplane{}, nil, errs.New(errs.Invalid, "read the Dataplane from %s: %w", source, err)
	}
	h, err := resource.Peek(doc)
	if err != nil {
		return dataplane{}, nil, errs.New(errs.Invalid, "read the Dataplane from %s: %w", source, err)
	}
	if h.Type != mesh.Dataplanes.Name {
		return dataplane{}, nil, errs.Fields(errs.Field{Path: "type", Message: fmt.Sprintf("is %q in %s, but kuma-dp runs a %s", h.Type, source, mesh.Dataplanes.Name)})
	}
	r, err := resource.Decode(mesh.Dataplanes.Kind, doc, false)
	if err != nil {
		return dataplane{}, nil, err
	}
	bad := mesh.Dataplanes.Check(r.Spec)
	if !resourceName.MatchString(r.Name) || len(r.Name) > 253 {
		bad = append(bad, errs.Field{Path: "name", Message: nameRule})
	}
	if !meshName.MatchString(r.Mesh) || len(r.Mesh) > 253 {
		bad = append(bad, errs.Field{Path: "mesh", Message: meshRule})
	}
	if err := errs.Fields(bad...); err != nil {
		return dataplane{}, nil, err
	}
	return dataplane{mesh: r.Mesh, name: r.Name, doc: string(doc)}, warnings, nil
}

// named is a Dataplane that was created beforehand.
func (c *Config) named(pod string) (dataplane, []string, error) {
	name := c.Name
	if !resourceName.MatchString(name) && pod != "" {
		name = pod
	}
	var bad []errs.Field
	if name == "" && c.Mesh == "" {
		return dataplane{}, nil, errs.New(errs.Invalid, "there is no Dataplane: give one with --dataplane-file or --dataplane, or name one that exists with --name and --mesh")
	}
	if !resourceName.MatchString(name) || len(name) > 253 {
		bad = append(bad, errs.Field{Path: "--name", Message: nameRule})
	}
	if c.Mesh == "" || !meshName.MatchString(c.Mesh) || len(c.Mesh) > 253 {
		bad = append(bad, errs.Field{Path: "--mesh", Message: meshRule})
	}
	if err := errs.Fields(bad...); err != nil {
		return dataplane{}, nil, err
	}
	return dataplane{mesh: c.Mesh, name: name}, nil, nil
}

// The contract's rules for names.
var (
	resourceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	meshName     = regexp.MustCompile(`^[0-9a-z\-_.]+$`)
)

const (
	nameRule = "must not be empty, must have at most 253 characters and consist of lower case letters, digits, '-' and '.', with a letter or digit at each end"
	meshRule = "must not be empty, must have at most 253 characters and consist of lower case letters, digits, '-', '_' and '.'"
)

// render fills a mustache template. It is done even where no variable is given,
// as the contract says. Values are put in as they are: the result is YAML and
// not HTML. A partial would read a file, so there are none.
func render(text string, values map[string]string) (string, []string, error) {
	t, err := mustache.ParseStringPartialsRaw(text, &mustache.StaticProvider{}, true)
	if err != nil {
		return "", nil, err
	}
	tree := map[string]any{}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		at := tree
		parts := strings.Split(name, ".")
		for _, p := range parts[:len(parts)-1] {
			next, ok := at[p].(map[string]any)
			if !ok {
				if _, taken := at[p]; taken {
					return "", nil, fmt.Errorf("variable %q contradicts another one, which is a value and not a group", name)
				}
				next = map[string]any{}
				at[p] = next
			}
			at = next
		}
		at[parts[len(parts)-1]] = values[name]
	}
	var warnings []string
	for _, tag := range t.Tags() {
		if tag.Type() == mustache.Variable && !has(tree, tag.Name()) {
			warnings = append(warnings, fmt.Sprintf("the template names a variable that no --dataplane-var gives: %s", tag.Name()))
		}
	}
	out, err := t.Render(tree)
	return out, warnings, err
}

func has(tree map[string]any, name string) bool {
	var at any = tree
	for p := range strings.SplitSeq(name, ".") {
		m, ok := at.(map[string]any)
		if !ok {
			return false
		}
		if at, ok = m[p]; !ok {
			return false
		}
	}
	return true
}
