package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
	"kuma/internal/mesh"
)

func (a *app) getCommand() *cobra.Command {
	var meshName, output, offset string
	var size int
	c := &cobra.Command{
		Use:   "get TYPE [NAME]",
		Short: "Show resources",
		Long:  "Show all resources of a type, or one.\n\nWithout a type the known ones are listed. A type may be written as in its documents (MeshTimeout), as plural, singular or short name.",
		Example: "  kumactl get meshes\n  kumactl get dataplanes --mesh default\n" +
			"  kumactl get meshtimeout slow -o yaml",
		Args:              cobra.MaximumNArgs(2),
		ValidArgsFunction: a.completeArgs(false),
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if c.Flags().Changed("size") && (size < 1 || size > 1000) {
				return errs.New(errs.Invalid, "--size must be 1 to 1000, not %d", size)
			}
			switch len(args) {
			case 0:
				return a.listKinds(c.Context())
			case 1:
				q := url.Values{}
				if size != 0 {
					q.Set("size", strconv.Itoa(size))
				}
				if offset != "" {
					q.Set("offset", offset)
				}
				return a.getList(c.Context(), args[0], meshName, output, q)
			default:
				return a.getOne(c.Context(), args[0], args[1], meshName, output)
			}
		},
	}
	f := c.Flags()
	f.StringVarP(&meshName, "mesh", "m", "", `mesh of the resources (default the context's, or "default")`)
	f.StringVarP(&output, "output", "o", "table", "output format: table, yaml or json")
	choices(c, "output", "table", "yaml", "json")
	f.IntVar(&size, "size", 0, "how many resources to show at most, 1 to 1000 (default the control plane's, 100)")
	f.StringVar(&offset, "offset", "", "where to go on, as the end of a list says")
	return c
}

func checkOutput(format string) error {
	if slices.Contains([]string{"table", "yaml", "json"}, format) {
		return nil
	}
	return errs.New(errs.Invalid, "unknown output format %q: must be table, yaml or json", format)
}

// meshOf is the mesh that a command works in.
func (c *client) meshOf(flag string) string {
	switch {
	case flag != "":
		return flag
	case c.mesh != "":
		return c.mesh
	}
	return defaultMesh
}

// meta is what every resource in an answer has.
type meta struct {
	Type     string    `json:"type"`
	Mesh     string    `json:"mesh"`
	Name     string    `json:"name"`
	Created  time.Time `json:"creationTime"`
	Modified time.Time `json:"modificationTime"`
}

// page is a list's answer.
type page struct {
	Items []json.RawMessage `json:"items"`
	Next  string            `json:"next"`
}

// offset is where the next page starts, "" after the last.
func (p page) offset() string {
	u, err := url.Parse(p.Next)
	if err != nil {
		return ""
	}
	return u.Query().Get("offset")
}

func (a *app) getList(ctx context.Context, word, meshName, output string, query url.Values) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	k, err := c.kind(ctx, word)
	if err != nil {
		return err
	}
	c.greet(ctx)
	meshName = c.meshOf(meshName)
	_, body, err := c.do(ctx, http.MethodGet, k.path(meshName, ""), query, nil)
	if err != nil {
		if p := notFound(err); p != nil && p.routed() {
			return errs.New(errs.NotFound, "No resources found in %s mesh\n  there is no such mesh (kumactl get meshes lists them)", meshName)
		}
		return c.explain(err, k)
	}
	if output != "table" {
		return a.writeAs(output, body)
	}
	var p page
	if err := json.Unmarshal(body, &p); err != nil {
		return errs.New(errs.Invalid, "the answer for %s is not the JSON that was expected: %w", k.Plural, err)
	}
	if err := a.table(k, p.Items); err != nil {
		return err
	}
	if o := p.offset(); o != "" {
		return a.print("\nRerun command with --offset=%s argument to retrieve more resources\n", o)
	}
	return nil
}

func (a *app) getOne(ctx context.Context, word, name, meshName, output string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	k, err := c.kind(ctx, word)
	if err != nil {
		return err
	}
	c.greet(ctx)
	meshName = c.meshOf(meshName)
	_, body, err := c.do(ctx, http.MethodGet, k.path(meshName, name), nil, nil)
	if err != nil {
		if p := notFound(err); p != nil && p.routed() {
			if !k.meshed() {
				return errs.New(errs.NotFound, "No resources found\n  there is no %s with name %q", k.Name, name)
			}
			// The first line is the contract's; programs compare it.
			return errs.New(errs.NotFound, "No resources found in %s mesh\n  there is no %s with name %q", meshName, k.Name, name)
		}
		return c.explain(err, k)
	}
	if output != "table" {
		return a.writeAs(output, body)
	}
	return a.table(k, []json.RawMessage{body})
}

// writeAs prints an answer as JSON, in the server's order, or as YAML.
func (a *app) writeAs(format string, body []byte) error {
	if format == "yaml" {
		out, err := yaml.JSONToYAML(body)
		if err != nil {
			return errs.New(errs.Invalid, "the answer is not JSON: %w", err)
		}
		return a.write(out)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, bytes.TrimSpace(body), "", "  "); err != nil {
		return errs.New(errs.Invalid, "the answer is not JSON: %w", err)
	}
	b.WriteByte('\n')
	return a.write(b.Bytes())
}

// table prints resources of one kind.
func (a *app) table(k *Kind, items []json.RawMessage) error {
	head := []string{"NAME"}
	if k.meshed() {
		head = []string{"MESH", "NAME"}
	}
	for _, c := range k.Columns {
		head = append(head, c.Name)
	}
	rows := [][]string{append(head, "AGE")}
	for _, raw := range items {
		var m meta
		var tree map[string]any
		if err := json.Unmarshal(raw, &m); err != nil {
			return errs.New(errs.Invalid, "the answer for %s is not the JSON that was expected: %w", k.Plural, err)
		}
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		if err := d.Decode(&tree); err != nil {
			return errs.New(errs.Invalid, "the answer for %s is not the JSON that was expected: %w", k.Plural, err)
		}
		row := []string{m.Name}
		if k.meshed() {
			row = []string{m.Mesh, m.Name}
		}
		for _, c := range k.Columns {
			row = append(row, cell(k, c, tree, raw))
		}
		rows = append(rows, append(row, since(m.Created, a.now())))
	}
	return writeTable(a.stdout, rows)
}

// cell is a resource's value for a column. The contract's columns of Mesh and
// Dataplane are more than the value at a path.
func cell(k *Kind, c Column, tree map[string]any, raw []byte) string {
	switch {
	case k.Name == "Mesh" && c.Name == "mTLS":
		var s mesh.MeshSpec
		if json.Unmarshal(raw, &s) != nil || s.MTLS == nil || s.MTLS.EnabledBackend == "" {
			return "off"
		}
		for _, b := range s.MTLS.Backends {
			if b.Name == s.MTLS.EnabledBackend {
				return b.Type + "/" + b.Name
			}
		}
		return s.MTLS.EnabledBackend
	case k.Name == "Mesh":
		on, _ := first(lookup(tree, c.Path)).(bool)
		return onOff(on)
	case k.Name == "Dataplane" && c.Name == "TAGS":
		var s mesh.DataplaneSpec
		if json.Unmarshal(raw, &s) != nil {
			return ""
		}
		return tags(&s)
	}
	var parts []string
	for _, v := range lookup(tree, c.Path) {
		parts = append(parts, flat(v))
	}
	return strings.Join(parts, ",")
}

func first(values []any) any {
	if len(values) == 0 {
		return nil
	}
	return values[0]
}

// tags are all tags of a proxy, each once, as "k=v k=v"; the values of a key
// that has several are joined by commas.
func tags(s *mesh.DataplaneSpec) string {
	all := s.Tags()
	var out []string
	for _, k := range sortedKeys(all) {
		out = append(out, k+"="+strings.Join(all[k], ","))
	}
	return strings.Join(out, " ")
}

// lookup follows a path such as ".spec.ports[*].port" and returns what it
// leads to; "[*]" means every item of a list.
func lookup(tree any, path string) []any {
	at := []any{tree}
	for step := range strings.SplitSeq(strings.TrimPrefix(path, "."), ".") {
		name, each := strings.CutSuffix(step, "[*]")
		var next []any
		for _, v := range at {
			m, ok := v.(map[string]any)
			if !ok || m[name] == nil {
				continue
			}
			if items, ok := m[name].([]any); ok && each {
				next = append(next, items...)
				continue
			}
			next = append(next, m[name])
		}
		at = next
	}
	return at
}

// flat writes a value in one cell.
func flat(v any) string {
	switch v := v.(type) {
	case map[string]any:
		var out []string
		for _, k := range sortedKeys(v) {
			out = append(out, k+"="+flat(v[k]))
		}
		return strings.Join(out, " ")
	case []any:
		var out []string
		for _, i := range v {
			out = append(out, flat(i))
		}
		return strings.Join(out, ",")
	case bool:
		return onOff(v)
	}
	return fmt.Sprint(v)
}

// listKinds prints the types that get and delete take.
func (a *app) listKinds(ctx context.Context) error {
	i, err := embedded()
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	served, err := c.served(ctx)
	if err != nil {
		a.warn("these are the types that this kumactl knows: %s", firstLine(err.Error()))
	} else {
		i = i.merge(served)
		i.Kinds = slices.DeleteFunc(i.Kinds, func(k Kind) bool {
			return !slices.ContainsFunc(served, func(s servedKind) bool { return s.Name == k.Name })
		})
	}
	slices.SortFunc(i.Kinds, func(x, y Kind) int { return strings.Compare(x.Name, y.Name) })
	rows := [][]string{{"TYPE", "ARGUMENT", "SHORT", "SCOPE", "WRITABLE"}}
	for _, k := range i.Kinds {
		writable := "yes"
		if k.ReadOnly {
			writable = "no"
		}
		rows = append(rows, []string{k.Name, k.argName(), k.Short, k.Scope, writable})
	}
	return writeTable(a.stdout, rows)
}

// completeArgs offers types, and names of resources from the control plane.
func (a *app) completeArgs(writable bool) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		none := cobra.ShellCompDirectiveNoFileComp
		if len(args) > 1 || a.startLog() != nil {
			return nil, none
		}
		if len(args) == 0 {
			i, err := embedded()
			if err != nil {
				return nil, none
			}
			return i.args(writable), none
		}
		a.stderr = io.Discard
		c, err := a.client()
		if err != nil {
			return nil, none
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), greetTimeout)
		defer cancel()
		k, err := c.kind(ctx, args[0])
		if err != nil {
			return nil, none
		}
		meshName, _ := cmd.Flags().GetString("mesh")
		var list struct{ Items []meta }
		if c.json(ctx, k.path(c.meshOf(meshName), ""), nil, &list) != nil {
			return nil, none
		}
		var out []string
		for _, m := range list.Items {
			out = append(out, m.Name)
		}
		return out, none
	}
}
