package auth

import (
	"crypto/x509"
	"net/http"
	"slices"

	"kuma/internal/errs"
)

// Values of UsersConfig.Type.
const (
	// UserTokens: callers show a user token.
	UserTokens = "tokens"
	// AdminClientCerts: who shows a certificate of one of the configured
	// authorities is the administrator. The contract keeps it for those who have
	// used it since before there were user tokens.
	AdminClientCerts = "adminClientCerts"
)

// certificate tells who showed a certificate in the handshake. It reports false
// where there was none. The chain is verified again for each request, so that
// an authority that was taken out, or a certificate that has ended since, counts
// for nothing on a connection that is still open (HRD-08). Errors are
// Unauthenticated.
func (a *Authenticator) certificate(r *http.Request) (Caller, bool, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return Caller{}, false, nil
	}
	leaf := r.TLS.PeerCertificates[0]
	if !r.TLS.HandshakeComplete || len(r.TLS.VerifiedChains) == 0 {
		return Caller{}, false, errs.New(errs.Unauthenticated, "the client's certificate was not verified in the handshake")
	}
	// A certificate without any extended usage is no client's: a server's, a
	// mesh's or an authority's own could be used by mistake.
	if !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return Caller{}, false, errs.New(errs.Unauthenticated, "the client's certificate is not for clients (extended key usage clientAuth); make one with kumactl generate tls-certificate --type=client")
	}
	if a.clientCAs != nil {
		between := x509.NewCertPool()
		for _, c := range r.TLS.PeerCertificates[1:] {
			between.AddCert(c)
		}
		pool := a.clientCAs()
		if pool == nil { // nil would mean the system's authorities
			return Caller{}, false, errs.New(errs.Unauthenticated, "there are no authorities of client certificates")
		}
		_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if err != nil {
			return Caller{}, false, errs.New(errs.Unauthenticated, "the client's certificate is not verified any more: %w", err)
		}
	}
	return Admin(), true, nil
}
