package xds

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/insight"
	"kuma/internal/mesh"
	"kuma/internal/session"
	"kuma/internal/state"
)

type deltaStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

// adsStream is one ADS stream. All of it belongs to the stream's loop.
type adsStream struct {
	srv     *Server
	grpc    deltaStream
	session *session.Stream
	log     *slog.Logger
	insight *insight.Stream // nil until the Dataplane is there

	delta *delta
	// picture is the one that was last looked at, dataplane the proxy's own in
	// it.
	picture   *state.Picture
	dataplane mesh.Dataplane
	known     bool
	// config is the configuration while it is being sent; once all of it was
	// accepted it is let go, and made again when it is needed.
	config envoy.Resources
	// made: a configuration was made, by picture.
	made bool
	// took is how many milliseconds that was, until it is counted.
	took float64
	// need: there may be something to send although the configuration was let go.
	need bool
	// failure is why the last one could not be made.
	failure *mesh.Rejection
	certs   *certificates
	counts  map[string]insight.Count
	status  session.Status
	retry   time.Time // when to go on without an acknowledgement
	again   time.Time // when to make the configuration again; zero: never
	bind    bindRetry
	// regenerated counts the configurations of the proxy's mesh.
	regenerated prometheus.Counter
}

// DeltaAggregatedResources serves one Envoy.
func (s *Server) DeltaAggregatedResources(g deltaStream) (err error) {
	var node *session.Node
	defer s.guard("ads", func() *session.Node { return node }, &err)
	requests, failed := receive(g.Context(), g.Recv)
	first, err := firstOf(g.Context(), requests, failed, s.cfg.FirstMessage)
	if err != nil {
		return toStatus(err)
	}
	node, token, err := s.identify(g.Context(), first.GetNode())
	if err != nil {
		return toStatus(err)
	}
	st, err := s.cfg.Sessions.Open(g.Context(), session.ADS, node, token)
	if err != nil {
		s.cfg.Log.Info("a proxy was refused", "stream", "ads", "mesh", node.Mesh, "name", node.Name, "reason", err)
		return toStatus(err)
	}
	defer st.Close()
	s.stats.Streams.Add(1)
	defer s.stats.Streams.Add(-1)
	a := &adsStream{
		srv: s, grpc: g, session: st, delta: newDelta(), counts: map[string]insight.Count{},
		log: s.cfg.Log.With("mesh", node.Mesh, "name", node.Name),
	}
	a.certs = newCertificates(s, a)
	defer func() {
		if a.insight != nil {
			a.insight.Record(a.counts)
			a.insight.Close()
		}
	}()
	return toStatus(a.run(first, requests, failed))
}

// receive reads a stream's messages until it ends.
func receive[M any](ctx context.Context, recv func() (M, error)) (<-chan M, <-chan error) {
	messages, failed := make(chan M), make(chan error, 1)
	go func() {
		for {
			m, err := recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case messages <- m:
			case <-ctx.Done():
				failed <- status.FromContextError(ctx.Err()).Err()
				return
			}
		}
	}()
	return messages, failed
}

// firstOf returns a stream's first message, which must come in time.
func firstOf[M any](ctx context.Context, messages <-chan M, failed <-chan error, within time.Duration) (m M, err error) {
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case m = <-messages:
		return m, nil
	case err = <-failed:
		return m, err
	case <-ctx.Done():
		return m, ctx.Err()
	case <-t.C:
		return m, status.Errorf(codes.DeadlineExceeded, "no message came within %s", within)
	}
}

// run is the stream's loop.
func (a *adsStream) run(first *discoveryv3.DeltaDiscoveryRequest, requests <-chan *discoveryv3.DeltaDiscoveryRequest, failed <-chan error) error {
	changed, stop := a.srv.cfg.Tracker.Subscribe()
	defer stop()
	if err := a.look(); err != nil {
		return err
	}
	if err := a.request(first); err != nil {
		return err
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(a.wait())
		select {
		case r := <-requests:
			if err := a.request(r); err != nil {
				return err
			}
		case err := <-failed:
			return ended(err)
		case <-changed:
			if err := a.look(); err != nil {
				return err
			}
			// A picture that does not concern this proxy gives nothing to send.
			if !a.made {
				if err := a.push(); err != nil {
					return err
				}
			}
			a.session.Handled(a.picture.Revision)
		case c := <-a.certs.results:
			a.certs.done(c)
			a.need = true
			if err := a.push(); err != nil {
				return err
			}
		case <-a.session.Ended():
			return a.session.Cause()
		case <-timer.C:
			a.certs.start()
			if a.bind.due(time.Now()) {
				a.rebind()
			}
			if !a.again.IsZero() && !time.Now().Before(a.again) {
				a.again, a.made, a.config = time.Time{}, false, nil
			}
			if err := a.push(); err != nil {
				return err
			}
		}
	}
}

// wait is how long the loop may sleep.
func (a *adsStream) wait() time.Duration {
	next := a.certs.next()
	for _, t := range []time.Time{a.retry, a.bind.at, a.again} {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	if next.IsZero() {
		return time.Hour
	}
	return max(0, time.Until(next))
}

// look takes the present picture in. It makes a configuration only where the
// changes since the last one may matter.
func (a *adsStream) look() error {
	pic := a.srv.cfg.Tracker.Now()
	if pic == a.picture || a.session.Leaving() {
		// Who leaves keeps what it has until the end.
		a.picture = pic
		return nil
	}
	old := a.picture
	a.picture = pic
	d, ok := a.session.Dataplane(pic)
	switch {
	case !ok && a.session.Node.Link:
		// It comes, or comes back, over the link.
		a.known, a.made, a.config = false, false, nil
		return nil
	case !ok:
		return errs.New(errs.NotFound, "resource %q not found; create a Dataplane in Kuma CP first or pass it as an argument to kuma-dp", a.session.Node.Key)
	}
	if !a.known || d.Version != a.dataplane.Version {
		if err := a.session.Covers(d); err != nil {
			return err
		}
	}
	a.dataplane, a.known = d, true
	if a.insight == nil {
		n := a.session.Node
		a.insight = a.srv.cfg.Insights.Connect(n.Mesh, n.Name, n.Metadata, n.Version)
	}
	start := time.Now()
	if changes, all := pic.Since(old); all && a.made && !a.srv.cfg.Generator.Affected(pic, a.session.Node, changes) {
		a.srv.stats.Skipped.Add(1)
		a.srv.stats.unrelated.Observe(since(start))
		return nil
	}
	a.made, a.config = false, nil
	a.certs.look()
	return nil
}

// make makes the configuration, where it is not at hand.
func (a *adsStream) make() error {
	if a.config != nil || !a.known || a.failure != nil && a.made {
		return nil
	}
	select {
	case a.srv.slots <- struct{}{}:
		defer func() { <-a.srv.slots }()
	case <-a.session.Ended():
		return a.session.Cause()
	case <-a.grpc.Context().Done():
		return a.grpc.Context().Err()
	}
	// A goroutine of its own has the deep stack that this takes; the loop's stays
	// small while it waits, which is most of its life.
	start := time.Now()
	var config envoy.Resources
	var err error
	made := make(chan struct{})
	var fault string
	go func() {
		defer close(made)
		defer func() {
			if p := recover(); p != nil {
				fault = fmt.Sprintf("%v, at %s", p, debug.Stack())
			}
		}()
		config, err = a.srv.cfg.Generator.Generate(a.picture, a.session.Node)
	}()
	<-made
	if fault != "" {
		panic(fault) // the stream's guard reports it
	}
	a.made, a.need = true, false
	if err != nil {
		a.srv.stats.Failed.Add(1)
		if message := "the configuration could not be made: " + err.Error(); a.failure == nil || a.failure.Message != message {
			a.log.Error("a proxy's configuration could not be made; it keeps the one it has", "error", err)
			a.failure = &mesh.Rejection{Message: message, Time: time.Now().UTC()}
		}
		return nil
	}
	a.srv.stats.Generated.Add(1)
	a.srv.stats.snapshot(config)
	if a.regenerated == nil {
		// Only now, so that nobody makes up the names of meshes.
		a.regenerated = a.srv.stats.regenerated.WithLabelValues(a.dataplane.Mesh)
	}
	a.regenerated.Inc()
	a.took = since(start)
	a.failure, a.config = nil, config
	a.again = a.srv.cfg.Generator.Again(a.session.Node)
	return nil
}

// there is what exists of a type now, the proxy's own secrets included.
func (a *adsStream) there(url string) map[string]*envoy.Packed {
	if url == envoy.SecretType {
		return a.certs.join(a.config[url])
	}
	return a.config[url]
}

// request takes in a request and sends what follows.
func (a *adsStream) request(r *discoveryv3.DeltaDiscoveryRequest) error {
	if id := r.GetNode().GetId(); id != "" && id != a.session.Node.String() {
		return errs.New(errs.Invalid, "stream was authenticated for ID %s. Received request is for node with ID %s. Node ID cannot be changed after stream is initialized", a.session.Node.Key, id)
	}
	if len(r.GetInitialResourceVersions()) > 0 {
		if err := a.make(); err != nil {
			return err
		}
	}
	out, err := a.delta.request(r, time.Now(), a.there)
	if err != nil {
		return err
	}
	url := r.GetTypeUrl()
	switch {
	case out.acknowledged:
		a.srv.stats.Acknowledged.Add(1)
		a.srv.stats.of(url).acknowledged.Inc()
		a.srv.stats.delivery.Observe(since(out.sent))
		a.count(url, insight.Count{Acknowledged: 1})
	case out.rejected:
		a.srv.stats.Rejected.Add(1)
		a.srv.stats.of(url).rejected.Inc()
		a.srv.stats.delivery.Observe(since(out.sent))
		a.count(url, insight.Count{Rejected: 1})
		a.log.Warn("a proxy's Envoy has refused its configuration", "type", url, "reason", r.GetErrorDetail().GetMessage())
		a.bind.refused(time.Now(), a.delta.rejections())
	}
	return a.push()
}

func (a *adsStream) count(url string, c insight.Count) {
	was := a.counts[url]
	a.counts[url] = insight.Count{Sent: was.Sent + c.Sent, Acknowledged: was.Acknowledged + c.Acknowledged, Rejected: was.Rejected + c.Rejected}
}

// push sends what the client lacks and may have now.
func (a *adsStream) push() error {
	if !a.known || a.session.Leaving() {
		return nil
	}
	if !a.made || a.config == nil && (a.need || a.delta.open()) {
		if err := a.make(); err != nil {
			return err
		}
	}
	if a.config != nil {
		have := a.config
		if own := a.certs.join(a.config[envoy.SecretType]); len(own) > 0 {
			have = cloned(a.config)
			have[envoy.SecretType] = own
		}
		responses, retry := a.delta.next(have, a.certs.pending, time.Now())
		a.retry = retry
		a.measure(len(responses) > 0)
		if err := a.send(responses); err != nil {
			return err
		}
		a.report(have)
	} else {
		a.report(nil)
	}
	if a.insight != nil && len(a.counts) > 0 {
		a.insight.Record(a.counts)
		clear(a.counts)
	}
	return nil
}

// measure counts how long the configuration took that is at hand, once. It
// changed if there is something to send.
func (a *adsStream) measure(changed bool) {
	switch {
	case a.took == 0:
	case changed:
		a.srv.stats.changed.Observe(a.took)
	default:
		a.srv.stats.same.Observe(a.took)
	}
	a.took = 0
}

func cloned(r envoy.Resources) envoy.Resources {
	out := make(envoy.Resources, len(r)+1)
	for k, v := range r {
		out[k] = v
	}
	return out
}

// send sends responses. The session's end interrupts it even where the client
// does not read.
func (a *adsStream) send(responses []*discoveryv3.DeltaDiscoveryResponse) error {
	if len(responses) == 0 {
		return nil
	}
	sent := make(chan error, 1)
	go func() {
		for _, r := range responses {
			if err := a.grpc.Send(r); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	select {
	case err := <-sent:
		if err != nil {
			return ended(err)
		}
	case <-a.session.Ended():
		return a.session.Cause()
	}
	for _, r := range responses {
		a.srv.stats.Sent.Add(1)
		a.srv.stats.of(r.GetTypeUrl()).sent.Inc()
		a.count(r.GetTypeUrl(), insight.Count{Sent: 1})
	}
	return nil
}

// report tells session and insight where the client stands, when that changed,
// and lets the configuration go when all of it has arrived.
func (a *adsStream) report(have envoy.Resources) {
	list := a.delta.rejections()
	if a.failure != nil {
		list = append([]mesh.Rejection{*a.failure}, list...)
	}
	now := session.Status{Complete: a.status.Complete, Rejections: list}
	arrived := have != nil && !a.delta.inFlight() && a.retry.IsZero()
	if arrived && !now.Complete && len(list) == 0 {
		now.Complete = a.complete(have)
	}
	if arrived && (now.Complete || len(list) > 0) {
		a.config = nil
	}
	if now.Complete == a.status.Complete && slices.Equal(now.Rejections, a.status.Rejections) {
		return
	}
	if a.insight != nil && !slices.Equal(now.Rejections, a.status.Rejections) {
		a.insight.Rejections(list)
	}
	a.status = now
	a.session.SetStatus(now)
	if len(list) == 0 {
		a.bind = bindRetry{}
	}
}

// complete reports whether the client holds all that the configuration refers
// to.
func (a *adsStream) complete(have envoy.Resources) bool {
	if a.delta.types[envoy.ClusterType] == nil || a.delta.types[envoy.ListenerType] == nil || len(a.certs.pending) > 0 {
		return false
	}
	for _, url := range []string{envoy.ClusterType, envoy.EndpointType, envoy.ListenerType, envoy.RouteType, envoy.ExtensionType} {
		if !a.delta.holds(url, have[url]) {
			return false
		}
	}
	return true
}

// rebind forgets that listeners whose port was taken were sent, so that Envoy
// tries once more.
func (a *adsStream) rebind() {
	a.bind.tried()
	a.need = true
	if k := a.delta.types[envoy.ListenerType]; k != nil {
		for name := range k.refused {
			if name != "" {
				k.sent[name] = 0
			}
		}
	}
}

// identify reads who opens a stream.
func (s *Server) identify(ctx context.Context, n *corev3.Node) (*session.Node, string, error) {
	node, err := session.ParseNode(n, session.Remote(ctx))
	if err != nil {
		return nil, "", err
	}
	token, err := s.cfg.Sessions.Token(ctx)
	return node, token, err
}
