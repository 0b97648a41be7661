package session

import "github.com/prometheus/client_golang/prometheus"

// Metrics tells of the proxies that are here. It is a prometheus.Collector;
// the names are ours.
type Metrics struct {
	registry                *Registry
	proxies, ready, streams *prometheus.Desc
}

// Metrics returns the registry's metrics.
func (r *Registry) Metrics() *Metrics {
	return &Metrics{
		registry: r,
		proxies:  prometheus.NewDesc("kuma_proxies", "Proxies that are here.", nil, nil),
		ready:    prometheus.NewDesc("kuma_proxies_ready", "Proxies that said over their link whether they can serve.", []string{"ready"}, nil),
		streams:  prometheus.NewDesc("kuma_streams_total", "Streams by whether they were let in.", []string{"result"}, nil),
	}
}

// Describe is prometheus.Collector's.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.proxies
	ch <- m.ready
	ch <- m.streams
}

// Collect is prometheus.Collector's.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	here, ready, linked := m.registry.counts()
	ch <- prometheus.MustNewConstMetric(m.proxies, prometheus.GaugeValue, float64(here))
	ch <- prometheus.MustNewConstMetric(m.ready, prometheus.GaugeValue, float64(ready), "true")
	ch <- prometheus.MustNewConstMetric(m.ready, prometheus.GaugeValue, float64(linked-ready), "false")
	ch <- prometheus.MustNewConstMetric(m.streams, prometheus.CounterValue, float64(m.registry.Opened()), "opened")
	ch <- prometheus.MustNewConstMetric(m.streams, prometheus.CounterValue, float64(m.registry.Refused()), "refused")
}

// counts are the proxies that are here, those of them with a link, and those of
// these that can serve.
func (r *Registry) counts() (here, ready, linked int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.sessions {
		if s.open == 0 {
			continue
		}
		here++
		if s.streams[Link] == nil {
			continue
		}
		linked++
		if s.readiness.Ready {
			ready++
		}
	}
	return here, ready, linked
}
