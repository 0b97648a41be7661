package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

func open(t *testing.T, c pki.ControlPlaneConfig) *pki.ControlPlane {
	t.Helper()
	cp, err := pki.OpenControlPlane(c)
	if err != nil {
		t.Fatal(err)
	}
	return cp
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func cert(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatal("not PEM")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func save(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFirstStart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", ".kuma")
	cp := open(t, pki.ControlPlaneConfig{Dir: dir, Hostnames: []string{"cp.example", "192.0.2.7"}})
	if !cp.Made() || len(cp.Warnings()) > 0 {
		t.Errorf("made = %t, warnings = %v", cp.Made(), cp.Warnings())
	}
	for _, want := range []string{"localhost", "cp.example", "192.0.2.7", "127.0.0.1", "::1"} {
		if !slices.Contains(cp.SANs(), want) {
			t.Errorf("%s is not among %v", want, cp.SANs())
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s has the mode %v, %v", e.Name(), info.Mode(), err)
		}
	}
	if !slices.Equal(names, []string{"kuma-cp-server.crt", "kuma-cp-server.key", "kuma-cp.crt", "kuma-cp.key"}) {
		t.Errorf("files = %v", names)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory mode = %v, %v", info.Mode(), err)
	}
	ca := cert(t, read(t, filepath.Join(dir, pki.CAFile)))
	if !ca.IsCA || ca.MaxPathLen != -1 || ca.Subject.CommonName == "" || ca.NotAfter.Sub(ca.NotBefore) < 10*pki.Year {
		t.Errorf("CA: %v, path length %d, subject %q", ca.IsCA, ca.MaxPathLen, ca.Subject)
	}
	leaf := cert(t, read(t, filepath.Join(dir, pki.ServerFile)))
	if leaf.IsCA || leaf.Subject.CommonName == "" || time.Until(leaf.NotAfter) > 90*24*time.Hour {
		t.Errorf("leaf: CA %t, subject %q, ends %v", leaf.IsCA, leaf.Subject, leaf.NotAfter)
	}

	again := open(t, pki.ControlPlaneConfig{Dir: dir, Hostnames: []string{"cp.example", "192.0.2.7"}})
	if again.Made() || !again.Expires().Equal(cp.Expires()) || string(again.CA()) != string(cp.CA()) {
		t.Error("the second start made new certificates")
	}
	serve(t, cp, "localhost")
}

// serve asks a server with these certificates for something, over verified
// TLS, with Go and with curl and openssl where they are.
func serve(t *testing.T, cp *pki.ControlPlane, host string) {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
	s.TLS = cp.TLS()
	s.StartTLS()
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cp.CA())
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", "127.0.0.1:"+port, &tls.Config{RootCAs: roots, ServerName: host})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	save(t, ca, cp.CA())
	if curl, err := exec.LookPath("curl"); err == nil {
		out, err := exec.Command(curl, "-sS", "--noproxy", "*", "--cacert", ca, "--resolve", host+":"+port+":127.0.0.1", "https://"+host+":"+port+"/").CombinedOutput()
		if err != nil || string(out) != "hello" {
			t.Errorf("curl: %v: %s", err, out)
		}
	}
}

func TestServerCertificateIsRenewed(t *testing.T) {
	cases := map[string]struct {
		change func(t *testing.T, dir string)
		hosts  []string
		after  time.Duration
		renew  bool
	}{
		"nothing changed":       {},
		"before two thirds":     {after: 59 * 24 * time.Hour},
		"two thirds gone":       {after: 61 * 24 * time.Hour, renew: true},
		"expired":               {after: 100 * 24 * time.Hour, renew: true},
		"names changed":         {hosts: []string{"new.example"}, renew: true},
		"certificate missing":   {change: func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, pki.ServerFile)) }, renew: true},
		"key missing":           {change: func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, pki.ServerKeyFile)) }, renew: true},
		"certificate garbled":   {change: func(t *testing.T, dir string) { save(t, filepath.Join(dir, pki.ServerFile), []byte("x")) }, renew: true},
		"killed between halves": {change: func(t *testing.T, dir string) { save(t, filepath.Join(dir, pki.ServerKeyFile), newKeyPEM(t)) }, renew: true},
		"authority replaced": {change: func(t *testing.T, dir string) {
			other := t.TempDir()
			open(t, pki.ControlPlaneConfig{Dir: other})
			for _, f := range []string{pki.CAFile, pki.CAKeyFile} {
				save(t, filepath.Join(dir, f), []byte(read(t, filepath.Join(other, f))))
			}
		}, renew: true},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				open(t, pki.ControlPlaneConfig{Dir: dir})
				before := read(t, filepath.Join(dir, pki.ServerFile))
				if c.change != nil {
					c.change(t, dir)
				}
				time.Sleep(c.after)
				cp := open(t, pki.ControlPlaneConfig{Dir: dir, Hostnames: c.hosts})
				if got := read(t, filepath.Join(dir, pki.ServerFile)) != before; got != c.renew {
					t.Errorf("renewed = %t, want %t", got, c.renew)
				}
				roots := x509.NewCertPool()
				roots.AppendCertsFromPEM(cp.CA())
				if _, err := cert(t, read(t, filepath.Join(dir, pki.ServerFile))).Verify(x509.VerifyOptions{Roots: roots, DNSName: "localhost"}); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func newKeyPEM(t *testing.T) []byte {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	text, err := key.PEM()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestRunRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir(), Every: time.Hour})
		first := cp.Expires()
		go cp.Run(t.Context(), func(err error) { t.Error(err) })
		for range 365 {
			time.Sleep(24 * time.Hour)
			if left := time.Until(cp.Expires()); left < 29*24*time.Hour {
				t.Fatalf("only %v of the certificate are left", left)
			}
		}
		if !cp.Expires().After(first.Add(300 * 24 * time.Hour)) {
			t.Error("nothing was renewed")
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	mine := t.TempDir()
	open(t, pki.ControlPlaneConfig{Dir: mine})
	at := func(name string) string { return filepath.Join(mine, name) }
	shortCert, shortKey, err := pki.NewRoot("m", 0, time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	expired, expiredKey := filepath.Join(dir, "e.crt"), filepath.Join(dir, "e.key")
	save(t, expired, shortCert)
	save(t, expiredKey, shortKey)
	file := filepath.Join(dir, "file")
	save(t, file, []byte("x"))
	broken := func(change func(dir string)) string {
		d := t.TempDir()
		open(t, pki.ControlPlaneConfig{Dir: d})
		change(d)
		return d
	}
	cases := map[string]struct {
		c    pki.ControlPlaneConfig
		want string
	}{
		"half an override": {pki.ControlPlaneConfig{CertFile: "a"}, "set both KUMA_GENERAL_TLS_CERT_FILE and KUMA_GENERAL_TLS_KEY_FILE"},
		"missing file":     {pki.ControlPlaneConfig{CertFile: "/nope/a", KeyFile: "/nope/b"}, "/nope/a"},
		"not PEM":          {pki.ControlPlaneConfig{CertFile: file, KeyFile: file}, "it is not PEM"},
		"a directory":      {pki.ControlPlaneConfig{CertFile: dir, KeyFile: file}, "is a directory"},
		"swapped":          {pki.ControlPlaneConfig{CertFile: at(pki.ServerKeyFile), KeyFile: at(pki.ServerFile)}, "are the two files swapped?"},
		"other key":        {pki.ControlPlaneConfig{CertFile: at(pki.ServerFile), KeyFile: at(pki.CAKeyFile)}, "is not the key of certificate file"},
		"expired":          {pki.ControlPlaneConfig{CertFile: expired, KeyFile: expiredKey}, "expired at"},
		"no CA key":        {pki.ControlPlaneConfig{Dir: broken(func(d string) { os.Remove(filepath.Join(d, pki.CAKeyFile)) })}, "is missing; bring the key back"},
		"CA garbled":       {pki.ControlPlaneConfig{Dir: broken(func(d string) { save(t, filepath.Join(d, pki.CAFile), []byte("x")) })}, "remove both kuma-cp.crt and kuma-cp.key"},
		"work dir a file":  {pki.ControlPlaneConfig{Dir: file}, "set KUMA_GENERAL_WORK_DIR"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := pki.OpenControlPlane(c.c); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want one with %q", err, c.want)
			}
		})
	}
}

// TestCheckAuthority: it says beforehand what OpenControlPlane will say, and
// leaves everything as it is.
func TestCheckAuthority(t *testing.T) {
	for name, c := range map[string]struct {
		change func(dir string) error
		bad    bool
	}{
		"as it is":        {func(string) error { return nil }, false},
		"nothing":         {os.RemoveAll, false},
		"the key is gone": {func(d string) error { return os.Remove(filepath.Join(d, pki.CAKeyFile)) }, false}, // the store may have it
		"garbled":         {func(d string) error { return os.WriteFile(filepath.Join(d, pki.CAFile), []byte("x"), 0o600) }, true},
		"another key":     {func(d string) error { return os.WriteFile(filepath.Join(d, pki.CAKeyFile), newKeyPEM(t), 0o600) }, false}, // likewise
		"a rotation":      {func(d string) error { return os.WriteFile(filepath.Join(d, pki.RotationFile), []byte("x"), 0o600) }, true},
		"left by a rotation": {func(d string) error {
			return errors.Join(os.Remove(filepath.Join(d, pki.CAFile)), os.Remove(filepath.Join(d, pki.CAKeyFile)), os.WriteFile(filepath.Join(d, pki.RotationFile), []byte("x"), 0o600))
		}, false},
	} {
		dir := t.TempDir()
		open(t, pki.ControlPlaneConfig{Dir: dir})
		if err := c.change(dir); err != nil {
			t.Fatal(name, err)
		}
		before := contents(t, dir)
		err := pki.CheckAuthority(dir)
		if (err != nil) != c.bad {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(before, contents(t, dir)); diff != "" {
			t.Errorf("%s: it has changed something: %s", name, diff)
		}
		if err == nil {
			continue
		}
		if _, opened := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir}); opened == nil || opened.Error() != err.Error() {
			t.Errorf("%s: %v, but then %v", name, err, opened)
		}
	}
}

// contents are the files of a directory; none where there is none.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	all, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range all {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(text)
	}
	return out
}

// TestKilledAtFirstStart: whatever a killed first start leaves is finished by
// the next one.
func TestKilledAtFirstStart(t *testing.T) {
	dir := t.TempDir()
	save(t, filepath.Join(dir, pki.CAKeyFile), newKeyPEM(t))
	save(t, filepath.Join(dir, "kuma-cp.crt.1234.tmp"), []byte("half"))
	cp := open(t, pki.ControlPlaneConfig{Dir: dir})
	if !cp.Made() {
		t.Error("no authority was made")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.tmp")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestStartsAtOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "work")
	cas := make([]string, 8)
	var wg sync.WaitGroup
	for i := range cas {
		wg.Go(func() {
			cp, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir})
			if err != nil {
				t.Error(err)
				return
			}
			cas[i] = string(cp.CA())
		})
	}
	wg.Wait()
	if len(slices.Compact(cas)) != 1 {
		t.Error("processes that start at once have different authorities")
	}
}

// TestOriginalPair: a pair as the original makes it (its own authority, with
// names, RSA) is served as it is.
func TestOriginalPair(t *testing.T) {
	dir := t.TempDir()
	certPEM, keyPEM, err := pki.GenerateTLS("server", []string{"localhost", "127.0.0.1"}, "rsa")
	if err != nil {
		t.Fatal(err)
	}
	save(t, filepath.Join(dir, pki.CAFile), certPEM)
	if err := os.WriteFile(filepath.Join(dir, pki.CAKeyFile), keyPEM, 0o644); err != nil {
		t.Fatal(err)
	}
	cp := open(t, pki.ControlPlaneConfig{Dir: dir, Hostnames: []string{"elsewhere"}})
	if string(cp.CA()) != string(certPEM) || cp.Made() {
		t.Error("the pair was replaced")
	}
	if _, err := os.Stat(filepath.Join(dir, pki.ServerFile)); err == nil {
		t.Error("a server certificate was made beside it")
	}
	warnings := strings.Join(cp.Warnings(), "\n")
	if !strings.Contains(warnings, "elsewhere") || !strings.Contains(warnings, "it is 0600 now") {
		t.Errorf("warnings = %s", warnings)
	}
	serve(t, cp, "localhost")
	// The same pair as an override.
	serve(t, open(t, pki.ControlPlaneConfig{CertFile: filepath.Join(dir, pki.CAFile), KeyFile: filepath.Join(dir, pki.CAKeyFile)}), "localhost")
}

// TestNoResumption is HRD-08: a session is never resumed.
func TestNoResumption(t *testing.T) {
	cp := open(t, pki.ControlPlaneConfig{Dir: t.TempDir()})
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.TLS = cp.TLS()
	s.StartTLS()
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cp.CA())
	client := &tls.Config{RootCAs: roots, ServerName: "localhost", ClientSessionCache: tls.NewLRUClientSessionCache(4)}
	for range 3 {
		conn, err := tls.Dial("tcp", s.Listener.Addr().String(), client)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(conn); err != nil {
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Fatal("a session was resumed")
		}
		conn.Close()
	}
}

func TestGenerateTLS(t *testing.T) {
	openssl, noSSL := exec.LookPath("openssl")
	for _, kind := range []string{"server", "client"} {
		for keyType, header := range map[string]string{"rsa": "RSA PRIVATE KEY", "ecdsa": "EC PRIVATE KEY"} {
			t.Run(kind+" "+keyType, func(t *testing.T) {
				certPEM, keyPEM, err := pki.GenerateTLS(kind, []string{"localhost", "cp.example", "127.0.0.1", "cp.example"}, keyType)
				if err != nil {
					t.Fatal(err)
				}
				if block, _ := pem.Decode(keyPEM); block == nil || block.Type != header {
					t.Errorf("the key is not PEM of type %s", header)
				}
				if _, err := tls.X509KeyPair(certPEM, keyPEM); err != nil {
					t.Error(err)
				}
				c := cert(t, string(certPEM))
				want := map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth}[kind]
				if !c.IsCA || c.Subject.CommonName != "localhost" || !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{want}) || !slices.Equal(c.DNSNames, []string{"localhost", "cp.example"}) || len(c.IPAddresses) != 1 {
					t.Errorf("CA %t, subject %s, usage %v, names %v %v", c.IsCA, c.Subject, c.ExtKeyUsage, c.DNSNames, c.IPAddresses)
				}
				dir := t.TempDir()
				file, keyFile := filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")
				save(t, file, certPEM)
				save(t, keyFile, keyPEM)
				if noSSL == nil {
					if out, err := exec.Command(openssl, "verify", "-x509_strict", "-purpose", "ssl"+kind, "-CAfile", file, file).CombinedOutput(); err != nil {
						t.Errorf("openssl: %v: %s", err, out)
					}
				}
				if kind == "server" {
					serve(t, open(t, pki.ControlPlaneConfig{CertFile: file, KeyFile: keyFile}), "cp.example")
				}
			})
		}
	}
	for name, c := range map[string]struct {
		kind, keyType, want string
		hosts               []string
	}{
		"kind":     {"both", "rsa", `invalid certificate type "both"`, []string{"a"}},
		"key type": {"server", "dsa", `invalid key type "dsa"`, []string{"a"}},
		"no host":  {"server", "rsa", "a certificate needs a host name", nil},
		"star":     {"server", "rsa", "such as cp.example or *.cp.example", []string{"a.*"}},
		"hosts":    {"client", "rsa", "there are 501 host names, the limit is 500", make([]string, 501)},
		"bad host": {"server", "rsa", "is neither a host name nor an IP address", []string{"a b"}},
		"url":      {"server", "rsa", "is neither a host name nor an IP address", []string{"https://a"}},
	} {
		if _, _, err := pki.GenerateTLS(c.kind, c.hosts, c.keyType); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error = %v, want one with %q", name, err, c.want)
		}
	}
}
