package pki

import (
	"crypto/tls"
	"crypto/x509"

	"kuma/internal/errs"
)

// ClientPair is a client's certificate with its key, from two files that are
// watched.
type ClientPair struct{ pair Pair }

// ClientPair loads a client's pair and watches it, by the rules of Pair, but
// that the leaf is for clients and need not name a host. Errors begin with the
// setting, name the file and say how to mend it. The name is that of the Expiry.
func (f *Files) ClientPair(name, setting, certFile, keyFile string) (*ClientPair, error) {
	c := &ClientPair{Pair{name: name, certFile: certFile, keyFile: keyFile, whose: ofClient}}
	return c, c.pair.open(f, setting)
}

// Certificate returns the pair to show now. What has ended is never shown, and
// the error names the file.
func (c *ClientPair) Certificate() (*tls.Certificate, error) { return c.pair.Certificate() }

// Client is how a client with files that are watched connects to a server.
type Client struct {
	// Host is the server's name or address.
	Host string
	// Anchors verify the server.
	Anchors *Anchors
	// Unverified takes whoever answers for the server. Anchors must be nil then,
	// and only then.
	Unverified bool
	// AnyName takes a certificate that Anchors vouch for whatever name it has.
	AnyName bool
	// NoSNI keeps the name of the server out of the handshake, where it is in
	// clear.
	NoSNI bool
	// Pair is shown to a server that asks for it; nil shows none.
	Pair *ClientPair
}

// TLS returns the configuration of one connection, made of what the files hold
// now: TLS 1.2 and newer, Go's choice of groups, nothing resumed, so that each
// connection is verified. The error is Unavailable where the pair has ended.
func (c *Client) TLS() (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if !c.NoSNI {
		cfg.ServerName = c.Host
	}
	if c.Pair != nil {
		pair, err := c.Pair.Certificate()
		if err != nil {
			return nil, err
		}
		// It is shown whatever authorities the server names, as those that it
		// trusts may be the certificates of clients themselves.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	}
	if c.Unverified == (c.Anchors != nil) {
		return nil, errs.New(errs.Internal, "it is not said by what the server is verified")
	}
	if c.Unverified {
		cfg.InsecureSkipVerify = true
		return cfg, nil
	}
	if c.Host == "" && !c.AnyName {
		return nil, errs.New(errs.Internal, "there is no name to verify the server by") // x509 would verify none
	}
	// Never nil, which would mean the authorities of this machine.
	cfg.RootCAs = x509.NewCertPool()
	for _, cert := range c.Anchors.Certificates() {
		cfg.RootCAs.AddCert(cert)
	}
	if c.AnyName || c.NoSNI {
		// crypto/tls verifies a name that it sends, and only that.
		cfg.InsecureSkipVerify = true
		cfg.VerifyConnection = func(s tls.ConnectionState) error { return c.verify(cfg.RootCAs, s.PeerCertificates) }
	}
	return cfg, nil
}

// verify is crypto/tls's own verification of a server, for the name that counts.
func (c *Client) verify(roots *x509.CertPool, shown []*x509.Certificate) error {
	if len(shown) == 0 {
		return errs.New(errs.Unauthenticated, "the server showed no certificate")
	}
	o := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), DNSName: c.Host}
	if c.AnyName {
		o.DNSName = ""
	}
	for _, cert := range shown[1:] {
		o.Intermediates.AddCert(cert)
	}
	if _, err := shown[0].Verify(o); err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: shown, Err: err}
	}
	return nil
}
