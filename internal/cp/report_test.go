package cp

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// pairOf makes a self-signed pair.
func pairOf(t *testing.T, kind string, hosts ...string) tls.Certificate {
	t.Helper()
	cert, key, err := pki.GenerateTLS(kind, hosts, "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// pool trusts a self-signed certificate.
func poolOf(pair tls.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(pair.Leaf)
	return p
}

// pictureOf is a picture of these resources.
func pictureOf(t *testing.T, ops ...store.Write) *state.Picture {
	t.Helper()
	s := memstore.New()
	if _, err := s.Put(t.Context(), ops...); err != nil {
		t.Fatal(err)
	}
	tracker := state.New(state.Config{Store: s, Quiet: time.Millisecond, Max: time.Millisecond})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- tracker.Run(ctx) }()
	<-tracker.Ready()
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return tracker.Now()
}

// meshOf is a mesh with mutual TLS in a mode, or without where that is empty.
func meshOf(name string, mode mesh.Mode) store.Write {
	spec := &mesh.MeshSpec{}
	if mode != "" {
		spec.MTLS = &mesh.MTLS{EnabledBackend: "ca-1", Backends: []mesh.Backend{{Name: "ca-1", Type: "builtin", Mode: mode}}}
	}
	return store.Set(mesh.Meshes.Make("", name, spec))
}

// open serves what answers hello, as a port of that name, and returns its
// address.
func openDoor(t *testing.T, cs *connections, d door, s *http.Server, l net.Listener) string {
	t.Helper()
	if s.Handler == nil {
		s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			who := auth.Anonymous()
			if r.Header.Get("Authorization") != "" {
				who = auth.Admin()
			}
			noteCaller(false, r, who)
			_, _ = io.WriteString(w, r.Proto)
		})
	}
	s.ErrorLog = log.New(io.Discard, "", 0)
	l = cs.serve(d, s, l)
	go func() {
		if s.TLSConfig != nil {
			_ = s.ServeTLS(l, "", "")
		} else {
			_ = s.Serve(l)
		}
	}()
	t.Cleanup(func() { _ = s.Close() })
	return l.Addr().String()
}

func listenLoopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// get sends one request and leaves the connection open.
func get(t *testing.T, c *http.Client, url, bearer string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := c.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// reporterFor is a reporter of these connections, a mesh and nobody else.
func reporterFor(t *testing.T, cs *connections) *reporter {
	t.Helper()
	pic := pictureOf(t, meshOf("default", mesh.Strict))
	return &reporter{
		cfg: Default(), instance: "i", conns: cs, peers: func() []session.Peer { return nil }, picture: func() *state.Picture { return pic },
		expiries: func() []pki.Expiry { return nil }, gaps: func() []pki.Gap { return nil }, now: time.Now,
		stats: func(context.Context, session.Key) ([]byte, error) { return nil, errors.New("nobody is here") },
	}
}

func reportOf(t *testing.T, r *reporter, mesh string) rest.TLSReport {
	t.Helper()
	report, err := r.TLSReport(t.Context(), mesh)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// said are the findings as "severity: message: about".
func said(report rest.TLSReport) (out []string) {
	for _, f := range report.Findings {
		if f.Mend == "" || f.Count < len(f.About) {
			out = append(out, "incomplete: "+f.Message)
		}
		out = append(out, f.Severity+": "+f.Message+": "+strings.Join(f.About, ","))
	}
	return out
}

func wantSaid(t *testing.T, report rest.TLSReport, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !slices.ContainsFunc(said(report), func(s string) bool { return strings.Contains(s, p) }) {
			t.Errorf("no finding has %q:\n%s", p, strings.Join(said(report), "\n"))
		}
	}
}

// Each connection is described by what its handshake came to, whichever
// protocol follows, until it is closed.
func TestReportOfLinks(t *testing.T) {
	server, user := pairOf(t, "server", "localhost", "127.0.0.1"), pairOf(t, "client", "jane")
	for name, c := range map[string]struct {
		client *tls.Config
		two    bool
		bearer string
		want   rest.TLSLink
		says   []string
	}{
		"http/1.1 and a token": {
			client: &tls.Config{}, bearer: "x",
			want: rest.TLSLink{Peer: auth.AdminName, Version: "TLS 1.3", Group: "X25519MLKEM768", Cipher: "TLS_AES_128_GCM_SHA256", VerifiedBy: "user token over TLS"},
			says: []string{"note: whether the client verifies this control plane's certificate"},
		},
		"http/2 and nothing": {
			client: &tls.Config{}, two: true,
			want: rest.TLSLink{Peer: auth.AnonymousName, Version: "TLS 1.3", Group: "X25519MLKEM768", Cipher: "TLS_AES_128_GCM_SHA256", VerifiedBy: "nothing"},
		},
		"a client certificate and an older group": {
			client: &tls.Config{Certificates: []tls.Certificate{user}, CurvePreferences: []tls.CurveID{tls.CurveP256}},
			want: rest.TLSLink{
				Peer: auth.AnonymousName, Version: "TLS 1.3", Group: "P-256", Cipher: "TLS_AES_128_GCM_SHA256", VerifiedBy: "client certificate of CN=jane",
				ClientCertificate: &rest.TLSCertificate{Subject: "CN=jane", Issuer: "CN=jane", NotAfter: user.Leaf.NotAfter},
			},
			says: []string{"note: the key exchange has no post-quantum part: who records the traffic today may read it one day: " + auth.AnonymousName},
		},
		"TLS 1.2": {
			client: &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}, CurvePreferences: []tls.CurveID{tls.X25519}},
			want:   rest.TLSLink{Peer: auth.AnonymousName, Version: "TLS 1.2", Group: "X25519", Cipher: "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", VerifiedBy: "nothing"},
			says:   []string{"note: the connection has TLS 1.2, although 1.3 is offered"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var cs connections
			r := reporterFor(t, &cs)
			addr := openDoor(t, &cs, door{name: "api-https", caller: "user"}, &http.Server{
				TLSConfig: &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: poolOf(user)},
			}, listenLoopback(t))
			c.client.RootCAs = poolOf(server)
			transport := &http.Transport{TLSClientConfig: c.client, ForceAttemptHTTP2: c.two}
			defer transport.CloseIdleConnections()
			proto := get(t, &http.Client{Transport: transport}, "https://"+addr, c.bearer)
			if want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[c.two]; proto != want {
				t.Errorf("it spoke %s", proto)
			}
			report := reportOf(t, r, "")
			if len(report.Links) != 1 {
				t.Fatalf("links: %+v", report.Links)
			}
			got := report.Links[0]
			if age := report.Time.Sub(got.Since); age < 0 || age > time.Minute || !strings.HasPrefix(got.Remote, "127.0.0.1:") {
				t.Errorf("since %v, from %s", got.Since, got.Remote)
			}
			c.want.Kind, c.want.Server, c.want.Since, c.want.Remote = "user", "api-https", got.Since, got.Remote
			c.want.Certificate = &rest.TLSCertificate{Subject: "CN=localhost", Issuer: "CN=localhost", NotAfter: server.Leaf.NotAfter}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
			wantSaid(t, report, c.says...)
			if s := report.Servers; len(s) != 1 || s[0].ClientCertificates != "asked for" || s[0].MinVersion != "TLS 1.2" || s[0].Certificate == nil {
				t.Errorf("servers: %+v", s)
			}
			// For a mesh, users stay.
			if n := len(reportOf(t, r, "default").Links); n != 1 {
				t.Errorf("%d links for the mesh", n)
			}
			transport.CloseIdleConnections()
			for deadline := time.Now().Add(patience); len(reportOf(t, r, "").Links) > 0; {
				if time.Now().After(deadline) {
					t.Fatal("the connection is still there")
				}
				runtime.Gosched()
			}
		})
	}
	if _, err := reporterFor(t, &connections{}).TLSReport(t.Context(), "gone"); !errs.Is(err, errs.NotFound) {
		t.Errorf("a mesh that is not there: %v", err)
	}
}

// fakeConn is a connection from an address of its own.
type fakeConn struct {
	net.Conn
	from string
}

func (f fakeConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f.from))
}
func (f fakeConn) Close() error { return nil }

// enter opens a connection whose handshake is over.
func enter(d *door, from string, h *handshake) *connection {
	c := d.enter(fakeConn{from: from})
	if h != nil {
		c.handshake.Store(h)
	}
	return c
}

// Proxies are told by the address of their streams, and what is not as it should
// be is said once for all whom it concerns.
func TestReportOfProxies(t *testing.T) {
	var cs connections
	r := reporterFor(t, &cs)
	now := time.Now()
	expires := now.Add(time.Hour)
	dp := &mesh.DataplaneSpec{Networking: &mesh.Networking{Address: "127.0.0.1", Inbound: []mesh.Inbound{{Port: 80, Tags: map[string]string{mesh.TagService: "web"}}}}}
	cert, _, err := pki.NewRoot("default", 0, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pic := pictureOf(t, meshOf("default", mesh.Strict), meshOf("loose", mesh.Permissive), meshOf("open", ""),
		store.Set(mesh.Dataplanes.Make("default", "web-00", dp)),
		store.Set(mesh.Secrets.Make("default", mesh.BuiltinCertSecret("default", "ca-1"), &mesh.SecretSpec{Data: cert})),
		store.Set(mesh.DataplaneInsights.Make("default", "web-00", &mesh.DataplaneInsightSpec{MTLS: &mesh.MTLSInsight{CertificateExpirationTime: &expires, IssuedBackend: "ca-1"}})))
	r.picture = func() *state.Picture { return pic }
	r.expiries = func() []pki.Expiry {
		return append(meshAuthorities(pic), pki.Expiry{Name: "dp-server", File: "/x", Subject: "CN=x", NotAfter: now.Add(-time.Minute)})
	}
	proxies := cs.add(door{name: "dp-server", caller: "proxy", addr: &net.TCPAddr{IP: net.IPv6zero, Port: 5678}, tls: &tls.Config{MinVersion: tls.VersionTLS13}})
	plain := cs.add(door{name: "api-http", caller: "user", addr: &net.TCPAddr{IP: net.IPv6zero, Port: 5681}, mend: "close it"})
	strong := &handshake{version: tls.VersionTLS13, cipher: tls.TLS_AES_256_GCM_SHA384, group: tls.X25519MLKEM768}
	weak := &handshake{version: tls.VersionTLS12, cipher: tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, group: tls.CurveP384}
	var peers []session.Peer
	for i := range 60 {
		name, from := fmt.Sprintf("web-%02d", i), fmt.Sprintf("10.0.0.1:%d", 1000+i)
		key := session.Key{Mesh: "default", Name: name}
		h := strong
		if i >= 30 {
			h = weak
		}
		enter(proxies, "[::ffff:10.0.0.1]:"+fmt.Sprint(1000+i), h)
		remote := netip.MustParseAddrPort(from)
		peers = append(peers, session.Peer{Key: key, Kind: session.ADS, Remote: remote, Linked: i > 0}, session.Peer{Key: key, Kind: session.HDS, Remote: remote, Linked: i > 0})
	}
	enter(proxies, "10.0.0.2:1", strong)        // no stream yet
	enter(proxies, "10.0.0.3:1", nil)           // still at its handshake
	enter(plain, "10.0.0.4:1", nil)             // from elsewhere
	local := enter(plain, "127.0.0.1:999", nil) // from here
	local.user.Store(&caller{"jane", byToken})
	r.peers = func() []session.Peer { return peers }
	asked := make(chan session.Key, 100)
	r.stats = func(_ context.Context, k session.Key) ([]byte, error) {
		asked <- k
		switch k.Name {
		case "web-00":
			return []byte("listener.10.0.0.1_80.ssl.versions.TLSv1.3: 7\nlistener.10.0.0.1_80.ssl.curves.X25519MLKEM768: 7\n"), nil
		case "web-01":
			return []byte("listener.10.0.0.1_80.ssl.versions.TLSv1.2: 1\nlistener.10.0.0.1_80.ssl.curves.P-256: 1\nlistener.10.0.0.1_80.ssl.fail_verify_error: 2\n"), nil
		}
		return nil, errs.New(errs.Unavailable, "it is busy")
	}

	report := reportOf(t, r, "")
	if len(report.Links) != 63 || len(report.Envoys) != maxEnvoys || report.EnvoysLeftOut != 10 || len(asked) != maxEnvoys {
		t.Errorf("%d links, %d Envoys, %d left out, %d asked", len(report.Links), len(report.Envoys), report.EnvoysLeftOut, len(asked))
	}
	byFrom := map[string]rest.TLSLink{}
	for _, l := range report.Links {
		byFrom[l.Remote] = l
	}
	first := byFrom["10.0.0.1:1000"]
	if first.Peer != "default/web-00" || first.Mesh != "default" || first.VerifiedBy != "dataplane token over TLS" || !slices.Equal(first.Streams, []string{"ads", "hds"}) || first.Group != "X25519MLKEM768" {
		t.Errorf("a proxy: %+v", first)
	}
	if l := byFrom["10.0.0.2:1"]; l.Kind != "unknown" || l.Peer != "" || l.VerifiedBy != "nothing" {
		t.Errorf("one without a stream: %+v", l)
	}
	if l := byFrom["127.0.0.1:999"]; l.Peer != "jane" || l.VerifiedBy != "user token without TLS" || l.Version != "" {
		t.Errorf("a user here: %+v", l)
	}
	want := rest.TLSEnvoy{
		Mesh: "default", Proxy: "web-00", VerifiedBy: "mesh authority default/ca-1, both sides",
		Certificate: &rest.TLSCertificate{Subject: "spiffe://default/web", Issuer: "ca-1", NotAfter: expires},
		Versions:    map[string]uint64{"TLSv1.3": 7}, Groups: map[string]uint64{"X25519MLKEM768": 7}, Ciphers: map[string]uint64{},
	}
	if d := cmp.Diff(want, report.Envoys[0]); d != "" {
		t.Error(d)
	}
	if e := report.Envoys[2]; e.Error != "it is busy" {
		t.Errorf("one that can't be asked: %+v", e)
	}
	if c := report.Certificates; len(c) != 2 || c[0].Name != "mesh-ca/default/ca-1" || !strings.HasPrefix(c[0].Subject, "CN=default") {
		t.Errorf("certificates: %+v", c)
	}
	wantSaid(t, report,
		"critical: the certificate has ended: dp-server",
		"critical: what is sent over this connection, credentials included, can be read and changed on the way: user at 10.0.0.4:1",
		"warning: a port that other machines reach is served without TLS: api-http",
		"warning: connections between proxies have TLSv1.2: default/web-01",
		"warning: connections between proxies have no post-quantum key exchange: default/web-01",
		"warning: the certificate ends soon: default/web-00",
		"warning: the certificate ends soon: mesh-ca/default/ca-1",
		"warning: the connection has TLS 1.2, although 1.3 is offered: default/web-30,default/web-31",
		"warning: the key exchange has no post-quantum part",
		"warning: the mesh has no mutual TLS: its services speak in clear, and with anyone: open",
		"warning: the mesh takes connections without TLS too: loose",
		"warning: the proxy has no link: its private key is made by the control plane and sent to it: default/web-00",
		"note: the proxy's link is not here: its certificates can't be renewed by this instance, and it can't be asked: default/web-01,",
		"note: connections were refused because of the caller's certificate: default/web-01",
		"note: the proxy could not be asked for its connections: default/web-02",
	)
	for _, f := range report.Findings {
		if strings.HasPrefix(f.Message, "the connection has TLS 1.2") && (f.Count != 30 || len(f.About) != maxAbout) {
			t.Errorf("%d concerned, %d named", f.Count, len(f.About))
		}
	}
	if report.Findings[0].Severity != rest.SeverityCritical {
		t.Errorf("the gravest is not first: %v", said(report))
	}

	// Of another mesh, nothing of these proxies is told.
	other := reportOf(t, r, "loose")
	if len(other.Links) != 2 || len(other.Envoys) != 0 || len(other.Certificates) != 1 {
		t.Errorf("of another mesh: %+v", other)
	}

	// Where credentials are off, nothing vouches for a proxy.
	r.cfg.DPServer.Authn.DPProxy.Type, r.cfg.Access.Anonymous = auth.ProxyNone, auth.AnonymousContract
	report = reportOf(t, r, "default")
	if report.Links[2].VerifiedBy != "nothing" {
		t.Errorf("without credentials: %+v", report.Links[2])
	}
	wantSaid(t, report, "critical: proxies need no credential", "critical: callers without a credential may read and write most resources")
}

// A file that may lack an issuer is a note, which --check lets pass: a private
// root that signs directly is right.
func TestReportOfGaps(t *testing.T) {
	r := reporterFor(t, &connections{})
	r.gaps = func() []pki.Gap {
		return []pki.Gap{{Name: "dp-server", File: "/tls/dp.crt", Subject: "CN=cp", Issuer: "CN=between"}, {Name: "general", File: "/tls/general.crt", Subject: "CN=cp", Issuer: "CN=other"}}
	}
	wantSaid(t, reportOf(t, r, "default"), `note: the certificate file ends with a certificate whose issuer is neither in it nor known to this control plane: dp-server: /tls/dp.crt lacks "CN=between",general: /tls/general.crt lacks "CN=other"`)
}

// A proxy that does not answer is waited for no longer than it may take, and
// never more than a few are asked at once.
func TestReportIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cs connections
		r := reporterFor(t, &cs)
		var peers []session.Peer
		for i := range 200 {
			peers = append(peers, session.Peer{Key: session.Key{Mesh: "default", Name: fmt.Sprint(i)}, Kind: session.Link, Linked: true})
		}
		r.peers = func() []session.Peer { return peers }
		slots := make(chan struct{}, envoysAtOnce)
		r.stats = func(ctx context.Context, _ session.Key) ([]byte, error) {
			select {
			case slots <- struct{}{}:
			default:
				t.Error("too many at once")
			}
			defer func() { <-slots }()
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		report := reportOf(t, r, "")
		if took := time.Since(start); took != 14*time.Second || report.EnvoysLeftOut != 150 {
			t.Errorf("it took %v, %d left out", took, report.EnvoysLeftOut)
		}
	})
}

// A proxy's statistics are read whatever they hold.
func TestCountTLS(t *testing.T) {
	var page strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&page, "listener.a.ssl.curves.made-up-%d: 1\n", i)
	}
	for text, want := range map[string]rest.TLSEnvoy{
		"": {},
		"listener.127.0.0.1_1.ssl.versions.TLSv1.3: 2\nlistener.127.0.0.1_2.ssl.versions.TLSv1.3: 3\n": {Versions: map[string]uint64{"TLSv1.3": 5}},
		"cluster.web.ssl.versions.TLSv1.3: 2\nhttp.x: 1\nlistener.a.downstream_cx_total: 3\n":          {},
		"listener.a.ssl.versions.TLSv1.3: x\nlistener.a.ssl.versions.TLSv1.3\nlistener.a.ssl.: 1":      {},
		"listener.a.ssl.ciphers.TLS_AES_128_GCM_SHA256: 1\r\nlistener.a.ssl.fail_verify_san: 4":        {Ciphers: map[string]uint64{"TLS_AES_128_GCM_SHA256": 1}, Refused: 4},
		"listener.a.ssl.curves." + strings.Repeat("x", 1000) + ": 1":                                   {},
		"\x00\xff\n\n: \nlistener.a.ssl.curves.X25519: 0\n":                                            {},
	} {
		got := rest.TLSEnvoy{Versions: map[string]uint64{}, Groups: map[string]uint64{}, Ciphers: map[string]uint64{}}
		countTLS([]byte(text), &got)
		for _, m := range []*map[string]uint64{&want.Versions, &want.Groups, &want.Ciphers} {
			if *m == nil {
				*m = map[string]uint64{}
			}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%.60q: %s", text, d)
		}
	}
	got := rest.TLSEnvoy{Groups: map[string]uint64{}}
	if countTLS([]byte(page.String()), &got); len(got.Groups) != 32 {
		t.Errorf("%d groups", len(got.Groups))
	}
}

// What is kept of a connection is small, and nothing is kept of those that are
// gone.
func TestConnectionsAreSmall(t *testing.T) {
	var cs connections
	d := cs.add(door{name: "dp-server", caller: "proxy", addr: &net.TCPAddr{}, tls: &tls.Config{Certificates: []tls.Certificate{pairOf(t, "server", "a")}}})
	const n = 10_000
	all := make([]*connection, n)
	raw := fakeConn{from: "10.0.0.1:1"}
	before := heap()
	for i := range all {
		all[i] = d.enter(raw)
		all[i].secured(tls.ConnectionState{Version: tls.VersionTLS13, CurveID: tls.X25519MLKEM768, CipherSuite: tls.TLS_AES_128_GCM_SHA256})
	}
	each := (heap() - before) / n
	t.Logf("%d bytes each", each)
	if each > 200 {
		t.Errorf("%d bytes each", each)
	}
	for _, c := range all {
		_ = c.Close()
		_ = c.Close()
	}
	if _, open := cs.all(); len(open) != 0 {
		t.Errorf("%d are left", len(open))
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
