package pki

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kuma/internal/errs"
)

// NewRoot makes a self-signed authority for a trust domain, such as a mesh,
// and returns its certificate and key as PEM. The key is on P-256, or RSA
// where bits are given. It may sign certificates and revocation lists, and has
// no path length limit.
func NewRoot(domain string, bits int, life time.Duration) (cert, key []byte, err error) {
	if td, err := spiffeid.TrustDomainFromString(domain); err != nil || td.Name() != domain {
		return nil, nil, errs.New(errs.Invalid, "%q can't be a SPIFFE trust domain: use lower-case letters, digits, dots, dashes and underscores", domain)
	}
	var k Key
	switch {
	case bits == 0:
		k, err = NewKey()
	case bits < 2048 || bits > 8192:
		return nil, nil, errs.New(errs.Invalid, "RSA key of %d bits; it must have 2048 to 8192", bits)
	default:
		k, err = newRSAKey(bits)
	}
	if err != nil {
		return nil, nil, err
	}
	return selfSign(k, &x509.Certificate{
		Subject:  pkix.Name{Organization: []string{"Kuma"}, OrganizationalUnit: []string{"Mesh"}, CommonName: domain},
		URIs:     []*url.URL{{Scheme: "spiffe", Host: domain}},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true,
	}, Backdate, life)
}

// selfSign completes a template with serial and times, signs it with its own
// key, and returns both as PEM.
func selfSign(k Key, template *x509.Certificate, backdate, life time.Duration) (cert, key []byte, err error) {
	if template.SerialNumber, err = serial(); err != nil {
		return nil, nil, err
	}
	now := time.Now()
	template.NotBefore, template.NotAfter = now.Add(-backdate), now.Add(life)
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.signer.Public(), k.signer)
	if err != nil {
		return nil, nil, errs.New(errs.Internal, "sign a certificate: %w", err)
	}
	if key, err = k.PEM(); err != nil {
		return nil, nil, err
	}
	return encodeCert(der), key, nil
}
