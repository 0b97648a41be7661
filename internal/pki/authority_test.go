package pki_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

func authority(t testing.TB, rootLife, life time.Duration) *pki.Authority {
	t.Helper()
	cert, key, err := pki.NewRoot("default", 0, rootLife)
	if err != nil {
		t.Fatal(err)
	}
	a, err := pki.NewAuthority(pki.AuthorityConfig{Cert: cert, Key: key, Life: life})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func web(t testing.TB) pki.Subject {
	t.Helper()
	s, err := pki.NewSubject("default", []string{"web", "api", "web"}, map[string][]string{
		"version": {"2", "1", "2"}, "kuma.io/service": {"web", "api"}, "kuma.io/protocol": {"http"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func request(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestIssue(t *testing.T) {
	p256, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, err2 := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	rsaKey, err3 := rsa.GenerateKey(rand.Reader, 2048)
	if err1 != nil || err2 != nil || err3 != nil {
		t.Fatal(err1, err2, err3)
	}
	cases := map[string]struct {
		key   crypto.Signer
		usage x509.KeyUsage
	}{
		"P-256": {p256, x509.KeyUsageDigitalSignature},
		"P-384": {p384, x509.KeyUsageDigitalSignature},
		"RSA":   {rsaKey, x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, now := authority(t, pki.Year, 0), time.Now()
				// HRD-22: whatever the request names is ignored.
				public, err := pki.ParseRequest(request(t, c.key, x509.CertificateRequest{
					Subject: pkix.Name{CommonName: "admin"}, DNSNames: []string{"evil"},
					URIs: []*url.URL{{Scheme: "spiffe", Host: "default", Path: "/admin"}},
				}))
				if err != nil {
					t.Fatal(err)
				}
				p, err := a.Prepare(t.Context(), web(t))
				if err != nil {
					t.Fatal(err)
				}
				got, err := a.Issue(t.Context(), p, public)
				if err != nil {
					t.Fatal(err)
				}
				block, rest := pem.Decode(got.Chain)
				if block == nil || len(rest) > 0 {
					t.Fatal("the chain is not one PEM block")
				}
				leaf, err := x509.ParseCertificate(block.Bytes)
				if err != nil {
					t.Fatal(err)
				}
				var uris []string
				for _, u := range leaf.URIs {
					uris = append(uris, u.String())
				}
				want := []string{"spiffe://default/web", "spiffe://default/api", "kuma://kuma.io/protocol/http", "kuma://kuma.io/service/api", "kuma://kuma.io/service/web", "kuma://version/1", "kuma://version/2"}
				if diff := cmp.Diff(want, uris); diff != "" {
					t.Error(diff)
				}
				if leaf.Subject.String() != "" || len(leaf.DNSNames) > 0 || leaf.IsCA || leaf.KeyUsage != c.usage || leaf.SerialNumber.BitLen() > 129 {
					t.Errorf("subject %q, DNS %v, CA %t, usage %b", leaf.Subject, leaf.DNSNames, leaf.IsCA, leaf.KeyUsage)
				}
				if !leaf.NotBefore.Equal(now.Add(-10*time.Second)) || !leaf.NotAfter.Equal(now.Add(24*time.Hour)) {
					t.Errorf("valid from %v to %v at %v", leaf.NotBefore, leaf.NotAfter, now)
				}
				if services, err := pki.Classic(leaf, "default"); err != nil || fmt.Sprint(services) != "[api web]" {
					t.Errorf("classic names: %v, %v", services, err)
				}
				if _, err := pki.ID(leaf); err == nil {
					t.Error("several names were taken as one identity")
				}
			})
		})
	}
}

// TestOnce is HRD-22 and HRD-07: what is prepared is issued once, by who
// prepared it, for a key that was proved, and soon.
func TestOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, ctx := authority(t, pki.Year, 0), authority(t, pki.Year, 0), t.Context()
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		prepare := func() pki.Prepared {
			p, err := a.Prepare(ctx, web(t))
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		p := prepare()
		var won atomic.Int32
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, err := a.Issue(ctx, p, key.Public()); err == nil {
					won.Add(1)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Errorf("one plan was issued %d times", won.Load())
		}
		if _, err := a.Issue(ctx, pki.Prepared{}, key.Public()); err == nil {
			t.Error("the zero plan was issued")
		}
		if _, err := b.Issue(ctx, prepare(), key.Public()); err == nil {
			t.Error("another authority issued the plan")
		}
		if _, err := a.Issue(ctx, prepare(), pki.PublicKey{}); err == nil {
			t.Error("a certificate without key was issued")
		}
		if _, err := a.Prepare(ctx, pki.Subject{}); err == nil {
			t.Error("a certificate for nobody was prepared")
		}
		gone, cancel := context.WithCancel(ctx)
		cancel()
		if _, err := a.Issue(gone, prepare(), key.Public()); err == nil {
			t.Error("issued after the caller left")
		}
		old := prepare()
		time.Sleep(2 * time.Minute)
		if _, err := a.Issue(ctx, old, key.Public()); err == nil {
			t.Error("a stale plan was issued")
		}
	})
}

// TestIssuerLife is HRD-40: a leaf never outlives its issuer, and an issuer
// that is not valid issues nothing and says the date.
func TestIssuerLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := authority(t, 48*time.Hour, 24*time.Hour)
		end := time.Now().Add(48 * time.Hour)
		issue := func() (time.Time, error) {
			p, err := a.Prepare(t.Context(), web(t))
			if err != nil {
				return time.Time{}, err
			}
			key, err := pki.NewKey()
			if err != nil {
				return time.Time{}, err
			}
			c, err := a.Issue(t.Context(), p, key.Public())
			if err != nil {
				return time.Time{}, err
			}
			return c.Leaf.NotAfter, nil
		}
		if got, err := issue(); err != nil || !got.Equal(time.Now().Add(24*time.Hour)) {
			t.Errorf("fresh: %v, %v", got, err)
		}
		time.Sleep(40 * time.Hour)
		if got, err := issue(); err != nil || !got.Equal(end) {
			t.Errorf("clamped: %v, %v, want %v", got, err, end)
		}
		date := end.UTC().Format(time.RFC3339)
		time.Sleep(8*time.Hour - 10*time.Second)
		if _, err := issue(); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "expires at "+date) {
			t.Errorf("soon: %v", err)
		}
		time.Sleep(time.Minute)
		if _, err := issue(); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "expired at "+date) {
			t.Errorf("expired: %v", err)
		}
	})
	early := root(t, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) })
	if _, err := early.Prepare(t.Context(), web(t)); err == nil || !strings.Contains(err.Error(), "is not valid before") {
		t.Errorf("not yet valid: %v", err)
	}
}

func rootPEM(t *testing.T, change func(*x509.Certificate)) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "r"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	kd, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kd})
}

func root(t *testing.T, change func(*x509.Certificate)) *pki.Authority {
	t.Helper()
	cert, key := rootPEM(t, change)
	a, err := pki.NewAuthority(pki.AuthorityConfig{Cert: cert, Key: key})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestNewAuthorityRefuses(t *testing.T) {
	cert, key := rootPEM(t, func(*x509.Certificate) {})
	notCA, notCAKey := rootPEM(t, func(c *x509.Certificate) { c.IsCA = false })
	noSign, noSignKey := rootPEM(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })
	agree, agreeKey := rootPEM(t, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement })
	cases := map[string]struct {
		c    pki.AuthorityConfig
		want string
	}{
		"no certificate":  {pki.AuthorityConfig{Key: key}, "there is no PEM block of type CERTIFICATE"},
		"no key":          {pki.AuthorityConfig{Cert: cert}, "the key is not PEM"},
		"other key":       {pki.AuthorityConfig{Cert: cert, Key: noSignKey}, "not a valid TLS key pair"},
		"not CA":          {pki.AuthorityConfig{Cert: notCA, Key: notCAKey}, "basic constraint 'CA' must be set to 'true' (see X509-SVID: 4.1. Basic Constraints)"},
		"no certSign":     {pki.AuthorityConfig{Cert: noSign, Key: noSignKey}, "key usage extension 'keyCertSign' must be set (see X509-SVID: 4.3. Key Usage)"},
		"keyAgreement":    {pki.AuthorityConfig{Cert: agree, Key: agreeKey}, "key usage extension 'keyAgreement' must NOT be set (see X509-SVID: Appendix A. X.509 Field Reference)"},
		"key beside cert": {pki.AuthorityConfig{Cert: append(append([]byte{}, cert...), key...), Key: key}, `PEM block of type "PRIVATE KEY" is where only CERTIFICATE may be`},
		"not X.509":       {pki.AuthorityConfig{Cert: []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), Key: key}, "not a valid x509 certificate"},
		"many (HRD-24)":   {pki.AuthorityConfig{Cert: []byte(strings.Repeat(string(cert), 20)), Key: key}, "more than 16 certificates"},
		"long (HRD-24)":   {pki.AuthorityConfig{Cert: []byte(strings.Repeat("x", 1<<20)), Key: key}, "the limit is 262144"},
		"negative life":   {pki.AuthorityConfig{Cert: cert, Key: key, Life: -1}, "it must be positive"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := pki.NewAuthority(c.c); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestParseRequestRefuses(t *testing.T) {
	key := func(k crypto.Signer, err error) crypto.Signer {
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p224 := key(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))
	p521 := key(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	small := key(rsa.GenerateKey(rand.Reader, 1024))
	good := request(t, key(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), x509.CertificateRequest{})
	forged := append([]byte{}, good...)
	forged[len(forged)-1] ^= 1
	huge := request(t, key(rsa.GenerateKey(rand.Reader, 2048)), x509.CertificateRequest{})
	none := x509.CertificateRequest{}
	cases := map[string]struct {
		der  []byte
		want string
	}{
		"Ed25519":                {request(t, ed, none), "is not taken"},
		"P-224":                  {request(t, p224, none), "the curve P-224 is not taken"},
		"P-521":                  {request(t, p521, none), "the curve P-521 is not taken"},
		"RSA 1024":               {request(t, small, none), "RSA key has 1024 bits"},
		"RSA of 12,000 (HRD-24)": {grow(t, huge), "RSA key has 12000 bits"},
		"forged":                 {forged, "not signed with the key that it carries"},
		"empty":                  {nil, "not a certificate request"},
		"PEM":                    {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: good}), "not a certificate request"},
		"more after it":          {append(append([]byte{}, good...), 0), "not a certificate request"},
		"long":                   {make([]byte, 1<<20), "the limit is 16384"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			if _, err := pki.ParseRequest(c.der); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want one with %q", err, c.want)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("it took %v to refuse", d)
			}
		})
	}
}

// grow puts a modulus of 12,000 bits into a request, without signing it anew.
func grow(t *testing.T, der []byte) []byte {
	t.Helper()
	type info struct {
		Version int
		Subject asn1.RawValue
		Key     struct {
			Algorithm pkix.AlgorithmIdentifier
			Bits      asn1.BitString
		}
		Attributes asn1.RawValue `asn1:"tag:0"`
	}
	var r struct {
		Info      info
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &r); err != nil {
		t.Fatal(err)
	}
	key := x509.MarshalPKCS1PublicKey(&rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 11999, 1), E: 65537})
	r.Info.Key.Bits = asn1.BitString{Bytes: key, BitLength: len(key) * 8}
	out, err := asn1.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// FuzzParseRequest is HRD-09: no bytes crash the decoder, and what it takes
// can be issued for.
func FuzzParseRequest(f *testing.F) {
	key, err := pki.NewKey()
	if err != nil {
		f.Fatal(err)
	}
	der, err := key.Request()
	if err != nil {
		f.Fatal(err)
	}
	a := authority(f, pki.Year, 0)
	f.Add(der)
	f.Add([]byte{})
	f.Add(der[:len(der)/2])
	f.Add([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, der []byte) {
		public, err := pki.ParseRequest(der)
		if err != nil {
			if !errs.Is(err, errs.Invalid) {
				t.Error(err)
			}
			return
		}
		p, err := a.Prepare(context.Background(), web(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Issue(context.Background(), p, public); err != nil {
			t.Error(err)
		}
	})
}

func TestSubject(t *testing.T) {
	many := make([]string, 2000)
	for i := range many {
		many[i] = fmt.Sprint("s", i)
	}
	for name, make := range map[string]func() (pki.Subject, error){
		"no service":        func() (pki.Subject, error) { return pki.NewSubject("default", nil, nil) },
		"empty service":     func() (pki.Subject, error) { return pki.NewSubject("default", []string{""}, nil) },
		"path in a service": func() (pki.Subject, error) { return pki.NewSubject("default", []string{"a/b"}, nil) },
		"upward service":    func() (pki.Subject, error) { return pki.NewSubject("default", []string{".."}, nil) },
		"comma in service":  func() (pki.Subject, error) { return pki.NewSubject("default", []string{"a,kuma"}, nil) },
		"mesh with slash":   func() (pki.Subject, error) { return pki.NewSubject("a/b", []string{"a"}, nil) },
		"mesh upper case":   func() (pki.Subject, error) { return pki.NewSubject("Default", []string{"a"}, nil) },
		"empty mesh":        func() (pki.Subject, error) { return pki.NewSubject("", []string{"a"}, nil) },
		"many":              func() (pki.Subject, error) { return pki.NewSubject("default", many, nil) },
		"newline in a tag": func() (pki.Subject, error) {
			return pki.NewSubject("default", []string{"a"}, map[string][]string{"k": {"a\nb"}})
		},
		"empty tag": func() (pki.Subject, error) {
			return pki.NewSubject("default", []string{"a"}, map[string][]string{"": {"b"}})
		},
		"long tag": func() (pki.Subject, error) {
			return pki.NewSubject("default", []string{"a"}, map[string][]string{"k": {strings.Repeat("a", 3000)}})
		},
		"no SPIFFE id":  func() (pki.Subject, error) { return pki.NewWorkload("https://a/b") },
		"only a domain": func() (pki.Subject, error) { return pki.NewWorkload("spiffe://a") },
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := make(); !errs.Is(err, errs.Invalid) {
				t.Errorf("got %v, %v, want it refused", s.Names(), err)
			}
		})
	}
	a := authority(t, pki.Year, 0)
	s, err := pki.NewWorkload("spiffe://default.east.mesh.local/workload/web")
	if err != nil {
		t.Fatal(err)
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Prepare(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Issue(t.Context(), p, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if id, err := pki.ID(c.Leaf); err != nil || id != "spiffe://default.east.mesh.local/workload/web" {
		t.Errorf("id = %q, %v", id, err)
	}
}

// TestID is HRD-21: a corpus of certificates whose names try to be more than
// one identity.
func TestID(t *testing.T) {
	uri := func(s string) asn1.RawValue { return asn1.RawValue{Class: 2, Tag: 6, Bytes: []byte(s)} }
	other := asn1.RawValue{Class: 2, Tag: 0, IsCompound: true, Bytes: []byte{0x06, 0x01, 0x2a, 0xa0, 0x03, 0x0c, 0x01, 'a'}}
	cases := map[string]struct {
		names       []asn1.RawValue
		id, classic string
	}{
		"one":               {[]asn1.RawValue{uri("spiffe://default/web")}, "spiffe://default/web", "[web]"},
		"two SPIFFE ids":    {[]asn1.RawValue{uri("spiffe://default/web"), uri("spiffe://default/api")}, "", "[api web]"},
		"classic":           {[]asn1.RawValue{uri("spiffe://default/web"), uri("kuma://a/b")}, "", "[web]"},
		"two meshes":        {[]asn1.RawValue{uri("spiffe://default/web"), uri("spiffe://other/web")}, "", ""},
		"only kuma":         {[]asn1.RawValue{uri("kuma://a/b")}, "", ""},
		"DNS name":          {[]asn1.RawValue{uri("spiffe://default/web"), {Class: 2, Tag: 2, Bytes: []byte("a")}}, "", ""},
		"other name":        {[]asn1.RawValue{uri("spiffe://default/web"), other}, "", ""},
		"no path":           {[]asn1.RawValue{uri("spiffe://default")}, "", ""},
		"deep path":         {[]asn1.RawValue{uri("spiffe://default/ns/a")}, "spiffe://default/ns/a", ""},
		"https":             {[]asn1.RawValue{uri("https://default/web")}, "", ""},
		"query":             {[]asn1.RawValue{uri("spiffe://default/web?a=b")}, "", ""},
		"fragment":          {[]asn1.RawValue{uri("spiffe://default/web#a")}, "", ""},
		"user":              {[]asn1.RawValue{uri("spiffe://u@default/web")}, "", ""},
		"port":              {[]asn1.RawValue{uri("spiffe://default:1/web")}, "", ""},
		"upper-case mesh":   {[]asn1.RawValue{uri("spiffe://DEFAULT/web")}, "", ""},
		"dots":              {[]asn1.RawValue{uri("spiffe://default/a/../web")}, "", ""},
		"escaped slash":     {[]asn1.RawValue{uri("spiffe://default/a%2fweb")}, "", ""},
		"comma in the path": {[]asn1.RawValue{uri("spiffe://default/web,spiffe://default/api")}, "", ""},
		"none":              {nil, "", ""},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
			if c.names != nil {
				san, err := asn1.Marshal(c.names)
				if err != nil {
					t.Fatal(err)
				}
				template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}
			}
			der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
			if err != nil {
				t.Fatal(err)
			}
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				if c.id+c.classic != "" {
					t.Fatal(err)
				}
				return // refused even earlier
			}
			if id, err := pki.ID(cert); id != c.id || (err == nil) != (c.id != "") {
				t.Errorf("ID = %q, %v, want %q", id, err, c.id)
			}
			services, err := pki.Classic(cert, "default")
			if got := fmt.Sprint(services); (err == nil) != (c.classic != "") || err == nil && got != c.classic {
				t.Errorf("Classic = %s, %v, want %s", got, err, c.classic)
			}
		})
	}
}

func TestRenewAt(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for jitter, want := range map[float64]time.Duration{0: 20 * time.Hour, 0.5: 18*time.Hour + 30*time.Minute, 1: 17 * time.Hour, 7: 17 * time.Hour, -1: 20 * time.Hour} {
		if got := pki.RenewAt(start, start.Add(30*time.Hour), jitter).Sub(start); got != want {
			t.Errorf("jitter %v: after %v, want %v", jitter, got, want)
		}
	}
}

func TestKeyIsSilent(t *testing.T) {
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.Signer().(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	number := new(big.Int).SetBytes(raw).String()
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("key", "key", key)
	j, err := json.Marshal(map[string]any{"k": key})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprintf("%v %+v %#v %s %v", key, key, key, key, struct{ k pki.Key }{key}), log.String(), string(j)} {
		if strings.Contains(s, number) || strings.Contains(s, hex.EncodeToString(raw)) || !strings.Contains(s, "*****") {
			t.Errorf("the key is shown: %.80s", s)
		}
	}
}

// FuzzNewAuthority is HRD-09: no PEM crashes the decoder of authorities.
func FuzzNewAuthority(f *testing.F) {
	cert, key, err := pki.NewRoot("default", 0, pki.Year)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert, key)
	f.Add(key, cert)
	f.Add(cert[:len(cert)/2], []byte("-----BEGIN EC PARAMETERS-----\n-----END EC PARAMETERS-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), []byte{})
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		if _, err := pki.NewAuthority(pki.AuthorityConfig{Cert: cert, Key: key}); err != nil && !errs.Is(err, errs.Invalid) {
			t.Error(err)
		}
	})
}
