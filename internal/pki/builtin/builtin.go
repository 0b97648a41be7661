// Package builtin is the authority that a mesh has of its own: its root
// certificate and key rest as two secrets of the mesh.
package builtin

import (
	"bytes"
	"encoding/json"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
	"kuma/internal/resource"
)

// Type is the name of this kind of authority in Mesh.mtls.
const Type = "builtin"

// DefaultLife is the life of a root whose backend names none.
const DefaultLife = 10 * pki.Year

// Conf is the `conf` of a backend of type builtin.
type Conf struct {
	// CACert is about the root certificate.
	CACert CACert `json:"caCert,omitzero"`
}

// CACert is how a root is made. Changing it later has no effect on a root
// that exists.
type CACert struct {
	// RSABits, where given, makes an RSA key of that size, 2048 to 8192. Without
	// it the key is on the curve P-256.
	RSABits int `json:"RSAbits,omitempty"`
	// Expiration is the root's life, one integer and one unit of y, w, d, h,
	// m, s, ms. The default is 10y.
	Expiration string `json:"expiration,omitempty"`
}

// ParseConf reads a backend's conf; empty and null mean the defaults. Unknown
// fields are an error, and so are values that no root can have. Errors are
// Invalid.
func ParseConf(text []byte) (Conf, error) {
	var c Conf
	if len(bytes.TrimSpace(text)) == 0 {
		return c, nil
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Conf{}, errs.New(errs.Invalid, "conf of a builtin backend (caCert.RSAbits and caCert.expiration are known): %w", err)
	}
	var fields []errs.Field
	if b := c.CACert.RSABits; b != 0 && (b < 2048 || b > 8192) {
		fields = append(fields, errs.Field{Path: "caCert.RSAbits", Message: "must be 2048 to 8192"})
	}
	if _, err := resource.ParseLife(c.CACert.Expiration); err != nil {
		fields = append(fields, errs.Field{Path: "caCert.expiration", Message: err.Error()})
	}
	return c, errs.Fields(fields...)
}

// Root is a new root, as PEM.
type Root struct {
	// Cert is the certificate, as PEM.
	Cert []byte
	// Key is its private key, as PEM.
	Key []byte
}

// NewRoot makes a root for a mesh: self-signed, CN the mesh, with the URI
// spiffe://<mesh>, starting ten seconds ago.
func NewRoot(mesh string, c Conf) (Root, error) {
	life, err := resource.ParseLife(c.CACert.Expiration)
	if err != nil {
		return Root{}, errs.New(errs.Invalid, "make a root for mesh %q: %w", mesh, err)
	}
	if life == 0 {
		life = DefaultLife
	}
	cert, key, err := pki.NewRoot(mesh, c.CACert.RSABits, life)
	if err != nil {
		return Root{}, errs.New(errs.KindOf(err), "make a root for mesh %q: %w", mesh, err)
	}
	return Root{Cert: cert, Key: key}, nil
}

// Open makes an Authority from the two secrets of a mesh, those that another
// control plane made included. The life is that of proxies' certificates; 0
// means the default, 24 hours.
func Open(cert, key []byte, life time.Duration) (*pki.Authority, error) {
	return pki.NewAuthority(pki.AuthorityConfig{Cert: cert, Key: key, Life: life})
}
