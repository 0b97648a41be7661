package resource

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"kuma/internal/errs"
	"kuma/internal/names"
)

// MaxSize is the largest JSON document that Decode reads, in bytes.
const MaxSize = 4 << 20

// Header is what a document says of itself before its kind is known.
type Header struct {
	Type   string            `json:"type"`
	Mesh   string            `json:"mesh"`
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
}

// Peek reads a document's header. A mistake in another field than "type" is
// left for Decode to tell, which names its place.
func Peek(doc []byte) (Header, error) {
	var h Header
	if len(doc) > MaxSize {
		return h, errs.New(errs.Invalid, "invalid resource: it has %d bytes, the limit is %d", len(doc), MaxSize)
	}
	err := json.Unmarshal(doc, &h)
	if _, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && h.Type != "" {
		err = nil
	}
	if err != nil {
		return h, errs.New(errs.Invalid, "invalid resource: %q", err.Error())
	}
	return h, nil
}

// serverFields are those which the server puts into its answers. They may come
// back with an edited document and are then ignored.
var serverFields = []string{"creationTime", "modificationTime", "kri", "snis", "status"}

// Malformed is the cause of an error of Decode where a value is not of the sort
// that its field has, rather than a field that does not exist.
type Malformed struct {
	// Kind is the resource's kind, Reason what is wrong with the first value.
	Kind, Reason string
}

// Error says it in the contract's words.
func (m *Malformed) Error() string { return fmt.Sprintf("invalid %s object: %q", m.Kind, m.Reason) }

// DecodeInto reads one JSON value, which is no resource, into what into points
// to. Unknown fields are errors unless lenient. Failures are errs.Invalid, as
// those of Decode.
func DecodeInto(into any, doc []byte, lenient bool) error {
	if len(doc) > MaxSize {
		return errs.New(errs.Invalid, "it has %d bytes, the limit is %d", len(doc), MaxSize)
	}
	var raw json.RawMessage
	if err := json.Unmarshal(doc, &raw); err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	w := walker{lenient: lenient}
	if err := w.decode(into, doc, ""); err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	return errs.Fields(w.bad...)
}

// Decode reads one resource of the kind from JSON. A field that does not exist
// is an error that names the nearest one that does; lenient drops it instead,
// as the original does. Specifications are given their defaults but not
// checked. Failures are errs.Invalid: with fields where a place can be named,
// without where the document can't be read at all.
func Decode(k *Kind, doc []byte, lenient bool) (*Resource, error) {
	top, err := object(k, doc)
	if err != nil {
		return nil, err
	}
	r := &Resource{Kind: k, Spec: k.New()}
	w := walker{lenient: lenient}
	var kindName string
	for _, f := range []struct {
		name string
		into any
	}{{"type", &kindName}, {"mesh", &r.Mesh}, {"name", &r.Name}, {"labels", &r.Labels}} {
		raw, ok := top[f.name]
		if !ok {
			continue
		}
		delete(top, f.name)
		if err := w.decode(f.into, raw, f.name); err != nil {
			return nil, errs.New(errs.Invalid, "invalid %s object: %q", k.Name, err.Error())
		}
	}
	if kindName != "" && kindName != k.Name {
		w.bad = append(w.bad, errs.Field{Path: "type", Message: fmt.Sprintf("is %q, but a %s is expected here", short(kindName), k.Name)})
	}
	for _, f := range serverFields {
		delete(top, f)
	}
	spec, path := []byte(top["spec"]), "spec"
	if k.Shape == Spec {
		delete(top, "spec")
		if !lenient {
			for _, f := range slices.Sorted(maps.Keys(top)) {
				w.unknown("", f, []string{"type", "mesh", "name", "labels", "spec"})
			}
		}
	} else {
		if spec, err = json.Marshal(top); err != nil {
			return nil, errs.New(errs.Internal, "split %s: %w", k.Name, err)
		}
		path = ""
	}
	if len(spec) > 0 && !bytes.Equal(spec, []byte("null")) {
		if err := w.decode(r.Spec, spec, path); err != nil {
			return nil, errs.New(errs.Invalid, "invalid %s object: %q", k.Name, err.Error())
		}
	}
	switch {
	case w.malformed != "":
		return nil, &errs.Error{Kind: errs.Invalid, Fields: w.bad, Cause: &Malformed{k.Name, w.malformed}}
	case len(w.bad) > 0:
		return nil, errs.Fields(w.bad...)
	}
	if d, ok := r.Spec.(Defaulter); ok {
		d.Default()
	}
	return r, nil
}

// object splits a document into its top-level fields.
func object(k *Kind, doc []byte) (map[string]json.RawMessage, error) {
	if len(doc) > MaxSize {
		return nil, errs.New(errs.Invalid, "invalid %s object: it has %d bytes, the limit is %d", k.Name, len(doc), MaxSize)
	}
	var top map[string]json.RawMessage
	d := json.NewDecoder(bytes.NewReader(doc))
	err := d.Decode(&top)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is something after the object's end")
		} else if top == nil {
			err = errors.New("it is null")
		}
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errors.New("unexpected end of JSON input")
	}
	if err != nil {
		return nil, errs.New(errs.Invalid, "invalid %s object: %q", k.Name, err.Error())
	}
	return top, nil
}

// decode reads JSON into what into points to, unless fields of it are at
// fault. What is checked is what is read: of a field that is there twice, the
// last counts; one that lenient drops is gone.
func (w *walker) decode(into any, doc []byte, path string) error {
	var tree any
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	if err := d.Decode(&tree); err != nil {
		return err
	}
	before := len(w.bad)
	w.walk(path, tree, reflect.TypeOf(into).Elem(), 0)
	if len(w.bad) > before || len(w.bad) >= maxBad {
		return nil
	}
	clean, err := Marshal(tree)
	if err != nil {
		return err
	}
	return json.Unmarshal(clean, into)
}

const (
	// maxDepth bounds how deep a document may nest.
	maxDepth = 100
	// maxBad is how many fields at fault are told at once.
	maxBad = 50
)

// walker compares a JSON tree with a Go type. encoding/json would stop at the
// first mistake, could not name a place in a list, would take a field written in
// the wrong case, and would merge one that is there twice. What lenient drops is
// taken out of the tree.
type walker struct {
	lenient bool
	bad     []errs.Field
	// malformed is what is wrong with the first value, if that is not only a
	// field that does not exist.
	malformed string
}

func (w *walker) add(path, message string) {
	if w.malformed == "" {
		w.malformed = message
	}
	if len(w.bad) < maxBad {
		w.bad = append(w.bad, errs.Field{Path: path, Message: message})
	}
}

// unknown adds a field that does not exist in the object at path.
func (w *walker) unknown(path, name string, known []string) {
	if len(w.bad) < maxBad {
		w.bad = append(w.bad, unknown(path, name, known))
	}
}

var (
	unmarshalerType = reflect.TypeFor[json.Unmarshaler]()
	enumType        = reflect.TypeFor[Enum]()
	timeType        = reflect.TypeFor[time.Time]()
)

func (w *walker) walk(path string, v any, t reflect.Type, depth int) {
	if v == nil {
		return
	}
	if depth > maxDepth {
		w.add(path, "is nested too deeply")
		return
	}
	if t.Kind() == reflect.Pointer {
		w.walk(path, v, t.Elem(), depth)
		return
	}
	if t == timeType || reflect.PointerTo(t).Implements(unmarshalerType) {
		raw, err := json.Marshal(v)
		if err == nil {
			err = json.Unmarshal(raw, reflect.New(t).Interface())
		}
		switch {
		case err != nil && t == timeType:
			w.add(path, `must be a time such as "2026-01-02T15:04:05Z", not `+gotValue(v))
		case err != nil:
			w.add(path, err.Error())
		}
		return
	}
	mismatch := func() { w.add(path, wanted(t)+", not "+gotValue(v)) }
	switch t.Kind() {
	case reflect.Struct:
		m, ok := v.(map[string]any)
		if !ok {
			mismatch()
			return
		}
		fields := fieldsOf(t)
		for _, name := range slices.Sorted(maps.Keys(m)) {
			f, ok := fields[name]
			switch {
			case ok:
				w.walk(join(path, name), m[name], f, depth+1)
			case w.lenient:
				delete(m, name)
			default:
				w.unknown(path, name, slices.Sorted(maps.Keys(fields)))
			}
		}
	case reflect.Map:
		m, ok := v.(map[string]any)
		if !ok {
			mismatch()
			return
		}
		for _, name := range slices.Sorted(maps.Keys(m)) {
			at := fmt.Sprintf("%s[%q]", path, short(name))
			if m[name] == nil && t.Elem().Kind() != reflect.Interface {
				w.add(at, "must not be null")
				continue
			}
			w.walk(at, m[name], t.Elem(), depth+1)
		}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			s, ok := v.(string)
			if !ok {
				w.add(path, "must be a base64 string, not "+gotValue(v))
				return
			}
			raw, _ := json.Marshal(s)
			var b []byte
			if err := json.Unmarshal(raw, &b); err != nil {
				w.add(path, err.Error())
			}
			return
		}
		list, ok := v.([]any)
		if !ok {
			mismatch()
			return
		}
		for i, item := range list {
			if item == nil && t.Elem().Kind() != reflect.Interface {
				w.add(fmt.Sprintf("%s[%d]", path, i), "must not be null")
				continue
			}
			w.walk(fmt.Sprintf("%s[%d]", path, i), item, t.Elem(), depth+1)
		}
	case reflect.String:
		s, ok := v.(string)
		if !ok {
			mismatch()
			return
		}
		if t.Implements(enumType) {
			values := reflect.Zero(t).Interface().(Enum).Values()
			if !slices.Contains(values, s) {
				w.add(path, fmt.Sprintf("value '%s' is not supported, it must be one of: %s", short(s), strings.Join(values, ", ")))
			}
		}
	case reflect.Interface:
	default:
		raw, err := json.Marshal(v)
		if err == nil {
			err = json.Unmarshal(raw, reflect.New(t).Interface())
		}
		if err != nil {
			mismatch()
		}
	}
}

// fieldsOf maps the JSON names of a struct's fields, embedded ones included,
// to their types.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	out := map[string]reflect.Type{}
	for _, f := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !f.IsExported() || name == "-" || f.Anonymous && name == "" {
			continue
		}
		if name == "" {
			name = f.Name
		}
		out[name] = f.Type
	}
	return out
}

// unknown is the fault of a field that does not exist in the object at path.
func unknown(path, name string, known []string) errs.Field {
	m := "unknown field"
	if n := names.Nearest(name, known); n != "" {
		m += fmt.Sprintf("; did you mean %q?", n)
	} else if len(known) > 0 && len(known) <= 12 {
		m += "; known here: " + strings.Join(known, ", ")
	}
	return errs.Field{Path: join(path, short(name)), Message: m}
}

// short cuts what a user wrote, for a message.
func short(s string) string {
	const limit = 100
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "must be an object"
	case reflect.Slice:
		return "must be a list"
	case reflect.String:
		return "must be a string"
	case reflect.Bool:
		return "must be true or false"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprintf("must be a whole number from 0 to %d", ^uint64(0)>>(64-t.Bits()))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		limit := int64(^uint64(0) >> (65 - t.Bits()))
		return fmt.Sprintf("must be a whole number from %d to %d", -limit-1, limit)
	default:
		return "must be a number"
	}
}

func gotValue(v any) string {
	switch v := v.(type) {
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	case string:
		return fmt.Sprintf("%q", short(v))
	default:
		return short(fmt.Sprint(v))
	}
}

// Encode writes a resource as the API shows it: type, mesh, name, times,
// labels, kri, then the specification and the status in the kind's shape.
func Encode(r *Resource) ([]byte, error) {
	var b bytes.Buffer
	w := writer{b: &b}
	w.field("type", r.Kind.Name)
	if r.Kind.Scope == Mesh {
		w.field("mesh", r.Mesh)
	}
	w.field("name", r.Name)
	w.field("creationTime", r.Created.UTC())
	w.field("modificationTime", r.Modified.UTC())
	if len(r.Labels) > 0 {
		w.field("labels", r.Labels)
	}
	if r.Kind.Short != "" {
		w.field("kri", r.KRI().String())
	}
	if r.Kind.Shape == Spec {
		w.field("spec", r.Spec)
		if r.Status != nil {
			w.field("status", r.Status)
		}
	} else {
		w.inline(r.Spec)
	}
	b.WriteByte('}')
	if w.err != nil {
		return nil, fmt.Errorf("encode %s: %w", r.Key(), w.err)
	}
	return b.Bytes(), nil
}

// Marshal is json.Marshal without the escaping of HTML, which the contract
// does not have.
func Marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

type writer struct {
	b   *bytes.Buffer
	err error
}

func (w *writer) sep() {
	if w.b.Len() == 0 {
		w.b.WriteByte('{')
		return
	}
	w.b.WriteByte(',')
}

func (w *writer) field(name string, v any) {
	raw, err := Marshal(v)
	if err != nil {
		w.err = err
		return
	}
	w.sep()
	fmt.Fprintf(w.b, "%q:", name)
	w.b.Write(raw)
}

// inline writes an object's fields beside those that are there already.
func (w *writer) inline(v any) {
	raw, err := Marshal(v)
	if err != nil {
		w.err = err
		return
	}
	if inner := bytes.TrimSuffix(bytes.TrimPrefix(raw, []byte("{")), []byte("}")); len(inner) > 0 {
		w.sep()
		w.b.Write(inner)
	}
}

// stored is a resource as stores keep it. Spec is a pointer to the kind's
// specification, so that it is decoded in one go with the rest.
type stored struct {
	Mesh     string            `json:"mesh,omitempty"`
	Name     string            `json:"name"`
	Labels   map[string]string `json:"labels,omitempty"`
	Created  time.Time         `json:"created"`
	Modified time.Time         `json:"modified"`
	Version  uint64            `json:"version"`
	Spec     any               `json:"spec"`
	Status   json.RawMessage   `json:"status,omitempty"`
}

// Freeze returns the bytes that a store keeps for a resource.
func Freeze(r *Resource) ([]byte, error) {
	s := stored{r.Mesh, r.Name, r.Labels, r.Created, r.Modified, r.Version, r.Spec, nil}
	var err error
	if r.Status != nil {
		if s.Status, err = Marshal(r.Status); err != nil {
			return nil, fmt.Errorf("encode status of %s: %w", r.Key(), err)
		}
	}
	b, err := Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", r.Key(), err)
	}
	return b, nil
}

// Thaw reads what Freeze wrote. Fields that this version does not know are
// dropped: a newer version may have written them, and one that goes back must
// still start.
func Thaw(k *Kind, b []byte) (*Resource, error) {
	r := &Resource{Kind: k, Spec: k.New()}
	s := stored{Spec: r.Spec}
	err := json.Unmarshal(b, &s)
	r.Meta = Meta{s.Mesh, s.Name, s.Labels, s.Version, s.Created, s.Modified}
	if err != nil {
		return nil, fmt.Errorf("decode stored %s: %w", r.Key(), err)
	}
	if len(s.Status) > 0 && k.NewStatus != nil {
		r.Status = k.NewStatus()
		if err := json.Unmarshal(s.Status, r.Status); err != nil {
			return nil, fmt.Errorf("decode stored status of %s: %w", r.Key(), err)
		}
	}
	return r, nil
}
