package cp

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
)

const (
	// maxHosts bounds how many names are resolved.
	maxHosts = 10_000
	// lookups bounds how many names are looked up at once.
	lookups = 8
	// lookupTimeout bounds one lookup.
	lookupTimeout = 5 * time.Second
	// firstLookup is how long configurations wait for the first answer of a name,
	// so that a control plane that starts takes no endpoint away.
	firstLookup = time.Second
)

// resolver knows the addresses of the host names that Dataplanes have in the
// place of addresses, since Envoy takes only IP addresses there. Names are
// looked up while they are in use: again and again, since nobody tells when one
// changes. When one does, the configurations that it matters to are made again.
// A lookup that fails changes nothing.
type resolver struct {
	// lookup asks the system.
	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)
	tracker *state.Tracker
	// every is how long an answer holds.
	every time.Duration
	log   *slog.Logger

	slots   chan struct{}
	wake    chan struct{}
	running sync.WaitGroup

	mu    sync.Mutex
	hosts map[string]*host
	ended bool
	ctx   context.Context // of all lookups; run ends it
	end   context.CancelFunc
}

// host is one name. resolver.mu guards it, but for what never changes.
type host struct {
	// known is closed when there was an answer, of whichever kind; wait is how
	// long to wait for that.
	known chan struct{}
	wait  time.Time
	// address is the one in use; invalid where there has not been any.
	address netip.Addr
	busy    bool
	failing bool
	// missed: somebody went on without the first answer.
	missed bool
}

func newResolver(tracker *state.Tracker, every time.Duration, log *slog.Logger) *resolver {
	r := &resolver{
		tracker: tracker, every: every, log: log, slots: make(chan struct{}, lookups), wake: make(chan struct{}, 1), hosts: map[string]*host{},
		lookup: func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		},
	}
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

// resolve returns a name's address, or nothing while none is known. It waits
// only for a name's very first answer, and not for long.
func (r *resolver) resolve(name string) []string {
	r.mu.Lock()
	h := r.hosts[name]
	if h == nil {
		if r.ended || len(r.hosts) >= maxHosts {
			r.mu.Unlock()
			return nil
		}
		h = &host{known: make(chan struct{}), wait: time.Now().Add(firstLookup)}
		r.hosts[name] = h
		r.start(name, h)
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
	r.mu.Unlock()
	select {
	case <-h.known:
	default:
		patience := time.NewTimer(time.Until(h.wait))
		defer patience.Stop()
		select {
		case <-h.known:
		case <-patience.C:
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !h.address.IsValid() {
		h.missed = true
		return nil
	}
	return []string{h.address.String()}
}

// start looks a name up beside. mu is held.
func (r *resolver) start(name string, h *host) {
	if h.busy || r.ended {
		return
	}
	h.busy = true
	r.running.Go(func() {
		select {
		case r.slots <- struct{}{}:
			defer func() { <-r.slots }()
		case <-r.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(r.ctx, lookupTimeout)
		defer cancel()
		found, err := r.lookup(ctx, name)
		if r.ctx.Err() == nil {
			r.answer(name, h, found, err)
		}
	})
}

// answer takes a lookup's result in.
func (r *resolver) answer(name string, h *host, found []netip.Addr, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h.busy = false
	was := h.address
	usable := choose(found, was)
	if usable.IsValid() {
		h.address = usable
	}
	failing := err != nil || !usable.IsValid()
	switch {
	case failing && !h.failing:
		reason := "it has no address that can be used"
		if err != nil {
			reason = err.Error()
		}
		r.log.Warn("the address of Dataplanes is a name that can't be resolved now; it will be tried again", "host", name, "still in use", was.IsValid(), "reason", reason)
	case !failing && h.failing:
		r.log.Info("the address of Dataplanes can be resolved again", "host", name)
	}
	h.failing = failing
	select {
	case <-h.known:
	default:
		close(h.known)
	}
	if h.address != was && (was.IsValid() || h.missed) {
		r.tracker.Renew(dataplanesAt(r.tracker.Now(), name)...)
	}
}

// choose returns one of a name's addresses: the one in use where it still is
// among them, so that their order does not matter; else the first by number, of
// IPv4 before IPv6.
func choose(found []netip.Addr, inUse netip.Addr) (best netip.Addr) {
	for _, a := range found {
		a = a.Unmap().WithZone("")
		switch {
		case !a.IsValid() || a.IsUnspecified() || a.IsMulticast():
		case a == inUse:
			return a
		case !best.IsValid() || a.Is4() && best.Is6() || a.Is4() == best.Is4() && a.Less(best):
			best = a
		}
	}
	return best
}

// run looks names up again until ctx ends. Without names it sleeps.
func (r *resolver) run(ctx context.Context) error {
	defer func() {
		r.mu.Lock()
		r.ended = true
		r.mu.Unlock()
		r.end()
		r.running.Wait()
	}()
	for {
		r.mu.Lock()
		some := len(r.hosts) > 0
		r.mu.Unlock()
		var again <-chan time.Time
		if some {
			again = time.After(r.every)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
			if !some {
				continue
			}
			// Another name: those that are known are not asked about any later.
			select {
			case <-ctx.Done():
				return nil
			case <-again:
			}
		case <-again:
		}
		r.refresh()
	}
}

// refresh looks up what is in use, and forgets what is not.
func (r *resolver) refresh() {
	used := hosts(r.tracker.Now())
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, h := range r.hosts {
		if !used[name] {
			delete(r.hosts, name)
			continue
		}
		r.start(name, h)
	}
}

// namesOf yields what stands in the place of a Dataplane's addresses and is a
// name.
func namesOf(d *mesh.DataplaneSpec, yield func(name string)) {
	if d.Networking == nil {
		return
	}
	add := func(address string) {
		if address == "" {
			return
		}
		if _, err := netip.ParseAddr(address); err != nil {
			yield(address)
		}
	}
	add(d.Networking.Address)
	add(d.Networking.AdvertisedAddress)
	for i := range d.Networking.Inbound {
		add(d.Networking.Inbound[i].Address)
		add(d.Networking.Inbound[i].ServiceAddress)
	}
}

// dataplanesAt are the Dataplanes that have the name.
func dataplanesAt(pic *state.Picture, name string) (out []resource.Key) {
	for r := range dataplanes(pic) {
		has := false
		namesOf(mesh.Dataplanes.From(r).Spec, func(n string) { has = has || n == name })
		if has {
			out = append(out, r.Key())
		}
	}
	return slices.Clip(out)
}

// hosts are all names that Dataplanes have.
func hosts(pic *state.Picture) map[string]bool {
	out := map[string]bool{}
	for r := range dataplanes(pic) {
		namesOf(mesh.Dataplanes.From(r).Spec, func(n string) { out[n] = true })
	}
	return out
}

// dataplanes yields all Dataplanes.
func dataplanes(pic *state.Picture) func(yield func(*resource.Resource) bool) {
	return func(yield func(*resource.Resource) bool) {
		for _, name := range pic.Meshes() {
			m := pic.Mesh(name)
			if m == nil {
				continue
			}
			for _, r := range m.List(mesh.Dataplanes.Name) {
				if !yield(r) {
					return
				}
			}
		}
	}
}
