package main

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"

	"kuma/internal/conf"
	"kuma/internal/cp"
)

// generateSettings writes docs/reference/kuma-cp-settings.md: every setting of
// the control plane, with its variable, default and meaning.
func generateSettings(_ context.Context, root string) error {
	meaning := map[string]string{}
	if err := meanings(newSource(root), reflect.TypeFor[cp.Config](), "", meaning); err != nil {
		return err
	}
	var out bytes.Buffer
	out.WriteString(`<!-- Made by tools/gen from the code. Do not edit. -->

# Settings of kuma-cp

A setting comes from its default, then the file that ` + "`kuma-cp run --config-file`" + ` names
(YAML; the key's parts are nested), then the environment. A key that does not exist is an error, a variable that does not exist
a warning; both name the nearest one.
`)
	group := ""
	for _, s := range conf.Describe(cp.Default()) {
		if first, _, nested := strings.Cut(s.Key, "."); first != group || !nested && group == "" {
			group = first
			fmt.Fprintf(&out, "\n## %s\n\n%s\n\n| key | variable | default | meaning |\n|---|---|---|---|\n", group, oneParagraph(meaning[group]))
		}
		env := "file only"
		if s.Env != "" {
			env = "`" + s.Env + "`"
		}
		if meaning[s.Key] == "" {
			meaning[s.Key] = "see the row above"
		}
		fmt.Fprintf(&out, "| `%s` | %s | `%s` | %s |\n", s.Key, env, s.Default, strings.ReplaceAll(oneParagraph(meaning[s.Key]), "|", `\|`))
	}
	return writeFile(filepath.Join(root, "docs", "reference", "kuma-cp-settings.md"), out.Bytes())
}

// meanings collects the comments of a configuration struct's fields, by key.
func meanings(source *source, t reflect.Type, path string, out map[string]string) error {
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "" || name == "-" {
			continue
		}
		key := strings.TrimPrefix(path+"."+name, ".")
		text, err := source.describeField(t, f, name)
		if err != nil {
			return err
		}
		out[key] = text
		if f.Type.Kind() == reflect.Struct && f.Type.PkgPath() != "time" {
			if err := meanings(source, f.Type, key, out); err != nil {
				return err
			}
		}
	}
	return nil
}
