package conf

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"time"

	"kuma/internal/errs"
)

// Setting is one leaf of a configuration struct.
type Setting struct {
	// Key is its place in the file, such as "apiServer.http.port".
	Key string
	// Env is its variable, or empty if it has none.
	Env string
	// Type is what it takes, in words.
	Type string
	// Default is its value as JSON; secrets are hidden.
	Default string
}

// Describe lists the settings of a configuration struct, in the order of its
// fields, with the values that it holds. The prefix of variables is
// DefaultPrefix.
func Describe(v any) []Setting {
	var out []Setting
	walk(fieldsOf(structOf(v), "", DefaultPrefix), func(f field) {
		s := Setting{Key: f.path, Env: f.env, Type: kind(f.value.Type())}
		if !settable(f.value.Type()) {
			s.Env = ""
		}
		text, err := json.Marshal(plain(f))
		if err != nil {
			text = []byte("null")
		}
		s.Default = string(text)
		out = append(out, s)
	})
	return out
}

// Redacted returns a configuration struct as JSON with every secret shown as
// five stars; an empty secret stays empty.
func Redacted(v any) ([]byte, error) {
	text, err := json.Marshal(plainGroup(structOf(v)))
	if err != nil {
		return nil, errs.New(errs.Internal, "show the configuration: %w", err)
	}
	return text, nil
}

// structOf returns a copy that can be addressed, so that nothing depends on
// whether the caller has a pointer.
func structOf(v any) reflect.Value {
	r := reflect.ValueOf(v)
	for r.Kind() == reflect.Pointer {
		r = r.Elem()
	}
	c := reflect.New(r.Type()).Elem()
	c.Set(r)
	return c
}

func plainGroup(v reflect.Value) map[string]any {
	out := map[string]any{}
	for _, f := range fieldsOf(v, "", "") {
		out[f.key] = plain(f)
	}
	return out
}

// plain returns a field as what JSON can be made from.
func plain(f field) any {
	v := f.value
	t := v.Type()
	switch {
	case f.secret && v.IsZero():
		return ""
	case f.secret:
		return hidden
	case t == durationType:
		return time.Duration(v.Int()).String()
	case isGroup(t):
		return plainGroup(v)
	}
	if m, ok := v.Interface().(encoding.TextMarshaler); ok && (v.Kind() != reflect.Pointer || !v.IsNil()) {
		if text, err := m.MarshalText(); err == nil {
			return string(text)
		}
	}
	switch t.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return plain(field{value: v.Elem()})
	case reflect.Slice:
		out := make([]any, v.Len())
		for i := range out {
			out[i] = plain(field{value: v.Index(i), secret: v.Index(i).Type() == reflect.TypeFor[Secret]()})
		}
		return out
	case reflect.Map:
		out := map[string]any{}
		for key, value := range v.Seq2() {
			out[fmt.Sprint(key.Interface())] = plain(field{value: value})
		}
		return out
	default:
		return v.Interface()
	}
}

// kind names a type as the reference shows it.
func kind(t reflect.Type) string {
	switch {
	case t == durationType:
		return "duration"
	case t == reflect.TypeFor[Secret]():
		return "secret"
	case reflect.PointerTo(t).Implements(textType):
		return "string"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return kind(t.Elem())
	case reflect.Slice:
		return "list of " + kind(t.Elem())
	case reflect.Map:
		return "map"
	case reflect.Struct:
		return "object"
	case reflect.Bool:
		return "boolean"
	case reflect.String:
		return "string"
	default:
		return "number"
	}
}
