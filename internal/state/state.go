// Package state keeps an immutable picture of all meshes, renewed on change.
//
// Everything that looks at the meshes as a whole (the configuration of proxies,
// inspection, explanations) looks at one Picture and so sees one moment.
package state

import (
	"maps"
	"slices"
	"strings"
	"sync"

	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// A Picture is all meshes at one revision of the store. Nobody may change it.
type Picture struct {
	// Revision is the store's.
	Revision uint64
	// seq numbers pictures. How the last ones came about is in changes; steps says
	// for each, up to this one, where its changes begin.
	seq     uint64
	changes []Change
	steps   []int
	// insights is the seq at which any DataplaneInsight last changed.
	insights uint64

	global map[string]map[string]*resource.Resource
	meshes map[string]*Mesh
}

// Change is one resource's change between two pictures. Old is nil where it is
// new, New where it is gone.
type Change struct {
	Key      resource.Key
	Old, New *resource.Resource
}

// maxHistory is how many steps a picture remembers, and maxChanges how many
// changes in all: who is further behind looks at everything again.
const (
	maxHistory = 64
	maxChanges = 4096
)

// empty is the picture before the first read.
func empty() *Picture {
	return &Picture{global: map[string]map[string]*resource.Resource{}, meshes: map[string]*Mesh{}}
}

// Since returns the changes that lead from old to p, in order. It returns false
// if old is too far back (or nil); then everything may have changed.
func (p *Picture) Since(old *Picture) ([]Change, bool) {
	if old == nil || old.seq > p.seq {
		return nil, false
	}
	if old.seq == p.seq {
		return nil, true
	}
	behind := p.seq - old.seq
	if behind > uint64(len(p.steps)) {
		return nil, false
	}
	return slices.Clip(p.changes[p.steps[uint64(len(p.steps))-behind]:]), true
}

// InsightsSince reports whether any DataplaneInsight changed after old. Since
// tells of insights only where the authority that they show changed.
func (p *Picture) InsightsSince(old *Picture) bool { return old == nil || p.insights > old.seq }

// Get returns a resource, or nil.
func (p *Picture) Get(k resource.Key) *resource.Resource {
	if k.Mesh == "" {
		return p.global[k.Kind][k.Name]
	}
	if m := p.meshes[k.Mesh]; m != nil {
		return m.Get(k.Kind, k.Name)
	}
	return nil
}

// Mesh returns what belongs to a mesh, or nil if there is no such Mesh.
func (p *Picture) Mesh(name string) *Mesh {
	m := p.meshes[name]
	if m == nil || p.global[mesh.Meshes.Name][name] == nil {
		return nil
	}
	return m
}

// Meshes yields the meshes' names, sorted.
func (p *Picture) Meshes() []string {
	return slices.Sorted(maps.Keys(p.global[mesh.Meshes.Name]))
}

// Global returns the global resources of a kind, by name, sorted.
func (p *Picture) Global(kind string) []*resource.Resource { return sorted(p.global[kind]) }

// A Mesh is what belongs to one mesh. What is computed from it is computed once
// and kept for as long as it can't have changed.
type Mesh struct {
	// Name is the mesh's name.
	Name string
	// Spec is the Mesh resource's; never nil for a mesh that Picture.Mesh
	// returned.
	Spec *mesh.MeshSpec
	// Resource is the Mesh resource itself.
	Resource *resource.Resource

	kinds map[string]*kindSet
	// services is shared by all pictures in which the Dataplanes are the same.
	services *serviceIndex
	// remembered is the protocol of services that had endpoints once. It is
	// shared by all pictures, and replaced when it changes.
	remembered map[string]string
	// tls is shared by all in which Dataplanes and insights are.
	tls *tlsIndex
	// rules is shared by all in which nothing but Dataplanes and insights changed.
	rules *memo
	// memo is this picture's alone, for a mesh in which anything changed.
	memo *memo
}

// kindSet holds a mesh's resources of one kind and, once asked for, their
// sorted list.
type kindSet struct {
	byName map[string]*resource.Resource
	once   sync.Once
	list   []*resource.Resource
}

func (k *kindSet) sorted() []*resource.Resource {
	if k == nil {
		return nil
	}
	k.once.Do(func() { k.list = sorted(k.byName) })
	return k.list
}

func sorted(m map[string]*resource.Resource) []*resource.Resource {
	return slices.SortedFunc(maps.Values(m), func(a, b *resource.Resource) int { return strings.Compare(a.Name, b.Name) })
}

// Get returns a resource of the mesh, or nil.
func (m *Mesh) Get(kind, name string) *resource.Resource {
	if k := m.kinds[kind]; k != nil {
		return k.byName[name]
	}
	return nil
}

// List returns the mesh's resources of a kind, sorted by name. The slice is
// shared: don't change it.
func (m *Mesh) List(kind string) []*resource.Resource { return m.kinds[kind].sorted() }

// Dataplane returns a Dataplane of the mesh.
func (m *Mesh) Dataplane(name string) (mesh.Dataplane, bool) {
	r := m.Get(mesh.Dataplanes.Name, name)
	if r == nil {
		return mesh.Dataplane{}, false
	}
	return mesh.Dataplanes.From(r), true
}

// An Endpoint is one inbound of one proxy.
type Endpoint struct {
	Dataplane mesh.Dataplane
	Inbound   *mesh.Inbound
}

// serviceIndex maps kuma.io/service values to inbounds, ready or not.
type serviceIndex struct {
	once      sync.Once
	endpoints map[string][]Endpoint
	memo      memo
}

// Endpoints returns the inbounds whose kuma.io/service is this one, ready or
// not, in the order of the Dataplanes' names. The slice is shared.
func (m *Mesh) Endpoints(service string) []Endpoint {
	return m.index()[service]
}

// Services returns the kuma.io/service values in use, sorted.
func (m *Mesh) Services() []string { return slices.Sorted(maps.Keys(m.index())) }

func (m *Mesh) index() map[string][]Endpoint {
	x := m.services
	x.once.Do(func() {
		x.endpoints = map[string][]Endpoint{}
		for _, r := range m.List(mesh.Dataplanes.Name) {
			d := mesh.Dataplanes.From(r)
			if d.Spec.Networking == nil {
				continue
			}
			for i := range d.Spec.Networking.Inbound {
				in := &d.Spec.Networking.Inbound[i]
				if s := in.Service(); s != "" {
					x.endpoints[s] = append(x.endpoints[s], Endpoint{d, in})
				}
			}
		}
	})
	return x.endpoints
}

// Protocol returns what a service's endpoints have in common: their protocol,
// http2 for grpc and http2 mixed, tcp for any other mixture, and "" where there
// are no endpoints.
func (m *Mesh) Protocol(service string) string {
	common := ""
	for _, e := range m.Endpoints(service) {
		switch p := e.Inbound.EffectiveProtocol(); {
		case common == "" || common == p:
			common = p
		case isHTTP2(common) && isHTTP2(p):
			common = "http2"
		default:
			return "tcp"
		}
	}
	return common
}

// Remembered returns the protocol that a service had when it last had
// endpoints, or "": so that callers of a service whose last endpoint has gone
// are still answered in their protocol (contract).
func (m *Mesh) Remembered(service string) string { return m.remembered[service] }

// maxRemembered bounds how many services without endpoints are remembered.
const maxRemembered = 10_000

// remember keeps the protocols of a Dataplane that changes or goes, as they
// were in the picture before.
func (m *Mesh) remember(before *Mesh, d *resource.Resource) {
	if before == nil || d == nil {
		return
	}
	for _, service := range mesh.Dataplanes.From(d).Spec.Services() {
		protocol := before.Protocol(service)
		if protocol == "" || m.remembered[service] == protocol || len(m.remembered) >= maxRemembered {
			continue
		}
		if m.remembered = maps.Clone(m.remembered); m.remembered == nil {
			m.remembered = map[string]string{}
		}
		m.remembered[service] = protocol
	}
}

func isHTTP2(p string) bool { return p == "http2" || p == "grpc" }

// tlsIndex says which services' proxies all have certificates.
type tlsIndex struct {
	once  sync.Once
	ready map[string]bool
}

// TLSReady reports whether every proxy behind the service has been issued a
// certificate by the mesh's enabled backend. Callers in a PERMISSIVE mesh use
// mutual TLS towards such services alone.
func (m *Mesh) TLSReady(service string) bool {
	m.tls.once.Do(func() {
		m.tls.ready = map[string]bool{}
		b := m.Spec.EnabledBackend()
		for s, eps := range m.index() {
			m.tls.ready[s] = b != nil && !slices.ContainsFunc(eps, func(e Endpoint) bool { return !m.issued(e.Dataplane.Name, b.Name) })
		}
	})
	return m.tls.ready[service]
}

// issued reports whether the proxy's insight shows a certificate of the backend.
func (m *Mesh) issued(dataplane, backend string) bool {
	r := m.Get(mesh.DataplaneInsights.Name, dataplane)
	if r == nil {
		return false
	}
	t := mesh.DataplaneInsights.From(r).Spec.MTLS
	return t != nil && t.IssuedBackend == backend
}

// An Identity is what a proxy may call itself in its mesh under classic mTLS.
type Identity struct {
	Mesh string
	// Services are the distinct kuma.io/service values, sorted; the SPIFFE ids
	// spiffe://<mesh>/<service> follow from them.
	Services []string
	// Tags are all values of all tags; the kuma://<tag>/<value> names follow.
	Tags map[string][]string
}

// IdentityOf returns the identity of a Dataplane. It has no services where the
// Dataplane names none; then no certificate can be issued.
func IdentityOf(d mesh.Dataplane) Identity {
	return Identity{d.Mesh, d.Spec.Services(), d.Spec.Tags()}
}

// As is the picture as it would be with these resources in the place of what is
// there now. Nobody else sees it; it is for questions.
func (p *Picture) As(resources ...*resource.Resource) *Picture {
	changes := make([]Change, 0, len(resources))
	for _, r := range resources {
		changes = append(changes, Change{Key: r.Key(), New: r})
	}
	return p.with(p.Revision, changes)
}

// with returns a picture that shares with p all that did not change. Insights
// matter to proxies only by the authority they show; other changes of them are
// taken over without being told.
func (p *Picture) with(revision uint64, changes []Change) *Picture {
	n := &Picture{Revision: revision, seq: p.seq + 1, insights: p.insights, global: maps.Clone(p.global), meshes: maps.Clone(p.meshes)}
	copiedGlobal, copiedMesh, copiedKind := map[string]bool{}, map[string]bool{}, map[[2]string]bool{}
	var told []Change
	for i := range changes {
		c := &changes[i]
		if c.Key.Mesh == "" {
			if !copiedGlobal[c.Key.Kind] {
				n.global[c.Key.Kind] = cloned(n.global[c.Key.Kind])
				copiedGlobal[c.Key.Kind] = true
			}
			c.Old = put(n.global[c.Key.Kind], c)
			if c.Key.Kind == mesh.Meshes.Name {
				m := n.own(c.Key.Name, copiedMesh)
				m.Resource, m.Spec, m.tls, m.rules = c.New, nil, new(tlsIndex), new(memo)
				if c.New != nil {
					m.Spec = mesh.Meshes.From(c.New).Spec
				}
			}
			told = append(told, *c)
			continue
		}
		m := n.own(c.Key.Mesh, copiedMesh)
		if k := [2]string{c.Key.Mesh, c.Key.Kind}; !copiedKind[k] {
			old := m.kinds[c.Key.Kind]
			m.kinds[c.Key.Kind] = &kindSet{}
			if old != nil {
				m.kinds[c.Key.Kind].byName = maps.Clone(old.byName)
			} else {
				m.kinds[c.Key.Kind].byName = map[string]*resource.Resource{}
			}
			copiedKind[k] = true
		}
		c.Old = put(m.kinds[c.Key.Kind].byName, c)
		switch c.Key.Kind {
		case mesh.Dataplanes.Name:
			m.remember(p.meshes[m.Name], c.Old)
			m.services, m.tls = new(serviceIndex), new(tlsIndex)
		case mesh.DataplaneInsights.Name:
			n.insights = n.seq
			if issuedBackend(c.Old) == issuedBackend(c.New) {
				continue
			}
			m.tls = new(tlsIndex)
		default:
			m.rules = new(memo)
		}
		told = append(told, *c)
	}
	n.steps = append(slices.Clip(p.steps), len(p.changes))
	n.changes = append(slices.Clip(p.changes), told...)
	n.trim()
	return n
}

// trim keeps the history within its bounds, by whole steps.
func (p *Picture) trim() {
	drop := max(0, len(p.steps)-maxHistory)
	for drop < len(p.steps) && len(p.changes)-p.steps[drop] > maxChanges {
		drop++
	}
	if drop == 0 {
		return
	}
	from := len(p.changes)
	if drop < len(p.steps) {
		from = p.steps[drop]
	}
	p.changes = slices.Clone(p.changes[from:])
	p.steps = slices.Clone(p.steps[drop:])
	for i := range p.steps {
		p.steps[i] -= from
	}
}

func issuedBackend(r *resource.Resource) string {
	if r == nil {
		return ""
	}
	if t := mesh.DataplaneInsights.From(r).Spec.MTLS; t != nil {
		return t.IssuedBackend
	}
	return ""
}

// own returns the mesh as one that this picture may still change.
func (p *Picture) own(name string, copied map[string]bool) *Mesh {
	if copied[name] {
		return p.meshes[name]
	}
	copied[name] = true
	m := &Mesh{Name: name, kinds: map[string]*kindSet{}, services: new(serviceIndex), tls: new(tlsIndex), rules: new(memo), memo: new(memo)}
	if old := p.meshes[name]; old != nil {
		m.Spec, m.Resource, m.kinds, m.services, m.tls = old.Spec, old.Resource, maps.Clone(old.kinds), old.services, old.tls
		m.rules, m.remembered = old.rules, old.remembered
	}
	p.meshes[name] = m
	return m
}

func cloned(m map[string]*resource.Resource) map[string]*resource.Resource {
	if m == nil {
		return map[string]*resource.Resource{}
	}
	return maps.Clone(m)
}

// put makes the change in a map and returns what was there.
func put(m map[string]*resource.Resource, c *Change) *resource.Resource {
	old := m[c.Key.Name]
	if c.New == nil {
		delete(m, c.Key.Name)
	} else {
		m[c.Key.Name] = c.New
	}
	return old
}
