package proxy

import (
	"net/url"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
)

// self says what the configuration is for.
func (w *work) self() {
	s := &envoy.Self{
		Dataplane: w.dp.Name, Zone: w.dp.Labels[mesh.LabelZone], Labels: w.dp.Labels, Tags: w.dp.Spec.Tags(), Service: w.dp.Spec.MainService(), Gateway: w.net.Gateway != nil,
		MutualTLS: w.backend != nil, Link: w.proxy.Link,
		Sockets:     names.Sockets{Dir: w.proxy.Workdir, Proxy: w.proxy.Key.Name, Mesh: w.proxy.Key.Mesh},
		MetricsCert: w.proxy.MetricsCert, MetricsKey: w.proxy.MetricsKey, MetricsFile: w.proxy.Features[names.FeatureMetricsFile],
	}
	if own := w.addresses(w.net.Address); w.net.Address != "" && len(own) > 0 {
		s.Address = own[0]
	}
	s.Taken = func(port uint32) bool { return w.taken(s.Address, port) }
	w.out.Self = s
}

// meshMetricsDoor is the name of the door that Mesh.metrics opens (contract).
const meshMetricsDoor = "kuma:metrics:prometheus"

// metrics opens the door that Mesh.metrics asks for. The policy MeshMetric takes
// it away where it opens its own.
func (w *work) metrics() {
	e, ok := w.mesh.Spec.MetricsOf(w.dp.Spec)
	if !ok {
		return
	}
	at := w.mesh.Resource.Key()
	var tls envoy.MetricsTLS
	switch e.Mode {
	case mesh.MetricsMeshTLS:
		// It is the default for meshes without mutual TLS too: those are plaintext
		// throughout.
		if w.backend != nil {
			tls = envoy.MeshMetricsTLS
		}
	case mesh.MetricsProvidedTLS:
		tls = envoy.FileMetricsTLS
	}
	query := url.Values{}
	if e.Filter != "" {
		query.Set("filter", e.Filter)
	}
	rewrite := "/"
	if e.UsedOnly {
		rewrite += "?usedonly"
	}
	if len(query) > 0 {
		sep := "?"
		if e.UsedOnly {
			sep = "&"
		}
		rewrite += sep + query.Encode()
	}
	w.out.OpenMetrics(at, envoy.Metrics{
		Name: meshMetricsDoor, Cluster: envoy.MeshMetricsCluster, Port: e.Port, Path: e.Path, Rewrite: rewrite, TLS: tls,
	})
}
