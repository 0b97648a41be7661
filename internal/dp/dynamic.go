package dp

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"kuma/internal/errs"
)

// dynamic is the configuration for kuma-dp itself that the control plane hands
// over through Envoy: pages behind a Unix socket that Envoy opens while there
// is one. kuma-dp asks again and again (contract).
type dynamic struct {
	log    *slog.Logger
	socket string
	client *http.Client

	mu sync.Mutex
	// tag is that of the page seen last, good or bad.
	tag string
	now *pipeline
	bad string
}

const (
	maxDynamic     = 4 << 20
	dynamicTimeout = 2 * time.Second
)

func newDynamic(socket string, log *slog.Logger) *dynamic {
	return &dynamic{log: log, socket: socket, client: &http.Client{
		Timeout: dynamicTimeout,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
			// A connection that lasts would show the page of a listener that Envoy
			// has replaced since.
			DisableKeepAlives: true, DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// run asks at each interval until the context ends.
func (d *dynamic) run(ctx context.Context, interval time.Duration) {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		d.refresh(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// metrics returns what MeshMetric asks for, nil if there is none. Nobody waits
// for the next interval who is the first to ask.
func (d *dynamic) metrics(ctx context.Context) *pipeline {
	d.mu.Lock()
	now := d.now
	d.mu.Unlock()
	if now == nil {
		d.refresh(ctx)
		d.mu.Lock()
		now = d.now
		d.mu.Unlock()
	}
	return now
}

// refresh asks once. What can't be had or read leaves things as they are; what
// is not there ends them.
func (d *dynamic) refresh(ctx context.Context) {
	if _, err := os.Lstat(d.socket); errors.Is(err, fs.ErrNotExist) {
		d.forget()
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	tag, body, err := d.get(ctx)
	switch {
	case errs.Is(err, errs.NotFound) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist):
		d.clear()
		return
	case err != nil && ctx.Err() != nil:
		return
	case err == nil && body == nil:
		return // what was seen last still holds
	case err == nil:
		d.tag = tag
		var p *pipeline
		if p, err = readMeshMetric(body); err == nil {
			if d.now == nil || d.bad != "" {
				d.log.Info("metrics are configured by MeshMetric", "applications", len(p.apps))
			}
			if p.pushed != "" && (d.now == nil || d.now.pushed != p.pushed) {
				d.log.Warn("metrics are not sent to this backend: "+noOTel, "backend", p.pushed)
			}
			d.now, d.bad = p, ""
			return
		}
	}
	if text := err.Error(); text != d.bad {
		d.bad = text
		d.log.Error("the configuration of metrics can't be used, the last good one stays", "error", err)
	}
}

func (d *dynamic) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clear()
}

// clear is called with the lock held.
func (d *dynamic) clear() {
	if d.now != nil {
		d.log.Info("metrics are no longer configured by MeshMetric")
	}
	d.now, d.tag, d.bad = nil, "", ""
}

// get asks for the page. No body and no error mean that the one seen last still
// holds; NotFound, that there is none.
func (d *dynamic) get(ctx context.Context) (tag string, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+meshMetricPath, nil)
	if err != nil {
		return "", nil, err
	}
	if d.tag != "" {
		req.Header.Set("If-None-Match", d.tag)
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusNotModified:
		return d.tag, nil, nil
	case http.StatusNotFound:
		return "", nil, errs.New(errs.NotFound, "it is not there")
	case http.StatusOK:
	default:
		return "", nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	if body, err = readAll(resp.Body, maxDynamic); err != nil {
		return "", nil, err
	}
	if tag = resp.Header.Get("Etag"); tag == "" || len(tag) > 1024 {
		sum := sha256.Sum256(body)
		tag = hex.EncodeToString(sum[:])
		if tag == d.tag {
			return tag, nil, nil
		}
	}
	return tag, body, nil
}

// meshMetricPage is the page (contract). What is for others is not read.
type meshMetricPage struct {
	Observability struct {
		Metrics *struct {
			Applications []application `json:"applications"`
			Backends     []struct {
				Type string `json:"type"`
				Name string `json:"name"`
			} `json:"backends"`
			Sidecar *struct {
				IncludeUnused bool `json:"includeUnused"`
				Profiles      *struct {
					Append []struct {
						Name string `json:"name"`
					} `json:"appendProfiles"`
					Exclude []selectorPage `json:"exclude"`
					Include []selectorPage `json:"include"`
				} `json:"profiles"`
			} `json:"sidecar"`
			ExtraLabels map[string]string `json:"extraLabels"`
		} `json:"metrics"`
	} `json:"observability"`
}

type selectorPage struct {
	Type  string `json:"type"`
	Match string `json:"match"`
}

// readMeshMetric makes a pipeline of the page.
func readMeshMetric(body []byte) (*pipeline, error) {
	var page meshMetricPage
	if err := json.Unmarshal(body, &page); err != nil {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: %w", err)
	}
	m := page.Observability.Metrics
	if m == nil {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: observability.metrics is missing")
	}
	p := &pipeline{apps: m.Applications, query: statsQuery + "&usedonly", sieve: sieve{profile: basicMetrics}}
	if len(p.apps) > maxApplications {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: there are %d applications, the limit is %d", len(p.apps), maxApplications)
	}
	for i := range p.apps {
		if err := p.apps[i].check(); err != nil {
			return nil, errs.New(errs.Invalid, "read MeshMetric's page: %w", err)
		}
	}
	for _, b := range m.Backends {
		if b.Type == "OpenTelemetry" {
			p.pushed = b.Name
		}
	}
	var err error
	if p.labels, err = addedLabels(m.ExtraLabels); err != nil {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: extraLabels: %w", err)
	}
	s := m.Sidecar
	if s == nil {
		return p, nil
	}
	if s.IncludeUnused {
		p.query = statsQuery
	}
	if s.Profiles == nil {
		return p, nil
	}
	var named []string
	for _, a := range s.Profiles.Append {
		named = append(named, a.Name)
	}
	if p.sieve.profile, err = profileOf(named); err != nil {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: profiles: %w", err)
	}
	if p.sieve.exclude, err = selectors(s.Profiles.Exclude); err != nil {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: profiles.exclude: %w", err)
	}
	if p.sieve.include, err = selectors(s.Profiles.Include); err != nil {
		return nil, errs.New(errs.Invalid, "read MeshMetric's page: profiles.include: %w", err)
	}
	return p, nil
}

func selectors(list []selectorPage) ([]selector, error) {
	if len(list) > maxSelectors {
		return nil, fmt.Errorf("there are %d selectors, the limit is %d", len(list), maxSelectors)
	}
	var out []selector
	for i, l := range list {
		s, err := newSelector(l.Type, l.Match)
		if err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		out = append(out, s)
	}
	return out, nil
}
