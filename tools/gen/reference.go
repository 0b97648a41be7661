package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"kuma/internal/resource"
)

// generateReference writes docs/reference: a page for each kind, and a list of
// them. Pages of kinds that are gone are removed.
func generateReference(_ context.Context, root string) error {
	source := newSource(root)
	dir := filepath.Join(root, "docs", "reference")
	made := map[string]bool{"README.md": true, "kuma-cp-settings.md": true}
	var index bytes.Buffer
	index.WriteString("<!-- Made by tools/gen from the declarations of the kinds. Do not edit. -->\n\n# Kinds\n\n" +
		"Every kind of resource that this version knows. The HTTP interface is described in [openapi.yaml](openapi.yaml).\n\n" +
		"| kind | scope | what it is |\n|---|---|---|\n")
	for _, k := range kinds() {
		name := strings.ToLower(k.Name) + ".md"
		made[name] = true
		page, summary, err := referencePage(root, k, source)
		if err != nil {
			return fmt.Errorf("%s: %w", k.Name, err)
		}
		if err := writeFile(filepath.Join(dir, name), page); err != nil {
			return err
		}
		fmt.Fprintf(&index, "| [%s](%s) | %s | %s |\n", k.Name, name, k.Scope, summary)
	}
	if err := writeFile(filepath.Join(dir, "README.md"), index.Bytes()); err != nil {
		return err
	}
	old, err := filepath.Glob(filepath.Join(dir, "*.md"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if !made[filepath.Base(path)] {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// referencePage writes the page of one kind, and says in a sentence what it is.
func referencePage(root string, k *resource.Kind, source *source) (page []byte, summary string, err error) {
	spec, err := source.specOf(k)
	if err != nil {
		return nil, "", err
	}
	text, err := kindText(k, source)
	if err != nil {
		return nil, "", err
	}
	summary = firstSentence(text)
	var out bytes.Buffer
	fmt.Fprintf(&out, "<!-- Made by tools/gen from the declaration of the kind. Do not edit. -->\n\n# %s\n\n", k.Name)
	if text != "" {
		fmt.Fprintf(&out, "%s\n\n", text)
	}
	out.WriteString("| | |\n|---|---|\n")
	for _, row := range facts(k) {
		fmt.Fprintf(&out, "| %s | %s |\n", row[0], row[1])
	}
	example, err := exampleOf(root, k)
	if err != nil {
		return nil, "", err
	}
	if example != "" {
		fmt.Fprintf(&out, "\n## Example\n\n```yaml\n%s\n```\n", example)
	}
	out.WriteString("\n## Fields\n\n")
	if k.Shape == resource.Spec {
		out.WriteString("These stand under `spec`, beside `type`, `name`, `labels`" + meshWord(k) + " at the top.\n\n")
	} else {
		out.WriteString("These stand at the top, beside `type`, `name`, `labels`" + meshWord(k) + ".\n\n")
	}
	out.WriteString("| field | type | |\n|---|---|---|\n")
	if err := writeFields(&out, "", spec, map[string]string{}); err != nil {
		return nil, "", err
	}
	if k.NewStatus != nil {
		status, err := source.schemaOf(k.NewStatus())
		if err != nil {
			return nil, "", err
		}
		out.WriteString("\n## Status\n\nThe system writes these, under `status`.\n\n| field | type | |\n|---|---|---|\n")
		if err := writeFields(&out, "", status, map[string]string{}); err != nil {
			return nil, "", err
		}
	}
	return out.Bytes(), summary, nil
}

func meshWord(k *resource.Kind) string {
	if k.Scope == resource.Mesh {
		return " and `mesh`"
	}
	return ""
}

// kindText is the comment of the kind's specification, or for the conf of a
// policy, where the specification's type is the same for all, that of its package's Conf.
func kindText(k *resource.Kind, source *source) (string, error) {
	t := reflect.TypeOf(k.New()).Elem()
	doc, err := source.docOf(t)
	if err != nil {
		return "", err
	}
	name := t.Name()
	if k.Policy != nil && strings.Contains(t.Name(), "[") {
		conf, err := source.types("kuma/internal/policy/" + strings.ToLower(k.Name))
		if err != nil {
			return "", err
		}
		if text := conf["Conf"].text; text != "" {
			doc.text, name = text, "Conf"
		}
	}
	return renamed(oneParagraph(doc.text), name, k.Name), nil
}

// oneParagraph joins the lines of each paragraph, for Markdown.
func oneParagraph(text string) string {
	var out []string
	for paragraph := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		out = append(out, strings.Join(strings.Fields(paragraph), " "))
	}
	return strings.Join(out, "\n\n")
}

// firstSentence is text up to its first full stop.
func firstSentence(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	if sentence, _, more := strings.Cut(text, ". "); more {
		return sentence + "."
	}
	return text
}

// facts are the rows of a kind's first table.
func facts(k *resource.Kind) [][2]string {
	path := "/" + k.Plural + "/{name}"
	if k.Scope == resource.Mesh {
		path = "/meshes/{mesh}" + path
	}
	rows := [][2]string{
		{"scope", k.Scope.String()},
		{"path", "`" + path + "`"},
		{"kumactl", "`kumactl get " + k.ArgName() + " NAME`"},
	}
	if len(k.AltPlurals) > 0 {
		rows = append(rows, [2]string{"also as", "`" + strings.Join(k.AltPlurals, "`, `") + "`"})
	}
	if k.Short != "" {
		rows = append(rows, [2]string{"in a KRI", "`kri_" + k.Short + "_…`"})
	}
	switch {
	case k.ReadOnly:
		rows = append(rows, [2]string{"written by", "the system alone"})
	case k.Admin:
		rows = append(rows, [2]string{"read and written by", "administrators alone"})
	}
	if p := k.Policy; p != nil {
		var parts []string
		for _, part := range []struct {
			has  bool
			name string
		}{{p.TargetRef, "targetRef"}, {p.To, "to"}, {p.From, "from"}, {p.Rules, "rules"}} {
			if part.has {
				parts = append(parts, "`"+part.name+"`")
			}
		}
		if len(parts) > 0 {
			rows = append(rows, [2]string{"policy with", strings.Join(parts, ", ")})
		}
	}
	return rows
}

// exampleOf reads the example that stands beside a policy, or the good input
// of a noun; none is no mistake.
func exampleOf(root string, k *resource.Kind) (string, error) {
	name := strings.ToLower(k.Name)
	for _, path := range []string{
		filepath.Join("internal", "policy", name, "example.yaml"),
		filepath.Join("internal", "mesh", "testdata", name+".good.yaml"),
	} {
		data, err := os.ReadFile(filepath.Join(root, path))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return strings.TrimSpace(string(data)), err
	}
	return "", nil
}

// writeFields writes a row for each field of an object, those inside it after
// it. An object that was written before, by its fields, is referred to; shown
// maps what was written to where.
func writeFields(out *bytes.Buffer, prefix string, s *schema, shown map[string]string) error {
	for _, field := range s.Properties {
		path := prefix + field.name
		text := field.schema.Description
		if slices.Contains(s.Required, field.name) {
			text = strings.TrimSpace("Required. " + text)
		}
		if len(field.schema.Enum) > 0 {
			text = strings.TrimSpace(text + " One of `" + strings.Join(field.schema.Enum, "`, `") + "`.")
		}
		inner, suffix := field.schema, "."
		for inner.Items != nil {
			inner, suffix = inner.Items, "[]"+suffix
		}
		if values, ok := inner.AdditionalProperties.(*schema); ok && len(values.Properties) > 0 {
			inner, suffix = values, ".*"+suffix
		}
		form, err := json.Marshal(inner.Properties)
		if err != nil {
			return err
		}
		before := shown[string(form)]
		if before != "" {
			text = strings.TrimSpace(text + " Its fields are those of `" + before + "`.")
		}
		fmt.Fprintf(out, "| `%s` | %s | %s |\n", path, typeWord(field.schema), strings.ReplaceAll(text, "|", `\|`))
		if before != "" || len(inner.Properties) == 0 {
			continue
		}
		if len(inner.Properties) > 1 {
			shown[string(form)] = strings.TrimSuffix(path+suffix, ".")
		}
		if err := writeFields(out, path+suffix, inner, shown); err != nil {
			return err
		}
	}
	return nil
}

// typeWord says in a few words what JSON a schema takes.
func typeWord(s *schema) string {
	switch t := s.Type.(type) {
	case []string:
		return strings.Join(t, " or ")
	case string:
		switch {
		case s.Items != nil:
			return "list of " + typeWord(s.Items)
		case s.Format == "duration":
			return "duration"
		case s.Format == "date-time":
			return "time"
		case s.Format == "byte":
			return "base64"
		}
		if values, ok := s.AdditionalProperties.(*schema); ok {
			return "map of " + typeWord(values)
		}
		return t
	}
	return "any"
}
