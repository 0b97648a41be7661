package state

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/resource"
	"kuma/internal/store"
)

// Config is what a Tracker needs.
type Config struct {
	Store store.Store
	// Quiet is how long the tracker waits for further changes before it makes a
	// new picture; the default is 10 ms.
	Quiet time.Duration
	// Max is how long it waits at most while changes go on; the default is
	// 200 ms.
	Max time.Duration
	Log *slog.Logger
}

// A Tracker follows the store and keeps the present Picture. It is the one
// place in which time passes between a change and its effect.
type Tracker struct {
	cfg     Config
	now     atomic.Pointer[Picture]
	ready   chan struct{}
	metrics *Metrics

	mu   sync.Mutex
	subs map[chan struct{}]struct{}
	// renewed are to count as changed; renew gets a signal.
	renewed []resource.Key
	renew   chan struct{}
}

// New makes a tracker; Run starts it.
func New(cfg Config) *Tracker {
	if cfg.Quiet == 0 {
		cfg.Quiet = 10 * time.Millisecond
	}
	if cfg.Max == 0 {
		cfg.Max = 200 * time.Millisecond
	}
	t := &Tracker{cfg: cfg, ready: make(chan struct{}), subs: map[chan struct{}]struct{}{}, renew: make(chan struct{}, 1)}
	t.now.Store(empty())
	t.metrics = newMetrics(t)
	return t
}

// Now returns the present picture. It is empty until Ready.
func (t *Tracker) Now() *Picture { return t.now.Load() }

// Ready is closed when the first picture is there.
func (t *Tracker) Ready() <-chan struct{} { return t.ready }

// Subscribe returns a channel that gets a signal after each new picture. It
// holds one signal: a slow reader misses pictures, never the last one. The
// first signal is there at once. Call stop when done.
func (t *Tracker) Subscribe() (changed <-chan struct{}, stop func()) {
	ch := make(chan struct{}, 1)
	ch <- struct{}{}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.subs[ch] = struct{}{}
	return ch, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.subs, ch)
	}
}

// Renew makes a picture in which these resources count as changed although the
// store has them as they were: something else that they stand for has changed.
func (t *Tracker) Renew(keys ...resource.Key) {
	if len(keys) == 0 {
		return
	}
	t.mu.Lock()
	t.renewed = append(t.renewed, keys...)
	t.mu.Unlock()
	select {
	case t.renew <- struct{}{}:
	default:
	}
}

// renewals are the changes that Renew asks for, but of what changes anyway.
func (t *Tracker) renewals(pending []Change) (out []Change) {
	t.mu.Lock()
	keys := t.renewed
	t.renewed = nil
	t.mu.Unlock()
	known := map[resource.Key]bool{}
	for _, c := range pending {
		known[c.Key] = true
	}
	for _, k := range keys {
		if r := t.Now().Get(k); r != nil && !known[k] {
			known[k] = true
			out = append(out, Change{Key: k, New: r})
		}
	}
	return out
}

// Await returns when the picture is of the revision or a later one.
func (t *Tracker) Await(ctx context.Context, revision uint64) error {
	changed, stop := t.Subscribe()
	defer stop()
	for t.Now().Revision < revision {
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Run follows the store until ctx ends.
func (t *Tracker) Run(ctx context.Context) error {
	for {
		err := t.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, store.ErrTooOld) {
			return err
		}
		t.metrics.lost.Add(1)
		t.cfg.Log.Info("the tracker fell behind the store and reads all of it again")
	}
}

// follow reads everything, then watches until something ends it.
func (t *Tracker) follow(ctx context.Context) error {
	all, revision, err := t.cfg.Store.List(ctx, "", "")
	if err != nil {
		return err
	}
	t.publish(t.reread(all, revision))
	select {
	case <-t.ready:
	default:
		close(t.ready)
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type batch struct {
		events []store.Event
		err    error
	}
	batches := make(chan batch)
	go func() {
		// Also where a batch was under way at the end: the loop waits for this.
		defer close(batches)
		for events, err := range t.cfg.Store.Watch(ctx, revision) {
			select {
			case batches <- batch{events, err}:
			case <-ctx.Done():
				return
			}
		}
	}()

	var pending []Change
	var last uint64
	var first time.Time
	var due <-chan time.Time
	for {
		select {
		case b, open := <-batches:
			if !open {
				return ctx.Err()
			}
			if b.err != nil {
				return b.err
			}
			if len(pending) == 0 {
				first = time.Now()
			}
			for _, e := range b.events {
				pending = append(pending, Change{Key: e.Key, New: e.Resource})
				last = e.Revision
			}
			due = time.After(min(t.cfg.Quiet, max(0, t.cfg.Max-time.Since(first))))
		case <-t.renew:
			more := t.renewals(pending)
			if len(more) == 0 {
				continue
			}
			if len(pending) == 0 {
				first = time.Now()
			}
			pending = append(pending, more...)
			due = time.After(min(t.cfg.Quiet, max(0, t.cfg.Max-time.Since(first))))
		case <-due:
			t.publish(t.Now().with(max(last, t.Now().Revision), pending))
			pending, due = nil, nil
		}
	}
}

// reread makes a picture of everything, and finds what is gone.
func (t *Tracker) reread(all []*resource.Resource, revision uint64) *Picture {
	old := t.Now()
	there := make(map[resource.Key]bool, len(all))
	var changes []Change
	for _, r := range all {
		there[r.Key()] = true
		if o := old.Get(r.Key()); o == nil || o.Version != r.Version {
			changes = append(changes, Change{Key: r.Key(), New: r})
		}
	}
	gone := func(r *resource.Resource) {
		if !there[r.Key()] {
			changes = append(changes, Change{Key: r.Key()})
		}
	}
	for _, byName := range old.global {
		for _, r := range byName {
			gone(r)
		}
	}
	for _, m := range old.meshes {
		for _, k := range m.kinds {
			for _, r := range k.byName {
				gone(r)
			}
		}
	}
	return old.with(revision, changes)
}

func (t *Tracker) publish(p *Picture) {
	t.now.Store(p)
	t.metrics.pictures.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	for ch := range t.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}
