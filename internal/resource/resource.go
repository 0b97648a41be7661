// Package resource says what a resource is: its kind, its name and labels, its
// specification, and how all that is written as JSON. It knows no particular
// kind.
package resource

import (
	"time"

	"kuma/internal/errs"
	"kuma/internal/names"
)

// Scope says whether a kind's resources belong to a mesh.
type Scope uint8

const (
	// Global resources stand beside the meshes.
	Global Scope = iota
	// Mesh resources belong to one mesh and go with it.
	Mesh
)

// String returns the scope as the API writes it.
func (s Scope) String() string {
	if s == Mesh {
		return "Mesh"
	}
	return "Global"
}

// Shape is which of the contract's two JSON forms a kind has.
type Shape uint8

const (
	// Flat puts the specification's fields beside type, mesh and name.
	Flat Shape = iota
	// Spec puts them under "spec", and the status under "status".
	Spec
)

// String returns the shape's name.
func (s Shape) String() string {
	if s == Spec {
		return "Spec"
	}
	return "Flat"
}

// Sync says in which directions a kind travels between control planes.
type Sync uint8

const (
	// GlobalToZone resources are written on the global control plane.
	GlobalToZone Sync = 1 << iota
	// ZoneToGlobal resources are written on a zone's control plane.
	ZoneToGlobal
)

// Labels that are part of what a resource's identity is. The others are in
// package mesh.
const (
	LabelZone        = "kuma.io/zone"
	LabelNamespace   = "k8s.kuma.io/namespace"
	LabelDisplayName = "kuma.io/display-name"
)

// Key names one resource. Mesh is empty for global kinds.
type Key struct{ Kind, Mesh, Name string }

// String returns the key for logs and messages: `MeshTimeout "a" in mesh "m"`.
func (k Key) String() string {
	s := k.Kind + ` "` + k.Name + `"`
	if k.Mesh != "" {
		s += ` in mesh "` + k.Mesh + `"`
	}
	return s
}

// Meta is what every resource has besides its specification.
type Meta struct {
	Mesh   string
	Name   string
	Labels map[string]string
	// Version is the store's revision at which this state was written; 0 for a
	// resource that was never stored. The API gives it out as ETag.
	Version uint64
	// Created and Modified are set by the store.
	Created, Modified time.Time
}

// A Resource is one object of a kind. Once it is stored it is never changed:
// who wants another one makes another one. So everyone may share it.
type Resource struct {
	Meta
	Kind *Kind
	// Spec is a pointer to the kind's specification type.
	Spec any
	// Status is a pointer to the kind's status type, or nil.
	Status any
}

// Key returns what names the resource.
func (r *Resource) Key() Key { return Key{r.Kind.Name, r.Mesh, r.Name} }

// DisplayName is the name that the user gave, which synchronisation between
// zones does not change.
func (r *Resource) DisplayName() string {
	if n := r.Labels[LabelDisplayName]; n != "" {
		return n
	}
	return r.Name
}

// KRI returns the resource's identifier, or a zero KRI for kinds without one.
func (r *Resource) KRI() names.KRI {
	if r.Kind.Short == "" {
		return names.KRI{}
	}
	return names.KRI{Short: r.Kind.Short, Mesh: r.Mesh, Zone: r.Labels[LabelZone], Namespace: r.Labels[LabelNamespace], Name: r.DisplayName()}
}

// Column is a column of kumactl's table for a kind.
type Column struct {
	Name string
	// Path leads to the value in the JSON form, such as ".spec.state".
	Path string
}

// PolicyTraits says what a policy kind's specification may contain.
type PolicyTraits struct {
	// TargetRef: the policy selects proxies by a targetRef (the present
	// generation), not by sources and destinations.
	TargetRef bool
	// Default: the policy has one configuration for the proxy as a whole.
	Default bool
	To      bool
	From    bool
	Rules   bool
	// FromAsRules: entries of "from" are taken as rules without matches.
	FromAsRules bool
}

// A Kind is a sort of resource, declared once. All that the API, the command
// line, the stores and the manual need to know of it is here as data.
type Kind struct {
	// Name is the type as users write it, such as "MeshTimeout".
	Name string
	// Plural is the path element of the API, such as "meshtimeouts".
	Plural string
	// AltPlurals are further path elements that the contract allows.
	AltPlurals []string
	// Singular is kumactl's argument; empty means Name in lower case.
	Singular string
	// Short is the kind's part of a KRI; empty for kinds without one.
	Short string
	Scope Scope
	Shape Shape
	Sync  Sync
	// ReadOnly kinds are written by the system alone.
	ReadOnly bool
	// Admin kinds may be read and written by administrators alone.
	Admin bool
	// Federated kinds belong to what a zone hands over to a global control plane.
	Federated bool
	// Policy is nil for kinds that are no policies.
	Policy  *PolicyTraits
	Columns []Column

	// New makes an empty specification. Define sets it.
	New func() any
	// NewStatus makes an empty status; nil for kinds without a status.
	NewStatus func() any
	// Check finds what the schema can't say. Define sets it.
	Check func(spec any) []errs.Field
}

// A Type is a Kind together with the Go type of its specification.
type Type[S any] struct{ *Kind }

// Define declares a kind whose specification is an S. The check may be nil; it
// gets a specification whose types are right and returns the fields at fault,
// with paths from the document's root ("spec.to[0]…" or "networking.…").
func Define[S any](k Kind, check func(*S) []errs.Field) Type[S] {
	k.New = func() any { return new(S) }
	if check != nil {
		k.Check = func(spec any) []errs.Field { return check(spec.(*S)) }
	}
	return Type[S]{&k}
}

// An Object is a Resource whose specification's type is known.
type Object[S any] struct {
	*Resource
	Spec *S
}

// From returns the resource as an object of this type. The resource must be of
// this kind.
func (t Type[S]) From(r *Resource) Object[S] { return Object[S]{r, r.Spec.(*S)} }

// Make returns a new resource of this type.
func (t Type[S]) Make(mesh, name string, spec *S) *Resource {
	return &Resource{Meta: Meta{Mesh: mesh, Name: name}, Kind: t.Kind, Spec: spec}
}

// Key names a resource of this type.
func (t Type[S]) Key(mesh, name string) Key { return Key{t.Name, mesh, name} }

// A Defaulter is a specification that fills in what the user left out, before
// it is checked.
type Defaulter interface{ Default() }

// ArgName is how kumactl calls the kind on its command line.
func (k *Kind) ArgName() string {
	if k.Singular != "" {
		return k.Singular
	}
	return lower(k.Name)
}

func lower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}
