package conf

import (
	"encoding"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// environment sets fields from variables and warns about those that nobody
// knows.
func (l *loader) environment() {
	env := map[string]string{}
	for _, entry := range l.o.Env {
		if name, value, ok := strings.Cut(entry, "="); ok && strings.HasPrefix(name, l.o.Prefix+"_") {
			env[name] = value
		}
	}
	var known []string
	walk(l.root, func(f field) {
		if f.env == "" || !settable(f.value.Type()) {
			return
		}
		known = append(known, f.env)
		value, ok := env[f.env]
		if !ok {
			return
		}
		delete(env, f.env)
		if isService(f.env, value) && f.value.Kind() != reflect.String {
			l.warn("environment variable %s is %s, which Kubernetes sets for a Service of that name; it is ignored. Rename the Service, or set enableServiceLinks: false on the Pod", f.env, value)
			return
		}
		l.setText(f, value)
	})
	names := make([]string, 0, len(env))
	for name := range env {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if slices.Contains(l.o.Known, name) || isService(name, env[name]) {
			continue
		}
		if why, ok := l.ignoredEnv(name); ok {
			l.warn("environment variable %s has no meaning here: %s", name, why)
			continue
		}
		hint := ""
		if near := nearest(name, known); near != "" {
			hint = "; the nearest known one is " + near
		}
		l.warn("environment variable %s is not known%s", name, hint)
	}
}

// setText puts a variable's text into a field. The empty text clears texts,
// lists and maps, and leaves everything else as it is.
func (l *loader) setText(f field, text string) {
	v, t := f.value, f.value.Type()
	shown := strconv.Quote(text)
	if f.secret {
		shown = "something else (hidden)"
	}
	switch {
	case reflect.PointerTo(t).Implements(textType):
	case t.Kind() == reflect.Slice:
		items := splitList(text)
		list := reflect.MakeSlice(t, len(items), len(items))
		for i, item := range items {
			if err := parse(list.Index(i), item); err != nil {
				l.fault(f.env, "must be a comma-separated list of items, each %s, it is %s", form(t.Elem()), shown)
				return
			}
		}
		v.Set(list)
		return
	case t.Kind() == reflect.Map:
		m := reflect.MakeMap(t)
		for _, item := range splitList(text) {
			key, value, ok := strings.Cut(item, ":")
			if !ok {
				l.fault(f.env, "must be a list key:value,key:value, it is %s", shown)
				return
			}
			m.SetMapIndex(reflect.ValueOf(strings.TrimSpace(key)).Convert(t.Key()), reflect.ValueOf(strings.TrimSpace(value)).Convert(t.Elem()))
		}
		v.Set(m)
		return
	case t.Kind() == reflect.Pointer:
		if text == "" && t.Elem().Kind() != reflect.String {
			return
		}
		p := reflect.New(t.Elem())
		f.value = p.Elem()
		l.setText(f, text)
		v.Set(p)
		return
	case text == "" && t.Kind() != reflect.String:
		return
	}
	if err := parse(v, text); err != nil {
		l.fault(f.env, "must be %s, it is %s", form(t), shown)
	}
}

func splitList(text string) []string {
	var out []string
	for item := range strings.SplitSeq(text, ",") {
		if item = strings.TrimSpace(item); item != "" {
			out = append(out, item)
		}
	}
	return out
}

// settable reports whether a variable can set a field of the type.
func settable(t reflect.Type) bool {
	if reflect.PointerTo(t).Implements(textType) {
		return true
	}
	switch t.Kind() {
	case reflect.Slice, reflect.Pointer:
		return settable(t.Elem()) && t.Elem().Kind() != reflect.Slice
	case reflect.Struct, reflect.Interface:
		return false
	default:
		return true
	}
}

// parse puts text into a scalar.
func parse(v reflect.Value, text string) error {
	if v.CanAddr() {
		if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
			return u.UnmarshalText([]byte(text))
		}
	}
	t := v.Type()
	if t == durationType {
		d, err := time.ParseDuration(text)
		v.SetInt(int64(d))
		return err
	}
	switch t.Kind() {
	case reflect.String:
		v.SetString(text)
		return nil
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		v.SetBool(b)
		return err
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		n, err := strconv.ParseInt(text, 10, t.Bits())
		v.SetInt(n)
		return err
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, err := strconv.ParseUint(text, 10, t.Bits())
		v.SetUint(n)
		return err
	case reflect.Float32, reflect.Float64:
		n, err := strconv.ParseFloat(text, t.Bits())
		v.SetFloat(n)
		return err
	default:
		return fmt.Errorf("a field of type %s can't be set", t)
	}
}

// form says in words what a field takes.
func form(t reflect.Type) string {
	switch {
	case t == durationType:
		return "a duration such as 10s, 5m or 1h30m"
	case reflect.PointerTo(t).Implements(textType):
		return "a text that reads as " + strings.ToLower(t.Name())
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		if t.Bits() == 64 {
			return "a whole number"
		}
		return fmt.Sprintf("a whole number from %d to %d", -(int64(1) << (t.Bits() - 1)), int64(1)<<(t.Bits()-1)-1)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if t.Bits() == 64 {
			return "a whole number from 0"
		}
		return fmt.Sprintf("a whole number from 0 to %d", uint64(1)<<t.Bits()-1)
	case reflect.Float32, reflect.Float64:
		return "a number"
	default:
		return "a " + t.String()
	}
}

var (
	serviceName = regexp.MustCompile(`_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)
	serviceLink = regexp.MustCompile(`^(tcp|udp|sctp)://`)
)

// isService reports whether Kubernetes puts such a variable into every Pod
// for each Service of the namespace.
func isService(name, value string) bool {
	return serviceName.MatchString(name) || strings.HasSuffix(name, "_PORT") && serviceLink.MatchString(value)
}

// ignoredPath returns why a key of the file has no meaning.
func (l *loader) ignoredPath(path string) (string, bool) {
	for p := path; p != ""; {
		if why, ok := l.o.Ignored[p]; ok {
			return why, true
		}
		p = p[:max(strings.LastIndexByte(p, '.'), 0)]
	}
	return "", false
}

// ignoredEnv returns why a variable has no meaning.
func (l *loader) ignoredEnv(name string) (string, bool) {
	best, why := -1, ""
	for key, reason := range l.o.Ignored {
		match, start := key, strings.HasSuffix(key, "*")
		switch {
		case start:
			match = strings.TrimSuffix(key, "*")
		case !strings.HasPrefix(key, l.o.Prefix+"_"):
			parts := strings.Split(key, ".")
			for i := range parts {
				parts[i] = snake(parts[i])
			}
			match = l.o.Prefix + "_" + strings.Join(parts, "_")
			start = strings.HasPrefix(name, match+"_")
		}
		if (name == match || start && strings.HasPrefix(name, match)) && len(match) > best {
			best, why = len(match), reason
		}
	}
	return why, best >= 0
}

// nearest returns the candidate that differs least from the name, if the
// difference looks like a slip: at most a third of its letters.
func nearest(name string, candidates []string) string {
	best, found := max(len(name)/3, 1)+1, ""
	for _, c := range candidates {
		if d := distance(strings.ToLower(name), strings.ToLower(c)); d < best {
			best, found = d, c
		}
	}
	return found
}

// distance counts the letters to insert, remove or replace (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
