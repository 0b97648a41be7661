package insight

import (
	"slices"

	"kuma/internal/mesh"
	"kuma/internal/names"
)

// judged returns a proxy's versions with whether its kuma-dp goes with this
// control plane; what the proxy says of that itself does not count.
func (r *Recorder) judged(v *mesh.Version) *mesh.Version {
	if v == nil || v.KumaDP == nil {
		return v
	}
	out, dp := *v, *v.KumaDP
	ok := len(r.cfg.Versions) == 0 || slices.ContainsFunc(r.cfg.Versions, func(ours string) bool { return names.Compatible(dp.Version, ours) })
	dp.KumaCPCompatible = &ok
	out.KumaDP = &dp
	return &out
}
