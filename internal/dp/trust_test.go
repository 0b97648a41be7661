package dp

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kuma/internal/pki"
)

// ownAuthority is the authority of a control plane, PEM, and a leaf of it.
func ownAuthority(t *testing.T) (ca, leaf []byte) {
	t.Helper()
	dir := t.TempDir()
	cp, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	leaf, err = os.ReadFile(filepath.Join(dir, pki.ServerFile))
	if err != nil {
		t.Fatal(err)
	}
	return cp.CA(), leaf
}

// trusts reports whether a trust takes a server's certificate.
func (t *trust) trusts(tb testing.TB, leaf []byte) bool {
	tb.Helper()
	cert := firstCert(tb, leaf)
	_, err := cert.Verify(x509.VerifyOptions{Roots: t.tls().RootCAs, DNSName: "localhost"})
	return err == nil
}

func firstCert(t testing.TB, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("no PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newTestTrust(t *testing.T, given []byte, skip bool, dir string, log *slog.Logger) *trust {
	t.Helper()
	tr, err := newTrust(given, skip)
	if err != nil {
		t.Fatal(err)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	tr.restore(dir, log)
	return tr
}

// envoysAnchors are the authorities in the file that Envoy watches.
func envoysAnchors(t *testing.T, file string) (version, anchors string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Version   string `json:"version_info"`
		Resources []struct {
			Type    string `json:"@type"`
			Name    string `json:"name"`
			Context struct {
				CA struct {
					Inline []byte `json:"inline_bytes"`
				} `json:"trusted_ca"`
			} `json:"validation_context"`
		} `json:"resources"`
	}
	if err := json.Unmarshal(b, &doc); err != nil || len(doc.Resources) != 1 || doc.Resources[0].Type != secretType || doc.Resources[0].Name != "cp_validation_ctx" {
		t.Fatalf("%s: %v", b, err)
	}
	return doc.Version, string(doc.Resources[0].Context.CA.Inline)
}

// learnt is what is kept of authorities that were learnt beside a user's.
func learnt(given, sent []byte) string {
	t := trust{given: given}
	return besideMark + t.beside() + "\n" + string(sent)
}

func TestTrust(t *testing.T) {
	t.Parallel()
	one, leafOne := ownAuthority(t)
	two, leafTwo := ownAuthority(t)
	three, leafThree := ownAuthority(t)
	both := string(one) + string(two)
	dir := filepath.Join(t.TempDir(), "state", "default.web")
	envoy := filepath.Join(t.TempDir(), "envoy.json")
	tr := newTestTrust(t, one, false, dir, nil)
	if err := tr.serveEnvoy(envoy, three, ""); err != nil {
		t.Fatal(err)
	}
	first, anchors := envoysAnchors(t, envoy)
	if anchors != string(one) || string(tr.request()) != string(one) {
		t.Errorf("at the start Envoy has %s", anchors)
	}
	if err := tr.take([]byte(both)); err != nil {
		t.Fatal(err)
	}
	second, anchors := envoysAnchors(t, envoy)
	if anchors != both || second == first || string(tr.request()) != both {
		t.Errorf("Envoy has %s", anchors)
	}
	if !tr.trusts(t, leafOne) || !tr.trusts(t, leafTwo) || tr.trusts(t, leafThree) {
		t.Error("kuma-dp does not trust exactly the two")
	}
	file := filepath.Join(dir, trustFile)
	if b, err := os.ReadFile(file); err != nil || string(b) != learnt(one, []byte(both)) {
		t.Errorf("kept: %s, %v", b, err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, file: 0o600, envoy: 0o600} {
		if i, err := os.Stat(path); err != nil || i.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, i.Mode(), err)
		}
	}

	// What can't be used changes nothing.
	for name, bad := range map[string][]byte{
		"rubbish": []byte("x"), "a leaf": leafTwo, "a leaf among them": append(bytes.Clone(two), leafTwo...),
		"too much": bytes.Repeat(two, 17),
	} {
		if err := tr.take(bad); err == nil || !strings.Contains(err.Error(), "can't be used") {
			t.Errorf("%s: %v", name, err)
		}
		if _, now := envoysAnchors(t, envoy); now != both || !tr.trusts(t, leafTwo) {
			t.Errorf("%s has changed the trust", name)
		}
	}

	// The next run knows what this one has learnt; what is retired goes, what
	// the user gave stays.
	again := newTestTrust(t, one, false, dir, nil)
	if !again.trusts(t, leafTwo) || string(again.request()) != both {
		t.Error("a restart has forgotten")
	}
	if err := again.take(two); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != learnt(one, two) {
		t.Errorf("kept: %s, %v", b, err)
	}
	// Whoever gives others than before wants those alone, unless they have one in
	// common with what was kept.
	var log bytes.Buffer
	other := newTestTrust(t, three, false, dir, slog.New(slog.NewTextHandler(&log, nil)))
	if other.trusts(t, leafOne) || other.trusts(t, leafTwo) || !other.trusts(t, leafThree) || !strings.Contains(log.String(), "level=WARN") {
		t.Errorf("what was learnt beside another authority is believed without a word: %s", &log)
	}
	more := newTestTrust(t, slices.Concat(three, two), false, dir, nil)
	if more.trusts(t, leafOne) || !more.trusts(t, leafTwo) || !more.trusts(t, leafThree) {
		t.Error("what is retired is still trusted, or what is not isn't")
	}
}

// Where the system's authorities count, the control plane's are added to them,
// and the bootstrap's count for Envoy.
func TestTrustOfTheSystem(t *testing.T) {
	t.Parallel()
	one, _ := ownAuthority(t)
	two, leaf := ownAuthority(t)
	envoy := filepath.Join(t.TempDir(), "envoy.json")
	tr := newTestTrust(t, nil, false, t.TempDir(), nil)
	if tr.tls().RootCAs != nil || tr.request() != nil {
		t.Error("the system's authorities do not count")
	}
	if err := tr.serveEnvoy(envoy, one, ""); err != nil {
		t.Fatal(err)
	}
	if err := tr.take(two); err != nil {
		t.Fatal(err)
	}
	if _, anchors := envoysAnchors(t, envoy); anchors != string(one)+string(two) {
		t.Errorf("Envoy has %s", anchors)
	}
	system, err := x509.SystemCertPool()
	if err != nil {
		t.Fatal(err)
	}
	system.AddCert(firstCert(t, two))
	if !tr.tls().RootCAs.Equal(system) || !tr.trusts(t, leaf) || tr.request() != nil {
		t.Error("the control plane's authorities have replaced the system's")
	}
}

// Without verification nothing is kept, and nothing that was kept counts.
func TestTrustUnverified(t *testing.T) {
	t.Parallel()
	one, _ := ownAuthority(t)
	two, _ := ownAuthority(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, trustFile), one, 0o600); err != nil {
		t.Fatal(err)
	}
	envoy := filepath.Join(t.TempDir(), "envoy.json")
	tr := newTestTrust(t, nil, true, dir, nil)
	if err := tr.serveEnvoy(envoy, two, ""); err != nil {
		t.Fatal(err)
	}
	if err := tr.take(two); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, trustFile)); err != nil || string(b) != string(one) {
		t.Errorf("kept: %s, %v", b, err)
	}
	if _, anchors := envoysAnchors(t, envoy); anchors != string(two) || !tr.tls().InsecureSkipVerify || tr.tls().RootCAs != nil {
		t.Errorf("Envoy has %s", anchors)
	}
}

func TestDamagedState(t *testing.T) {
	t.Parallel()
	one, leafOne := ownAuthority(t)
	two, leafTwo := ownAuthority(t)
	for name, text := range map[string]string{
		"empty": "", "rubbish": "x", "cut off": string(two[:len(two)/2]), "a leaf": string(leafTwo), "a key": string(two) + "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n",
		"huge": strings.Repeat("\n", 2<<20),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, trustFile), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			tr := newTestTrust(t, one, false, dir, slog.New(slog.NewTextHandler(&log, nil)))
			if !tr.trusts(t, leafOne) || tr.trusts(t, leafTwo) || string(tr.request()) != string(one) {
				t.Error("the trust is not the user's alone")
			}
			if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), trustFile) {
				t.Errorf("log: %s", log.String())
			}
			if err := tr.take(two); err != nil {
				t.Fatal(err)
			}
			if !newTestTrust(t, one, false, dir, nil).trusts(t, leafTwo) {
				t.Error("it was not mended")
			}
		})
	}
}

// Where nothing can be kept, the proxy believes all the same, and says why it
// will not after a restart.
func TestNoState(t *testing.T) {
	t.Parallel()
	one, _ := ownAuthority(t)
	two, leaf := ownAuthority(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{"no home": "", "below a file": filepath.Join(file, "state")} {
		var log bytes.Buffer
		tr := newTestTrust(t, one, false, dir, slog.New(slog.NewTextHandler(&log, nil)))
		if !strings.Contains(log.String(), "--state-dir") {
			t.Errorf("%s: log %s", name, log.String())
		}
		if err := tr.take(two); err == nil || !strings.Contains(err.Error(), "not kept over a restart") || !strings.Contains(err.Error(), "--state-dir") {
			t.Errorf("%s: %v", name, err)
		}
		if !tr.trusts(t, leaf) {
			t.Errorf("%s: it is not believed", name)
		}
	}
}

// A control plane that has another authority now, which the user trusts, has the
// proxy forget the one of its own; what alone makes the control plane trusted
// stays.
func TestTrustForgotten(t *testing.T) {
	t.Parallel()
	one, leafOne := ownAuthority(t)
	two, leafTwo := ownAuthority(t)
	dir, envoy := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "envoy.json")
	file := filepath.Join(dir, trustFile)
	tr := newTestTrust(t, one, false, dir, nil)
	err := tr.serveEnvoy(envoy, nil, "")
	if err == nil {
		err = tr.take(two)
	}
	if err != nil {
		t.Fatal(err)
	}
	stays := func(why string) {
		t.Helper()
		if err := tr.take(nil); err == nil || !strings.Contains(err.Error(), "--ca-cert-file") {
			t.Errorf("%s: %v", why, err)
		}
		_, anchors := envoysAnchors(t, envoy)
		b, err := os.ReadFile(file)
		if !tr.trusts(t, leafTwo) || anchors != string(one)+string(two) || err != nil || string(b) != learnt(one, two) {
			t.Errorf("%s, and yet it is forgotten: %v", why, err)
		}
	}
	stays("nobody was verified")
	tr.saw([]*x509.Certificate{firstCert(t, leafTwo)})
	stays("it is verified by nothing else")
	tr.saw([]*x509.Certificate{firstCert(t, leafOne)})
	for range 2 { // as each new link tells it
		if err := tr.take(nil); err != nil {
			t.Fatal(err)
		}
		_, anchors := envoysAnchors(t, envoy)
		if tr.trusts(t, leafTwo) || !tr.trusts(t, leafOne) || anchors != string(one) || string(tr.request()) != string(one) {
			t.Errorf("it is still trusted; Envoy has %s", anchors)
		}
		if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is kept: %v", err)
		}
	}
	if newTestTrust(t, one, false, dir, nil).trusts(t, leafTwo) {
		t.Error("after a restart it is back")
	}

	// Where the system's authorities count, they verify it.
	system := newTestTrust(t, nil, false, t.TempDir(), nil)
	if err := system.take(two); err != nil {
		t.Fatal(err)
	}
	system.saw([]*x509.Certificate{firstCert(t, leafTwo)})
	if err := system.take(nil); err == nil || !system.trusts(t, leafTwo) {
		t.Errorf("the system does not know it: %v", err)
	}
}

// What somebody else could have written into the state directory is not
// believed, and no directory that was there before is altered.
func TestStateOfAnother(t *testing.T) {
	t.Parallel()
	one, leafOne := ownAuthority(t)
	two, leafTwo := ownAuthority(t)
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		change func(dir, file string) string
		root   bool
		want   string
		// kept: what is sent can be kept there.
		kept bool
	}{
		"its own":              {change: func(dir, _ string) string { return dir }, kept: true},
		"readable to others":   {change: func(dir, file string) string { do(os.Chmod(dir, 0o755)); do(os.Chmod(file, 0o644)); return dir }, kept: true},
		"a file for all":       {change: func(dir, file string) string { do(os.Chmod(file, 0o666)); return dir }, want: "0666", kept: true},
		"a file for the group": {change: func(dir, file string) string { do(os.Chmod(file, 0o620)); return dir }, want: "0620", kept: true},
		"a file of another":    {change: func(dir, file string) string { do(os.Chown(file, 12345, -1)); return dir }, root: true, want: "user 12345", kept: true},
		"a linked file": {change: func(dir, file string) string {
			do(os.Rename(file, file+".x"))
			do(os.Symlink(file+".x", file))
			return dir
		}, want: trustFile, kept: true},
		"a pipe":                 {change: func(dir, file string) string { do(os.Remove(file)); do(unix.Mkfifo(file, 0o600)); return dir }, want: "regular", kept: true},
		"a directory for all":    {change: func(dir, _ string) string { do(os.Chmod(dir, 0o777|os.ModeSticky)); return dir }, want: "0777"},
		"a directory of another": {change: func(dir, _ string) string { do(os.Chown(dir, 12345, -1)); return dir }, root: true, want: "user 12345"},
		"a linked directory":     {change: func(dir, _ string) string { do(os.Symlink(dir, dir+".x")); return dir + ".x" }, want: "symbolic link"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.root && os.Getuid() != 0 {
				t.Skip("only root can give a file away")
			}
			dir := filepath.Join(t.TempDir(), "state")
			file := filepath.Join(dir, trustFile)
			do(os.Mkdir(dir, 0o700))
			do(os.WriteFile(file, []byte(learnt(one, two)), 0o600))
			at := c.change(dir, file)
			before, err := os.Stat(dir)
			do(err)
			var log bytes.Buffer
			tr := newTestTrust(t, one, false, at, slog.New(slog.NewTextHandler(&log, nil)))
			if tr.trusts(t, leafTwo) != (c.want == "") || !tr.trusts(t, leafOne) {
				t.Errorf("what was there is believed: %v", tr.trusts(t, leafTwo))
			}
			if c.want != "" && (!strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), c.want)) || c.want == "" && strings.Contains(log.String(), "level=WARN") {
				t.Errorf("log: %s", &log)
			}
			if after, err := os.Stat(dir); err != nil || after.Mode() != before.Mode() {
				t.Errorf("the directory's mode was %v and is %v, %v", before.Mode(), after.Mode(), err)
			}
			// What is sent is believed at once, and over a restart where it is safe.
			if err := tr.take(two); (err == nil) != c.kept || err != nil && !strings.Contains(err.Error(), "--state-dir") {
				t.Errorf("take: %v", err)
			}
			if !tr.trusts(t, leafTwo) || newTestTrust(t, one, false, at, nil).trusts(t, leafTwo) != c.kept {
				t.Error("what was sent is not believed, or not kept as it should be")
			}
		})
	}
}

func TestStateDir(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ given, home, mesh, name, want string }{
		{"/var/lib/x", "/home/u", "default", "web", "/var/lib/x"},
		{"", "/home/u", "default", "web-1", "/home/u/.kuma/dp/default.web-1"},
		{"", "", "default", "web", ""},
	} {
		cfg := Config{StateDir: c.given, Home: c.home}
		if got := cfg.stateDir(c.mesh, c.name); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
	for _, name := range []string{"../../etc", "a/b", "x\x00y", strings.Repeat("long", 100), "-", "é"} {
		cfg := Config{Home: "/home/u"}
		got := cfg.stateDir("m", name)
		if filepath.Dir(got) != "/home/u/.kuma/dp" && name != "-" || filepath.Clean(got) != got || len(got) > 250 {
			t.Errorf("%q: %q", name, got)
		}
	}
}
