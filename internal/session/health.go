package session

import (
	"context"
	"maps"
	"slices"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/store"
)

// SetHealth writes the measured states of the Dataplane's inbounds, by their
// place in it, if they differ from the Dataplane's. Wrote tells whether they
// did; done is false where the Dataplane has changed meanwhile: try again with
// the new one.
func (st *Stream) SetHealth(ctx context.Context, d mesh.Dataplane, ready map[int]bool) (wrote, done bool, err error) {
	changed := false
	spec := d.Spec.Clone()
	for _, i := range slices.Sorted(maps.Keys(ready)) {
		if spec.Networking == nil || i >= len(spec.Networking.Inbound) {
			continue
		}
		in := &spec.Networking.Inbound[i]
		if in.State == mesh.Ignored || in.IsReady() == ready[i] && (in.Health == nil || in.Health.Ready == ready[i]) {
			continue
		}
		changed = true
		in.State, in.Health = mesh.NotReady, &mesh.Health{Ready: ready[i]}
		if ready[i] {
			in.State = mesh.Ready
		}
	}
	if !changed || st.Leaving() {
		return false, true, nil
	}
	made := *d.Resource
	made.Spec = spec
	_, err = st.reg.cfg.Gate.Put(ctx, auth.ControlPlane(), admit.Change{Resource: &made, If: store.Condition{Version: d.Version}, Measured: true})
	if errs.Is(err, errs.Conflict) {
		return false, false, nil
	}
	return err == nil, err == nil, err
}
