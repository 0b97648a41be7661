package pki

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"slices"
	"sync/atomic"
	"time"

	"kuma/internal/errs"
)

const (
	// DefaultLife is the life of a proxy's certificate.
	DefaultLife = 24 * time.Hour
	// soon is how much life an authority must have left to issue anything.
	soon = time.Minute
	// preparedFor is how long a prepared certificate may wait to be issued.
	preparedFor = time.Minute
)

// AuthorityConfig is what an Authority is made from.
type AuthorityConfig struct {
	// Cert is PEM. The first certificate signs; further ones are trusted too.
	Cert []byte
	// Key is the first certificate's private key, as PEM.
	Key []byte
	// Life is the life of the certificates that are issued; 0 means
	// DefaultLife.
	Life time.Duration
}

// Authority issues certificates with one key. It is safe for concurrent use.
type Authority struct {
	cert  *x509.Certificate
	key   crypto.Signer
	trust []byte
	roots *x509.CertPool
	life  time.Duration
}

// NewAuthority makes an Authority. The first certificate must be an authority
// that may sign certificates, and the key must be its own. Expiry is checked
// when something is prepared. Errors are Invalid and never show the key.
func NewAuthority(c AuthorityConfig) (*Authority, error) {
	certs, err := parseCerts(c.Cert)
	if err != nil {
		return nil, errs.New(errs.Invalid, "certificate of the authority: %w", err)
	}
	key, err := parseKey(c.Key)
	if err != nil {
		return nil, errs.New(errs.Invalid, "key of the authority: %w", err)
	}
	a := &Authority{cert: certs[0], key: key, roots: x509.NewCertPool(), life: c.Life}
	for _, cert := range certs {
		if err := CheckCA(cert); err != nil {
			return nil, errs.New(errs.Invalid, "certificate of the authority: %w", err)
		}
		a.roots.AddCert(cert)
		a.trust = append(a.trust, encodeCert(cert.Raw)...)
	}
	if !samePublic(key.Public(), a.cert.PublicKey) {
		return nil, errs.New(errs.Invalid, "not a valid TLS key pair: the key is not that of the certificate %q", a.cert.Subject)
	}
	switch {
	case a.life == 0:
		a.life = DefaultLife
	case a.life < 0:
		return nil, errs.New(errs.Invalid, "the life of certificates is %v; it must be positive", a.life)
	}
	return a, nil
}

// CheckCA returns why a certificate can't be an authority of a mesh, in the
// contract's words, or nil. Expiry is not looked at.
func CheckCA(c *x509.Certificate) error {
	var fields []errs.Field
	if !c.BasicConstraintsValid || !c.IsCA {
		fields = append(fields, errs.Field{Message: "basic constraint 'CA' must be set to 'true' (see X509-SVID: 4.1. Basic Constraints)"})
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		fields = append(fields, errs.Field{Message: "key usage extension 'keyCertSign' must be set (see X509-SVID: 4.3. Key Usage)"})
	}
	if c.KeyUsage&x509.KeyUsageKeyAgreement != 0 {
		fields = append(fields, errs.Field{Message: "key usage extension 'keyAgreement' must NOT be set (see X509-SVID: Appendix A. X.509 Field Reference)"})
	}
	return errs.Fields(fields...)
}

// Trust returns the trust bundle as PEM: every certificate that was given.
func (a *Authority) Trust() []byte { return slices.Clone(a.trust) }

// Expires returns when the issuing certificate ends.
func (a *Authority) Expires() time.Time { return a.cert.NotAfter }

// Prepared is a checked plan for one certificate. Only Prepare makes one, and
// it is good for one Issue within a minute; the zero value is refused.
type Prepared struct{ plan *plan }

type plan struct {
	by       *Authority
	template *x509.Certificate
	made     time.Time
	used     atomic.Bool
}

// NotAfter returns when the certificate will end.
func (p Prepared) NotAfter() time.Time {
	if p.plan == nil {
		return time.Time{}
	}
	return p.plan.template.NotAfter
}

// Prepare plans a certificate for the subject. Its life is the authority's
// setting, cut to the authority's own end. An authority that has ended, ends
// within a minute or has not started is refused with the date; that error is
// Unavailable.
func (a *Authority) Prepare(ctx context.Context, s Subject) (Prepared, error) {
	if err := ctx.Err(); err != nil {
		return Prepared{}, err
	}
	if len(s.uris) == 0 {
		return Prepared{}, errs.New(errs.Internal, "prepare a certificate: nobody is named")
	}
	now := time.Now()
	begin, end := now.Add(-Backdate), now.Add(a.life)
	if begin.Before(a.cert.NotBefore) {
		begin = a.cert.NotBefore
	}
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	switch {
	case now.Before(a.cert.NotBefore):
		return Prepared{}, errs.New(errs.Unavailable, "the authority %q is not valid before %s", a.cert.Subject, a.cert.NotBefore.UTC().Format(time.RFC3339))
	case now.After(a.cert.NotAfter):
		return Prepared{}, errs.New(errs.Unavailable, "the authority %q expired at %s; replace it", a.cert.Subject, a.cert.NotAfter.UTC().Format(time.RFC3339))
	case end.Sub(now) < min(soon, a.life):
		return Prepared{}, errs.New(errs.Unavailable, "the authority %q expires at %s, too soon to issue a certificate; replace it", a.cert.Subject, a.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	number, err := serial()
	if err != nil {
		return Prepared{}, err
	}
	return Prepared{&plan{by: a, made: now, template: &x509.Certificate{
		SerialNumber:          number,
		URIs:                  s.uris,
		NotBefore:             begin,
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}}}, nil
}

// Certificate is what Issue made.
type Certificate struct {
	// Chain is PEM: the leaf alone. A verifier holds Trust.
	Chain []byte
	// Trust is the trust bundle that the leaf was checked against, as PEM.
	Trust []byte
	// Leaf is the certificate, parsed. It must not be changed.
	Leaf *x509.Certificate
}

// Issue makes the certificate that was prepared, for the key. What was
// prepared counts once, with the authority that prepared it. The result is
// verified before it is returned: chain, names, usages, key and life.
func (a *Authority) Issue(ctx context.Context, p Prepared, key PublicKey) (Certificate, error) {
	if err := ctx.Err(); err != nil {
		return Certificate{}, err
	}
	switch {
	case p.plan == nil || p.plan.by != a:
		return Certificate{}, errs.New(errs.Internal, "issue a certificate: it was not prepared by this authority")
	case key.key == nil:
		return Certificate{}, errs.New(errs.Internal, "issue a certificate: there is no key")
	case !p.plan.used.CompareAndSwap(false, true):
		return Certificate{}, errs.New(errs.Internal, "issue a certificate: what was prepared was used before")
	case time.Since(p.plan.made) > preparedFor:
		return Certificate{}, errs.New(errs.Internal, "issue a certificate: it was prepared %v ago, more than %v", time.Since(p.plan.made), preparedFor)
	}
	template := *p.plan.template
	if _, ok := key.key.(*rsa.PublicKey); ok {
		template.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, a.cert, key.key, a.key)
	if err != nil {
		return Certificate{}, errs.New(errs.Internal, "sign a certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return Certificate{}, errs.New(errs.Internal, "read the issued certificate: %w", err)
	}
	if err := a.check(leaf, &template, key); err != nil {
		return Certificate{}, errs.New(errs.Internal, "check the issued certificate: %w", err)
	}
	return Certificate{Chain: encodeCert(der), Trust: a.Trust(), Leaf: leaf}, nil
}

// check holds an issued certificate against what was prepared and against the
// trust bundle.
func (a *Authority) check(leaf, want *x509.Certificate, key PublicKey) error {
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return err
	}
	got, names := Subject{leaf.URIs}, Subject{want.URIs}
	switch {
	case !got.Equal(names) || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0:
		return errs.New(errs.Internal, "its names are %q, not %q", got.Names(), names.Names())
	case leaf.IsCA || leaf.KeyUsage != want.KeyUsage:
		return errs.New(errs.Internal, "its usages are not those that were prepared")
	case leaf.NotAfter.After(a.cert.NotAfter) || leaf.NotAfter.After(want.NotAfter):
		return errs.New(errs.Internal, "it would outlive its issuer")
	case !samePublic(leaf.PublicKey, key.key):
		return errs.New(errs.Internal, "it is for another key")
	}
	return nil
}

func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
