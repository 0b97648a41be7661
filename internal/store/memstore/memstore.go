// Package memstore is a store in memory. It ends with the process.
package memstore

import (
	"context"
	"sync"
	"time"

	"kuma/internal/errs"
	"kuma/internal/store"
)

// Store is a store in memory.
type Store struct {
	*store.Memory
	write sync.Mutex
}

// New returns an empty store.
func New() *Store { return &Store{Memory: store.NewMemory(0, nil)} }

// Put is store.Store's. What it commits does not survive a crash.
func (s *Store) Put(ctx context.Context, writes ...store.Write) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, errs.New(errs.Unavailable, "nothing was written: %w", err)
	}
	s.write.Lock()
	defer s.write.Unlock()
	plan := s.Plan()
	if len(writes) == 0 {
		return plan.Revision(), nil
	}
	events, err := plan.Check(time.Now(), writes)
	if err != nil {
		return 0, err
	}
	plan.Accept(events)
	s.Publish(plan)
	return plan.Revision(), nil
}
