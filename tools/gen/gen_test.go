package main

import (
	"encoding/json"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// color is an Enum.
type color string

func (color) Values() []string { return []string{"red", "blue"} }

// portOrName reads numbers and strings.
type portOrName struct{}

func (*portOrName) UnmarshalJSON(b []byte) error {
	if b[0] == '"' || '0' <= b[0] && b[0] <= '9' && string(b) != "0.5" {
		return nil
	}
	return errors.New("no")
}

type node struct {
	Name     string                  `json:"name"`
	Count    uint32                  `json:"count"`
	Color    color                   `json:"color,omitempty"`
	Port     *portOrName             `json:"port,omitempty"`
	Wait     resource.Duration       `json:"wait,omitzero"`
	At       time.Time               `json:"at,omitzero"`
	Raw      json.RawMessage         `json:"raw,omitempty"`
	Data     []byte                  `json:"data,omitempty"`
	Children []node                  `json:"children,omitempty"`
	ByName   map[string]resource.Key `json:"byName,omitempty"`
	Nothing  *struct{}               `json:"nothing,omitempty"`
	Hidden   string                  `json:"-"`
}

func TestSchemaOfTypes(t *testing.T) {
	got, err := newSource(t.TempDir()).schemaOf(new(node))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"type":"object","required":["name"],"properties":{` +
		`"name":{"type":"string"},"count":{"type":"integer"},"color":{"type":"string","enum":["red","blue"]},` +
		`"port":{"type":["integer","string"]},"wait":{"type":"string","format":"duration"},"at":{"type":"string","format":"date-time"},` +
		`"raw":{},"data":{"type":"string","format":"byte"},"children":{"type":"array","items":{"type":"object"}},` +
		`"byName":{"type":"object","additionalProperties":{"type":"object","required":["Kind","Mesh","Name"],"properties":{"Kind":{"type":"string"},"Mesh":{"type":"string"},"Name":{"type":"string"}}}},` +
		`"nothing":{"type":"object","additionalProperties":false}}}`
	if diff := cmp.Diff(want, string(raw)); diff != "" {
		t.Errorf("schema (-want +got):\n%s", diff)
	}
}

// Descriptions come from the comments in the source, under the JSON name.
func TestDescriptionsFromComments(t *testing.T) {
	got, err := newSource("../..").schemaOf(new(mesh.Inbound))
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range got.Properties {
		if field.name == "servicePort" {
			if want := "servicePort is where the workload listens; the default is Port."; field.schema.Description != want {
				t.Errorf("servicePort is described as %q, want %q", field.schema.Description, want)
			}
			return
		}
	}
	t.Error("an inbound has no servicePort")
}

func TestRenamed(t *testing.T) {
	for _, c := range []struct{ text, from, to, want string }{
		{"Port is it.", "Port", "port", "port is it."},
		{"Ports are it.", "Port", "port", "Ports are it."},
		{"Where it listens.", "Port", "port", "Where it listens."},
		{"", "Port", "port", ""},
		{"Anything", "", "port", "Anything"},
	} {
		if got := renamed(c.text, c.from, c.to); got != c.want {
			t.Errorf("renamed(%q, %q, %q) = %q, want %q", c.text, c.from, c.to, got, c.want)
		}
	}
}

// Every kind can be described, and what the description says of its fields is
// what the Go type has.
func TestEveryKindIsDescribed(t *testing.T) {
	source := newSource("../..")
	for _, k := range kinds() {
		entry, err := describe(k, source)
		if err != nil {
			t.Errorf("%s: %v", k.Name, err)
			continue
		}
		if text, err := kindText(k, source); err != nil || text == "" {
			t.Errorf("%s: its specification has no comment (%v), so its page would be empty", k.Name, err)
		}
		if k.Policy != nil && k.Policy.TargetRef {
			continue // what it has no use for is left out
		}
		if got, want := len(entry.Schema.Properties), len(reflect.VisibleFields(reflect.TypeOf(k.New()).Elem())); got != want {
			t.Errorf("%s: %d fields described, the type has %d", k.Name, got, want)
		}
	}
}
