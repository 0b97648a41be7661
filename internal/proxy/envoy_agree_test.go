//go:build e2e

package proxy_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"kuma/internal/envoy/envoytest"
	"kuma/internal/policy"
	"kuma/internal/policy/meshtrafficpermission"
	"kuma/internal/policy/policytest"
	"kuma/internal/resource"
	"kuma/test/lab"
)

// as returns a client that connects to one address under a certificate.
func (a *authority) as(address string, names ...string) *http.Client {
	a.t.Helper()
	cert, key := a.issue(names...)
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		a.t.Fatal(err)
	}
	return &http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			d := tls.Dialer{Config: &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}}
			return d.DialContext(ctx, "tcp", address)
		},
	}}
}

// TestEnvoyAgrees lets a real Envoy decide about random sets of permissions, and
// compares with how this repository reads them (HRD-16, HRD-21).
func TestEnvoyAgrees(t *testing.T) {
	const inbounds = 30
	app := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer app.Close()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var ports []int
	docs := `
type: Mesh
name: default
mtls: {enabledBackend: ca-1, backends: [{name: ca-1, type: builtin}]}
---
type: Secret
name: default.ca-builtin-cert-ca-1
data: LS0tLS1CRUdJTg==
---
type: Dataplane
name: backend
networking:
  address: 127.0.0.14
  inbound:
`
	for i := range inbounds {
		ports = append(ports, lab.FreePort(t))
		docs += fmt.Sprintf("  - {port: %d, name: p%d, servicePort: %d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: backend, kuma.io/protocol: http}}\n", ports[i], i, app.Listener.Addr().(*net.TCPAddr).Port)
	}
	rs := read(t, docs)
	ids := []string{"spiffe://default/a", "spiffe://default/ab", "spiffe://default/a/b", "spiffe://default/a.b", "spiffe://default/aXb", "spiffe://default/b"}
	for i := range inbounds {
		for n := range 1 + r.IntN(3) {
			spec := &policy.Spec[meshtrafficpermission.Conf]{TargetRef: &policy.TargetRef{Kind: policy.KindDataplane, SectionName: fmt.Sprintf("p%d", i)}}
			if r.IntN(2) == 0 {
				for range 1 + r.IntN(4) {
					ref := policy.TargetRef{Kind: policy.KindMesh}
					switch r.IntN(3) {
					case 0:
						ref = policy.TargetRef{Kind: policy.KindMeshSubset, Tags: map[string]string{pick(r, "env", "version"): pick(r, "a", "b")}}
					case 1:
						ref = policy.TargetRef{Kind: policy.KindMeshService, Name: pick(r, "a", "b")}
					}
					spec.From = append(spec.From, policy.Item[meshtrafficpermission.Conf]{TargetRef: ref, Default: meshtrafficpermission.Conf{
						Action: pick(r, meshtrafficpermission.Allow, meshtrafficpermission.Deny, meshtrafficpermission.AllowWithShadowDeny),
					}})
				}
			} else {
				var conf meshtrafficpermission.Conf
				for range 1 + r.IntN(4) {
					m := policy.Match{SpiffeID: &policy.SpiffeIDMatch{Type: pick(r, policy.Exact, policy.Prefix), Value: pick(r, ids...)}}
					if r.IntN(3) == 0 {
						conf.Deny = append(conf.Deny, m)
					} else {
						conf.Allow = append(conf.Allow, m)
					}
				}
				spec.Rules = []policy.Rule[meshtrafficpermission.Conf]{{Default: conf}}
			}
			rs = append(rs, &resource.Resource{
				Meta: resource.Meta{Mesh: "default", Name: fmt.Sprintf("p%d-%d", i, n)}, Kind: meshtrafficpermission.Policy.Kind(), Spec: spec,
			})
		}
	}
	_, res := generate(t, generator(), policytest.NewWorld(t).Put(rs...), "backend")
	a := newAuthority(t)
	run(t, a.static(res, "spiffe://default/backend"))
	callers := [][]string{}
	for _, id := range ids {
		callers = append(callers, []string{id}, []string{id, "kuma://env/" + pick(r, "a", "b"), "kuma://version/" + pick(r, "a", "b")}, []string{id, pick(r, ids...), "kuma://env/a"})
	}
	allowed := 0
	for i, port := range ports {
		for _, names := range callers {
			names = slices.Compact(slices.Clone(names))
			address := fmt.Sprintf("127.0.0.14:%d", port)
			resp, err := a.as(address, names...).Get("https://" + address + "/")
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			d, err := envoytest.Call(res, "GET http://"+address+"/", envoytest.Caller{Names: names})
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode == 200 {
				allowed++
			}
			if (resp.StatusCode == 200) == d.Refused || resp.StatusCode != 200 && !strings.Contains(string(body), "RBAC: access denied") {
				s := text(t, res)
				t.Fatalf("inbound %d, %v: Envoy answers %d %s, we read %s\n%s", i, names, resp.StatusCode, body, d, s[strings.Index(s, "TypedExtensionConfig"):])
			}
		}
	}
	if allowed == 0 || allowed == len(ports)*len(callers) {
		t.Errorf("%d of %d allowed: the policies say nothing", allowed, len(ports)*len(callers))
	}
}

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

// TestEnvoyTimesCallers gives one caller less time than others.
func TestEnvoyTimesCallers(t *testing.T) {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(time.Second):
		case <-r.Context().Done():
		}
	}))
	defer app.Close()
	port := lab.FreePort(t)
	pic := policytest.Picture(t, fmt.Sprintf(`
type: Mesh
name: default
mtls: {enabledBackend: ca-1, backends: [{name: ca-1, type: builtin}]}
---
type: Secret
name: default.ca-builtin-cert-ca-1
data: LS0tLS1CRUdJTg==
---
type: Dataplane
name: backend
networking:
  address: 127.0.0.15
  inbound: [{port: %d, servicePort: %d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: backend, kuma.io/protocol: http}}]
---
type: TrafficPermission
name: all
sources: [{match: {kuma.io/service: "*"}}]
destinations: [{match: {kuma.io/service: "*"}}]
---
type: MeshTimeout
name: t
spec:
  rules:
  - {matches: [{spiffeID: {type: Exact, value: spiffe://default/hasty}}, {spiffeID: {type: Prefix, value: spiffe://default/team}}], default: {http: {requestTimeout: 100ms}}}
`, port, app.Listener.Addr().(*net.TCPAddr).Port), kinds()...)
	_, res := generate(t, generator(), pic, "backend")
	a := newAuthority(t)
	run(t, a.static(res, "spiffe://default/backend", "kuma://kuma.io/service/backend"))
	address := fmt.Sprintf("127.0.0.15:%d", port)
	for names, want := range map[string]int{
		"spiffe://default/hasty kuma://kuma.io/service/hasty": 504,
		"spiffe://default/team/a":                             504,
		"spiffe://default/hasty2":                             200,
		"spiffe://default/teams kuma://x/hasty":               200,
	} {
		resp, err := a.as(address, strings.Fields(names)...).Get("https://" + address + "/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s gets %d, want %d", names, resp.StatusCode, want)
		}
	}
}

// TestEnvoyServerFirst: in a PERMISSIVE mesh a workload that speaks first is
// heard in plaintext and by mutual TLS; by mutual TLS who is not allowed can send
// it nothing.
func TestEnvoyServerFirst(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	heard := make(chan string, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.WriteString(c, "hello")
				b := make([]byte, 5)
				if n, _ := io.ReadFull(c, b); n > 0 {
					heard <- string(b[:n])
				}
			}()
		}
	}()
	port := lab.FreePort(t)
	pic := policytest.Picture(t, fmt.Sprintf(`
type: Mesh
name: default
mtls: {enabledBackend: ca-1, backends: [{name: ca-1, type: builtin, mode: PERMISSIVE}]}
---
type: Secret
name: default.ca-builtin-cert-ca-1
data: LS0tLS1CRUdJTg==
---
type: Dataplane
name: db
networking:
  address: 127.0.0.16
  inbound: [{port: %d, servicePort: %d, serviceAddress: 127.0.0.1, tags: {kuma.io/service: db}}]
---
type: MeshTrafficPermission
name: web
spec: {from: [{targetRef: {kind: MeshService, name: web}, default: {action: Allow}}]}
`, port, l.Addr().(*net.TCPAddr).Port), kinds()...)
	_, res := generate(t, generator(), pic, "db")
	a := newAuthority(t)
	run(t, a.static(res, "spiffe://default/db"))
	address := fmt.Sprintf("127.0.0.16:%d", port)
	secure := func(service string) func() (net.Conn, error) {
		cert, key := a.issue("spiffe://default/"+service, "kuma://kuma.io/service/"+service)
		pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
		if err != nil {
			t.Fatal(err)
		}
		return func() (net.Conn, error) {
			return tls.Dial("tcp", address, &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true, NextProtos: []string{"kuma"}})
		}
	}
	for name, c := range map[string]struct {
		dial  func() (net.Conn, error)
		heard bool
	}{
		"plaintext": {func() (net.Conn, error) { return net.Dial("tcp", address) }, true},
		"web":       {secure("web"), true},
		"intruder":  {secure("intruder"), false},
	} {
		conn, err := c.dial()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		b := make([]byte, 5)
		n, _ := io.ReadFull(conn, b)
		t.Logf("%s hears %q", name, b[:n])
		if c.heard && string(b[:n]) != "hello" {
			t.Errorf("%s hears %q", name, b[:n])
		}
		_, _ = io.WriteString(conn, name[:3]+"!!")
		if c.heard {
			select {
			case got := <-heard:
				if got != name[:3]+"!!" {
					t.Errorf("the workload hears %q from %s", got, name)
				}
			case <-time.After(patience):
				t.Errorf("the workload hears nothing from %s", name)
			}
		} else if n, _ := conn.Read(b); n != 0 {
			t.Errorf("%s is still served", name)
		}
		conn.Close()
	}
	select {
	case got := <-heard:
		t.Errorf("the workload hears %q", got)
	default:
	}
}
