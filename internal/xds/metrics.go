package xds

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kuma/internal/envoy"
)

// Stats counts what a Server did. Read it while it runs. It is a
// prometheus.Collector; names and labels are the contract's.
type Stats struct {
	// Streams is how many ADS streams are open now, HealthStreams how many of
	// HDS.
	Streams, HealthStreams atomic.Int64
	// Generated counts configurations made, Skipped pictures that did not
	// concern a proxy, Failed configurations that could not be made.
	Generated, Skipped, Failed atomic.Uint64
	// Sent, Acknowledged and Rejected count responses.
	Sent, Acknowledged, Rejected atomic.Uint64
	// HealthRequests counts the streams' first messages, HealthFailed health
	// checks that could not be asked for.
	HealthRequests, HealthFailed atomic.Uint64
	// Reports counts health reports, Flips written changes of inbounds' states.
	Reports, Flips atomic.Uint64
	// Panics counts streams that ended by a fault of ours.
	Panics atomic.Uint64

	collectors []prometheus.Collector
	types      map[string]*typeStats
	delivery   prometheus.Histogram
	// regenerated has a series for each mesh.
	regenerated              *prometheus.CounterVec
	changed, same, unrelated prometheus.Observer
	health                   prometheus.Histogram
}

// typeStats are one type's series.
type typeStats struct {
	sent, acknowledged, rejected prometheus.Counter
	resources                    prometheus.Observer
}

// otherType is the label's value for types that no Envoy of ours asks for.
const otherType = "other"

// milliseconds is the contract's unit here, from what one proxy of a small mesh
// takes up to what no longer is right.
func milliseconds() []float64 {
	return []float64{.1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 5000, 30000}
}

func (s *Stats) open() {
	counter := func(name, help string, n *atomic.Uint64) {
		s.collectors = append(s.collectors, prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(n.Load()) }))
	}
	gauge := func(name, help string, n *atomic.Int64) {
		s.collectors = append(s.collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(n.Load()) }))
	}
	gauge("xds_streams_active", "ADS streams that are open.", &s.Streams)
	counter("xds_generation_errors", "Configurations that could not be made.", &s.Failed)
	gauge("hds_streams_active", "HDS streams that are open.", &s.HealthStreams)
	counter("hds_generation_errors", "Health checks that an Envoy could not be asked for.", &s.HealthFailed)
	counter("hds_requests_received", "Envoys that offered to check health.", &s.HealthRequests)
	counter("hds_responses_sent", "Health reports of Envoys.", &s.Reports)
	counter("kuma_hds_state_changes_total", "Inbounds' states that were written because Envoy measured another.", &s.Flips)
	counter("kuma_xds_panics_total", "Streams that ended by a fault of the control plane.", &s.Panics)

	s.delivery = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "xds_delivery", Help: "How long Envoys took to answer a response, in milliseconds.", Buckets: milliseconds(),
	})
	generation := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "xds_generation", Help: "How long it took to make a proxy's configuration, in milliseconds; result skip: to see that a change does not concern it.", Buckets: milliseconds(),
	}, []string{"proxy_type", "result"})
	const kind = "dataplane"
	s.changed, s.same, s.unrelated = generation.WithLabelValues(kind, "changed"), generation.WithLabelValues(kind, "generated"), generation.WithLabelValues(kind, "skip")
	s.regenerated = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "xds_dataplane_config_regenerated_total", Help: "Configurations that were made, since something in a mesh changed.",
	}, []string{"mesh"})
	s.health = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "hds_generation", Help: "How long it took to find out what an Envoy is to check, in milliseconds.", Buckets: milliseconds(),
	})
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "xds_requests_received", Help: "Answers of Envoys to configurations.",
	}, []string{"confirmation", "type_url"})
	responses := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "xds_responses_sent", Help: "Responses sent to Envoys.",
	}, []string{"type_url"})
	resources := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "xds_snapshot_resources", Help: "Resources in a proxy's configuration.", Buckets: prometheus.ExponentialBuckets(1, 2, 12),
	}, []string{"resource_type"})
	s.types = map[string]*typeStats{}
	for _, url := range []string{envoy.ClusterType, envoy.EndpointType, envoy.ListenerType, envoy.RouteType, envoy.SecretType, envoy.ExtensionType, otherType} {
		s.types[url] = &typeStats{
			responses.WithLabelValues(url), requests.WithLabelValues("ACK", url), requests.WithLabelValues("NACK", url), resources.WithLabelValues(url),
		}
	}
	s.collectors = append(s.collectors, s.delivery, generation, s.regenerated, s.health, requests, responses, resources)
}

// of returns a type's series. Clients choose the types' names, so those that
// are unknown share theirs.
func (s *Stats) of(url string) *typeStats {
	if t := s.types[url]; t != nil {
		return t
	}
	return s.types[otherType]
}

// snapshot notes how much a configuration holds.
func (s *Stats) snapshot(config envoy.Resources) {
	for url, list := range config {
		s.of(url).resources.Observe(float64(len(list)))
	}
}

// since is how long ago it was, in milliseconds.
func since(start time.Time) float64 { return float64(time.Since(start)) / float64(time.Millisecond) }

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
