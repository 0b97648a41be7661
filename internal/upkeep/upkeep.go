// Package upkeep is what one control plane does for all of a zone: what a new
// mesh is born with, the MeshServices that follow from Dataplanes, and the
// removal of what is left behind.
package upkeep

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/token"
)

// Config is what a Keeper needs.
type Config struct {
	Store   store.Store
	Tracker *state.Tracker
	// Kinds are those that exist here: defaults are made of no other.
	Kinds []*resource.Kind
	// Zone is this zone's name.
	Zone string
	// ServiceGrace is how long a generated MeshService outlives its last
	// Dataplane; the default is one hour.
	ServiceGrace time.Duration
	// CleanupAge is how long a Dataplane outlives the last stream of its proxy
	// where nobody withdrew it; the default is 72 hours.
	CleanupAge time.Duration
	// Here reports whether a proxy has a stream open now; it may be nil.
	Here func(mesh, name string) bool
	// SkipMesh: make no Mesh "default" at the very first start.
	SkipMesh bool
	// RoutingResources: also make the older allow-all TrafficPermission.
	RoutingResources bool
	// AdminToken: keep a token for the first administrator in a GlobalSecret.
	AdminToken bool
	// Authority makes the secrets of a builtin authority (certificate and key, PEM).
	Authority func(mesh string, b *mesh.Backend) (cert, key []byte, err error)
	Log       *slog.Logger
}

// Keeper does the upkeep. Prepare is called once before anything is served;
// Complete is called with each write of a Mesh; Run goes on beside.
type Keeper struct {
	cfg Config
	// spare holds a signing key that was made while there was time: making one
	// takes some tenths of a second, and a new Mesh wants one at once.
	spare   chan []byte
	metrics *Metrics
}

// New makes a keeper.
func New(cfg Config) *Keeper {
	if cfg.ServiceGrace == 0 {
		cfg.ServiceGrace = time.Hour
	}
	if cfg.CleanupAge == 0 {
		cfg.CleanupAge = 72 * time.Hour
	}
	return &Keeper{cfg, make(chan []byte), newMetrics()}
}

// Metrics returns what the keeper counts.
func (k *Keeper) Metrics() *Metrics { return k.metrics }

// Run keeps MeshServices and insights in line with the Dataplanes, whenever
// something changes.
func (k *Keeper) Run(ctx context.Context) error {
	changed, stop := k.cfg.Tracker.Subscribe()
	defer stop()
	select {
	case <-k.cfg.Tracker.Ready():
	case <-ctx.Done():
		return nil
	}
	var spares sync.WaitGroup
	defer spares.Wait()
	spares.Go(func() { k.makeSpares(ctx) })
	var seen *state.Picture
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			pic := k.cfg.Tracker.Now()
			changes, known := pic.Since(seen)
			insights := pic.InsightsSince(seen)
			if seen = pic; known && !insights && !matters(changes) {
				continue
			}
			again = k.tidy(ctx, pic)
		case <-again:
			again = k.tidy(ctx, k.cfg.Tracker.Now())
		}
	}
}

// makeSpares keeps a signing key at hand. At the start there is enough to do
// without it.
func (k *Keeper) makeSpares(ctx context.Context) {
	select {
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
		return
	}
	for {
		key, err := token.NewSigningKey()
		if err != nil {
			k.cfg.Log.Error("make a spare signing key", "error", err)
			return
		}
		select {
		case k.spare <- key:
		case <-ctx.Done():
			return
		}
	}
}

// signingKey returns a new signing key: the spare one, if it is there.
func (k *Keeper) signingKey() ([]byte, error) {
	select {
	case key := <-k.spare:
		return key, nil
	default:
		return token.NewSigningKey()
	}
}

// matters reports whether any of the changes has a part in what tidy does.
func matters(changes []state.Change) bool {
	for _, c := range changes {
		switch c.Key.Kind {
		case mesh.Meshes.Name, mesh.Dataplanes.Name, mesh.MeshServices.Name:
			return true
		}
	}
	return false
}

// tidy makes the writes that are due, and returns when to look again.
func (k *Keeper) tidy(ctx context.Context, pic *state.Picture) <-chan time.Time {
	now := time.Now()
	var next time.Time
	look := func(again time.Time) {
		if !again.IsZero() && (next.IsZero() || again.Before(next)) {
			next = again
		}
	}
	var writes []store.Write
	var generated, cleaned time.Duration
	for _, name := range pic.Meshes() {
		m := pic.Mesh(name)
		begun := time.Now()
		w, again := services(m, k.cfg.Zone, k.cfg.ServiceGrace, now, k.cfg.Log)
		writes = append(writes, w...)
		look(again)
		generated += time.Since(begun)
		begun = time.Now()
		w, again = expired(m, k.cfg.CleanupAge, now, k.cfg.Here)
		writes = append(writes, w...)
		look(again)
		cleaned += time.Since(begun)
		for _, r := range m.List(mesh.DataplaneInsights.Name) {
			if m.Get(mesh.Dataplanes.Name, r.Name) == nil {
				writes = append(writes, store.Write{Key: r.Key(), If: store.Condition{Version: r.Version}})
			}
		}
	}
	k.metrics.services.Observe(float64(generated) / float64(time.Millisecond))
	k.metrics.cleanup.Observe(float64(cleaned) / float64(time.Millisecond))
	// A write that another overtook is repeated when that one shows in the
	// picture; one at a time, so that it holds up no other.
	for _, w := range writes {
		_, err := k.cfg.Store.Put(ctx, w)
		if err == nil && w.Resource == nil && w.Key.Kind == mesh.Dataplanes.Name {
			k.metrics.removed.Inc()
			k.cfg.Log.Info("a Dataplane was deleted whose proxy had been gone for too long", "mesh", w.Key.Mesh, "name", w.Key.Name, "longer than", k.cfg.CleanupAge)
		}
		if err != nil && !errs.Is(err, errs.Conflict) && !errs.Is(err, errs.NotFound) && ctx.Err() == nil {
			k.cfg.Log.Error("upkeep could not write", "resource", w.Key.String(), "error", err)
			next = now.Add(5 * time.Second)
		}
	}
	if next.IsZero() {
		return nil
	}
	return time.After(time.Until(next))
}
