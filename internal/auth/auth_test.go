package auth

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/token"
)

// secretsMap is Secrets by "mesh/name".
type secretsMap map[string][]byte

func (s secretsMap) Secret(_ context.Context, mesh, name string) ([]byte, error) {
	if b, ok := s[mesh+"/"+name]; ok {
		return b, nil
	}
	return nil, errs.New(errs.NotFound, "secret %q not found", name)
}

func (s secretsMap) SecretNames(_ context.Context, mesh, prefix string) (out []string, _ error) {
	for k := range s {
		if m, n, _ := strings.Cut(k, "/"); m == mesh && strings.HasPrefix(n, prefix) {
			out = append(out, n)
		}
	}
	return out, nil
}

// brokenSecrets can't be read.
type brokenSecrets struct{}

func (brokenSecrets) Secret(context.Context, string, string) ([]byte, error) {
	return nil, errs.New(errs.Unavailable, "the disk is gone")
}

func (brokenSecrets) SecretNames(context.Context, string, string) ([]string, error) {
	return nil, errs.New(errs.Unavailable, "the disk is gone")
}

// Keys are made once: making RSA keys is slow.
var keyA, keyB = sync.OnceValues(token.NewSigningKey), sync.OnceValues(token.NewSigningKey)

func keyOf(t *testing.T, f func() ([]byte, error)) []byte {
	t.Helper()
	b, err := f()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func someSecrets(t *testing.T) secretsMap {
	t.Helper()
	return secretsMap{
		"/user-token-signing-key-1":             keyOf(t, keyA),
		"/zone-token-signing-key-1":             keyOf(t, keyB),
		"m/dataplane-token-signing-key-m-1":     keyOf(t, keyA),
		"other/dataplane-token-signing-key-o-1": keyOf(t, keyB),
	}
}

func issuer(s Secrets) *Issuer {
	return NewIssuer(IssuerConfig{Users: DefaultUsers(), Proxies: DefaultProxies(), Secrets: s})
}

func us(netip.AddrPort, netip.AddrPort) (uint32, bool) { return uint32(os.Getuid()), true }

func authenticator(t *testing.T, s Secrets, owner SocketOwner, change ...func(*UsersConfig)) *Authenticator {
	t.Helper()
	users := DefaultUsers()
	for _, c := range change {
		c(&users)
	}
	a, err := NewAuthenticator(AuthenticatorConfig{Users: users, Secrets: s, Owner: owner})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// local is a request as a program on this machine sends it.
func local(host string, headers ...string) *http.Request {
	r := httptest.NewRequest("GET", "/meshes", nil)
	r.RemoteAddr, r.Host = "127.0.0.1:40000", host
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Add(k, v)
	}
	addr := net.Addr(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5681})
	return r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, addr))
}

// TestLocalhost is HRD-01: who is the administrator without a credential.
func TestLocalhost(t *testing.T) {
	remote := func(addr string) *http.Request {
		r := local("localhost:5681")
		r.RemoteAddr = addr
		return r
	}
	overTLS := func(r *http.Request) *http.Request { r.TLS = &tls.ConnectionState{}; return r }
	for _, c := range []struct {
		name  string
		r     *http.Request
		admin bool
	}{
		{"localhost", local("localhost:5681"), true},
		{"no port", local("localhost"), true},
		{"loopback address", local("127.0.0.1:5681"), true},
		{"another loopback address", local("127.9.9.9:5681"), true},
		{"IPv6 loopback", local("[::1]:5681"), true},
		{"IPv6 peer", remote("[::1]:40000"), true},
		{"mapped peer", remote("[::ffff:127.0.0.1]:40000"), true},
		{"own page", local("localhost:5681", "Origin: http://localhost:5681", "Sec-Fetch-Site: same-origin"), true},
		{"typed by hand", local("localhost:5681", "Sec-Fetch-Site: none"), true},
		{"own page over TLS", overTLS(local("localhost:5682", "Origin: https://localhost:5682")), true},

		{"remote peer", remote("192.0.2.7:40000"), false},
		{"peer without port", remote("127.0.0.1"), false},
		{"peer is a Unix socket", remote("@"), false},
		{"rebinding name", local("evil.example:5681"), false},
		{"name that starts like localhost", local("localhost.evil.example:5681"), false},
		{"name that looks like an address", local("127.0.0.1.nip.io:5681"), false},
		{"other address", local("192.0.2.1:5681"), false},
		{"any address", local("0.0.0.0:5681"), false},
		{"no host", local(""), false},
		{"decimal address", local("2130706433:5681"), false},
		{"foreign origin", local("localhost:5681", "Origin: https://evil.example"), false},
		{"origin of another port", local("localhost:5681", "Origin: http://localhost:3000"), false},
		{"origin of another scheme", local("localhost:5681", "Origin: https://localhost:5681"), false},
		{"plain origin over TLS", overTLS(local("localhost:5682", "Origin: http://localhost:5682")), false},
		{"null origin", local("localhost:5681", "Origin: null"), false},
		{"origin with a path", local("localhost:5681", "Origin: http://localhost:5681/x"), false},
		{"origin with a user", local("localhost:5681", "Origin: http://a@localhost:5681"), false},
		{"two origins", local("localhost:5681", "Origin: http://localhost:5681", "Origin: https://evil.example"), false},
		{"rebinding name with its origin", local("evil.example:5681", "Origin: http://evil.example:5681"), false},
		{"empty origin", local("localhost:5681", "Origin: "), false},
		{"cross-site", local("localhost:5681", "Sec-Fetch-Site: cross-site"), false},
		{"same-site", local("localhost:5681", "Sec-Fetch-Site: same-site"), false},
		{"X-Forwarded-For", local("localhost:5681", "X-Forwarded-For: 127.0.0.1"), false},
		{"empty X-Forwarded-For", local("localhost:5681", "X-Forwarded-For: "), false},
		{"X-Forwarded-Host", local("localhost:5681", "X-Forwarded-Host: localhost"), false},
		{"X-Real-IP", local("localhost:5681", "X-Real-IP: 127.0.0.1"), false},
		{"Forwarded", local("localhost:5681", "Forwarded: for=127.0.0.1"), false},
		{"Via", local("localhost:5681", "Via: 1.1 proxy"), false},
		{"other authorization", local("localhost:5681", "Authorization: Basic YTpi"), false},
		{"lower case bearer", local("localhost:5681", "Authorization: bearer x"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := authenticator(t, someSecrets(t), us).HTTP(c.r)
			if err != nil {
				t.Fatal(err)
			}
			want := Anonymous()
			if c.admin {
				want = Admin()
			}
			if got.String() != want.String() {
				t.Errorf("is %s, want %s", got, want)
			}
			off := authenticator(t, someSecrets(t), us, func(u *UsersConfig) { u.LocalhostIsAdmin = false })
			if got, err := off.HTTP(c.r); err != nil || !got.IsAnonymous() {
				t.Errorf("with the setting off: %s, %v", got, err)
			}
		})
	}
	for name, c := range map[string]struct {
		owner SocketOwner
		admin bool
	}{
		"root":         {func(netip.AddrPort, netip.AddrPort) (uint32, bool) { return 0, true }, true},
		"another user": {func(netip.AddrPort, netip.AddrPort) (uint32, bool) { return uint32(os.Getuid()) + 1, true }, false},
		"unknown":      {func(netip.AddrPort, netip.AddrPort) (uint32, bool) { return 0, false }, false},
		"asked for the peer's socket": {func(own, peer netip.AddrPort) (uint32, bool) {
			return 0, own.String() == "127.0.0.1:40000" && peer.String() == "127.0.0.1:5681"
		}, true},
	} {
		got, err := authenticator(t, someSecrets(t), c.owner).HTTP(local("localhost:5681"))
		if err != nil || got.IsAnonymous() == c.admin {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
}

// TestLocalhostForReal asks the kernel about a real connection, with and
// without the memory of ConnContext.
func TestLocalhostForReal(t *testing.T) {
	if _, err := os.Stat("/proc/self/net/tcp"); err != nil {
		t.Skip("no socket tables here")
	}
	for _, network := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", network)
		if err != nil {
			t.Logf("no %s here", network)
			continue
		}
		a := authenticator(t, someSecrets(t), nil)
		for _, remembered := range []bool{false, true} {
			s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c, err := a.HTTP(r)
				_, _ = fmt.Fprint(w, c, err)
			})}
			if remembered {
				s.ConnContext = a.ConnContext
			}
			web := httptest.NewUnstartedServer(s.Handler)
			if !remembered {
				_ = web.Listener.Close()
				web.Listener = l
			}
			web.Config.ConnContext = s.ConnContext
			web.Start()
			resp, err := http.Get(web.URL)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 200)
			n, _ := resp.Body.Read(b)
			_ = resp.Body.Close()
			if got, want := string(b[:n]), Admin().String()+" <nil>"; got != want {
				t.Errorf("%s: %q, want %q", network, got, want)
			}
			web.Close()
		}
	}
}

func bearer(text string) *http.Request { return local("localhost:5681", "Authorization: Bearer "+text) }

func TestUsers(t *testing.T) {
	s := someSecrets(t)
	i := issuer(s)
	ctx := t.Context()
	alice, err := i.User(ctx, UserRequest{Name: "alice", Groups: []string{"g", AnonymousGroup}, ValidFor: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := authenticator(t, s, us).HTTP(bearer(alice))
	if err != nil || got.String() != "alice/g,mesh-system:authenticated" {
		t.Errorf("alice is %s, %v", got, err)
	}
	admin, err := i.AdminToken(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := authenticator(t, s, us).HTTP(bearer(admin)); err != nil || got.String() != Admin().String() {
		t.Errorf("the admin token is %s, %v", got, err)
	}
	impostor, err := i.User(ctx, UserRequest{Name: ControlPlaneName, ValidFor: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := authenticator(t, s, us).HTTP(bearer(impostor)); err != nil || got.IsControlPlane() {
		t.Errorf("a token makes its holder the control plane: %s, %v", got, err)
	}

	// A credential that does not verify never falls back to being local.
	dp, err := i.Dataplane(ctx, DataplaneRequest{Mesh: "m"})
	if err != nil {
		t.Fatal(err)
	}
	expired, err := i.User(ctx, UserRequest{Name: "bob", ValidFor: "-1s"})
	if err != nil {
		t.Fatal(err)
	}
	body := strings.Split(alice, ".")
	for name, text := range map[string]string{
		"garbage": "garbage", "empty": "", "dataplane token": dp, "expired": expired,
		"no signature": body[0] + "." + body[1] + ".", "other payload": body[0] + "." + strings.Split(admin, ".")[1] + "." + body[2],
	} {
		if got, err := authenticator(t, s, us).HTTP(bearer(text)); !errs.Is(err, errs.Unauthenticated) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	two := bearer(alice)
	two.Header.Add("Authorization", "Bearer "+admin)
	if _, err := authenticator(t, s, us).HTTP(two); !errs.Is(err, errs.Unauthenticated) {
		t.Errorf("two credentials: %v", err)
	}

	// A store that can't be read lets nobody in (HRD-18).
	if got, err := authenticator(t, brokenSecrets{}, us).HTTP(bearer(alice)); err == nil {
		t.Errorf("without keys: %s", got)
	}

	// Rotation: the highest number signs, with a plain kid however it is padded.
	s["/user-token-signing-key-0002"] = keyOf(t, keyB)
	second, err := i.User(ctx, UserRequest{Name: "alice", ValidFor: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	a := authenticator(t, s, us)
	for name, text := range map[string]string{"first key": alice, "second key": second} {
		if _, err := a.HTTP(bearer(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	delete(s, "/user-token-signing-key-1")
	if _, err := a.HTTP(bearer(alice)); err == nil || !strings.Contains(err.Error(), `GlobalSecret of name "user-token-signing-key-1" is not found`) {
		t.Errorf("key gone: %v", err)
	}
	s["/user-token-signing-key-0002"] = keyOf(t, keyA)
	if _, err := a.HTTP(bearer(second)); err == nil {
		t.Error("a token is taken by a key that was replaced")
	}
}

func TestRevocation(t *testing.T) {
	s := someSecrets(t)
	ctx := t.Context()
	p, err := NewProxyChecker(ProxyCheckerConfig{Proxies: DefaultProxies(), Secrets: s})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := issuer(s).Dataplane(ctx, DataplaneRequest{Mesh: "m", Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := p.Verify(ctx, "m", "a", raw)
	if err != nil {
		t.Fatal(err)
	}
	id := proxy.Stamp().ID
	// HRD-39: both documented places, white space or not.
	for _, place := range []string{"m/dataplane-token-revocations-m", "/dataplane-token-revocations-m"} {
		for _, list := range []string{id, "x, " + id + " ,y", "x\n" + id + "\n"} {
			s[place] = []byte(list)
			if err := p.Again(ctx, proxy); err == nil || !strings.HasSuffix(err.Error(), "token is revoked") {
				t.Errorf("%s = %q: %v", place, list, err)
			}
			s[place] = []byte("x")
			if err := p.Again(ctx, proxy); err != nil {
				t.Errorf("%s without it: %v", place, err)
			}
		}
		delete(s, place)
	}
	s["other/dataplane-token-revocations-m"] = []byte(id)
	if err := p.Again(ctx, proxy); err != nil {
		t.Errorf("another mesh's list counts: %v", err)
	}
	if err := p.Again(ctx, Proxy{}); err == nil {
		t.Error("the zero Proxy is verified")
	}
	user, err := issuer(s).User(ctx, UserRequest{Name: "u", ValidFor: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	a := authenticator(t, s, us)
	caller, err := a.users.User(ctx, user)
	if err != nil {
		t.Fatal(err)
	}
	s["/user-token-revocations"] = []byte(caller.Stamp().ID)
	if _, err := a.HTTP(bearer(user)); !errs.Is(err, errs.Unauthenticated) {
		t.Errorf("revoked user: %v", err)
	}
}

func TestProxies(t *testing.T) {
	s := someSecrets(t)
	ctx := t.Context()
	checker := func(change func(*ProxiesConfig)) *ProxyChecker {
		cfg := DefaultProxies()
		if change != nil {
			change(&cfg)
		}
		p, err := NewProxyChecker(ProxyCheckerConfig{Proxies: cfg, Secrets: s})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	issue := func(r DataplaneRequest) string {
		t.Helper()
		raw, err := issuer(s).Dataplane(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	whole := issue(DataplaneRequest{Mesh: "m"})
	for _, c := range []struct {
		name, mesh, proxy, raw, want string
	}{
		{"mesh alone", "m", "a", whole, ""},
		{"white space around", "m", "a", " " + whole + "\n", ""},
		{"name", "m", "a", issue(DataplaneRequest{Mesh: "m", Name: "a"}), ""},
		{"other name", "m", "b", issue(DataplaneRequest{Mesh: "m", Name: "a"}), "authentication failed: proxy name from requestor: b is different than in token: a"},
		{"other mesh's key", "other", "a", whole, `authentication failed: there is no signing key with KID 1. Secret of name "dataplane-token-signing-key-other-1" in mesh "other" is not found. If signing key was rotated, regenerate the token`},
		{"none", "m", "a", "", "authentication failed: the proxy sent no token"},
	} {
		_, err := checker(nil).Verify(ctx, c.mesh, c.proxy, c.raw)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	bound := checker(func(c *ProxiesConfig) { c.DPProxy.DPToken.RequireBound = true })
	if _, err := bound.Verify(ctx, "m", "a", whole); !errs.Is(err, errs.Denied) {
		t.Errorf("an unbound token where bound ones are demanded: %v", err)
	}
	if _, err := bound.Verify(ctx, "m", "a", issue(DataplaneRequest{Mesh: "m", Name: "a", Tags: map[string][]string{mesh.TagService: {"x"}}})); err != nil {
		t.Errorf("a bound token: %v", err)
	}
	none := checker(func(c *ProxiesConfig) { c.DPProxy.Type = ProxyNone })
	if p, err := none.Verify(ctx, "m", "a", ""); err != nil || p.Covers(dataplane("m", "a", nil)) != nil || p.Covers(dataplane("m", "b", nil)) == nil {
		t.Errorf("type none: %v", err)
	}
	if _, err := NewProxyChecker(ProxyCheckerConfig{Proxies: ProxiesConfig{DPProxy: DPProxyConfig{Type: "psk"}}}); !errs.Is(err, errs.Invalid) {
		t.Errorf("unknown type: %v", err)
	}
	if (Proxy{}).Covers(dataplane("m", "a", nil)) == nil || (Proxy{}).Covers(dataplane("", "", nil)) == nil {
		t.Error("the zero Proxy covers a Dataplane")
	}
}

func dataplane(inMesh, name string, labels map[string]string, tags ...map[string]string) mesh.Dataplane {
	spec := &mesh.DataplaneSpec{Networking: &mesh.Networking{Address: "192.0.2.1"}}
	for i, set := range tags {
		spec.Networking.Inbound = append(spec.Networking.Inbound, mesh.Inbound{Port: uint32(8000 + i), Tags: set})
	}
	r := mesh.Dataplanes.Make(inMesh, name, spec)
	r.Labels = labels
	return mesh.Dataplanes.From(r)
}

// TestCovers is HRD-04: for every pair of a token and a Dataplane, the answer
// is what the contract's words say, computed here anew.
func TestCovers(t *testing.T) {
	s := someSecrets(t)
	ctx := t.Context()
	p, err := NewProxyChecker(ProxyCheckerConfig{Proxies: DefaultProxies(), Secrets: s})
	if err != nil {
		t.Fatal(err)
	}
	i := issuer(s)
	sets := func(values ...string) (out []map[string]string) {
		for _, v := range values {
			set := map[string]string{mesh.TagService: v}
			if v == "" {
				set = nil
			}
			if v == "b" {
				set["version"] = "2"
			}
			out = append(out, set)
		}
		return out
	}
	gateway := func(name string, tags map[string]string) mesh.Dataplane {
		d := dataplane("m", name, nil)
		d.Spec.Networking.Gateway = &mesh.Gateway{Tags: tags}
		return d
	}
	var planes []mesh.Dataplane
	for _, name := range []string{"d1", "d2"} {
		for _, inbounds := range [][]map[string]string{nil, sets("a"), sets("b"), sets("a", "b"), sets("a", "a"), sets("", "a"), sets("c")} {
			for _, labels := range []map[string]string{nil, {mesh.LabelWorkload: "w1"}, {mesh.LabelWorkload: "w2"}} {
				planes = append(planes, dataplane("m", name, labels, inbounds...))
			}
		}
		planes = append(planes, gateway(name, map[string]string{mesh.TagService: "a"}), gateway(name, map[string]string{mesh.TagService: "c"}), dataplane("other", name, nil, sets("a")...))
	}
	count := map[bool]int{}
	for _, name := range []string{"", "d1"} {
		for _, kind := range []string{"", "dataplane", "ingress", "egress"} {
			for _, workload := range []string{"", "w1"} {
				for _, tags := range []map[string][]string{nil, {mesh.TagService: {"a"}}, {mesh.TagService: {"a", "b"}}, {mesh.TagService: {}}, {mesh.TagService: {"b"}, "version": {"2"}}, {"version": {"1", "2"}}} {
					claims := DataplaneRequest{Mesh: "m", Name: name, Type: kind, Workload: workload, Tags: tags}
					raw, err := i.Dataplane(ctx, claims)
					if err != nil {
						t.Fatal(err)
					}
					for _, d := range planes {
						proxy, err := p.Verify(ctx, d.Mesh, d.Name, raw)
						if err == nil {
							err = proxy.Covers(d)
						}
						want := covered(claims, d)
						count[want]++
						if (err == nil) != want {
							t.Fatalf("token %+v, Dataplane %s/%s %v %+v: %v, want covered %v", claims, d.Mesh, d.Name, d.Labels, d.Spec.Networking, err, want)
						}
						if err == nil {
							// What it does not name, it does not cover.
							other := dataplane(d.Mesh, d.Name+"x", d.Labels, d.Spec.TagSets()...)
							if proxy.Covers(other) == nil {
								t.Fatalf("the proxy %s covers %s", d.Name, other.Name)
							}
						}
					}
				}
			}
		}
	}
	if count[true] < 50 || count[false] < 50 {
		t.Errorf("the pairs are lopsided: %v", count)
	}
}

// covered says in the plainest way what a token covers.
func covered(c DataplaneRequest, d mesh.Dataplane) bool {
	if d.Mesh != c.Mesh || c.Name != "" && c.Name != d.Name || c.Type != "" && c.Type != "dataplane" {
		return false
	}
	if c.Workload != "" && d.Labels[mesh.LabelWorkload] != c.Workload {
		return false
	}
	var all []map[string]string
	for _, in := range d.Spec.Networking.Inbound {
		all = append(all, in.Tags)
	}
	if g := d.Spec.Networking.Gateway; g != nil {
		all = append(all, g.Tags)
	}
	for tag, allowed := range c.Tags {
		there := false
		for _, set := range all {
			v, ok := set[tag]
			if !ok {
				continue
			}
			there = true
			good := false
			for _, a := range allowed {
				good = good || a == v
			}
			if !good {
				return false
			}
		}
		if !there {
			return false
		}
	}
	return true
}

func TestPublicKeys(t *testing.T) {
	s := someSecrets(t)
	private, err := token.ParseSigningKey(keyOf(t, keyA))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "user.pub.pem")
	if err := os.WriteFile(file, token.PublicPEM(&private.PublicKey), 0o600); err != nil {
		t.Fatal(err)
	}
	raw, err := issuer(s).User(t.Context(), UserRequest{Name: "alice", ValidFor: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	offline := func(kid string) func(*UsersConfig) {
		return func(u *UsersConfig) {
			u.Tokens.Validator = ValidatorConfig{PublicKeys: []PublicKey{{KID: kid, KeyFile: file}}}
		}
	}
	if _, err := authenticator(t, secretsMap{}, us, offline("01")).HTTP(bearer(raw)); err != nil {
		t.Errorf("offline key: %v", err)
	}
	if _, err := authenticator(t, s, us, offline("2")).HTTP(bearer(raw)); !errs.Is(err, errs.Unauthenticated) {
		t.Errorf("secrets are used although switched off: %v", err)
	}
	for name, k := range map[string]PublicKey{
		"neither": {KID: "1"}, "no kid": {KeyFile: file}, "no file": {KID: "1", KeyFile: file + "x"}, "no PEM": {KID: "1", Key: "x"},
		"private key": {KID: "1", Key: string(keyOf(t, keyA))},
	} {
		users := DefaultUsers()
		users.Tokens.Validator.PublicKeys = []PublicKey{k}
		if _, err := NewAuthenticator(AuthenticatorConfig{Users: users, Secrets: s}); !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAccess lists who may do what.
func TestAccess(t *testing.T) {
	access := func(change ...func(*AccessConfig)) *Access {
		cfg := DefaultAccess()
		for _, c := range change {
			c(&cfg)
		}
		a, err := NewAccess(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	contract := access(func(c *AccessConfig) { c.Anonymous = AnonymousContract })
	listed := access(func(c *AccessConfig) {
		c.Static.AdminResources = Principals{Users: []string{"alice", AnonymousName}, Groups: []string{AnonymousGroup}}
	})
	alice := Caller{name: "alice", groups: []string{AuthenticatedGroup}}
	plain, secret := &resource.Kind{Name: "Mesh"}, &resource.Kind{Name: "Secret", Admin: true}
	type row struct {
		access *Access
		caller Caller
		// may: read/write plain, read/write secret, tokens, dump, metadata, kinds
		want string
	}
	for name, r := range map[string]row{
		"anonymous":                {access(), Anonymous(), "------"},
		"user":                     {access(), alice, "y--yyy"},
		"admin":                    {access(), Admin(), "yyyyyy"},
		"control plane":            {access(), ControlPlane(), "yyyyyy"},
		"anonymous, as contract":   {contract, Anonymous(), "y--yyy"},
		"user, as contract":        {contract, alice, "y--yyy"},
		"listed user":              {listed, alice, "yy-yyy"},
		"nobody is anon by a list": {listed, Anonymous(), "------"},
	} {
		got := ""
		for _, err := range []error{
			errors2(r.access.Read(r.caller, plain), r.access.Write(r.caller, plain)),
			errors2(r.access.Read(r.caller, secret), r.access.Write(r.caller, secret)),
			errors2(r.access.Do(r.caller, GenerateUserToken), errors2(r.access.Do(r.caller, GenerateDataplaneToken), r.access.Do(r.caller, GenerateZoneToken))),
			errors2(r.access.Do(r.caller, ViewConfigDump), errors2(r.access.Do(r.caller, ViewStats), r.access.Do(r.caller, ViewClusters))),
			r.access.Do(r.caller, ViewMetadata),
			r.access.Do(r.caller, ViewKinds),
		} {
			if err == nil {
				got += "y"
				continue
			}
			got += "-"
			if !errs.Is(err, errs.Denied) {
				t.Errorf("%s: %v is no refusal", name, err)
			}
		}
		if d := cmp.Diff(r.want, got); d != "" {
			t.Errorf("%s: %s, want %s", name, got, r.want)
		}
		if !r.caller.IsControlPlane() && r.access.Do(r.caller, 0) == nil {
			t.Errorf("%s may do what has no name", name)
		}
	}
	for _, bad := range []AccessConfig{{Type: "rbac"}, {Anonymous: "open"}} {
		if _, err := NewAccess(bad); !errs.Is(err, errs.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// errors2 is the first error, or a sign that two answers differ.
func errors2(a, b error) error {
	if (a == nil) != (b == nil) {
		return fmt.Errorf("answers differ: %v, %v", a, b)
	}
	return a
}
