package store

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

const (
	// MaxRecord is the largest resource that a Keeper takes, in bytes of its JSON.
	MaxRecord = 16 << 20
	// maxGroup is how many bytes of records go together at most, where it is
	// not one call of Put that has more.
	maxGroup = 32 << 20
)

// Record is a resource as it is kept outside memory. Without a payload, it is
// deleted.
type Record struct {
	Key resource.Key
	// Payload is what resource.Freeze made of it.
	Payload []byte
	// Revision is that of the transaction.
	Revision uint64
}

// Keeper is what stores have in common that hold everything in memory, and keep
// it elsewhere too. The other place is the truth: a write is there before
// anyone sees it, and reads never ask it. Writes that arrive while another is on
// its way go together, each with its own conditions, revision and outcome.
type Keeper struct {
	// Memory answers reads. It is there after Start.
	*Memory
	place  Place
	kinds  map[string]*resource.Kind
	hidden map[resource.Key]error
	loaded []*resource.Resource
	// foreign counts the resources of each kind that isn't known.
	foreign map[string]int

	// turn holds one token, which who writes has.
	turn chan struct{}

	mu    sync.Mutex
	queue []*pendingPut
}

// Place is where a Keeper keeps resources.
type Place struct {
	// Name is said in messages: "the store file /var/lib/kuma.db".
	Name string
	// MaxKey is the longest kind, mesh and name together, in bytes.
	MaxKey int
	// Kinds are those that are shown. Resources of others stay there, unseen.
	Kinds []*resource.Kind
	// Log is told about what is there and can't be shown. Required.
	Log *slog.Logger
	// Ready is called before each Write; its error refuses what waits.
	Ready func() error
	// Write makes records durable, all or none, and brings the place to the
	// plan's revision. Its errors are for the callers of Put. Neither it nor
	// Ready is ever called twice at once.
	Write func(plan *Plan, records []Record) error
}

// pendingPut is a call of Put that waits for its outcome.
type pendingPut struct {
	writes   []Write
	revision uint64
	err      error
	done     chan struct{}
}

// NewKeeper returns a Keeper for what is there, which is told by Load, and then
// Start.
func NewKeeper(place Place) *Keeper {
	k := &Keeper{place: place, kinds: map[string]*resource.Kind{}, turn: make(chan struct{}, 1)}
	for _, kind := range place.Kinds {
		k.kinds[kind.Name] = kind
	}
	k.Forget()
	return k
}

// Forget drops what was loaded, for a loading that begins again.
func (k *Keeper) Forget() {
	k.loaded, k.hidden, k.foreign = nil, map[resource.Key]error{}, map[string]int{}
}

// Load takes a record that is there. One that can't be decoded is logged and
// hidden: it is not shown, and not written over.
func (k *Keeper) Load(key resource.Key, payload []byte) {
	kind := k.kinds[key.Kind]
	if kind == nil {
		k.foreign[key.Kind]++
		return
	}
	r, err := resource.Thaw(kind, payload)
	if err == nil && r.Key() != key {
		err = fmt.Errorf("it says of itself that it is %s", r.Key())
	}
	if err != nil {
		k.hidden[key] = err
		k.place.Log.Error("a resource in the store can't be read by this version; it stays there, and everything goes on as if it weren't", "resource", key.String(), "store", k.place.Name, "error", err)
		return
	}
	k.loaded = append(k.loaded, r)
}

// Start ends the loading: the Keeper now holds what was loaded, at the
// revision.
func (k *Keeper) Start(revision uint64) {
	for kind, n := range k.foreign {
		k.place.Log.Warn("the store has resources of a kind that this version doesn't know; they stay there, unseen", "kind", kind, "resources", n, "store", k.place.Name)
	}
	k.Memory = NewMemory(revision, k.loaded)
	k.loaded = nil
}

// Put is Store's.
func (k *Keeper) Put(ctx context.Context, writes ...Write) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, errs.New(errs.Unavailable, "nothing was written: %w", err)
	}
	if len(writes) == 0 {
		return k.Revision(), nil
	}
	p := &pendingPut{writes: writes, done: make(chan struct{})}
	k.mu.Lock()
	k.queue = append(k.queue, p)
	k.mu.Unlock()
	select {
	case <-p.done:
	case k.turn <- struct{}{}:
		// Whoever had the turn before may have done it already; or there is so
		// much before it that it takes several goes.
		for !p.finished() {
			k.commit()
		}
		<-k.turn
	case <-ctx.Done():
		if k.withdraw(p) {
			return 0, errs.New(errs.Unavailable, "nothing was written: %w", ctx.Err())
		}
		<-p.done
	}
	return p.revision, p.err
}

// Exclusive runs f while no write is on its way, or returns the context's
// error where it ends before that.
func (k *Keeper) Exclusive(ctx context.Context, f func()) error {
	select {
	case k.turn <- struct{}{}:
		defer func() { <-k.turn }()
		f()
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *pendingPut) finished() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// withdraw takes a put back, unless it is on its way already.
func (k *Keeper) withdraw(p *pendingPut) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := slices.Index(k.queue, p)
	if i < 0 {
		return false
	}
	k.queue = slices.Delete(k.queue, i, i+1)
	return true
}

// commit writes what is queued in one go, and gives each its outcome. The
// caller has the turn.
func (k *Keeper) commit() {
	k.mu.Lock()
	group := k.queue
	k.queue = nil
	k.mu.Unlock()
	if len(group) == 0 {
		return
	}
	err := k.place.Ready()
	if err == nil {
		var plan *Plan
		var records []Record
		group, plan, records = k.prepare(group)
		if len(records) > 0 {
			if err = k.place.Write(plan, records); err == nil {
				k.Publish(plan)
			}
		}
	}
	for _, p := range group {
		if err != nil && p.err == nil {
			p.revision, p.err = 0, err
		}
		close(p.done)
	}
}

// prepare plans the first of a group, up to maxGroup, and queues the others
// again before all that came since.
func (k *Keeper) prepare(group []*pendingPut) ([]*pendingPut, *Plan, []Record) {
	plan, now := k.Plan(), time.Now()
	var all []Record
	size := 0
	for i, p := range group {
		events, records, err := k.check(plan, now, p.writes)
		if err != nil {
			p.err = err
			continue
		}
		sum := 0
		for _, r := range records {
			sum += len(r.Payload)
		}
		if size > 0 && size+sum > maxGroup {
			k.mu.Lock()
			k.queue = append(slices.Clone(group[i:]), k.queue...)
			k.mu.Unlock()
			return group[:i], plan, all
		}
		size += sum
		plan.Accept(events)
		p.revision = plan.Revision()
		all = append(all, records...)
	}
	return group, plan, all
}

// check tells what a put changes, and how that is kept.
func (k *Keeper) check(plan *Plan, now time.Time, writes []Write) ([]Event, []Record, error) {
	for _, w := range writes {
		if why, ok := k.hidden[w.Key]; ok {
			return nil, nil, errs.New(errs.Conflict, "%s is in %s already, written in a way that this version can't read (%w): change it with the version that wrote it", w.Key, k.place.Name, why)
		}
		if k.kinds[w.Key.Kind] == nil {
			return nil, nil, errs.New(errs.Internal, "write %s: the store does not know this kind", w.Key)
		}
	}
	events, err := plan.Check(now, writes)
	if err != nil {
		return nil, nil, err
	}
	records := make([]Record, len(events))
	for i, e := range events {
		records[i] = Record{Key: e.Key, Revision: e.Revision}
		if err := k.checkKey(e.Key); err != nil {
			return nil, nil, err
		}
		if e.Resource == nil {
			continue
		}
		payload, err := resource.Freeze(e.Resource)
		if err != nil {
			return nil, nil, errs.New(errs.Internal, "write: %w", err)
		}
		if len(payload) > MaxRecord {
			return nil, nil, errs.New(errs.Invalid, "write %s: it has %d bytes, the limit is %d", e.Key, len(payload), MaxRecord)
		}
		records[i].Payload = payload
	}
	return events, records, nil
}

func (k *Keeper) checkKey(key resource.Key) error {
	for _, part := range []string{key.Kind, key.Mesh, key.Name} {
		if strings.ContainsRune(part, 0) {
			return errs.New(errs.Invalid, "write %s: a name can't have a NUL character in it", key)
		}
		if !utf8.ValidString(part) {
			return errs.New(errs.Invalid, "write %s: a name must be UTF-8", key)
		}
	}
	if n := len(key.Kind) + len(key.Mesh) + len(key.Name); n > k.place.MaxKey {
		return errs.New(errs.Invalid, "write a %s: its mesh and name have %d bytes, the limit is %d", key.Kind, n, k.place.MaxKey)
	}
	return nil
}
