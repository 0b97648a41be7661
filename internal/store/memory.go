package store

import (
	"cmp"
	"context"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// HistoryLimit is how many of the last changes a Memory knows. A reader that
// is further behind gets ErrTooOld.
const HistoryLimit = 4096

// Memory is everything that a store holds, in memory: the present resources
// and the last changes. It answers the reading half of Store, and is made for
// stores that keep all of it in memory, whatever else they do with it.
//
// A write has three steps, so that a store can make it durable before anyone
// sees it: Plan.Check, Plan.Accept, and Publish. Only one plan may be open at
// a time; Memory's reading methods may be called at any time.
type Memory struct {
	mu       sync.RWMutex
	revision uint64
	shelves  map[string]*shelf
	// history holds the transactions up to revision, one per revision and
	// without gaps; size counts their events.
	history [][]Event
	size    int
	// changed is closed and replaced whenever revision moves.
	changed chan struct{}
	ended   error
}

// shelf holds the resources of one kind, ordered by mesh and name.
type shelf struct {
	list []*resource.Resource
	// lent: a reader may hold the list, so it must be copied before a change.
	lent atomic.Bool
}

func (s *shelf) find(mesh, name string) (int, bool) {
	return slices.BinarySearchFunc(s.list, resource.Key{Mesh: mesh, Name: name}, func(r *resource.Resource, k resource.Key) int {
		return cmp.Or(strings.Compare(r.Mesh, k.Mesh), strings.Compare(r.Name, k.Name))
	})
}

func (s *shelf) of(mesh string) []*resource.Resource {
	from, to := 0, len(s.list)
	if mesh != "" {
		from, _ = s.find(mesh, "")
		rest := s.list[from:]
		n, _ := slices.BinarySearchFunc(rest, mesh, func(r *resource.Resource, mesh string) int {
			if r.Mesh <= mesh {
				return -1
			}
			return 1
		})
		to = from + n
	}
	return s.list[from:to:to]
}

func (s *shelf) set(key resource.Key, r *resource.Resource) {
	i, found := s.find(key.Mesh, key.Name)
	if r == nil && !found {
		return
	}
	if s.lent.Swap(false) {
		s.list = slices.Clone(s.list)
	}
	switch {
	case r == nil:
		s.list = slices.Delete(s.list, i, i+1)
	case found:
		s.list[i] = r
	default:
		s.list = slices.Insert(s.list, i, r)
	}
}

// NewMemory returns a Memory that holds the resources at the revision. What
// happened before it is not known: following it from an earlier one gives
// ErrTooOld.
func NewMemory(revision uint64, all []*resource.Resource) *Memory {
	m := &Memory{revision: revision, shelves: map[string]*shelf{}, changed: make(chan struct{})}
	for _, r := range all {
		m.shelf(r.Kind.Name).list = append(m.shelf(r.Kind.Name).list, r)
	}
	for _, s := range m.shelves {
		slices.SortFunc(s.list, func(a, b *resource.Resource) int {
			return cmp.Or(strings.Compare(a.Mesh, b.Mesh), strings.Compare(a.Name, b.Name))
		})
	}
	return m
}

func (m *Memory) shelf(kind string) *shelf {
	s, ok := m.shelves[kind]
	if !ok {
		s = &shelf{}
		m.shelves[kind] = s
	}
	return s
}

// Get is Store's.
func (m *Memory) Get(_ context.Context, key resource.Key) (*resource.Resource, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if r := m.get(key); r != nil {
		return r, nil
	}
	return nil, errs.New(errs.NotFound, "%s not found", key)
}

func (m *Memory) get(key resource.Key) *resource.Resource {
	if s, ok := m.shelves[key.Kind]; ok {
		if i, found := s.find(key.Mesh, key.Name); found {
			return s.list[i]
		}
	}
	return nil
}

// List is Store's. Resources of all kinds are ordered by kind first.
func (m *Memory) List(_ context.Context, kind, mesh string) ([]*resource.Resource, uint64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if kind != "" {
		s, ok := m.shelves[kind]
		if !ok {
			return nil, m.revision, nil
		}
		s.lent.Store(true)
		return s.of(mesh), m.revision, nil
	}
	var all []*resource.Resource
	for _, k := range slices.Sorted(maps.Keys(m.shelves)) {
		all = append(all, m.shelves[k].of(mesh)...)
	}
	return all, m.revision, nil
}

// Watch is Store's. A reader costs no memory while it is slow: it falls behind
// the history, which is bounded.
func (m *Memory) Watch(ctx context.Context, since uint64) iter.Seq2[[]Event, error] {
	return func(yield func([]Event, error) bool) {
		for ctx.Err() == nil {
			events, changed, err := m.after(&since)
			if err != nil {
				yield(nil, err)
				return
			}
			if len(events) > 0 {
				if !yield(events, nil) {
					return
				}
				continue
			}
			select {
			case <-ctx.Done():
			case <-changed:
			}
		}
	}
}

// after returns the changes after since and moves it on; or, where there are
// none, what will be closed at the next.
func (m *Memory) after(since *uint64) ([]Event, <-chan struct{}, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.ended != nil {
		return nil, nil, m.ended
	}
	first := m.revision - uint64(len(m.history))
	if *since < first || *since > m.revision {
		return nil, nil, ErrTooOld
	}
	events := slices.Concat(m.history[*since-first:]...)
	*since = m.revision
	return events, m.changed, nil
}

// Revision returns the present revision.
func (m *Memory) Revision() uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.revision
}

// End makes all present and later calls of Watch yield err and end.
func (m *Memory) End(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended == nil {
		m.ended = err
		close(m.changed)
		m.changed = make(chan struct{})
	}
}

// Plan begins a run of transactions that build on the present state.
func (m *Memory) Plan() *Plan {
	return &Plan{memory: m, revision: m.Revision(), pending: map[resource.Key]*resource.Resource{}}
}

// Plan is a run of transactions that build on each other and that nobody sees
// before they are published.
type Plan struct {
	memory   *Memory
	revision uint64
	pending  map[resource.Key]*resource.Resource
	accepted [][]Event
}

// Revision is that of the last transaction accepted.
func (p *Plan) Revision() uint64 { return p.revision }

// Check tells what a transaction would change, with versions and times set, or
// why it can't be made. It changes nothing.
func (p *Plan) Check(now time.Time, writes []Write) ([]Event, error) {
	now = now.UTC().Round(0)
	revision := p.revision + 1
	events := make([]Event, 0, len(writes))
	seen := make(map[resource.Key]bool, len(writes))
	for _, w := range writes {
		if w.Resource != nil && (w.Resource.Kind == nil || w.Resource.Key() != w.Key) {
			return nil, errs.New(errs.Internal, "write %s: the resource given has another key", w.Key)
		}
		if seen[w.Key] {
			return nil, errs.New(errs.Internal, "write %s: it is there twice in one transaction", w.Key)
		}
		seen[w.Key] = true
		old := p.get(w.Key)
		if err := w.Check(old); err != nil {
			return nil, err
		}
		e := Event{Revision: revision, Key: w.Key}
		if w.Resource != nil {
			r := *w.Resource
			r.Version, r.Created, r.Modified = revision, now, now
			if old != nil {
				r.Created = old.Created
			}
			e.Resource = &r
		}
		events = append(events, e)
	}
	return events, nil
}

func (p *Plan) get(key resource.Key) *resource.Resource {
	if r, ok := p.pending[key]; ok {
		return r
	}
	p.memory.mu.RLock()
	defer p.memory.mu.RUnlock()
	return p.memory.get(key)
}

// Accept adds a transaction that Check returned last.
func (p *Plan) Accept(events []Event) {
	p.revision++
	p.accepted = append(p.accepted, events)
	for _, e := range events {
		p.pending[e.Key] = e.Resource
	}
}

// Publish makes the plan's transactions the present state, for all readers at
// once, and wakes those that wait.
func (m *Memory) Publish(p *Plan) {
	if len(p.accepted) == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, events := range p.accepted {
		for _, e := range events {
			m.shelf(e.Key.Kind).set(e.Key, e.Resource)
		}
		m.size += len(events)
	}
	m.history = append(m.history, p.accepted...)
	drop := 0
	for m.size > HistoryLimit && drop < len(m.history)-1 {
		m.size -= len(m.history[drop])
		m.history[drop] = nil
		drop++
	}
	m.history = m.history[drop:]
	m.revision = p.revision
	close(m.changed)
	m.changed = make(chan struct{})
}
