package meshmetric

import (
	"encoding/json"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/policy"
)

// Names of what the policy makes (contract).
const (
	listener = "_kuma:metrics:prometheus:"
	nobody   = "default-backend"
	cluster  = "_kuma:metrics:hijacker"
	page     = "/meshmetric"
)

func apply(c *envoy.Config, r policy.Rules[Conf]) error {
	conf, ok := r.Proxy()
	if !ok || c.Self == nil {
		return nil
	}
	endpoints := conf.Endpoints()
	if len(endpoints) == 0 {
		return nil
	}
	c.CloseMetrics(envoy.MeshMetricsCluster)
	opened := false
	for _, e := range endpoints {
		name := e.Client
		if name == "" {
			name = nobody
		}
		tls := envoy.PlainMetrics
		switch e.Mode {
		case ProvidedTLS:
			tls = envoy.FileMetricsTLS
		case ActiveMTLSBackend:
			tls = envoy.MeshMetricsTLS
		}
		if c.OpenMetrics(r.Last().Key(), envoy.Metrics{
			Name: listener + name, Cluster: cluster, Port: e.Port, Path: e.Path, Rewrite: page, TLS: tls,
		}) {
			opened = true
		}
	}
	if !opened {
		return nil
	}
	body, err := document(c, &conf)
	if err != nil {
		return err
	}
	c.Documents = append(c.Documents, envoy.Document{Path: page, Body: body})
	return nil
}

// wanted is what kuma-dp is told (contract).
type wanted struct {
	Observability struct {
		Metrics metrics `json:"metrics"`
	} `json:"observability"`
}

type metrics struct {
	Applications []application `json:"applications"`
	// Backends are those to which kuma-dp sends metrics: none.
	Backends    []struct{}        `json:"backends"`
	Sidecar     *Sidecar          `json:"sidecar,omitempty"`
	ExtraLabels map[string]string `json:"extraLabels"`
}

type application struct {
	Name    string `json:"name"`
	Path    string `json:"path"`
	Port    uint32 `json:"port"`
	Address string `json:"address"`
}

func document(c *envoy.Config, conf *Conf) ([]byte, error) {
	var w wanted
	m := &w.Observability.Metrics
	m.Applications, m.Backends = []application{}, []struct{}{}
	for _, a := range conf.Applications {
		m.Applications = append(m.Applications, application{
			Name: text(a.Name, ""), Path: text(a.Path, mesh.MetricsPath), Port: number(a.Port, 0), Address: text(a.Address, ""),
		})
	}
	m.Sidecar = conf.Sidecar
	m.ExtraLabels = extraLabels(c)
	return json.Marshal(&w)
}

// extraLabels are put on every metric of the proxy and of its workload: by them
// dashboards know where a metric comes from (contract).
func extraLabels(c *envoy.Config) map[string]string {
	s := c.Self
	out := mesh.MetricLabels(s.Tags)
	out["mesh"], out["dataplane"], out["kuma.proxy_role"] = c.Mesh, s.Dataplane, "sidecar"
	if s.Gateway {
		out["kuma.proxy_role"] = "gateway"
	}
	if s.Zone != "" {
		out["zone"] = s.Zone
	}
	if w := s.Labels[mesh.LabelWorkload]; w != "" {
		out["kuma.workload"] = w
	} else {
		out["service"] = s.Service
	}
	return out
}
