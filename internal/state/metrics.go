package state

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics tells how a Tracker follows the store. It is a prometheus.Collector.
type Metrics struct {
	pictures, lost atomic.Uint64
	collectors     []prometheus.Collector
}

func newMetrics(t *Tracker) *Metrics {
	m := new(Metrics)
	counter := func(name, help string, n *atomic.Uint64) {
		m.collectors = append(m.collectors, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(n.Load()) }))
	}
	counter("events_dropped", "Times that the control plane fell behind the store's changes and read everything again.", &m.lost)
	counter("kuma_pictures_total", "Pictures of all meshes that were made, each of one or more changes.", &m.pictures)
	m.collectors = append(m.collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kuma_picture_revision", Help: "The store's revision that the present picture shows.",
	}, func() float64 { return float64(t.Now().Revision) }))
	return m
}

// Describe is prometheus.Collector's.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.collectors {
		c.Describe(ch)
	}
}

// Collect is prometheus.Collector's.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.collectors {
		c.Collect(ch)
	}
}

// Metrics returns what the tracker counts.
func (t *Tracker) Metrics() *Metrics { return t.metrics }

// Count returns how many resources of a kind there are, in all meshes.
func (p *Picture) Count(kind string) int {
	n := len(p.global[kind])
	for _, m := range p.meshes {
		if k := m.kinds[kind]; k != nil {
			n += len(k.byName)
		}
	}
	return n
}
