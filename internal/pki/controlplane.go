package pki

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kuma/internal/errs"
)

// The files of the control plane's own certificates in its work directory.
const (
	// CAFile is the control plane's authority, or a pair of the original that
	// is served as it is. Users give it to clients as --ca-cert-file.
	CAFile    = "kuma-cp.crt"
	CAKeyFile = "kuma-cp.key"
	// ServerFile is the certificate that all servers show.
	ServerFile    = "kuma-cp-server.crt"
	ServerKeyFile = "kuma-cp-server.key"
)

const (
	caLife         = 10 * Year
	serverLife     = 90 * 24 * time.Hour
	serverBackdate = 5 * time.Minute
)

// ControlPlaneConfig is what OpenControlPlane needs.
type ControlPlaneConfig struct {
	// Dir is the work directory; it is made with mode 0700.
	Dir string
	// CertFile and KeyFile, where given, are used instead of what is in Dir, as
	// they are now: Files watches them.
	CertFile, KeyFile string
	// Hostnames are names and addresses for the server's certificate beside
	// the machine's own.
	Hostnames []string
	// Machine lists this machine's own names and addresses; nil means its host
	// name and the address of every interface.
	Machine func() ([]string, error)
	// Every is how often Run looks whether the certificate fits, and a Rotator
	// whether the authority does; 0 means each minute.
	Every time.Duration
	// Vault keeps the authority where several control planes share it; nil
	// means Dir.
	Vault Vault
	// Former is where the authority may have been kept before, while control
	// planes shared one; it is taken over from there where Dir, which keeps it
	// now, has none with its key. Nil means nowhere.
	Former Vault
}

// ControlPlane holds the control plane's own certificates. It is safe for
// concurrent use.
type ControlPlane struct {
	config   ControlPlaneConfig
	vault    vault // nil where the pair is the user's
	made     bool
	warnings []string

	cert atomic.Pointer[tls.Certificate]
	view atomic.Pointer[view]

	mu sync.Mutex // held while anything below changes
	// version is the vault's of what view shows.
	version uint64
	// unsaved is a server's certificate that could not be written yet.
	unsaved func() error
	// looked is when it was last looked whether the certificate fits.
	looked time.Time

	watching sync.Mutex
	watchers map[chan struct{}]struct{}
}

// view is what readers see of the authority; it is never changed.
type view struct {
	state authorities
	// anchors are what users give to clients, bundle what proxies are sent.
	anchors, bundle []byte
	revision        int64
}

// OpenControlPlane loads the control plane's certificates, and makes those
// that are missing. Errors name the file, what is wrong with it and how to
// mend it.
//
// Without CertFile: Dir, or the Vault, holds an authority (P-256, ten years)
// and Dir a server certificate signed by it (90 days), which is made anew when
// it is missing, expired, two thirds through its life, or not for this
// machine's names. A pair of the original control plane in Dir (its own
// authority and server certificate in one) is served as it is until the
// authority is rotated. Files are written whole or not at all, so a crash never
// leaves half of one.
func OpenControlPlane(c ControlPlaneConfig) (*ControlPlane, error) {
	if c.Machine == nil {
		c.Machine = machine
	}
	if c.Every == 0 {
		c.Every = time.Minute
	}
	cp := &ControlPlane{config: c, watchers: map[chan struct{}]struct{}{}}
	if c.CertFile != "" || c.KeyFile != "" {
		if c.CertFile == "" || c.KeyFile == "" {
			return nil, errs.New(errs.Invalid, "only one of the certificate file (%q) and the key file (%q) is given; set both KUMA_GENERAL_TLS_CERT_FILE and KUMA_GENERAL_TLS_KEY_FILE, or none", c.CertFile, c.KeyFile)
		}
		given, err := NewFiles(FilesConfig{Log: slog.New(slog.DiscardHandler)}).Pair("general", "KUMA_GENERAL_TLS_CERT_FILE", c.CertFile, c.KeyFile)
		if err != nil {
			return nil, err
		}
		shown, err := given.Certificate()
		if err != nil {
			return nil, err
		}
		cp.view.Store(&view{anchors: given.CA()})
		cp.cert.Store(shown)
		return cp, nil
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, errs.New(errs.Internal, "make the work directory: %w; set KUMA_GENERAL_WORK_DIR to one that can be written", err)
	}
	unlock, err := lockDir(c.Dir)
	if err != nil {
		return nil, errs.New(errs.Internal, "lock the work directory %s: %w", c.Dir, err)
	}
	defer unlock()
	if err := cp.open(); err != nil {
		return nil, err
	}
	return cp, nil
}

func (cp *ControlPlane) open() error {
	if left, err := filepath.Glob(cp.path("kuma-cp*.tmp")); err == nil { // a killed writer's
		for _, file := range left {
			os.Remove(file) // what can't be removed does no harm
		}
	}
	dir := dirVault{cp.config.Dir}
	cp.vault = dir
	if cp.config.Vault != nil {
		cp.vault = sharedVault{cp.config.Vault}
	}
	state, version, err := cp.first(dir)
	if err != nil {
		return err
	}
	if cp.config.Vault != nil {
		if err := cp.setAside(); err != nil {
			return err
		}
		if err := cp.writeAnchors(state); err != nil {
			return err
		}
	} else {
		cp.tighten(cp.path(CAKeyFile))
	}
	cp.show(state, version)
	if state.Step == StepSteady && state.current.serves {
		hosts, err := cp.hosts()
		if err != nil {
			return err
		}
		if lacks := missing(state.current.cert, hosts); len(lacks) > 0 {
			cp.warnings = append(cp.warnings, fmt.Sprintf("%s is not valid for %s; clients that use these names refuse it. Replace it with an authority that signs certificates for them: kumactl ca rotate control-plane", cp.path(CAFile), strings.Join(lacks, ", ")))
		}
	}
	if old, _, err := LoadPair(cp.path(ServerFile), cp.path(ServerKeyFile)); err == nil {
		cp.cert.Store(old)
	}
	return cp.fit(true)
}

// first returns the authority that is kept, or makes the first one. Where
// another control plane is quicker to keep one, that one counts. A directory that
// is not the only place loses its say where it lacks the key: kuma-cp.crt alone is
// what a control plane writes out.
func (cp *ControlPlane) first(dir dirVault) (authorities, uint64, error) {
	for attempt := 0; ; attempt++ {
		lacks := ""
		if cp.config.Vault != nil || cp.config.Former != nil {
			lacks = dir.lacks()
		}
		if cp.config.Vault == nil && cp.config.Former != nil && lacks != "" {
			state, version, err := sharedVault{cp.config.Former}.load()
			if err != nil {
				return state, 0, err
			}
			if version > 0 {
				if err := cp.setAside(); err != nil {
					return state, 0, err
				}
				cp.warnings = append(cp.warnings, fmt.Sprintf("the authority was taken over from the store into %s; remove the secret in the store once no control plane shares it any more", cp.config.Dir))
				_, err = cp.vault.save(state, 0)
				return state, 0, err
			}
		}
		state, version, err := cp.vault.load()
		if err != nil || state.current.cert != nil {
			return state, version, err
		}
		made := false
		if cp.config.Vault != nil && lacks == "" { // what is in the directory is taken over, once
			if state, _, err = dir.load(); err != nil {
				return state, 0, err
			}
		} else if cp.config.Vault != nil && lacks != nothing && attempt == 0 {
			cp.warnings = append(cp.warnings, fmt.Sprintf("the store has no authority, and that in %s can't be taken over: %s. A new one is made, and written to %s: give it to clients", cp.config.Dir, lacks, CAFile))
		}
		if state.current.cert == nil {
			made = true
			if state.current, err = newAuthority(); err != nil {
				return state, 0, err
			}
			state.Step = StepSteady
		}
		version, err = cp.vault.save(state, version)
		if errs.Is(err, errs.Conflict) && attempt < 5 {
			continue
		}
		cp.made = made
		return state, version, err
	}
}

// Alone tells whether the authority is in Dir and nowhere else: neither a Vault
// has it, nor has a Former kept it.
func (cp *ControlPlane) Alone() bool {
	if cp.config.Vault != nil {
		return false
	}
	if cp.config.Former == nil {
		return true
	}
	kept, _, err := sharedVault{cp.config.Former}.load()
	return err == nil && !bytes.Equal(kept.current.text, cp.view.Load().state.current.text)
}

// setAside moves a key out of the way that is not used while the authority is
// kept elsewhere, and what belongs to it.
func (cp *ControlPlane) setAside() error {
	var moved []string
	if cert, err := readFile(cp.path(CAFile)); err == nil && filled(cp.path(CAKeyFile)) {
		if err := writeFile(cp.path(CAFile+oldSuffix), cert); err != nil {
			return err
		}
	}
	for _, name := range []string{RotationFile, CAKeyFile} { // the key last: it says that there is something to do
		if !filled(cp.path(name)) {
			continue
		}
		if err := os.Rename(cp.path(name), cp.path(name+oldSuffix)); err != nil {
			return errs.New(errs.Internal, "move a key out of the way that is kept in the store now: %w", err)
		}
		if err := os.Chmod(cp.path(name+oldSuffix), 0o600); err != nil {
			return errs.New(errs.Internal, "hide a key that is kept in the store now: %w", err)
		}
		moved = append(moved, name+oldSuffix)
	}
	if len(moved) > 0 {
		cp.warnings = append(cp.warnings, fmt.Sprintf("the authority comes from the store; what %s had of one was moved to %s: remove it once you are sure that the store is saved", cp.config.Dir, strings.Join(moved, " and ")))
	}
	return nil
}

// show makes an authority what readers see, and tells who watches.
func (cp *ControlPlane) show(state authorities, version uint64) {
	v := &view{state: state, anchors: state.anchors(), bundle: state.bundle()}
	v.revision = revisionOf(v.bundle)
	cp.version = version
	cp.view.Store(v)
	cp.watching.Lock()
	defer cp.watching.Unlock()
	for w := range cp.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// Refresh takes over what another control plane has put into the Vault. What
// can't be used is an error, and what was there goes on; an authority that has
// vanished is put back.
func (cp *ControlPlane) Refresh() error {
	if cp.config.Vault == nil {
		return nil
	}
	cp.mu.Lock()
	defer cp.mu.Unlock()
	return cp.reread()
}

// reread is Refresh with the lock held.
func (cp *ControlPlane) reread() error {
	state, version, err := cp.vault.load()
	if err != nil || version == cp.version && state.current.cert != nil {
		return err
	}
	if state.current.cert == nil {
		state = cp.view.Load().state
		if version, err = cp.vault.save(state, version); err != nil {
			return err
		}
	}
	cp.show(state, version)
	return errors.Join(cp.writeAnchors(state), cp.fit(false))
}

// keep saves a new state, shows it, and serves what fits it. Once it is saved it
// is kept, even where the rest fails.
func (cp *ControlPlane) keep(state authorities) (kept bool, err error) {
	version, err := cp.vault.save(state, cp.version)
	if errs.Is(err, errs.Conflict) {
		return false, errors.Join(errs.New(errs.Conflict, "another control plane has changed the authority at the same moment; look at where it is, and try again"), cp.reread())
	}
	if err != nil {
		return false, err
	}
	if cp.config.Vault == nil {
		state.retired = nil // it has its own files now
	}
	cp.show(state, version)
	if cp.config.Vault != nil {
		err = cp.writeAnchors(state)
	}
	return true, errors.Join(err, cp.fit(false))
}

// writeAnchors writes kuma-cp.crt where the authority is kept elsewhere.
func (cp *ControlPlane) writeAnchors(state authorities) error {
	want := state.anchors()
	if have, err := readFile(cp.path(CAFile)); err == nil && bytes.Equal(have, want) {
		return nil
	}
	return writeFile(cp.path(CAFile), want)
}

func (cp *ControlPlane) path(name string) string { return filepath.Join(cp.config.Dir, name) }

// machine lists this machine's own names and addresses.
func machine() ([]string, error) {
	var out []string
	if name, err := os.Hostname(); err == nil && plainHost(name) {
		out = append(out, name)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, errs.New(errs.Internal, "list this machine's addresses: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			out = append(out, n.IP.String())
		}
	}
	return out, nil
}

// hosts returns the names and addresses that the server's certificate is for;
// the first is a name.
func (cp *ControlPlane) hosts() ([]string, error) {
	own, err := cp.config.Machine()
	if err != nil {
		return nil, err
	}
	dns, ips, err := splitHosts(slices.Concat(own, []string{"localhost"}, cp.config.Hostnames, []string{"127.0.0.1", "::1"}))
	if err != nil {
		return nil, errs.New(errs.Invalid, "host names of the control plane: %w", err)
	}
	return slices.Concat(dns, ipTexts(ips)), nil
}

// fit makes sure that the certificate which is served fits the authority, this
// machine and the time. Exact wants exactly this machine's names; otherwise
// one that is gone does no harm.
func (cp *ControlPlane) fit(exact bool) error {
	if cp.unsaved != nil && cp.unsaved() == nil {
		cp.unsaved = nil
	}
	signer, cross := cp.view.Load().state.signer()
	if signer.serves { // a pair of the original
		if now := cp.cert.Load(); now == nil || !now.Leaf.Equal(signer.cert) {
			cp.cert.Store(&tls.Certificate{Certificate: [][]byte{signer.cert.Raw}, PrivateKey: signer.key, Leaf: signer.cert})
		}
		return nil
	}
	now := cp.cert.Load()
	hosts, err := cp.hosts()
	if err != nil {
		if now == nil {
			return err
		}
		hosts = sans(now.Leaf)
	}
	clock, last := time.Now(), cp.looked
	if clock.After(last) {
		cp.looked = clock
	}
	if now == nil || !signer.fits(now.Leaf, hosts, exact, clock, last) {
		return cp.makeServer(signer, cross, hosts)
	}
	if len(now.Certificate) == 1+len(cross) && slices.EqualFunc(now.Certificate[1:], cross, bytes.Equal) {
		return nil
	}
	// The same certificate with another chain.
	next := &tls.Certificate{Certificate: append([][]byte{now.Leaf.Raw}, cross...), PrivateKey: now.PrivateKey, Leaf: now.Leaf}
	return cp.serve(next, func() error { return writeFile(cp.path(ServerFile), chain(next)) })
}

// makeServer signs a server certificate, serves it and saves it.
func (cp *ControlPlane) makeServer(ca authority, cross [][]byte, hosts []string) error {
	now := time.Now()
	if now.Before(ca.cert.NotBefore) || now.After(ca.cert.NotAfter) {
		return errs.New(errs.Invalid, "the authority in %s is valid from %s to %s, not now; set the clock right, or remove %s and %s to have new ones made", cp.path(CAFile), ca.cert.NotBefore.UTC().Format(time.RFC3339), ca.cert.NotAfter.UTC().Format(time.RFC3339), CAFile, CAKeyFile)
	}
	key, err := NewKey()
	if err != nil {
		return err
	}
	number, err := serial()
	if err != nil {
		return err
	}
	dns, ips, err := splitHosts(hosts)
	if err != nil {
		return err
	}
	end := now.Add(serverLife)
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: number, Subject: commonName(hosts[0]), DNSNames: dns, IPAddresses: ips,
		NotBefore: now.Add(-serverBackdate), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, ca.cert, key.signer.Public(), ca.key)
	if err != nil {
		return errs.New(errs.Internal, "sign the server's certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return errs.New(errs.Internal, "read the server's new certificate: %w", err)
	}
	keyPEM, err := key.PEM()
	if err != nil {
		return err
	}
	pair := &tls.Certificate{Certificate: append([][]byte{der}, cross...), PrivateKey: key.signer, Leaf: leaf}
	return cp.serve(pair, func() error { return writePair(cp.path(ServerFile), cp.path(ServerKeyFile), chain(pair), keyPEM) })
}

// serve shows a certificate at the next handshake. It is shown even where it
// can't be written, which is tried again: a full disk is no reason to let the
// one before expire.
func (cp *ControlPlane) serve(pair *tls.Certificate, save func() error) error {
	first := cp.cert.Load() == nil
	cp.cert.Store(pair)
	cp.unsaved, cp.looked = nil, time.Time{}
	err := save()
	if err != nil && !first {
		cp.unsaved = save
	}
	return err
}

// chain is what a certificate file holds.
func chain(pair *tls.Certificate) []byte {
	var out []byte
	for _, der := range pair.Certificate {
		out = append(out, encodeCert(der)...)
	}
	return out
}

// Run renews the server's certificate until the context ends: when two thirds
// of its life are gone, and when this machine has got a name or an address that
// it lacks. Open connections are not touched. A renewal that fails is handed to
// failed, which may be nil, and tried again.
func (cp *ControlPlane) Run(ctx context.Context, failed func(error)) error {
	if cp.vault == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(cp.config.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		cp.mu.Lock()
		err := cp.fit(false)
		if cp.config.Vault != nil { // what could not be written before
			err = errors.Join(err, cp.writeAnchors(cp.view.Load().state))
		}
		cp.mu.Unlock()
		if err != nil && failed != nil {
			failed(err)
		}
	}
}

// TLS returns a configuration for a server: TLS 1.2 and newer, the current
// certificate at each handshake, no session tickets (a resumed session would
// skip today's trust). The caller may change it.
func (cp *ControlPlane) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cp.certificate() },
	}
}

// certificate is the one to show now. One that has ended, since the machine
// slept or its clock was set, is renewed first; it is never shown.
func (cp *ControlPlane) certificate() (*tls.Certificate, error) {
	now := cp.cert.Load()
	if !time.Now().After(now.Leaf.NotAfter) {
		return now, nil
	}
	var err error
	if cp.vault != nil {
		cp.mu.Lock()
		err = cp.fit(false)
		cp.mu.Unlock()
	}
	if now = cp.cert.Load(); time.Now().After(now.Leaf.NotAfter) {
		return nil, errors.Join(errs.New(errs.Unavailable, "the control plane's certificate ended at %s", now.Leaf.NotAfter.UTC().Format(time.RFC3339)), err)
	}
	return now, nil
}

// CA returns what clients verify the servers with, as PEM: the authority, while
// it is rotated the old and the new one, or the certificates of CertFile.
func (cp *ControlPlane) CA() []byte { return slices.Clone(cp.view.Load().anchors) }

// Trust returns the anchors that proxies are to trust, as PEM, and the
// revision that names exactly these. Both are zero where the certificates are
// not the control plane's own.
func (cp *ControlPlane) Trust() (bundle []byte, revision int64) {
	v := cp.view.Load()
	return slices.Clone(v.bundle), v.revision
}

// Subscribe returns a channel that gets a signal after the authority may have
// changed; it holds one. Stop ends it.
func (cp *ControlPlane) Subscribe() (changed <-chan struct{}, stop func()) {
	w := make(chan struct{}, 1)
	cp.watching.Lock()
	defer cp.watching.Unlock()
	cp.watchers[w] = struct{}{}
	return w, func() {
		cp.watching.Lock()
		defer cp.watching.Unlock()
		delete(cp.watchers, w)
	}
}

// SANs returns the names and addresses that the server's certificate is valid
// for.
func (cp *ControlPlane) SANs() []string { return sans(cp.cert.Load().Leaf) }

// Expires returns when the server's certificate ends.
func (cp *ControlPlane) Expires() time.Time { return cp.cert.Load().Leaf.NotAfter }

// Expiries lists the authority, while it is rotated the next one as well, and
// the server's certificate; nothing where they are the user's.
func (cp *ControlPlane) Expiries() []Expiry {
	if cp.vault == nil {
		return nil // whoever watches the user's files lists them
	}
	leaf, s := cp.cert.Load().Leaf, cp.view.Load().state
	file := ""
	if cp.config.Vault == nil {
		file = cp.path(CAFile)
	}
	out := []Expiry{{Name: "control-plane-ca", File: file, Subject: named(s.current.cert), NotAfter: s.current.cert.NotAfter}}
	if s.next != nil {
		out = append(out, Expiry{Name: "control-plane-ca-next", File: file, Subject: named(s.next.cert), NotAfter: s.next.cert.NotAfter})
	}
	return append(out, Expiry{Name: "control-plane-server", File: cp.path(ServerFile), Subject: named(leaf), NotAfter: leaf.NotAfter})
}

// named is a certificate's subject, or its first name where it has none.
func named(c *x509.Certificate) string {
	if s := c.Subject.String(); s != "" {
		return s
	}
	if all := sans(c); len(all) > 0 {
		return all[0]
	}
	return "serial " + c.SerialNumber.Text(16)
}

// Made reports whether the authority was made by this start, so that clients
// can't know it yet.
func (cp *ControlPlane) Made() bool { return cp.made }

// Warnings returns what the operator should know, one sentence each.
func (cp *ControlPlane) Warnings() []string { return slices.Clone(cp.warnings) }

// tighten takes a key file's rights away from others.
func (cp *ControlPlane) tighten(file string) {
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm()&0o077 == 0 {
		return
	}
	if err := os.Chmod(file, 0o600); err != nil {
		cp.warnings = append(cp.warnings, fmt.Sprintf("%s can be read by others (mode %v), and that can't be changed: %v", file, info.Mode().Perm(), err))
		return
	}
	cp.warnings = append(cp.warnings, fmt.Sprintf("%s could be read by others (mode %v); it is 0600 now", file, info.Mode().Perm()))
}

// LoadPair reads a certificate, leaf first, and its key from PEM files, and
// checks that they belong together and are valid now. It returns the pair and
// its certificates as PEM. Errors are Invalid and name the file.
func LoadPair(certFile, keyFile string) (*tls.Certificate, []byte, error) {
	text, err := readFile(certFile)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "read the certificate: %w", err)
	}
	certs, err := parseCerts(text)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "certificate file %s: %w; it must be PEM, the server's certificate first", certFile, err)
	}
	keyText, err := readFile(keyFile)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "read the key: %w", err)
	}
	key, err := parseKey(keyText)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "key file %s: %w", keyFile, err)
	}
	pair := &tls.Certificate{Leaf: certs[0], PrivateKey: key}
	var clean []byte
	for _, c := range certs {
		pair.Certificate = append(pair.Certificate, c.Raw)
		clean = append(clean, encodeCert(c.Raw)...)
	}
	switch now := time.Now(); {
	case !samePublic(key.Public(), pair.Leaf.PublicKey):
		return nil, nil, errs.New(errs.Invalid, "key file %s is not the key of certificate file %s; give the pair that belongs together", keyFile, certFile)
	case now.After(pair.Leaf.NotAfter):
		return nil, nil, errs.New(errs.Invalid, "certificate file %s expired at %s; put a new certificate there", certFile, pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(pair.Leaf.NotBefore):
		return nil, nil, errs.New(errs.Invalid, "certificate file %s is not valid before %s; check the clock of this machine", certFile, pair.Leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	return pair, clean, nil
}

// serves reports whether a certificate can be shown by a server itself: it
// names hosts and is meant for servers.
func serves(c *x509.Certificate) bool {
	return len(c.DNSNames)+len(c.IPAddresses) > 0 && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
}

// sans are the names and addresses that a certificate is for.
func sans(c *x509.Certificate) []string {
	return slices.Concat(c.DNSNames, ipTexts(c.IPAddresses))
}

func missing(leaf *x509.Certificate, hosts []string) []string {
	return slices.DeleteFunc(slices.Clone(hosts), func(h string) bool { return leaf.VerifyHostname(h) == nil })
}

func ipTexts(ips []net.IP) []string {
	out := make([]string, len(ips))
	for i, ip := range ips {
		out[i] = ip.String()
	}
	return out
}

// there reports whether a file exists, emptied or not.
func there(file string) bool {
	_, err := os.Stat(file)
	return !errors.Is(err, fs.ErrNotExist)
}

func filled(file string) bool {
	info, err := os.Stat(file)
	return !errors.Is(err, fs.ErrNotExist) && (err != nil || info.Size() > 0)
}

// readFile reads a small file; a longer one is an error.
func readFile(file string) ([]byte, error) {
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, fmt.Errorf("%s is a directory", file)
	case info.Size() > maxPEM:
		return nil, fmt.Errorf("%s has %d bytes, the limit is %d", file, info.Size(), maxPEM)
	}
	return os.ReadFile(file)
}

// writePair saves a key and then its certificate. Whoever finds the key alone,
// or a pair that does not match, knows that the writer was killed.
func writePair(certFile, keyFile string, cert, key []byte) error {
	if err := writeFile(keyFile, key); err != nil {
		return err
	}
	return writeFile(certFile, cert)
}

// writeFile replaces a file (mode 0600) in one step: all of it is on disk
// before it has its name.
func writeFile(file string, data []byte) (err error) {
	defer func() {
		if err != nil {
			err = errs.New(errs.Internal, "write %s: %w", file, err)
		}
	}()
	dir := filepath.Dir(file)
	f, err := os.CreateTemp(dir, filepath.Base(file)+".*.tmp") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails after the rename, and then there is nothing to remove
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
