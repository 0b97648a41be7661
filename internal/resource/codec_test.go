package resource_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// Size is an enumeration to test with.
type Size string

func (Size) Values() []string { return []string{"Small", "Large"} }

// Common is embedded, so its fields stand beside the others.
type Common struct {
	Comment string `json:"comment,omitempty"`
}

type part struct {
	Name string `json:"name,omitempty"`
	Size Size   `json:"size,omitempty"`
	Next *part  `json:"next,omitempty"`
}

type boxSpec struct {
	Common
	Size     Size                   `json:"size,omitempty"`
	Count    uint8                  `json:"count,omitempty"`
	Delta    int32                  `json:"delta,omitempty"`
	Weight   float64                `json:"weight,omitempty"`
	Open     *bool                  `json:"open,omitempty"`
	Timeout  *resource.Duration     `json:"timeout,omitempty"`
	Interval resource.ProtoDuration `json:"interval,omitempty"`
	Total    resource.Uint64        `json:"total,omitempty"`
	Data     []byte                 `json:"data,omitempty"`
	Since    *time.Time             `json:"since,omitempty"`
	Tags     map[string]string      `json:"tags,omitempty"`
	Main     *part                  `json:"main,omitempty"`
	Parts    []part                 `json:"parts,omitempty"`
	ByName   map[string]*part       `json:"byName,omitempty"`
	Conf     map[string]any         `json:"conf,omitempty"`
	Shelf    string                 `json:"shelf,omitempty"`
	hidden   string
}

func (s *boxSpec) Default() {
	if s.Shelf == "" {
		s.Shelf = "top" + s.hidden
	}
}

type boxStatus struct {
	Moved int `json:"moved"`
}

func boxes() (spec, flat resource.Type[boxSpec]) {
	return resource.Define[boxSpec](resource.Kind{
			Name: "Box", Plural: "boxes", Short: "box", Scope: resource.Mesh, Shape: resource.Spec, NewStatus: func() any { return new(boxStatus) },
		}, nil),
		resource.Define[boxSpec](resource.Kind{Name: "FlatBox", Plural: "flatboxes"}, nil)
}

// TestDecode has HRD-06 among its cases: what is checked is what is read, in
// documents that say a thing twice or in other capitals.
func TestDecode(t *testing.T) {
	spec, flat := boxes()
	minute := resource.Duration{Duration: time.Minute}
	yes := true
	full := `"size": "Large", "count": 255, "delta": -5, "weight": 1.5, "open": true, "timeout": "1m", "interval": "0.5s", "total": "7",
		"data": "aGk=", "tags": {"a": "b"}, "main": {"name": "x", "next": {"size": "Small"}}, "parts": [{"name": "p"}],
		"byName": {"q": {}}, "conf": {"a": {"b": [1, null]}, "n": null}, "comment": "c", "shelf": "low"`
	want := &boxSpec{
		Common: Common{"c"}, Size: "Large", Count: 255, Delta: -5, Weight: 1.5, Open: &yes, Timeout: &minute, Interval: resource.ProtoDuration{Duration: 500 * time.Millisecond}, Total: 7,
		Data: []byte("hi"), Tags: map[string]string{"a": "b"}, Main: &part{Name: "x", Next: &part{Size: "Small"}}, Parts: []part{{Name: "p"}},
		ByName: map[string]*part{"q": {}}, Conf: map[string]any{"a": map[string]any{"b": []any{1.0, nil}}, "n": nil}, Shelf: "low",
	}
	for _, c := range []struct {
		name    string
		kind    *resource.Kind
		lenient bool
		doc     string
		want    resource.Meta
		spec    *boxSpec
	}{
		{"spec", spec.Kind, false, `{"type": "Box", "mesh": "m", "name": "a", "labels": {"l": "v"}, "spec": {` + full + `}}`, resource.Meta{Mesh: "m", Name: "a", Labels: map[string]string{"l": "v"}}, want},
		{"flat", flat.Kind, false, `{"type": "FlatBox", "mesh": "m", "name": "", ` + full + `}`, resource.Meta{Mesh: "m"}, want},
		{"what the server says is ignored", spec.Kind, false, `{"name": "a", "creationTime": "x", "modificationTime": 1, "kri": {}, "snis": [], "status": {"moved": "x"}}`, resource.Meta{Name: "a"}, &boxSpec{Shelf: "top"}},
		{"no type", spec.Kind, false, `{"name": "a"}`, resource.Meta{Name: "a"}, &boxSpec{Shelf: "top"}},
		{"null is nothing", spec.Kind, false, `{"name": null, "labels": null, "spec": {"size": null, "timeout": null, "interval": null, "total": null, "count": null, "main": null, "parts": null}}`, resource.Meta{}, &boxSpec{Shelf: "top"}},
		{"null specification", spec.Kind, false, `{"spec": null}`, resource.Meta{}, &boxSpec{Shelf: "top"}},
		{"lenient", spec.Kind, true, `{"name": "a", "foo": 1, "spec": {"bar": {"x": [1]}, "parts": [{"baz": 1, "name": "p"}]}}`, resource.Meta{Name: "a"}, &boxSpec{Shelf: "top", Parts: []part{{Name: "p"}}}},
		{"lenient does not guess at capitals", spec.Kind, true, `{"spec": {"SIZE": "Huge", "main": {"Size": "Huge"}}}`, resource.Meta{}, &boxSpec{Shelf: "top", Main: &part{}}},
		{"of two fields the last counts, alone", spec.Kind, false, `{"spec": {"main": {"size": "Huge", "name": "x"}, "main": {"name": "y"}}}`, resource.Meta{}, &boxSpec{Shelf: "top", Main: &part{Name: "y"}}},
		{"so in flat kinds", flat.Kind, false, `{"main": {"size": "Huge"}, "main": {"name": "y", "next": {"size": "Huge"}, "next": {}}}`, resource.Meta{}, &boxSpec{Shelf: "top", Main: &part{Name: "y", Next: &part{}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := resource.Decode(c.kind, []byte(c.doc), c.lenient)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, r.Meta); diff != "" || r.Kind != c.kind {
				t.Error(diff)
			}
			if diff := cmp.Diff(c.spec, r.Spec, cmp.AllowUnexported(boxSpec{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDecodeFaults(t *testing.T) {
	spec, flat := boxes()
	long := strings.Repeat("é", 200)
	cut := strings.Repeat("é", 50) + "…"
	for _, c := range []struct {
		kind *resource.Kind
		doc  string
		want []string
	}{
		{spec.Kind, `{"spec": {"sise": "Large"}}`, []string{`spec.sise: unknown field; did you mean "size"?`}},
		{flat.Kind, `{"sise": "Large"}`, []string{`sise: unknown field; did you mean "size"?`}},
		{spec.Kind, `{"spec": {"Size": "Large"}}`, []string{`spec.Size: unknown field; did you mean "size"?`}},
		{spec.Kind, `{"spec": {"hidden": "x"}}`, []string{`spec.hidden: unknown field`}},
		{spec.Kind, `{"size": "Large"}`, []string{`size: unknown field; known here: type, mesh, name, labels, spec`}},
		{spec.Kind, `{"spec": {"main": {"next": {"nam": 1}}}}`, []string{`spec.main.next.nam: unknown field; did you mean "name"?`}},
		{spec.Kind, `{"spec": {"parts": [{}, {"zzzzzz": 1}]}}`, []string{`spec.parts[1].zzzzzz: unknown field; known here: name, next, size`}},
		{spec.Kind, `{"spec": {"byName": {"a.b": {"q": 1}}}}`, []string{`spec.byName["a.b"].q: unknown field; known here: name, next, size`}},
		{spec.Kind, `{"spec": {"size": "Huge"}}`, []string{`spec.size: value 'Huge' is not supported, it must be one of: Small, Large`}},
		{spec.Kind, `{"spec": {"size": 5}}`, []string{`spec.size: must be a string, not 5`}},
		{spec.Kind, `{"spec": {"count": 256}}`, []string{`spec.count: must be a whole number from 0 to 255, not 256`}},
		{spec.Kind, `{"spec": {"count": -1}}`, []string{`spec.count: must be a whole number from 0 to 255, not -1`}},
		{spec.Kind, `{"spec": {"delta": 2147483648}}`, []string{`spec.delta: must be a whole number from -2147483648 to 2147483647, not 2147483648`}},
		{spec.Kind, `{"spec": {"delta": 1.5}}`, []string{`spec.delta: must be a whole number from -2147483648 to 2147483647, not 1.5`}},
		{spec.Kind, `{"spec": {"weight": "heavy"}}`, []string{`spec.weight: must be a number, not "heavy"`}},
		{spec.Kind, `{"spec": {"open": "true"}}`, []string{`spec.open: must be true or false, not "true"`}},
		{spec.Kind, `{"spec": {"timeout": 5}}`, []string{`spec.timeout: must be a duration such as "10s" or "1h30m", in quotes`}},
		{spec.Kind, `{"spec": {"interval": "5"}}`, []string{`spec.interval: "5" is not a duration; write a number and a unit, such as "10s", "250ms" or "1h30m"`}},
		{spec.Kind, `{"spec": {"total": "-1"}}`, []string{`spec.total: "-1" is not a whole number from 0 to 18446744073709551615`}},
		{spec.Kind, `{"spec": {"data": "!"}}`, []string{`spec.data: illegal base64 data at input byte 0`}},
		{spec.Kind, `{"spec": {"data": [1]}}`, []string{`spec.data: must be a base64 string, not a list`}},
		{spec.Kind, `{"spec": {"since": "yesterday"}}`, []string{`spec.since: must be a time such as "2026-01-02T15:04:05Z", not "yesterday"`}},
		{spec.Kind, `{"spec": {"tags": ["a"]}}`, []string{`spec.tags: must be an object, not a list`}},
		{spec.Kind, `{"spec": {"tags": {"a": null, "b": 1}}}`, []string{`spec.tags["a"]: must not be null`, `spec.tags["b"]: must be a string, not 1`}},
		{spec.Kind, `{"spec": {"byName": {"a": null}}}`, []string{`spec.byName["a"]: must not be null`}},
		{spec.Kind, `{"spec": {"parts": {"name": "x"}}}`, []string{`spec.parts: must be a list, not an object`}},
		{spec.Kind, `{"spec": {"parts": [null]}}`, []string{`spec.parts[0]: must not be null`}},
		{spec.Kind, `{"spec": []}`, []string{`spec: must be an object, not a list`}},
		{spec.Kind, `{"spec": "x"}`, []string{`spec: must be an object, not "x"`}},
		{spec.Kind, `{"type": "Bix"}`, []string{`type: is "Bix", but a Box is expected here`}},
		{spec.Kind, `{"type": 1, "mesh": [], "name": {}, "labels": {"a": 1}}`, []string{`type: must be a string, not 1`, `mesh: must be a string, not a list`, `name: must be a string, not an object`, `labels["a"]: must be a string, not 1`}},
		{spec.Kind, `{"labels": "x"}`, []string{`labels: must be an object, not "x"`}},
		{spec.Kind, `{"spec": {"size": "` + long + `"}}`, []string{`spec.size: value '` + cut + `' is not supported, it must be one of: Small, Large`}},
		{spec.Kind, `{"spec": {"` + long + `": 1}}`, []string{`spec.` + cut + `: unknown field`}},
		{spec.Kind, `{"spec": {"count": 1` + strings.Repeat("0", 200) + `}}`, []string{`spec.count: must be a whole number from 0 to 255, not 1` + strings.Repeat("0", 99) + "…"}},
	} {
		r, err := resource.Decode(c.kind, []byte(c.doc), false)
		if r != nil || !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v, %v", c.doc, r, err)
			continue
		}
		var got []string
		for _, f := range errs.FieldsOf(err) {
			got = append(got, f.Path+": "+f.Message)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.doc, diff)
		}
	}
}

func TestDecodeUnreadable(t *testing.T) {
	spec, _ := boxes()
	for _, c := range []struct{ doc, want string }{
		{``, `invalid Box object: "unexpected end of JSON input"`},
		{`{`, `invalid Box object: "unexpected end of JSON input"`},
		{`null`, `invalid Box object: "it is null"`},
		{`[]`, `invalid Box object: "json: cannot unmarshal array into Go value of type map[string]json.RawMessage"`},
		{`{} {}`, `invalid Box object: "there is something after the object's end"`},
		{`{"name": x}`, `invalid Box object: "invalid character 'x' looking for beginning of value"`},
		{strings.Repeat(" ", resource.MaxSize+1), fmt.Sprintf(`invalid Box object: it has %d bytes, the limit is %d`, resource.MaxSize+1, resource.MaxSize)},
	} {
		_, err := resource.Decode(spec.Kind, []byte(c.doc), true)
		if !errs.Is(err, errs.Invalid) || err.Error() != c.want {
			t.Errorf("%.20q: %v, want %s", c.doc, err, c.want)
		}
	}
}

// TestDecodeLimits is HRD-25: documents that are made to cost much.
func TestDecodeLimits(t *testing.T) {
	spec, _ := boxes()
	deep := strings.Repeat(`{"next":`, 5000) + "{}" + strings.Repeat("}", 5000)
	_, err := resource.Decode(spec.Kind, []byte(`{"spec": {"main": `+deep+`}}`), false)
	if f := errs.FieldsOf(err); len(f) != 1 || f[0].Message != "is nested too deeply" {
		t.Errorf("deep: %.200v", err)
	}
	var many strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&many, `"%s%d": 1,`, strings.Repeat("x", 100), i)
	}
	for _, doc := range []string{`{` + many.String() + `"spec": {}}`, `{"spec": {` + many.String() + `"size": "Small"}}`} {
		_, err := resource.Decode(spec.Kind, []byte(doc), false)
		if n := len(errs.FieldsOf(err)); n != 50 || len(err.Error()) > 50*400 {
			t.Errorf("many: %d fields, %d bytes", n, len(err.Error()))
		}
	}
}

func TestPeek(t *testing.T) {
	h, err := resource.Peek([]byte(`{"type": "Box", "mesh": "m", "name": "n", "labels": {"a": "b"}, "spec": 1}`))
	if diff := cmp.Diff(resource.Header{Type: "Box", Mesh: "m", Name: "n", Labels: map[string]string{"a": "b"}}, h); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if h, err := resource.Peek([]byte(`{"labels": {"a": 1}, "name": 5, "type": "Box"}`)); err != nil || h.Type != "Box" {
		t.Errorf("mistakes that Decode tells: %v, %v", h, err)
	}
	for _, doc := range []string{``, `{`, `[]`, `"x"`, `{"type": 1}`} {
		if _, err := resource.Peek([]byte(doc)); !errs.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", doc, err)
		}
	}
}

func TestEncode(t *testing.T) {
	spec, flat := boxes()
	when := time.Date(2026, 1, 2, 3, 4, 5, 600, time.FixedZone("", 3600))
	a := spec.Make("m", "a", &boxSpec{Size: "Small", Shelf: "<&>"})
	a.Labels, a.Created, a.Modified, a.Status = map[string]string{resource.LabelZone: "z", resource.LabelDisplayName: "A"}, when, when, &boxStatus{Moved: 2}
	b := flat.Make("", "b", &boxSpec{Tags: map[string]string{"k": "v"}})
	empty := resource.Define[struct{}](resource.Kind{Name: "Empty"}, nil)
	for _, c := range []struct {
		r    *resource.Resource
		want string
	}{
		{a, `{"type":"Box","mesh":"m","name":"a","creationTime":"2026-01-02T02:04:05.0000006Z","modificationTime":"2026-01-02T02:04:05.0000006Z","labels":{"kuma.io/display-name":"A","kuma.io/zone":"z"},"kri":"kri_box_m_z__A_","spec":{"size":"Small","interval":"0s","shelf":"<&>"},"status":{"moved":2}}`},
		{b, `{"type":"FlatBox","name":"b","creationTime":"0001-01-01T00:00:00Z","modificationTime":"0001-01-01T00:00:00Z","interval":"0s","tags":{"k":"v"}}`},
		{empty.Make("", "e", &struct{}{}), `{"type":"Empty","name":"e","creationTime":"0001-01-01T00:00:00Z","modificationTime":"0001-01-01T00:00:00Z"}`},
	} {
		got, err := resource.Encode(c.r)
		if err != nil || string(got) != c.want {
			t.Errorf("%v\n got %s\nwant %s", err, got, c.want)
		}
		back, err := resource.Decode(c.r.Kind, got, false)
		if err != nil || back.Key() != c.r.Key() || !cmp.Equal(back.Labels, c.r.Labels) {
			t.Errorf("what the server says can't be sent back: %v", err)
		}
	}
}

func TestFreezeThaw(t *testing.T) {
	spec, flat := boxes()
	when := time.Now().UTC().Round(0)
	yes := true
	r := spec.Make("m", "a", &boxSpec{Size: "Small", Open: &yes, Data: []byte{0, 255}, Parts: []part{{Name: "<>"}}})
	r.Labels, r.Version, r.Created, r.Modified, r.Status = map[string]string{"l": "v"}, 1<<63+1, when.Add(-time.Hour), when, &boxStatus{Moved: 2}
	plain := flat.Make("", "b", &boxSpec{})
	for _, r := range []*resource.Resource{r, plain} {
		b, err := resource.Freeze(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := resource.Thaw(r.Kind, b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, got, cmp.AllowUnexported(boxSpec{}), cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Kind" }, cmp.Ignore())); diff != "" {
			t.Error(diff)
		}
	}
	for _, c := range []struct{ doc, want string }{
		// A newer version's fields, and its status for a kind without one here.
		{`{"name": "n", "new": 1, "version": 3, "spec": {"new": 1, "size": "New"}, "status": {}}`, ""},
		{`{"name": "n", "spec": null}`, ""},
		{`{"name": "n"}`, ""},
		{`{"name": "n", "spec": {"count": "x"}}`, `decode stored FlatBox "n"`},
		{`{"name": "n", "spec": []}`, `decode stored FlatBox "n"`},
		{`{"name": "n", "spec": {"interval": 5}}`, `decode stored FlatBox "n"`},
		{`{`, `decode stored FlatBox`},
	} {
		got, err := resource.Thaw(flat.Kind, []byte(c.doc))
		switch {
		case c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)):
			t.Errorf("%s: %v, want %s", c.doc, err, c.want)
		case c.want == "" && (err != nil || got.Name != "n" || got.Spec.(*boxSpec) == nil || got.Status != nil):
			t.Errorf("%s: %+v, %v", c.doc, got, err)
		}
	}
	if _, err := resource.Thaw(spec.Kind, []byte(`{"name": "n", "spec": {}, "status": {"moved": "x"}}`)); err == nil || !strings.Contains(err.Error(), `status of Box "n"`) {
		t.Errorf("bad status: %v", err)
	}
}

// FuzzDecode is HRD-09 and HRD-06: it feeds any bytes to both shapes, strict and lenient. What is
// accepted must come back the same from what the API shows and from what a
// store keeps, and what strict accepts, lenient reads alike.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"type": "Box", "mesh": "m", "name": "a", "labels": {"l": "v"}, "spec": {"size": "Large", "parts": [{"name": "p", "next": {}}], "conf": {"a": [1, null, "x"]}}}`,
		`{"type": "FlatBox", "name": "a", "count": 1, "interval": "0.5s", "total": "7", "data": "aGk=", "timeout": "1h", "since": "2026-01-02T03:04:05Z"}`,
		`{"spec": {"main": {"size": "Huge"}, "main": {}}}`,
		`{"spec": {"SIZE": "Huge"}, "Spec": {}}`,
		`{"spec": {"tags": {"a": null}}, "labels": {"b": null}}`,
		`{"spec": {"timeout": null, "weight": 1e400, "count": 1.0, "delta": -0}}`,
		`{"main":{"next":{"next":{"next":{"next":{}}}}}}`,
		`{"a":"\ud800","tags":{"\u0000":"\uffff"}}`,
		`null`, `[]`, `{} {}`, `{"name":`, "\xff\xfe{}", `{"":{"":[]}}`,
	} {
		f.Add([]byte(seed))
	}
	spec, flat := boxes()
	f.Fuzz(func(t *testing.T, doc []byte) {
		resource.Peek(doc)
		for _, k := range []*resource.Kind{spec.Kind, flat.Kind} {
			strict, err := resource.Decode(k, doc, false)
			loose, looseErr := resource.Decode(k, doc, true)
			for _, err := range []error{err, looseErr} {
				if err != nil && (!errs.Is(err, errs.Invalid) || err.Error() == "" || len(err.Error()) > 100_000) {
					t.Fatalf("error %v", err)
				}
			}
			if looseErr != nil {
				if err == nil {
					t.Fatalf("strict accepts what lenient refuses: %v", looseErr)
				}
				continue
			}
			if err == nil {
				if diff := cmp.Diff(strict.Spec, loose.Spec, cmp.AllowUnexported(boxSpec{})); diff != "" {
					t.Fatalf("strict and lenient read differently: %s", diff)
				}
			}
			shown, err := resource.Encode(loose)
			if err != nil || !json.Valid(shown) {
				t.Fatalf("encode: %v: %s", err, shown)
			}
			again, err := resource.Decode(k, shown, false)
			if err != nil {
				t.Fatalf("decode what was encoded: %v: %s", err, shown)
			}
			shownAgain, err := resource.Encode(again)
			if err != nil || string(shown) != string(shownAgain) && k.Scope == resource.Mesh {
				t.Fatalf("%v\nonce  %s\ntwice %s", err, shown, shownAgain)
			}
			kept, err := resource.Freeze(loose)
			if err != nil {
				t.Fatal(err)
			}
			thawed, err := resource.Thaw(k, kept)
			if err != nil {
				t.Fatalf("thaw: %v: %s", err, kept)
			}
			keptAgain, err := resource.Freeze(thawed)
			if err != nil || string(kept) != string(keptAgain) {
				t.Fatalf("%v\nonce  %s\ntwice %s", err, kept, keptAgain)
			}
		}
	})
}
