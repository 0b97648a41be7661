package dp

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kuma/internal/errs"
	"kuma/internal/names"
	"kuma/internal/pki"
)

// trustFile is where the state directory keeps the control plane's authorities.
const trustFile = "control-plane-ca.pem"

// featureTrustFile says that kuma-dp writes the authorities by which Envoy
// verifies the control plane into a file that Envoy watches.
const featureTrustFile = "feature-trust-file"

// trust is whom kuma-dp and its Envoy believe to be the control plane: what the
// user gave (or the system's authorities), and the authorities that the control
// plane itself has sent since, over a link that was verified. The latter
// replace each other; the former stay. It is safe for concurrent use.
type trust struct {
	skip bool
	// source says where what the user gave is from, for who reads an error.
	source string
	log    *slog.Logger
	// files watches anchors, which is the file that the user gave; nil where it
	// was none.
	files   *pki.Files
	anchors *pki.Anchors

	mu sync.Mutex
	// given is what the user gave, as PEM; nil where the system's count.
	given []byte
	// version is that of anchors which has got everywhere.
	version uint64
	// shown is the chain that the control plane showed last on a link that was
	// opened.
	shown []*x509.Certificate
	// kept is the control plane's own list.
	kept []byte
	// roots is nil where only the system's authorities count.
	roots *x509.CertPool
	// dir is the state directory; empty where nothing is kept, and lacks then
	// says why.
	dir, lacks string
	// envoy is the file that Envoy watches, empty where there is none; started
	// is what Envoy had at its start.
	envoy   string
	started []byte
	written int
}

func newTrust(pem []byte, skip bool) (*trust, error) {
	t := &trust{skip: skip, log: slog.New(slog.DiscardHandler), lacks: "there is no state directory"}
	if len(pem) > 0 {
		clean, _, err := pki.ServerAnchors(pem, time.Now())
		if err != nil {
			return nil, err
		}
		t.given, t.roots = clean, x509.NewCertPool()
		t.roots.AppendCertsFromPEM(clean)
	}
	return t, nil
}

// openTrust takes in what the user said of the control plane's authority. A
// file is watched: look, or follow, takes over what is put in its place.
func (c *Config) openTrust() (*trust, error) {
	cp := c.ControlPlane
	if cp.CACert != "" || cp.CACertFile == "" {
		t, err := newTrust([]byte(cp.CACert), cp.SkipVerify)
		if err != nil {
			return nil, errs.New(errs.Invalid, "KUMA_CONTROL_PLANE_CA_CERT: %w", err)
		}
		t.source = c.caSource()
		return t, nil
	}
	// The contract's words where it can't be opened; no pipe is waited for.
	f, err := os.OpenFile(cp.CACertFile, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, errs.New(errs.Invalid, "could not read certificate file %s: %w", cp.CACertFile, err)
	}
	_ = f.Close()
	files := pki.NewFiles(pki.FilesConfig{Log: c.Log})
	anchors, err := files.Anchors("control-plane-ca", "--ca-cert-file (KUMA_CONTROL_PLANE_CA_CERT_FILE)", cp.CACertFile)
	if err != nil {
		return nil, err
	}
	version := anchors.Version()
	t, err := newTrust(anchors.PEM(), cp.SkipVerify)
	if err != nil {
		return nil, err
	}
	t.files, t.anchors, t.version, t.source = files, anchors, version, c.caSource()
	return t, nil
}

// follow takes over what is put in place of the user's file, until the context
// ends.
func (t *trust) follow(ctx context.Context) {
	if t.files == nil {
		return
	}
	tick := time.NewTicker(pki.DefaultReload)
	defer tick.Stop()
	said := changes{log: t.log}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := t.look(); err != nil {
			said.warn("the new authorities of the control plane's certificate can't be handed to Envoy, trying again", err)
		} else {
			said.clear()
		}
	}
}

// look takes over what has changed in the user's file: for connections that are
// opened from now on, and for Envoy.
func (t *trust) look() error {
	t.files.Look()
	version := t.anchors.Version()
	t.mu.Lock()
	defer t.mu.Unlock()
	if version == t.version {
		return nil
	}
	t.given = t.anchors.PEM()
	if err := t.believe(t.kept); err != nil {
		return err
	}
	if t.envoy != "" {
		t.started = t.given
	}
	if err := t.tellEnvoy(); err != nil {
		return err
	}
	t.version = version
	return nil
}

// tls is how the control plane is connected to now.
func (t *trust) tls() *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: t.roots, InsecureSkipVerify: t.skip}
}

// stateName is what a mesh or a proxy may be called for its name to be that of
// a directory.
var stateName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$`)

// stateDir is where a proxy's state is kept; empty where there is no place.
func (c *Config) stateDir(meshName, name string) string {
	if c.StateDir != "" {
		return c.StateDir
	}
	if c.Home == "" {
		return ""
	}
	dir := meshName + "." + name
	if !stateName.MatchString(dir) {
		sum := sha256.Sum256([]byte(dir))
		dir = hex.EncodeToString(sum[:])
	}
	return filepath.Join(c.Home, ".kuma", "dp", dir)
}

// restore takes in what earlier runs have kept in a state directory. What is
// damaged is ignored, with a warning: then the user's authorities count alone.
func (t *trust) restore(dir string, log *slog.Logger) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.log = log
	if dir == "" {
		log.Warn("there is no home directory, and so no place for what this proxy learns of the control plane's authorities; name one with --state-dir")
		return
	}
	if t.skip {
		return // what was learnt unverified is not kept, and what was kept is not needed
	}
	if err := openStateDir(dir); err != nil {
		t.lacks = fmt.Sprintf("the state directory %s can't be used: %v", dir, err)
		log.Warn("the state directory can't be used; after a restart this proxy knows only the authorities that it is given; name another one with --state-dir", "directory", dir, "error", err)
		return
	}
	t.dir = dir
	file := filepath.Join(dir, trustFile)
	text, err := readOwn(file)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var clean []byte
	beside := ""
	if err == nil {
		beside, text = cutBeside(text)
		_, clean, err = pki.ReadAnchors(text)
	}
	if err == nil && beside != t.beside() && !overlap(t.given, clean) {
		log.Warn("the control plane's authorities that were kept are ignored: they were learnt beside other ones than those given now, and have none in common with these", "file", file, "given", t.source)
		return
	}
	if err == nil {
		err = t.believe(clean)
	}
	if err != nil {
		log.Warn("the control plane's authorities that were kept can't be used and are ignored; they are replaced when the control plane sends them", "file", file, "error", err)
		return
	}
	log.Info("the control plane's authorities that it has sent before count, too", "file", file)
}

// besideMark begins the first line of what is kept: what follows tells which
// authorities the user had given then. Where a start finds others, that have
// none in common with what was kept, the user wants those and no more: perhaps
// since a key was stolen.
const besideMark = "# learnt beside "

// beside tells what the user has given. The lock is held.
func (t *trust) beside() string {
	if len(t.given) == 0 {
		return "the system's"
	}
	sum := sha256.Sum256(t.given)
	return hex.EncodeToString(sum[:])
}

func cutBeside(text []byte) (beside string, pem []byte) {
	line, rest, ok := bytes.Cut(text, []byte("\n"))
	if !ok || !bytes.HasPrefix(line, []byte(besideMark)) {
		return "", text
	}
	return string(line[len(besideMark):]), rest
}

// overlap reports whether two PEM texts have an authority in common.
func overlap(first, second []byte) bool {
	a, _, err := pki.ReadAnchors(first)
	b, _, errB := pki.ReadAnchors(second)
	return err == nil && errB == nil && slices.ContainsFunc(a, func(c *x509.Certificate) bool { return slices.ContainsFunc(b, c.Equal) })
}

// openStateDir makes the directory, or checks the one that is there, which is
// left as it is: nobody but our own user may be able to write what we believe.
func openStateDir(dir string) error {
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			info, err = os.Lstat(dir)
		}
	}
	switch {
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		return errors.New("it is a symbolic link; name the directory itself")
	case !info.IsDir():
		return errors.New("it is not a directory")
	}
	return ours(info)
}

// readOwn reads a file that nobody but our own user can have written.
func readOwn(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is not a regular file")
	}
	if err == nil {
		err = ours(info)
	}
	if err != nil {
		return nil, err
	}
	return readAll(f, maxCA)
}

// ours is an error unless a file belongs to our own user and no other can write
// it.
func ours(info fs.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch own := os.Geteuid(); {
	case !ok:
		return errors.New("its owner can't be told")
	case stat.Uid != uint32(own):
		return fmt.Errorf("it belongs to user %d, and kuma-dp runs as user %d", stat.Uid, own)
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("other users can write it (mode %#o); chmod go-w it, if what is there is yours", info.Mode().Perm())
	}
	return nil
}

// believe makes a list the control plane's own. The lock is held.
func (t *trust) believe(clean []byte) error {
	if !t.skip {
		var pool *x509.CertPool
		if len(t.given) == 0 {
			system, err := x509.SystemCertPool()
			if err != nil {
				return errs.New(errs.Unavailable, "read the system's authorities: %w", err)
			}
			pool = system
		} else {
			pool = x509.NewCertPool()
			pool.AppendCertsFromPEM(t.given)
		}
		pool.AppendCertsFromPEM(clean)
		t.roots = pool
		if len(t.given) == 0 && len(clean) == 0 {
			t.roots = nil
		}
	}
	t.kept = clean
	return nil
}

// take replaces the control plane's own list by what it has sent; nothing means
// that it has no authority of its own any more. What can't be
// used changes nothing. What can't be kept, or not be handed to Envoy, is
// believed all the same, and an error.
func (t *trust) take(bundle []byte) error {
	if len(bundle) == 0 {
		return t.forget()
	}
	_, clean, err := pki.ReadAnchors(bundle)
	if err != nil {
		return errs.New(errs.Invalid, "the control plane's authorities can't be used: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.believe(clean); err != nil {
		return err
	}
	return errors.Join(t.keep(clean), t.tellEnvoy())
}

// saw notes the chain that the control plane has shown and that was verified.
func (t *trust) saw(chain []*x509.Certificate) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shown = chain
}

// forget removes the control plane's own list, unless nothing else verifies the
// certificate that it shows: then it stays, and why is the error.
func (t *trust) forget() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	file := ""
	if t.dir != "" {
		file = filepath.Join(t.dir, trustFile)
	}
	if len(t.kept) > 0 && !t.skip {
		if err := t.verifyWithoutKept(); err != nil {
			return errs.New(errs.Invalid, "the control plane has no authority of its own any more, but its certificate is verified by nothing else than what it has sent before, which therefore stays; name the file with the new one with --ca-cert-file: %w", err)
		}
		t.log.Info("the control plane has no authority of its own any more; what it has sent before is forgotten")
	}
	if err := t.believe(nil); err != nil {
		return err
	}
	var err error
	if file != "" {
		if err = os.Remove(file); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	return errors.Join(err, t.tellEnvoy())
}

// verifyWithoutKept verifies what the control plane has shown by the user's
// authorities, or the system's, alone. The lock is held.
func (t *trust) verifyWithoutKept() error {
	if len(t.shown) == 0 {
		return errs.New(errs.Unavailable, "no certificate was seen yet")
	}
	opts := x509.VerifyOptions{Intermediates: x509.NewCertPool()}
	if len(t.given) > 0 {
		opts.Roots = x509.NewCertPool()
		opts.Roots.AppendCertsFromPEM(t.given)
	}
	for _, c := range t.shown[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := t.shown[0].Verify(opts)
	return err
}

// keep writes the list into the state directory. The lock is held.
func (t *trust) keep(clean []byte) error {
	switch {
	case t.skip:
		return nil // nothing that was not verified is kept
	case t.dir == "":
		return errs.New(errs.Unavailable, "they are not kept over a restart: %s; name a directory with --state-dir", t.lacks)
	}
	file := filepath.Join(t.dir, trustFile)
	text := slices.Concat([]byte(besideMark+t.beside()+"\n"), clean)
	if have, err := readOwn(file); err == nil && bytes.Equal(have, text) {
		return nil
	}
	if err := pki.WriteFile(file, text); err != nil {
		return errs.New(errs.Unavailable, "they are not kept over a restart: %w", err)
	}
	return nil
}

// request are the authorities for the bootstrap request: none where the
// system's count, since the control plane then names its own.
func (t *trust) request() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.given) == 0 {
		return nil
	}
	return union(t.given, t.kept)
}

// serveEnvoy has Envoy's authorities in a file from now on. Named are those that
// the control plane names where the user gave none; then the system's count for
// Envoy as they do for kuma-dp, so that a certificate by another of them is
// verified, too.
func (t *trust) serveEnvoy(file string, named []byte, system string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.envoy = file
	switch {
	case len(t.given) > 0:
		t.started = t.given
	case t.skip || system == "":
		t.started = named
	default:
		text, err := readLimited(system, maxCA)
		if err != nil {
			t.log.Warn("envoy knows only the authorities that the control plane names, since the system's can't be read; KUMA_DATAPLANE_RUNTIME_DYNAMIC_SYSTEM_CA_PATH names another file", "error", err)
		}
		t.started = slices.Concat(bytes.TrimRight(text, "\n"), []byte("\n"), named)
	}
	return t.tellEnvoy()
}

// tellEnvoy writes the file that Envoy watches. The lock is held.
func (t *trust) tellEnvoy() error {
	if t.envoy == "" {
		return nil
	}
	type object = map[string]any
	all := union(t.started, t.kept)
	if len(all) == 0 {
		return nil // a control plane that does not know the file
	}
	t.written++
	doc, err := json.Marshal(object{
		"version_info": strconv.Itoa(t.written),
		"resources": []any{object{
			"@type": secretType, "name": names.ControlPlaneTrust,
			"validation_context": object{"trusted_ca": object{"inline_bytes": all}},
		}},
	})
	if err == nil {
		err = pki.WriteFile(t.envoy, doc)
	}
	if err != nil {
		return errs.New(errs.Unavailable, "envoy can't be told of them: %w", err)
	}
	return nil
}

// union joins PEM texts, without what the first has already.
func union(first, second []byte) []byte {
	certs, clean, err := pki.ReadAnchors(second)
	if err != nil || len(certs) == 0 {
		return first
	}
	have, _, err := pki.ReadAnchors(first)
	if err != nil { // a user's file need not be as strict as what a control plane sends
		return slices.Concat(bytes.TrimRight(first, "\n"), []byte("\n"), clean)
	}
	out := slices.Clone(first)
	if len(out) > 0 && out[len(out)-1] != '\n' {
		out = append(out, '\n')
	}
	for i, c := range certs {
		if !slices.ContainsFunc(have, c.Equal) {
			out = append(out, pki.EncodeCertificate(certs[i])...)
		}
	}
	return out
}
