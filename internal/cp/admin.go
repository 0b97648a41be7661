package cp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/proxy"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
)

const (
	adminDial    = 3 * time.Second // contract, as the next two
	adminTLS     = 3 * time.Second
	adminRequest = 5 * time.Second
	// maxAdminPage bounds a page of Envoy's, in bytes, and maxAdminPages how many
	// are asked for at once.
	maxAdminPage  = 64 << 20
	maxAdminPages = 8
	// adminSweep is how often the certificates of proxies that are gone are
	// forgotten.
	adminSweep = time.Minute
)

// streams knows which proxies have an ADS stream to this control plane: what
// they say of themselves, or nil.
type streams interface {
	Node(key session.Key) *session.Node
}

// adminChannel is the contract's way to Envoy's admin interface, for proxies
// without a link alone: a listener on the network that knows this control plane
// by its certificate. It makes the certificates of both ends.
type adminChannel struct {
	tracker interface{ Now() *state.Picture }
	streams streams
	// port is where a proxy listens that says nothing else.
	port uint32
	log  *slog.Logger
	busy chan struct{}
	// patience is how long a page may take: adminRequest.
	patience time.Duration

	mu sync.Mutex
	ca adminCA
	// certs are the listeners' certificates. A proxy has the same until it is
	// time to renew it, so that its configuration stays the same.
	certs map[session.Key]adminCert
}

// adminCA is the authority, or why there is none, by the secret's bytes.
type adminCA struct {
	data []byte
	hash [sha256.Size]byte
	open *pki.AdminCA
	err  error
}

type adminCert struct {
	by         [sha256.Size]byte // the hash of the authority's secret
	address    string
	chain, key []byte
	from, due  time.Time
}

func newAdminChannel(tracker interface{ Now() *state.Picture }, s streams, port uint32, log *slog.Logger) *adminChannel {
	return &adminChannel{tracker: tracker, streams: s, port: port, log: log, busy: make(chan struct{}, maxAdminPages), patience: adminRequest, certs: map[session.Key]adminCert{}}
}

// Run forgets certificates whose proxies are gone.
func (c *adminChannel) Run(ctx context.Context) error {
	t := time.NewTicker(adminSweep)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			c.sweep()
		}
	}
}

func (c *adminChannel) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range c.certs {
		if n := c.streams.Node(key); n == nil || n.Link {
			delete(c.certs, key)
		}
	}
}

// Expiries tells when the authority ends.
func (c *adminChannel) Expiries() []pki.Expiry {
	c.mu.Lock()
	defer c.mu.Unlock()
	ca, err := c.authority(c.tracker.Now())
	if err != nil {
		return nil
	}
	return []pki.Expiry{ca.Expiry()}
}

// authority returns the authority of a picture. The lock is held.
func (c *adminChannel) authority(pic *state.Picture) (*pki.AdminCA, error) {
	r := pic.Get(mesh.GlobalSecrets.Key("", mesh.EnvoyAdminCA))
	if r == nil {
		return nil, errs.New(errs.Unavailable, "there is no GlobalSecret %q: restart the control plane, which makes one", mesh.EnvoyAdminCA)
	}
	data := mesh.GlobalSecrets.From(r).Spec.Data
	if c.ca.data != nil && bytes.Equal(data, c.ca.data) {
		return c.ca.open, c.ca.err
	}
	open, err := pki.OpenAdminCA(data)
	if err != nil {
		err = errs.New(errs.Unavailable, "the GlobalSecret %q can't be used: %w; delete it and restart the control plane, which makes a new one", mesh.EnvoyAdminCA, err)
	}
	c.ca = adminCA{data: bytes.Clone(data), hash: sha256.Sum256(data), open: open, err: err}
	return open, err
}

// of is what a proxy's configuration says about the channel; nil for a proxy
// with a link.
func (c *adminChannel) of(pic *state.Picture, n *session.Node) *proxy.Admin {
	if n.Link {
		return nil
	}
	d, ok := dataplaneOf(pic, n.Key)
	if !ok {
		return nil
	}
	a := &proxy.Admin{
		Listen: proxy.AdminPort(d, n.AdminPort, c.port), Socket: n.AdminSocket, Address: n.AdminAddress, Port: n.AdminPort,
		Readiness: n.ReadinessPort, Caller: pki.AdminClient,
	}
	if a.Port == 0 {
		a.Port = c.port
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ca, err := c.authority(pic)
	var cert adminCert
	if err == nil {
		cert, err = c.cert(ca, n.Key, d.Spec.Networking.Address)
	}
	if err != nil {
		a.Problem = err.Error()
		return a
	}
	a.Chain, a.Key, a.CA = cert.chain, cert.key, ca.Trust()
	return a
}

// cert returns the certificate of a proxy's listener, the one that it has where
// that is still good. The lock is held.
func (c *adminChannel) cert(ca *pki.AdminCA, key session.Key, address string) (adminCert, error) {
	now := time.Now()
	if have, ok := c.certs[key]; ok && have.by == c.ca.hash && have.address == address && now.Before(have.due) && !now.Before(have.from) {
		return have, nil
	}
	made, err := ca.Server(key.Mesh, key.Name, address)
	if err != nil {
		delete(c.certs, key)
		return adminCert{}, err
	}
	private, err := made.Key.PEM()
	if err != nil {
		return adminCert{}, err
	}
	cert := adminCert{by: c.ca.hash, address: address, chain: made.Chain, key: private, from: made.NotBefore, due: pki.RenewAt(made.NotBefore, made.NotAfter, rand.Float64())}
	c.certs[key] = cert
	c.log.Warn("a private key for an admin listener was made by the control plane and is sent over ADS, since this proxy has no link", "mesh", key.Mesh, "name", key.Name, "expires", made.NotAfter.UTC())
	return cert, nil
}

// again is when a proxy's certificate has to be renewed; zero where it has none.
func (c *adminChannel) again(key session.Key) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.certs[key].due
}

func dataplaneOf(pic *state.Picture, key session.Key) (mesh.Dataplane, bool) {
	m := pic.Mesh(key.Mesh)
	if m == nil {
		return mesh.Dataplane{}, false
	}
	d, ok := m.Dataplane(key.Name)
	return d, ok && d.Spec.Networking != nil
}

// adminPath is the page of Envoy's that shows what is asked for.
func adminPath(q rest.Inspection) string {
	path, args := "/config_dump", []string{}
	switch q.What {
	case "stats":
		path = "/stats"
		if q.UsedOnly {
			args = append(args, "usedonly")
		}
	case "clusters":
		path = "/clusters"
	default:
		if q.IncludeEDS {
			args = append(args, "include_eds")
		}
	}
	if q.JSON && q.What != "config_dump" {
		args = append(args, "format=json")
	}
	for i, a := range args {
		path += string("?&"[min(i, 1)]) + a
	}
	return path
}

// ask returns a page of the Envoy of a proxy that has an ADS stream here. The
// address is the Dataplane's, that is, the proxy's own word: nothing is said to
// whoever answers there before it has shown the certificate of this very proxy.
func (c *adminChannel) ask(ctx context.Context, n *session.Node, path string) ([]byte, error) {
	pic := c.tracker.Now()
	d, ok := dataplaneOf(pic, n.Key)
	if !ok {
		return nil, errs.New(errs.Unavailable, "the proxy %q of mesh %q is not registered yet; try again", n.Name, n.Mesh)
	}
	c.mu.Lock()
	ca, err := c.authority(pic)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	secure, err := ca.Client(n.Mesh, n.Name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.patience)
	defer cancel()
	select {
	case c.busy <- struct{}{}:
		defer func() { <-c.busy }()
	case <-ctx.Done():
		return nil, errs.New(errs.Unavailable, "%d proxies are being inspected already; try again later", maxAdminPages)
	}
	at := net.JoinHostPort(d.Spec.Networking.Address, strconv.Itoa(int(proxy.AdminPort(d, n.AdminPort, c.port))))
	body, known, err := fetch(ctx, secure, at, path)
	if err != nil {
		c.log.Info("a proxy could not be inspected", "mesh", n.Mesh, "name", n.Name, "address", at, "error", err)
		return nil, refusal(err, known, n, at)
	}
	return body, nil
}

// fetch gets a page, from that address and no other. Known says that who is
// there has shown the right certificate.
func fetch(ctx context.Context, secure *tls.Config, at, path string) (body []byte, known bool, err error) {
	t := &http.Transport{
		Proxy:             nil, // not that of the environment either
		DialContext:       (&net.Dialer{Timeout: adminDial, Control: dialable}).DialContext,
		DisableKeepAlives: true, DisableCompression: true, TLSClientConfig: secure, TLSHandshakeTimeout: adminTLS, MaxResponseHeaderBytes: 64 << 10,
	}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	var shaken atomic.Bool
	trace := &httptrace.ClientTrace{TLSHandshakeDone: func(_ tls.ConnectionState, err error) { shaken.Store(err == nil) }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(ctx, trace), http.MethodGet, "https://"+at+path, nil)
	if err != nil {
		return nil, false, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, shaken.Load(), err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, true, errs.New(errs.Unavailable, "its Envoy answers with status %d", resp.StatusCode)
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAdminPage+1))
	switch {
	case err != nil:
		err = errs.New(errs.Unavailable, "read its answer: %w", err)
	case len(body) > maxAdminPage:
		err = errs.New(errs.Unavailable, "the page has more than %d MiB", maxAdminPage>>20)
	}
	return body, true, err
}

// errNotDialed is for addresses at which no proxy can be.
var errNotDialed = errors.New("no proxy has such an address, it is not dialed")

// dialable refuses addresses at which no proxy is, but a machine's own services
// may be: link-local ones, where clouds keep credentials, and those of groups.
func dialable(_, address string, _ syscall.RawConn) error {
	ip, err := netip.ParseAddrPort(address)
	if err != nil {
		return errNotDialed
	}
	a := ip.Addr().Unmap()
	if a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return errNotDialed
	}
	return nil
}

// refusal says why a proxy can't be asked, and what can be done about it.
func refusal(err error, known bool, n *session.Node, at string) error {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return errs.New(errs.Unavailable, "whoever answers at %s is not the proxy %q of mesh %q: %w; another program may have that address and port: give the proxy a port of its own with networking.admin.port", at, n.Name, n.Mesh, err)
	}
	if errs.Is(err, errs.Unavailable) || known && errors.Is(err, context.DeadlineExceeded) {
		return errs.New(errs.Unavailable, "the proxy %q of mesh %q can't be asked at %s: %w", n.Name, n.Mesh, at, err)
	}
	// In TLS 1.3 a refusal comes after the handshake, and may be overtaken by the
	// connection's end.
	if op, ok := errors.AsType[*net.OpError](err); known || ok && op.Op == "remote error" {
		return errs.New(errs.Unavailable, "the proxy %q of mesh %q refused the control plane's certificate at %s: %w; if the GlobalSecret %q was changed just now, try again", n.Name, n.Mesh, at, err, mesh.EnvoyAdminCA)
	}
	return errs.New(errs.Unavailable, "the admin listener of the proxy %q of mesh %q can't be reached at %s: %w; it must be reachable from the control plane, and the insight of the Dataplane tells whether its Envoy refused to open it", n.Name, n.Mesh, at, err)
}
