package identity

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts the certificates of proxies, whichever way they asked. It is
// a prometheus.Collector; names and labels are the contract's.
type Metrics struct {
	issued, failed *prometheus.CounterVec
	took           *prometheus.HistogramVec
}

func newMetrics() *Metrics {
	labels := []string{"mesh"}
	return &Metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cert_generation", Help: "Certificates issued to proxies."}, labels),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cert_generation_failure", Help: "Certificates that could not be issued to proxies."}, labels),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "ca_manager_get_cert", Help: "How long an authority took to issue a certificate, in milliseconds.",
			Buckets: []float64{.1, .25, .5, 1, 2.5, 5, 10, 50, 250, 1000, 5000, 30000},
		}, []string{"backend_name"}),
	}
}

// count notes an attempt. The mesh is there, and so is its backend where there
// was one to ask.
func (m *Metrics) count(mesh string, c Certificate, start time.Time, err error) {
	if err != nil {
		m.failed.WithLabelValues(mesh).Inc()
		return
	}
	m.issued.WithLabelValues(mesh).Inc()
	m.took.WithLabelValues(c.Backend).Observe(float64(time.Since(start)) / float64(time.Millisecond))
}

// Describe is prometheus.Collector's.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.issued.Describe(ch)
	m.failed.Describe(ch)
	m.took.Describe(ch)
}

// Collect is prometheus.Collector's.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.issued.Collect(ch)
	m.failed.Collect(ch)
	m.took.Collect(ch)
}
