package builtin_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
	"kuma/internal/pki/builtin"
)

func TestRoot(t *testing.T) {
	cases := map[string]struct {
		conf string
		bits int
		life time.Duration
	}{
		"defaults": {``, 0, 10 * pki.Year},
		"null":     {`null`, 0, 10 * pki.Year},
		"conf":     {`{"caCert": {"RSAbits": 2048, "expiration": "30d"}}`, 2048, 30 * 24 * time.Hour},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			conf, err := builtin.ParseConf([]byte(c.conf))
			if err != nil {
				t.Fatal(err)
			}
			root, err := builtin.NewRoot("demo", conf)
			if err != nil {
				t.Fatal(err)
			}
			block, _ := pem.Decode(root.Cert)
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if cert.Subject.String() != "CN=demo,OU=Mesh,O=Kuma" || cert.Issuer.String() != cert.Subject.String() || len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://demo" {
				t.Errorf("subject %s, issuer %s, names %v", cert.Subject, cert.Issuer, cert.URIs)
			}
			if !cert.IsCA || cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign || cert.SerialNumber.BitLen() < 64 {
				t.Errorf("CA %t, usage %b, serial %v", cert.IsCA, cert.KeyUsage, cert.SerialNumber)
			}
			if got := cert.NotAfter.Sub(cert.NotBefore); got != c.life+10*time.Second {
				t.Errorf("life = %v, want %v", got, c.life)
			}
			switch key := cert.PublicKey.(type) {
			case *rsa.PublicKey:
				if key.N.BitLen() != c.bits {
					t.Errorf("%d bits, want %d", key.N.BitLen(), c.bits)
				}
			case *ecdsa.PublicKey:
				if c.bits != 0 || key.Curve.Params().Name != "P-256" {
					t.Errorf("curve %s", key.Curve.Params().Name)
				}
			}
			issue(t, root.Cert, root.Key)
		})
	}
	for _, bad := range []string{`{"caCert": {"rsaBit": 1}}`, `{"caCert": {"RSAbits": 1024}}`, `{"caCert": {"RSAbits": 1000000}}`, `{"caCert": {"expiration": "1h30m"}}`, `[]`, `{`} {
		if _, err := builtin.ParseConf([]byte(bad)); !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if _, err := builtin.NewRoot("UPPER", builtin.Conf{}); !errs.Is(err, errs.Invalid) {
		t.Errorf("mesh that can't be a trust domain: %v", err)
	}
}

func issue(t *testing.T, cert, key []byte) {
	t.Helper()
	a, err := builtin.Open(cert, key, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := pki.NewSubject("demo", []string{"web"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Prepare(t.Context(), subject)
	if err != nil {
		t.Fatal(err)
	}
	k, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Issue(t.Context(), p, k.Public())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(c.Trust) {
		t.Fatal("no trust bundle")
	}
	if _, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
		t.Error(err)
	}
	if left := time.Until(c.Leaf.NotAfter); left > time.Hour || left < 59*time.Minute {
		t.Errorf("the leaf lives %v", left)
	}
}

// TestOriginalRoot: a root as the original makes it, RSA with the serial 0 and
// a PKCS#1 key, goes on issuing.
func TestOriginalRoot(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(0),
		Subject:      pkix.Name{Organization: []string{"Kuma"}, OrganizationalUnit: []string{"Mesh"}, CommonName: "demo"},
		URIs:         []*url.URL{{Scheme: "spiffe", Host: "demo"}},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * pki.Year),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	issue(t, cert, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	if _, err := builtin.Open(cert, []byte("garbage"), 0); !errs.Is(err, errs.Invalid) || strings.Contains(err.Error(), "garbage") {
		t.Errorf("garbage key: %v", err)
	}
}
