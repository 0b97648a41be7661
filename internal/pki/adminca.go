package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"net"
	"time"

	"kuma/internal/errs"
)

const (
	// AdminClient is the DNS name in the certificate by which the control plane
	// shows itself to a proxy's admin listener (contract).
	AdminClient = "kuma-cp"

	adminServerLife = 30 * 24 * time.Hour
	adminClientLife = time.Hour
	// adminBackdate is how far the clocks of proxy and control plane may be
	// apart.
	adminBackdate = 5 * time.Minute
)

// NewAdminCA makes the authority of the proxies' admin listeners in the
// contract's form: a certificate and then its key, PEM. The key is on P-256,
// the certificate valid for ten years.
func NewAdminCA() ([]byte, error) {
	k, err := NewKey()
	if err != nil {
		return nil, err
	}
	cert, key, err := selfSign(k, &x509.Certificate{
		Subject:  pkix.Name{Organization: []string{"Kuma"}, OrganizationalUnit: []string{"Mesh"}, CommonName: "Envoy Admin CA"},
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true,
	}, adminBackdate, 10*Year)
	return append(cert, key...), err
}

// An AdminCA issues the certificates of both ends of the channel between the
// control plane and the admin listener of a proxy without a link. It is safe for
// concurrent use.
type AdminCA struct{ authority *Authority }

// OpenAdminCA reads what NewAdminCA, or the original, made. Further
// certificates behind the first are trusted too. Errors are Invalid and never
// show the key.
func OpenAdminCA(text []byte) (*AdminCA, error) {
	if len(text) > maxPEM {
		return nil, errs.New(errs.Invalid, "the authority has %d bytes, the limit is %d", len(text), maxPEM)
	}
	var certs, key []byte
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			certs = append(certs, pem.EncodeToMemory(block)...)
		} else {
			key = append(key, pem.EncodeToMemory(block)...)
		}
	}
	a, err := NewAuthority(AuthorityConfig{Cert: certs, Key: key})
	if err != nil {
		return nil, err
	}
	return &AdminCA{a}, nil
}

// Trust returns the certificates by which either end knows the other, PEM.
func (a *AdminCA) Trust() []byte { return a.authority.Trust() }

// Expiry tells when the authority ends.
func (a *AdminCA) Expiry() Expiry {
	return Expiry{Name: "envoy-admin-ca", Subject: a.authority.cert.Subject.String(), NotAfter: a.authority.Expires()}
}

// AdminServer is the certificate of one proxy's admin listener.
type AdminServer struct {
	// Chain is PEM.
	Chain []byte
	// Key is its private key.
	Key Key
	// NotBefore and NotAfter bound its life.
	NotBefore, NotAfter time.Time
}

// AdminServerName is the DNS name in the certificate of a proxy's admin
// listener. It is made from a hash, since the names of meshes and proxies need
// not be host names, and it is never AdminClient.
func AdminServerName(mesh, proxy string) string {
	sum := sha256.Sum256([]byte(mesh + "\x00" + proxy))
	return hex.EncodeToString(sum[:16]) + ".proxy.kuma"
}

// Server issues the certificate of a proxy's admin listener: good for servers
// alone, with the name AdminServerName and, where the address is an IP address,
// that. It lives thirty days. Errors: Unavailable where the authority has ended.
func (a *AdminCA) Server(mesh, proxy, address string) (AdminServer, error) {
	template := &x509.Certificate{
		Subject: commonName(mesh + "." + proxy), DNSNames: []string{AdminServerName(mesh, proxy)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(address); ip != nil {
		template.IPAddresses = []net.IP{ip}
	}
	key, chain, err := a.issue(template, adminServerLife)
	return AdminServer{Chain: chain, Key: key, NotBefore: template.NotBefore, NotAfter: template.NotAfter}, err
}

// Client returns how the control plane speaks to a proxy's admin listener: with
// a fresh certificate that is good for clients alone, and with a server that has
// a certificate for this very proxy. Errors are those of Server.
func (a *AdminCA) Client(mesh, proxy string) (*tls.Config, error) {
	template := &x509.Certificate{
		Subject: commonName(AdminClient), DNSNames: []string{AdminClient},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	key, chain, err := a.issue(template, adminClientLife)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(chain)
	return &tls.Config{
		MinVersion: tls.VersionTLS12, RootCAs: a.authority.roots, ServerName: AdminServerName(mesh, proxy),
		Certificates: []tls.Certificate{{Certificate: [][]byte{block.Bytes}, PrivateKey: key.signer}},
	}, nil
}

// issue completes a template and signs it for a new key. Nothing outlives the
// authority.
func (a *AdminCA) issue(template *x509.Certificate, life time.Duration) (Key, []byte, error) {
	now, by := time.Now(), a.authority.cert
	if now.Add(time.Minute).After(by.NotAfter) || now.Before(by.NotBefore) {
		return Key{}, nil, errs.New(errs.Unavailable, "the authority of the admin listeners, the GlobalSecret envoy-admin-ca, is valid from %s to %s only: delete it and restart the control plane, which makes a new one",
			by.NotBefore.UTC().Format(time.RFC3339), by.NotAfter.UTC().Format(time.RFC3339))
	}
	key, err := NewKey()
	if err != nil {
		return Key{}, nil, err
	}
	if template.SerialNumber, err = serial(); err != nil {
		return Key{}, nil, err
	}
	template.NotBefore, template.NotAfter = now.Add(-adminBackdate), now.Add(life)
	if template.NotAfter.After(by.NotAfter) {
		template.NotAfter = by.NotAfter
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, by, key.signer.Public(), a.authority.key)
	if err != nil {
		return Key{}, nil, errs.New(errs.Internal, "sign a certificate for the admin channel: %w", err)
	}
	return key, encodeCert(der), nil
}
