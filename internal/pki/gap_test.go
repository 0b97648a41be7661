package pki_test

import (
	"context"
	"crypto/x509"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/pki"
)

// knowing is a watcher whose program knows these authorities.
func knowing(all ...*minted) (*pki.Files, *journal) {
	j := new(journal)
	known := func() (out []*x509.Certificate) {
		for _, m := range all {
			out = append(out, m.cert)
		}
		return out
	}
	return pki.NewFiles(pki.FilesConfig{Known: known, Log: slog.New(slog.NewTextHandler(j, nil))}), j
}

// TestGaps: a chain whose last issuer is neither in its file nor known here.
func TestGaps(t *testing.T) {
	root, strange := mint(t, nil, asCA), mint(t, nil, asCA)
	between := mint(t, root, asCA)
	leaf, direct, itself := mint(t, between, nil), mint(t, root, nil), mint(t, nil, nil)
	namesake := mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.Subject = between.cert.Subject
	})
	plain := mint(t, nil, func(c *x509.Certificate) { c.Subject = between.cert.Subject }) // no CA:TRUE
	old := mint(t, nil, func(c *x509.Certificate) {
		asCA(c)
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	byOld := mint(t, old, nil)
	for name, c := range map[string]struct {
		file   []*minted
		known  []*minted
		lacks  *minted
		atCert *minted
	}{
		"it signed itself": {file: []*minted{itself}},
		"all of it, with a root that nobody here knows":  {file: []*minted{leaf, between, root}},
		"without its root, which is known":               {file: []*minted{leaf, between}, known: []*minted{strange, root}},
		"without its root, which is not known":           {file: []*minted{leaf, between}, known: []*minted{strange}, lacks: root, atCert: between},
		"without its intermediate":                       {file: []*minted{leaf}, known: []*minted{root}, lacks: between, atCert: leaf},
		"without its intermediate, which is known":       {file: []*minted{leaf}, known: []*minted{between}},
		"signed by a known root":                         {file: []*minted{direct}, known: []*minted{root}},
		"signed by an unknown root":                      {file: []*minted{direct}, lacks: root, atCert: direct},
		"another authority with the name of the issuer":  {file: []*minted{leaf}, known: []*minted{namesake}, lacks: between, atCert: leaf},
		"no authority, though it has the issuer's name":  {file: []*minted{leaf}, known: []*minted{plain}, lacks: between, atCert: leaf},
		"what is in the file is known, but no authority": {file: []*minted{direct}, known: []*minted{direct}, lacks: root, atCert: direct},
		"an issuer that is known and has ended":          {file: []*minted{byOld}, known: []*minted{old}},
	} {
		t.Run(name, func(t *testing.T) {
			at := newPlace(t)
			at.put(t, certPEM(c.file...), c.file[0].keyPEM(t))
			watch, _ := knowing(c.known...)
			if _, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key); err != nil {
				t.Fatal(err)
			}
			var want []pki.Gap
			if c.lacks != nil {
				want = []pki.Gap{{Name: "dp-server", File: at.cert, Subject: c.atCert.cert.Subject.String(), Issuer: c.lacks.cert.Subject.String()}}
			}
			if diff := cmp.Diff(want, watch.Gaps()); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("its root is in another watched file", func(t *testing.T) {
		at := newPlace(t)
		at.put(t, certPEM(leaf, between), leaf.keyPEM(t))
		watch, _ := knowing()
		if _, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key); err != nil {
			t.Fatal(err)
		}
		ca := filepath.Join(at.dir, "ca.crt")
		write(t, ca, certPEM(root))
		if _, err := watch.Clients("api-server-client-ca", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE", ca); err != nil {
			t.Fatal(err)
		}
		if got := watch.Gaps(); len(got) != 0 {
			t.Errorf("gaps %v", got)
		}
	})
	t.Run("its root verifies a server that is called", func(t *testing.T) {
		at := newPlace(t)
		at.put(t, certPEM(leaf, between), leaf.keyPEM(t))
		ca := filepath.Join(at.dir, "ca.crt")
		write(t, ca, certPEM(root))
		watch, _ := knowing()
		if _, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key); err != nil {
			t.Fatal(err)
		}
		if _, err := watch.Anchors("store-ca", "CA", ca); err != nil {
			t.Fatal(err)
		}
		if got := watch.Gaps(); len(got) != 0 {
			t.Errorf("gaps %v", got)
		}
	})
	t.Run("a client's pair", func(t *testing.T) { // the server that it calls says what it thinks of it
		at, client := newPlace(t), mint(t, between, asClient)
		at.put(t, certPEM(client), client.keyPEM(t))
		watch, _ := knowing()
		if _, err := watch.ClientPair("store-postgres", "CERT", at.cert, at.key); err != nil {
			t.Fatal(err)
		}
		if got := watch.Gaps(); len(got) != 0 {
			t.Errorf("gaps %v", got)
		}
	})
	t.Run("nobody said what is known", func(t *testing.T) {
		at := newPlace(t)
		at.put(t, certPEM(leaf), leaf.keyPEM(t))
		watch, _ := files()
		if _, err := watch.Pair("metrics", "tls", at.cert, at.key); err != nil {
			t.Fatal(err)
		}
		if got := watch.Gaps(); len(got) != 0 {
			t.Errorf("gaps %v", got)
		}
	})
}

// TestGapsOfThisMachine: an authority that this machine trusts is known. A
// process reads those once, so another one is asked.
func TestGapsOfThisMachine(t *testing.T) {
	if at := os.Getenv("KUMA_TEST_PAIR"); at != "" {
		watch, _ := knowing()
		if _, err := watch.Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", filepath.Join(at, "tls.crt"), filepath.Join(at, "tls.key")); err != nil {
			t.Fatal(err)
		}
		for _, g := range watch.Gaps() {
			t.Errorf("gap %v", g)
		}
		return
	}
	root := mint(t, nil, asCA)
	between := mint(t, root, asCA)
	leaf := mint(t, between, nil)
	at := newPlace(t)
	at.put(t, certPEM(leaf, between), leaf.keyPEM(t))
	machine := filepath.Join(at.dir, "roots.pem")
	for trusted, want := range map[*minted]bool{root: true, mint(t, nil, asCA): false} {
		write(t, machine, certPEM(trusted))
		again := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestGapsOfThisMachine$")
		again.Env = append(os.Environ(), "KUMA_TEST_PAIR="+at.dir, "SSL_CERT_FILE="+machine, "SSL_CERT_DIR="+t.TempDir())
		if out, err := again.CombinedOutput(); (err == nil) != want {
			t.Errorf("the root is trusted: %v; the test says %v: %s", want, err, out)
		}
	}
}

// TestGapIsTold: once when the watcher starts, when everything that is known is
// known, and once for a changed file.
func TestGapIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := mint(t, nil, asCA)
		between := mint(t, root, asCA)
		leaf := mint(t, between, func(c *x509.Certificate) { c.IssuingCertificateURL = []string{"http://ca.test/between.crt"} })
		at := newPlace(t)
		at.put(t, certPEM(leaf), leaf.keyPEM(t))
		watch, log := knowing(root)
		if _, err := watch.Pair("dp-server", "KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, at.key); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- watch.Run(ctx) }()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		said := log.lines("level=WARN")
		if len(said) != 1 {
			t.Fatalf("the log says %q, want one warning", said)
		}
		for _, part := range []string{"KUMA_DP_SERVER_TLS_CERT_FILE", at.cert, leaf.cert.Subject.String(), between.cert.Subject.String(), "Append", "http://ca.test/between.crt", "nothing is to be done"} {
			if !strings.Contains(said[0], part) {
				t.Errorf("%q does not say %q", said[0], part)
			}
		}

		at.put(t, certPEM(leaf, between), leaf.keyPEM(t))
		time.Sleep(10 * time.Second)
		if said := log.lines("level=WARN"); len(said) != 1 || watch.Taken() != 1 {
			t.Errorf("with the intermediate (%d taken) the log says %q", watch.Taken(), said)
		}
		next := mint(t, between, nil)
		at.put(t, certPEM(next), next.keyPEM(t))
		time.Sleep(10 * time.Second)
		if said := log.lines("level=WARN"); len(said) != 2 || !strings.Contains(said[1], next.cert.Subject.String()) {
			t.Errorf("without it again the log says %q", said)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
