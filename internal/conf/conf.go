// Package conf loads the configuration of a program into a struct: defaults,
// which are what the struct holds before, then a YAML file, then the
// environment.
//
// A field's key in the file is its `json` tag; its environment variable is
// the path of keys in upper snake case after the prefix (xds.quietPeriod:
// KUMA_XDS_QUIET_PERIOD). The tag `env:"NAME"` gives a field another variable,
// or the fields of a struct another beginning; `env:"-"` gives none. The tag
// `secret:"true"` hides a value wherever it would be shown; fields of type
// Secret are hidden anyway.
//
// Fields are bool, string, integers, floats, time.Duration, whatever reads
// text (encoding.TextUnmarshaler), pointers to these, slices of these,
// map[string]string, structs, and slices of structs (from a file only).
package conf

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
)

// maxFile is the longest configuration file that is read, in bytes.
const maxFile = 1 << 20

// DefaultPrefix starts the names of the environment variables.
const DefaultPrefix = "KUMA"

// Options says where a configuration comes from.
type Options struct {
	// File is the YAML file; empty means none.
	File string
	// Env is the environment, as os.Environ returns it.
	Env []string
	// Prefix starts the names of variables; the default is DefaultPrefix.
	Prefix string
	// Ignored names what the contract knows and what has no meaning here, with
	// the reason: keys of the file ("store.cache"; all keys beneath count, and
	// so do the variables that derive from them) and variables ("KUMA_X", or
	// "KUMA_X_*" for all that start so). They are accepted with a warning.
	Ignored map[string]string
	// Known lists variables that others read: no warning about them.
	Known []string
}

// Load fills the struct that dst points to. Warnings are sentences for the
// operator: variables that nobody knows, settings without meaning. The error,
// which is Invalid, lists everything that is wrong at once, each with its
// place, what was read and what is allowed. After an error dst is of no use.
func Load(dst any, o Options) (warnings []string, err error) {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	v := reflect.ValueOf(dst)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return nil, errs.New(errs.Internal, "load the configuration: %T is not a pointer to a struct", dst)
	}
	l := &loader{o: o, root: fieldsOf(v.Elem(), "", o.Prefix)}
	if o.File != "" {
		if err := l.file(); err != nil {
			return nil, err
		}
	}
	l.environment()
	return l.warnings, errs.Fields(l.faults...)
}

type loader struct {
	o        Options
	root     []field
	warnings []string
	faults   []errs.Field
}

// field is one field of a configuration struct.
type field struct {
	key, path, env string
	secret         bool
	value          reflect.Value
}

var (
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// isGroup reports whether a type is a struct with fields of its own, not a
// value that reads text.
func isGroup(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(textType)
}

// fieldsOf lists the fields of a struct. Embedded structs are part of it.
func fieldsOf(v reflect.Value, path, env string) []field {
	var out []field
	for i := range v.NumField() {
		sf := v.Type().Field(i)
		key, _, _ := strings.Cut(sf.Tag.Get("json"), ",")
		if !sf.IsExported() && !sf.Anonymous || key == "-" {
			continue
		}
		if sf.Anonymous && key == "" && isGroup(sf.Type) {
			out = append(out, fieldsOf(v.Field(i), path, env)...)
			continue
		}
		if key == "" {
			key = strings.ToLower(sf.Name[:1]) + sf.Name[1:]
		}
		f := field{key: key, path: join(path, key), value: v.Field(i), secret: sf.Tag.Get("secret") == "true" || sf.Type == reflect.TypeFor[Secret]()}
		if env != "" {
			f.env = env + "_" + snake(key)
		}
		switch tag := sf.Tag.Get("env"); tag {
		case "":
		case "-":
			f.env = ""
		default:
			f.env = tag
		}
		out = append(out, f)
	}
	return out
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

var (
	lowerUpper = regexp.MustCompile(`([a-z0-9])([A-Z])`)
	upperWord  = regexp.MustCompile(`([A-Z])([A-Z][a-z])`)
	plural     = regexp.MustCompile(`([A-Z])s([A-Z]|$)`)
)

// snake turns camelCase into UPPER_SNAKE: dnsCacheTTL gives DNS_CACHE_TTL and
// allowedCIDRs gives ALLOWED_CIDRS.
func snake(key string) string {
	if m := plural.FindStringIndex(key); m != nil && m[0] > 0 && key[m[0]-1] >= 'A' && key[m[0]-1] <= 'Z' {
		key = key[:m[0]+1] + "S" + key[m[0]+2:]
	}
	key = upperWord.ReplaceAllString(key, "${1}_$2")
	key = lowerUpper.ReplaceAllString(key, "${1}_$2")
	return strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(key))
}

// walk calls f for every leaf beneath the fields: everything but groups.
func walk(fields []field, f func(field)) {
	for _, x := range fields {
		t := x.value.Type()
		switch {
		case isGroup(t):
			walk(fieldsOf(x.value, x.path, x.env), f)
		case t.Kind() == reflect.Pointer && isGroup(t.Elem()) && !x.value.IsNil():
			walk(fieldsOf(x.value.Elem(), x.path, x.env), f)
		default:
			f(x)
		}
	}
}

func (l *loader) fault(place, format string, args ...any) {
	l.faults = append(l.faults, errs.Field{Path: place, Message: fmt.Sprintf(format, args...)})
}

func (l *loader) warn(format string, args ...any) {
	l.warnings = append(l.warnings, fmt.Sprintf(format, args...))
}

var separator = regexp.MustCompile(`(?m)^---(\s|$)`)

// file reads the YAML file.
func (l *loader) file() error {
	name := l.o.File
	info, err := os.Stat(name)
	switch {
	case err != nil:
		return errs.New(errs.Invalid, "read the configuration file: %w", err)
	case info.Size() > maxFile:
		return errs.New(errs.Invalid, "configuration file %s has %d bytes, the limit is %d", name, info.Size(), maxFile)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return errs.New(errs.Invalid, "read the configuration file: %w", err)
	}
	for i, m := range separator.FindAllIndex(text, -1) {
		if before := bytes.TrimSpace(text[:m[0]]); i > 0 || len(before) > 0 && before[0] != '#' && before[0] != '%' {
			return errs.New(errs.Invalid, "configuration file %s holds more than one YAML document; only one is read", name)
		}
	}
	data, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return errs.New(errs.Invalid, "configuration file %s is not YAML: %w", name, err)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var doc any
	if err := d.Decode(&doc); err != nil {
		return errs.New(errs.Invalid, "configuration file %s: %w", name, err)
	}
	l.group(l.root, doc, "")
	return nil
}

// group sets the fields of a struct from an object of the file.
func (l *loader) group(fields []field, doc any, path string) {
	if doc == nil {
		return
	}
	object, ok := doc.(map[string]any)
	if !ok {
		l.fault(l.place(path), "must be an object with keys, it is %s", show(doc))
		return
	}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		i := slices.IndexFunc(fields, func(f field) bool { return f.key == key })
		if i >= 0 {
			l.set(fields[i], object[key])
			continue
		}
		full := join(path, key)
		if why, ok := l.ignoredPath(full); ok {
			l.warn("configuration file %s: %s has no meaning here: %s", l.o.File, full, why)
			continue
		}
		l.fault(l.place(full), "unknown key%s", l.nearestKey(fields, key))
	}
}

func (l *loader) place(path string) string {
	if path == "" {
		return l.o.File
	}
	return l.o.File + ": " + path
}

// nearestKey names the key that was probably meant: one beside it, or one of
// the same name elsewhere.
func (l *loader) nearestKey(fields []field, key string) string {
	keys := make([]string, len(fields))
	for i, f := range fields {
		keys[i] = f.key
	}
	if near := nearest(key, keys); near != "" {
		return fmt.Sprintf("; the nearest known one is %q", near)
	}
	var elsewhere string
	walk(l.root, func(f field) {
		if elsewhere == "" && strings.EqualFold(f.key, key) {
			elsewhere = f.path
		}
	})
	if elsewhere != "" {
		return fmt.Sprintf("; %q is known", elsewhere)
	}
	slices.Sort(keys)
	return "; known here are " + strings.Join(keys, ", ")
}

// set puts a value of the file into a field.
func (l *loader) set(f field, doc any) {
	if doc == nil {
		return
	}
	v := f.value
	t := v.Type()
	if t.Kind() == reflect.Pointer && !t.Implements(textType) {
		if v.IsNil() {
			v.Set(reflect.New(t.Elem()))
		}
		f.value = v.Elem()
		l.set(f, doc)
		return
	}
	switch {
	case isGroup(t):
		l.group(fieldsOf(v, f.path, f.env), doc, f.path)
	case t.Kind() == reflect.Slice && !reflect.PointerTo(t).Implements(textType):
		items, ok := doc.([]any)
		if !ok {
			l.fault(l.place(f.path), "must be a list, it is %s", f.show(doc))
			return
		}
		list := reflect.MakeSlice(t, len(items), len(items))
		for i, item := range items {
			path := fmt.Sprintf("%s[%d]", f.path, i)
			l.set(field{key: f.key, path: path, secret: f.secret, value: list.Index(i)}, item)
		}
		v.Set(list)
	case t.Kind() == reflect.Map:
		object, ok := doc.(map[string]any)
		if !ok {
			l.fault(l.place(f.path), "must be an object of strings, it is %s", f.show(doc))
			return
		}
		m := reflect.MakeMap(t)
		for key, value := range object {
			s, ok := value.(string)
			if !ok {
				l.fault(l.place(join(f.path, key)), "must be a string, it is %s", f.show(value))
				continue
			}
			m.SetMapIndex(reflect.ValueOf(key).Convert(t.Key()), reflect.ValueOf(s).Convert(t.Elem()))
		}
		v.Set(m)
	default:
		text, ok := scalar(t, doc)
		if !ok {
			l.fault(l.place(f.path), "must be %s, it is %s", form(t), f.show(doc))
			return
		}
		if err := parse(v, text); err != nil {
			l.fault(l.place(f.path), "must be %s, it is %s", form(t), f.show(doc))
		}
	}
}

// scalar returns a value of the file as text, if its YAML type fits the
// field's.
func scalar(t reflect.Type, doc any) (string, bool) {
	isText := t == durationType || t.Kind() == reflect.String || reflect.PointerTo(t).Implements(textType)
	switch x := doc.(type) {
	case string:
		return x, isText
	case bool:
		return fmt.Sprint(x), t.Kind() == reflect.Bool
	case json.Number:
		return x.String(), !isText && t.Kind() != reflect.Bool
	default:
		return "", false
	}
}

// show shows what was read, unless it is a secret.
func (f field) show(doc any) string {
	if f.secret {
		return "something else (hidden)"
	}
	return show(doc)
}

func show(doc any) string {
	text, err := json.Marshal(doc)
	if err != nil {
		return fmt.Sprintf("a %T", doc)
	}
	if len(text) > 60 {
		return string(text[:60]) + "…"
	}
	return string(text)
}
