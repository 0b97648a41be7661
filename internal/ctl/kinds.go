package ctl

import (
	"context"
	_ "embed" // for the index of kinds
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"kuma/internal/errs"
	"kuma/internal/names"
)

// kindsJSON is the index of the kinds that this version knows, generated from
// their declarations.
//
//go:embed kinds.json
var kindsJSON []byte

// An Index lists kinds, as kinds.json has them.
type Index struct {
	Kinds []Kind `json:"kinds"`
}

// A Kind is what kumactl knows of a sort of resource.
type Kind struct {
	// Name is the type as users write it, such as "MeshTimeout".
	Name string `json:"name"`
	// Plural is the path element of the API.
	Plural string `json:"plural"`
	// Singular is the argument on the command line.
	Singular   string   `json:"singular"`
	Short      string   `json:"short,omitempty"`
	AltPlurals []string `json:"altPlurals,omitempty"`
	// Scope is "Mesh" or "Global".
	Scope string `json:"scope"`
	// Shape is "Flat" or "Spec".
	Shape     string   `json:"shape"`
	ReadOnly  bool     `json:"readOnly,omitempty"`
	Admin     bool     `json:"admin,omitempty"`
	HasStatus bool     `json:"hasStatus,omitempty"`
	Columns   []Column `json:"columns,omitempty"`
	Policy    *Policy  `json:"policy,omitempty"`
	// Schema describes the specification: what stands under "spec" in a kind
	// of shape Spec, and beside type, mesh and name in a Flat one. It is nil
	// where it is not known.
	Schema *Schema `json:"schema,omitempty"`
}

// A Column is one of a kind's own columns in a table.
type Column struct {
	Name string `json:"name"`
	// Path leads to the value, such as ".spec.state".
	Path string `json:"path"`
}

// Policy says what a policy's specification may contain.
type Policy struct {
	IsTargetRef bool `json:"isTargetRef"`
	HasTo       bool `json:"hasTo"`
	HasFrom     bool `json:"hasFrom"`
	HasRules    bool `json:"hasRules"`
	FromAsRules bool `json:"fromAsRules"`
}

func (k *Kind) meshed() bool { return k.Scope == "Mesh" }

// argName is the word for the kind on the command line.
func (k *Kind) argName() string {
	if k.Singular != "" {
		return k.Singular
	}
	return strings.ToLower(k.Name)
}

// path is the kind's collection, or the resource of the name.
func (k *Kind) path(mesh, name string) string {
	var p []string
	if k.meshed() {
		p = append(p, "meshes", mesh)
	}
	p = append(p, k.Plural)
	if name != "" {
		p = append(p, name)
	}
	return path(p...)
}

// called reports whether the word means this kind. Case and dashes do not
// count, so that "health-checks" and "healthchecks" are one.
func (k *Kind) called(word string) bool {
	word = plain(word)
	if word == plain(k.Name) || word == plain(k.Plural) || word == plain(k.argName()) || k.Short != "" && word == plain(k.Short) {
		return true
	}
	return slices.ContainsFunc(k.AltPlurals, func(p string) bool { return word == plain(p) })
}

func plain(word string) string { return strings.ToLower(strings.ReplaceAll(word, "-", "")) }

// embedded returns the index that this program carries.
func embedded() (Index, error) {
	var i Index
	if err := json.Unmarshal(kindsJSON, &i); err != nil {
		return i, errs.New(errs.Internal, "read the embedded index of kinds: %w", err)
	}
	return i, nil
}

// args lists the words for all kinds, sorted.
func (i Index) args(writable bool) []string {
	var out []string
	for _, k := range i.Kinds {
		if !writable || !k.ReadOnly {
			out = append(out, k.argName())
		}
	}
	slices.Sort(out)
	return out
}

// byWord returns the kind that a word on the command line means, or nil.
func (i Index) byWord(word string) *Kind {
	if n := slices.IndexFunc(i.Kinds, func(k Kind) bool { return k.called(word) }); n >= 0 {
		return &i.Kinds[n]
	}
	return nil
}

// byType returns the kind of exactly that name, or nil.
func (i Index) byType(name string) *Kind {
	if n := slices.IndexFunc(i.Kinds, func(k Kind) bool { return k.Name == name }); n >= 0 {
		return &i.Kinds[n]
	}
	return nil
}

// merge adds the kinds that the control plane lists. What it says of scope,
// path and readOnly wins; schema and columns come from the embedded index.
func (i Index) merge(served []servedKind) Index {
	out := Index{Kinds: slices.Clone(i.Kinds)}
	for _, s := range served {
		k := out.byType(s.Name)
		if k == nil {
			out.Kinds = append(out.Kinds, Kind{Name: s.Name, Shape: "Spec"})
			k = &out.Kinds[len(out.Kinds)-1]
		}
		k.Plural, k.Scope, k.ReadOnly, k.Short = s.Path, s.Scope, s.ReadOnly, s.ShortName
	}
	return out
}

// servedKind is an entry of GET /_resources.
type servedKind struct {
	Name      string `json:"name"`
	Path      string `json:"path"`
	Scope     string `json:"scope"`
	ReadOnly  bool   `json:"readOnly"`
	ShortName string `json:"shortName"`
}

// served asks the control plane for its kinds.
func (c *client) served(ctx context.Context) ([]servedKind, error) {
	var answer struct {
		Resources []servedKind `json:"resources"`
	}
	if err := c.json(ctx, "/_resources", nil, &answer); err != nil {
		return nil, err
	}
	return answer.Resources, nil
}

// kind finds what a word means: in the embedded index, and where that does
// not know it, among the kinds that the control plane lists.
func (c *client) kind(ctx context.Context, word string) (*Kind, error) {
	i, err := embedded()
	if err != nil {
		return nil, err
	}
	if k := i.byWord(word); k != nil {
		return k, nil
	}
	served, err := c.served(ctx)
	if err != nil {
		c.app.log.Debug("the control plane's kinds can't be had", "error", err)
	}
	i = i.merge(served)
	if k := i.byWord(word); k != nil {
		return k, nil
	}
	return nil, errs.New(errs.Invalid, "unknown TYPE: %s%s", word, allowed(word, i.args(false)))
}

// allowed names the nearest word, and all of them.
func allowed(word string, all []string) string {
	s := ""
	if n := names.Nearest(word, all); n != "" {
		s = fmt.Sprintf(" (did you mean %q?)", n)
	}
	return s + ". Allowed values: " + strings.Join(all, ", ")
}
