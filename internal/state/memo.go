package state

import "sync"

// memo keeps what was computed from things that don't change.
type memo struct {
	mu   sync.Mutex
	kept map[any]func() any
}

// maxKept bounds a memo that lives for long while those who ask it come and go:
// then all is computed anew.
const maxKept = 20_000

func (m *memo) get(key any, compute func() any) any {
	m.mu.Lock()
	f := m.kept[key]
	if f == nil {
		if m.kept == nil || len(m.kept) >= maxKept {
			m.kept = map[any]func() any{}
		}
		f = sync.OnceValue(compute)
		m.kept[key] = f
	}
	m.mu.Unlock()
	return f()
}

// Shared returns what compute returned when it was first asked for the key in
// this state of the mesh. It may depend on the mesh's resources and on the key,
// and nobody may change it. Keys are of types of the caller's own.
func Shared[T any](m *Mesh, key any, compute func() T) T {
	return m.memo.get(key, func() any { return compute() }).(T)
}

// SharedByDataplanes is Shared for what depends on the mesh's Dataplanes and
// the key alone: it is kept for longer.
func SharedByDataplanes[T any](m *Mesh, key any, compute func() T) T {
	return m.services.memo.get(key, func() any { return compute() }).(T)
}

// SharedByRules is Shared for what depends on the key and on the mesh's
// resources other than Dataplanes and their insights: it is kept while proxies
// come and go.
func SharedByRules[T any](m *Mesh, key any, compute func() T) T {
	return m.rules.get(key, func() any { return compute() }).(T)
}
