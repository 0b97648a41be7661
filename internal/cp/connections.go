package cp

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	stdlog "log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/auth"
)

// connections knows the ports of this control plane and who is connected to
// them, for the TLS report. What it keeps of one connection is some 200 bytes,
// and the ports' own limits bound how many there are. The zero value is ready;
// it is safe for concurrent use.
type connections struct {
	// refusals is told of handshakes that fail; nil tells nobody.
	refusals *refusals

	mu    sync.Mutex
	doors []*door
	open  map[*connection]struct{}
}

// door is one port.
type door struct {
	// name says which it is, such as "dp-server".
	name string
	// caller says what sort of peers call there: "proxy", "user", …
	caller string
	// addr is where it listens.
	addr net.Addr
	// tls is its configuration; nil where it has none.
	tls *tls.Config
	// mend is what gives it TLS, or closes it to other machines; empty where
	// there is nothing to mend.
	mend string

	conns *connections
}

// add makes a port known.
func (cs *connections) add(d door) *door {
	d.conns = cs
	if cs.refusals != nil && d.tls != nil {
		cs.refusals.count.WithLabelValues(d.name) // zero is seen from the start
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.doors = append(cs.doors, &d)
	return &d
}

// serve makes an HTTP server's port known, with TLS where the server has it.
// It returns the listener to serve: who connects is known from then on.
func (cs *connections) serve(d door, s *http.Server, l net.Listener) net.Listener {
	d.addr, d.tls = l.Addr(), s.TLSConfig
	known := cs.add(d)
	if cs.refusals != nil {
		s.ErrorLog = stdlog.New(errorLog{d.name, cs.refusals, cs.refusals.log}, "", 0)
	}
	inner, state := s.ConnContext, s.ConnState
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if own := connectionOf(c); own != nil {
			ctx = context.WithValue(ctx, connectionKey{}, own)
		}
		if inner != nil {
			ctx = inner(ctx, c)
		}
		return ctx
	}
	s.ConnState = func(c net.Conn, to http.ConnState) {
		// The first request comes after the handshake.
		if t, ok := c.(*tls.Conn); ok && to == http.StateActive {
			if own := connectionOf(c); own != nil && own.handshake.Load() == nil {
				own.secured(t.ConnectionState())
			}
		}
		if state != nil {
			state(c, to)
		}
	}
	return watched{l, known}
}

// watched is a listener whose connections are known.
type watched struct {
	net.Listener
	door *door
}

// Accept returns the next connection.
func (w watched) Accept() (net.Conn, error) {
	c, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return w.door.enter(c), nil
}

// connection is one that is open. It is what lies below TLS.
type connection struct {
	net.Conn
	door *door
	// since is when it came, in seconds of Unix time.
	since int64
	// handshake is nil before its end, and where there is none.
	handshake atomic.Pointer[handshake]
	user      atomic.Pointer[caller]
}

// handshake is what was agreed on, and shown.
type handshake struct {
	version, cipher uint16
	group           tls.CurveID
	// verified: the client's certificate was checked in the handshake.
	verified bool
	// shown is the server's certificate, client the client's; both may be nil.
	shown  *x509.Certificate
	client *presented
}

// presented is what is kept of a client's certificate.
type presented struct {
	subject, issuer string
	notAfter        time.Time
}

// caller is who sent the last authenticated request.
type caller struct{ name, by string }

// enter notes a connection until it is closed.
func (d *door) enter(c net.Conn) *connection {
	own := &connection{Conn: c, door: d, since: time.Now().Unix()}
	d.conns.mu.Lock()
	defer d.conns.mu.Unlock()
	if d.conns.open == nil {
		d.conns.open = map[*connection]struct{}{}
	}
	d.conns.open[own] = struct{}{}
	return own
}

// refused tells of a handshake that failed.
func (d *door) refused(c net.Conn, err error) {
	d.conns.refusals.handshake(d.name, c.RemoteAddr().String(), err)
}

// Close closes the connection.
func (c *connection) Close() error {
	cs := c.door.conns
	cs.mu.Lock()
	delete(cs.open, c)
	cs.mu.Unlock()
	return c.Conn.Close()
}

// secured notes the end of the handshake.
func (c *connection) secured(s tls.ConnectionState) {
	h := &handshake{version: s.Version, cipher: s.CipherSuite, group: s.CurveID, verified: len(s.VerifiedChains) > 0}
	if t := c.door.tls; t != nil {
		h.shown = shown(t, s.ServerName)
	}
	if len(s.PeerCertificates) > 0 {
		leaf := s.PeerCertificates[0]
		h.client = &presented{cut(subjectOf(leaf)), cut(leaf.Issuer.String()), leaf.NotAfter}
	}
	c.handshake.Store(h)
}

// shown is the certificate that a server shows now; nil where that can't be
// told.
func shown(t *tls.Config, serverName string) *x509.Certificate {
	pair := new(tls.Certificate)
	switch {
	case t.GetCertificate != nil:
		p, err := t.GetCertificate(&tls.ClientHelloInfo{ServerName: serverName, SupportedVersions: []uint16{tls.VersionTLS13}})
		if err != nil || p == nil {
			return nil
		}
		pair = p
	case len(t.Certificates) > 0:
		pair = &t.Certificates[0]
	}
	return pair.Leaf
}

// maxText bounds what is kept of a name that a peer chose.
const maxText = 128

func cut(s string) string {
	if len(s) > maxText {
		return s[:maxText] + "…"
	}
	return s
}

// remote is where the connection comes from.
func (c *connection) remote() netip.AddrPort {
	t, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	a := t.AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// connectionKey holds a request's connection in its context.
type connectionKey struct{}

// connectionOf finds what is known of a connection; nil where that is nothing.
func connectionOf(c net.Conn) *connection {
	for {
		switch v := c.(type) {
		case *connection:
			return v
		case *tls.Conn:
			c = v.NetConn()
		case *peeked:
			c = v.Conn
		default:
			return nil
		}
	}
}

// adminServer is the name of the ports where certificates always log users in.
const adminServer = "admin-server"

// How callers are known.
const (
	byNothing     = "nothing"
	byToken       = "user token"
	byCertificate = "client certificate"
	bySocket      = "the owner of its socket on this machine"
)

// noteCaller notes the caller of a request that was authenticated; certs says
// that client certificates log users in.
func noteCaller(certs bool, r *http.Request, who auth.Caller) {
	c, ok := r.Context().Value(connectionKey{}).(*connection)
	if !ok {
		return
	}
	by := bySocket
	switch {
	case who.IsAnonymous():
		by = byNothing
	case (certs || c.door.name == adminServer) && r.TLS != nil && len(r.TLS.PeerCertificates) > 0:
		by = byCertificate
	case r.Header.Get("Authorization") != "":
		by = byToken
	}
	if old := c.user.Load(); old == nil || old.name != who.Name() || old.by != by {
		c.user.Store(&caller{cut(who.Name()), by})
	}
}

// all returns the ports, and the connections in the order of ports, addresses
// and ages.
func (cs *connections) all() ([]*door, []*connection) {
	cs.mu.Lock()
	doors := slices.Clone(cs.doors)
	open := make([]*connection, 0, len(cs.open))
	for c := range cs.open {
		open = append(open, c)
	}
	cs.mu.Unlock()
	slices.SortFunc(open, func(a, b *connection) int {
		return cmp.Or(cmp.Compare(a.door.name, b.door.name), a.remote().Compare(b.remote()), cmp.Compare(a.since, b.since))
	})
	return doors, open
}
