// Package session knows which proxies are here: who holds a name, by which
// credential and streams, what was issued to it, and what its Envoy says of its
// configuration. It registers the Dataplanes that proxies bring with them and
// withdraws them when the proxies are gone.
package session

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/state"
	"kuma/internal/store"
)

// Kind is a sort of stream.
type Kind uint8

// The streams that a proxy opens.
const (
	// ADS carries configuration to Envoy.
	ADS Kind = iota
	// HDS carries Envoy's health checks.
	HDS
	// Link is kuma-dp's own.
	Link
	kinds
)

// String is the stream's name for logs.
func (k Kind) String() string { return [...]string{"ads", "hds", "link", "?"}[min(k, kinds)] }

// Config is what a Registry needs.
type Config struct {
	Tracker *state.Tracker
	Store   store.Store
	Gate    *admit.Gate
	// Credentials verifies the proxies' tokens.
	Credentials *auth.ProxyChecker
	// Delay is how long a Dataplane that a stream registered outlives its last
	// stream; the default is 10 s, and a negative one means not at all.
	Delay time.Duration
	// Grace is how long after its start the control plane waits for proxies of
	// its last life to come back before it takes them for gone; the default is
	// 60 s.
	Grace time.Duration
	// Patience is how long a newcomer waits for the end of another holder of
	// its name before it is refused; the default is 1 s.
	Patience time.Duration
	// Log may be nil.
	Log *slog.Logger
}

// A Registry knows all sessions of this control plane. It is safe for
// concurrent use.
type Registry struct {
	cfg Config

	mu       sync.Mutex
	sessions map[Key]*session
	stopping bool
	// barriers are those who wait for all streams to have handled a revision.
	barriers map[*barrier]struct{}
	// waiting is len(barriers), to be read without the lock.
	waiting atomic.Int32
	// opened and refused count streams.
	opened, refused atomic.Uint64
}

// New makes a Registry. Run must run for it to notice revocations.
func New(c Config) *Registry {
	if c.Delay == 0 {
		c.Delay = 10 * time.Second
	}
	if c.Grace == 0 {
		c.Grace = time.Minute
	}
	if c.Patience == 0 {
		c.Patience = time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Registry{cfg: c, sessions: map[Key]*session{}, barriers: map[*barrier]struct{}{}}
}

// session is one run of a proxy: what its streams share. All fields are
// guarded by Registry.mu but those that are set once.
type session struct {
	key      Key
	instance string
	// turn holds one: who took it may register or withdraw. It is the key's,
	// and passes from one instance's session to the next.
	turn chan struct{}

	streams [kinds]*Stream
	open    int
	// succeeds says that another instance held the name before; arrived that
	// the proxy has said that it can serve.
	succeeds, arrived bool
	// gone is closed when the last stream has ended.
	gone    chan struct{}
	timer   *time.Timer
	leaving bool
	// credential is that of the last stream opened.
	credential auth.Proxy
	issued     map[string]Issued
	status     Status
	readiness  mesh.ReadinessInsight
	trust      Trust
}

// A Stream is one stream of a proxy that was let in. Close it when it ends.
type Stream struct {
	// Node is who opened the stream.
	Node *Node
	// Kind is which sort of stream it is.
	Kind Kind

	reg        *Registry
	session    *session
	credential auth.Proxy
	remote     netip.AddrPort
	ended      chan struct{}
	cause      error // set before ended is closed
	signal     chan struct{}
	handled    atomic.Uint64
}

// Open lets a stream in. It verifies the credential, finds out who holds the
// name, registers the Dataplane that the proxy brings, and returns when the
// picture shows it. The errors' texts are for the proxy: kinds Unauthenticated,
// Denied, Invalid and NotFound don't get better by waiting, Conflict (the name
// is taken), Unavailable and Internal may.
//
// A newer stream of the same instance ends the older of its kind. Another
// instance takes over where the holder is leaving, or has no stream left: a
// broken connection ends its streams. Two that live are never made to alternate:
// the newcomer is refused.
func (r *Registry) Open(ctx context.Context, kind Kind, node *Node, token string) (*Stream, error) {
	st, err := r.enter(ctx, kind, node, token)
	if err != nil {
		r.refused.Add(1)
		return nil, err
	}
	if err := st.register(ctx); err != nil {
		st.Close()
		r.refused.Add(1)
		return nil, err
	}
	r.opened.Add(1)
	return st, nil
}

func (r *Registry) enter(ctx context.Context, kind Kind, node *Node, token string) (*Stream, error) {
	credential, err := r.cfg.Credentials.Verify(ctx, node.Mesh, node.Name, token)
	if err != nil {
		return nil, err
	}
	// Who may not be this Dataplane must not disturb who is.
	if held, err := r.cfg.Store.Get(ctx, node.resource()); err == nil {
		if err := authFailed(credential.Covers(mesh.Dataplanes.From(held))); err != nil {
			return nil, err
		}
	}
	var patience <-chan time.Time
	for {
		st, gone := r.take(kind, node, credential, remoteAddr(ctx))
		if st != nil {
			return st, nil
		}
		if patience == nil {
			patience = time.After(r.cfg.Patience)
		}
		select {
		case <-gone:
		case <-patience:
			return nil, errs.New(errs.Conflict, "there is already an active stream from this node, try again later: another proxy named %q holds this name in mesh %q; stop it, or give this one a name of its own", node.Name, node.Mesh)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// take gives the stream its place, or returns what to wait for.
func (r *Registry) take(kind Kind, node *Node, credential auth.Proxy, remote netip.AddrPort) (st *Stream, gone <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sessions[node.Key]
	switch {
	case s == nil:
		s = &session{key: node.Key, instance: node.Instance, turn: make(chan struct{}, 1)}
	case s.instance == node.Instance:
	case s.open == 0 || s.leaving:
		s.stop()
		for _, old := range s.streams {
			if old != nil {
				old.end(errs.New(errs.Conflict, "another proxy has taken this name over"))
			}
		}
		s = &session{key: node.Key, instance: node.Instance, turn: s.turn, succeeds: true}
	default:
		return nil, s.gone
	}
	r.sessions[node.Key] = s
	s.stop()
	st = &Stream{Node: node, Kind: kind, reg: r, session: s, credential: credential, remote: remote, ended: make(chan struct{}), signal: make(chan struct{}, 1)}
	if old := s.streams[kind]; old != nil {
		old.end(errs.New(errs.Conflict, "a newer stream of the same proxy has taken over"))
	} else {
		if s.open == 0 {
			s.gone = make(chan struct{})
		}
		s.open++
	}
	s.streams[kind] = st
	s.credential = credential
	return st, nil
}

// stop ends the timer of a session's end.
func (s *session) stop() {
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}

// end tells the stream's loop to end, for a reason. Registry.mu is held.
func (st *Stream) end(cause error) {
	select {
	case <-st.ended:
	default:
		st.cause = cause
		close(st.ended)
	}
}

// Close says that the stream has ended.
func (st *Stream) Close() {
	r, s := st.reg, st.session
	r.mu.Lock()
	defer r.mu.Unlock()
	st.end(errs.New(errs.Unavailable, "the stream was closed"))
	for b := range r.barriers {
		b.done(st)
	}
	if s.streams[st.Kind] != st {
		return // another took its place
	}
	s.streams[st.Kind] = nil
	s.open--
	if s.open > 0 {
		return
	}
	close(s.gone)
	if r.sessions[s.key] != s || r.stopping {
		return
	}
	s.timer = time.AfterFunc(max(0, r.cfg.Delay), func() { r.expire(s) })
}

// Ended is closed when the stream must end; Cause then says why.
func (st *Stream) Ended() <-chan struct{} { return st.ended }

// Cause is why the stream must end, after Ended.
func (st *Stream) Cause() error { return st.cause }

// Signal gets a signal after something that the proxy's streams share has
// changed: the status of its configuration, or that it leaves. It holds one.
func (st *Stream) Signal() <-chan struct{} { return st.signal }

// Dataplane returns the proxy's own Dataplane in a picture.
func (st *Stream) Dataplane(pic *state.Picture) (mesh.Dataplane, bool) {
	m := pic.Mesh(st.Node.Mesh)
	if m == nil {
		return mesh.Dataplane{}, false
	}
	return m.Dataplane(st.Node.Name)
}

// Covers tells whether the stream's credential covers the Dataplane. Ask
// whenever it changed.
func (st *Stream) Covers(d mesh.Dataplane) error { return authFailed(st.credential.Covers(d)) }

// Leaving reports whether the proxy has said that it is about to end.
func (st *Stream) Leaving() bool {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	return st.session.leaving
}

// notify signals all streams of the session. Registry.mu is held.
func (s *session) notify() {
	for _, st := range s.streams {
		if st == nil {
			continue
		}
		select {
		case st.signal <- struct{}{}:
		default:
		}
	}
}

// Status is what a proxy's Envoy has accepted or refused.
type Status struct {
	// Complete: all that the configuration refers to was accepted once.
	Complete bool
	// Rejections are what Envoy refuses now. The slice is never changed.
	Rejections []mesh.Rejection
	// LeftOut says what could not be put into the configuration: see
	// Registry.SetLeftOut. The slice is never changed.
	LeftOut []string
}

// SetStatus records the status, but for LeftOut, and signals the proxy's streams.
func (st *Stream) SetStatus(s Status) {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	if st.session.streams[st.Kind] != st {
		return
	}
	s.LeftOut = st.session.status.LeftOut
	st.session.status = s
	st.session.notify()
}

// SetLeftOut records what could not be put into the configuration of a proxy
// that is here, and signals its streams where that is another than before.
func (r *Registry) SetLeftOut(key Key, list []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sessions[key]
	if s == nil || slices.Equal(s.status.LeftOut, list) {
		return
	}
	s.status.LeftOut = list
	s.notify()
}

// Status returns the status as it was recorded last.
func (st *Stream) Status() Status {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	return st.session.status
}

// SetReadiness records what the proxy says of itself.
func (st *Stream) SetReadiness(ready bool, reason string) {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	st.session.readiness = mesh.ReadinessInsight{Ready: ready, Reason: reason}
}

// Trust is which anchors of the control plane a proxy's kuma-dp has taken.
type Trust struct {
	// Revision names them; 0 means that it has said nothing.
	Revision int64
	// Error is why it could not take them, or keep them.
	Error string
}

// SetTrust records what the proxy's kuma-dp says of the anchors it was sent.
func (st *Stream) SetTrust(t Trust) {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	st.session.trust = t
}

// An Info says what is known of a proxy that is here.
type Info struct {
	Key      Key
	Instance string
	// Credential is the proxy's; its Stamp and Claims say by what it came.
	Credential auth.Proxy
	// ADS, HDS and Link say which streams are open; Linked that the proxy has a
	// link, open or not.
	ADS, HDS, Link, Linked bool
	Leaving                bool
	Status                 Status
	Readiness              mesh.ReadinessInsight
	Trust                  Trust
}

func (s *session) info() Info {
	return Info{
		Key: s.key, Instance: s.instance, Credential: s.credential, Leaving: s.leaving, Status: s.status, Readiness: s.readiness, Trust: s.trust,
		ADS: s.streams[ADS] != nil, HDS: s.streams[HDS] != nil, Link: s.streams[Link] != nil,
		Linked: s.streams[Link] != nil || s.streams[ADS] != nil && s.streams[ADS].Node.Link,
	}
}

// Find returns what is known of a proxy; false where no stream of it is open.
func (r *Registry) Find(key Key) (Info, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sessions[key]
	if s == nil || s.open == 0 {
		return Info{}, false
	}
	return s.info(), true
}

// List returns what is known of all proxies that are here, in no order.
func (r *Registry) List() []Info {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Info, 0, len(r.sessions))
	for _, s := range r.sessions {
		if s.open > 0 {
			out = append(out, s.info())
		}
	}
	return out
}

// Node returns what the proxy said of itself on its ADS stream, or nil where
// none is open.
func (r *Registry) Node(key Key) *Node {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sessions[key]; s != nil && s.streams[ADS] != nil {
		return s.streams[ADS].Node
	}
	return nil
}

// Count returns how many proxies are here.
func (r *Registry) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, s := range r.sessions {
		if s.open > 0 {
			n++
		}
	}
	return n
}

// Opened and Refused count the streams that were let in and that were not.
func (r *Registry) Opened() uint64 { return r.opened.Load() }

// Refused counts the streams that were not let in.
func (r *Registry) Refused() uint64 { return r.refused.Load() }

// End ends all streams of the proxies that the filter chooses, and returns how
// many proxies that were. The reason is told to them.
func (r *Registry) End(filter func(Info) bool, reason error) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, s := range r.sessions {
		if s.open == 0 || !filter(s.info()) {
			continue
		}
		n++
		for _, st := range s.streams {
			if st != nil {
				st.end(reason)
			}
		}
	}
	return n
}
