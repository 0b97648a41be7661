package policy

import (
	"encoding/json"
	"reflect"
	"strings"
)

// Merge lays src over dst, field by field, as a JSON merge patch would: what
// src leaves out stays, lists are replaced. A list whose field's name starts
// with "Append" grows instead. Neither shares what could be changed.
func Merge[C any](dst, src *C) {
	merge(reflect.ValueOf(dst).Elem(), reflect.ValueOf(src).Elem(), "")
}

func merge(dst, src reflect.Value, field string) {
	switch src.Kind() {
	case reflect.Struct:
		// A struct with a JSON form of its own, such as a duration, is one value.
		if isValue(src.Type()) {
			if !src.IsZero() {
				dst.Set(src)
			}
			return
		}
		t := src.Type()
		for i := range src.NumField() {
			if t.Field(i).IsExported() {
				merge(dst.Field(i), src.Field(i), t.Field(i).Name)
			}
		}
	case reflect.Pointer:
		if src.IsNil() {
			return
		}
		if src.Elem().Kind() != reflect.Struct || isValue(src.Type()) {
			dst.Set(src)
			return
		}
		both := reflect.New(src.Type().Elem())
		if !dst.IsNil() {
			merge(both.Elem(), dst.Elem(), "")
		}
		merge(both.Elem(), src.Elem(), "")
		dst.Set(both)
	case reflect.Slice:
		switch {
		case src.IsNil():
		case strings.HasPrefix(field, "Append"):
			grown := reflect.MakeSlice(src.Type(), 0, dst.Len()+src.Len())
			dst.Set(reflect.AppendSlice(reflect.AppendSlice(grown, dst), src))
		default:
			dst.Set(src)
		}
	case reflect.Map:
		if src.IsNil() {
			return
		}
		both := reflect.MakeMap(src.Type())
		for _, m := range []reflect.Value{dst, src} {
			for it := m.MapRange(); it.Next(); {
				both.SetMapIndex(it.Key(), it.Value())
			}
		}
		dst.Set(both)
	default:
		if !src.IsZero() {
			dst.Set(src)
		}
	}
}

// isValue reports whether a type has a JSON form of its own, as durations have:
// such a value is taken whole.
func isValue(t reflect.Type) bool { return t.Implements(reflect.TypeFor[json.Marshaler]()) }
