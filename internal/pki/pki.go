// Package pki issues certificates: to proxies of a mesh by an Authority, and
// to the control plane itself by OpenControlPlane.
//
// Security-relevant steps are types. A Subject is who a certificate is for,
// made from what the control plane knows and never from a request; a
// PublicKey comes only from a request whose signature was checked, or from a
// key made here; Issue takes only what Prepare returned, once, and checks the
// result against the trust bundle before it leaves.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"time"

	"kuma/internal/errs"
)

const (
	// Backdate is how far before its making a certificate starts, so that
	// clocks a little behind take it at once.
	Backdate = 10 * time.Second
	// Year is the year of life settings: 365 days.
	Year = 365 * 24 * time.Hour

	maxPEM   = 256 << 10 // bytes of a PEM text
	maxChain = 16        // certificates in one text
)

// RenewAt returns when a certificate is renewed: when two thirds of its life
// are gone, or earlier by up to a tenth of its life. The jitter, from 0 to 1,
// chooses how much earlier, so that a fleet does not renew at once.
func RenewAt(notBefore, notAfter time.Time, jitter float64) time.Time {
	life := notAfter.Sub(notBefore)
	early := time.Duration(float64(life) / 10 * min(max(jitter, 0), 1))
	return notBefore.Add(life/3*2 - early)
}

// Key is a private key. Printing it shows nothing.
type Key struct{ signer crypto.Signer }

// NewKey makes a P-256 key.
func NewKey() (Key, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Key{}, errs.New(errs.Internal, "make a P-256 key: %w", err)
	}
	return Key{k}, nil
}

// newRSAKey makes an RSA key.
func newRSAKey(bits int) (Key, error) {
	k, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return Key{}, errs.New(errs.Internal, "make an RSA key of %d bits: %w", bits, err)
	}
	return Key{k}, nil
}

// String hides the key.
func (k Key) String() string { return "*****" }

// GoString hides the key.
func (k Key) GoString() string { return "*****" }

// MarshalText hides the key, and so do encoders and loggers that use it.
func (k Key) MarshalText() ([]byte, error) { return []byte("*****"), nil }

// Signer returns the key for use in crypto/tls.
func (k Key) Signer() crypto.Signer { return k.signer }

// Public returns the public half.
func (k Key) Public() PublicKey { return PublicKey{k.signer.Public()} }

// PEM returns the private key as PEM: SEC 1 for EC keys, PKCS#1 for RSA keys.
func (k Key) PEM() ([]byte, error) {
	switch key := k.signer.(type) {
	case *ecdsa.PrivateKey:
		der, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return nil, errs.New(errs.Internal, "encode a key: %w", err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
	case *rsa.PrivateKey:
		return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), nil
	default:
		return nil, errs.New(errs.Internal, "encode a key: there is none")
	}
}

// Request returns a certificate request (PKCS#10, RFC 2986) for the key, as
// DER. It names nothing: who the certificate is for, the control plane knows.
func (k Key) Request() ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k.signer)
	if err != nil {
		return nil, errs.New(errs.Internal, "make a certificate request: %w", err)
	}
	return der, nil
}

// serial returns a random positive number of 128 bits.
func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, errs.New(errs.Internal, "make a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// EncodeCertificate returns a certificate as PEM.
func EncodeCertificate(c *x509.Certificate) []byte { return encodeCert(c.Raw) }

// parseCerts reads the certificates of a PEM text. Blocks of other types are
// an error: a private key has no place beside certificates.
func parseCerts(text []byte) ([]*x509.Certificate, error) {
	if len(text) > maxPEM {
		return nil, errs.New(errs.Invalid, "certificates have %d bytes, the limit is %d", len(text), maxPEM)
	}
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			return nil, errs.New(errs.Invalid, "a PEM block of type %q is where only CERTIFICATE may be", block.Type)
		}
		if len(certs) == maxChain {
			return nil, errs.New(errs.Invalid, "there are more than %d certificates", maxChain)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errs.New(errs.Invalid, "not a valid x509 certificate: %w", err)
		}
		if err := checkKey(c.PublicKey, 8192); err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errs.New(errs.Invalid, "there is no PEM block of type CERTIFICATE")
	}
	return certs, nil
}

// parseKey reads a private key from PEM: PKCS#1, PKCS#8 or SEC 1.
func parseKey(text []byte) (crypto.Signer, error) {
	if len(text) > 32<<10 {
		return nil, errs.New(errs.Invalid, "the key has %d bytes, the limit is %d", len(text), 32<<10)
	}
	block, rest := pem.Decode(text)
	for block != nil && block.Type == "EC PARAMETERS" { // written by openssl before the key
		block, rest = pem.Decode(rest)
	}
	if block == nil {
		return nil, errs.New(errs.Invalid, "the key is not PEM")
	}
	var key any
	var err error
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	default:
		return nil, errs.New(errs.Invalid, "invalid key encoding %q; a private key is PEM of type PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY", block.Type)
	}
	if err != nil {
		return nil, errs.New(errs.Invalid, "not a valid private key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errs.New(errs.Invalid, "a key of type %T can't sign", key)
	}
	if err := checkKey(signer.Public(), 8192); err != nil {
		return nil, err
	}
	return signer, nil
}

// checkKey refuses keys of odd kinds and sizes before any arithmetic is done
// with them.
func checkKey(key crypto.PublicKey, maxRSA int) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < 2048 || bits > maxRSA {
			return errs.New(errs.Invalid, "RSA key has %d bits; it must have 2048 to %d", bits, maxRSA)
		}
		if k.E < 3 || k.E%2 == 0 {
			return errs.New(errs.Invalid, "RSA key has the exponent %d", k.E)
		}
		return nil
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256(), elliptic.P384():
			return nil
		case elliptic.P521():
			if maxRSA > 4096 { // authorities only
				return nil
			}
		}
		return errs.New(errs.Invalid, "the curve %s is not taken; use P-256 or P-384", k.Curve.Params().Name)
	default:
		return errs.New(errs.Invalid, "a key of type %T is not taken; use ECDSA P-256", key)
	}
}
