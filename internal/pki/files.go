package pki

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"kuma/internal/errs"
)

const (
	// DefaultReload is how often watched files are looked at where nothing else
	// is said.
	DefaultReload = time.Second
	// quietLooks is how many looks in a row may find a bad file before it is
	// told: a writer may be between the certificate and its key.
	quietLooks = 3
	// fresh is how young a change must be for its file to be read again though it
	// looks the same: file systems keep times in ticks.
	fresh = 2 * time.Second

	maxPoolCerts = 1000
	maxPoolFiles = 1000
	maxPoolPEM   = 4 << 20 // bytes of a bundle, or of a directory's files
)

// FilesConfig is what NewFiles needs.
type FilesConfig struct {
	// Every is how often the files are looked at; 0 means DefaultReload.
	Every time.Duration
	// Known lists authorities that this program knows beside those of watched
	// files and of this machine: by them it is told whether the chain of a Pair is
	// complete, see Gaps. Nil means that it is not told. It is not called while
	// files are opened.
	Known func() []*x509.Certificate
	// Log is told what was taken over and what was refused.
	Log *slog.Logger
}

// Files watches certificate files that users replace while the control plane
// runs. A changed file is read and checked, and takes the place of the old
// content only where nothing is wrong with it; otherwise the old content goes
// on, and the reason is logged once. Files are found changed by their time, size
// and identity, through symbolic links, so that links that are swapped (as
// Kubernetes does it) count too. It is safe for concurrent use.
type Files struct {
	cfg     FilesConfig
	taken   atomic.Uint64
	refused atomic.Uint64

	mu      sync.Mutex
	watched []*watched
}

// NewFiles makes a watcher of no files.
func NewFiles(c FilesConfig) *Files {
	c.Every = cmp.Or(c.Every, DefaultReload)
	return &Files{cfg: c}
}

// Run looks at the files until the context ends. What is opened before is looked
// at for gaps first.
func (f *Files) Run(ctx context.Context) error {
	f.mu.Lock()
	all := slices.Clone(f.watched)
	f.mu.Unlock()
	for _, w := range all {
		w.tellGap()
	}
	tick := time.NewTicker(f.cfg.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			f.Look()
		}
	}
}

// Look looks at all files now.
func (f *Files) Look() {
	f.mu.Lock()
	all := slices.Clone(f.watched)
	f.mu.Unlock()
	for _, w := range all {
		w.look()
	}
}

// Taken returns how many changed files were taken over.
func (f *Files) Taken() uint64 { return f.taken.Load() }

// Refused returns how many bad contents were refused.
func (f *Files) Refused() uint64 { return f.refused.Load() }

// Expiries lists when each certificate ends that is shown or trusted now.
func (f *Files) Expiries() []Expiry {
	f.mu.Lock()
	all := slices.Clone(f.watched)
	f.mu.Unlock()
	var out []Expiry
	for _, w := range all {
		out = append(out, w.of.expiries()...)
	}
	return out
}

// item is what is made of files.
type item interface {
	// paths are the files as they are named; a directory stands for its files.
	paths() []string
	// load makes of the content what it is for, without using it, and tells its
	// parts that are left out.
	load(content []content, now time.Time) (use func(), notes []string, err error)
	// life is that of what is in use; zero where there is none.
	life() (begin, end time.Time)
	expiries() []Expiry
}

// content is a file that was read.
type content struct {
	file string
	data []byte
	mode fs.FileMode
}

// watched is an item with what is known of its files.
type watched struct {
	files   *Files
	setting string
	of      item

	mu    sync.Mutex
	seen  []stamp
	hash  [sha256.Size]byte
	bad   int      // looks in a row that found something wrong
	told  string   // the fault that was told
	noted []string // what was told of the content that is in use
	last  time.Time
	aging int // what was told of the age: 1 due, 2 nearly over, 3 over
}

// stamp is what a file looks like from outside.
type stamp struct {
	path string
	info fs.FileInfo
}

func same(a, b []stamp) bool {
	return slices.EqualFunc(a, b, func(x, y stamp) bool {
		return x.path == y.path && os.SameFile(x.info, y.info) && x.info.Size() == y.info.Size() && x.info.ModTime().Equal(y.info.ModTime()) &&
			x.info.Mode() == y.info.Mode()
	})
}

// open loads an item for the first time and watches it from then on.
func (f *Files) open(setting string, of item) (*watched, error) {
	w := &watched{files: f, setting: setting, of: of}
	seen, err := stamps(of.paths())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	got, hash, err := read(seen)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	use, notes, err := of.load(got, time.Now())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	use()
	w.seen, w.hash = seen, hash
	w.note(notes)
	w.age(time.Now())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watched = append(f.watched, w)
	return w, nil
}

// note tells what could be better, once for a content as long as it is so.
func (w *watched) note(notes []string) {
	for _, n := range notes {
		if !slices.Contains(w.noted, n) {
			w.files.cfg.Log.Warn("a certificate file could be better", "setting", w.setting, "warning", n)
		}
	}
	w.noted = notes
}

// look takes over what has changed.
func (w *watched) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	defer w.age(now)
	seen, err := stamps(w.of.paths())
	if err == nil && w.bad == 0 && same(seen, w.seen) && !slices.ContainsFunc(seen, func(s stamp) bool { return now.Sub(s.info.ModTime()) < fresh }) {
		return
	}
	var hash [sha256.Size]byte
	var got []content
	if err == nil {
		got, hash, err = read(seen)
	}
	if err == nil && hash == w.hash {
		if !same(seen, w.seen) { // who may read it may be another now
			if _, notes, err := w.of.load(got, now); err == nil {
				w.note(notes)
			}
		}
		w.seen, w.bad, w.told = seen, 0, ""
		return
	}
	var use func()
	var notes []string
	if err == nil {
		use, notes, err = w.of.load(got, now)
	}
	if err != nil {
		w.fail(hash, err)
		return
	}
	use()
	w.seen, w.hash, w.bad, w.told, w.noted, w.aging = seen, hash, 0, "", nil, 0
	w.files.taken.Add(1)
	about := []any{"setting", w.setting, "files", w.of.paths()}
	if _, end := w.of.life(); !end.IsZero() {
		about = append(about, "until", end.UTC().Format(time.RFC3339))
	}
	w.files.cfg.Log.Info("took over a changed certificate file", about...)
	w.note(notes)
	w.tellGap()
}

// tellGap tells what the file of a pair may lack.
func (w *watched) tellGap() {
	if p, ok := w.of.(*Pair); ok {
		if g := w.files.gap(p, time.Now()); g != nil {
			w.files.cfg.Log.Warn("a certificate file may lack an issuer", "setting", w.setting, "warning", g.String())
		}
	}
}

// fail tells what is wrong with a content, once, if it stays.
func (w *watched) fail(hash [sha256.Size]byte, err error) {
	if w.bad++; w.bad < quietLooks {
		return
	}
	fault := hex.EncodeToString(hash[:]) + err.Error()
	if w.told == fault {
		return
	}
	w.told = fault
	w.files.refused.Add(1)
	w.files.cfg.Log.Error("a changed certificate file is refused; what was there before goes on", "setting", w.setting, "error", err)
}

// age tells, once for each, that a certificate should be replaced and that it
// is about to end.
func (w *watched) age(now time.Time) {
	begin, end := w.of.life()
	if end.IsZero() {
		return
	}
	due := RenewalDue(begin, end, now, w.last)
	w.last = now
	switch late := !now.Before(begin.Add(end.Sub(begin) / 10 * 9)); {
	case now.After(end) && w.aging < 3:
		w.aging = 3
		w.files.cfg.Log.Error("a certificate file has ended: what rests on it is refused until a new one is there", "setting", w.setting, "files", w.of.paths(), "until", end.UTC().Format(time.RFC3339))
	case late && w.aging < 2:
		w.aging = 2
		w.files.cfg.Log.Error("a certificate file ends soon; put a new one there", "setting", w.setting, "files", w.of.paths(), "until", end.UTC().Format(time.RFC3339))
	case due && !now.Before(begin) && w.aging < 1:
		w.aging = 1
		w.files.cfg.Log.Warn("two thirds of a certificate file's life are over; put a new one there in time", "setting", w.setting, "files", w.of.paths(), "until", end.UTC().Format(time.RFC3339))
	}
}

// stamps looks at files from outside. Directories are replaced by their
// certificate files.
func stamps(paths []string) ([]stamp, error) {
	var out []stamp
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return nil, errs.New(errs.Invalid, "%w; put the file there, readable for the user that this program runs as, or correct the setting", err)
		}
		if !info.IsDir() {
			out = append(out, stamp{path, info})
			continue
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, errs.New(errs.Invalid, "%w", err)
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); ext != ".pem" && ext != ".crt" {
				continue
			}
			file := filepath.Join(path, e.Name())
			info, err := os.Stat(file)
			if err != nil {
				return nil, errs.New(errs.Invalid, "%w", err)
			}
			if info.IsDir() {
				continue
			}
			if len(out) == maxPoolFiles {
				return nil, errs.New(errs.Invalid, "directory %s holds more than %d certificate files", path, maxPoolFiles)
			}
			out = append(out, stamp{file, info})
		}
	}
	return out, nil
}

// read reads files.
func read(seen []stamp) (out []content, hash [sha256.Size]byte, err error) {
	h, total := sha256.New(), 0
	for _, s := range seen {
		if s.info.Size() > maxPoolPEM {
			return nil, hash, errs.New(errs.Invalid, "%s has %d bytes, the limit is %d", s.path, s.info.Size(), maxPoolPEM)
		}
		data, err := readRegular(s.path)
		if err != nil {
			return nil, hash, err
		}
		if total += len(data); total > maxPoolPEM {
			return nil, hash, errs.New(errs.Invalid, "%s and the files before it have more than %d bytes together", s.path, maxPoolPEM)
		}
		fmt.Fprintf(h, "%q %d\n", s.path, len(data))
		h.Write(data)
		out = append(out, content{s.path, data, s.info.Mode()})
	}
	return out, [sha256.Size]byte(h.Sum(nil)), nil
}

// readRegular reads a file, and one byte more than the limit at most. What else
// a path may lead to is not read: a pipe may have no writer, a device no end.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe's open does not wait for its writer
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w; make it readable for the user that this program runs as", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, errs.New(errs.Invalid, "%s is no regular file (mode %v); put the content into a file", path, info.Mode())
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPoolPEM+1))
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	return data, nil
}

// Pair is a server's certificate with its key, from two files that are watched.
type Pair struct {
	name, certFile, keyFile string
	whose                   side
	hosts                   []Host
	now                     atomic.Pointer[shown]
	again                   func()
}

// Host is a name or an address by which clients know a server, and the setting
// that tells them.
type Host struct{ Name, Setting string }

// shown is a pair that was checked.
type shown struct {
	pair  *tls.Certificate
	text  []byte
	last  *x509.Certificate // of the chain
	begin time.Time
	end   time.Time // of the first certificate of the chain that ends
	sans  []string
}

// Pair loads a pair and watches it: a certificate file, leaf first and then each
// certificate's issuer (the root may be left out), and a key file. What is
// checked: both are PEM without rubbish, belong together, are valid now and
// strong enough; the leaf is for servers and names one, and each of the hosts;
// the chain is in order. Whether it is complete is told where it can be (Gaps).
// Errors begin with the setting, name the file and say how to mend it. The
// name is that of the Expiry.
func (f *Files) Pair(name, setting, certFile, keyFile string, hosts ...Host) (*Pair, error) {
	p := &Pair{name: name, certFile: certFile, keyFile: keyFile, whose: ofServer, hosts: hosts}
	return p, p.open(f, setting)
}

func (p *Pair) open(f *Files, setting string) error {
	w, err := f.open(setting, p)
	if err == nil {
		p.again = w.look
	}
	return err
}

func (p *Pair) paths() []string {
	if p.certFile == p.keyFile {
		return []string{p.certFile}
	}
	return []string{p.certFile, p.keyFile}
}

func (p *Pair) load(c []content, now time.Time) (func(), []string, error) {
	if !slices.EqualFunc(c, p.paths(), func(c content, path string) bool { return c.file == path }) {
		return nil, nil, errs.New(errs.Invalid, "%s is a directory; name the file itself", strings.Join(p.paths(), " or "))
	}
	cert, key := c[0], c[len(c)-1]
	s, err := checkPair(p.whose, cert, key, now)
	if err != nil {
		return nil, nil, err
	}
	for _, h := range p.hosts {
		if s.pair.Leaf.VerifyHostname(h.Name) != nil {
			return nil, nil, errs.New(errs.Invalid, "certificate file %s: the certificate (%s) is not for %q, which clients use as %s says, but for %q; give the server a certificate that has the name, or set one of these there",
				cert.file, called(s.pair.Leaf), h.Name, h.Setting, s.sans)
		}
	}
	var notes []string
	if key.mode.Perm()&0o007 != 0 {
		notes = append(notes, fmt.Sprintf("key file %s can be read by every user of this machine (mode %v); chmod 600 it, or mount it with defaultMode 0400", key.file, key.mode.Perm()))
	}
	return func() { p.now.Store(s) }, notes, nil
}

func (p *Pair) life() (begin, end time.Time) {
	s := p.now.Load()
	return s.begin, s.end
}

func (p *Pair) expiries() []Expiry {
	leaf := p.now.Load().pair.Leaf
	return []Expiry{{Name: p.name, File: p.certFile, Subject: called(leaf), NotAfter: p.now.Load().end}}
}

// Certificate returns the pair to show now. Where it has ended, the files are
// looked at once more; what has ended is never shown, and the error names the
// file.
func (p *Pair) Certificate() (*tls.Certificate, error) {
	s := p.now.Load()
	if time.Now().After(s.end) {
		p.again()
		if s = p.now.Load(); time.Now().After(s.end) {
			return nil, errs.New(errs.Unavailable, "certificate file %s ended at %s; put a new certificate there", p.certFile, s.end.UTC().Format(time.RFC3339))
		}
	}
	return s.pair, nil
}

// TLS returns a configuration for a server: TLS 1.2 and newer, the current
// certificate at each handshake, no session tickets. The caller may change it.
func (p *Pair) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.Certificate() },
	}
}

// CA returns the certificates of the file as PEM: clients that know nothing
// better verify the server with them.
func (p *Pair) CA() []byte { return slices.Clone(p.now.Load().text) }

// SANs returns the names and addresses that the certificate is valid for.
func (p *Pair) SANs() []string { return slices.Clone(p.now.Load().sans) }

// Pool is a set of authorities, from a bundle file or from the *.pem and *.crt
// files of a directory, that is watched.
type Pool struct {
	name, path string
	now        atomic.Pointer[trusted]
	changes    atomic.Uint64
}

type trusted struct {
	certs []*x509.Certificate
	files []string // where each certificate comes from
}

// Clients loads certificates that clients are verified with, and watches them.
// Each is an authority, or a client's own certificate, which then is trusted by
// itself. Those that have ended are left out, with a warning. A file must hold
// at least one that is valid; a directory may be empty: then nobody is trusted.
// Errors begin with the setting, name the file and say how to mend it.
func (f *Files) Clients(name, setting, path string) (*Pool, error) {
	p := &Pool{name: name, path: path}
	if _, err := f.open(setting, p); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Pool) paths() []string { return []string{p.path} }

func (p *Pool) load(all []content, now time.Time) (func(), []string, error) {
	t := new(trusted)
	var notes []string
	for _, c := range all {
		certs, err := strictCerts(c.data, maxPoolCerts, false)
		if err != nil {
			return nil, nil, errs.New(errs.Invalid, "certificate file %s: %w", c.file, err)
		}
		for i, cert := range certs {
			if why := cannotSign(cert); why != "" && !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
				return nil, nil, errs.New(errs.Invalid, "certificate file %s: certificate %d (%s) is neither an authority nor a client's certificate: %s, and its extended key usage lacks clientAuth; put the authority there that signed the clients' certificates", c.file, i+1, called(cert), why)
			}
			if now.After(cert.NotAfter) {
				notes = append(notes, fmt.Sprintf("certificate file %s: certificate %d (%s) ended at %s; clients that rest on it are refused", c.file, i+1, called(cert), cert.NotAfter.UTC().Format(time.RFC3339)))
				continue
			}
			t.certs, t.files = append(t.certs, cert), append(t.files, c.file)
		}
	}
	if len(t.certs) > maxPoolCerts {
		return nil, nil, errs.New(errs.Invalid, "%s holds %d certificates, the limit is %d", p.path, len(t.certs), maxPoolCerts)
	}
	if len(t.certs) == 0 {
		if len(all) > 0 {
			return nil, nil, errs.New(errs.Invalid, "every certificate of %s has ended; put one there that is valid", p.path)
		}
		notes = append(notes, fmt.Sprintf("there is no *.pem or *.crt file in %s: no client certificate is taken", p.path))
	}
	return func() {
		p.now.Store(t)
		p.changes.Add(1)
	}, notes, nil
}

// cannotSign returns why a certificate is no authority (RFC 5280, 4.2.1.9 and
// 4.2.1.3: without the extension its key's usage is not limited), or nothing.
func cannotSign(c *x509.Certificate) string {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA:
		return "it has no basic constraint CA:TRUE"
	case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
		return "its key usage lacks keyCertSign"
	}
	return ""
}

func (p *Pool) life() (begin, end time.Time) {
	for _, c := range p.now.Load().certs {
		if end.IsZero() || c.NotAfter.Before(end) {
			begin, end = c.NotBefore, c.NotAfter
		}
	}
	return begin, end
}

func (p *Pool) expiries() []Expiry {
	t := p.now.Load()
	out := make([]Expiry, len(t.certs))
	for i, c := range t.certs {
		out[i] = Expiry{Name: p.name, File: t.files[i], Subject: called(c), NotAfter: c.NotAfter}
	}
	return out
}

// Certificates returns what is trusted now. It must not be changed.
func (p *Pool) Certificates() []*x509.Certificate { return p.now.Load().certs }

// Version grows with each change of what is trusted. Whoever keeps something
// that was made of Certificates asks for the version first.
func (p *Pool) Version() uint64 { return p.changes.Load() }

// called is a certificate's subject, or its first name where that is empty.
func called(c *x509.Certificate) string {
	switch {
	case len(c.Subject.Names) > 0:
		return c.Subject.String()
	case len(c.DNSNames) > 0:
		return c.DNSNames[0]
	case len(c.IPAddresses) > 0:
		return c.IPAddresses[0].String()
	case len(c.URIs) > 0:
		return c.URIs[0].String()
	}
	return "serial number " + c.SerialNumber.String()
}

// side is whose a pair is: it is checked for what the other one demands of it.
type side struct{ self, other string }

var (
	ofServer = side{"server", "clients"}
	ofClient = side{"client", "servers"}
)

// checkPair makes a pair of two files' content.
func checkPair(whose side, cert, key content, now time.Time) (*shown, error) {
	certs, err := strictCerts(cert.data, maxChain, cert.file == key.file)
	if err != nil {
		return nil, errs.New(errs.Invalid, "certificate file %s: %w", cert.file, err)
	}
	signer, err := strictKey(key.data, cert.file == key.file)
	if err != nil {
		return nil, errs.New(errs.Invalid, "key file %s: %w", key.file, err)
	}
	fault := func(format string, args ...any) (*shown, error) {
		return nil, errs.New(errs.Invalid, "certificate file "+strings.ReplaceAll(cert.file, "%", "%%")+": "+format, args...)
	}
	leaf := certs[0]
	if !samePublic(signer.Public(), leaf.PublicKey) {
		if i := slices.IndexFunc(certs, func(c *x509.Certificate) bool { return samePublic(signer.Public(), c.PublicKey) }); i > 0 {
			return fault("the key's certificate (%s) is the one at place %d; the %s's certificate must be the first, then each one's issuer", called(certs[i]), i+1, whose.self)
		}
		return nil, errs.New(errs.Invalid, "key file %s is not the key of certificate file %s (%s); give the pair that belongs together", key.file, cert.file, called(leaf))
	}
	s := &shown{pair: &tls.Certificate{Leaf: leaf, PrivateKey: signer}, begin: leaf.NotBefore, end: leaf.NotAfter, sans: slices.Concat(leaf.DNSNames, ipTexts(leaf.IPAddresses))}
	for i, c := range certs {
		switch {
		case now.After(c.NotAfter):
			return fault("certificate %d (%s) expired at %s; put a new certificate there", i+1, called(c), c.NotAfter.UTC().Format(time.RFC3339))
		case now.Before(c.NotBefore):
			return fault("certificate %d (%s) is not valid before %s; check the clock of this machine, or wait", i+1, called(c), c.NotBefore.UTC().Format(time.RFC3339))
		case weak(c.SignatureAlgorithm):
			return fault("certificate %d (%s) is signed with %s, which %s refuse; have it made with SHA-256", i+1, called(c), c.SignatureAlgorithm, whose.other)
		}
		if i+1 < len(certs) {
			if err := c.CheckSignatureFrom(certs[i+1]); err != nil {
				return fault("certificate %d (%s) was not signed by certificate %d (%s): %w; the order is the %s's certificate first, then each one's issuer, nothing else", i+1, called(c), i+2, called(certs[i+1]), err, whose.self)
			}
		}
		if c.NotAfter.Before(s.end) {
			s.end = c.NotAfter
		}
		s.last = c
		s.pair.Certificate = append(s.pair.Certificate, c.Raw)
		s.text = append(s.text, encodeCert(c.Raw)...)
	}
	limited := len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) > 0
	switch {
	case whose == ofClient && limited && !usable(leaf, x509.ExtKeyUsageClientAuth):
		return fault("the certificate (%s) is not for clients: its extended key usage lacks clientAuth; have one made with it, such as by kumactl generate tls-certificate --type=client", called(leaf))
	case whose == ofClient:
	case len(leaf.DNSNames)+len(leaf.IPAddresses) == 0:
		return fault("the certificate (%s) names no host: it has no DNS name and no address as subject alternative name, and clients look at nothing else; have one made with them, such as by kumactl generate tls-certificate --type=server --hostname=NAME", called(leaf))
	case limited && !usable(leaf, x509.ExtKeyUsageServerAuth):
		return fault("the certificate (%s) is not for servers: its extended key usage lacks serverAuth; have one made with it, such as by kumactl generate tls-certificate --type=server", called(leaf))
	}
	return s, nil
}

// usable reports whether a certificate's extended key usage has this one.
func usable(c *x509.Certificate, usage x509.ExtKeyUsage) bool {
	return slices.Contains(c.ExtKeyUsage, usage) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

func weak(a x509.SignatureAlgorithm) bool {
	return slices.Contains([]x509.SignatureAlgorithm{
		x509.UnknownSignatureAlgorithm, x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.DSAWithSHA256, x509.ECDSAWithSHA1,
	}, a)
}

// blocks reads a PEM text strictly: before a block there may be words (openssl
// writes them there), after the last there may not, and none may be damaged.
func blocks(text []byte) ([]*pem.Block, error) {
	var out []*pem.Block
	rest := text
	for {
		block, after := pem.Decode(rest)
		if block == nil {
			break
		}
		out, rest = append(out, block), after
	}
	switch begun := bytes.Count(text, []byte("-----BEGIN ")); {
	case begun > len(out):
		return nil, errs.New(errs.Invalid, "%d of its %d PEM blocks are damaged or cut off; copy the file again", begun-len(out), begun)
	case len(out) == 0 && len(bytes.TrimSpace(text)) == 0:
		return nil, errs.New(errs.Invalid, "it is empty")
	case len(out) == 0 && text[0] == 0x30:
		return nil, errs.New(errs.Invalid, "it is not PEM but seems to be DER; convert it with openssl x509 -inform der, or openssl pkey -inform der for a key")
	case len(out) == 0:
		return nil, errs.New(errs.Invalid, "it is not PEM; PEM begins with a line such as -----BEGIN CERTIFICATE-----")
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errs.New(errs.Invalid, "after its last PEM block there are %d bytes of something else; remove them", len(bytes.TrimSpace(rest)))
	}
	return out, nil
}

// strictCerts reads certificates. Other blocks are an error, but for the key
// where both are in one file.
func strictCerts(text []byte, most int, withKey bool) ([]*x509.Certificate, error) {
	all, err := blocks(text)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for i, b := range all {
		isKey := strings.HasSuffix(b.Type, "PRIVATE KEY") || b.Type == "EC PARAMETERS"
		switch {
		case isKey && withKey:
			continue
		case isKey:
			return nil, errs.New(errs.Invalid, "PEM block %d is a private key (%q) where only certificates may be; are the two files swapped?", i+1, b.Type)
		case b.Type != "CERTIFICATE":
			return nil, errs.New(errs.Invalid, "PEM block %d is of type %q where only CERTIFICATE may be", i+1, b.Type)
		case len(certs) == most:
			return nil, errs.New(errs.Invalid, "there are more than %d certificates", most)
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, errs.New(errs.Invalid, "PEM block %d is not a valid certificate: %w", i+1, err)
		}
		if err := checkKey(c.PublicKey, 8192); err != nil {
			return nil, errs.New(errs.Invalid, "certificate %d (%s): %w", i+1, called(c), err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errs.New(errs.Invalid, "there is no PEM block of type CERTIFICATE")
	}
	return certs, nil
}

// strictKey reads one private key.
func strictKey(text []byte, withCerts bool) (crypto.Signer, error) {
	all, err := blocks(text)
	if err != nil {
		return nil, err
	}
	var keys []*pem.Block
	for i, b := range all {
		switch {
		case b.Type == "ENCRYPTED PRIVATE KEY" || b.Headers["DEK-Info"] != "":
			return nil, errs.New(errs.Invalid, "the key is encrypted; take the passphrase off with openssl pkey -in OLD -out NEW")
		case strings.HasSuffix(b.Type, "PRIVATE KEY"):
			keys = append(keys, b)
		case b.Type == "EC PARAMETERS", b.Type == "CERTIFICATE" && withCerts:
		case b.Type == "CERTIFICATE":
			return nil, errs.New(errs.Invalid, "PEM block %d is a certificate where only the key may be; are the two files swapped?", i+1)
		default:
			return nil, errs.New(errs.Invalid, "PEM block %d is of type %q; a private key is PEM of type PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY", i+1, b.Type)
		}
	}
	if len(keys) != 1 {
		return nil, errs.New(errs.Invalid, "it holds %d private keys; exactly one is needed", len(keys))
	}
	return parseKey(pem.EncodeToMemory(keys[0]))
}
