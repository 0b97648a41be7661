package session

import (
	"context"
	"strings"
	"time"

	"kuma/internal/mesh"
	"kuma/internal/state"
)

// Run watches for what ends streams from outside (a token's revocation, a
// signing key that is gone) until ctx ends; then no Dataplane is removed any
// more, since the proxies will find another control plane or this one again.
func (r *Registry) Run(ctx context.Context) error {
	defer r.stopAll()
	select {
	case <-r.cfg.Tracker.Ready():
	case <-ctx.Done():
		return nil
	}
	changed, stop := r.cfg.Tracker.Subscribe()
	defer stop()
	grace := time.After(r.cfg.Grace)
	seen := r.cfg.Tracker.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-grace:
			r.sweep(ctx)
		case <-changed:
			pic := r.cfg.Tracker.Now()
			r.recheck(ctx, pic, seen)
			seen = pic
		}
	}
}

// stopAll keeps all Dataplanes as they are.
func (r *Registry) stopAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopping = true
	for _, s := range r.sessions {
		s.stop()
	}
}

// recheck verifies the credentials of all open streams again where secrets that
// they rest on have changed.
func (r *Registry) recheck(ctx context.Context, pic, seen *state.Picture) {
	changes, known := pic.Since(seen)
	meshes, all := map[string]bool{}, !known
	for _, c := range changes {
		if !strings.HasPrefix(c.Key.Name, "dataplane-token-") {
			continue
		}
		switch c.Key.Kind {
		case mesh.Secrets.Name:
			meshes[c.Key.Mesh] = true
		case mesh.GlobalSecrets.Name:
			all = true
		}
	}
	if !all && len(meshes) == 0 {
		return
	}
	r.mu.Lock()
	var open []*Stream
	for key, s := range r.sessions {
		if !all && !meshes[key.Mesh] {
			continue
		}
		for _, st := range s.streams {
			if st != nil {
				open = append(open, st)
			}
		}
	}
	r.mu.Unlock()
	for _, st := range open {
		err := r.cfg.Credentials.Again(ctx, st.credential)
		if err == nil || ctx.Err() != nil {
			continue
		}
		r.cfg.Log.Warn("a proxy's credential no longer holds; its stream ends", "mesh", st.Node.Mesh, "name", st.Node.Name, "stream", st.Kind.String(), "error", err)
		r.mu.Lock()
		st.end(err)
		r.mu.Unlock()
	}
}

// barrier is someone who waits for all streams to have handled a revision.
type barrier struct {
	revision uint64
	pending  map[*Stream]struct{}
	over     chan struct{}
}

// done takes a stream off the list. Registry.mu is held.
func (b *barrier) done(st *Stream) {
	if _, ok := b.pending[st]; !ok {
		return
	}
	delete(b.pending, st)
	if len(b.pending) == 0 {
		close(b.over)
	}
}

// Handled says that the stream's loop has sent what follows from the picture
// of this revision.
func (st *Stream) Handled(revision uint64) {
	st.handled.Store(revision)
	r := st.reg
	if r.waiting.Load() == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for b := range r.barriers {
		if b.revision <= revision {
			b.done(st)
		}
	}
}

// settled returns when every ADS stream has handled the revision, or the
// timeout has passed.
func (r *Registry) settled(ctx context.Context, revision uint64, timeout time.Duration) {
	b := &barrier{revision: revision, pending: map[*Stream]struct{}{}, over: make(chan struct{})}
	// From here on Handled takes the lock, so that nothing is missed.
	r.waiting.Add(1)
	defer r.waiting.Add(-1)
	r.mu.Lock()
	for _, s := range r.sessions {
		if st := s.streams[ADS]; st != nil && !s.leaving && st.handled.Load() < revision {
			b.pending[st] = struct{}{}
		}
	}
	if len(b.pending) == 0 {
		r.mu.Unlock()
		return
	}
	r.barriers[b] = struct{}{}
	r.mu.Unlock()
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-b.over:
	case <-t.C:
	case <-ctx.Done():
	}
	r.mu.Lock()
	delete(r.barriers, b)
	r.mu.Unlock()
}
