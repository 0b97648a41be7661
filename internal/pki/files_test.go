package pki_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

// minted is a certificate with its key, and who signed it.
type minted struct {
	cert *x509.Certificate
	key  crypto.Signer
	by   *minted
}

// mint makes a certificate for "cp.test" that is valid for 90 days; change
// alters its template. By is who signs it; nil means itself.
func mint(t testing.TB, by *minted, change func(*x509.Certificate)) *minted {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return mintWith(t, key, by, change)
}

func mintWith(t testing.TB, key crypto.Signer, by *minted, change func(*x509.Certificate)) *minted {
	t.Helper()
	number, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: "test " + number.String()}, DNSNames: []string{"cp.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	if change != nil {
		change(template)
	}
	m := &minted{key: key, by: by}
	issuer, signer := template, key
	if by != nil {
		issuer, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if m.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return m
}

func asCA(c *x509.Certificate) {
	c.IsCA, c.KeyUsage, c.ExtKeyUsage, c.DNSNames, c.IPAddresses = true, x509.KeyUsageCertSign, nil, nil, nil
	c.NotAfter = c.NotBefore.Add(10 * pki.Year)
}

func asClient(c *x509.Certificate) {
	c.ExtKeyUsage, c.DNSNames, c.IPAddresses = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, nil, nil
}

// certPEM is the certificates of several, in this order.
func certPEM(all ...*minted) []byte {
	var out []byte
	for _, m := range all {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.cert.Raw})...)
	}
	return out
}

func (m *minted) keyPEM(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// journal is a log that is kept.
type journal struct {
	mu  sync.Mutex
	all bytes.Buffer
}

// Write is an io.Writer's.
func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.all.Write(p)
}

// lines returns the lines that hold a text.
func (j *journal) lines(text string) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.DeleteFunc(strings.Split(strings.TrimSpace(j.all.String()), "\n"), func(l string) bool { return !strings.Contains(l, text) })
}

func files() (*pki.Files, *journal) {
	j := new(journal)
	return pki.NewFiles(pki.FilesConfig{Log: slog.New(slog.NewTextHandler(j, nil))}), j
}

// place is a directory with a pair of files.
type place struct{ dir, cert, key string }

func newPlace(t testing.TB) place {
	dir := t.TempDir()
	return place{dir, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
}

func write(t testing.TB, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p place) put(t testing.TB, cert, key []byte) {
	t.Helper()
	write(t, p.key, key)
	write(t, p.cert, cert)
}

func shows(t testing.TB, p *pki.Pair, want *minted) {
	t.Helper()
	got, err := p.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	if !got.Leaf.Equal(want.cert) {
		t.Errorf("%s is shown, not %s", got.Leaf.Subject, want.cert.Subject)
	}
}

// badPairs are contents of a pair of files that are refused, with what the
// error says of each.
func badPairs(t *testing.T) map[string]struct{ cert, key, want string } {
	good := mint(t, nil, nil)
	other := mint(t, nil, nil)
	root := mint(t, nil, asCA)
	between := mint(t, root, asCA)
	leaf := mint(t, between, nil)
	strange := mint(t, nil, asCA)
	plainIssuer := mint(t, root, nil) // no CA:TRUE
	byPlain := mint(t, plainIssuer, nil)
	weakKey, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	weak := mintWith(t, weakKey, nil, nil)
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	odd := mintWith(t, p224, nil, nil)
	c, k := string(certPEM(good)), string(good.keyPEM(t))
	cut := c[:len(c)/2]
	day := 24 * time.Hour
	made := func(change func(*x509.Certificate)) (cert, key string) {
		m := mint(t, nil, change)
		return string(certPEM(m)), string(m.keyPEM(t))
	}
	bad := map[string]struct{ cert, key, want string }{}
	put := func(name, cert, key, want string) {
		bad[name] = struct{ cert, key, want string }{cert, key, want}
	}
	put("a key of another certificate", c, string(other.keyPEM(t)), "is not the key of certificate file")
	put("empty certificate", "", k, "it is empty")
	put("empty key", c, "", "it is empty")
	put("no PEM", "this is no certificate", k, "it is not PEM")
	put("DER", string(good.cert.Raw), k, "seems to be DER; convert it with openssl x509")
	put("a key where the certificate should be", k, c, "are the two files swapped?")
	put("a certificate where the key should be", c, c, "are the two files swapped?")
	put("another sort of PEM", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", k, `of type "CERTIFICATE REQUEST"`)
	put("another sort of key", c, "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", `of type "PUBLIC KEY"`)
	put("an encrypted key", c, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", "take the passphrase off with openssl pkey")
	put("rubbish after the certificate", c+"rubbish", k, "after its last PEM block there are 7 bytes of something else")
	put("rubbish after the key", c, k+"rubbish", "after its last PEM block there are 7 bytes of something else")
	put("a certificate that is cut off", cut, k, "damaged or cut off")
	put("a second certificate that is cut off", c+cut, k, "1 of its 2 PEM blocks are damaged or cut off")
	put("a damaged certificate before a whole one", strings.Replace(c, "\nM", "\n*", 1)+c, k, "1 of its 2 PEM blocks are damaged or cut off")
	put("PEM of rubbish", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", k, "PEM block 1 is not a valid certificate")
	put("two keys", c, k+k, "it holds 2 private keys")
	expired, key := made(func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(-2*day), time.Now().Add(-day) })
	put("expired", expired, key, "expired at")
	early, key := made(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(day) })
	put("not valid yet", early, key, "is not valid before")
	unnamed, key := made(func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, nil })
	put("no names", unnamed, key, "names no host")
	clients, key := made(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	put("for clients", clients, key, "lacks serverAuth") // HRD-31
	put("a small key", string(certPEM(weak)), string(weak.keyPEM(t)), "RSA key has 1024 bits")
	put("an odd curve", string(certPEM(odd)), string(odd.keyPEM(t)), "the curve P-224 is not taken")
	put("the chain before the leaf", string(certPEM(between, leaf)), string(leaf.keyPEM(t)), "is the one at place 2; the server's certificate must be the first")
	put("a chain with a gap", string(certPEM(leaf, root)), string(leaf.keyPEM(t)), "was not signed by certificate 2")
	put("a chain with a stranger", string(certPEM(leaf, between, strange)), string(leaf.keyPEM(t)), "certificate 2 ("+between.cert.Subject.String()+") was not signed by certificate 3")
	put("an issuer that is no authority", string(certPEM(byPlain, plainIssuer)), string(byPlain.keyPEM(t)), "was not signed by certificate 2")
	oldRoot := mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = time.Now().Add(-2*day), time.Now().Add(-day)
	})
	under := mint(t, oldRoot, nil)
	put("a chain that has ended", string(certPEM(under, oldRoot)), string(under.keyPEM(t)), "certificate 2 ("+oldRoot.cert.Subject.String()+") expired")
	return bad
}

// TestBadPairAtStart: each is refused, with the setting, the file and what is
// wrong.
func TestBadPairAtStart(t *testing.T) {
	for name, c := range badPairs(t) {
		t.Run(name, func(t *testing.T) {
			at := newPlace(t)
			at.put(t, []byte(c.cert), []byte(c.key))
			watch, _ := files()
			_, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key)
			refused(t, err, "KUMA_DP_SERVER_TLS_CERT_FILE: ", at.dir, c.want)
		})
	}
	t.Run("no file", func(t *testing.T) {
		watch, _ := files()
		_, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", filepath.Join(t.TempDir(), "tls.crt"), "tls.key")
		refused(t, err, "KUMA_DP_SERVER_TLS_CERT_FILE: ", "tls.crt", "no such file or directory; put the file there")
	})
	t.Run("a directory", func(t *testing.T) {
		watch, _ := files()
		dir := t.TempDir()
		write(t, filepath.Join(dir, "tls.crt"), certPEM(mint(t, nil, nil)))
		_, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", dir, dir)
		refused(t, err, "KUMA_DP_SERVER_TLS_CERT_FILE: ", dir, "is a directory")
	})
	t.Run("unreadable", func(t *testing.T) {
		if os.Getuid() == 0 {
			t.Skip("root reads everything")
		}
		at := newPlace(t)
		m := mint(t, nil, nil)
		at.put(t, certPEM(m), m.keyPEM(t))
		if err := os.Chmod(at.key, 0); err != nil {
			t.Fatal(err)
		}
		watch, _ := files()
		_, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key)
		refused(t, err, "KUMA_DP_SERVER_TLS_CERT_FILE: ", at.key, "make it readable")
	})
	t.Run("huge", func(t *testing.T) {
		at := newPlace(t)
		at.put(t, make([]byte, 5<<20), nil)
		watch, _ := files()
		_, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key)
		refused(t, err, at.cert, "the limit is")
	})
}

func refused(t *testing.T, err error, wants ...string) {
	t.Helper()
	if !errs.Is(err, errs.Invalid) {
		t.Fatalf("error %v, want one of kind Invalid", err)
	}
	for _, want := range wants {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
}

// TestBadPairAtReload: what was there before goes on; the reason is logged once
// and counted once, after a writer has had time; what is good again is taken.
func TestBadPairAtReload(t *testing.T) {
	good := mint(t, nil, nil)
	for name, c := range badPairs(t) {
		t.Run(name, func(t *testing.T) {
			at := newPlace(t)
			at.put(t, certPEM(good), good.keyPEM(t))
			watch, log := files()
			p, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key)
			if err != nil {
				t.Fatal(err)
			}
			at.put(t, []byte(c.cert), []byte(c.key))
			watch.Look()
			watch.Look()
			if said := log.lines("refused"); len(said) > 0 {
				t.Errorf("a writer who may not be done is told of: %q", said)
			}
			for range 10 {
				watch.Look()
			}
			shows(t, p, good)
			said := log.lines("level=ERROR")
			if len(said) != 1 || !strings.Contains(strings.ReplaceAll(said[0], `\"`, `"`), c.want) || !strings.Contains(said[0], "KUMA_DP_SERVER_TLS_CERT_FILE") || !strings.Contains(said[0], at.dir) {
				t.Errorf("the log says %q, want one line with %q", said, c.want)
			}
			if watch.Refused() != 1 || watch.Taken() != 0 {
				t.Errorf("refused %d, taken %d", watch.Refused(), watch.Taken())
			}
			next := mint(t, nil, nil)
			at.put(t, certPEM(next), next.keyPEM(t))
			watch.Look()
			shows(t, p, next)
		})
	}
	t.Run("removed, and put back", func(t *testing.T) {
		at := newPlace(t)
		at.put(t, certPEM(good), good.keyPEM(t))
		watch, log := files()
		p, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(at.key); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			watch.Look()
		}
		shows(t, p, good)
		if said := log.lines("level=ERROR"); len(said) != 1 || !strings.Contains(said[0], "no such file") {
			t.Errorf("the log says %q", said)
		}
		write(t, at.key, good.keyPEM(t))
		watch.Look()
		write(t, at.key, nil)
		for range 10 {
			watch.Look()
		}
		if watch.Refused() != 2 {
			t.Errorf("%d refused, want 2: a fault after a recovery is told again", watch.Refused())
		}
	})
}

// TestHosts: a certificate that lacks a name that clients use is refused at the
// start, and what comes later too.
func TestHosts(t *testing.T) {
	at := newPlace(t)
	named := func(names ...string) *minted {
		return mint(t, nil, func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = names, []net.IP{net.IPv4(192, 0, 2, 7)} })
	}
	put := func(m *minted) *minted {
		at.put(t, certPEM(m), m.keyPEM(t))
		return m
	}
	watch, log := files()
	hosts := []pki.Host{{Name: "cp.example.com", Setting: "KUMA_THE_NAME"}, {Name: "192.0.2.7", Setting: "KUMA_THE_ADDRESS"}}
	open := func() (*pki.Pair, error) {
		return watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key, hosts...)
	}
	put(named("other.example.com"))
	_, err := open()
	refused(t, err, "KUMA_DP_SERVER_TLS_CERT_FILE: ", at.cert, "KUMA_THE_NAME", `"cp.example.com"`, `["other.example.com" "192.0.2.7"]`)
	first := put(named("CP.example.com"))
	p, err := open()
	if err != nil {
		t.Fatal(err)
	}
	put(named("other.example.com"))
	for range 10 {
		watch.Look()
	}
	shows(t, p, first)
	put(mint(t, nil, func(c *x509.Certificate) { c.DNSNames = []string{"cp.example.com"} }))
	for range 10 {
		watch.Look()
	}
	shows(t, p, first)
	if said := log.lines("level=ERROR"); len(said) != 2 || !strings.Contains(said[0], "KUMA_THE_NAME") || !strings.Contains(said[1], "KUMA_THE_ADDRESS") {
		t.Errorf("the log says %q", said)
	}
	next := put(named("other.example.com", "*.example.com"))
	watch.Look()
	shows(t, p, next)
}

// TestReloadBetweenTheTwoFiles: a writer who replaces one file and then the
// other is not told of.
func TestReloadBetweenTheTwoFiles(t *testing.T) {
	old, next := mint(t, nil, nil), mint(t, nil, nil)
	for name, order := range map[string]func(place){
		"certificate first": func(at place) { write(t, at.cert, certPEM(next)) },
		"key first":         func(at place) { write(t, at.key, next.keyPEM(t)) },
	} {
		t.Run(name, func(t *testing.T) {
			at := newPlace(t)
			at.put(t, certPEM(old), old.keyPEM(t))
			watch, log := files()
			p, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.key)
			if err != nil {
				t.Fatal(err)
			}
			order(at)
			watch.Look()
			watch.Look()
			shows(t, p, old)
			at.put(t, certPEM(next), next.keyPEM(t))
			watch.Look()
			shows(t, p, next)
			if said := log.lines("refused"); len(said) > 0 || watch.Refused() > 0 {
				t.Errorf("the log says %q", said)
			}
		})
	}
}

// TestSymlinkSwap: what Kubernetes does to replace the files of a volume.
func TestSymlinkSwap(t *testing.T) {
	dir := t.TempDir()
	swap := func(name string, m *minted) {
		real := filepath.Join(dir, name)
		if err := os.Mkdir(real, 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(real, "tls.crt"), certPEM(m))
		write(t, filepath.Join(real, "tls.key"), m.keyPEM(t))
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	first := mint(t, nil, nil)
	swap("..1", first)
	for _, file := range []string{"tls.crt", "tls.key"} {
		if err := os.Symlink(filepath.Join("..data", file), filepath.Join(dir, file)); err != nil {
			t.Fatal(err)
		}
	}
	watch, log := files()
	p, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	shows(t, p, first)
	for i := range 3 {
		next := mint(t, nil, func(c *x509.Certificate) { c.DNSNames = []string{fmt.Sprintf("cp%d.test", i)} })
		swap(fmt.Sprintf("..n%d", i), next)
		watch.Look()
		shows(t, p, next)
		if want := []string{fmt.Sprintf("cp%d.test", i), "127.0.0.1"}; !slices.Equal(p.SANs(), want) {
			t.Errorf("SANs %q, want %q", p.SANs(), want)
		}
		if !bytes.Equal(p.CA(), certPEM(next)) {
			t.Error("CA is of another certificate than is shown")
		}
		if e := watch.Expiries(); len(e) != 1 || e[0].Name != "general" || !e[0].NotAfter.Equal(next.cert.NotAfter) {
			t.Errorf("expiries %v", e)
		}
	}
	if said := log.lines("took over"); len(said) != 3 {
		t.Errorf("the log says %q", said)
	}
}

// TestGoodPairs are taken although they are not what everybody has.
func TestGoodPairs(t *testing.T) {
	root := mint(t, nil, asCA)
	between := mint(t, root, asCA)
	leaf := mint(t, between, nil)
	noUsage := mint(t, nil, func(c *x509.Certificate) { c.ExtKeyUsage = nil })
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	original := mintWith(t, rsaKey, nil, func(c *x509.Certificate) {
		c.Subject, c.IsCA = pkix.Name{}, true
		c.KeyUsage |= x509.KeyUsageCertSign | x509.KeyUsageKeyEncipherment
	})
	ecKey, err := x509.MarshalECPrivateKey(leaf.key.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	withParameters := "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: ecKey}))
	for name, c := range map[string]struct {
		m         *minted
		cert, key string
	}{
		"a chain without its root":   {leaf, string(certPEM(leaf, between)), string(leaf.keyPEM(t))},
		"a chain with its root":      {leaf, string(certPEM(leaf, between, root)), string(leaf.keyPEM(t))},
		"a leaf alone":               {leaf, string(certPEM(leaf)), string(leaf.keyPEM(t))},
		"openssl's EC key":           {leaf, string(certPEM(leaf)), withParameters},
		"words before the blocks":    {leaf, "subject=cp\n" + string(certPEM(leaf)) + "issuer=ca\n" + string(certPEM(between)), "Key Attributes\n" + string(leaf.keyPEM(t))},
		"no extended usage":          {noUsage, string(certPEM(noUsage)), string(noUsage.keyPEM(t))},
		"a pair of the original":     {original, string(certPEM(original)), string(original.keyPEM(t))},
		"line ends of another world": {leaf, strings.ReplaceAll(string(certPEM(leaf)), "\n", "\r\n"), strings.ReplaceAll(string(leaf.keyPEM(t)), "\n", "\r\n")},
	} {
		t.Run(name, func(t *testing.T) {
			at := newPlace(t)
			at.put(t, []byte(c.cert), []byte(c.key))
			watch, _ := files()
			p, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.key)
			if err != nil {
				t.Fatal(err)
			}
			shows(t, p, c.m)
		})
	}
	t.Run("both in one file", func(t *testing.T) {
		at := newPlace(t)
		write(t, at.cert, append(certPEM(leaf), leaf.keyPEM(t)...))
		watch, _ := files()
		p, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.cert)
		if err != nil {
			t.Fatal(err)
		}
		shows(t, p, leaf)
		if bytes.Contains(p.CA(), []byte("PRIVATE KEY")) {
			t.Error("the key is given out with the certificate")
		}
	})
}

// TestReadableKey: a key that every user can read is a warning, at the start and
// when it comes later.
func TestReadableKey(t *testing.T) {
	at := newPlace(t)
	m := mint(t, nil, nil)
	at.put(t, certPEM(m), m.keyPEM(t))
	if err := os.Chmod(at.key, 0o644); err != nil {
		t.Fatal(err)
	}
	watch, log := files()
	if _, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.key); err != nil {
		t.Fatal(err)
	}
	if said := log.lines("level=WARN"); len(said) != 1 || !strings.Contains(said[0], at.key) || !strings.Contains(said[0], "every user of this machine") {
		t.Errorf("the log says %q", said)
	}
	next := mint(t, nil, nil)
	at.put(t, certPEM(next), next.keyPEM(t))
	watch.Look()
	if said := log.lines("level=WARN"); len(said) != 2 {
		t.Errorf("the log says %q", said)
	}
	// The same key, with another mode.
	for i, mode := range []os.FileMode{0o600, 0o644, 0o640, 0o604} {
		if err := os.Chmod(at.key, mode); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			watch.Look()
		}
		if said := log.lines("level=WARN"); len(said) != 2+(i+1)/2 || watch.Taken() != 1 {
			t.Errorf("mode %v: the log says %q, %d taken", mode, said, watch.Taken())
		}
	}
}

// HRD-33: the operator is told well before a certificate ends, once, and once
// more near its end; what has ended is not shown, and a new file helps at once,
// not only at the next look.
func TestPairAges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		at := newPlace(t)
		m := mint(t, nil, nil)
		at.put(t, certPEM(m), m.keyPEM(t))
		watch, log := files()
		p, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.key)
		if err != nil {
			t.Fatal(err)
		}
		for range 59 {
			time.Sleep(24 * time.Hour)
			watch.Look()
		}
		if said := log.lines("level="); len(said) > 0 {
			t.Errorf("before it is time the log says %q", said)
		}
		for range 15 {
			time.Sleep(24 * time.Hour)
			watch.Look()
		}
		if said := log.lines("two thirds"); len(said) != 1 || len(log.lines("level=")) != 1 {
			t.Errorf("at two thirds the log says %q", log.lines("level="))
		}
		for range 15 {
			time.Sleep(24 * time.Hour)
			watch.Look()
		}
		if said := log.lines("ends soon"); len(said) != 1 || len(log.lines("level=")) != 2 {
			t.Errorf("near the end the log says %q", log.lines("level="))
		}
		time.Sleep(10 * 24 * time.Hour)
		if c, err := p.Certificate(); err == nil || !strings.Contains(err.Error(), at.cert) {
			t.Errorf("what has ended is shown: %v %v", c, err)
		}
		for range 3 {
			watch.Look()
		}
		if said := log.lines("has ended"); len(said) != 1 || len(log.lines("level=")) != 3 {
			t.Errorf("after the end the log says %q", log.lines("level="))
		}
		next := mint(t, nil, nil)
		at.put(t, certPEM(next), next.keyPEM(t))
		shows(t, p, next)
	})
}

// badPools are contents of a file of authorities that are refused.
func badPools(t *testing.T) map[string]struct{ text, want string } {
	ca := string(certPEM(mint(t, nil, asCA)))
	plain := mint(t, nil, func(c *x509.Certificate) { asCA(c); c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })
	server := mint(t, nil, nil)
	ended := mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
	})
	return map[string]struct{ text, want string }{
		"empty":                      {"", "it is empty"},
		"no PEM":                     {"x", "it is not PEM"},
		"a key":                      {string(server.keyPEM(t)), "is a private key"},
		"rubbish after":              {ca + "x", "after its last PEM block"},
		"cut off":                    {ca[:len(ca)-20], "damaged or cut off"},
		"no CA:TRUE":                 {ca + string(certPEM(plain)), "certificate 2 (" + plain.cert.Subject.String() + ") is neither an authority nor a client's certificate"},
		"a server's certificate":     {string(certPEM(server)), "is neither an authority nor a client's certificate"}, // HRD-31
		"every certificate is ended": {string(certPEM(ended)), "every certificate"},
	}
}

func TestBadPool(t *testing.T) {
	good := mint(t, nil, asCA)
	for name, c := range badPools(t) {
		for _, dir := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, directory %v", name, dir), func(t *testing.T) {
				at := t.TempDir()
				file := filepath.Join(at, "ca.pem")
				path := file
				if dir {
					path = at
				}
				write(t, file, []byte(c.text))
				watch, log := files()
				_, err := watch.Clients("api-server-client-ca", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE", path)
				refused(t, err, "KUMA_API_SERVER_HTTPS_TLS_CA_FILE: ", at, c.want)

				write(t, file, certPEM(good))
				p, err := watch.Clients("api-server-client-ca", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE", path)
				if err != nil {
					t.Fatal(err)
				}
				version := p.Version()
				write(t, file, []byte(c.text))
				for range 10 {
					watch.Look()
				}
				if got := p.Certificates(); len(got) != 1 || !got[0].Equal(good.cert) || p.Version() != version {
					t.Errorf("%d certificates are trusted, version %d", len(got), p.Version())
				}
				if said := log.lines("level=ERROR"); len(said) != 1 || !strings.Contains(said[0], at) {
					t.Errorf("the log says %q", said)
				}
			})
		}
	}
}

// TestPoolDirectory: files come and go; other files don't count; who is taken
// out is not trusted any more.
func TestPoolDirectory(t *testing.T) {
	dir := t.TempDir()
	watch, log := files()
	p, err := watch.Clients("api-server-client-ca", "KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR", dir)
	if err != nil {
		t.Fatal(err)
	}
	if said := log.lines("no client certificate is taken"); len(said) != 1 || len(p.Certificates()) != 0 {
		t.Errorf("an empty directory: %q", said)
	}
	write(t, filepath.Join(dir, "a.pem"), certPEM(mint(t, nil, asCA)))
	write(t, filepath.Join(dir, "b.crt"), certPEM(mint(t, nil, asCA), mint(t, nil, asClient)))
	write(t, filepath.Join(dir, "README"), []byte("not a certificate"))
	if err := os.Mkdir(filepath.Join(dir, "c.pem"), 0o700); err != nil {
		t.Fatal(err)
	}
	watch.Look()
	if n := len(p.Certificates()); n != 3 {
		t.Errorf("%d certificates are trusted, want 3", n)
	}
	if err := os.Remove(filepath.Join(dir, "b.crt")); err != nil {
		t.Fatal(err)
	}
	watch.Look()
	if n := len(p.Certificates()); n != 1 {
		t.Errorf("%d certificates are trusted, want 1", n)
	}
	// One that has ended is left out; the others stay.
	write(t, filepath.Join(dir, "old.pem"), certPEM(mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
	})))
	watch.Look()
	if n := len(p.Certificates()); n != 1 || len(log.lines("clients that rest on it are refused")) != 1 {
		t.Errorf("%d certificates are trusted, want 1: %q", n, log.lines("level="))
	}
}

// TestManyReloads: handshakes go on while the pair is replaced, and each sees a
// whole pair.
func TestManyReloads(t *testing.T) {
	at := newPlace(t)
	root := mint(t, nil, asCA)
	put := func() *minted {
		m := mint(t, root, nil)
		at.put(t, certPEM(m), m.keyPEM(t))
		return m
	}
	put()
	watch, _ := files()
	p, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", at.cert, at.key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root.cert)
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				a, b := net.Pipe()
				server := tls.Server(a, p.TLS())
				done := make(chan error, 1)
				go func() { done <- server.Handshake() }()
				if err := tls.Client(b, &tls.Config{RootCAs: pool, ServerName: "cp.test"}).Handshake(); err != nil {
					t.Error(err)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
				_, _ = a.Close(), b.Close()
			}
		})
	}
	for range 50 {
		m := put()
		watch.Look()
		shows(t, p, m)
	}
	close(stop)
	clients.Wait()
}
