package upkeep

import (
	"cmp"
	"log/slog"
	"reflect"
	"slices"
	"strconv"
	"time"

	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
)

// generator is the value of kuma.io/managed-by on generated MeshServices.
const generator = "meshservice-generator"

// services returns the writes that bring a mesh's generated MeshServices in
// line with its Dataplanes, and when to look again if nothing changes (zero:
// never). One MeshService is made for each kuma.io/service value that is a DNS
// label; where Dataplanes disagree about a port, the oldest wins; one whose
// last Dataplane has gone is kept for the grace period (contract).
func services(m *state.Mesh, zone string, grace time.Duration, now time.Time, log *slog.Logger) (writes []store.Write, again time.Time) {
	wanted := map[string]*mesh.MeshServiceSpec{}
	if m.Spec.ServicesMode() != mesh.ServicesDisabled {
		for _, name := range m.Services() {
			if !mesh.IsDNSLabel(name) {
				log.Debug("no MeshService for a service whose name is not a DNS label", "mesh", m.Name, "service", name)
				continue
			}
			wanted[name] = describe(name, m.Endpoints(name), m.Name, log)
		}
	}
	for _, name := range m.Services() {
		spec := wanted[name]
		if spec == nil {
			continue
		}
		old := m.Get(mesh.MeshServices.Name, name)
		if old != nil && old.Labels[mesh.LabelManagedBy] != generator {
			continue // the user's own
		}
		r := mesh.MeshServices.Make(m.Name, name, spec)
		r.Labels = map[string]string{
			mesh.LabelMesh: m.Name, mesh.LabelZone: zone, mesh.LabelOrigin: mesh.OriginZone, mesh.LabelEnv: mesh.EnvUniversal,
			mesh.LabelDisplayName: name, mesh.LabelManagedBy: generator,
		}
		r.Status = status(m, spec, old)
		switch {
		case old == nil:
			writes = append(writes, store.Create(r))
		case !reflect.DeepEqual(old.Spec, r.Spec) || !reflect.DeepEqual(old.Status, r.Status) || !reflect.DeepEqual(old.Labels, r.Labels):
			writes = append(writes, store.Replace(r, old.Version))
		}
	}
	for _, old := range m.List(mesh.MeshServices.Name) {
		if old.Labels[mesh.LabelManagedBy] != generator || wanted[old.Name] != nil {
			continue
		}
		since, err := time.Parse(time.RFC3339, old.Labels[mesh.LabelDeletionGracePeriod])
		if err != nil {
			writes = append(writes, store.Replace(orphan(m, old, now), old.Version))
			since = now
		}
		if end := since.Add(grace); !end.After(now) {
			writes = append(writes, store.Write{Key: old.Key(), If: store.Condition{Version: old.Version}})
		} else if again.IsZero() || end.Before(again) {
			again = end
		}
	}
	return writes, again
}

// orphan marks a MeshService whose last Dataplane has gone.
func orphan(m *state.Mesh, old *resource.Resource, now time.Time) *resource.Resource {
	r := *old
	r.Labels = map[string]string{}
	for k, v := range old.Labels {
		r.Labels[k] = v
	}
	r.Labels[mesh.LabelDeletionGracePeriod] = now.UTC().Format(time.RFC3339)
	spec := *mesh.MeshServices.From(old).Spec
	spec.State = mesh.ServiceUnavailable
	r.Spec = &spec
	r.Status = status(m, &spec, old)
	return &r
}

// describe makes a service's specification from its inbounds.
func describe(name string, endpoints []state.Endpoint, meshName string, log *slog.Logger) *mesh.MeshServiceSpec {
	s := &mesh.MeshServiceSpec{
		Selector: mesh.ServiceSelector{DataplaneTags: map[string]string{mesh.TagService: name}},
		State:    mesh.ServiceUnavailable,
	}
	byAge := slices.Clone(endpoints)
	slices.SortStableFunc(byAge, func(a, b state.Endpoint) int {
		return cmp.Or(a.Dataplane.Created.Compare(b.Dataplane.Created), cmp.Compare(a.Dataplane.Name, b.Dataplane.Name))
	})
	var identities []string
	for _, e := range byAge {
		if e.Inbound.IsReady() {
			s.State = mesh.ServiceAvailable
		}
		identities = append(identities, e.Dataplane.Spec.Services()...)
		port := mesh.ServicePort{
			Name: e.Inbound.Section(), Port: e.Inbound.Port, TargetPort: &mesh.IntOrString{Number: e.Inbound.Port},
			AppProtocol: e.Inbound.EffectiveProtocol(),
		}
		i := slices.IndexFunc(s.Ports, func(p mesh.ServicePort) bool { return p.Port == port.Port || p.Name == port.Name })
		if i < 0 {
			s.Ports = append(s.Ports, port)
		} else if p := s.Ports[i]; p.Port != port.Port || p.Name != port.Name || p.AppProtocol != port.AppProtocol {
			log.Debug("Dataplanes disagree about a port of their service; the oldest wins", "mesh", meshName, "service", name,
				"dataplane", e.Dataplane.Name, "port", strconv.Itoa(int(port.Port)))
		}
	}
	slices.SortFunc(s.Ports, func(a, b mesh.ServicePort) int { return cmp.Compare(a.Port, b.Port) })
	slices.Sort(identities)
	for _, v := range slices.Compact(identities) {
		s.Identities = append(s.Identities, mesh.ServiceIdentity{Type: mesh.IdentityTag, Value: v})
	}
	return s
}

// status counts the proxies behind a service and says whether all have
// certificates; once they had, it stays so.
func status(m *state.Mesh, spec *mesh.MeshServiceSpec, old *resource.Resource) *mesh.MeshServiceStatus {
	st := &mesh.MeshServiceStatus{TLS: &mesh.ServiceTLS{Status: "NotReady"}, DataplaneProxies: &mesh.ServiceProxies{}}
	service := spec.Selector.DataplaneTags[mesh.TagService]
	if m.TLSReady(service) {
		st.TLS.Status = "Ready"
	}
	if old != nil {
		if was, ok := old.Status.(*mesh.MeshServiceStatus); ok && was != nil && was.TLS != nil && was.TLS.Status == "Ready" && m.Spec.EnabledBackend() != nil {
			st.TLS.Status = "Ready"
		}
	}
	seen := map[string]bool{}
	for _, e := range m.Endpoints(service) {
		if seen[e.Dataplane.Name] {
			continue
		}
		seen[e.Dataplane.Name] = true
		st.DataplaneProxies.Total++
		online := false
		if r := m.Get(mesh.DataplaneInsights.Name, e.Dataplane.Name); r != nil {
			online = mesh.DataplaneInsights.From(r).Spec.Online()
		}
		if online {
			st.DataplaneProxies.Connected++
			if e.Inbound.IsReady() {
				st.DataplaneProxies.Healthy++
			}
		}
	}
	return st
}
