// Package admit is the one gate for writes. Who writes a resource, by the API,
// by a proxy's stream or as a part of the control plane, does it here: may the
// caller, are defaults and labels filled in, is the specification sound, does
// what it refers to exist, do the mesh's rules hold. What passes is stored in
// one transaction, or nothing is.
package admit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// MeshHook adds what a new or changed Mesh needs: authorities, signing keys,
// default policies. It is asked inside a write and changes nothing itself, so
// that the Mesh and its needs are stored together. Old is nil for a new Mesh.
// An error with fields says what is wrong with the Mesh.
type MeshHook interface {
	Complete(ctx context.Context, new, old *resource.Resource) ([]store.Write, error)
}

// Config is what a Gate needs.
type Config struct {
	// Store is where resources are kept.
	Store store.Store
	// Access says who may write what.
	Access *auth.Access
	// Zone is this control plane's zone.
	Zone string
	// ReadOnly refuses all writes but the control plane's own.
	ReadOnly bool
	// UnsafeDelete lets a Mesh be deleted that still has Dataplanes.
	UnsafeDelete bool
	// Meshes may be nil.
	Meshes MeshHook
	// Log may be nil.
	Log *slog.Logger
}

// Gate is the one gate for writes. It is safe for concurrent use.
type Gate struct {
	cfg Config
	// meshes is held for writing while a Mesh or what it refers to changes, so
	// that a mesh can't vanish between a check and a write, nor gain a
	// Dataplane while it is deleted.
	meshes sync.RWMutex
}

// New makes a Gate.
func New(c Config) *Gate {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Gate{cfg: c}
}

// ErrNoMesh is in the chain of the error for a resource whose mesh does not
// exist, and in which everything that can be checked without it is sound.
var ErrNoMesh = errors.New("the mesh does not exist")

// Change is one resource to be created or changed.
type Change struct {
	// Resource is what is wanted, with its defaults, as resource.Decode gives
	// them. It is not changed.
	Resource *resource.Resource
	// At is the key by which the caller addresses the resource, which must be
	// the resource's own. The zero value demands nothing.
	At resource.Key
	// If says what must hold of what is stored now. Without it, the change is
	// made on whatever is there.
	If store.Condition
	// Measured: the inbounds' states were measured by the control plane, and
	// are kept as they are here. Otherwise inbounds with a probe start
	// NotReady and later keep the state that was measured.
	Measured bool
}

// Result is what became of a Change.
type Result struct {
	// Resource is the state that was (or, for Try, would be) written; its
	// Version is that of the store.
	Resource *resource.Resource
	// Created: it did not exist before.
	Created bool
	// Warnings are for people: deprecated fields.
	Warnings []string
}

// attempts bounds how often a write is planned anew where other writers
// overtake it. Each time the caller's own condition is held against what is
// there then.
const attempts = 10

// Put makes all changes in one transaction, or none. Errors: Denied,
// NotAllowed, Invalid with fields, Conflict where a condition does not hold,
// or the store's.
func (g *Gate) Put(ctx context.Context, caller auth.Caller, changes ...Change) ([]Result, error) {
	return g.put(ctx, caller, false, changes)
}

// Try does all that Put does but write.
func (g *Gate) Try(ctx context.Context, caller auth.Caller, changes ...Change) ([]Result, error) {
	return g.put(ctx, caller, true, changes)
}

func (g *Gate) put(ctx context.Context, caller auth.Caller, dry bool, changes []Change) ([]Result, error) {
	unlock := g.lock(!dry && slices.ContainsFunc(changes, func(c Change) bool { return c.Resource.Kind.Name == mesh.Meshes.Name }))
	defer unlock()
	for attempt := 1; ; attempt++ {
		results, writes, err := g.plan(ctx, caller, changes)
		if err != nil || dry || len(writes) == 0 {
			return results, err
		}
		revision, err := g.cfg.Store.Put(ctx, writes...)
		if errs.Is(err, errs.Conflict) && attempt < attempts {
			continue
		}
		if err != nil {
			return nil, err
		}
		for i := range results {
			stored := *results[i].Resource
			stored.Version = revision
			results[i].Resource = &stored
			g.log(ctx, caller, "resource written", stored.Key(), revision)
		}
		return results, nil
	}
}

// lock keeps meshes as they are; exclusive is for those who change them.
func (g *Gate) lock(exclusive bool) (unlock func()) {
	if exclusive {
		g.meshes.Lock()
		return g.meshes.Unlock
	}
	g.meshes.RLock()
	return g.meshes.RUnlock
}

func (g *Gate) log(ctx context.Context, caller auth.Caller, what string, key resource.Key, revision uint64) {
	level := slog.LevelInfo
	if caller.IsControlPlane() {
		level = slog.LevelDebug
	}
	g.cfg.Log.LogAttrs(ctx, level, what, slog.String("type", key.Kind), slog.String("mesh", key.Mesh), slog.String("name", key.Name),
		slog.String("caller", caller.Name()), slog.Uint64("revision", revision))
}

// plan checks all changes and returns what is to be written.
func (g *Gate) plan(ctx context.Context, caller auth.Caller, changes []Change) ([]Result, []store.Write, error) {
	batch := map[resource.Key]*resource.Resource{}
	for _, c := range changes {
		key := c.Resource.Key()
		if _, twice := batch[key]; twice {
			return nil, nil, errs.New(errs.Invalid, "%s is there twice in one request", key)
		}
		batch[key] = c.Resource
	}
	results := make([]Result, 0, len(changes))
	var writes []store.Write
	planned := map[resource.Key]bool{}
	for _, c := range changes {
		r, old, more, err := g.check(ctx, caller, c, batch)
		if err != nil {
			if len(changes) > 1 {
				err = errs.New(errs.KindOf(err), "%s: %w", c.Resource.Key(), err)
			}
			return nil, nil, err
		}
		result := Result{Resource: r, Created: old == nil}
		if w, ok := r.Spec.(interface{ Warnings() []string }); ok {
			result.Warnings = w.Warnings()
		}
		results = append(results, result)
		own := store.Write{Key: r.Key(), Resource: r, If: c.If}
		if c.If == (store.Condition{}) {
			own.If = store.Condition{Absent: old == nil}
			if old != nil {
				own.If.Version = old.Version
			}
		}
		writes = append(writes, own)
		planned[own.Key] = true
		for _, w := range more {
			if planned[w.Key] || batch[w.Key] != nil {
				continue // the caller's own wins
			}
			planned[w.Key] = true
			if w.Resource != nil {
				made := *w.Resource
				made.Labels = g.labels(&made)
				w.Resource = &made
			}
			writes = append(writes, w)
		}
	}
	return results, writes, nil
}

// check passes one change through all rules, and returns the resource to be
// stored, what it replaces, and what must be written with it.
func (g *Gate) check(ctx context.Context, caller auth.Caller, c Change, batch map[resource.Key]*resource.Resource) (r, old *resource.Resource, more []store.Write, err error) {
	k := c.Resource.Kind
	if err := g.Writable(caller, k); err != nil {
		return nil, nil, nil, err
	}
	copied := *c.Resource
	r = &copied
	if old, err = g.get(ctx, r.Key()); err != nil {
		return nil, nil, nil, err
	}
	if d, ok := r.Spec.(*mesh.DataplaneSpec); ok {
		r.Spec = g.dataplane(d, old, c.Measured)
	}
	if k.Check != nil {
		if err := errs.Fields(k.Check(r.Spec)...); err != nil {
			return nil, nil, nil, err
		}
	}
	if !caller.IsControlPlane() {
		r.Status = nil
	}
	if r.Status == nil && old != nil {
		r.Status = old.Status
	}
	bad := names(r, c.At, old == nil)
	bad = append(bad, g.checkLabels(caller, r)...)
	if err := errs.Fields(bad...); err != nil {
		return nil, nil, nil, err
	}
	if r.Kind.Name == mesh.GlobalSecrets.Name && r.Name == mesh.ControlPlaneCA {
		if err := pki.CheckKept(mesh.GlobalSecrets.From(r).Spec.Data); err != nil {
			return nil, nil, nil, errs.Fields(errs.Field{Path: "data", Message: fmt.Sprintf("the secret %q is for the control plane's own authority, which replaces it by kumactl ca rotate control-plane; what is given is not a copy of one: %v", r.Name, err)})
		}
	}
	r.Labels = g.labels(r)
	if !caller.IsControlPlane() {
		if err := errs.Fields(keepLabels(r, old)...); err != nil {
			return nil, nil, nil, err
		}
	}
	own := store.Write{Key: r.Key(), Resource: r, If: c.If}
	if err := own.Check(old); err != nil {
		return nil, nil, nil, err
	}
	more, err = g.refer(ctx, r, old, batch)
	return r, old, more, err
}

// refer checks what a resource stands in relation to.
func (g *Gate) refer(ctx context.Context, r, old *resource.Resource, batch map[resource.Key]*resource.Resource) ([]store.Write, error) {
	if r.Kind.Scope == resource.Mesh {
		key := mesh.Meshes.Key("", r.Mesh)
		m := batch[key]
		if m == nil {
			var err error
			if m, err = g.get(ctx, key); err != nil {
				return nil, err
			}
		}
		if m == nil {
			return nil, &errs.Error{Kind: errs.Invalid, Cause: ErrNoMesh, Fields: []errs.Field{{Path: "mesh", Message: fmt.Sprintf("mesh %q does not exist", r.Mesh)}}}
		}
		if r.Kind.Name == mesh.Dataplanes.Name {
			if reason, ok := mesh.Meshes.From(m).Spec.Admitted(r.Mesh, r.Spec.(*mesh.DataplaneSpec)); !ok {
				return nil, errs.Fields(errs.Field{Path: "networking", Message: reason})
			}
		}
		return nil, nil
	}
	if r.Kind.Name != mesh.Meshes.Name {
		return nil, nil
	}
	if old != nil {
		is, was := r.Spec.(*mesh.MeshSpec).EnabledBackend(), old.Spec.(*mesh.MeshSpec).EnabledBackend()
		if is != nil && was != nil && is.Name != was.Name {
			return nil, errs.Fields(errs.Field{Path: "mtls.enabledBackend", Message: "Changing CA when mTLS is enabled is forbidden. Disable mTLS first and then change the CA"})
		}
	}
	if g.cfg.Meshes == nil {
		return nil, nil
	}
	return g.cfg.Meshes.Complete(ctx, r, old)
}

// Writable tells whether the caller may write resources of the kind at all.
// Errors are Denied or NotAllowed.
func (g *Gate) Writable(caller auth.Caller, k *resource.Kind) error {
	if caller.IsControlPlane() {
		return nil
	}
	if err := g.cfg.Access.Write(caller, k); err != nil {
		return err
	}
	switch {
	case g.cfg.ReadOnly:
		return errs.New(errs.NotAllowed, "This control plane's API is read-only. Change the resource where it comes from, or set apiServer.readOnly to false.\n")
	case k.ReadOnly:
		return errs.New(errs.NotAllowed, "On zone control plane you can only modify zone resources. %s is written by the control plane alone.\n", k.Name)
	}
	return nil
}

// Delete removes a resource, a Mesh with all that is in it. Errors: Denied,
// NotAllowed, NotFound, Invalid with fields where it is in use, Conflict where
// the condition does not hold.
func (g *Gate) Delete(ctx context.Context, caller auth.Caller, k *resource.Kind, key resource.Key, cond store.Condition) error {
	if err := g.Writable(caller, k); err != nil {
		return err
	}
	unlock := g.lock(k.Name == mesh.Meshes.Name || k.Name == mesh.Secrets.Name)
	defer unlock()
	for attempt := 1; ; attempt++ {
		old, err := g.cfg.Store.Get(ctx, key)
		if err != nil {
			return err
		}
		own := store.Write{Key: key, If: cond}
		if err := own.Check(old); err != nil {
			return err
		}
		own.If = store.Condition{Version: old.Version}
		more, err := g.release(ctx, old)
		if err != nil {
			return err
		}
		revision, err := g.cfg.Store.Put(ctx, append(more, own)...)
		if (errs.Is(err, errs.Conflict) || errs.Is(err, errs.NotFound)) && attempt < attempts {
			continue // overtaken: look again
		}
		if err != nil {
			return err
		}
		g.log(ctx, caller, "resource deleted", key, revision)
		return nil
	}
}

// release checks that nothing needs the resource and returns what goes with it.
func (g *Gate) release(ctx context.Context, r *resource.Resource) ([]store.Write, error) {
	switch r.Kind.Name {
	case mesh.Meshes.Name:
		all, _, err := g.cfg.Store.List(ctx, "", r.Name)
		if err != nil {
			return nil, err
		}
		var writes []store.Write
		for _, in := range all {
			if in.Mesh != r.Name {
				continue
			}
			if in.Kind.Name == mesh.Dataplanes.Name && !g.cfg.UnsafeDelete {
				return nil, errs.Fields(errs.Field{Path: "mesh", Message: "unable to delete mesh, there are still some dataplanes attached"})
			}
			writes = append(writes, store.Remove(in.Key()))
		}
		return writes, nil
	case mesh.Dataplanes.Name:
		key := mesh.DataplaneInsights.Key(r.Mesh, r.Name)
		insight, err := g.get(ctx, key)
		if err != nil || insight == nil {
			return nil, err
		}
		return []store.Write{store.Remove(key)}, nil
	case mesh.Secrets.Name:
		m, err := g.get(ctx, mesh.Meshes.Key("", r.Mesh))
		if err != nil || m == nil {
			return nil, err
		}
		if backend := usedBy(m, r.Name); backend != "" {
			return nil, errs.Fields(errs.Field{Path: "name", Message: fmt.Sprintf("The secret %q that you are trying to remove is currently in use in Mesh %q in mTLS backend %q. Please remove the reference from the %q backend before removing the secret.", r.Name, r.Mesh, backend, backend)})
		}
	}
	return nil, nil
}

// get returns a resource, or nil where there is none.
func (g *Gate) get(ctx context.Context, key resource.Key) (*resource.Resource, error) {
	r, err := g.cfg.Store.Get(ctx, key)
	if errs.Is(err, errs.NotFound) {
		return nil, nil
	}
	return r, err
}

// dataplane returns a Dataplane's specification with this zone's tag, and with
// the states of its inbounds.
func (g *Gate) dataplane(spec *mesh.DataplaneSpec, old *resource.Resource, measured bool) *mesh.DataplaneSpec {
	if spec.Networking == nil {
		return spec
	}
	spec = spec.Clone()
	n := spec.Networking
	for i := range n.Inbound {
		in := &n.Inbound[i]
		if len(in.Tags) > 0 {
			in.Tags[mesh.TagZone] = g.cfg.Zone
		}
		if in.ServiceProbe == nil || measured {
			continue
		}
		in.State, in.Health = mesh.NotReady, &mesh.Health{}
		if old == nil {
			continue
		}
		if was := old.Spec.(*mesh.DataplaneSpec).Networking; was != nil {
			for j := range was.Inbound {
				if b := &was.Inbound[j]; b.Port == in.Port && b.ListenAddress(was) == in.ListenAddress(n) && b.ServiceProbe != nil {
					in.State, in.Health = b.State, b.Health
				}
			}
		}
	}
	if gw := n.Gateway; gw != nil && len(gw.Tags) > 0 {
		gw.Tags[mesh.TagZone] = g.cfg.Zone
	}
	return spec
}

// labels returns a resource's labels with those that are computed (contract).
func (g *Gate) labels(r *resource.Resource) map[string]string {
	out := maps.Clone(r.Labels)
	if out == nil {
		out = map[string]string{}
	}
	add := func(name, value string) {
		if out[name] == "" {
			out[name] = value
		}
	}
	if r.Kind.Scope == resource.Mesh {
		add(mesh.LabelMesh, r.Mesh)
	}
	if r.Kind.Sync&resource.ZoneToGlobal != 0 && g.cfg.Zone != "" {
		add(mesh.LabelOrigin, mesh.OriginZone)
		if out[mesh.LabelOrigin] == mesh.OriginZone {
			add(mesh.LabelZone, g.cfg.Zone)
			add(mesh.LabelEnv, mesh.EnvUniversal)
		}
	}
	if d, ok := r.Spec.(*mesh.DataplaneSpec); ok && d.Networking != nil {
		out[mesh.LabelProxyType] = "sidecar"
		if d.Networking.Gateway != nil {
			out[mesh.LabelProxyType] = "gateway"
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}
