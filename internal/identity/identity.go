// Package identity gives a proxy the certificates that its Dataplane calls for:
// which ones it should have, and their issue by the mesh's authority.
package identity

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/pki"
	"kuma/internal/pki/builtin"
	"kuma/internal/resource"
	"kuma/internal/state"
)

// Wanted is a certificate that a proxy should have now.
type Wanted struct {
	// Secret is the name by which its Envoy asks for it.
	Secret string
	// Revision changes whenever a certificate issued before no longer says
	// what it should: other services or tags, another authority, another life.
	Revision string
}

// Certificate is one that was issued.
type Certificate struct {
	// Chain is PEM, leaf first.
	Chain []byte
	// NotBefore and NotAfter bound its life; RenewAt is two thirds into what is
	// left of it when it is issued, or a little less, so that proxies that came
	// together don't return together.
	NotBefore, NotAfter, RenewAt time.Time
	// Backend is the authority's name in the mesh.
	Backend string
	// Revision is that of the Wanted which it answers.
	Revision string
}

// Config is what an Issuer needs.
type Config struct {
	// Picture returns the present picture, by which what was issued is checked
	// once more.
	Picture func() *state.Picture
}

// Issuer issues the certificates of proxies. It alone calls an authority.
type Issuer struct {
	cfg     Config
	metrics *Metrics

	mu          sync.Mutex
	authorities map[string]opened
}

// opened is an authority with what it was made from: another certificate, key
// or life is another authority.
type opened struct {
	cert, key *resource.Resource
	life      time.Duration
	authority *pki.Authority
}

// New makes an Issuer.
func New(cfg Config) *Issuer {
	return &Issuer{cfg: cfg, metrics: newMetrics(), authorities: map[string]opened{}}
}

// Metrics returns what the issuer counts.
func (i *Issuer) Metrics() *Metrics { return i.metrics }

// Wanted returns the certificates that the Dataplane's proxy should have: none
// where its mesh has no mutual TLS, or the Dataplane names no service.
func (i *Issuer) Wanted(pic *state.Picture, dp mesh.Dataplane) []Wanted {
	m := pic.Mesh(dp.Mesh)
	if m == nil {
		return nil
	}
	b := m.Spec.EnabledBackend()
	id := state.IdentityOf(dp)
	if b == nil || len(id.Services) == 0 {
		return nil
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %v %q", dp.Mesh, b.Name, b.Lifetime(), id.Services)
	for _, k := range slices.Sorted(maps.Keys(id.Tags)) {
		fmt.Fprintf(h, " %q=%q", k, id.Tags[k])
	}
	if cert := m.Get(mesh.Secrets.Name, mesh.BuiltinCertSecret(dp.Mesh, b.Name)); cert != nil {
		h.Write(mesh.Secrets.From(cert).Spec.Data)
	}
	return []Wanted{{names.IdentitySecret(dp.Mesh), hex.EncodeToString(h.Sum(nil)[:8])}}
}

// Sign issues a certificate for the key of a signing request (PKCS #10, DER).
// Who it is for comes from the Dataplane alone. Errors: Invalid for a request
// that can't be taken, Unavailable while there is no usable authority, Conflict
// where the Dataplane changed meanwhile.
func (i *Issuer) Sign(ctx context.Context, pic *state.Picture, dp mesh.Dataplane, secret string, csr []byte) (Certificate, error) {
	key, err := pki.ParseRequest(csr)
	if err != nil {
		return Certificate{}, err
	}
	return i.issue(ctx, pic, dp, secret, key)
}

// Keyed issues a certificate for a new key, which it returns too, as PEM: for
// proxies that can't keep a key of their own.
func (i *Issuer) Keyed(ctx context.Context, pic *state.Picture, dp mesh.Dataplane, secret string) (Certificate, []byte, error) {
	key, err := pki.NewKey()
	if err != nil {
		return Certificate{}, nil, err
	}
	c, err := i.issue(ctx, pic, dp, secret, key.Public())
	if err != nil {
		return Certificate{}, nil, err
	}
	pem, err := key.PEM()
	return c, pem, err
}

func (i *Issuer) issue(ctx context.Context, pic *state.Picture, dp mesh.Dataplane, secret string, key pki.PublicKey) (c Certificate, err error) {
	fail := func(err error) (Certificate, error) {
		return Certificate{}, errs.New(errs.KindOf(err), "issue a certificate for %s: %w", dp.Key(), err)
	}
	wanted := i.find(pic, dp, secret)
	if wanted == nil {
		return fail(errs.New(errs.Invalid, "there is no certificate %q for it now", secret))
	}
	start := time.Now()
	m := pic.Mesh(dp.Mesh)
	backend := m.Spec.EnabledBackend()
	// Who changes while this goes on is asked to come again: that is no failure.
	defer func() {
		if !errs.Is(err, errs.Conflict) {
			i.metrics.count(dp.Mesh, c, start, err)
		}
	}()
	authority, err := i.authority(m, backend)
	if err != nil {
		return fail(err)
	}
	id := state.IdentityOf(dp)
	subject, err := pki.NewSubject(id.Mesh, id.Services, id.Tags)
	if err != nil {
		return fail(err)
	}
	prepared, err := authority.Prepare(ctx, subject)
	if err != nil {
		return fail(err)
	}
	issued, err := authority.Issue(ctx, prepared, key)
	if err != nil {
		return fail(err)
	}
	// The Dataplane may have changed, or gone, since the picture was taken:
	// then this certificate says what no longer holds.
	now := i.cfg.Picture()
	r := now.Get(dp.Key())
	if r == nil {
		return fail(errs.New(errs.Conflict, "it was deleted meanwhile"))
	}
	if w := i.find(now, mesh.Dataplanes.From(r), secret); w == nil || w.Revision != wanted.Revision {
		return fail(errs.New(errs.Conflict, "it changed meanwhile"))
	}
	return Certificate{
		Chain: issued.Chain, NotBefore: issued.Leaf.NotBefore, NotAfter: issued.Leaf.NotAfter,
		// From now on: its life on paper began a little earlier, for clocks that
		// are late.
		RenewAt: pki.RenewAt(time.Now(), issued.Leaf.NotAfter, rand.Float64()),
		Backend: backend.Name, Revision: wanted.Revision,
	}, nil
}

func (i *Issuer) find(pic *state.Picture, dp mesh.Dataplane, secret string) *Wanted {
	for _, w := range i.Wanted(pic, dp) {
		if w.Secret == secret {
			return &w
		}
	}
	return nil
}

// authority opens the mesh's authority, or returns the one that is open.
func (i *Issuer) authority(m *state.Mesh, b *mesh.Backend) (*pki.Authority, error) {
	cert := m.Get(mesh.Secrets.Name, mesh.BuiltinCertSecret(m.Name, b.Name))
	key := m.Get(mesh.Secrets.Name, mesh.BuiltinKeySecret(m.Name, b.Name))
	if cert == nil || key == nil {
		return nil, errs.New(errs.Unavailable, "the secrets %q and %q of backend %q are not there", mesh.BuiltinCertSecret(m.Name, b.Name), mesh.BuiltinKeySecret(m.Name, b.Name), b.Name)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if o := i.authorities[m.Name]; o.authority != nil && o.cert == cert && o.key == key && o.life == b.Lifetime() {
		return o.authority, nil
	}
	a, err := builtin.Open(mesh.Secrets.From(cert).Spec.Data, mesh.Secrets.From(key).Spec.Data, b.Lifetime())
	if err != nil {
		return nil, errs.New(errs.Unavailable, "backend %q: %w", b.Name, err)
	}
	i.authorities[m.Name] = opened{cert, key, b.Lifetime(), a}
	return a, nil
}
