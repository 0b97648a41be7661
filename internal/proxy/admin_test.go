package proxy_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/envoy"
	"kuma/internal/envoy/envoytest"
	"kuma/internal/mesh"
	"kuma/internal/policy/policytest"
	"kuma/internal/proxy"
	"kuma/internal/state"
)

const lonely = `
type: Mesh
name: default
---
type: Dataplane
mesh: default
name: web
networking:
  address: 127.0.0.11
  inbound: [{port: 8080, servicePort: 18080, serviceAddress: 127.0.0.1, tags: {kuma.io/service: web}}]
  outbound: [{port: 10001, tags: {kuma.io/service: backend}}]
`

func admin(change func(*proxy.Admin)) *proxy.Admin {
	a := &proxy.Admin{
		Listen: 9901, Socket: "/tmp/dp/kuma-envoy-admin.sock", Address: "127.0.0.1", Port: 9901, Readiness: 9902,
		Chain: []byte("CHAIN"), Key: []byte("KEY"), CA: []byte("CA"), Caller: "kuma-cp",
	}
	if change != nil {
		change(a)
	}
	return a
}

func withAdmin(t *testing.T, pic *state.Picture, a *proxy.Admin, link bool) (*envoy.Config, envoy.Resources) {
	t.Helper()
	c, err := generator().Generate(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "web"), Admin: a, Link: link})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := envoytest.Validate(res); err != nil {
		t.Errorf("Envoy would refuse it: %v", err)
	}
	return c, res
}

// TestAdminListener compares the listener with the one on file, and with itself.
func TestAdminListener(t *testing.T) {
	pic := policytest.Picture(t, lonely)
	_, res := withAdmin(t, pic, admin(nil), false)
	_, again := withAdmin(t, pic, admin(nil), false)
	if text(t, res) != text(t, again) {
		t.Error("the same inputs give two configurations")
	}
	only := envoy.Resources{}
	for typ, byName := range res {
		only[typ] = map[string]*envoy.Packed{}
		for name, p := range byName {
			if strings.HasPrefix(name, "kuma:") {
				only[typ][name] = p
			}
		}
	}
	file := filepath.Join("testdata", "admin.yaml")
	if f := flag.Lookup("update"); f != nil && f.Value.String() == "true" {
		if err := os.WriteFile(file, []byte(text(t, only)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text(t, only)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// TestLinkedProxyHasNoAdminListener is HRD-30: where the link serves, no admin
// listener is on the network, whatever is handed in.
func TestLinkedProxyHasNoAdminListener(t *testing.T) {
	pic := policytest.Picture(t, lonely)
	_, without := withAdmin(t, pic, nil, true)
	_, with := withAdmin(t, pic, admin(nil), true)
	if diff := cmp.Diff(text(t, without), text(t, with)); diff != "" {
		t.Error(diff)
	}
	for _, never := range []string{"kuma:envoy:admin", "kuma:readiness", "private", "9901"} {
		if strings.Contains(text(t, with), never) {
			t.Errorf("a linked proxy has %q", never)
		}
	}
}

// TestAdminUpstream is HRD-30 and HRD-12: what a proxy says of itself makes no
// gateway to another machine, and takes nobody's port.
func TestAdminUpstream(t *testing.T) {
	pic := policytest.Picture(t, lonely)
	tcp := func(address string) func(*proxy.Admin) {
		return func(a *proxy.Admin) { a.Socket, a.Address = "", address }
	}
	for name, c := range map[string]struct {
		change func(*proxy.Admin)
		to     string // where the admin cluster leads, or
		issue  string // why there is none
	}{
		"socket":          {nil, "path: /tmp/dp/kuma-envoy-admin.sock", ""},
		"loopback":        {tcp("127.0.0.1"), "address: 127.0.0.1", ""},
		"loopback IPv6":   {tcp("::1"), "address: ::1", ""},
		"no address":      {tcp(""), "address: 127.0.0.1", ""},
		"all, elsewhere":  {func(a *proxy.Admin) { a.Socket, a.Address, a.Listen = "", "0.0.0.0", 9911 }, "address: 127.0.0.1", ""},
		"all of IPv6":     {func(a *proxy.Admin) { a.Socket, a.Address, a.Listen = "", "::", 9911 }, "address: ::1", ""},
		"all, same port":  {tcp("0.0.0.0"), "", "has the listener's port"},
		"another machine": {tcp("10.0.0.1"), "", "not allowed to have addresses other than"},
		"metadata":        {tcp("169.254.169.254"), "", "not allowed to have addresses other than"},
		"a name":          {tcp("localhost"), "", "not allowed to have addresses other than"},
		"no port":         {func(a *proxy.Admin) { a.Socket, a.Port = "", 0 }, "", "is not known"},
		"relative socket": {func(a *proxy.Admin) { a.Socket = "admin.sock" }, "", "must be absolute"},
		"long socket":     {func(a *proxy.Admin) { a.Socket = "/" + strings.Repeat("x", 107) }, "", "at most 107 bytes"},
		"inbound's port":  {func(a *proxy.Admin) { a.Listen = 8080 }, "", "belongs to an inbound or outbound"},
		"another's port":  {func(a *proxy.Admin) { a.Listen = 10001 }, "path: /tmp/dp/kuma-envoy-admin.sock", ""},
		"no such port":    {func(a *proxy.Admin) { a.Listen = 70000 }, "", "70000 is not a port"},
		"no certificate":  {func(a *proxy.Admin) { a.Problem = "there is none" }, "", "there is none"},
	} {
		t.Run(name, func(t *testing.T) {
			config, res := withAdmin(t, pic, admin(c.change), false)
			if c.issue != "" {
				if len(config.Issues) != 1 || !strings.Contains(config.Issues[0].Message, c.issue) {
					t.Errorf("issues %v, want one with %q", config.Issues, c.issue)
				}
				if strings.Contains(text(t, res), "kuma:envoy:admin") {
					t.Error("there is a listener all the same")
				}
				if res[envoy.ListenerType]["inbound:127.0.0.11:8080"] == nil {
					t.Error("the rest of the configuration is missing")
				}
				return
			}
			only := envoy.Resources{envoy.ClusterType: {"kuma:envoy:admin": res[envoy.ClusterType]["kuma:envoy:admin"]}}
			if len(config.Issues) > 0 || !strings.Contains(text(t, only), c.to) {
				t.Errorf("issues %v, want %q in\n%s", config.Issues, c.to, text(t, only))
			}
		})
	}
}

// TestAdminCAConcerns: another authority of the admin listeners concerns the
// proxies that have one.
func TestAdminCAConcerns(t *testing.T) {
	pic := policytest.Picture(t, lonely)
	changes := []state.Change{{Key: mesh.GlobalSecrets.Key("", mesh.EnvoyAdminCA)}}
	for link, want := range map[bool]bool{true: false, false: true} {
		if got := generator().Affected(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "web"), Link: link}, changes); got != want {
			t.Errorf("link %v: affected %v", link, got)
		}
	}
	other := []state.Change{{Key: mesh.GlobalSecrets.Key("", "another")}}
	if generator().Affected(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "web")}, other) {
		t.Error("any other secret concerns it too")
	}
}
