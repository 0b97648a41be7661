package cp

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"kuma/internal/conf"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
)

// metrics are what one control plane counts, under the contract's names where
// it has one; ours begin with "kuma_". Every package declares its own; here they
// come together, with the zone's name.
type metrics struct {
	registry *prometheus.Registry
	// zoned adds the zone's name to whatever is registered.
	zoned prometheus.Registerer
	store *store.Metrics
	lines *prometheus.CounterVec
	// api, proxies and mads are those of the HTTP servers.
	api, proxies, mads *httpMetrics
}

// newMetrics makes the registry, with all that is there before the parts are.
func newMetrics(zone string, kinds []*resource.Kind) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(), store: store.NewMetrics(kinds),
		lines: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kuma_cp_log_lines_total", Help: "Lines that were logged.",
		}, []string{"logger", "level"}),
		api: newHTTPMetrics("api_server"), proxies: newHTTPMetrics("dp_server"), mads: newHTTPMetrics("mads_server"),
	}
	m.zoned = prometheus.WrapRegistererWith(prometheus.Labels{"zone": zone}, m.registry)
	m.zoned.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), m.store, m.lines, m.api, m.proxies, m.mads)
	return m
}

// registerAbout registers what is told of the control plane as a whole.
func (m *metrics) registerAbout(instance, cluster string, kinds []*resource.Kind, now func() *state.Picture, expiries func() []pki.Expiry, leads func() bool) {
	build := conf.Build()
	m.zoned.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cp_info", Help: "Which control plane this is.", ConstLabels: prometheus.Labels{
			"build_date": build.BuildDate, "cluster_id": cluster, "git_commit": build.GitCommit, "git_tag": "", "instance_id": instance,
			"product": build.Product, "version": build.Version,
		}}, func() float64 { return 1 }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "leader", Help: "1 where this instance does what one does for all."}, func() float64 {
			if leads() {
				return 1
			}
			return 0
		}),
		&gathered{
			now: now, expiries: expiries, kinds: kinds,
			counting: prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "component_store_counter", Help: "How long it took to count the resources, in milliseconds.", Buckets: []float64{.01, .1, .5, 1, 5, 10, 50, 100, 1000},
			}),
			resources:    prometheus.NewDesc("resources_count", "Resources by kind, as the present picture shows them.", []string{"resource_type", "tenant"}, nil),
			workloads:    prometheus.NewDesc("xds_cert_expiration_timestamp_seconds", "When the first certificate of a proxy that is here ends.", []string{"mesh"}, nil),
			certificates: prometheus.NewDesc("kuma_certificate_expiry_timestamp_seconds", "When a certificate ends that the control plane shows, signs with or trusts.", []string{"certificate"}, nil),
		},
	)
}

// registerFiles registers what became of certificate files that changed, under
// the names that dashboards know.
func (m *metrics) registerFiles(taken, refused func() uint64) {
	m.zoned.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "certwatcher_read_certificate_total", Help: "Changed certificate files that were read.",
		}, func() float64 { return float64(taken() + refused()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "certwatcher_read_certificate_errors_total", Help: "Changed certificate files that were refused; what was there before goes on.",
		}, func() float64 { return float64(refused()) }),
	)
}

// gathered is what is found out when somebody asks.
type gathered struct {
	now                                func() *state.Picture
	expiries                           func() []pki.Expiry
	kinds                              []*resource.Kind
	counting                           prometheus.Histogram
	resources, workloads, certificates *prometheus.Desc
}

// Describe is prometheus.Collector's.
func (g *gathered) Describe(ch chan<- *prometheus.Desc) {
	ch <- g.resources
	ch <- g.workloads
	ch <- g.certificates
	g.counting.Describe(ch)
}

// Collect is prometheus.Collector's. It asks the picture and not the store.
func (g *gathered) Collect(ch chan<- prometheus.Metric) {
	pic, begun := g.now(), time.Now()
	for _, k := range g.kinds {
		ch <- prometheus.MustNewConstMetric(g.resources, prometheus.GaugeValue, float64(pic.Count(k.Name)), k.Name, "")
	}
	g.counting.Observe(float64(time.Since(begun)) / float64(time.Millisecond))
	g.counting.Collect(ch)
	for _, name := range pic.Meshes() {
		m := pic.Mesh(name)
		if m == nil {
			continue
		}
		if first := firstExpiry(m); !first.IsZero() {
			ch <- prometheus.MustNewConstMetric(g.workloads, prometheus.GaugeValue, float64(first.Unix()), name)
		}
	}
	// Two of one name are told apart by their files in the report; here the
	// first to end counts.
	first := map[string]time.Time{}
	for _, e := range g.expiries() {
		if t, ok := first[e.Name]; !ok || e.NotAfter.Before(t) {
			first[e.Name] = e.NotAfter
		}
	}
	for name, t := range first {
		ch <- prometheus.MustNewConstMetric(g.certificates, prometheus.GaugeValue, float64(t.Unix()), name)
	}
}

// firstExpiry is when the first certificate ends of the mesh's proxies that are
// here; zero where none has one.
func firstExpiry(m *state.Mesh) (first time.Time) {
	for _, r := range m.List(mesh.DataplaneInsights.Name) {
		spec := mesh.DataplaneInsights.From(r).Spec
		if spec.MTLS == nil || spec.MTLS.CertificateExpirationTime == nil || !spec.Online() {
			continue
		}
		if end := *spec.MTLS.CertificateExpirationTime; first.IsZero() || end.Before(first) {
			first = end
		}
	}
	return first
}

// httpMetrics are those of one HTTP server.
type httpMetrics struct {
	duration, size *prometheus.HistogramVec
	inflight       *prometheus.GaugeVec
	// answered maps httpAnswer to *httpSeries, running routes to gauges: no
	// request looks labels up.
	answered, running sync.Map
}

type httpAnswer struct {
	route, method string
	code          int
}

type httpSeries struct{ duration, size prometheus.Observer }

func newHTTPMetrics(server string) *httpMetrics {
	labels := []string{"service", "handler", "method", "code"}
	return &httpMetrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: server + "_http_request_duration_seconds", Help: "How long requests took.", Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, labels),
		size: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: server + "_http_response_size_bytes", Help: "How large answers were.", Buckets: prometheus.ExponentialBuckets(100, 10, 8),
		}, labels),
		inflight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: server + "_http_requests_inflight", Help: "Requests that are being answered.",
		}, []string{"service", "handler"}),
	}
}

// Describe is prometheus.Collector's.
func (m *httpMetrics) Describe(ch chan<- *prometheus.Desc) {
	m.duration.Describe(ch)
	m.size.Describe(ch)
	m.inflight.Describe(ch)
}

// Collect is prometheus.Collector's.
func (m *httpMetrics) Collect(ch chan<- prometheus.Metric) {
	m.duration.Collect(ch)
	m.size.Collect(ch)
	m.inflight.Collect(ch)
}

// otherRoute stands for whatever no route answers, and otherMethod for methods
// that no route has: what strangers make up adds no series.
const (
	otherRoute  = "other"
	otherMethod = "other"
)

// measure counts what a handler answers. Pattern tells which route it is that
// answers a request, of the few that there are; empty for none.
func (m *httpMetrics) measure(h http.Handler, pattern func(*http.Request) string) http.Handler {
	methods := []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start, route, method := time.Now(), pattern(r), otherMethod
		if route == "" {
			route = otherRoute
		}
		if i := slices.Index(methods, r.Method); i >= 0 {
			method = methods[i]
		}
		running := m.inflightOf(route)
		running.Inc()
		c := &countedWriter{ResponseWriter: w, code: http.StatusOK}
		defer func() {
			running.Dec()
			s := m.seriesOf(httpAnswer{route, method, c.code})
			s.duration.Observe(time.Since(start).Seconds())
			s.size.Observe(float64(c.size))
		}()
		h.ServeHTTP(c, r)
	})
}

// byPattern tells a router's routes apart, for measure.
func byPattern(mux *http.ServeMux) func(*http.Request) string {
	return func(r *http.Request) string {
		_, pattern := mux.Handler(r)
		if _, path, ok := strings.Cut(pattern, " "); ok {
			return path
		}
		return pattern
	}
}

func (m *httpMetrics) inflightOf(route string) prometheus.Gauge {
	if g, ok := m.running.Load(route); ok {
		return g.(prometheus.Gauge)
	}
	g, _ := m.running.LoadOrStore(route, m.inflight.WithLabelValues("", route))
	return g.(prometheus.Gauge)
}

func (m *httpMetrics) seriesOf(a httpAnswer) *httpSeries {
	if s, ok := m.answered.Load(a); ok {
		return s.(*httpSeries)
	}
	code := strconv.Itoa(a.code)
	s, _ := m.answered.LoadOrStore(a, &httpSeries{
		m.duration.WithLabelValues("", a.route, a.method, code), m.size.WithLabelValues("", a.route, a.method, code),
	})
	return s.(*httpSeries)
}

// countedWriter notes an answer's code and size.
type countedWriter struct {
	http.ResponseWriter
	code int
	size int64
	told bool
}

// WriteHeader notes the code.
func (w *countedWriter) WriteHeader(code int) {
	if !w.told && code >= 200 {
		w.told, w.code = true, code
	}
	w.ResponseWriter.WriteHeader(code)
}

// Write counts.
func (w *countedWriter) Write(b []byte) (int, error) {
	w.told = true
	n, err := w.ResponseWriter.Write(b)
	w.size += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach what is below.
func (w *countedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
