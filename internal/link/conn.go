package link

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"kuma/internal/errs"
	"kuma/internal/identity"
	"kuma/internal/insight"
	"kuma/internal/mesh"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/proto/linkpb"
)

// conn is one open link. All of it belongs to the stream's loop but asks.
type conn struct {
	srv     *Server
	grpc    stream
	session *session.Stream
	log     *slog.Logger

	picture   *state.Picture
	dataplane mesh.Dataplane
	known     bool
	told      []identity.Wanted
	status    session.Status
	// trusts is the revision of the anchors that were sent last.
	trusts int64

	signing  int
	signed   chan signed
	failures map[string]time.Duration
	quota    *rate.Limiter
	left     chan error
	leaving  bool
	// arrived says that the proxy has said that it can serve.
	arrived bool
	denials *rate.Limiter

	asks  chan *ask
	open  map[uint64]*ask
	askID uint64
	// over is closed when the stream has ended.
	over chan struct{}
}

// signed is the answer to a signing request.
type signed struct {
	request *linkpb.SigningRequest
	cert    identity.Certificate
	err     error
}

func newConn(s *Server, g stream, st *session.Stream) *conn {
	return &conn{
		srv: s, grpc: g, session: st, log: s.cfg.Log.With("mesh", st.Node.Mesh, "name", st.Node.Name),
		signed: make(chan signed), failures: map[string]time.Duration{}, quota: rate.NewLimiter(1, 8),
		left: make(chan error, 1), denials: rate.NewLimiter(10, 100),
		asks: make(chan *ask), open: map[uint64]*ask{}, over: make(chan struct{}),
	}
}

// run is the stream's loop.
func (c *conn) run(messages <-chan *linkpb.FromProxy, failed <-chan error) error {
	defer c.giveUp()
	changed, stop := c.srv.cfg.Tracker.Subscribe()
	defer stop()
	if err := c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Welcome{Welcome: &linkpb.Welcome{ControlPlaneInstance: c.srv.cfg.Instance}}}); err != nil {
		return err
	}
	var trust <-chan struct{} // nil where there is nothing to tell
	if c.srv.cfg.Trust != nil {
		var stop func()
		trust, stop = c.srv.cfg.Trust.Subscribe()
		defer stop()
		if err := c.tellTrust(); err != nil {
			return err
		}
	} else if err := c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Trust{Trust: &linkpb.Trust{}}}); err != nil {
		return err // what another configuration of this control plane has sent is to be forgotten
	}
	if err := c.look(); err != nil {
		return err
	}
	if err := c.tell(); err != nil {
		return err
	}
	for {
		var err error
		select {
		case m := <-messages:
			err = c.handle(m)
		case err := <-failed:
			return err
		case <-changed:
			err = c.look()
		case <-c.session.Signal():
			err = c.tell()
		case <-trust:
			err = c.tellTrust()
		case r := <-c.signed:
			c.signing--
			err = c.answer(r)
		case err = <-c.left:
			if err == nil {
				c.srv.stats.Left.Add(1)
				err = c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_LeaveNoted{LeaveNoted: &linkpb.LeaveNoted{}}})
			} else {
				c.log.Warn("a proxy that leaves could not be withdrawn", "error", err)
				err = nil
			}
		case a := <-c.asks:
			err = c.ask(a)
		case <-c.session.Ended():
			return c.session.Cause()
		}
		if err != nil {
			return err
		}
	}
}

// send sends a message. The session's end interrupts it even where kuma-dp does
// not read.
func (c *conn) send(m *linkpb.ToProxy) error {
	sent := make(chan error, 1)
	go func() { sent <- c.grpc.Send(m) }()
	select {
	case err := <-sent:
		return err
	case <-c.session.Ended():
		return c.session.Cause()
	}
}

// look takes the present picture in and tells which certificates are needed,
// when that changed.
func (c *conn) look() error {
	pic := c.srv.cfg.Tracker.Now()
	if pic == c.picture || c.leaving || c.session.Leaving() {
		return nil
	}
	old := c.picture
	c.picture = pic
	if changes, all := pic.Since(old); all && !slices.ContainsFunc(changes, c.concerns) {
		return nil
	}
	d, ok := c.session.Dataplane(pic)
	if !ok {
		return errs.New(errs.NotFound, "resource %q not found; create a Dataplane in Kuma CP first or pass it as an argument to kuma-dp", c.session.Node.Key)
	}
	if !c.known || d.Version != c.dataplane.Version {
		if err := c.session.Covers(d); err != nil {
			return err
		}
	}
	c.dataplane = d
	wanted := c.srv.cfg.Issuer.Wanted(pic, d)
	if c.known && slices.Equal(wanted, c.told) {
		return nil
	}
	c.known, c.told = true, wanted
	list := &linkpb.Identities{}
	for _, w := range wanted {
		list.Identities = append(list.Identities, &linkpb.Identities_Identity{Secret: w.Secret, Revision: w.Revision})
	}
	return c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Identities{Identities: list}})
}

// concerns tells whether a change may alter the proxy's certificates.
func (c *conn) concerns(x state.Change) bool {
	switch x.Key.Kind {
	case mesh.Dataplanes.Name:
		return x.Key.Name == c.session.Node.Name && x.Key.Mesh == c.session.Node.Mesh
	case mesh.Meshes.Name:
		return x.Key.Name == c.session.Node.Mesh
	case mesh.DataplaneInsights.Name:
		return false
	}
	return x.Key.Mesh == "" || x.Key.Mesh == c.session.Node.Mesh
}

// tell sends the status of the configuration, when it changed.
func (c *conn) tell() error {
	now := c.session.Status()
	if now.Complete == c.status.Complete && slices.Equal(now.Rejections, c.status.Rejections) && slices.Equal(now.LeftOut, c.status.LeftOut) {
		return nil
	}
	c.status = now
	m := &linkpb.ConfigStatus{Complete: now.Complete, LeftOut: now.LeftOut[:min(len(now.LeftOut), maxRejected)]}
	for _, r := range now.Rejections[:min(len(now.Rejections), maxRejected)] {
		m.Rejections = append(m.Rejections, &linkpb.ConfigStatus_Rejection{TypeUrl: r.TypeURL, Resource: r.Resource, Message: r.Message})
	}
	return c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_ConfigStatus{ConfigStatus: m}})
}

// tellTrust sends the control plane's own anchors, when they changed.
func (c *conn) tellTrust() error {
	bundle, revision := c.srv.cfg.Trust.Trust()
	if revision == c.trusts || len(bundle) == 0 {
		return nil
	}
	c.trusts = revision
	return c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Trust{Trust: &linkpb.Trust{Bundle: bundle, Revision: revision}}})
}

// handle takes in what kuma-dp says. What is not known here is ignored: kuma-dp
// may be newer.
func (c *conn) handle(m *linkpb.FromProxy) error {
	switch x := m.GetMessage().(type) {
	case *linkpb.FromProxy_SigningRequest:
		return c.sign(x.SigningRequest)
	case *linkpb.FromProxy_Readiness:
		reason := cut(x.Readiness.GetReason(), maxReason)
		c.session.SetReadiness(x.Readiness.GetReady(), reason)
		c.srv.cfg.Insights.Readiness(c.session.Node.Mesh, c.session.Node.Name, x.Readiness.GetReady(), reason)
		if x.Readiness.GetReady() && !c.arrived {
			c.arrived = true
			go c.arrive(c.grpc.Context())
		}
	case *linkpb.FromProxy_Leaving:
		if c.leaving {
			return nil
		}
		c.leaving = true
		go func() { c.left <- c.session.Leave(c.grpc.Context(), c.srv.cfg.Settle) }()
	case *linkpb.FromProxy_InspectReply:
		c.reply(x.InspectReply)
	case *linkpb.FromProxy_Denials:
		c.denied(x.Denials)
	case *linkpb.FromProxy_TrustNoted:
		if c.srv.cfg.Trust != nil && x.TrustNoted.GetRevision() == c.trusts {
			noted := session.Trust{Revision: c.trusts, Error: cut(x.TrustNoted.GetError(), maxReason)}
			c.session.SetTrust(noted)
			if c.srv.cfg.ShareTrust {
				c.srv.cfg.Insights.Trust(c.session.Node.Mesh, c.session.Node.Name, mesh.TrustInsight{Revision: strconv.FormatInt(noted.Revision, 10), Error: noted.Error})
			}
		}
	}
	return nil
}

// arrive has the proxy's inbounds get traffic, however long the store refuses.
func (c *conn) arrive(ctx context.Context) {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := c.session.Arrive(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		c.log.Warn("a proxy that can serve gets no traffic yet, trying again", "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// sign has a signing request answered beside the loop, since an authority may
// be slow.
func (c *conn) sign(r *linkpb.SigningRequest) error {
	refuse := func(err error) error { return c.answer(signed{request: r, err: err}) }
	switch {
	case len(r.GetCsr()) > maxRequest || len(r.GetSecret()) > maxReason || len(r.GetRevision()) > maxReason:
		return refuse(errs.New(errs.Invalid, "the signing request is too large"))
	case !c.known || c.leaving:
		return refuse(errs.New(errs.Unavailable, "the proxy has no Dataplane now"))
	case c.signing == maxSigning || !c.quota.Allow():
		return refuse(errs.New(errs.Unavailable, "there are too many signing requests on this link"))
	}
	c.signing++
	pic, d := c.picture, c.dataplane
	go func() {
		out := signed{request: r, err: errs.New(errs.Internal, "a fault of the control plane; its log says more")}
		defer func() {
			if p := recover(); p != nil {
				c.srv.stats.Panics.Add(1)
				c.log.Error("a certificate could not be issued by a fault of the control plane; please report it", "panic", p)
			}
			select {
			case c.signed <- out:
			case <-c.over:
			}
		}()
		ctx, cancel := context.WithTimeout(c.grpc.Context(), 30*time.Second)
		defer cancel()
		out.cert, out.err = c.srv.cfg.Issuer.Sign(ctx, pic, d, r.GetSecret(), r.GetCsr())
	}()
	return nil
}

// answer sends a certificate, or why there is none.
func (c *conn) answer(s signed) error {
	m := &linkpb.Certificate{Secret: s.request.GetSecret(), Revision: s.request.GetRevision()}
	if s.err != nil {
		c.srv.stats.Failed.Add(1)
		wait := min(c.srv.cfg.RetryMax, max(c.srv.cfg.RetryBase, 2*c.failures[m.Secret]))
		if errs.Is(s.err, errs.Conflict) {
			wait = 100 * time.Millisecond // the Dataplane changed meanwhile
		} else if len(c.failures) < maxSigning || c.failures[m.Secret] != 0 {
			c.failures[m.Secret] = wait
		}
		m.Error, m.RetryAfterMs = s.err.Error(), wait.Milliseconds()
		c.log.Warn("a proxy's certificate could not be issued", "secret", cut(m.Secret, maxField), "retry", wait, "error", s.err)
		return c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Certificate{Certificate: m}})
	}
	c.srv.stats.Issued.Add(1)
	delete(c.failures, m.Secret)
	m.Chain, m.Revision = s.cert.Chain, s.cert.Revision
	m.RenewAt, m.NotAfter = s.cert.RenewAt.Unix(), s.cert.NotAfter.Unix()
	n := c.session.Node
	c.session.SetIssued(m.Secret, session.Issued{Revision: s.cert.Revision, RenewAt: s.cert.RenewAt})
	c.srv.cfg.Insights.Issued(n.Mesh, n.Name, insight.Certificate{NotAfter: s.cert.NotAfter, Backend: s.cert.Backend, Supported: []string{s.cert.Backend}})
	return c.send(&linkpb.ToProxy{Message: &linkpb.ToProxy_Certificate{Certificate: m}})
}

// denied logs refusals that the proxy's Envoy made, no more than a reader can
// bear.
func (c *conn) denied(m *linkpb.Denials) {
	list := m.GetDenials()
	c.srv.stats.Denied.Add(uint64(len(list)) + m.GetDropped())
	for _, d := range list[:min(len(list), maxDenials)] {
		if !c.denials.Allow() {
			return
		}
		c.log.Info("a proxy denied a request", "inbound", cut(d.GetInbound(), maxField), "caller", cut(d.GetCaller(), maxField),
			"reason", cut(d.GetReason(), maxField), "request", cut(d.GetRequest(), maxField), "at", time.UnixMilli(d.GetUnixMs()).UTC())
	}
}

// cut bounds a text.
func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}
