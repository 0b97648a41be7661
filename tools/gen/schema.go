package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"kuma/internal/resource"
)

// A schema is a JSON Schema (draft 2020-12), as much of it as Go types need.
// An object with properties takes no others, unless additionalProperties says so.
type schema struct {
	// Type is a string, or a list of strings; nil where anything may stand.
	Type        any      `json:"type,omitempty"`
	Format      string   `json:"format,omitempty"`
	Description string   `json:"description,omitempty"`
	Enum        []string `json:"enum,omitempty"`
	Required    []string `json:"required,omitempty"`
	// Properties keeps the order of the Go fields.
	Properties properties `json:"properties,omitempty"`
	Items      *schema    `json:"items,omitempty"`
	// AdditionalProperties is a *schema or a bool.
	AdditionalProperties any `json:"additionalProperties,omitempty"`
}

// A property is a named field of an object.
type property struct {
	name   string
	schema *schema
}

type properties []property

// MarshalJSON writes an object whose fields stand in this order.
func (p properties) MarshalJSON() ([]byte, error) {
	var out strings.Builder
	out.WriteByte('{')
	for i, field := range p {
		if i > 0 {
			out.WriteByte(',')
		}
		value, err := json.Marshal(field.schema)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, "%q:%s", field.name, value)
	}
	out.WriteByte('}')
	return []byte(out.String()), nil
}

// source reads the doc comments of Go types, a package at a time.
type source struct {
	root     string
	packages map[string]map[string]typeDoc
}

// typeDoc is what the source says of a type.
type typeDoc struct {
	text   string
	fields map[string]string
}

func newSource(root string) *source {
	return &source{root: root, packages: map[string]map[string]typeDoc{}}
}

// types returns the documented types of a package of this module, by name;
// none for packages of others.
func (s *source) types(importPath string) (map[string]typeDoc, error) {
	if docs, ok := s.packages[importPath]; ok {
		return docs, nil
	}
	docs := map[string]typeDoc{}
	if below, ours := strings.CutPrefix(importPath, "kuma/"); ours {
		dir := filepath.Join(s.root, filepath.FromSlash(below))
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, entry := range entries {
			if !strings.HasSuffix(entry.Name(), ".go") || strings.HasSuffix(entry.Name(), "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(dir, entry.Name()), nil, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				return nil, err
			}
			addTypes(docs, file)
		}
	}
	s.packages[importPath] = docs
	return docs, nil
}

// addTypes collects the comments of a file's type declarations.
func addTypes(docs map[string]typeDoc, file *ast.File) {
	for _, declaration := range file.Decls {
		general, ok := declaration.(*ast.GenDecl)
		if !ok || general.Tok != token.TYPE {
			continue
		}
		for _, spec := range general.Specs {
			declared := spec.(*ast.TypeSpec)
			text := declared.Doc.Text()
			if text == "" && !general.Lparen.IsValid() {
				text = general.Doc.Text()
			}
			doc := typeDoc{text: text, fields: map[string]string{}}
			if structure, ok := declared.Type.(*ast.StructType); ok {
				for _, field := range structure.Fields.List {
					comment := field.Doc.Text()
					if comment == "" {
						comment = field.Comment.Text()
					}
					for _, name := range field.Names {
						doc.fields[name.Name] = comment
					}
				}
			}
			docs[declared.Name.Name] = doc
		}
	}
}

// docOf returns what the source says of a named type.
func (s *source) docOf(t reflect.Type) (typeDoc, error) {
	docs, err := s.types(t.PkgPath())
	if err != nil {
		return typeDoc{}, err
	}
	name, _, _ := strings.Cut(t.Name(), "[") // of a generic type, the name without its arguments
	return docs[name], nil
}

// specOf derives the schema of a kind's specification. All policies share one
// Go type; what a kind has no use for, by its traits, is left out.
func (s *source) specOf(k *resource.Kind) (*schema, error) {
	spec, err := s.schemaOf(k.New())
	if err != nil {
		return nil, err
	}
	if p := k.Policy; p != nil && p.TargetRef {
		unused := map[string]bool{"default": !p.Default, "to": !p.To, "from": !p.From, "rules": !p.Rules}
		spec.Properties = slices.DeleteFunc(spec.Properties, func(field property) bool { return unused[field.name] })
	}
	return spec, nil
}

// schemaOf derives the schema of what a pointer leads to, descriptions included.
func (s *source) schemaOf(pointer any) (*schema, error) {
	t := reflect.TypeOf(pointer)
	if t.Kind() != reflect.Pointer {
		return nil, fmt.Errorf("a pointer is wanted, this is a %s", t)
	}
	return s.derive(t.Elem(), nil)
}

var (
	unmarshaler = reflect.TypeFor[json.Unmarshaler]()
	enum        = reflect.TypeFor[resource.Enum]()
)

// derive turns a Go type into the schema of its JSON. The types that lead to
// it are in outer: a type inside itself ends there, with anything allowed.
func (s *source) derive(t reflect.Type, outer []reflect.Type) (*schema, error) {
	switch {
	case t.Kind() == reflect.Pointer:
		return s.derive(t.Elem(), outer)
	case t == reflect.TypeFor[time.Time]():
		return &schema{Type: "string", Format: "date-time"}, nil
	case t == reflect.TypeFor[json.RawMessage]() || t.Kind() == reflect.Interface:
		return &schema{}, nil
	case t == reflect.TypeFor[resource.Duration]() || t == reflect.TypeFor[resource.ProtoDuration]():
		return &schema{Type: "string", Format: "duration"}, nil
	case t.Implements(enum):
		return &schema{Type: "string", Enum: reflect.Zero(t).Interface().(resource.Enum).Values()}, nil
	case reflect.PointerTo(t).Implements(unmarshaler):
		return probe(t), nil
	}
	switch t.Kind() {
	case reflect.String:
		return &schema{Type: "string"}, nil
	case reflect.Bool:
		return &schema{Type: "boolean"}, nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return &schema{Type: "integer"}, nil
	case reflect.Float32, reflect.Float64:
		return &schema{Type: "number"}, nil
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return &schema{Type: "string", Format: "byte"}, nil
		}
		items, err := s.derive(t.Elem(), outer)
		return &schema{Type: "array", Items: items}, err
	case reflect.Map:
		values, err := s.derive(t.Elem(), outer)
		return &schema{Type: "object", AdditionalProperties: values}, err
	case reflect.Struct:
		if slices.Contains(outer, t) {
			return &schema{Type: "object"}, nil
		}
		return s.object(t, append(slices.Clip(outer), t))
	default:
		return nil, fmt.Errorf("%s has no form in JSON", t)
	}
}

// object derives the schema of a struct. A field without omitempty or omitzero
// is required where its zero value means nothing, that is if it is a string.
func (s *source) object(t reflect.Type, outer []reflect.Type) (*schema, error) {
	out := &schema{Type: "object"}
	for _, field := range reflect.VisibleFields(t) {
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !field.IsExported() || name == "-" || field.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = field.Name
		}
		derived, err := s.derive(field.Type, outer)
		if err != nil {
			return nil, fmt.Errorf("%s.%s: %w", t, field.Name, err)
		}
		if derived.Description, err = s.describeField(t, field, name); err != nil {
			return nil, err
		}
		out.Properties = append(out.Properties, property{name, derived})
		optional := strings.Contains(options, "omitempty") || strings.Contains(options, "omitzero")
		if !optional && field.Type.Kind() == reflect.String {
			out.Required = append(out.Required, name)
		}
	}
	if len(out.Properties) == 0 {
		out.AdditionalProperties = false
	}
	return out, nil
}

// describeField returns a field's comment, or its type's where it has none. A
// comment of Go begins with the Go name; here it begins with the JSON name.
func (s *source) describeField(t reflect.Type, field reflect.StructField, jsonName string) (string, error) {
	owner := t // for a field of an embedded struct, that struct
	for _, i := range field.Index[:len(field.Index)-1] {
		owner = dereferenced(owner.Field(i).Type)
	}
	doc, err := s.docOf(owner)
	if err != nil {
		return "", err
	}
	text, goName := doc.fields[field.Name], field.Name
	if text == "" {
		own := elementary(field.Type)
		doc, err := s.docOf(own)
		if err != nil {
			return "", err
		}
		text, goName = doc.text, own.Name()
	}
	text = strings.Join(strings.Fields(text), " ")
	return renamed(text, goName, jsonName), nil
}

// renamed returns a comment that begins with one name as one that begins with
// another.
func renamed(text, from, to string) string {
	rest, ok := strings.CutPrefix(text, from)
	if !ok || from == "" || rest == "" || !strings.ContainsAny(rest[:1], " ,:;'") {
		return text
	}
	return to + rest
}

func dereferenced(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t
}

// elementary is the type inside pointers, lists and maps.
func elementary(t reflect.Type) reflect.Type {
	for t.Name() == "" && (t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map) {
		t = t.Elem()
	}
	return t
}

// samples are values of each JSON type, with which probe finds out what a type
// that reads its own JSON accepts.
var samples = []struct{ jsonType, values string }{
	{"integer", `1`},
	{"number", `0.5`},
	{"string", `"a" "10" "10s" "1.5" "10%" "127.0.0.1" "2006-01-02T15:04:05Z"`},
	{"boolean", `true false`},
	{"array", `[]`},
	{"object", `{}`},
}

// probe derives the schema of a type that reads its own JSON by trying it.
// Where it takes everything or nothing that is tried, anything may stand.
func probe(t reflect.Type) *schema {
	var accepted []string
	for _, sample := range samples {
		for _, value := range strings.Fields(sample.values) {
			if json.Unmarshal([]byte(value), reflect.New(t).Interface()) == nil {
				accepted = append(accepted, sample.jsonType)
				break
			}
		}
	}
	if slices.Contains(accepted, "number") {
		accepted = slices.DeleteFunc(accepted, func(s string) bool { return s == "integer" })
	}
	switch len(accepted) {
	case 0, len(samples) - 1:
		return &schema{}
	case 1:
		return &schema{Type: accepted[0]}
	default:
		return &schema{Type: accepted}
	}
}
