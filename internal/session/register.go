package session

import (
	"context"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// labelLeft marks a Dataplane whose proxy can't serve: it has just come and is
// still starting, or it has left and the Dataplane was made by the API. Its value
// lists the inbounds that would be ready, by their place, joined by dots. They
// are ready when the proxy says that it can serve.
const labelLeft = "kuma.io/left-inbounds"

// removeTimeout bounds the withdrawal of one Dataplane.
const removeTimeout = 30 * time.Second

func (k Key) resource() resource.Key { return mesh.Dataplanes.Key(k.Mesh, k.Name) }

// authFailed gives an error the beginning that the contract's users know.
func authFailed(err error) error {
	if err == nil || strings.HasPrefix(err.Error(), "authentication failed: ") {
		return err
	}
	return errs.New(errs.KindOf(err), "authentication failed: %w", err)
}

// register makes sure that the proxy's Dataplane is there, is covered by the
// credential, and shows in the picture.
func (st *Stream) register(ctx context.Context) error {
	s := st.session
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-st.ended:
		return st.cause
	case <-ctx.Done():
		return ctx.Err()
	}
	for attempt := 1; ; attempt++ {
		version, err := st.write(ctx)
		if errs.Is(err, errs.Conflict) && attempt < 5 {
			continue // another wrote meanwhile: what it wrote must be covered, too
		}
		if err != nil || version == 0 {
			return err
		}
		return st.reg.cfg.Tracker.Await(ctx, version)
	}
}

// write is one attempt to register. It returns the version of the Dataplane
// that is there then, or 0 where the picture need not be waited for. It is a
// Conflict where another has written the Dataplane meanwhile.
func (st *Stream) write(ctx context.Context) (version uint64, err error) {
	r, node := st.reg, st.Node
	old, err := r.cfg.Store.Get(ctx, node.resource())
	if err != nil && !errs.Is(err, errs.NotFound) {
		return 0, err
	}
	at := store.Condition{Absent: true}
	if err != nil {
		old = nil
	} else {
		version, at = old.Version, store.Condition{Version: old.Version}
		if err := st.Covers(mesh.Dataplanes.From(old)); err != nil {
			return 0, err
		}
	}
	if node.Link && st.Kind != Link {
		// The Dataplane comes over the link; until then ADS and HDS wait.
		return version, nil
	}
	if st.Leaving() {
		return 0, nil // it was withdrawn, and comes back only to end
	}
	var wanted *resource.Resource
	switch {
	case node.Dataplane != "":
		if wanted, err = st.brought(old); err != nil {
			return 0, err
		}
		if st.starts(old) {
			if d := departed(wanted); d != nil {
				wanted = d
			}
		}
	case old == nil:
		return 0, errs.New(errs.NotFound, "resource %q not found; create a Dataplane in Kuma CP first or pass it as an argument to kuma-dp", node.Key)
	case !st.starts(old):
		wanted = returned(old)
	case old.Labels[labelLeft] == "":
		wanted = departed(old)
	}
	if wanted == nil {
		return version, nil
	}
	change := admit.Change{Resource: wanted, If: at, Measured: node.Dataplane == ""}
	if old != nil {
		tried, err := r.cfg.Gate.Try(ctx, auth.ControlPlane(), change)
		if err != nil {
			return 0, err
		}
		if same(old, tried[0].Resource) {
			return version, nil
		}
	}
	put, err := r.cfg.Gate.Put(ctx, auth.ControlPlane(), change)
	if err != nil {
		return 0, err
	}
	r.cfg.Log.Info("a proxy has registered its Dataplane", "mesh", node.Mesh, "name", node.Name, "stream", st.Kind.String())
	return put[0].Resource.Version, nil
}

// brought reads the Dataplane that the proxy brings, as it should be stored.
func (st *Stream) brought(old *resource.Resource) (*resource.Resource, error) {
	d, err := readDataplane(st.Node.Dataplane)
	if err != nil {
		return nil, err
	}
	if d.Key() != st.Node.resource() {
		return nil, errs.New(errs.Invalid, "proxyId %s does not match proxy resource %s", st.Node.Key, Key{d.Mesh, d.Name})
	}
	if o := d.Labels[mesh.LabelOrigin]; o != "" && o != mesh.OriginZone {
		return nil, errs.New(errs.Denied, "the Dataplane's label %s is %q: a proxy can register a Dataplane of this zone alone; leave the label out", mesh.LabelOrigin, o)
	}
	// What the control plane computes is its own matter.
	d.Labels = maps.Clone(d.Labels)
	maps.DeleteFunc(d.Labels, func(k, _ string) bool {
		return slices.Contains([]string{
			mesh.LabelOrigin, mesh.LabelZone, mesh.LabelMesh, mesh.LabelEnv, mesh.LabelProxyType, mesh.LabelRegisteredBy, mesh.LabelManagedBy, labelLeft,
		}, k)
	})
	if old == nil || old.Labels[mesh.LabelRegisteredBy] == mesh.RegisteredByStream {
		if d.Labels == nil {
			d.Labels = map[string]string{}
		}
		d.Labels[mesh.LabelRegisteredBy] = mesh.RegisteredByStream
	}
	if err := st.Covers(mesh.Dataplanes.From(d)); err != nil {
		return nil, err
	}
	return d, nil
}

func readDataplane(doc string) (*resource.Resource, error) {
	b := []byte(doc)
	if !strings.HasPrefix(strings.TrimSpace(doc), "{") {
		var err error
		if b, err = yaml.YAMLToJSON(b); err != nil {
			return nil, errs.New(errs.Invalid, "the proxy's Dataplane is neither JSON nor YAML: %w", err)
		}
	}
	h, err := resource.Peek(b)
	if err != nil {
		return nil, errs.New(errs.Invalid, "the proxy's Dataplane can't be read: %w", err)
	}
	if h.Type != mesh.Dataplanes.Name {
		return nil, errs.New(errs.Invalid, "the resource that the proxy brings is a %s; it must be a %s", h.Type, mesh.Dataplanes.Name)
	}
	// A proxy may be newer than this control plane: what is not known here is
	// left out.
	d, err := resource.Decode(mesh.Dataplanes.Kind, b, true)
	if err != nil {
		return nil, errs.New(errs.Invalid, "the proxy's Dataplane: %w", err)
	}
	return d, nil
}

// same tells whether a write would change nothing.
func same(a, b *resource.Resource) bool {
	if !maps.Equal(a.Labels, b.Labels) {
		return false
	}
	if reflect.DeepEqual(a.Spec, b.Spec) {
		return true
	}
	x, errX := resource.Marshal(a.Spec)
	y, errY := resource.Marshal(b.Spec)
	return errX == nil && errY == nil && string(x) == string(y)
}

// starts reports whether the stream's proxy has just come and has yet to say
// that it can serve. Only one with a link says so. Who was here before a restart
// of this control plane is taken to be able still.
func (st *Stream) starts(old *resource.Resource) bool {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	s := st.session
	return st.Kind == Link && !s.arrived && (old == nil || s.succeeds || old.Labels[labelLeft] != "")
}

// Arrive takes in that the proxy can serve: from now on its inbounds get
// traffic. Errors are those of the store.
func (st *Stream) Arrive(ctx context.Context) error {
	r, s := st.reg, st.session
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	r.mu.Lock()
	done := s.arrived || s.leaving || r.sessions[s.key] != s
	r.mu.Unlock()
	if done {
		return nil
	}
	for attempt := 1; ; attempt++ {
		old, err := r.cfg.Store.Get(ctx, s.key.resource())
		if err == nil {
			err = st.Covers(mesh.Dataplanes.From(old))
		}
		if err == nil {
			if now := returned(old); now != nil {
				_, err = r.cfg.Gate.Put(ctx, auth.ControlPlane(), admit.Change{Resource: now, If: store.Condition{Version: old.Version}, Measured: true})
			}
		}
		if errs.Is(err, errs.Conflict) && attempt < 5 {
			continue
		}
		if err == nil {
			r.mu.Lock()
			s.arrived = true
			r.mu.Unlock()
		}
		return err
	}
}

// Leave withdraws a proxy that has said that it is about to end. It returns
// when the other proxies have been sent what follows, or settle has passed.
func (st *Stream) Leave(ctx context.Context, settle time.Duration) error {
	r, s := st.reg, st.session
	r.mu.Lock()
	s.leaving = true
	s.notify()
	r.mu.Unlock()
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	r.mu.Lock()
	holds := r.sessions[s.key] == s
	r.mu.Unlock()
	if !holds {
		return nil // the name is another's by now, and so is the Dataplane
	}
	version, err := r.withdraw(ctx, s.key, st.credential.Covers, true)
	if err != nil || version == 0 {
		return err
	}
	revision, err := r.awaitAfter(ctx, s.key, version)
	if err != nil {
		return err
	}
	r.cfg.Log.Info("a proxy is leaving", "mesh", s.key.Mesh, "name", s.key.Name)
	r.settled(ctx, revision, settle)
	return nil
}

// withdraw removes a Dataplane that a stream registered; of another, it takes
// the inbounds out of load balancing if mark is set. It returns the version of
// the Dataplane that was there, or 0 where nothing was to be done.
func (r *Registry) withdraw(ctx context.Context, key Key, covers func(mesh.Dataplane) error, mark bool) (uint64, error) {
	for attempt := 1; ; attempt++ {
		old, err := r.cfg.Store.Get(ctx, key.resource())
		if errs.Is(err, errs.NotFound) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		if err := covers(mesh.Dataplanes.From(old)); err != nil {
			return 0, err
		}
		at := store.Condition{Version: old.Version}
		switch {
		case old.Labels[mesh.LabelRegisteredBy] == mesh.RegisteredByStream:
			err = r.cfg.Gate.Delete(ctx, auth.ControlPlane(), mesh.Dataplanes.Kind, key.resource(), at)
			if errs.Is(err, errs.NotFound) {
				return 0, nil
			}
		case mark:
			left := departed(old)
			if left == nil {
				return 0, nil
			}
			_, err = r.cfg.Gate.Put(ctx, auth.ControlPlane(), admit.Change{Resource: left, If: at, Measured: true})
		default:
			return 0, nil
		}
		if errs.Is(err, errs.Conflict) && attempt < 5 {
			continue
		}
		return old.Version, err
	}
}

// departed is a Dataplane whose ready inbounds are out of load balancing; nil
// where there is nothing to change.
func departed(old *resource.Resource) *resource.Resource {
	spec := old.Spec.(*mesh.DataplaneSpec).Clone()
	if spec.Networking == nil {
		return nil
	}
	var places []string
	for i := range spec.Networking.Inbound {
		if in := &spec.Networking.Inbound[i]; in.IsReady() {
			places = append(places, strconv.Itoa(i))
			in.State, in.Health = mesh.NotReady, nil
		}
	}
	mark := strings.Join(places, ".")
	if mark == "" || len(mark) > 63 {
		return nil // nothing to do, or too much to remember: then it stays as it is
	}
	return with(old, spec, mark)
}

// returned is a Dataplane whose proxy can serve (again): what departed did is
// undone.
func returned(old *resource.Resource) *resource.Resource {
	mark := old.Labels[labelLeft]
	if mark == "" {
		return nil
	}
	spec := old.Spec.(*mesh.DataplaneSpec).Clone()
	for place := range strings.SplitSeq(mark, ".") {
		i, err := strconv.Atoi(place)
		if err != nil || spec.Networking == nil || i < 0 || i >= len(spec.Networking.Inbound) {
			continue
		}
		// What was measured meanwhile counts.
		if in := &spec.Networking.Inbound[i]; in.State == mesh.NotReady && (in.Health == nil || in.Health.Ready) {
			in.State, in.Health = "", nil // which means ready
		}
	}
	return with(old, spec, "")
}

func with(old *resource.Resource, spec *mesh.DataplaneSpec, mark string) *resource.Resource {
	made := *old
	made.Spec = spec
	made.Labels = maps.Clone(old.Labels)
	delete(made.Labels, labelLeft)
	if mark != "" {
		if made.Labels == nil {
			made.Labels = map[string]string{}
		}
		made.Labels[labelLeft] = mark
	}
	return &made
}

// awaitAfter returns when the picture no longer shows this version of a
// Dataplane, and the picture's revision then.
func (r *Registry) awaitAfter(ctx context.Context, key Key, version uint64) (uint64, error) {
	changed, stop := r.cfg.Tracker.Subscribe()
	defer stop()
	for {
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
		pic := r.cfg.Tracker.Now()
		if d := pic.Get(key.resource()); pic.Revision >= version && (d == nil || d.Version > version) {
			return pic.Revision, nil
		}
	}
}

// expire withdraws a proxy whose last stream ended a while ago.
func (r *Registry) expire(s *session) {
	ctx, cancel := context.WithTimeout(context.Background(), removeTimeout)
	defer cancel()
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return
	}
	r.mu.Lock()
	over := r.sessions[s.key] == s && s.open == 0 && !r.stopping
	credential := s.credential
	r.mu.Unlock()
	if !over {
		return
	}
	// The session stays for as long as its Dataplane goes, so that who comes
	// now waits for its turn.
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.sessions[s.key] == s && s.open == 0 {
			delete(r.sessions, s.key)
		}
	}()
	log := r.cfg.Log.With("mesh", s.key.Mesh, "name", s.key.Name)
	switch version, err := r.withdraw(ctx, s.key, credential.Covers, false); {
	case err != nil:
		log.Warn("the Dataplane of a proxy that is gone could not be removed", "error", err)
	case version != 0:
		log.Info("a proxy is gone and its Dataplane was removed")
	}
}

// sweep withdraws the Dataplanes that streams of an earlier life of this
// control plane registered and that have no stream now.
func (r *Registry) sweep(ctx context.Context) {
	pic := r.cfg.Tracker.Now()
	for _, m := range pic.Meshes() {
		for _, d := range pic.Mesh(m).List(mesh.Dataplanes.Name) {
			if ctx.Err() != nil {
				return
			}
			if d.Labels[mesh.LabelRegisteredBy] == mesh.RegisteredByStream {
				r.sweepOne(ctx, Key{d.Mesh, d.Name})
			}
		}
	}
}

func (r *Registry) sweepOne(ctx context.Context, key Key) {
	r.mu.Lock()
	if r.sessions[key] != nil {
		r.mu.Unlock()
		return
	}
	// A session without streams stands for the key while its Dataplane goes, so
	// that who comes now waits for its turn.
	s := &session{key: key, turn: make(chan struct{}, 1)}
	s.turn <- struct{}{}
	r.sessions[key] = s
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		if r.sessions[key] == s {
			delete(r.sessions, key)
		}
		r.mu.Unlock()
		<-s.turn
	}()
	if _, err := r.withdraw(ctx, key, func(mesh.Dataplane) error { return nil }, false); err != nil {
		r.cfg.Log.Warn("the Dataplane of a proxy that did not come back could not be removed", "mesh", key.Mesh, "name", key.Name, "error", err)
		return
	}
	r.cfg.Log.Info("a proxy did not come back and its Dataplane was removed", slog.String("mesh", key.Mesh), slog.String("name", key.Name))
}
