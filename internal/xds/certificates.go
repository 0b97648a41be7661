package xds

import (
	"context"
	"maps"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/identity"
	"kuma/internal/insight"
	"kuma/internal/mesh"
	"kuma/internal/session"
)

// certificates are those of a proxy without a link, whose keys travel over ADS
// in the contract's way. A proxy with a link has none here, ever.
type certificates struct {
	srv *Server
	ads *adsStream

	wanted []identity.Wanted
	// pending are secrets that are wanted and not issued yet.
	pending map[string]struct{}
	packed  map[string]*envoy.Packed
	// busy are being issued; failed says when to try again, and how long to
	// wait after that.
	busy    map[string]bool
	failed  map[string]failure
	results chan result
}

type failure struct {
	at   time.Time
	wait time.Duration
}

// result is what became of an attempt to issue a certificate.
type result struct {
	wanted identity.Wanted
	cert   identity.Certificate
	key    []byte
	err    error
}

// issueTimeout bounds one attempt.
const issueTimeout = 30 * time.Second

func newCertificates(s *Server, a *adsStream) *certificates {
	return &certificates{srv: s, ads: a, busy: map[string]bool{}, failed: map[string]failure{}, results: make(chan result)}
}

// look finds out which certificates the proxy should have now.
func (c *certificates) look() {
	if c.ads.session.Node.Link {
		return
	}
	c.wanted = c.srv.cfg.Issuer.Wanted(c.ads.picture, c.ads.dataplane)
	c.ads.session.KeepIssued(func(secret string) bool {
		for _, w := range c.wanted {
			if w.Secret == secret {
				return true
			}
		}
		return false
	})
	c.repack()
	c.start()
}

// repack makes the secrets from what was issued. One that no longer says what
// it should is not given any more.
func (c *certificates) repack() {
	c.pending, c.packed = nil, nil
	for _, w := range c.wanted {
		have, ok := c.ads.session.Issued(w.Secret)
		if !ok || have.Revision != w.Revision {
			if c.pending == nil {
				c.pending = map[string]struct{}{}
			}
			c.pending[w.Secret] = struct{}{}
			continue
		}
		p, err := pack(w.Secret, have)
		if err != nil {
			c.ads.log.Error("a certificate could not be packed", "secret", w.Secret, "error", err)
			continue
		}
		if c.packed == nil {
			c.packed = map[string]*envoy.Packed{}
		}
		c.packed[w.Secret] = p
	}
}

func pack(name string, i session.Issued) (*envoy.Packed, error) {
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	return envoy.Pack(name, &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{
		TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(i.Chain), PrivateKey: inline(i.Key)},
	}})
}

// join adds the proxy's own secrets to those of its configuration.
func (c *certificates) join(others map[string]*envoy.Packed) map[string]*envoy.Packed {
	if len(c.packed) == 0 {
		return others
	}
	out := maps.Clone(others)
	if out == nil {
		out = map[string]*envoy.Packed{}
	}
	maps.Copy(out, c.packed)
	return out
}

// due is when a wanted certificate must be asked for: now where it is zero.
func (c *certificates) due(w identity.Wanted) time.Time {
	var at time.Time
	if have, ok := c.ads.session.Issued(w.Secret); ok && have.Revision == w.Revision {
		at = have.RenewAt
	}
	if f, ok := c.failed[w.Secret]; ok && f.at.After(at) {
		at = f.at
	}
	return at
}

// next is when start has something to do; zero for never.
func (c *certificates) next() time.Time {
	var next time.Time
	for _, w := range c.wanted {
		if at := c.due(w); !c.busy[w.Secret] && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	return next
}

// start asks for the certificates that are due, each beside the loop, since an
// authority may be slow.
func (c *certificates) start() {
	now := time.Now()
	for _, w := range c.wanted {
		if c.busy[w.Secret] || c.due(w).After(now) {
			continue
		}
		c.busy[w.Secret] = true
		pic, d, ended := c.ads.picture, c.ads.dataplane, c.ads.grpc.Context()
		go func() {
			r := result{wanted: w}
			var fault error
			func() {
				defer c.srv.guard("issue", func() *session.Node { return c.ads.session.Node }, &fault)
				ctx, cancel := context.WithTimeout(ended, issueTimeout)
				defer cancel()
				r.cert, r.key, r.err = c.srv.cfg.Issuer.Keyed(ctx, pic, d, w.Secret)
			}()
			if fault != nil {
				r.err = fault
			}
			select {
			case c.results <- r:
			case <-ended.Done():
			}
		}()
	}
}

// done takes the result of an attempt in.
func (c *certificates) done(r result) {
	name := r.wanted.Secret
	delete(c.busy, name)
	switch {
	case errs.Is(r.err, errs.Conflict):
		// The Dataplane changed meanwhile; the next picture says to what.
		c.failed[name] = failure{at: time.Now().Add(100 * time.Millisecond)}
		return
	case r.err != nil:
		wait := min(c.srv.cfg.RetryMax, max(c.srv.cfg.RetryBase, 2*c.failed[name].wait))
		c.failed[name] = failure{time.Now().Add(wait), wait}
		c.ads.log.Warn("a proxy's certificate could not be issued; it will be tried again", "secret", name, "after", wait, "error", r.err)
		return
	}
	delete(c.failed, name)
	c.ads.session.SetIssued(name, session.Issued{Revision: r.cert.Revision, RenewAt: r.cert.RenewAt, Chain: r.cert.Chain, Key: r.key})
	n := c.ads.session.Node
	c.ads.log.Warn("a private key was made by the control plane and sent over ADS, since this proxy has no link", "instance", n.Instance, "secret", name, "expires", r.cert.NotAfter)
	c.srv.cfg.Insights.Issued(n.Mesh, n.Name, insight.Certificate{NotAfter: r.cert.NotAfter, Backend: r.cert.Backend, Supported: []string{r.cert.Backend}})
	c.repack()
	c.start()
}

// bindRetry has Envoy try again to listen where another program held the port:
// the one refusal that can end without a change of configuration.
type bindRetry struct {
	at   time.Time
	wait time.Duration
}

func (b *bindRetry) refused(now time.Time, list []mesh.Rejection) {
	for _, r := range list {
		if r.TypeURL == envoy.ListenerType && r.Resource != "" && (strings.Contains(r.Message, "cannot bind") || strings.Contains(r.Message, "Address already in use")) {
			b.wait = min(time.Minute, max(5*time.Second, 2*b.wait))
			b.at = now.Add(b.wait)
			return
		}
	}
}

func (b *bindRetry) due(now time.Time) bool { return !b.at.IsZero() && !now.Before(b.at) }

func (b *bindRetry) tried() { b.at = time.Time{} }
