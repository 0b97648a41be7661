package cp

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kuma/internal/errs"
	"kuma/internal/link"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/policy/policytest"
	"kuma/internal/proxy"
	"kuma/internal/rest"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/test/lab"
)

var webKey = session.Key{Mesh: "default", Name: "web"}

// connected are the proxies with an ADS stream.
type connected struct {
	mu    sync.Mutex
	nodes map[session.Key]*session.Node
}

func (p *connected) Node(key session.Key) *session.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodes[key]
}

// set has a proxy come; nil has it go.
func (p *connected) set(key session.Key, n *session.Node) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.nodes[key] = n; n == nil {
		delete(p.nodes, key)
	}
}

// now is a picture that tests change.
type now struct{ atomic.Pointer[state.Picture] }

func (n *now) Now() *state.Picture { return n.Load() }

// adminRoom is a mesh with the proxy "web" and an authority.
type adminRoom struct {
	*adminChannel
	t       *testing.T
	world   *policytest.World
	picture *now
	here    *connected
}

func openAdminRoom(t *testing.T) *adminRoom {
	t.Helper()
	r := &adminRoom{t: t, world: policytest.NewWorld(t), picture: &now{}, here: &connected{nodes: map[session.Key]*session.Node{webKey: {Key: webKey, AdminSocket: "/tmp/admin.sock"}}}}
	r.adminChannel = newAdminChannel(r.picture, r.here, 9901, slog.New(slog.DiscardHandler))
	r.patience = patience
	rs, err := policytest.Read("type: Mesh\nname: default\n")
	if err != nil {
		t.Fatal(err)
	}
	r.picture.Store(r.world.Put(rs...))
	r.at("127.0.0.1", 9901)
	r.newCA()
	return r
}

// at moves the proxy.
func (r *adminRoom) at(address string, port uint32) {
	r.picture.Store(r.world.Put(mesh.Dataplanes.Make("default", "web", &mesh.DataplaneSpec{
		Networking: &mesh.Networking{Address: address, Admin: &mesh.Admin{Port: port}},
	})))
}

// newCA replaces the authority.
func (r *adminRoom) newCA() *pki.AdminCA {
	r.t.Helper()
	text, err := pki.NewAdminCA()
	if err != nil {
		r.t.Fatal(err)
	}
	r.secret(text)
	ca, err := pki.OpenAdminCA(text)
	if err != nil {
		r.t.Fatal(err)
	}
	return ca
}

func (r *adminRoom) secret(text []byte) {
	r.picture.Store(r.world.Put(mesh.GlobalSecrets.Make("", mesh.EnvoyAdminCA, &mesh.SecretSpec{Data: text})))
}

func (r *adminRoom) given() *proxy.Admin { return r.of(r.picture.Now(), r.here.Node(webKey)) }

// TestAdminCertificate: a proxy keeps its certificate, so that its configuration
// stays the same, until something about it is another.
func TestAdminCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := openAdminRoom(t)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = r.Run(ctx) }()
		defer cancel()
		same := func(why string, a, b *proxy.Admin, want bool) {
			t.Helper()
			if got := bytes.Equal(a.Chain, b.Chain) && bytes.Equal(a.Key, b.Key) && bytes.Equal(a.CA, b.CA); got != want || len(b.Key) == 0 || b.Problem != "" {
				t.Errorf("%s: the same: %v, want %v; problem %q", why, got, want, b.Problem)
			}
		}
		first := r.given()
		if first.Listen != 9901 || first.Socket != "/tmp/admin.sock" || first.Caller != "kuma-cp" {
			t.Errorf("%+v", *first)
		}
		same("asked again", first, r.given(), true)
		time.Sleep(10 * 24 * time.Hour)
		same("after ten days", first, r.given(), true)

		r.at("127.0.0.2", 9901)
		moved := r.given()
		same("at another address", first, moved, false)
		r.newCA()
		replaced := r.given()
		same("by another authority", moved, replaced, false)
		if bytes.Equal(moved.CA, replaced.CA) {
			t.Error("callers are known by the authority that was replaced")
		}

		// HRD-33: it is renewed with a third of its life left.
		due := r.again(webKey)
		if left := time.Until(due); left < 16*24*time.Hour || left > 21*24*time.Hour {
			t.Errorf("it is to be renewed in %s", left)
		}
		time.Sleep(time.Until(due) - time.Second)
		same("just before", replaced, r.given(), true)
		time.Sleep(2 * time.Second)
		renewed := r.given()
		same("when it is due", replaced, renewed, false)
		if !r.again(webKey).After(time.Now()) {
			t.Error("the next renewal has no time")
		}

		r.here.set(webKey, nil)
		time.Sleep(2 * time.Minute)
		if !r.again(webKey).IsZero() {
			t.Error("the certificate of a proxy that is gone is kept")
		}
		cancel()
		synctest.Wait()
	})
}

// TestLinkedProxyHasNoAdminKey is HRD-30: for a proxy whose kuma-dp keeps a
// link no key is made.
func TestLinkedProxyHasNoAdminKey(t *testing.T) {
	r := openAdminRoom(t)
	r.here.Node(webKey).Link = true
	if a := r.given(); a != nil || !r.again(webKey).IsZero() {
		t.Errorf("it got %v", a)
	}
}

// TestAdminAuthorityMissing: without a usable authority no listener is made,
// and it is said why.
func TestAdminAuthorityMissing(t *testing.T) {
	r := openAdminRoom(t)
	r.secret([]byte("not PEM"))
	for what, want := range map[string]string{"broken": "can't be used", "gone": "restart the control plane"} {
		if what == "gone" {
			r.picture.Store(r.world.Remove(mesh.GlobalSecrets.Key("", mesh.EnvoyAdminCA)))
		}
		a := r.given()
		if !strings.Contains(a.Problem, want) && what == "gone" || !strings.Contains(a.Problem, mesh.EnvoyAdminCA) || len(a.Key) > 0 {
			t.Errorf("%s: problem %q", what, a.Problem)
		}
		if _, err := r.ask(t.Context(), r.here.Node(webKey), "/stats"); !errs.Is(err, errs.Unavailable) {
			t.Errorf("%s: %v", what, err)
		}
		if len(r.Expiries()) > 0 {
			t.Errorf("%s: it ends", what)
		}
	}
}

func TestAdminPath(t *testing.T) {
	for want, q := range map[string]rest.Inspection{
		"/config_dump":                {What: "config_dump", UsedOnly: true},
		"/config_dump?include_eds":    {What: "config_dump", UsedOnly: true, IncludeEDS: true, JSON: true},
		"/stats":                      {What: "stats"},
		"/stats?usedonly":             {What: "stats", UsedOnly: true},
		"/stats?usedonly&format=json": {What: "stats", UsedOnly: true, JSON: true},
		"/stats?format=json":          {What: "stats", JSON: true},
		"/clusters":                   {What: "clusters", UsedOnly: true},
		"/clusters?format=json":       {What: "clusters", UsedOnly: true, JSON: true},
	} {
		if got := adminPath(q); got != want {
			t.Errorf("%+v: %s, want %s", q, got, want)
		}
	}
}

// listener is an admin listener as a proxy has it, before a handler.
func (r *adminRoom) listener(ca *pki.AdminCA, name string, callers *pki.AdminCA, h http.HandlerFunc) {
	r.t.Helper()
	made, err := ca.Server("default", name, "127.0.0.1")
	if err != nil {
		r.t.Fatal(err)
	}
	key, err := made.Key.PEM()
	if err != nil {
		r.t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(made.Chain, key)
	if err != nil {
		r.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(callers.Trust())
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	s.StartTLS()
	r.t.Cleanup(s.Close)
	r.here.Node(webKey).AdminPort = uint32(s.Listener.Addr().(*net.TCPAddr).Port)
	r.at("127.0.0.1", r.here.Node(webKey).AdminPort)
}

// TestAskAdmin is HRD-12 and HRD-30: a page comes from the very proxy that is
// meant, or not at all. Nothing is said to anybody else, whatever answers.
func TestAskAdmin(t *testing.T) {
	page := func(w http.ResponseWriter, q *http.Request) {
		_, _ = w.Write([]byte(q.Method + " " + q.URL.String() + " by " + q.TLS.PeerCertificates[0].DNSNames[0]))
	}
	cases := map[string]struct {
		open func(r *adminRoom, asked *atomic.Int64)
		want string // the page, or
		err  string // why there is none
		// secret: nothing may be asked.
		secret bool
	}{
		"the proxy": {open: func(r *adminRoom, _ *atomic.Int64) {
			ca := r.newCA()
			r.listener(ca, "web", ca, page)
		}, want: "GET /stats?usedonly by kuma-cp"},
		"another proxy": {open: func(r *adminRoom, n *atomic.Int64) {
			ca := r.newCA()
			r.listener(ca, "other", ca, func(http.ResponseWriter, *http.Request) { n.Add(1) })
		}, err: "whoever answers at 127.0.0.1:", secret: true},
		"a stranger": {open: func(r *adminRoom, n *atomic.Int64) {
			ca := r.newCA()
			r.newCA()
			r.listener(ca, "web", ca, func(http.ResponseWriter, *http.Request) { n.Add(1) })
		}, err: "is not the proxy \"web\" of mesh \"default\"", secret: true},
		"one that does not know us": {open: func(r *adminRoom, n *atomic.Int64) {
			other, ca := r.newCA(), r.newCA()
			r.listener(ca, "web", other, func(http.ResponseWriter, *http.Request) { n.Add(1) })
		}, err: "refused the control plane's certificate", secret: true},
		"a service in plaintext": {open: func(r *adminRoom, n *atomic.Int64) {
			s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { n.Add(1) }))
			r.t.Cleanup(s.Close)
			r.at("127.0.0.1", uint32(s.Listener.Addr().(*net.TCPAddr).Port))
		}, err: "can't be reached at 127.0.0.1:", secret: true},
		"a redirect": {open: func(r *adminRoom, n *atomic.Int64) {
			elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { n.Add(1) }))
			r.t.Cleanup(elsewhere.Close)
			ca := r.newCA()
			r.listener(ca, "web", ca, func(w http.ResponseWriter, q *http.Request) { http.Redirect(w, q, elsewhere.URL, http.StatusFound) })
		}, err: "status 302", secret: true},
		"an error": {open: func(r *adminRoom, _ *atomic.Int64) {
			ca := r.newCA()
			r.listener(ca, "web", ca, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
		}, err: "status 404"},
		"no end": {open: func(r *adminRoom, _ *atomic.Int64) {
			ca := r.newCA()
			r.listener(ca, "web", ca, func(w http.ResponseWriter, _ *http.Request) {
				for b := make([]byte, 1<<20); ; {
					if _, err := w.Write(b); err != nil {
						return
					}
				}
			})
		}, err: "more than 64 MiB"},
		"nobody": {open: func(r *adminRoom, _ *atomic.Int64) {
			r.at("127.0.0.1", uint32(lab.FreePort(r.t)))
		}, err: "connection refused"},
		"a cloud's credentials": {open: func(r *adminRoom, _ *atomic.Int64) { r.at("169.254.169.254", 80) }, err: "it is not dialed"},
		"link-local":            {open: func(r *adminRoom, _ *atomic.Int64) { r.at("fe80::1", 80) }, err: "it is not dialed"},
		"mapped":                {open: func(r *adminRoom, _ *atomic.Int64) { r.at("::ffff:169.254.169.254", 80) }, err: "it is not dialed"},
		"a group":               {open: func(r *adminRoom, _ *atomic.Int64) { r.at("224.0.0.1", 80) }, err: "it is not dialed"},
		"nowhere":               {open: func(r *adminRoom, _ *atomic.Int64) { r.at("0.0.0.0", 80) }, err: "it is not dialed"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := openAdminRoom(t)
			var asked atomic.Int64
			c.open(r, &asked)
			body, err := inspector{link.New(link.Config{}), r.adminChannel}.Inspect(t.Context(), "default", "web", rest.Inspection{What: "stats", UsedOnly: true})
			if c.err == "" {
				if err != nil || string(body) != c.want {
					t.Errorf("%q, %v", body, err)
				}
				return
			}
			if !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), c.err) || body != nil {
				t.Errorf("%q, %v; want an error with %q", body, err, c.err)
			}
			if c.secret && asked.Load() > 0 {
				t.Error("somebody else was asked")
			}
		})
	}
}

// TestAskedOnlyIfHere is HRD-12: nobody is dialed for a proxy without a stream,
// and none with a link.
func TestAskedOnlyIfHere(t *testing.T) {
	r := openAdminRoom(t)
	dialed := make(chan struct{}, 4)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(dialed)
				return
			}
			dialed <- struct{}{}
			_ = c.Close()
		}
	}()
	r.at("127.0.0.1", uint32(l.Addr().(*net.TCPAddr).Port))
	i := inspector{link.New(link.Config{}), r.adminChannel}
	node := r.here.Node(webKey)
	for _, c := range []struct {
		node *session.Node
		want string
	}{{nil, "not connected to this control plane"}, {&session.Node{Key: webKey, Link: true}, "link"}} {
		r.here.set(webKey, c.node)
		if _, err := i.Inspect(t.Context(), "default", "web", rest.Inspection{What: "clusters"}); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
	// The same address is dialed for one that is here: the test can fail.
	r.here.set(webKey, node)
	if _, err := i.Inspect(t.Context(), "default", "web", rest.Inspection{What: "clusters"}); err == nil {
		t.Error("nobody's answer is taken")
	}
	_ = l.Close()
	n := 0
	for range dialed {
		n++
	}
	if n != 1 {
		t.Errorf("it was dialed %d times, want once", n)
	}
}

// TestAdminPortOrder: the Dataplane's port counts, then what the proxy was told,
// then the setting.
func TestAdminPortOrder(t *testing.T) {
	for want, c := range map[uint32][2]uint32{1: {1, 2}, 2: {0, 2}, 3: {0, 0}} {
		d := mesh.Dataplanes.Make("m", "d", &mesh.DataplaneSpec{Networking: &mesh.Networking{Admin: &mesh.Admin{Port: c[0]}}})
		if got := proxy.AdminPort(mesh.Dataplanes.From(d), c[1], 3); got != want {
			t.Errorf("%v: %s, want %d", c, strconv.Itoa(int(got)), want)
		}
	}
}
