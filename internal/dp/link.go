package dp

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"kuma/internal/errs"
	"kuma/proto/linkpb"
)

// link is kuma-dp's own stream to the control plane: it is kept open as long as
// kuma-dp runs, and opened again whenever it breaks.
type link struct {
	target string
	trust  *trust
	hello  *linkpb.Hello
	keys   *keyring
	state  *state
	log    *slog.Logger
	// limit is the longest pause between attempts; patience is how long the
	// first Welcome is waited for.
	limit, patience time.Duration
	// keepToken writes a new token to where Envoy reads it; it may be nil.
	keepToken func(string) error

	// welcomed is closed at the first Welcome, absent when the control plane
	// does not know the link.
	welcomed, absent chan struct{}
	// leaveNoted is closed when the control plane has taken the proxy's
	// endpoints out.
	leaveNoted chan struct{}

	mu      sync.Mutex
	token   string
	leaving bool
	// ready is the last Readiness, repeated on each new stream.
	ready *linkpb.Readiness
	// out takes what other goroutines have to say; it is nil while no stream is
	// welcomed.
	out chan *linkpb.FromProxy
	// gone is closed when the stream that was welcomed last has ended.
	gone  chan struct{}
	admin *admin
}

const maxLinkMessage = 4 << 20

// errAbsent says that the control plane does not know the link.
var errAbsent = errs.New(errs.NotAllowed, "the control plane does not know the link")

// target makes a gRPC target of the control plane's URL.
func target(cp string) (string, error) {
	u, err := url.Parse(cp)
	if err != nil {
		return "", errs.New(errs.Invalid, "--cp-address: %w", err)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return "passthrough:///" + net.JoinHostPort(u.Hostname(), port), nil
}

// run keeps the stream open until the context ends. It returns an error only
// where waiting can't help and no configuration was ever complete.
func (l *link) run(ctx context.Context) error {
	pauses := backoff{limit: max(l.limit, firstPause)}
	said := changes{log: l.log}
	began := time.Now()
	for {
		opened, err := l.stream(ctx)
		if ctx.Err() != nil || l.isLeaving() {
			return nil
		}
		if errors.Is(err, errAbsent) && !l.wasWelcomed() {
			l.log.Info("this control plane has no link; going on in the contract's way")
			l.state.set(func(s *state) { s.linked = false })
			close(l.absent)
			return nil
		}
		if opened {
			pauses.reset()
			said.clear()
		}
		if _, ok := errors.AsType[lasting](err); ok && !l.state.accepted() {
			return err
		}
		if !l.wasWelcomed() && time.Since(began) > l.patience {
			return errs.New(errs.Unavailable, "open the link to the control plane: it was tried for %s (KUMA_CONTROL_PLANE_RETRY_MAX_DURATION): %w", l.patience, err)
		}
		said.warn("the link to the control plane is down, trying again; traffic goes on with what Envoy has", err)
		if !sleep(ctx, pauses.pause()) {
			return nil
		}
	}
}

func (l *link) isLeaving() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leaving
}

func (l *link) wasWelcomed() bool {
	select {
	case <-l.welcomed:
		return true
	default:
		return false
	}
}

// stream opens the link once and serves it until it ends. It reports whether it
// was welcomed.
func (l *link) stream(ctx context.Context) (opened bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := grpc.NewClient(l.target,
		grpc.WithTransportCredentials(telling{credentials.NewTLS(l.trust.tls()), l.trust}),
		grpc.WithContextDialer(func(ctx context.Context, at string) (net.Conn, error) {
			// A control plane that went silent is noticed by the kernel.
			d := net.Dialer{Timeout: bootstrapTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: time.Second, Count: 3}}
			return d.DialContext(ctx, "tcp", at)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxLinkMessage)),
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithDisableRetry(), grpc.WithDisableServiceConfig(), grpc.WithUserAgent("kuma-dp"),
	)
	if err != nil {
		return false, lasting{errs.New(errs.Invalid, "open the link to the control plane: %w", err)}
	}
	defer conn.Close()
	l.mu.Lock()
	token := l.token
	l.mu.Unlock()
	meta := ctx
	if token != "" {
		meta = metadata.AppendToOutgoingContext(ctx, "authorization", token)
	}
	s, err := linkpb.NewLinkClient(conn).Stream(meta)
	if err == nil {
		err = s.Send(&linkpb.FromProxy{Message: &linkpb.FromProxy_Hello{Hello: l.hello}})
	}
	if err != nil {
		if errors.Is(err, io.EOF) {
			_, err = s.Recv() // which has the status
		}
		return false, explain(err)
	}
	in, end := receive(ctx, s.Recv)
	defer l.closed()
	var out chan *linkpb.FromProxy // nil, and so silent, until the stream is welcomed
	asking := make(chan struct{}, maxInspections)
	var renewal <-chan time.Time
	for {
		select {
		case m := <-in:
			if q := m.GetInspect(); q != nil && opened {
				l.mu.Lock()
				a := l.admin
				l.mu.Unlock()
				go inspect(ctx, a, q, out, asking)
				continue
			}
			welcome, err := l.handle(m)
			if err != nil {
				return opened, err
			}
			if welcome && !opened {
				opened = true
				out = make(chan *linkpb.FromProxy, 64)
				if err := l.greet(s, out); err != nil {
					return opened, explain(err)
				}
			}
		case err := <-end:
			return opened, explain(err)
		case m := <-out:
			if err := s.Send(m); err != nil {
				return opened, explain(err)
			}
		case <-renewal:
		case <-ctx.Done():
			return opened, ctx.Err()
		}
		if opened {
			now := time.Now()
			list, next, err := l.keys.due(now)
			if err != nil {
				return opened, err
			}
			for _, r := range list {
				if err := s.Send(&linkpb.FromProxy{Message: &linkpb.FromProxy_SigningRequest{SigningRequest: r}}); err != nil {
					return opened, explain(err)
				}
			}
			renewal = nil
			if !next.IsZero() {
				renewal = time.After(time.Until(next))
			}
		}
	}
}

// greet follows a Welcome: what was under way on an earlier stream starts anew.
func (l *link) greet(s grpc.BidiStreamingClient[linkpb.FromProxy, linkpb.ToProxy], out chan *linkpb.FromProxy) error {
	l.keys.reconnected(time.Now())
	l.state.set(func(s *state) { s.refusal = "" })
	l.mu.Lock()
	l.out, l.gone = out, make(chan struct{})
	ready := l.ready
	l.mu.Unlock()
	if ready != nil {
		return s.Send(&linkpb.FromProxy{Message: &linkpb.FromProxy_Readiness{Readiness: ready}})
	}
	return nil
}

// closed lets others know that nobody listens.
func (l *link) closed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.out != nil {
		close(l.gone)
	}
	l.out = nil
}

// handle takes one message of the control plane.
func (l *link) handle(m *linkpb.ToProxy) (welcome bool, err error) {
	switch m := m.GetMessage().(type) {
	case *linkpb.ToProxy_Welcome:
		l.log.Info("the control plane has taken this proxy in", "control_plane", m.Welcome.GetControlPlaneInstance())
		if !l.wasWelcomed() {
			close(l.welcomed)
		}
		return true, nil
	case *linkpb.ToProxy_Refusal:
		err := errs.New(errs.Denied, "the control plane refuses this proxy: %s", m.Refusal.GetReason())
		l.state.set(func(s *state) { s.refusal = m.Refusal.GetReason() })
		if m.Refusal.GetRetry() {
			return false, err
		}
		return false, lasting{err}
	case *linkpb.ToProxy_Identities:
		return false, l.keys.want(m.Identities.GetIdentities(), time.Now())
	case *linkpb.ToProxy_Certificate:
		c := m.Certificate
		if err := l.keys.put(c, time.Now()); err != nil {
			l.log.Warn("no certificate", "secret", c.GetSecret(), "error", err)
		} else if c.GetError() == "" {
			l.log.Info("certificate received", "secret", c.GetSecret(), "not_after", time.Unix(c.GetNotAfter(), 0).UTC(), "renew_at", time.Unix(c.GetRenewAt(), 0).UTC())
		}
	case *linkpb.ToProxy_ConfigStatus:
		l.state.configured(m.ConfigStatus)
	case *linkpb.ToProxy_Trust:
		noted := &linkpb.TrustNoted{Revision: m.Trust.GetRevision()}
		if err := l.trust.take(m.Trust.GetBundle()); err != nil {
			l.log.Warn("the control plane's authorities were not taken over in full", "error", err)
			noted.Error = err.Error()
		} else if len(m.Trust.GetBundle()) > 0 {
			l.log.Info("the control plane has sent its authorities", "revision", m.Trust.GetRevision())
		}
		if !l.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_TrustNoted{TrustNoted: noted}}) {
			return false, errs.New(errs.Unavailable, "the link is congested") // a new stream is told anew
		}
	case *linkpb.ToProxy_Credential:
		l.mu.Lock()
		l.token = m.Credential.GetToken()
		l.mu.Unlock()
		if l.keepToken != nil {
			if err := l.keepToken(m.Credential.GetToken()); err != nil {
				l.log.Warn("could not keep the new token", "error", err)
			}
		}
		l.log.Info("the control plane has sent a new token")
	case *linkpb.ToProxy_LeaveNoted:
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.leaving {
			select {
			case <-l.leaveNoted:
			default:
				close(l.leaveNoted)
			}
		}
	}
	return false, nil
}

// explain turns the end of a stream into an error: errAbsent, one that lasts,
// or one that waiting may mend.
func explain(err error) error {
	if errors.Is(err, io.EOF) {
		return errs.New(errs.Unavailable, "the control plane closed the link")
	}
	st := status.Convert(err)
	text := st.Message()
	switch st.Code() {
	case codes.Unimplemented:
		return errAbsent
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument:
		return lasting{errs.New(errs.Denied, "the control plane refuses this proxy: %s", text)}
	case codes.Unavailable:
		// gRPC gives the cause of a failed handshake as text only.
		if strings.Contains(text, "failed to verify certificate") {
			return lasting{errs.New(errs.Unavailable, "open the link to the control plane: %s; name the file with the control plane's authority with --ca-cert-file", text)}
		}
	}
	return errs.New(errs.Unavailable, "link to the control plane: %s", text)
}

// say sends a message where the stream is open and not congested; it reports
// whether it took it.
func (l *link) say(m *linkpb.FromProxy) bool {
	l.mu.Lock()
	out := l.out
	l.mu.Unlock()
	select {
	case out <- m:
		return true
	default:
		return false
	}
}

// tellReady tells whether the proxy is able to serve.
func (l *link) tellReady(ready bool, reason string) {
	m := &linkpb.Readiness{Ready: ready, Reason: reason}
	if ready {
		m.Reason = ""
	}
	l.mu.Lock()
	l.ready = m
	l.mu.Unlock()
	l.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Readiness{Readiness: m}})
}

// leave announces that the proxy is about to drain, and waits until the control
// plane has taken its endpoints out, for leavePatience at most.
func (l *link) leave(ctx context.Context) {
	l.mu.Lock()
	l.leaving = true
	gone := l.gone
	l.mu.Unlock()
	if !l.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Leaving{Leaving: &linkpb.Leaving{}}}) {
		l.log.Warn("leaving could not be announced: the link to the control plane is down")
		return
	}
	began := time.Now()
	t := time.NewTimer(leavePatience)
	defer t.Stop()
	select {
	case <-l.leaveNoted:
		l.log.Info("the control plane has taken this proxy's endpoints out", "after", time.Since(began).Round(time.Microsecond))
	case <-gone:
		l.log.Warn("the link ended before the control plane had answered that this proxy leaves; draining anyway")
	case <-t.C:
		l.log.Warn("the control plane did not answer that this proxy leaves; draining anyway", "after", leavePatience)
	case <-ctx.Done():
	}
}

const (
	inspectChunk   = 256 << 10
	maxInspect     = 64 << 20
	maxInspections = 4
)

// inspect answers with a page of Envoy's admin interface.
func inspect(ctx context.Context, a *admin, q *linkpb.Inspect, out chan<- *linkpb.FromProxy, asking chan struct{}) {
	reply := func(r *linkpb.InspectReply) bool {
		r.Id = q.GetId()
		select {
		case out <- &linkpb.FromProxy{Message: &linkpb.FromProxy_InspectReply{InspectReply: r}}:
			return true
		case <-ctx.Done():
			return false
		}
	}
	select {
	case asking <- struct{}{}:
		defer func() { <-asking }()
	default:
		reply(&linkpb.InspectReply{Error: "this proxy answers too many inspections already; try again"})
		return
	}
	if err := readPage(ctx, a, inspectPath(q), func(chunk []byte) bool {
		return reply(&linkpb.InspectReply{Chunk: chunk})
	}); err != nil {
		reply(&linkpb.InspectReply{Error: err.Error()})
		return
	}
	reply(&linkpb.InspectReply{Done: true})
}

// inspectPath is the admin page that answers a request; empty if there is none.
func inspectPath(q *linkpb.Inspect) string {
	switch q.GetPage() {
	case linkpb.Inspect_CONFIG_DUMP:
		if q.GetAll() {
			return "/config_dump?include_eds"
		}
		return "/config_dump"
	case linkpb.Inspect_STATS:
		v := url.Values{}
		path := "/stats"
		if q.GetJson() {
			v.Set("format", "json")
		}
		if !q.GetAll() {
			path += "?usedonly"
			if len(v) > 0 {
				path += "&" + v.Encode()
			}
			return path
		}
		if len(v) > 0 {
			path += "?" + v.Encode()
		}
		return path
	case linkpb.Inspect_CLUSTERS:
		if q.GetJson() {
			return "/clusters?format=json"
		}
		return "/clusters"
	}
	return ""
}

func readPage(ctx context.Context, a *admin, path string, chunk func([]byte) bool) error {
	switch {
	case path == "":
		return errs.New(errs.Invalid, "this kuma-dp does not know the page that is asked for")
	case a == nil:
		return errs.New(errs.Unavailable, "envoy does not run yet")
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	resp, err := a.ask(ctx, http.MethodGet, path)
	if err != nil {
		return errs.New(errs.Unavailable, "ask Envoy for %s: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errs.New(errs.Unavailable, "ask Envoy for %s: status %d", path, resp.StatusCode)
	}
	for total := 0; ; {
		buf := make([]byte, inspectChunk)
		n, err := io.ReadFull(resp.Body, buf)
		if total += n; total > maxInspect {
			return errs.New(errs.Unavailable, "envoy's answer to %s has more than %d bytes", path, maxInspect)
		}
		if n > 0 && !chunk(buf[:n]) {
			return ctx.Err()
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return errs.New(errs.Unavailable, "read Envoy's answer to %s: %w", path, err)
		}
	}
}
