package mads

import (
	"net"
	"strconv"
	"strings"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/policy/meshmetric"
	"kuma/internal/state"
)

// An Assignment is one proxy that is to be scraped.
type Assignment struct {
	Type    string   `json:"@type"`
	Mesh    string   `json:"mesh"`
	Service string   `json:"service"`
	Targets []Target `json:"targets"`
}

// A Target is where it is scraped.
type Target struct {
	Name        string            `json:"name"`
	Scheme      string            `json:"scheme"`
	Address     string            `json:"address"`
	MetricsPath string            `json:"metrics_path"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// assigned are a mesh's assignments. A proxy for which a MeshMetric has a backend
// is scraped as that says, by the client that it names ("" are those that no
// backend names). Otherwise it is scraped as Mesh.metrics says, which knows no
// clients: by everyone.
type assigned struct {
	clients  map[string][]Assignment
	everyone []Assignment
}

func assign(m *state.Mesh) assigned {
	out := assigned{clients: map[string][]Assignment{}}
	policies := meshmetric.Policy.Prepare(m.List(meshmetric.Policy.Kind().Name))
	// Proxies that the same policies select have the same endpoints.
	known := map[string][]meshmetric.Settled{}
	for _, r := range m.List(mesh.Dataplanes.Name) {
		d := mesh.Dataplanes.From(r)
		n := d.Spec.Networking
		if n == nil || n.Address == "" {
			continue
		}
		host := n.Address
		if n.AdvertisedAddress != "" {
			host = n.AdvertisedAddress
		}
		var by strings.Builder
		for _, p := range policies.Selected(d) {
			by.WriteString(p.Name + "\n")
		}
		endpoints, ok := known[by.String()]
		if !ok && by.Len() > 0 {
			if a := policies.Explain(new(envoy.Config), d); a.Proxy != nil {
				endpoints = a.Proxy.Conf.(*meshmetric.Conf).Endpoints()
			}
			known[by.String()] = endpoints
		}
		one := func(port uint32, path string, secured bool, labels map[string]string) Assignment {
			scheme := "http"
			if secured {
				scheme = "https"
			}
			return Assignment{assignmentType, m.Name, service(d), []Target{{
				Name: d.Name, Scheme: scheme, Address: net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10)), MetricsPath: path, Labels: labels,
			}}}
		}
		for _, e := range endpoints {
			out.clients[e.Client] = append(out.clients[e.Client], one(e.Port, e.Path, e.Mode == meshmetric.ProvidedTLS, nil))
		}
		if len(endpoints) > 0 {
			continue
		}
		if e, ok := m.Spec.MetricsOf(d.Spec); ok {
			out.everyone = append(out.everyone, one(e.Port, e.Path, e.Mode == mesh.MetricsProvidedTLS, mesh.MetricLabels(d.Spec.Tags())))
		}
	}
	return out
}

// service is the name by which a proxy is known.
func service(d mesh.Dataplane) string {
	if s := d.Spec.MainService(); s != mesh.UnknownService {
		return s
	}
	if w := d.Labels[mesh.LabelWorkload]; w != "" {
		return w
	}
	return mesh.UnknownService
}
