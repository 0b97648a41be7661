package upkeep

import "github.com/prometheus/client_golang/prometheus"

// Metrics tells how long upkeep takes. It is a prometheus.Collector; the names
// are the contract's.
type Metrics struct {
	services, cleanup prometheus.Histogram
	removed           prometheus.Counter
}

func newMetrics() *Metrics {
	// Milliseconds.
	buckets := []float64{.1, .5, 1, 5, 10, 50, 100, 500, 1000, 10000}
	return &Metrics{
		services: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "component_meshservice_generator", Help: "How long it took to find out which MeshServices follow from the Dataplanes, in milliseconds.", Buckets: buckets,
		}),
		cleanup: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "component_dp_gc", Help: "How long it took to find Dataplanes whose proxies have been gone for too long, in milliseconds.", Buckets: buckets,
		}),
		removed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kuma_dataplanes_cleaned_up_total", Help: "Dataplanes that were deleted since their proxies had been gone for too long.",
		}),
	}
}

// Describe is prometheus.Collector's.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.services.Describe(ch)
	m.cleanup.Describe(ch)
	m.removed.Describe(ch)
}

// Collect is prometheus.Collector's.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.services.Collect(ch)
	m.cleanup.Collect(ch)
	m.removed.Collect(ch)
}
