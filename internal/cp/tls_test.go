package cp_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"kuma/internal/auth"
	"kuma/internal/cp"
	"kuma/internal/cp/cptest"
	"kuma/internal/envoy"
	"kuma/internal/pki"
)

// pairFiles are the files of a server's pair.
type pairFiles struct{ cert, key string }

// put replaces both files.
func (f pairFiles) put(t *testing.T, p cptest.Pair) {
	t.Helper()
	cert, key := p.PEM(t)
	for file, data := range map[string][]byte{f.cert: cert, f.key: key} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func newPairFiles(t *testing.T) pairFiles {
	dir := t.TempDir()
	return pairFiles{filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
}

// secured is a configuration whose general pair is the authority's, and whose
// files are looked at often.
func secured(t *testing.T, ca *cptest.CA) (cp.Config, pairFiles) {
	t.Helper()
	files := newPairFiles(t)
	files.put(t, ca.Pair(t, nil))
	cfg := config(t)
	cfg.General.TLSCertFile, cfg.General.TLSKeyFile = files.cert, files.key
	cfg.General.TLSReloadInterval = 5 * time.Millisecond
	cfg.Diagnostics.TLSEnabled, cfg.MonitoringAssignmentServer.TLSEnabled = true, true
	cfg.DPServer.Authn.DPProxy.Type = auth.ProxyNone
	return cfg, files
}

// doors are the addresses of all ports that speak TLS.
func doors(cfg cp.Config) map[string]string {
	at := func(port uint32) string { return fmt.Sprintf("127.0.0.1:%d", port) }
	return map[string]string{
		"KUMA_DP_SERVER":        at(cfg.DPServer.Port),
		"KUMA_API_SERVER_HTTPS": at(cfg.APIServer.HTTPS.Port),
		"KUMA_DIAGNOSTICS":      at(cfg.Diagnostics.ServerPort),

		"KUMA_MONITORING_ASSIGNMENT_SERVER": at(cfg.MonitoringAssignmentServer.Port),
	}
}

// handshake connects and returns what was agreed on. A refusal by the server of
// TLS 1.3 comes after the client's part, so a byte is read, too.
func handshake(t *testing.T, address string, c *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	c = c.Clone()
	c.NextProtos = []string{"http/1.1"}
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", address, c)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprint(conn, "GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return tls.ConnectionState{}, err
	}
	answer, err := io.ReadAll(conn)
	if err == nil && len(answer) == 0 {
		err = io.ErrUnexpectedEOF // as from a server to whom it took too long
	}
	if err != nil {
		return tls.ConnectionState{}, err
	}
	return conn.ConnectionState(), nil
}

// eventually returns when the condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// HRD-33: a hundred xDS streams and a connection to the API stay open
// while the certificate is replaced twenty times, in place and by symbolic
// links; each time new connections see the new one on every port, and what is
// told to proxies who ask for a bootstrap is of the new one.
func TestStreamsThroughReloads(t *testing.T) {
	t.Parallel()
	const streams, reloads = 100, 20
	ca := cptest.NewCA(t)
	cfg, _ := secured(t, ca)
	// The files are links into a directory that is swapped, as Kubernetes does it.
	dir := t.TempDir()
	files := pairFiles{filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
	swap := func(name string, p cptest.Pair) {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		pairFiles{filepath.Join(dir, name, "tls.crt"), filepath.Join(dir, name, "tls.key")}.put(t, p)
		tmp := filepath.Join(dir, "..tmp")
		if err := os.Symlink(name, tmp); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(tmp, filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	swap("..0", ca.Pair(t, nil))
	for _, name := range []string{"tls.crt", "tls.key"} {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	cfg.General.TLSCertFile, cfg.General.TLSKeyFile = files.cert, files.key
	run(t, cfg)

	clients := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}
	ctx, cancel := context.WithTimeout(t.Context(), 10*patience)
	defer cancel()
	proxies := make([]*cptest.ADS, streams)
	var dials atomic.Int64
	for i := range proxies {
		conn, err := grpc.NewClient(doors(cfg)["KUMA_DP_SERVER"], grpc.WithTransportCredentials(credentials.NewTLS(clients)),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				dials.Add(1)
				return new(net.Dialer).DialContext(ctx, "tcp", address)
			}))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		name := fmt.Sprintf("web-%d", i)
		proxies[i] = cptest.NewADS(cptest.ADSConfig{
			Conn: conn, Mesh: "default", Name: name, Metadata: cptest.Metadata(name, cptest.Dataplane("default", name, "web", "backend")),
		})
		if err := proxies[i].Connect(ctx); err != nil {
			t.Fatal(err)
		}
		defer proxies[i].Close()
	}
	for _, a := range proxies {
		if _, err := a.WaitComplete(ctx); err != nil {
			t.Fatal(err)
		}
	}
	var apiDials atomic.Int64
	api := &http.Client{Transport: &http.Transport{
		TLSClientConfig: clients, MaxConnsPerHost: 1, ForceAttemptHTTP2: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			apiDials.Add(1)
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}}
	defer api.CloseIdleConnections()
	ask := func() {
		r, err := api.Get("https://" + doors(cfg)["KUMA_API_SERVER_HTTPS"] + "/meshes/default")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, r.Body)
		_ = r.Body.Close()
		if r.StatusCode != http.StatusOK {
			t.Fatalf("the API answers %d", r.StatusCode)
		}
	}
	ask()
	for i := range reloads {
		next := ca.Pair(t, nil)
		if i%2 == 0 {
			swap(fmt.Sprintf("..r%d", i), next)
		} else {
			files.put(t, next) // in place, through the links
		}
		for name, address := range doors(cfg) {
			eventually(t, name, func() bool {
				s, err := handshake(t, address, clients)
				if err != nil {
					t.Fatal(err)
				}
				return s.PeerCertificates[0].Equal(next.Cert)
			})
		}
		ask()
		for _, a := range proxies {
			if err := a.View().Err; err != nil {
				t.Fatalf("after reload %d a stream ended: %v", i+1, err)
			}
		}
	}
	if n := dials.Load(); n != streams {
		t.Errorf("%d streams took %d connections", streams, n)
	}
	if n := apiDials.Load(); n != 1 {
		t.Errorf("the API's connection was opened %d times", n)
	}

	// The streams are not only open: what changes comes through.
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf("http://127.0.0.1:%d/meshes/default/dataplanes/backend-1", cfg.APIServer.HTTP.Port), strings.NewReader(cptest.Dataplane("default", "backend-1", "backend")))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusCreated {
		t.Fatalf("a Dataplane: %s", res.Status)
	}
	for _, a := range proxies {
		before := len(a.View().Events)
		if _, err := a.Wait(ctx, func(v cptest.View) bool {
			for name, e := range v.Resources[envoy.EndpointType] {
				if strings.HasPrefix(name, "backend") && strings.Contains(string(e.GetValue()), "127.0.0.1") {
					return true
				}
			}
			return false
		}); err != nil {
			t.Fatalf("after %d events: %v", before, err)
		}
	}
}

// TestBadPairsOfServers: a pair that can't be used ends the start, and the error
// names the setting of the server that has it. Put there later, each is refused,
// the log says so with the setting, and the old one goes on.
func TestBadPairsOfServers(t *testing.T) {
	t.Parallel()
	ca := cptest.NewCA(t)
	stranger := ca.Pair(t, nil)
	bad := []struct {
		put  func(*testing.T, pairFiles)
		want string
	}{
		{func(t *testing.T, f pairFiles) { p := ca.Pair(t, nil); p.Key = stranger.Key; f.put(t, p) }, "is not the key of certificate file"},
		{func(t *testing.T, f pairFiles) {
			f.put(t, ca.Pair(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			}))
		}, "expired at"},
		{func(t *testing.T, f pairFiles) {
			f.put(t, ca.Pair(t, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }))
		}, "is not valid before"},
		{func(t *testing.T, f pairFiles) {
			f.put(t, ca.Pair(t, func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, nil }))
		}, "names no host"},
		{func(t *testing.T, f pairFiles) {
			f.put(t, ca.Pair(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }))
		}, "lacks serverAuth"}, // HRD-31
		{func(t *testing.T, f pairFiles) { cut(t, f.cert, 100) }, "damaged or cut off"},
		{func(t *testing.T, f pairFiles) { cut(t, f.cert, 0) }, "it is empty"},
		{func(t *testing.T, f pairFiles) { cut(t, f.key, 100) }, "damaged or cut off"},
		{func(t *testing.T, f pairFiles) {
			if err := os.Remove(f.key); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
	}
	for _, c := range []struct {
		setting string
		of      func(*cp.Config) *cp.ServerTLS // nil: the general one
	}{
		{"KUMA_GENERAL_TLS_CERT_FILE", nil},
		{"KUMA_DP_SERVER_TLS_CERT_FILE", func(c *cp.Config) *cp.ServerTLS { return &c.DPServer.ServerTLS }},
		{"KUMA_API_SERVER_HTTPS_TLS_CERT_FILE", func(c *cp.Config) *cp.ServerTLS { return &c.APIServer.HTTPS.ServerTLS }},
		{"KUMA_DIAGNOSTICS_TLS_CERT_FILE", func(c *cp.Config) *cp.ServerTLS { return &c.Diagnostics.ServerTLS }},
		{"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_CERT_FILE", func(c *cp.Config) *cp.ServerTLS { return &c.MonitoringAssignmentServer.ServerTLS }},
		{"KUMA_MULTIZONE_GLOBAL_KDS_TLS_CERT_FILE", func(c *cp.Config) *cp.ServerTLS { return &c.Multizone.Global.KDS.ServerTLS }},
	} {
		t.Run(c.setting, func(t *testing.T) {
			cfg, files := secured(t, ca)
			if c.of != nil {
				files = newPairFiles(t)
				s := c.of(&cfg)
				s.TLSCertFile, s.TLSKeyFile = files.cert, files.key
			}
			mixed := ca.Pair(t, nil)
			mixed.Key = ca.Pair(t, nil).Key
			files.put(t, mixed)
			_, err := cp.New(t.Context(), cfg, slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), c.setting+": key file "+files.key+" is not the key of certificate file "+files.cert) {
				t.Errorf("error %v", err)
			}
			good := ca.Pair(t, nil)
			files.put(t, good)
			_, log := runLogged(t, cfg)
			// What a port shows that has this pair; the one for zones isn't open yet.
			shown := func() *x509.Certificate { return nil }
			server := strings.TrimSuffix(c.setting, "_TLS_CERT_FILE")
			if c.of == nil {
				server = "KUMA_DP_SERVER"
			}
			if address, ok := doors(cfg)[server]; ok {
				shown = func() *x509.Certificate {
					s, err := handshake(t, address, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"})
					if err != nil {
						t.Fatal(err)
					}
					return s.PeerCertificates[0]
				}
			}
			// lines counts the log's about this setting.
			lines := func(wants ...string) (n int) {
				for line := range strings.Lines(log.String()) {
					if strings.Contains(line, "setting="+c.setting+" ") && !slices.ContainsFunc(wants, func(w string) bool { return !strings.Contains(line, w) }) {
						n++
					}
				}
				return n
			}
			for i, b := range bad {
				before := lines("level=ERROR", "is refused", b.want)
				b.put(t, files)
				eventually(t, b.want, func() bool { return lines("level=ERROR", "is refused", b.want) > before })
				if now := shown(); now != nil && !now.Equal(good.Cert) {
					t.Errorf("%s: it is shown", b.want)
				}
				if n := lines("took over"); n != i {
					t.Errorf("%s: %d pairs were taken over, want %d", b.want, n, i)
				}
				good = ca.Pair(t, nil)
				files.put(t, good)
				eventually(t, "a good one", func() bool { return lines("took over") > i })
				if now := shown(); now != nil && !now.Equal(good.Cert) {
					t.Errorf("after %s: a good one is not shown", b.want)
				}
			}
		})
	}
}

// cut leaves the beginning of a file.
func cut(t *testing.T, file string, length int64) {
	t.Helper()
	if err := os.Truncate(file, length); err != nil {
		t.Fatal(err)
	}
}

// TestOneFile: certificate and key may be in one file, as with the original.
func TestOneFile(t *testing.T) {
	ca := cptest.NewCA(t)
	cfg, _ := secured(t, ca)
	cert, key := ca.Pair(t, nil).PEM(t)
	file := filepath.Join(t.TempDir(), "both.pem")
	if err := os.WriteFile(file, append(cert, key...), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.General.TLSCertFile, cfg.General.TLSKeyFile = file, file
	run(t, cfg)
	if _, err := handshake(t, doors(cfg)["KUMA_DP_SERVER"], &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}); err != nil {
		t.Error(err)
	}
}

// TestUnknownIssuer: a pair whose file lacks its intermediate is served, with one
// warning at the start and a note in the report; one that the control plane's own
// authority signed is not mentioned.
func TestUnknownIssuer(t *testing.T) {
	lacking := newPairFiles(t)
	lacking.put(t, cptest.NewCA(t).Under(t).Pair(t, nil))
	cfg := config(t)
	cfg.General.TLSReloadInterval = 5 * time.Millisecond
	stop := run(t, cfg)
	stop()
	cfg.DPServer.ServerTLS = cp.ServerTLS{TLSCertFile: lacking.cert, TLSKeyFile: lacking.key}
	cfg.MonitoringAssignmentServer.TLSEnabled = true
	cfg.MonitoringAssignmentServer.ServerTLS = cp.ServerTLS{TLSCertFile: filepath.Join(cfg.General.WorkDir, pki.ServerFile), TLSKeyFile: filepath.Join(cfg.General.WorkDir, pki.ServerKeyFile)}
	_, log := runLogged(t, cfg)
	const told = "a certificate file may lack an issuer"
	eventually(t, "a warning", func() bool { return strings.Contains(log.String(), told) })
	if said := log.String(); strings.Count(said, told) != 1 || !strings.Contains(said, "setting=KUMA_DP_SERVER_TLS_CERT_FILE") || !strings.Contains(said, lacking.cert) {
		t.Errorf("the log says %s", said)
	}
	res, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/tls-report", cfg.APIServer.HTTP.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	report, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(report), " lacks "); res.StatusCode != http.StatusOK || n != 1 {
		t.Errorf("%s, %d files lack something: %s", res.Status, n, report)
	}
}

// TestWhoWins: a server's own settings win over the general ones, and what is
// not set is as in general.
func TestWhoWins(t *testing.T) {
	ca := cptest.NewCA(t)
	cfg, _ := secured(t, ca)
	cfg.General.TLSMaxVersion = "TLSv1_2"
	own := newPairFiles(t)
	ownPair := ca.Pair(t, nil)
	own.put(t, ownPair)
	cfg.DPServer.ServerTLS = cp.ServerTLS{TLSCertFile: own.cert, TLSKeyFile: own.key, TLSMinVersion: "TLSv1_3", TLSMaxVersion: "TLSv1_3"}
	cfg.APIServer.HTTPS.TLSCipherSuites = []string{"TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"} // without what HTTP/2 demands
	run(t, cfg)
	clients := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}
	old := clients.Clone()
	old.MaxVersion = tls.VersionTLS12
	if _, err := handshake(t, doors(cfg)["KUMA_DP_SERVER"], old); err == nil {
		t.Error("TLS 1.2 is spoken on a port whose own minimum is 1.3")
	}
	s, err := handshake(t, doors(cfg)["KUMA_DP_SERVER"], clients)
	if err != nil || s.Version != tls.VersionTLS13 || !s.PeerCertificates[0].Equal(ownPair.Cert) {
		t.Errorf("the proxies' port: version %x, %v", s.Version, err)
	}
	s, err = handshake(t, doors(cfg)["KUMA_API_SERVER_HTTPS"], clients)
	if err != nil || s.Version != tls.VersionTLS12 || s.CipherSuite != tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 {
		t.Errorf("the API: version %x, suite %x, %v", s.Version, s.CipherSuite, err)
	}
	s, err = handshake(t, doors(cfg)["KUMA_DIAGNOSTICS"], clients)
	if err != nil || s.Version != tls.VersionTLS12 {
		t.Errorf("diagnostics: version %x, %v", s.Version, err)
	}
	// Older than 1.2 is never spoken.
	ancient := clients.Clone()
	ancient.MinVersion, ancient.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	for name, address := range doors(cfg) {
		if _, err := handshake(t, address, ancient); err == nil {
			t.Errorf("%s speaks TLS 1.1", name)
		}
	}
}

// TestPostQuantum: the hybrid key exchange is chosen wherever a client offers
// it, and who does not is refused where it is demanded.
func TestPostQuantum(t *testing.T) {
	t.Parallel()
	ca := cptest.NewCA(t)
	for _, demanded := range []bool{false, true} {
		t.Run(fmt.Sprintf("demanded %v", demanded), func(t *testing.T) {
			cfg, _ := secured(t, ca)
			cfg.General.TLSRequirePQ = demanded
			run(t, cfg)
			for name, address := range doors(cfg) {
				for what, c := range map[string]struct {
					curves  []tls.CurveID
					max     uint16
					want    tls.CurveID
					refused bool
				}{
					"Go's own choice":   {want: tls.X25519MLKEM768},
					"offered last":      {curves: []tls.CurveID{tls.X25519, tls.CurveP256, tls.X25519MLKEM768}, want: tls.X25519MLKEM768},
					"not offered":       {curves: []tls.CurveID{tls.X25519, tls.CurveP256}, want: tls.X25519, refused: demanded},
					"TLS 1.2":           {max: tls.VersionTLS12, want: tls.X25519, refused: demanded},
					"an older standard": {curves: []tls.CurveID{tls.CurveP256}, want: tls.CurveP256, refused: demanded},
				} {
					s, err := handshake(t, address, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", CurvePreferences: c.curves, MaxVersion: c.max})
					switch {
					case c.refused && err == nil:
						t.Errorf("%s, %s: is not refused", name, what)
					case !c.refused && (err != nil || s.CurveID != c.want):
						t.Errorf("%s, %s: %v, %v; want %v", name, what, s.CurveID, err, c.want)
					}
				}
			}
		})
	}
}

// bigSigner claims to have a key that nobody has.
type bigSigner struct {
	crypto.Signer
	public crypto.PublicKey
}

// Public is a crypto.Signer's.
func (b bigSigner) Public() crypto.PublicKey { return b.public }

// Sign is a crypto.Signer's: of the right length, and worth nothing.
func (b bigSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, b.public.(*rsa.PublicKey).Size()), nil
}

func hugeKey(t *testing.T, bits int) *rsa.PublicKey {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), uint(bits-1)))
	if err != nil {
		t.Fatal(err)
	}
	return &rsa.PublicKey{N: n.SetBit(n.SetBit(n, bits-1, 1), 0, 1), E: 65537}
}

// signedBy makes a client's certificate with a signature by RSA that has a
// length and is worth nothing.
func signedBy(t *testing.T, public crypto.PublicKey, length int) *x509.Certificate {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &x509.Certificate{Subject: pkix.Name{CommonName: "nobody"}}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, issuer, public, key)
	if err != nil {
		t.Fatal(err)
	}
	var parts struct {
		Certificate, Algorithm asn1.RawValue
		Signature              asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &parts); err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, length)
	rand.Read(signature[1:]) // never fails (crypto/rand); the first byte stays 0, so that it is less than the modulus
	parts.Signature = asn1.BitString{Bytes: signature, BitLength: 8 * length}
	if der, err = asn1.Marshal(parts); err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestClientCertificates of the API: demanded or not, by a file and a
// directory; who may not comes not in (HRD-24, HRD-31), and what it costs to
// find out has a bound (HRD-24).
func TestClientCertificates(t *testing.T) {
	servers, known, other, later := cptest.NewCA(t), cptest.NewCA(t), cptest.NewCA(t), cptest.NewCA(t)
	good := known.Client(t)
	expired := known.Pair(t, func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	aServers := servers.Pair(t, nil)
	knownServers := known.Pair(t, nil)
	clientUsage := func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }
	huge := hugeKey(t, 8200)
	hugeCert := known.Sign(t, huge, clientUsage)
	// Sixty intermediates that each might have signed it, with the largest keys
	// that are taken, and a signature of their length: as much arithmetic as one
	// hello can ask for.
	wide := hugeKey(t, 8192)
	leaf := signedBy(t, good.Key.Public(), wide.Size())
	endless := tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: good.Key}
	for range 60 {
		c := known.Sign(t, wide, func(c *x509.Certificate) {
			c.Subject, c.IsCA, c.KeyUsage, c.ExtKeyUsage = leaf.Issuer, true, x509.KeyUsageCertSign, nil
		})
		endless.Certificate = append(endless.Certificate, c.Raw)
	}
	long := good.TLS()
	for range 10 {
		long.Certificate = append(long.Certificate, known.Cert.Raw)
	}

	for _, required := range []bool{true, false} {
		t.Run(fmt.Sprintf("required %v", required), func(t *testing.T) {
			cfg, _ := secured(t, servers)
			ca := filepath.Join(t.TempDir(), "ca.pem")
			if err := os.WriteFile(ca, known.PEM(), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg.APIServer.HTTPS.RequireClientCert, cfg.APIServer.HTTPS.TLSCAFile = required, ca
			cfg.APIServer.Auth.ClientCertsDir = t.TempDir()
			run(t, cfg)
			address := doors(cfg)["KUMA_API_SERVER_HTTPS"]
			with := func(c ...tls.Certificate) *tls.Config {
				return &tls.Config{
					RootCAs: servers.Pool(), ServerName: "localhost",
					GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
						if len(c) == 0 {
							return new(tls.Certificate), nil
						}
						return &c[0], nil
					},
				}
			}
			for what, c := range map[string]struct {
				show []tls.Certificate
				in   bool
			}{
				"a good one":                        {[]tls.Certificate{good.TLS()}, true},
				"none":                              {nil, !required},
				"of another authority":              {[]tls.Certificate{other.Client(t).TLS()}, false},
				"expired":                           {[]tls.Certificate{expired.TLS()}, false},
				"a server's":                        {[]tls.Certificate{aServers.TLS()}, false},
				"a server's of the right authority": {[]tls.Certificate{knownServers.TLS()}, false},
				"a key of 8200 bits":                {[]tls.Certificate{{Certificate: [][]byte{hugeCert.Raw}, PrivateKey: bigSigner{public: huge}}}, false},
				"eleven certificates":               {[]tls.Certificate{long}, false},
				"sixty large intermediates":         {[]tls.Certificate{endless}, false},
			} {
				begin := time.Now()
				_, err := handshake(t, address, with(c.show...))
				if (err == nil) != c.in {
					t.Errorf("%s: %v", what, err)
				}
				if took := time.Since(begin); took > 10*time.Second {
					t.Errorf("%s: refused after %v", what, took)
				} else {
					t.Logf("%s: %v", what, took)
				}
			}

			// HRD-08: an authority that comes is trusted, one that goes is not, and
			// no session brings it back.
			file := filepath.Join(cfg.APIServer.Auth.ClientCertsDir, "later.crt")
			if err := os.WriteFile(file, later.PEM(), 0o600); err != nil {
				t.Fatal(err)
			}
			c := with(later.Client(t).TLS())
			c.ClientSessionCache = tls.NewLRUClientSessionCache(10)
			eventually(t, "an authority that comes", func() bool {
				_, err := handshake(t, address, c)
				return err == nil
			})
			if s, err := handshake(t, address, c); err != nil || s.DidResume {
				t.Errorf("a second connection: %v, resumed %v", err, s.DidResume)
			}
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			eventually(t, "an authority that goes", func() bool {
				_, err := handshake(t, address, c)
				return err != nil
			})
		})
	}
}

// HRD-08: no port resumes a session, in either version.
func TestNothingIsResumed(t *testing.T) {
	ca := cptest.NewCA(t)
	cfg, _ := secured(t, ca)
	run(t, cfg)
	for name, address := range doors(cfg) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			c := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", MaxVersion: version, ClientSessionCache: tls.NewLRUClientSessionCache(10)}
			for range 3 {
				if s, err := handshake(t, address, c); err != nil || s.DidResume {
					t.Errorf("%s, version %x: %v, resumed %v", name, version, err, s.DidResume)
				}
			}
		}
	}
}

// TestTLSSettings: what is wrong is said with the setting's name.
func TestTLSSettings(t *testing.T) {
	for _, c := range []struct {
		env  []string
		want string
	}{
		{[]string{"KUMA_GENERAL_TLS_CERT_FILE=/a"}, "KUMA_GENERAL_TLS_KEY_FILE: is missing, but KUMA_GENERAL_TLS_CERT_FILE is set"},
		{[]string{"KUMA_DP_SERVER_TLS_KEY_FILE=/a"}, "KUMA_DP_SERVER_TLS_CERT_FILE: is missing, but KUMA_DP_SERVER_TLS_KEY_FILE is set"},
		{[]string{"KUMA_API_SERVER_HTTPS_TLS_CERT_FILE=/a"}, "KUMA_API_SERVER_HTTPS_TLS_KEY_FILE: is missing"},
		{[]string{"KUMA_DIAGNOSTICS_TLS_CERT_FILE=/a"}, "KUMA_DIAGNOSTICS_TLS_KEY_FILE: is missing"},
		{[]string{"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_KEY_FILE=/a"}, "KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_CERT_FILE: is missing"},
		{[]string{"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_MAX_VERSION=x"}, "KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_MAX_VERSION: unsupported tls version: x"},
		{[]string{"KUMA_MULTIZONE_GLOBAL_KDS_TLS_CERT_FILE=/a"}, "KUMA_MULTIZONE_GLOBAL_KDS_TLS_KEY_FILE: is missing"},
		{[]string{"KUMA_GENERAL_TLS_MIN_VERSION=1.2"}, "KUMA_GENERAL_TLS_MIN_VERSION: unsupported tls version: 1.2 supported versions:[TLSv1_2 TLSv1_3]"},
		{[]string{"KUMA_DP_SERVER_TLS_MIN_VERSION=TLSv1_0"}, "KUMA_DP_SERVER_TLS_MIN_VERSION: unsupported tls version: TLSv1_0"},
		{[]string{"KUMA_API_SERVER_HTTPS_TLS_MAX_VERSION=x"}, "KUMA_API_SERVER_HTTPS_TLS_MAX_VERSION: unsupported tls version: x"},
		{[]string{"KUMA_MULTIZONE_GLOBAL_KDS_TLS_MIN_VERSION=x"}, "KUMA_MULTIZONE_GLOBAL_KDS_TLS_MIN_VERSION: unsupported tls version: x"},
		{[]string{"KUMA_INTER_CP_SERVER_TLS_MAX_VERSION=x"}, "KUMA_INTER_CP_SERVER_TLS_MAX_VERSION: unsupported tls version: x"},
		{[]string{"KUMA_DIAGNOSTICS_TLS_CIPHER_SUITES=TLS_NULL"}, `KUMA_DIAGNOSTICS_TLS_CIPHER_SUITES: there is no cipher suite "TLS_NULL"`},
		{[]string{"KUMA_INTER_CP_SERVER_TLS_CIPHER_SUITES=TLS_RSA_WITH_RC4_128_SHA"}, "KUMA_INTER_CP_SERVER_TLS_CIPHER_SUITES: TLS_RSA_WITH_RC4_128_SHA is a cipher suite that is broken"},
		{[]string{"KUMA_GENERAL_TLS_MIN_VERSION=TLSv1_3", "KUMA_GENERAL_TLS_MAX_VERSION=TLSv1_2"}, "KUMA_GENERAL_TLS_MAX_VERSION: TLSv1_2 is older than KUMA_GENERAL_TLS_MIN_VERSION, which is TLSv1_3"},
		{[]string{"KUMA_DP_SERVER_TLS_MIN_VERSION=TLSv1_3", "KUMA_GENERAL_TLS_MAX_VERSION=TLSv1_2"}, "KUMA_GENERAL_TLS_MAX_VERSION: TLSv1_2 is older than KUMA_DP_SERVER_TLS_MIN_VERSION, which is TLSv1_3"},
		{[]string{"KUMA_GENERAL_TLS_REQUIRE_PQ=true", "KUMA_DP_SERVER_TLS_MAX_VERSION=TLSv1_2"}, "KUMA_DP_SERVER_TLS_MAX_VERSION: TLSv1_2 has no post-quantum key exchange, which KUMA_GENERAL_TLS_REQUIRE_PQ demands"},
		{[]string{"KUMA_GENERAL_TLS_RELOAD_INTERVAL=0s"}, "KUMA_GENERAL_TLS_RELOAD_INTERVAL: must be positive"},
		{[]string{"KUMA_GENERAL_ADVERTISED_HOSTNAME=https://cp:5678"}, "KUMA_GENERAL_ADVERTISED_HOSTNAME: "},
		{[]string{"KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST=cp:5678"}, "KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST: \"cp:5678\" is neither"},
		{[]string{"KUMA_API_SERVER_HTTPS_REQUIRE_CLIENT_CERT=true"}, "KUMA_API_SERVER_HTTPS_TLS_CA_FILE"},
		{[]string{"KUMA_INTER_CP_SERVER_PORT=70000"}, "interCp.server.port: 70000 is not a port"},
	} {
		_, _, err := cp.Load("", c.env)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q gives %v, want %q", c.env, err, c.want)
		}
	}
	good := []string{
		"KUMA_GENERAL_TLS_MIN_VERSION=TLSv1_2", "KUMA_GENERAL_TLS_MAX_VERSION=TLSv1_3", "KUMA_GENERAL_TLS_CIPHER_SUITES=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
		"KUMA_DP_SERVER_TLS_MIN_VERSION=TLSv1_3", "KUMA_DP_SERVER_TLS_MAX_VERSION=TLSv1_3", "KUMA_DP_SERVER_TLS_CIPHER_SUITES=TLS_AES_128_GCM_SHA256",
		"KUMA_API_SERVER_HTTPS_TLS_MIN_VERSION=TLSv1_3", "KUMA_API_SERVER_HTTPS_REQUIRE_CLIENT_CERT=true", "KUMA_API_SERVER_HTTPS_TLS_CA_FILE=/ca", "KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR=/dir",
		"KUMA_DIAGNOSTICS_TLS_ENABLED=true", "KUMA_DIAGNOSTICS_TLS_CERT_FILE=/c", "KUMA_DIAGNOSTICS_TLS_KEY_FILE=/k", "KUMA_DIAGNOSTICS_TLS_MIN_VERSION=TLSv1_3",
		"KUMA_MULTIZONE_GLOBAL_KDS_GRPC_PORT=1", "KUMA_MULTIZONE_GLOBAL_KDS_TLS_ENABLED=false", "KUMA_MULTIZONE_GLOBAL_KDS_TLS_CERT_FILE=/c", "KUMA_MULTIZONE_GLOBAL_KDS_TLS_KEY_FILE=/k",
		"KUMA_MULTIZONE_GLOBAL_KDS_TLS_MAX_VERSION=TLSv1_3", "KUMA_MULTIZONE_GLOBAL_KDS_TLS_CIPHER_SUITES=TLS_AES_128_GCM_SHA256",
		"KUMA_INTER_CP_SERVER_PORT=2", "KUMA_INTER_CP_SERVER_TLS_MIN_VERSION=TLSv1_3", "KUMA_GENERAL_TLS_REQUIRE_PQ=true", "KUMA_GENERAL_TLS_RELOAD_INTERVAL=1h", "KUMA_GENERAL_ADVERTISED_HOSTNAME=cp.example.com",
	}
	cfg, warnings, err := cp.Load("", good)
	if err != nil || len(warnings) > 0 {
		t.Errorf("%v %q", err, warnings)
	}
	// Instances among themselves have no files: theirs are made for them. Who sets
	// some is told so.
	_, warnings, err = cp.Load("", []string{"KUMA_INTER_CP_SERVER_TLS_CERT_FILE=/nonexistent", "KUMA_INTER_CP_SERVER_TLS_KEY_FILE=/nonexistent"})
	if said := strings.Join(warnings, "\n"); err != nil || !strings.Contains(said, "KUMA_INTER_CP_SERVER_TLS_CERT_FILE") || !strings.Contains(said, "KUMA_INTER_CP_SERVER_TLS_KEY_FILE") {
		t.Errorf("files for instances among themselves: %v, warnings %q", err, warnings)
	}
	if s := cfg.DPServer.ServerTLS; s.TLSMinVersion != "TLSv1_3" || len(s.TLSCipherSuites) != 1 || cfg.Multizone.Global.KDS.GRPCPort != 1 || cfg.InterCP.Server.Port != 2 {
		t.Errorf("settings are not read: %+v", cfg)
	}
}

// TestAdvertisedNames are in the certificate that the control plane makes
// itself; one that the operator gave must have the name that proxies are to use.
func TestAdvertisedNames(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.General.AdvertisedHostname, cfg.BootstrapServer.Params.XDSHost = "cp.example.com", "192.0.2.7"
	run(t, cfg)
	ca, err := os.ReadFile(filepath.Join(cfg.General.WorkDir, "kuma-cp.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	for _, name := range []string{"cp.example.com", "192.0.2.7", "localhost"} {
		if _, err := handshake(t, doors(cfg)["KUMA_DP_SERVER"], &tls.Config{RootCAs: pool, ServerName: name}); err != nil {
			t.Error(err)
		}
	}

	authority := cptest.NewCA(t)
	given, _ := secured(t, authority)
	given.BootstrapServer.Params.XDSHost = "cp.example.com"
	_, err = cp.New(t.Context(), given, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST") || !strings.Contains(err.Error(), `["localhost" "127.0.0.1"]`) {
		t.Errorf("error %v", err)
	}
	// What replaces it must have the name, too, whether the pair is the general
	// one or the server's own.
	for _, own := range []bool{false, true} {
		given, files := secured(t, authority)
		given.BootstrapServer.Params.XDSHost = "cp.example.com"
		if own {
			files = newPairFiles(t)
			given.DPServer.TLSCertFile, given.DPServer.TLSKeyFile = files.cert, files.key
		}
		named := func() cptest.Pair {
			p := authority.Pair(t, func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "cp.example.com") })
			files.put(t, p)
			return p
		}
		shown := func() *x509.Certificate {
			s, err := handshake(t, doors(given)["KUMA_DP_SERVER"], &tls.Config{RootCAs: authority.Pool(), ServerName: "cp.example.com"})
			if err != nil {
				t.Fatal(err)
			}
			return s.PeerCertificates[0]
		}
		named()
		_, log := runLogged(t, given)
		before := shown()
		files.put(t, authority.Pair(t, nil))
		eventually(t, "a certificate without the name is refused", func() bool {
			return strings.Contains(log.String(), "KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST")
		})
		if !shown().Equal(before) {
			t.Error("a certificate without the name is shown")
		}
		next := named()
		eventually(t, "one that has it", func() bool { return shown().Equal(next.Cert) })
	}
}

// HRD-08, HRD-33: the public admin server follows its files as the others do,
// and resumes nothing, so that a client who is taken out is out.
func TestAdminServerFollowsItsFiles(t *testing.T) {
	servers, clients := cptest.NewCA(t), cptest.NewCA(t)
	cfg, _ := secured(t, servers)
	files, dir := newPairFiles(t), t.TempDir()
	files.put(t, servers.Pair(t, nil))
	on := true
	cfg.AdminServer.Enabled, cfg.AdminServer.Local.Port = &on, freePort(t)
	cfg.AdminServer.Public = cp.AdminPublic{Enabled: true, Interface: "127.0.0.1", Port: freePort(t), TLSCertFile: files.cert, TLSKeyFile: files.key, ClientCertsDir: dir}
	known := filepath.Join(dir, "clients.pem")
	if err := os.WriteFile(known, clients.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, cfg)
	address := fmt.Sprintf("127.0.0.1:%d", cfg.AdminServer.Public.Port)
	c := &tls.Config{RootCAs: servers.Pool(), ServerName: "localhost", Certificates: []tls.Certificate{clients.Client(t).TLS()}, ClientSessionCache: tls.NewLRUClientSessionCache(10)}
	for range 3 {
		next := servers.Pair(t, nil)
		files.put(t, next)
		eventually(t, "the new certificate", func() bool {
			s, err := handshake(t, address, c)
			if err != nil || s.DidResume {
				t.Fatalf("%v, resumed %v", err, s.DidResume)
			}
			return s.PeerCertificates[0].Equal(next.Cert)
		})
	}
	if err := os.Remove(known); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a client who is taken out", func() bool {
		_, err := handshake(t, address, c)
		return err != nil
	})
}
