package dp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/errs"
)

// metrics is kuma-dp's server of merged metrics: Envoy's statistics and, below
// them, those of the applications beside it. Envoy's own listener leads here
// over a Unix socket, with the TLS and the address that the mesh asks for.
type metrics struct {
	log    *slog.Logger
	client *http.Client
	socket net.Listener
	// interval is the pause between two looks at the dynamic configuration.
	interval time.Duration
	// dynamic is what MeshMetric says, admin and legacy come with the first
	// configuration: legacy lists the applications of the mesh's own metrics.
	dynamic *dynamic
	// pair is what Envoy serves metrics with, nil if there is none.
	pair   *metricsPair
	admin  atomic.Pointer[admin]
	legacy atomic.Pointer[[]application]
	// slots bounds how many scrapes run at a time, queue how many run or wait.
	slots, queue chan struct{}
	// left is how many bytes applications may still answer with, in all scrapes
	// that run.
	left       atomic.Int64
	complaints complaints
}

const (
	maxScrapes = 4
	maxQueue   = 20
	// scrapeTime is how long a scrape may take where the scraper does not say,
	// longestScrape where it does.
	scrapeTime    = 10 * time.Second
	longestScrape = time.Minute
	// meshMetricPath is how Envoy's listeners for MeshMetric ask (contract).
	meshMetricPath = "/meshmetric"
)

func newMetrics(log *slog.Logger, d *dynamic) *metrics {
	m := &metrics{
		log: log, dynamic: d, client: newApplicationClient(),
		slots: make(chan struct{}, maxScrapes), queue: make(chan struct{}, maxQueue),
	}
	m.left.Store(maxBodies)
	return m
}

func listenMetrics(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, errs.New(errs.Unavailable, "serve metrics for Envoy at %s: %w", path, err)
	}
	return l, nil
}

// openMetrics opens the server's socket in the working directory, and puts the
// certificate there with which Envoy is to serve metrics.
func (c *Config) openMetrics(dir *workdir, pair *metricsPair) (*metrics, error) {
	l, err := listenMetrics(dir.sockets.Metrics())
	if err != nil {
		return nil, err
	}
	m := newMetrics(c.Log, newDynamic(dir.sockets.DynamicConfig(), c.Log))
	m.socket, m.interval = l, c.DynamicInterval
	if m.pair = pair; pair != nil {
		pair.file = dir.sockets.MetricsCertificate()
		if err := pair.write(); err != nil {
			_ = l.Close()
			return nil, err
		}
	}
	return m, nil
}

// aggregate takes over which applications the mesh's own metrics include.
func (m *metrics) aggregate(list []application) {
	var apps []application
	for _, a := range list[:min(len(list), maxApplications)] {
		if err := a.check(); err != nil {
			m.log.Warn("an application's metrics are left out", "error", err)
			continue
		}
		apps = append(apps, a)
	}
	m.legacy.Store(&apps)
}

// serve answers scrapes, and follows what MeshMetric says, until the context
// ends.
func (m *metrics) serve(ctx context.Context) {
	var following sync.WaitGroup
	following.Go(func() { m.dynamic.run(ctx, m.interval) })
	if m.pair != nil {
		following.Go(func() { m.pair.run(ctx) })
	}
	defer following.Wait()
	srv := &http.Server{
		Handler: m, ReadTimeout: 5 * time.Second, WriteTimeout: longestScrape + 5*time.Second, IdleTimeout: 90 * time.Second,
		MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	_ = srv.Serve(m.socket)
}

// pipeline is what a scrape consists of.
type pipeline struct {
	apps  []application
	sieve sieve
	// query is what Envoy is asked for.
	query string
	// labels are put on every series.
	labels []addedLabel
	// pushed names a backend to which metrics should be sent, empty if there is
	// none.
	pushed string
}

// ServeHTTP answers one scrape.
func (m *metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "metrics are read with GET", http.StatusMethodNotAllowed)
		return
	}
	if strings.Contains(strings.Join(r.Header.Values("Via"), ","), via) {
		http.Error(w, "metrics of proxies are no application's: the one that asks has the address of a proxy's metrics in its list", http.StatusLoopDetected)
		return
	}
	select {
	case m.queue <- struct{}{}:
		defer func() { <-m.queue }()
	default:
		http.Error(w, "too many scrapes at a time", http.StatusServiceUnavailable)
		return
	}
	patience := scrapePatience(r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds"))
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	// Nor may who reads slowly keep others waiting.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(patience + time.Second))
	select {
	case m.slots <- struct{}{}:
		defer func() { <-m.slots }()
	case <-ctx.Done():
		http.Error(w, "too many scrapes at a time", http.StatusServiceUnavailable)
		return
	}
	p, err := m.pipeline(ctx, r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	if err := m.answer(ctx, w, p, negotiate(r.Header.Get("Accept")), patience); err != nil {
		m.complaints.say(m.log, "a scrape of metrics failed", "envoy", err)
		if !errors.Is(err, errBegun) {
			http.Error(w, "Envoy's statistics can't be had; kuma-dp's log says why", http.StatusServiceUnavailable)
			return
		}
		// The scraper must not take a part for the whole.
		panic(http.ErrAbortHandler)
	}
	m.complaints.fine(m.log, "metrics are scraped again", "envoy")
}

// scrapePatience is how long a scrape may take: a little less than its scraper
// waits.
func scrapePatience(header string) time.Duration {
	seconds, err := strconv.ParseFloat(header, 64)
	if err != nil || !(seconds > 0) {
		return scrapeTime
	}
	return min(time.Duration(min(seconds, longestScrape.Seconds())*0.95*float64(time.Second)), longestScrape)
}

// pipeline chooses what a request asks for: MeshMetric's by its path, the
// mesh's own metrics by any other (contract).
func (m *metrics) pipeline(ctx context.Context, r *http.Request) (*pipeline, error) {
	if r.URL.Path == meshMetricPath || strings.HasPrefix(r.URL.Path, meshMetricPath+"/") {
		p := m.dynamic.metrics(ctx)
		if p == nil {
			return nil, errs.New(errs.Unavailable, "no MeshMetric has reached this proxy yet")
		}
		return p, nil
	}
	p := &pipeline{query: legacyQuery(r.URL.RawQuery)}
	if apps := m.legacy.Load(); apps != nil {
		p.apps = *apps
	}
	return p, nil
}

// legacyQuery asks Envoy for what the mesh's metrics backend says: its listener
// puts that into the request, before what the scraper itself had there.
func legacyQuery(raw string) string {
	asked, _ := url.ParseQuery(strings.ReplaceAll(raw, "?", "&"))
	out := statsQuery
	if asked.Has("usedonly") {
		out += "&usedonly"
	}
	if f := asked.Get("filter"); f != "" && len(f) <= maxPattern {
		out += "&filter=" + url.QueryEscape(f)
	}
	return out
}

// via is how kuma-dp introduces itself to applications, in the header Via, so
// that it knows itself again.
const via = "kuma-dp-metrics"

const statsQuery = "format=prometheus&text_readouts="

// errBegun marks a failure after the first byte of an answer.
var errBegun = errors.New("the answer was cut off")

// answer writes Envoy's statistics and the applications' metrics.
func (m *metrics) answer(ctx context.Context, w http.ResponseWriter, p *pipeline, accept exposition, patience time.Duration) error {
	// Envoy comes last: it keeps the answer in memory until it is read.
	half, cancel := context.WithTimeout(ctx, patience/2)
	defer cancel()
	apps := m.askApplications(half, p.apps, accept)
	defer func() {
		for _, a := range apps {
			m.left.Add(int64(len(a.body)))
		}
	}()
	form := plainText
	for _, a := range apps {
		form = max(form, a.form)
	}
	// An application may offer more than the scraper takes.
	form = min(form, accept)
	if len(p.apps) == 0 {
		form = accept
	}
	var stats io.Reader
	if !p.sieve.silent() {
		a := m.admin.Load()
		if a == nil {
			return errs.New(errs.Unavailable, "envoy does not run yet")
		}
		resp, err := a.ask(ctx, http.MethodGet, "/stats?"+p.query)
		if err != nil {
			return errs.New(errs.Unavailable, "ask Envoy for its statistics: %w", err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errs.New(errs.Unavailable, "ask Envoy for its statistics: status %d", resp.StatusCode)
		}
		stats = resp.Body
	}
	w.Header().Set("Content-Type", form.contentType())
	out := &metricWriter{out: bufio.NewWriterSize(w, 32<<10), form: form, add: p.labels}
	if stats != nil {
		if err := newEnvoyFamilies(out, &p.sieve, p.labels).copy(stats); err != nil {
			return fmt.Errorf("read Envoy's statistics: %w: %w", errBegun, err)
		}
	}
	for _, a := range apps {
		in := newMetricReader(bytes.NewReader(a.body), a.form)
		for a.body != nil {
			l, err := in.next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err == nil {
				err = out.write(l, a.form)
			}
			if err != nil {
				return fmt.Errorf("write an application's metrics: %w: %w", errBegun, err)
			}
		}
		out.flush()
	}
	if err := out.end(); err != nil {
		return fmt.Errorf("write metrics: %w: %w", errBegun, err)
	}
	return nil
}
