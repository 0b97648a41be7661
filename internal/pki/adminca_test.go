package pki_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

// originalAdminCA is an authority in the form of the original's: RSA, serial
// number zero.
func originalAdminCA(t *testing.T, life time.Duration) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(0), Subject: pkix.Name{Organization: []string{"Kuma"}, OrganizationalUnit: []string{"Mesh"}, CommonName: "Envoy Admin CA"},
		NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})...)
}

func newAdminCA(t *testing.T) []byte {
	t.Helper()
	text, err := pki.NewAdminCA()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func openAdminCA(t *testing.T, text []byte) *pki.AdminCA {
	t.Helper()
	ca, err := pki.OpenAdminCA(text)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func TestNewAdminCA(t *testing.T) {
	text := newAdminCA(t)
	if _, err := tls.X509KeyPair(text, text); err != nil {
		t.Errorf("the original could not read it: %v", err)
	}
	block, rest := pem.Decode(text)
	if next, _ := pem.Decode(rest); next == nil || !strings.HasSuffix(next.Type, "PRIVATE KEY") {
		t.Error("no key follows the certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.CommonName != "Envoy Admin CA" || !cert.IsCA || cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("subject %s, CA %v, usage %b", cert.Subject, cert.IsCA, cert.KeyUsage)
	}
	if life := time.Until(cert.NotAfter); life < 10*pki.Year-time.Hour || life > 10*pki.Year {
		t.Errorf("it lives %s", life)
	}
}

// handshake lets a client meet a server that demands a certificate of the
// authority, as a proxy does, and returns both sides' errors.
func handshake(t *testing.T, ca *pki.AdminCA, server pki.AdminServer, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	key, err := server.Key.PEM()
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(server.Chain, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.Trust())
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	deadline := time.Now().Add(30 * time.Second)
	_ = a.SetDeadline(deadline)
	_ = b.SetDeadline(deadline)
	done := make(chan error, 1)
	go func() {
		s := tls.Server(a, &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x"))
		}
		_ = a.Close()
		done <- err
	}()
	c := tls.Client(b, client)
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	_ = b.Close()
	return <-done, clientErr
}

// TestAdminChannel is HRD-31: each end is good for its own part alone, and the
// control plane talks to the very proxy that it means.
func TestAdminChannel(t *testing.T) {
	for name, text := range map[string][]byte{"ours": newAdminCA(t), "the original's": originalAdminCA(t, time.Hour)} {
		t.Run(name, func(t *testing.T) {
			ca := openAdminCA(t, text)
			server, err := ca.Server("default", "web", "127.0.0.1")
			if err != nil {
				t.Fatal(err)
			}
			client, err := ca.Client("default", "web")
			if err != nil {
				t.Fatal(err)
			}
			if se, ce := handshake(t, ca, server, client); se != nil || ce != nil {
				t.Errorf("the two ends don't understand each other: %v, %v", se, ce)
			}
			leaf, err := x509.ParseCertificate(client.Certificates[0].Certificate[0])
			if err != nil {
				t.Fatal(err)
			}
			if len(leaf.DNSNames) != 1 || leaf.DNSNames[0] != "kuma-cp" || leaf.IsCA {
				t.Errorf("the client is called %q, CA %v", leaf.DNSNames, leaf.IsCA)
			}

			other, err := ca.Client("default", "web2")
			if err != nil {
				t.Fatal(err)
			}
			if _, ce := handshake(t, ca, server, other); ce == nil || !strings.Contains(ce.Error(), "certificate is valid for") {
				t.Errorf("another proxy's server: %v", ce)
			}
			foreign, err := openAdminCA(t, newAdminCA(t)).Server("default", "web", "127.0.0.1")
			if err != nil {
				t.Fatal(err)
			}
			if _, ce := handshake(t, ca, foreign, client); ce == nil {
				t.Error("another authority's server is taken")
			}

			// A proxy's own certificate opens no other proxy's listener.
			key, err := server.Key.PEM()
			if err != nil {
				t.Fatal(err)
			}
			pair, err := tls.X509KeyPair(server.Chain, key)
			if err != nil {
				t.Fatal(err)
			}
			proxy := client.Clone()
			proxy.Certificates = []tls.Certificate{pair}
			if se, _ := handshake(t, ca, server, proxy); se == nil || !strings.Contains(se.Error(), "incompatible key usage") {
				t.Errorf("a server's certificate is taken for a client's: %v", se)
			}
			none := client.Clone()
			none.Certificates = nil
			if se, _ := handshake(t, ca, server, none); se == nil {
				t.Error("a client without certificate is let in")
			}
		})
	}
}

func TestAdminNames(t *testing.T) {
	seen := map[string]string{pki.AdminClient: "the control plane"}
	for _, p := range [][2]string{{"a", "b.c"}, {"a.b", "c"}, {"default", "kuma-cp"}, {"", "kuma-cp"}, {strings.Repeat("m", 63), strings.Repeat("p", 253)}} {
		name := pki.AdminServerName(p[0], p[1])
		if other, taken := seen[name]; taken {
			t.Errorf("%q has the name of %s", p, other)
		}
		seen[name] = strings.Join(p[:], "/")
	}
}

func TestAdminCARefuses(t *testing.T) {
	good, another := newAdminCA(t), newAdminCA(t)
	split := bytes.Index(good, []byte("-----BEGIN EC"))
	cut := bytes.Index(another, []byte("-----BEGIN EC"))
	for name, text := range map[string][]byte{
		"empty": nil, "no PEM": []byte("x"), "no key": good[:split], "no certificate": good[split:],
		"another's key": append(bytes.Clone(good[:split]), another[cut:]...), "too long": bytes.Repeat([]byte("x"), 1<<20),
	} {
		if _, err := pki.OpenAdminCA(text); !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// HRD-40: nothing is issued that outlives the authority, or by one that has
	// ended.
	ended := openAdminCA(t, originalAdminCA(t, -time.Second))
	if _, err := ended.Server("m", "p", "::1"); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "envoy-admin-ca") {
		t.Errorf("an authority that has ended: %v", err)
	}
	if _, err := ended.Client("m", "p"); !errs.Is(err, errs.Unavailable) {
		t.Errorf("an authority that has ended: %v", err)
	}
	short := openAdminCA(t, originalAdminCA(t, time.Hour))
	s, err := short.Server("m", "p", "not an address")
	if err != nil || s.NotAfter.After(short.Expiry().NotAfter) {
		t.Errorf("it lives until %s, its authority until %s, %v", s.NotAfter, short.Expiry().NotAfter, err)
	}
}
