package pki_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

// What verifies a server is read strictly, handed on cleaned, and replaced only
// by what is good.
func TestAnchors(t *testing.T) {
	t.Parallel()
	one, two := mint(t, nil, asCA), mint(t, nil, asCA)
	self := mint(t, nil, nil)
	old := mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	text := func(all ...*minted) []byte {
		var out []byte
		for _, m := range all {
			out = append(out, pki.EncodeCertificate(m.cert)...)
		}
		return out
	}
	file := filepath.Join(t.TempDir(), "ca.crt")
	put := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})
	bad := map[string]struct {
		text []byte
		want string
	}{
		"empty":                   {nil, "it is empty"},
		"rubbish":                 {[]byte("rubbish"), "it is not PEM"},
		"rubbish after a good CA": {append(text(one), "rubbish"...), "remove them"},
		"a broken block":          {append(text(one), text(two)[:200]...), "damaged or cut off"},
		"a block of rubbish":      {append(text(one), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})...), "PEM block 2 is not a valid certificate"},
		"a key":                   {append(text(one), key...), "private key"},
		"ended":                   {text(old), "every certificate in it has ended"},
		"too large":               {append(bytes.Repeat([]byte("# words\n"), 1<<17), text(one)...), "the limit is 1048576"},
	}
	for name, c := range bad {
		put(c.text)
		_, err := pki.NewFiles(pki.FilesConfig{Log: slog.New(slog.DiscardHandler)}).Anchors("ca", "--ca", file)
		if !errs.Is(err, errs.Invalid) || !strings.HasPrefix(err.Error(), "--ca: certificate file "+file+": ") || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "give the certificates of the authorities") {
			t.Errorf("%s: %v", name, err)
		}
		if _, _, err := pki.ServerAnchors(c.text, time.Now()); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s, as text: %v", name, err)
		}
	}

	var log bytes.Buffer
	files := pki.NewFiles(pki.FilesConfig{Log: slog.New(slog.NewTextHandler(&log, nil))})
	put(append([]byte("# words\n"), text(one, old)...))
	a, err := files.Anchors("ca", "--ca", file)
	if err != nil {
		t.Fatal(err)
	}
	first := a.Version()
	if !bytes.Equal(a.PEM(), text(one)) || strings.Count(log.String(), "ended at") != 1 {
		t.Errorf("%s\n%s", a.PEM(), &log)
	}
	for name, c := range bad {
		log.Reset()
		put(c.text)
		for range 10 {
			files.Look()
		}
		if lines := strings.Count(log.String(), "level=ERROR"); lines != 1 || !strings.Contains(log.String(), "what was there before goes on") || !bytes.Equal(a.PEM(), text(one)) || a.Version() != first {
			t.Errorf("%s: %d lines: %s", name, lines, &log)
		}
	}
	// Several that have ended are one warning, with the one that ended last.
	older := mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = time.Now().Add(-3*time.Hour), time.Now().Add(-2*time.Hour)
	})
	log.Reset()
	put(text(older, one, old))
	files.Look()
	if said := log.String(); strings.Count(said, "level=WARN") != 1 || !strings.Contains(said, "2 of its 3 certificates have ended, the last of them ("+old.cert.Subject.String()+") at ") {
		t.Errorf("the log says %s", said)
	}
	// A server's own certificate is trusted by itself.
	put(text(one, two, self))
	files.Look()
	if !bytes.Equal(a.PEM(), text(one, two, self)) || a.Version() == first {
		t.Errorf("not taken over: %s", &log)
	}
	if all := files.Expiries(); len(all) != 3 || all[0].File != file {
		t.Errorf("%v", all)
	}
	if _, err := files.Anchors("ca", "--ca", filepath.Dir(file)); err == nil || !strings.Contains(err.Error(), "name the file itself") {
		t.Errorf("a directory: %v", err)
	}
}

// TestBundle: a bundle of many, such as a system's, is nobody's to keep in order:
// nothing is said of those in it that have ended, and nothing of its age.
func TestBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var bundle []byte
		ended := mint(t, nil, func(c *x509.Certificate) {
			asCA(c)
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		})
		var one []byte
		for range 17 {
			one = certPEM(mint(t, nil, asCA))
			bundle = append(bundle, one...)
		}
		few, many := filepath.Join(t.TempDir(), "few.pem"), filepath.Join(t.TempDir(), "many.pem")
		write(t, few, bundle[:len(bundle)-len(one)])
		write(t, many, append(bundle, certPEM(ended)...))
		watch, log := files()
		for _, file := range []string{few, many} {
			if _, err := watch.Anchors("ca", "--ca", file); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(8 * pki.Year)
		watch.Look()
		if said := log.lines("level="); len(said) != 1 || !strings.Contains(said[0], few) {
			t.Errorf("the log says %q", said)
		}
		write(t, many, append(bytes.Clone(bundle), append(certPEM(ended), '\n')...))
		watch.Look()
		if said := log.lines("took over"); len(said) != 1 || strings.Contains(said[0], "until") {
			t.Errorf("the log says %q", said)
		}
	})
}
