package rest

import (
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// patchStep is an operation of a JSON Patch (RFC 6902).
type patchStep struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch returns the steps that turn one JSON tree into another. Lists are
// compared place by place.
func patch(at string, from, to any) []patchStep {
	if reflect.DeepEqual(from, to) {
		return nil
	}
	a, aMap := from.(map[string]any)
	b, bMap := to.(map[string]any)
	if aMap && bMap {
		var out []patchStep
		keys := maps.Clone(a)
		maps.Copy(keys, b)
		for _, k := range slices.Sorted(maps.Keys(keys)) {
			where := at + "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(k)
			was, had := a[k]
			is, has := b[k]
			switch {
			case !had:
				out = append(out, patchStep{"add", where, is})
			case !has:
				out = append(out, patchStep{"remove", where, nil})
			default:
				out = append(out, patch(where, was, is)...)
			}
		}
		return out
	}
	x, xList := from.([]any)
	y, yList := to.([]any)
	if xList && yList {
		var out []patchStep
		for i := range min(len(x), len(y)) {
			out = append(out, patch(at+"/"+strconv.Itoa(i), x[i], y[i])...)
		}
		for i := len(x) - 1; i >= len(y); i-- {
			out = append(out, patchStep{"remove", at + "/" + strconv.Itoa(i), nil})
		}
		for i := len(x); i < len(y); i++ {
			out = append(out, patchStep{"add", at + "/-", y[i]})
		}
		return out
	}
	return []patchStep{{"replace", at, to}}
}
