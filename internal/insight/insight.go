// Package insight turns connections and acknowledgements into what is shown of
// each proxy: its DataplaneInsight.
package insight

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
)

// Config is what a Recorder needs.
type Config struct {
	Store   store.Store
	Tracker *state.Tracker
	// Instance is this control plane's id, shown in each subscription.
	Instance string
	// Versions are those of this control plane and of the contract that it keeps:
	// a kuma-dp that goes with any of them is shown as compatible.
	Versions []string
	// Every is how long changes are gathered before they are written; the
	// default is 10 s.
	Every time.Duration
	// Soon is how long what is urgent (a proxy came or went, refused something
	// or got a certificate) waits for company; the default is 100 ms.
	Soon time.Duration
	// Grace is how long after its start a control plane waits for the proxies
	// of its last life before it shows them as gone; the default is 60 s.
	Grace time.Duration
	// Log may be nil.
	Log *slog.Logger
}

const (
	// keepSubscriptions is how many a DataplaneInsight shows, the newest.
	keepSubscriptions = 2
	// maxBatch is how many insights one transaction writes at most.
	maxBatch = 500
	// maxRejections is how many refusals an insight shows at most.
	maxRejections = 50
)

type key struct{ mesh, name string }

// A Recorder keeps the insights of the proxies that are connected to this
// control plane. It is safe for concurrent use.
type Recorder struct {
	cfg Config

	mu      sync.Mutex
	proxies map[key]*proxy
	dirty   map[key]struct{}
	// due is when what is dirty should be written.
	due  time.Time
	wake chan struct{}
}

// proxy is the insight being made. Recorder.mu guards it.
type proxy struct {
	spec mesh.DataplaneInsightSpec
	open int
	// changes counts them, so that one that happens while the last is being
	// written is not lost.
	changes uint64
}

// New makes a Recorder; Run writes what it records.
func New(c Config) *Recorder {
	if c.Every == 0 {
		c.Every = 10 * time.Second
	}
	if c.Soon == 0 {
		c.Soon = 100 * time.Millisecond
	}
	if c.Grace == 0 {
		c.Grace = time.Minute
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Recorder{cfg: c, proxies: map[key]*proxy{}, dirty: map[key]struct{}{}, wake: make(chan struct{}, 1)}
}

// A Stream is one ADS stream's part of an insight: a subscription.
type Stream struct {
	rec *Recorder
	key key
	id  string
}

// Connect records that a proxy's ADS stream is open. Metadata is shown as it
// is, so it must hold no secret.
func (r *Recorder) Connect(meshName, name string, metadata json.RawMessage, version *mesh.Version) *Stream {
	st := &Stream{r, key{meshName, name}, uuid.NewString()}
	now := time.Now().UTC()
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.load(st.key)
	subs := slices.Clone(p.spec.Subscriptions)
	for i := range subs {
		if subs[i].DisconnectTime == nil {
			subs[i].DisconnectTime = &now
		}
	}
	generation := uint32(1)
	if n := len(subs); n > 0 {
		generation = subs[n-1].Generation + 1
	}
	subs = append(subs, mesh.Subscription{ID: st.id, ControlPlaneInstanceID: r.cfg.Instance, ConnectTime: &now, Version: r.judged(version), Generation: generation})
	p.spec.Subscriptions = slices.Clone(subs[max(0, len(subs)-keepSubscriptions):])
	p.spec.Metadata, p.spec.Rejections = metadata, nil
	p.open++
	r.touch(st.key, p, true)
	return st
}

// load returns the insight, as it is stored where it is not at hand. mu is held.
func (r *Recorder) load(k key) *proxy {
	p := r.proxies[k]
	if p != nil {
		return p
	}
	p = new(proxy)
	if old, err := r.cfg.Store.Get(context.Background(), mesh.DataplaneInsights.Key(k.mesh, k.name)); err == nil {
		p.spec = *mesh.DataplaneInsights.From(old).Spec
	}
	r.proxies[k] = p
	return p
}

// touch notes that the insight has changed. mu is held.
func (r *Recorder) touch(k key, p *proxy, soon bool) {
	p.changes++
	r.dirty[k] = struct{}{}
	wait := r.cfg.Every
	if soon {
		wait = r.cfg.Soon
	}
	if due := time.Now().Add(wait); r.due.IsZero() || due.Before(r.due) {
		r.due = due
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// update changes the stream's subscription. The specification's slice is made
// anew, since the last one may be in the store.
func (st *Stream) update(soon bool, f func(*mesh.Subscription, *proxy)) {
	r := st.rec
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.proxies[st.key]
	if p == nil {
		return
	}
	i := slices.IndexFunc(p.spec.Subscriptions, func(s mesh.Subscription) bool { return s.ID == st.id })
	if i < 0 {
		return
	}
	p.spec.Subscriptions = slices.Clone(p.spec.Subscriptions)
	f(&p.spec.Subscriptions[i], p)
	r.touch(st.key, p, soon)
}

// Count is what an ADS stream did since it was last recorded, by type URL.
type Count struct{ Sent, Acknowledged, Rejected uint64 }

// Record adds to the stream's counters.
func (st *Stream) Record(counts map[string]Count) {
	if len(counts) == 0 {
		return
	}
	now := time.Now().UTC()
	st.update(false, func(s *mesh.Subscription, _ *proxy) {
		s.Status.LastUpdateTime = &now
		for url, c := range counts {
			s.Status.Total = plus(s.Status.Total, c)
			switch url {
			case envoy.ClusterType:
				s.Status.CDS = plus(s.Status.CDS, c)
			case envoy.EndpointType:
				s.Status.EDS = plus(s.Status.EDS, c)
			case envoy.ListenerType:
				s.Status.LDS = plus(s.Status.LDS, c)
			case envoy.RouteType:
				s.Status.RDS = plus(s.Status.RDS, c)
			}
		}
	})
}

func plus(r mesh.Responses, c Count) mesh.Responses {
	return mesh.Responses{
		Sent:         r.Sent + resource.Uint64(c.Sent),
		Acknowledged: r.Acknowledged + resource.Uint64(c.Acknowledged),
		Rejected:     r.Rejected + resource.Uint64(c.Rejected),
	}
}

// Rejections records what Envoy refuses now. The slice must not be changed.
func (st *Stream) Rejections(list []mesh.Rejection) {
	if len(list) > maxRejections {
		list = slices.Clip(list[:maxRejections])
	}
	st.update(true, func(_ *mesh.Subscription, p *proxy) { p.spec.Rejections = list })
}

// Close records that the stream has ended.
func (st *Stream) Close() {
	now := time.Now().UTC()
	st.update(true, func(s *mesh.Subscription, _ *proxy) { s.DisconnectTime = &now })
	st.rec.mu.Lock()
	defer st.rec.mu.Unlock()
	if p := st.rec.proxies[st.key]; p != nil {
		p.open--
	}
}

// A Certificate is what the insight shows of a certificate.
type Certificate struct {
	NotAfter time.Time
	// Backend issued it; Supported are the mesh's backends.
	Backend   string
	Supported []string
}

// Issued records that a proxy was issued a certificate.
func (r *Recorder) Issued(meshName, name string, c Certificate) {
	now, end := time.Now().UTC(), c.NotAfter.UTC()
	k := key{meshName, name}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.load(k)
	t := mesh.MTLSInsight{CertificateExpirationTime: &end, LastCertificateRegeneration: &now, CertificateRegenerations: 1, IssuedBackend: c.Backend, SupportedBackends: c.Supported}
	if p.spec.MTLS != nil {
		t.CertificateRegenerations += p.spec.MTLS.CertificateRegenerations
	}
	p.spec.MTLS = &t
	r.touch(k, p, true)
}

// Readiness records what a proxy says of itself.
func (r *Recorder) Readiness(meshName, name string, ready bool, reason string) {
	k := key{meshName, name}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.load(k)
	if p.spec.Readiness != nil && p.spec.Readiness.Ready == ready && p.spec.Readiness.Reason == reason {
		return
	}
	p.spec.Readiness = &mesh.ReadinessInsight{Ready: ready, Reason: reason}
	r.touch(k, p, true)
}

// Trust records which authorities of the control plane a proxy has taken.
func (r *Recorder) Trust(meshName, name string, t mesh.TrustInsight) {
	k := key{meshName, name}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.load(k)
	if p.spec.Trust != nil && *p.spec.Trust == t {
		return
	}
	p.spec.Trust = &t
	r.touch(k, p, true)
}

// Run writes what is recorded until ctx ends, and what is left then.
func (r *Recorder) Run(ctx context.Context) error {
	defer func() {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		r.flush(last)
	}()
	select {
	case <-r.cfg.Tracker.Ready():
	case <-ctx.Done():
		return nil
	}
	grace := time.After(r.cfg.Grace)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		r.mu.Lock()
		due := r.due
		r.mu.Unlock()
		var ready <-chan time.Time
		if !due.IsZero() {
			timer.Reset(time.Until(due))
			ready = timer.C
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-grace:
			r.closeOld()
		case <-ready:
			r.flush(ctx)
		}
	}
}

// flush writes all that is dirty.
func (r *Recorder) flush(ctx context.Context) {
	type item struct {
		key     key
		changes uint64
		write   store.Write
	}
	r.mu.Lock()
	var items []item
	for k := range r.dirty {
		p := r.proxies[k]
		spec := p.spec
		items = append(items, item{k, p.changes, store.Set(mesh.DataplaneInsights.Make(k.mesh, k.name, &spec))})
	}
	r.due = time.Time{}
	r.mu.Unlock()

	var failed bool
	for batch := range slices.Chunk(items, maxBatch) {
		var writes []store.Write
		var written []item
		for _, it := range batch {
			// An insight belongs to a Dataplane, and goes with it.
			d, err := r.cfg.Store.Get(ctx, mesh.Dataplanes.Key(it.key.mesh, it.key.name))
			if err != nil {
				if errs.Is(err, errs.NotFound) {
					r.forget(it.key, it.changes)
				} else {
					failed = true
				}
				continue
			}
			it.write.Resource.Labels = labelsOf(d)
			writes = append(writes, it.write)
			written = append(written, it)
		}
		if len(writes) == 0 {
			continue
		}
		if _, err := r.cfg.Store.Put(ctx, writes...); err != nil {
			failed = true
			if ctx.Err() == nil {
				r.cfg.Log.Warn("insights of proxies could not be written; they will be tried again", "error", err)
			}
			continue
		}
		r.mu.Lock()
		for _, it := range written {
			r.settle(it.key, it.changes)
		}
		r.mu.Unlock()
	}
	if failed {
		r.mu.Lock()
		if due := time.Now().Add(r.cfg.Every); r.due.IsZero() {
			r.due = due
		}
		r.mu.Unlock()
	}
}

// settle notes that an insight was written. mu is held.
func (r *Recorder) settle(k key, changes uint64) {
	p := r.proxies[k]
	if p == nil || p.changes != changes {
		return
	}
	delete(r.dirty, k)
	if p.open == 0 {
		delete(r.proxies, k)
	}
}

// forget drops an insight whose Dataplane is not there. That of a proxy which
// is connected stays for when it comes.
func (r *Recorder) forget(k key, changes uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.proxies[k]
	if p == nil {
		return
	}
	if p.open > 0 {
		delete(r.dirty, k) // the next change brings it back
		return
	}
	r.settle(k, changes)
}

// labelsOf are an insight's labels: those that say where its Dataplane is.
func labelsOf(d *resource.Resource) map[string]string {
	out := map[string]string{}
	for _, name := range []string{mesh.LabelMesh, mesh.LabelZone, mesh.LabelOrigin, mesh.LabelEnv} {
		if v := d.Labels[name]; v != "" {
			out[name] = v
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// closeOld shows proxies as gone that were connected to an earlier life of this
// control plane and did not come back.
func (r *Recorder) closeOld() {
	pic := r.cfg.Tracker.Now()
	now := time.Now().UTC()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, name := range pic.Meshes() {
		for _, res := range pic.Mesh(name).List(mesh.DataplaneInsights.Name) {
			k := key{res.Mesh, res.Name}
			if r.proxies[k] != nil || !mesh.DataplaneInsights.From(res).Spec.Online() {
				continue
			}
			p := r.load(k)
			p.spec.Subscriptions = slices.Clone(p.spec.Subscriptions)
			for i := range p.spec.Subscriptions {
				if s := &p.spec.Subscriptions[i]; s.DisconnectTime == nil {
					s.DisconnectTime = &now
				}
			}
			r.touch(k, p, true)
		}
	}
}
