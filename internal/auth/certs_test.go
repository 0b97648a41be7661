package auth

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"kuma/internal/errs"
)

// clientPair is a certificate for a client, its own authority unless a parent
// signs it.
func clientPair(t *testing.T, change func(*x509.Certificate), parent *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "client"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, IsCA: true,
	}
	if change != nil {
		change(template)
	}
	signer, by := any(key), template
	if parent != nil {
		signer, by = parent.PrivateKey, parent.Leaf
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func pool(certs ...tls.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c.Leaf)
	}
	return p
}

// TestClientCertificates shows who is the administrator by a certificate, over
// real connections.
func TestClientCertificates(t *testing.T) {
	mine, other := clientPair(t, nil, nil), clientPair(t, nil, nil)
	signed := clientPair(t, func(c *x509.Certificate) { c.IsCA = false }, &mine)
	unmarked := clientPair(t, func(c *x509.Certificate) { c.ExtKeyUsage = nil }, nil)
	forServers := clientPair(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, nil)
	all := pool(mine, unmarked, forServers)
	nobody := func(t *testing.T, a *Authenticator) *Authenticator {
		t.Helper()
		a.localhostIsAdmin = false
		return a
	}
	byCert := func(now *x509.CertPool) *Authenticator {
		users := DefaultUsers()
		users.Type, users.LocalhostIsAdmin = AdminClientCerts, false
		a, err := NewAuthenticator(AuthenticatorConfig{Users: users, ClientCAs: func() *x509.CertPool { return now }})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for name, c := range map[string]struct {
		a      *Authenticator
		show   *tls.Certificate
		header string
		want   string // the caller's name, the beginning of an error, or "handshake"
	}{
		"its own authority":      {a: byCert(all), show: &mine, want: AdminName},
		"signed by an authority": {a: byCert(all), show: &signed, want: AdminName},
		"none":                   {a: byCert(all), want: AnonymousName},
		"of nobody known":        {a: byCert(all), show: &other, want: "handshake"},
		"for servers":            {a: byCert(all), show: &forServers, want: "handshake"},
		"for no purpose":         {a: byCert(all), show: &unmarked, want: "the client's certificate is not for clients"},
		"authority taken out since the handshake": {a: byCert(pool(other)), show: &mine, want: "the client's certificate is not verified any more"},
		"all authorities taken out":               {a: byCert(nil), show: &mine, want: "there are no authorities"},
		"a user token":                            {a: byCert(all), header: "Bearer x", want: "user tokens count for nothing here"},
		"tokens count, the certificate does not":  {a: nobody(t, authenticator(t, someSecrets(t), us)), show: &mine, want: AnonymousName},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				caller, err := c.a.HTTP(r)
				if err != nil {
					if !errs.Is(err, errs.Unauthenticated) {
						t.Errorf("error %v has kind %v", err, errs.KindOf(err))
					}
					w.WriteHeader(http.StatusUnauthorized)
					_, _ = io.WriteString(w, err.Error())
					return
				}
				_, _ = io.WriteString(w, caller.Name())
			}))
			s.TLS = &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: all}
			s.Config.ErrorLog = nil
			s.StartTLS()
			t.Cleanup(s.Close)
			client := s.Client()
			if c.show != nil {
				client.Transport.(*http.Transport).TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.show, nil }
			}
			r, err := http.NewRequest(http.MethodGet, s.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			if c.header != "" {
				r.Header.Set("Authorization", c.header)
			}
			resp, err := client.Do(r)
			if c.want == "handshake" {
				if err == nil {
					_ = resp.Body.Close()
					t.Fatal("the handshake let it in")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(string(body), c.want) {
				t.Errorf("got %q, want %q", body, c.want)
			}
		})
	}
}

func TestUnknownAuthentication(t *testing.T) {
	users := DefaultUsers()
	users.Type = "clientCerts"
	_, err := NewAuthenticator(AuthenticatorConfig{Users: users})
	if err == nil || !strings.Contains(err.Error(), "there is not implementation of authn named clientCerts") {
		t.Errorf("got %v", err)
	}
}

// A name that the administrator chose for this machine is as good as localhost,
// for direct requests only (HRD-01).
func TestChosenNames(t *testing.T) {
	a := authenticator(t, someSecrets(t), us)
	a.hosts = []string{"control-plane"}
	for name, c := range map[string]struct {
		r    *http.Request
		want bool
	}{
		"by its name":           {local("control-plane:5679"), true},
		"by another":            {local("control-plane.evil.example:5679"), false},
		"for a page of its own": {local("control-plane:5679", "Origin: http://control-plane:5679"), false},
		"for a foreign page":    {local("control-plane:5679", "Origin: http://evil.example"), false},
		"by a proxy":            {local("control-plane:5679", "X-Forwarded-For: 10.0.0.1"), false},
	} {
		caller, err := a.HTTP(c.r)
		if err != nil || caller.IsAnonymous() == c.want {
			t.Errorf("%s: got %v, %v, want administrator %v", name, caller, err, c.want)
		}
	}
}
