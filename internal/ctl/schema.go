package ctl

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"kuma/internal/names"
)

// A Schema is the part of JSON Schema 2020-12 that the index of kinds uses.
// An object with properties and nothing said of others is closed.
type Schema struct {
	Type typeNames `json:"type,omitempty"`
	// Format is known for strings: "duration" (Go's syntax), "byte" (base64).
	Format               string             `json:"format,omitempty"`
	Properties           map[string]*Schema `json:"properties,omitempty"`
	Items                *Schema            `json:"items,omitempty"`
	AdditionalProperties *additional        `json:"additionalProperties,omitempty"`
	Required             []string           `json:"required,omitempty"`
	Enum                 []any              `json:"enum,omitempty"`
	Description          string             `json:"description,omitempty"`
}

// typeNames is one type or a list of them.
type typeNames []string

// UnmarshalJSON reads either form.
func (t *typeNames) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*t = typeNames{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(t))
}

// additional is what may stand beside the known properties: anything, nothing
// or values of a schema.
type additional struct {
	open   bool
	schema *Schema
}

// UnmarshalJSON reads true, false or a schema.
func (a *additional) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &a.open) == nil {
		return nil
	}
	a.open = true
	return json.Unmarshal(b, &a.schema)
}

// A finding is one thing wrong with a document.
type finding struct {
	path, message string
	// unknown: the field is not in the schema. A newer control plane may know
	// it.
	unknown bool
}

func (f finding) String() string {
	if f.path == "" {
		return f.message
	}
	return f.path + ": " + f.message
}

const (
	// maxFindings bounds how many mistakes of one document are listed.
	maxFindings = 50
	// maxDepth bounds how deep a document may nest.
	maxDepth = 100
)

// metaFields stand at the top of every document. Those after the first four
// are the server's own: accepted, so that what was got can be applied.
var metaFields = [...]string{"type", "mesh", "name", "labels", "creationTime", "modificationTime", "kri", "snis", "status"}

var nameForm = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// check compares a whole document with what is known of its kind.
func (k *Kind) check(doc map[string]any) []finding {
	c := checker{flat: k.Shape == "Flat"}
	if k.ReadOnly {
		c.add("type", fmt.Sprintf("%s is read-only: the system itself writes it", k.Name), false)
	}
	c.name(doc)
	if k.meshed() {
		switch m := doc["mesh"].(type) {
		case string:
			if m == "" {
				c.add("mesh", "cannot be empty", false)
			}
		case nil:
			c.add("mesh", "cannot be empty", false)
		default:
			c.add("mesh", "must be a string, not "+show(m)+quotes(m), false)
		}
	}
	if l, ok := doc["labels"]; ok {
		c.check("labels", l, &Schema{Type: typeNames{"object"}, AdditionalProperties: &additional{open: true, schema: &Schema{Type: typeNames{"string"}}}}, 0)
	}
	if k.Schema == nil {
		return c.found
	}
	rest := maps.Clone(doc)
	for _, f := range metaFields {
		delete(rest, f)
	}
	if k.Shape == "Flat" {
		c.check("", rest, k.Schema, 0)
		return c.found
	}
	spec, ok := rest["spec"]
	delete(rest, "spec")
	for _, f := range slices.Sorted(maps.Keys(rest)) {
		c.unknown(f, f, append([]string{"spec"}, metaFields[:4]...))
	}
	if ok {
		c.check("spec", spec, k.Schema, 0)
	} else if len(k.Schema.Required) > 0 {
		c.add("spec", "is required", false)
	}
	return c.found
}

type checker struct {
	flat  bool
	found []finding
}

func (c *checker) add(path, message string, unknown bool) {
	if len(c.found) < maxFindings {
		c.found = append(c.found, finding{path, message, unknown})
	}
}

func (c *checker) unknown(path, name string, known []string) {
	m := "unknown field"
	if n := names.Nearest(name, known); n != "" {
		m += fmt.Sprintf("; did you mean %q?", n)
	} else if len(known) > 0 && len(known) <= 12 {
		m += "; known here: " + strings.Join(known, ", ")
	}
	c.add(path, m, true)
}

func (c *checker) name(doc map[string]any) {
	switch n := doc["name"].(type) {
	case nil:
		c.add("name", "cannot be empty", false)
	case string:
		if n == "" {
			c.add("name", "cannot be empty", false)
		} else if len(n) > 253 || !nameForm.MatchString(n) {
			c.add("name", fmt.Sprintf("%s must be at most 253 lower-case letters, digits, '-' or '.', and start and end with a letter or digit", show(n)), false)
		}
	default:
		c.add("name", "must be a string, not "+show(n)+quotes(n), false)
	}
}

// check compares a value with a schema. A null means that the field is absent.
func (c *checker) check(path string, v any, s *Schema, depth int) {
	if v == nil || s == nil {
		return
	}
	if depth > maxDepth {
		c.add(path, "is nested too deeply", false)
		return
	}
	if len(s.Type) > 0 && !slices.ContainsFunc(s.Type, func(t string) bool { return c.isA(v, t) }) {
		m := "must be " + wanted(s.Type) + ", not " + show(v)
		if slices.Contains(s.Type, "string") {
			m += quotes(v)
		}
		c.add(path, m, false)
		return
	}
	if len(s.Enum) > 0 && !slices.ContainsFunc(s.Enum, func(e any) bool { return fmt.Sprint(e) == fmt.Sprint(v) }) {
		c.add(path, fmt.Sprintf("value '%v' is not supported, it must be one of: %s", v, list(s.Enum)), false)
		return
	}
	switch v := v.(type) {
	case string:
		c.format(path, v, s.Format)
	case map[string]any:
		c.object(path, v, s, depth)
	case []any:
		for i, item := range v {
			c.check(fmt.Sprintf("%s[%d]", path, i), item, s.Items, depth+1)
		}
	}
}

// format checks what a string means.
func (c *checker) format(path, v, format string) {
	switch format {
	case "duration":
		if _, err := time.ParseDuration(v); err != nil {
			c.add(path, fmt.Sprintf(`%s is not a duration; write a number and a unit, such as "10s", "250ms" or "1h30m"`, show(v)), false)
		}
	case "byte":
		if _, err := base64.StdEncoding.DecodeString(v); err != nil {
			c.add(path, "must be base64: "+err.Error(), false)
		}
	}
}

func (c *checker) object(path string, v map[string]any, s *Schema, depth int) {
	for _, r := range s.Required {
		if v[r] == nil {
			c.add(join(path, r), "is required", false)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(v)) {
		p, known := s.Properties[name]
		switch extra := s.AdditionalProperties; {
		case known:
			c.check(join(path, name), v[name], p, depth+1)
		case extra != nil && extra.schema != nil:
			c.check(fmt.Sprintf("%s[%q]", path, name), v[name], extra.schema, depth+1)
		case extra != nil && extra.open, extra == nil && s.Properties == nil:
		default:
			all := slices.Collect(maps.Keys(s.Properties))
			if path == "" {
				all = append(all, metaFields[:4]...)
			}
			slices.Sort(all)
			c.unknown(join(path, name), name, all)
		}
	}
}

// isA reports whether a value has a type. Flat kinds write 64 bit numbers as
// strings, so numbers in quotes are numbers there.
func (c *checker) isA(v any, t string) bool {
	switch v := v.(type) {
	case string:
		if c.flat && (t == "integer" || t == "number") {
			_, err := strconv.ParseFloat(v, 64)
			return err == nil
		}
		return t == "string"
	case bool:
		return t == "boolean"
	case json.Number:
		if t == "integer" {
			_, err := strconv.ParseFloat(v.String(), 64)
			return err == nil && !strings.ContainsAny(strings.TrimSuffix(v.String(), ".0"), ".eE")
		}
		return t == "number"
	case map[string]any:
		return t == "object"
	case []any:
		return t == "array"
	}
	return false
}

func wanted(types []string) string {
	words := map[string]string{"object": "an object", "array": "a list", "string": "a string", "boolean": "true or false", "integer": "a whole number", "number": "a number"}
	var out []string
	for _, t := range types {
		out = append(out, words[t])
	}
	return strings.Join(out, " or ")
}

// quotes is the advice for a value that YAML did not take as a string.
func quotes(v any) string {
	switch v.(type) {
	case bool:
		return "; put it in quotes (YAML takes yes, no, on and off for true and false)"
	case json.Number:
		return "; put it in quotes"
	}
	return ""
}

// show writes a value of the user's for a message.
func show(v any) string {
	switch v := v.(type) {
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	case string:
		if len(v) > 60 {
			v = v[:60] + "…"
		}
		return strconv.Quote(v)
	default:
		return fmt.Sprint(v)
	}
}

func list(values []any) string {
	var out []string
	for _, v := range values {
		out = append(out, fmt.Sprint(v))
	}
	return strings.Join(out, ", ")
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
