package pki_test

import (
	"crypto/x509"
	"path/filepath"
	"strings"
	"testing"
)

// An authority without the extension for key usage may sign: RFC 5280, 4.2.1.3,
// limits one that has it. openssl req -x509 makes such authorities.
func TestClientsByAuthorityWithoutKeyUsage(t *testing.T) {
	t.Parallel()
	root := mint(t, nil, func(c *x509.Certificate) { asCA(c); c.KeyUsage = 0 })
	client := mint(t, root, asClient)
	file := filepath.Join(t.TempDir(), "ca.pem")
	write(t, file, certPEM(root))
	watch, _ := files()
	p, err := watch.Clients("api-server-client-ca", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE", file)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, c := range p.Certificates() {
		roots.AddCert(c)
	}
	if _, err := client.cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
}

// What is said of a file of clients' authorities is about such, not about the
// authorities of meshes.
func TestClientsRefusedInTheirOwnWords(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"it may not sign":   {func(c *x509.Certificate) { asCA(c); c.KeyUsage = x509.KeyUsageDigitalSignature }, "its key usage lacks keyCertSign"},
		"it is no CA":       {func(c *x509.Certificate) { asCA(c); c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }, "it has no basic constraint CA:TRUE"},
		"a server's":        {nil, "it has no basic constraint CA:TRUE"},
		"key agreement too": {func(c *x509.Certificate) { asCA(c); c.KeyUsage |= x509.KeyUsageKeyAgreement }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "ca.pem")
			write(t, file, certPEM(mint(t, nil, c.change)))
			watch, _ := files()
			_, err := watch.Clients("api-server-client-ca", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE", file)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			refused(t, err, "KUMA_API_SERVER_HTTPS_TLS_CA_FILE: ", file, c.want)
			if strings.Contains(err.Error(), "SVID") {
				t.Errorf("%v", err)
			}
		})
	}
}
