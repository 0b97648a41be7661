package pki

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
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
	retryRenewal   = time.Minute
)

// ControlPlaneConfig is what OpenControlPlane needs.
type ControlPlaneConfig struct {
	// Dir is the work directory; it is made with mode 0700.
	Dir string
	// CertFile and KeyFile, where given, are used instead of what is in Dir.
	CertFile, KeyFile string
	// Hostnames are names and addresses for the server's certificate beside
	// the machine's own: host name, localhost and the address of every
	// interface.
	Hostnames []string
}

// ControlPlane holds the control plane's own certificates. It is safe for
// concurrent use.
type ControlPlane struct {
	config   ControlPlaneConfig
	ca       []byte
	cert     atomic.Pointer[tls.Certificate]
	made     bool
	warnings []string

	mu    sync.Mutex
	issue func(hosts []string) error // nil where the pair is not ours to renew
}

// OpenControlPlane loads the control plane's certificates, and makes those
// that are missing. Errors name the file, what is wrong with it and how to
// mend it.
//
// Without CertFile: Dir holds an authority (P-256, ten years) and a server
// certificate signed by it (90 days), which is made anew when it is missing,
// expired, two thirds through its life, or not for this machine's names. A
// pair of the original control plane in Dir (its own authority and server
// certificate in one) is served as it is. Files are written whole or not at
// all, so a crash never leaves half of one.
func OpenControlPlane(c ControlPlaneConfig) (*ControlPlane, error) {
	cp := &ControlPlane{config: c}
	if c.CertFile != "" || c.KeyFile != "" {
		if c.CertFile == "" || c.KeyFile == "" {
			return nil, errs.New(errs.Invalid, "only one of the certificate file (%q) and the key file (%q) is given; set both KUMA_GENERAL_TLS_CERT_FILE and KUMA_GENERAL_TLS_KEY_FILE, or none", c.CertFile, c.KeyFile)
		}
		pair, text, err := LoadPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, err
		}
		cp.ca = text
		cp.cert.Store(pair)
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
	certFile, keyFile := cp.path(CAFile), cp.path(CAKeyFile)
	switch haveCert, haveKey := filled(certFile), filled(keyFile); {
	case haveCert && !haveKey:
		return errs.New(errs.Invalid, "%s is there, but its key %s is missing; bring the key back, or remove the certificate to have a new authority made (clients then need the new %s)", certFile, keyFile, CAFile)
	case !haveCert: // a key alone was left by a crash: nobody trusts it yet
		if err := cp.makeCA(certFile, keyFile); err != nil {
			return err
		}
		cp.made = true
	}
	pair, text, err := LoadPair(certFile, keyFile)
	if err != nil {
		return errs.New(errs.KindOf(err), "%w; or remove both %s and %s to have new ones made (clients then need the new %s)", err, CAFile, CAKeyFile, CAFile)
	}
	cp.ca = text
	cp.tighten(keyFile)
	hosts, err := cp.hosts()
	if err != nil {
		return err
	}
	ca := pair.Leaf
	if serves(ca) {
		cp.cert.Store(pair)
		if lacks := missing(ca, hosts); len(lacks) > 0 {
			cp.warnings = append(cp.warnings, fmt.Sprintf("%s is not valid for %s; clients that use these names refuse it. Remove %s and %s to have new ones made", certFile, strings.Join(lacks, ", "), CAFile, CAKeyFile))
		}
		return nil
	}
	if err := CheckCA(ca); err != nil {
		return errs.New(errs.Invalid, "%s is neither an authority nor a server's certificate: %w; remove it and %s to have new ones made", certFile, err, CAKeyFile)
	}
	cp.issue = func(hosts []string) error { return cp.makeServer(ca, pair.PrivateKey, hosts) }
	old, _, err := LoadPair(cp.path(ServerFile), cp.path(ServerKeyFile))
	if err == nil && current(old.Leaf, ca, hosts) {
		cp.cert.Store(old)
		return nil
	}
	return cp.issue(hosts)
}

func (cp *ControlPlane) path(name string) string { return filepath.Join(cp.config.Dir, name) }

// hosts returns the names and addresses that the server's certificate is for.
func (cp *ControlPlane) hosts() ([]string, error) {
	var hosts []string
	if name, err := os.Hostname(); err == nil && plainHost(name) {
		hosts = append(hosts, name)
	}
	hosts = append(hosts, "localhost")
	hosts = append(hosts, cp.config.Hostnames...)
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, errs.New(errs.Internal, "list this machine's addresses: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			hosts = append(hosts, n.IP.String())
		}
	}
	dns, ips, err := splitHosts(append(hosts, "127.0.0.1", "::1"))
	if err != nil {
		return nil, errs.New(errs.Invalid, "host names of the control plane: %w", err)
	}
	return slices.Concat(dns, ipTexts(ips)), nil
}

func (cp *ControlPlane) makeCA(certFile, keyFile string) error {
	key, err := NewKey()
	if err != nil {
		return err
	}
	id := make([]byte, 4)
	rand.Read(id) // never fails (crypto/rand)
	cert, keyPEM, err := selfSign(key, &x509.Certificate{
		Subject:    pkix.Name{Organization: []string{"Kuma"}, CommonName: "kuma-cp CA " + hex.EncodeToString(id)},
		KeyUsage:   x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:       true,
		MaxPathLen: -1,
	}, serverBackdate, caLife)
	if err != nil {
		return err
	}
	return writePair(certFile, keyFile, cert, keyPEM)
}

// makeServer signs a server certificate, saves it and serves it.
func (cp *ControlPlane) makeServer(ca *x509.Certificate, caKey any, hosts []string) error {
	now := time.Now()
	if now.Before(ca.NotBefore) || now.After(ca.NotAfter) {
		return errs.New(errs.Invalid, "the authority in %s is valid from %s to %s, not now; set the clock right, or remove %s and %s to have new ones made", cp.path(CAFile), ca.NotBefore.UTC().Format(time.RFC3339), ca.NotAfter.UTC().Format(time.RFC3339), CAFile, CAKeyFile)
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
	if end.After(ca.NotAfter) {
		end = ca.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: number, Subject: commonName(hosts[0]), DNSNames: dns, IPAddresses: ips,
		NotBefore: now.Add(-serverBackdate), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, ca, key.signer.Public(), caKey)
	if err != nil {
		return errs.New(errs.Internal, "sign the server's certificate: %w", err)
	}
	keyPEM, err := key.PEM()
	if err != nil {
		return err
	}
	if err := writePair(cp.path(ServerFile), cp.path(ServerKeyFile), encodeCert(der), keyPEM); err != nil {
		return err
	}
	pair, _, err := LoadPair(cp.path(ServerFile), cp.path(ServerKeyFile))
	if err != nil {
		return err
	}
	cp.cert.Store(pair)
	return nil
}

// Run renews the server's certificate when two thirds of its life are gone,
// until the context ends. Open connections are not touched. A renewal that
// fails is handed to failed, which may be nil, and tried again each minute.
func (cp *ControlPlane) Run(ctx context.Context, failed func(error)) error {
	for {
		if cp.issue == nil {
			<-ctx.Done()
			return nil
		}
		leaf := cp.cert.Load().Leaf
		timer := time.NewTimer(time.Until(RenewAt(leaf.NotBefore, leaf.NotAfter, 0)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		err := cp.renew()
		if err == nil {
			continue
		}
		if failed != nil {
			failed(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryRenewal):
		}
	}
}

func (cp *ControlPlane) renew() error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	hosts, err := cp.hosts()
	if err != nil {
		return err
	}
	return cp.issue(hosts)
}

// TLS returns a configuration for a server: TLS 1.2 and newer, the current
// certificate at each handshake, no session tickets (a resumed session would
// skip today's trust). The caller may change it.
func (cp *ControlPlane) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cp.cert.Load(), nil },
	}
}

// CA returns what clients verify the servers with, as PEM: the authority, or
// the certificates of CertFile.
func (cp *ControlPlane) CA() []byte { return slices.Clone(cp.ca) }

// SANs returns the names and addresses that the server's certificate is valid
// for.
func (cp *ControlPlane) SANs() []string {
	leaf := cp.cert.Load().Leaf
	return slices.Concat(leaf.DNSNames, ipTexts(leaf.IPAddresses))
}

// Expires returns when the server's certificate ends.
func (cp *ControlPlane) Expires() time.Time { return cp.cert.Load().Leaf.NotAfter }

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

// current reports whether a server certificate can be kept: signed by the
// authority, for exactly the hosts, with more than a third of its life left.
func current(leaf, ca *x509.Certificate, hosts []string) bool {
	have, want := slices.Concat(leaf.DNSNames, ipTexts(leaf.IPAddresses)), slices.Clone(hosts)
	slices.Sort(have)
	slices.Sort(want)
	return leaf.CheckSignatureFrom(ca) == nil && slices.Equal(have, want) && time.Now().Before(RenewAt(leaf.NotBefore, leaf.NotAfter, 0))
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
