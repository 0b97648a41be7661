package upkeep

import (
	"time"

	"kuma/internal/mesh"
	"kuma/internal/state"
	"kuma/internal/store"
)

// expired returns the deletion of Dataplanes whose proxies have been gone for
// longer than age, and when to look again if nothing changes (zero: never). How
// long they have been gone is told by their insights, which outlive restarts; a
// Dataplane whose proxy has never come has none, and stays, whoever made it
// (contract). Here tells of proxies whose insight is not written yet.
func expired(m *state.Mesh, age time.Duration, now time.Time, here func(mesh, name string) bool) (writes []store.Write, again time.Time) {
	for _, r := range m.List(mesh.DataplaneInsights.Name) {
		d := m.Get(mesh.Dataplanes.Name, r.Name)
		if d == nil {
			continue
		}
		left := mesh.DataplaneInsights.From(r).Spec.Left()
		if left.IsZero() {
			continue
		}
		end := left.Add(age)
		switch {
		case end.After(now):
		case here != nil && here(m.Name, r.Name):
			end = now.Add(time.Minute) // the insight will say so
		default:
			writes = append(writes, store.Write{Key: d.Key(), If: store.Condition{Version: d.Version}})
			continue
		}
		if again.IsZero() || end.Before(again) {
			again = end
		}
	}
	return writes, again
}
