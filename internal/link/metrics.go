package link

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Stats counts what a Server did. Read it while it runs. It is a
// prometheus.Collector; the names are ours.
type Stats struct {
	// Streams is how many links are open now.
	Streams atomic.Int64
	// Issued and Failed count certificates.
	Issued, Failed atomic.Uint64
	// Left counts announced leavings.
	Left atomic.Uint64
	// Denied counts refusals that Envoys reported, those not listed included.
	Denied atomic.Uint64
	// Panics counts streams that ended by a fault of ours.
	Panics atomic.Uint64

	collectors []prometheus.Collector
}

func (s *Stats) open() {
	counter := func(name, help string, labels prometheus.Labels, n *atomic.Uint64) {
		s.collectors = append(s.collectors, prometheus.NewCounterFunc(
			prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels}, func() float64 { return float64(n.Load()) }))
	}
	s.collectors = append(s.collectors, prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{Name: "kuma_links_active", Help: "Links of kuma-dp that are open."}, func() float64 { return float64(s.Streams.Load()) }))
	const certificates = "Certificates that proxies asked for over their links."
	counter("kuma_certificates_total", certificates, prometheus.Labels{"result": "issued"}, &s.Issued)
	counter("kuma_certificates_total", certificates, prometheus.Labels{"result": "failed"}, &s.Failed)
	counter("kuma_leavings_total", "Proxies that announced that they leave.", nil, &s.Left)
	counter("kuma_denials_total", "Refusals by permission that proxies reported.", nil, &s.Denied)
	counter("kuma_link_panics_total", "Links that ended by a fault of the control plane.", nil, &s.Panics)
}

// Describe is prometheus.Collector's.
func (s *Stats) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range s.collectors {
		c.Describe(ch)
	}
}

// Collect is prometheus.Collector's.
func (s *Stats) Collect(ch chan<- prometheus.Metric) {
	for _, c := range s.collectors {
		c.Collect(ch)
	}
}
