package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/internal/errs"
	"kuma/internal/pki"
)

// shake has a client meet a server over TLS. It returns what each of them says,
// and what the server saw.
func shake(t *testing.T, client, server *tls.Config) (seen tls.ConnectionState, clientErr, serverErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // both sides may write at once, which a net.Pipe does not bear
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = a.Close(), b.Close() }()
	end := time.Now().Add(30 * time.Second)
	_, _ = a.SetDeadline(end), b.SetDeadline(end)
	done := make(chan error, 1)
	s := tls.Server(b, server)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x"))
		}
		_ = b.Close()
		done <- err
	}()
	c := tls.Client(a, client)
	clientErr = c.Handshake()
	if clientErr == nil { // the server's verdict on the client comes after it
		_, clientErr = c.Read(make([]byte, 1))
	}
	_ = a.Close()
	serverErr = <-done
	return s.ConnectionState(), clientErr, serverErr
}

func (m *minted) server(chain ...*minted) *tls.Config {
	c := tls.Certificate{Certificate: [][]byte{m.cert.Raw}, PrivateKey: m.key}
	for _, more := range chain {
		c.Certificate = append(c.Certificate, more.cert.Raw)
	}
	return &tls.Config{Certificates: []tls.Certificate{c}}
}

// Each way of verifying a server takes and refuses what it says, and the name is
// sent unless it is not to be.
func TestClient(t *testing.T) {
	t.Parallel()
	root, stranger := mint(t, nil, asCA), mint(t, nil, asCA)
	between := mint(t, root, asCA)
	named := func(names ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = names, nil }
	}
	address := func(ip string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, []net.IP{net.ParseIP(ip)} }
	}
	servers := map[string]*tls.Config{
		"good":             mint(t, root, named("db.test")).server(),
		"by way":           mint(t, between, named("db.test")).server(between),
		"another name":     mint(t, root, named("other.test")).server(),
		"another CA":       mint(t, stranger, named("db.test")).server(),
		"for clients":      mint(t, root, func(c *x509.Certificate) { asClient(c); c.DNSNames = []string{"db.test"} }).server(),
		"expired":          mint(t, root, func(c *x509.Certificate) { named("db.test")(c); c.NotAfter = time.Now().Add(-time.Second) }).server(),
		"for an address":   mint(t, root, address("127.0.0.1")).server(),
		"for another":      mint(t, root, address("127.0.0.2")).server(),
		"in the name only": mint(t, root, func(c *x509.Certificate) { c.Subject.CommonName, c.DNSNames, c.IPAddresses = "db.test", nil, nil }).server(),
	}
	file := filepath.Join(t.TempDir(), "ca.crt")
	write(t, file, certPEM(root))
	watch, _ := files()
	anchors, err := watch.Anchors("ca", "--ca", file)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		client pki.Client
		taken  string
		sni    string
	}{
		"full":                        {pki.Client{Host: "db.test", Anchors: anchors}, "good, by way", "db.test"},
		"full, without SNI":           {pki.Client{Host: "db.test", Anchors: anchors, NoSNI: true}, "good, by way", ""},
		"full, an address":            {pki.Client{Host: "127.0.0.1", Anchors: anchors}, "for an address", ""},
		"full, an address, no SNI":    {pki.Client{Host: "127.0.0.1", Anchors: anchors, NoSNI: true}, "for an address", ""},
		"any name":                    {pki.Client{Host: "db.test", Anchors: anchors, AnyName: true}, "good, by way, another name, for an address, for another, in the name only", "db.test"},
		"any name, without SNI":       {pki.Client{Host: "db.test", Anchors: anchors, AnyName: true, NoSNI: true}, "good, by way, another name, for an address, for another, in the name only", ""},
		"unverified":                  {pki.Client{Host: "db.test", Unverified: true}, "good, by way, another name, another CA, for clients, expired, for an address, for another, in the name only", "db.test"},
		"unverified, and without SNI": {pki.Client{Host: "db.test", Unverified: true, NoSNI: true}, "good, by way, another name, another CA, for clients, expired, for an address, for another, in the name only", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for which, server := range servers {
				cfg, err := c.client.TLS()
				if err != nil {
					t.Fatal(err)
				}
				want := strings.Contains(", "+c.taken+",", ", "+which+",")
				sni := ""
				server = server.Clone()
				server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
					sni = h.ServerName
					return nil, nil
				}
				seen, err, _ := shake(t, cfg, server)
				if (err == nil) != want || sni != c.sni {
					t.Errorf("%s: %v, SNI %q", which, err, sni)
				}
				if err != nil && pki.DescribeVerify(err, "x", "y") == "" {
					t.Errorf("%s: refused, but not because of the certificate: %v", which, err)
				}
				if want && (seen.Version != tls.VersionTLS13 || seen.CurveID != tls.X25519MLKEM768) {
					t.Errorf("%s: %s, %s", which, tls.VersionName(seen.Version), seen.CurveID)
				}
				server.MaxVersion = tls.VersionTLS11
				if _, err, _ := shake(t, cfg, server); err == nil {
					t.Errorf("%s: it takes TLS 1.1", which)
				}
			}
		})
	}
	for name, c := range map[string]pki.Client{
		"no name to verify": {Anchors: anchors}, "nothing to verify by": {Host: "db.test"}, "both": {Host: "db.test", Anchors: anchors, Unverified: true},
	} {
		if _, err := c.TLS(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// What is replaced counts for the next connection.
func TestClientFilesAreReplaced(t *testing.T) {
	t.Parallel()
	one, two := mint(t, nil, asCA), mint(t, nil, asCA)
	first, second := mint(t, one, asClient), mint(t, two, asClient)
	at := newPlace(t)
	ca := filepath.Join(at.dir, "ca.crt")
	write(t, ca, certPEM(one))
	at.put(t, certPEM(first), first.keyPEM(t))
	watch, log := files()
	anchors, err := watch.Anchors("store-ca", "CA", ca)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := watch.ClientPair("store-client", "CERT", at.cert, at.key)
	if err != nil {
		t.Fatal(err)
	}
	client := pki.Client{Host: "cp.test", Anchors: anchors, Pair: pair}
	meet := func(ca *minted) (seen tls.ConnectionState, clientErr, serverErr error) {
		t.Helper()
		cfg, err := client.TLS()
		if err != nil {
			t.Fatal(err)
		}
		server := mint(t, ca, nil).server()
		server.ClientAuth, server.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
		server.ClientCAs.AddCert(ca.cert)
		return shake(t, cfg, server)
	}
	if seen, a, b := meet(one); a != nil || b != nil || !seen.PeerCertificates[0].Equal(first.cert) {
		t.Fatal(a, b)
	}
	if _, a, _ := meet(two); a == nil {
		t.Fatal("it takes what it does not know")
	}
	write(t, ca, certPEM(two))
	at.put(t, certPEM(second), second.keyPEM(t))
	watch.Look()
	if seen, a, b := meet(two); a != nil || b != nil || !seen.PeerCertificates[0].Equal(second.cert) {
		t.Fatal(a, b)
	}
	// What is bad is not taken over.
	write(t, at.cert, []byte("rubbish"))
	for range 5 {
		watch.Look()
	}
	if _, a, b := meet(two); a != nil || b != nil || watch.Refused() != 1 || len(log.lines("what was there before goes on")) != 1 {
		t.Error(a, b, watch.Refused())
	}
	if len(watch.Expiries()) != 2 {
		t.Errorf("%v", watch.Expiries())
	}
}

// A client's pair is read as strictly as a server's, but that it must be for
// clients and need not name a host.
func TestClientPair(t *testing.T) {
	t.Parallel()
	for name, c := range badPairs(t) {
		if name == "no names" || name == "for clients" {
			continue
		}
		at := newPlace(t)
		at.put(t, []byte(c.cert), []byte(c.key))
		watch, _ := files()
		_, err := watch.ClientPair("store-client", "KUMA_STORE_POSTGRES_TLS_CERT_PATH", at.cert, at.key)
		if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "KUMA_STORE_POSTGRES_TLS_CERT_PATH: ") ||
			!strings.Contains(err.Error(), strings.ReplaceAll(c.want, "the server's certificate", "the client's certificate")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"for clients":    {asClient, ""},
		"for anything":   {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, ""},
		"without limits": {func(c *x509.Certificate) { c.ExtKeyUsage = nil }, ""},
		"for servers":    {nil, "is not for clients: its extended key usage lacks clientAuth"},
	} {
		m := mint(t, nil, c.change)
		at := newPlace(t)
		at.put(t, certPEM(m), m.keyPEM(t))
		watch, _ := files()
		pair, err := watch.ClientPair("store-client", "CERT", at.cert, at.key)
		if c.want != "" {
			refused(t, err, "CERT: ", at.cert, c.want)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := pair.Certificate(); err != nil || !got.Leaf.Equal(m.cert) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// By what a client's pair is verified is not known here, so nothing is said of
// its chain.
func TestClientPairHasNoGap(t *testing.T) {
	t.Parallel()
	root := mint(t, nil, asCA)
	between := mint(t, root, asCA)
	client, server := mint(t, between, asClient), mint(t, between, nil)
	watch := pki.NewFiles(pki.FilesConfig{Known: func() []*x509.Certificate { return nil }, Log: slog.New(slog.DiscardHandler)})
	for _, m := range []*minted{client, server} {
		at := newPlace(t)
		at.put(t, certPEM(m), m.keyPEM(t))
		var err error
		if m == client {
			_, err = watch.ClientPair("client", "CERT", at.cert, at.key)
		} else {
			_, err = watch.Pair("server", "CERT", at.cert, at.key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if gaps := watch.Gaps(); len(gaps) != 1 || gaps[0].Name != "server" {
		t.Errorf("%v", gaps)
	}
}

// What DescribeVerify says of a name that is not the certificate's.
func TestClientSaysWhatItSaw(t *testing.T) {
	t.Parallel()
	root := mint(t, nil, asCA)
	file := filepath.Join(t.TempDir(), "ca.crt")
	write(t, file, certPEM(root))
	watch, _ := files()
	anchors, err := watch.Anchors("ca", "--ca", file)
	if err != nil {
		t.Fatal(err)
	}
	for _, noSNI := range []bool{false, true} {
		cfg, err := (&pki.Client{Host: "db.test", Anchors: anchors, NoSNI: noSNI}).TLS()
		if err != nil {
			t.Fatal(err)
		}
		_, err, _ = shake(t, cfg, mint(t, root, nil).server())
		if _, ok := errors.AsType[x509.HostnameError](err); !ok {
			t.Errorf("%v", err)
		}
		if got := pki.DescribeVerify(fmt.Errorf("connect: %w", err), "db.test", file); !strings.Contains(got, `asked for as "db.test"`) || !strings.Contains(got, "for cp.test, 127.0.0.1") {
			t.Error(got)
		}
	}
}
