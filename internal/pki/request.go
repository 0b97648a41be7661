package pki

import (
	"crypto"
	"crypto/x509"

	"kuma/internal/errs"
)

// MaxRequest is the longest certificate request that is read, in bytes.
const MaxRequest = 16 << 10

// maxRequestRSA bounds the work that a request can cause.
const maxRequestRSA = 4096

// PublicKey is a key whose owner proved to hold its private half: it comes
// from a signed request or from a key made here. The zero value is refused.
type PublicKey struct{ key crypto.PublicKey }

// ParseRequest reads a certificate request (PKCS#10) in DER and returns its
// key, after its signature was checked. Names and extensions that it asks for
// are ignored. Keys are ECDSA P-256 or P-384, or RSA of 2048 to 4096 bits.
// Errors are Invalid.
func ParseRequest(der []byte) (PublicKey, error) {
	if len(der) > MaxRequest {
		return PublicKey{}, errs.New(errs.Invalid, "certificate request has %d bytes, the limit is %d", len(der), MaxRequest)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return PublicKey{}, errs.New(errs.Invalid, "not a certificate request (PKCS#10 in DER): %w", err)
	}
	if err := checkKey(r.PublicKey, maxRequestRSA); err != nil {
		return PublicKey{}, errs.New(errs.Invalid, "certificate request: %w", err)
	}
	switch r.SignatureAlgorithm {
	case x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.MD5WithRSA, x509.UnknownSignatureAlgorithm:
		return PublicKey{}, errs.New(errs.Invalid, "certificate request is signed with %s; use SHA-256", r.SignatureAlgorithm)
	}
	if err := r.CheckSignature(); err != nil {
		return PublicKey{}, errs.New(errs.Invalid, "certificate request is not signed with the key that it carries: %w", err)
	}
	return PublicKey{r.PublicKey}, nil
}
