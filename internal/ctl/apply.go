package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
	"kuma/internal/mesh"
)

func (a *app) applyCommand() *cobra.Command {
	var files, pairs []string
	var dryRun bool
	c := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Create or update resources",
		Long: "Create or update resources.\n\nAll documents are read and checked, and tried on the control plane, before the first is written.\n" +
			"A document looks like what \"kumactl get TYPE NAME -o yaml\" prints.",
		Example: "  kumactl apply -f mesh.yaml\n  kumactl apply -f policies/ -v env=prod --dry-run\n  cat dp.yaml | kumactl apply -f -",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.apply(c.Context(), files, pairs, dryRun)
		},
	}
	f := c.Flags()
	f.StringArrayVarP(&files, "file", "f", nil, "file, directory or http(s) URL to apply, - for standard input; may be repeated")
	f.StringArrayVarP(&pairs, "var", "v", nil, "variable NAME=VALUE for {{ NAME }} in the files; may be repeated")
	f.BoolVar(&dryRun, "dry-run", false, "print the resources that would be applied and change nothing")
	must(c.MarkFlagRequired("file"))
	return c
}

// must is for what only a mistake in this program can break.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// A manifest is a document that was read and checked.
type manifest struct {
	document
	kind       *Kind
	mesh, name string
	tree       map[string]any
}

// String names the resource as the contract's output does.
func (m manifest) String() string {
	return fmt.Sprintf("resource type=%q mesh=%q name=%q", m.kind.Name, m.mesh, m.name)
}

// body returns what is sent.
func (m manifest) body() ([]byte, error) { return json.Marshal(m.tree) }

// into decodes what is sent.
func (m manifest) into(spec any) error {
	body, err := m.body()
	if err != nil {
		return err
	}
	return json.Unmarshal(body, spec)
}

func (a *app) apply(ctx context.Context, files, pairs []string, dryRun bool) error {
	vars, err := parseVars(pairs)
	if err != nil {
		return err
	}
	var docs []document
	for _, f := range files {
		inputs, err := a.readInputs(ctx, f)
		if err != nil {
			return err
		}
		for _, in := range inputs {
			if in, err = render(in, vars); err != nil {
				return err
			}
			docs = append(docs, split(in)...)
		}
	}
	if len(docs) == 0 {
		return errs.New(errs.Invalid, "no resource(s) passed to apply")
	}
	for i := range docs {
		docs[i].index = i
	}
	kinds, err := embedded()
	if err != nil {
		return err
	}
	if dryRun {
		list, err := a.check(docs, kinds, false)
		if err != nil {
			return err
		}
		return a.printManifests(list)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	server, unknown := c.index(ctx)
	if unknown == nil {
		c.fits(server)
	}
	if unknownKind(docs, kinds) {
		served, err := c.served(ctx)
		if err != nil {
			a.log.Debug("the control plane's kinds can't be had", "error", err)
		}
		kinds = kinds.merge(served)
	}
	other := server.Version != "" && server.Version != clientVersion()
	list, err := a.check(docs, kinds, other)
	if err != nil {
		return err
	}
	if unknown != nil {
		return unknown
	}
	if server.DryRun {
		if err := c.try(ctx, list); err != nil {
			return err
		}
	}
	for i, m := range list {
		if err := c.put(ctx, m); err != nil {
			return fmt.Errorf("%w%s", err, progress(i, len(list)))
		}
	}
	return nil
}

// progress says what a failed apply has done.
func progress(done, all int) string {
	if all == 1 {
		return ""
	}
	return fmt.Sprintf("\n  %d of %d resources were applied before it; mend it and apply all again", done, all)
}

// unknownKind reports whether a document has a type that the index lacks.
func unknownKind(docs []document, kinds Index) bool {
	return slices.ContainsFunc(docs, func(d document) bool {
		tree, err := d.parse()
		if err != nil {
			return false
		}
		t, ok := tree["type"].(string)
		return ok && kinds.byType(t) == nil
	})
}

// check reads all documents and compares them with their schemas; it writes
// every mistake to standard error. Where the control plane is of another
// version, a field unknown here may be known there, so it is only warned of.
func (a *app) check(docs []document, kinds Index, otherVersion bool) ([]manifest, error) {
	var out []manifest
	failed := false
	fail := func(d document, format string, args ...any) {
		failed = true
		a.tell("resource[%d]: failed to parse resource: %s: %s", d.index, d.at(), fmt.Sprintf(format, args...))
	}
	wrong := func(d document, f finding) {
		failed = true
		a.tell("resource[%d]: failed to parse resource: %s line %d: %s", d.index, d.source, d.lineOf(f.path), f)
	}
	first := map[string]document{}
	for _, d := range docs {
		tree, err := d.parse()
		if err != nil {
			fail(d, "%s", err)
			continue
		}
		k, err := kindOf(tree, kinds)
		if err != nil {
			fail(d, "%s", err)
			continue
		}
		for _, f := range k.check(tree) {
			if f.unknown && otherVersion {
				a.warn("resource[%d]: %s: %s (the control plane has another version and may know it)", d.index, d.at(), f)
				continue
			}
			wrong(d, f)
		}
		m := manifest{document: d, kind: k, tree: tree}
		m.name, _ = tree["name"].(string)
		if k.meshed() {
			m.mesh, _ = tree["mesh"].(string)
		}
		if before, twice := first[m.String()]; twice && m.name != "" {
			fail(d, "%s stands at %s already", m, before.at())
		}
		first[m.String()] = d
		out = append(out, m)
	}
	if failed {
		return nil, errs.New(errs.Invalid, "failed to validate some resources; nothing was changed")
	}
	return out, nil
}

// kindOf finds a document's kind.
func kindOf(tree map[string]any, kinds Index) (*Kind, error) {
	t, ok := tree["type"].(string)
	switch {
	case ok && t != "":
	case tree["kind"] != nil && tree["apiVersion"] != nil:
		return nil, errs.New(errs.Invalid, "it is in Kubernetes' form (apiVersion, kind); kumactl takes type, mesh, name and, for this kind, what is under spec; or use kubectl apply")
	case tree["type"] == nil || t == "" && ok:
		return nil, errs.New(errs.Invalid, "type: cannot be empty; such as type: Mesh")
	default:
		return nil, errs.New(errs.Invalid, "type: must be a string, not %s", show(tree["type"]))
	}
	if k := kinds.byType(t); k != nil {
		return k, nil
	}
	var known []string
	for _, k := range kinds.Kinds {
		known = append(known, k.Name)
	}
	slices.Sort(known)
	return nil, errs.New(errs.Invalid, "type: unknown kind %q%s", t, suggestion(t, known))
}

// printManifests writes what apply would send.
func (a *app) printManifests(list []manifest) error {
	for i, m := range list {
		body, err := m.body()
		if err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
		text, err := yaml.JSONToYAML(body)
		if err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
		if i > 0 {
			text = append([]byte("---\n"), text...)
		}
		if err := a.write(text); err != nil {
			return err
		}
	}
	return nil
}

// try lets the control plane check every resource without writing any. Of a
// resource that is sound but for its mesh, which is not there, it says just
// that; if an earlier document makes the mesh, nothing is wrong. The constraints
// of a mesh that an earlier document makes or changes are looked at here.
func (c *client) try(ctx context.Context, list []manifest) error {
	made := map[string]manifest{}
	failed := 0
	for _, m := range list {
		if m.kind.Name == "Mesh" {
			made[m.name] = m
		}
		body, err := m.body()
		if err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
		_, _, err = c.do(ctx, http.MethodPut, m.kind.path(m.mesh, m.name), url.Values{"dry-run": {"true"}}, body)
		in, earlier := made[m.mesh]
		if earlier && (err == nil || lacksMesh(err)) {
			if reason := keptOut(in, m); reason != "" {
				failed++
				c.app.tell("resource[%d]: %s: %s: networking: %s", m.index, m.at(), m, reason)
			}
			continue
		}
		if err == nil {
			continue
		}
		if !isProblem(err) {
			return err
		}
		failed++
		c.app.tell("resource[%d]: %s: %s: failed server side: %s", m.index, m.at(), m, c.explain(err, m.kind))
	}
	if failed > 0 {
		return errs.New(errs.Invalid, "failed to validate some resources (%d of %d); nothing was changed", failed, len(list))
	}
	return nil
}

// keptOut says why a mesh's constraints keep a Dataplane out, or "" where they
// don't, or where only the control plane can tell: it adds its zone's tag.
func keptOut(in, m manifest) string {
	if m.kind.Name != mesh.Dataplanes.Name {
		return ""
	}
	var rules mesh.MeshSpec
	var proxy mesh.DataplaneSpec
	if in.into(&rules) != nil || m.into(&proxy) != nil || rules.Constraints == nil || rules.Constraints.DataplaneProxy == nil {
		return ""
	}
	all := rules.Constraints.DataplaneProxy
	for _, rule := range slices.Concat(all.Requirements, all.Restrictions) {
		if _, zoned := rule.Tags[mesh.TagZone]; zoned {
			return ""
		}
	}
	reason, _ := rules.Admitted(m.mesh, &proxy)
	return reason
}

// put writes one resource.
func (c *client) put(ctx context.Context, m manifest) error {
	body, err := m.body()
	if err != nil {
		return fmt.Errorf("%s: %w", m, err)
	}
	status, answer, err := c.do(ctx, http.MethodPut, m.kind.path(m.mesh, m.name), nil, body)
	if err != nil {
		if !isProblem(err) {
			return fmt.Errorf("%s: %w", m, err)
		}
		return fmt.Errorf("%s: failed server side: %w", m, c.explain(err, m.kind))
	}
	var said struct {
		Warnings []string `json:"warnings"`
	}
	if len(answer) > 0 {
		if err := json.Unmarshal(answer, &said); err != nil {
			c.app.log.Debug("the answer to a write is no JSON", "error", err)
		}
	}
	for _, w := range said.Warnings {
		c.app.warn("%s", w)
	}
	done := "Updated"
	if status == http.StatusCreated {
		done = "Created"
	}
	return c.app.print("%s %s\n", m, done)
}

// explain makes a router's 404 or 405 say what it means for a kind.
func (c *client) explain(err error, k *Kind) error {
	if p := notFound(err); p != nil && !p.routed() {
		return errs.New(errs.NotFound, "the control plane at %s does not have the kind %s (kumactl get lists those known)", c.base, k.Name)
	}
	return err
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
