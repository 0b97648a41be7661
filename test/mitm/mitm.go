// Package mitm is a man in the middle for tests: certificates that no client may
// take, and a door that shows one of them to a client and passes on what it
// hears.
//
// A test of a client is the client's way to do something that matters through a
// Door: it must succeed with the good certificate, or the test shows nothing, and
// with each bad one it must fail before the door has heard a byte (HRD-02).
package mitm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Case is what a door shows.
type Case struct {
	// Name says what is wrong with it.
	Name string
	// Host is the name by which the client goes to the door.
	Host string
	// Cert is what the door shows.
	Cert tls.Certificate
	// Version is the newest version of TLS that the door speaks; 0 means the
	// newest there is.
	Version uint16
}

// Set is what the harness needs of certificates.
type Set struct {
	// CA is the authority that the client is told to trust, PEM.
	CA []byte
	// System is another one, PEM: that of the machine's own pool, for a client
	// that was told to trust CA alone.
	System []byte
	// Good are certificates that the client must take, Bad those that it must
	// not.
	Good, Bad []Case
}

// Authority signs.
type Authority struct {
	// Cert and Key are its own.
	Cert *x509.Certificate
	Key  crypto.Signer
	// Chain is what is sent with what it signs.
	Chain [][]byte
}

// PEM is the authority's certificate.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Cert.Raw})
}

// NewAuthority makes an authority; by signs it, nil means itself.
func NewAuthority(name string, by *Authority, change func(*x509.Certificate)) (*Authority, error) {
	t := template(name)
	t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	t.ExtKeyUsage, t.DNSNames = nil, nil
	if change != nil {
		change(t)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	self := &Authority{Cert: t, Key: key}
	if by == nil {
		by = self
	}
	cert, err := sign(t, by, key.Public())
	if err != nil {
		return nil, err
	}
	a := &Authority{Cert: cert, Key: key}
	if by != self {
		a.Chain = append([][]byte{cert.Raw}, by.Chain...)
	}
	return a, nil
}

// Leaf makes a certificate for a server called localhost, with its chain;
// change may make it worse.
func (a *Authority) Leaf(change func(*x509.Certificate)) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	return a.LeafOf(key, change)
}

// LeafOf is Leaf with a key that is at hand.
func (a *Authority) LeafOf(key crypto.Signer, change func(*x509.Certificate)) (tls.Certificate, error) {
	t := template("")
	if change != nil {
		change(t)
	}
	cert, err := sign(t, a, key.Public())
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: append([][]byte{cert.Raw}, a.Chain...), PrivateKey: key, Leaf: cert}, nil
}

func template(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{"localhost"},
		BasicConstraintsValid: true,
	}
}

func sign(t *x509.Certificate, by *Authority, key any) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, by.Cert, key, by.Key) // of a serial number that it makes
	if err != nil {
		return nil, fmt.Errorf("sign %q: %w", t.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

// maker collects cases and the first error.
type maker struct {
	out []Case
	err error
}

func (m *maker) authority(name string, by *Authority, change func(*x509.Certificate)) *Authority {
	if m.err != nil {
		return by
	}
	a, err := NewAuthority(name, by, change)
	m.err = err
	return a
}

func (m *maker) leaf(name string, by *Authority, change func(*x509.Certificate)) {
	if m.err != nil {
		return
	}
	cert, err := by.Leaf(change)
	m.err = err
	m.out = append(m.out, Case{Name: name, Host: "localhost", Cert: cert})
}

// last is the newest case, to be changed.
func (m *maker) last() *Case {
	if m.err != nil {
		return new(Case)
	}
	return &m.out[len(m.out)-1]
}

// Make makes all certificates.
func Make() (*Set, error) {
	var m maker
	ca, system := m.authority("trusted", nil, nil), m.authority("the machine's own", nil, nil)
	if m.err != nil {
		return nil, m.err
	}
	s := &Set{CA: ca.PEM(), System: system.PEM()}

	between := m.authority("between", ca, nil)
	m.leaf("good", ca, nil)
	m.leaf("good, with an intermediate", between, nil)
	m.leaf("good, for an address", ca, func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, []net.IP{net.IPv4(127, 0, 0, 1)} })
	m.last().Host = "127.0.0.1"
	s.Good, m.out = m.out, nil

	m.leaf("of an unknown authority", m.authority("unknown", nil, nil), nil)
	m.leaf("of an authority of the same name", m.authority("trusted", nil, nil), nil)
	m.leaf("of the machine's own pool, where another authority was named", system, nil)
	m.leaf("of a mesh's authority", m.authority("mesh", nil, func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "default"}}
	}), func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "default", Path: "/control-plane"}}
	})
	m.leaf("expired", ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	m.leaf("not yet valid", ca, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) })
	m.leaf("for another host", ca, func(c *x509.Certificate) { c.DNSNames = []string{"localhost.example"} })
	m.leaf("with a name in its subject alone", ca, func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames = "localhost", nil })
	m.leaf("with a wildcard that does not reach", ca, func(c *x509.Certificate) { c.DNSNames = []string{"*.localhost"} })
	m.leaf("with a bare wildcard", ca, func(c *x509.Certificate) { c.DNSNames = []string{"*"} })
	m.leaf("for another address", ca, func(c *x509.Certificate) {
		c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 2)}
	})
	m.last().Host = "127.0.0.1"
	m.leaf("with the address as a name", ca, func(c *x509.Certificate) { c.DNSNames = []string{"127.0.0.1"} })
	m.last().Host = "127.0.0.1"
	m.leaf("for clients only", ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
	m.leaf("signed by no authority (CA:FALSE)", m.authority("no authority", ca, func(c *x509.Certificate) { c.IsCA = false }), nil)
	m.leaf("of an authority for other names", m.authority("constrained", ca, func(c *x509.Certificate) {
		c.PermittedDNSDomainsCritical, c.PermittedDNSDomains = true, []string{"example.com"}
	}), nil)
	m.leaf("of an authority that has ended", m.authority("ended", ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), nil)
	m.leaf("of a chain longer than its authority allows", m.authority("deeper", m.authority("last", ca, func(c *x509.Certificate) { c.MaxPathLenZero = true }), nil), nil)
	m.leaf("without its intermediate", between, nil)
	m.last().Cert.Certificate = m.last().Cert.Certificate[:min(1, len(m.last().Cert.Certificate))]
	m.leaf("with a critical extension that nobody knows", ca, func(c *x509.Certificate) {
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 55555, 1}, Critical: true, Value: []byte{5, 0}}}
	})
	m.leaf("another's, without its key", ca, nil)
	if m.err == nil {
		m.last().Cert.PrivateKey, m.err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	m.leaf("with TLS 1.1", ca, nil)
	m.last().Version = tls.VersionTLS11
	if m.err != nil {
		return nil, m.err
	}
	self, err := selfSigned()
	if err != nil {
		return nil, err
	}
	old, root, err := sha1Signed()
	if err != nil {
		return nil, err
	}
	// Its authority is trusted too, so that only the signature is wrong.
	s.CA = append(s.CA, root...)
	s.Bad = append(m.out, self, old)
	return s, nil
}

// selfSigned is signed by nobody else, with the right name.
func selfSigned() (Case, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Case{}, err
	}
	t := template("localhost")
	cert, err := sign(t, &Authority{Cert: t, Key: key}, key.Public())
	if err != nil {
		return Case{}, err
	}
	return Case{Name: "signed by itself", Host: "localhost", Cert: tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}}, nil
}

// sha1Signed is a leaf with a signature of SHA-1, and its authority as PEM.
func sha1Signed() (c Case, root []byte, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return Case{}, nil, err
	}
	t := template("SHA-1")
	t.IsCA, t.KeyUsage, t.ExtKeyUsage, t.DNSNames = true, x509.KeyUsageCertSign, nil, nil
	cert, err := sign(t, &Authority{Cert: t, Key: key}, key.Public())
	if err != nil {
		return Case{}, nil, err
	}
	a := &Authority{Cert: cert, Key: key}
	leaf, err := a.Leaf(func(c *x509.Certificate) { c.SignatureAlgorithm = x509.SHA1WithRSA })
	return Case{Name: "signed with SHA-1", Host: "localhost", Cert: leaf}, a.PEM(), err
}

// Door is a port that ends a client's TLS and passes on what it hears.
type Door struct {
	cfg     DoorConfig
	port    int
	both    []net.Listener // of IPv4 and of IPv6, where there is that
	heard   atomic.Int64
	refused chan string

	mu    sync.Mutex
	conns map[net.Conn]bool
}

// DoorConfig is what Open needs.
type DoorConfig struct {
	// Show chooses what to show by what the client says of itself. Watched tells
	// whether what the client sends then is counted as heard.
	Show func(*tls.ClientHelloInfo) (c Case, watched bool)
	// To is the server behind the door; TLS is how to connect to it, the
	// protocols are the client's own choice.
	To  string
	TLS *tls.Config
	// Postgres says that both sides speak PostgreSQL, where a client asks for TLS
	// before it begins with it.
	Postgres bool
	// Serve, where To is empty, speaks with the client instead.
	Serve func(net.Conn)
	// ClientCAs, where set, has the door demand a client's certificate.
	ClientCAs *x509.CertPool
}

// Open opens a door on a free port of localhost.
func Open(cfg DoorConfig) (*Door, error) {
	var err error
	for range 10 {
		d := &Door{cfg: cfg, refused: make(chan string, 1000), conns: map[net.Conn]bool{}}
		if err = d.open(); err == nil {
			return d, nil
		}
	}
	return nil, err
}

func (d *Door) open() error {
	four, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	d.both, d.port = []net.Listener{four}, four.Addr().(*net.TCPAddr).Port
	six, err := net.Listen("tcp6", fmt.Sprintf("[::1]:%d", d.port))
	switch {
	case err == nil:
		d.both = append(d.both, six)
	case errors.Is(err, syscall.EADDRINUSE):
		_ = four.Close()
		return err
	}
	for _, l := range d.both {
		go d.run(l)
	}
	return nil
}

// Port is the door's.
func (d *Door) Port() int { return d.port }

// Heard is how many bytes clients sent after they had accepted what was shown to
// them, of those that are watched.
func (d *Door) Heard() int64 { return d.heard.Load() }

// Refused says for each client that is watched and went away in the handshake
// what it said.
func (d *Door) Refused() <-chan string { return d.refused }

// Close ends the door and all that it passes on.
func (d *Door) Close() error {
	var err error
	for _, l := range d.both {
		err = errors.Join(err, l.Close())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		_ = c.Close()
	}
	return err
}

func (d *Door) keep(c net.Conn) (drop func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[c] = true
	return func() {
		_ = c.Close()
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.conns, c)
	}
}

func (d *Door) run(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go d.pass(c)
	}
}

func (d *Door) pass(raw net.Conn) {
	defer d.keep(raw)()
	_ = raw.SetDeadline(time.Now().Add(30 * time.Second))
	if d.cfg.Postgres && askedForTLS(raw) != nil {
		return
	}
	watched := false
	var behind net.Conn
	conn := tls.Server(raw, &tls.Config{
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			var c Case
			c, watched = d.cfg.Show(hello)
			cfg := &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: c.Version, Certificates: []tls.Certificate{c.Cert}}
			if d.cfg.ClientCAs != nil {
				cfg.ClientAuth, cfg.ClientCAs = tls.RequireAndVerifyClientCert, d.cfg.ClientCAs
			}
			if d.cfg.To == "" {
				cfg.NextProtos = hello.SupportedProtos
				return cfg, nil
			}
			out := d.cfg.TLS.Clone()
			out.NextProtos = hello.SupportedProtos
			to, err := d.reach(out)
			if err != nil {
				return nil, err
			}
			behind = to
			if p := to.ConnectionState().NegotiatedProtocol; p != "" {
				cfg.NextProtos = []string{p}
			}
			return cfg, nil
		},
	})
	err := conn.Handshake()
	_ = raw.SetDeadline(time.Time{})
	if behind != nil {
		defer d.keep(behind)()
	}
	if err != nil {
		if watched {
			select {
			case d.refused <- err.Error():
			default:
			}
		}
		return
	}
	if behind == nil {
		d.cfg.Serve(&counted{conn, d, watched})
		return
	}
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(behind, &counted{conn, d, watched})
		_ = behind.Close()
	})
	both.Go(func() {
		_, _ = io.Copy(conn, behind)
		_ = conn.Close()
	})
	both.Wait()
}

// reach connects to the server behind the door.
func (d *Door) reach(cfg *tls.Config) (*tls.Conn, error) {
	if !d.cfg.Postgres {
		return tls.Dial("tcp", d.cfg.To, cfg)
	}
	raw, err := net.Dial("tcp", d.cfg.To)
	if err != nil {
		return nil, err
	}
	if cfg.ServerName, _, err = net.SplitHostPort(d.cfg.To); err == nil {
		err = askForTLS(raw)
	}
	conn := tls.Client(raw, cfg)
	if err == nil {
		err = conn.Handshake()
	}
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return conn, nil
}

// sslRequest is PostgreSQL's question for TLS (Frontend/Backend Protocol,
// Message Formats, SSLRequest), to which the answer is one letter.
const sslRequest = "\x00\x00\x00\x08\x04\xd2\x16\x2f"

func askForTLS(c net.Conn) error {
	if _, err := io.WriteString(c, sslRequest); err != nil {
		return err
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if answer[0] != 'S' {
		return fmt.Errorf("the server answers %q, not S", answer)
	}
	return nil
}

func askedForTLS(c net.Conn) error {
	asked := make([]byte, len(sslRequest))
	if _, err := io.ReadFull(c, asked); err != nil {
		return err
	}
	if string(asked) != sslRequest {
		return fmt.Errorf("the client says %q, and does not ask for TLS", asked)
	}
	_, err := io.WriteString(c, "S")
	return err
}

// counted counts what is read.
type counted struct {
	net.Conn
	door    *Door
	watched bool
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.watched {
		c.door.heard.Add(int64(n))
	}
	return n, err
}
