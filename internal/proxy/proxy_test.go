package proxy_test

import (
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/google/go-cmp/cmp"

	"kuma/internal/envoy"
	"kuma/internal/envoy/envoytest"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/policy/meshtimeout"
	"kuma/internal/policy/meshtrafficpermission"
	"kuma/internal/policy/policytest"
	"kuma/internal/proxy"
	"kuma/internal/resource"
	"kuma/internal/state"
)

func policies() []policy.Policy {
	return []policy.Policy{meshtimeout.Policy, meshtrafficpermission.Policy}
}

func kinds() (out []*resource.Kind) {
	for _, p := range policies() {
		out = append(out, p.Kind())
	}
	return out
}

func generator() *proxy.Generator {
	return proxy.New(proxy.Config{Policies: policies(), Zone: "default"})
}

// generate makes and packs the configuration of a Dataplane of mesh default.
func generate(t testing.TB, g *proxy.Generator, pic *state.Picture, name string) (*envoy.Config, envoy.Resources) {
	t.Helper()
	return generateTo(t, g, pic, name, "/tmp/denials")
}

func generateTo(t testing.TB, g *proxy.Generator, pic *state.Picture, name, log string) (*envoy.Config, envoy.Resources) {
	t.Helper()
	c, err := g.Generate(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", name), AccessLogPath: log})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return c, res
}

const twoServices = `
type: Mesh
name: default
mtls:
  enabledBackend: ca-1
  backends: [{name: ca-1, type: builtin}]
---
type: Secret
mesh: default
name: default.ca-builtin-cert-ca-1
data: LS0tLS1CRUdJTg==
---
type: Dataplane
mesh: default
name: web-1
labels: {kuma.io/zone: default}
networking:
  address: 127.0.0.11
  inbound: [{port: 8080, servicePort: 18080, serviceAddress: 127.0.0.1, tags: {kuma.io/service: web, kuma.io/protocol: http, kuma.io/zone: default}}]
  outbound:
  - {port: 10001, tags: {kuma.io/service: backend}}
  - {port: 10002, tags: {kuma.io/service: db}}
  - {port: 10003, backendRef: {kind: MeshService, name: backend, port: 8080}}
---
type: Dataplane
mesh: default
name: backend-1
labels: {app: backend, kuma.io/zone: default}
networking:
  address: 127.0.0.12
  inbound:
  - {port: 8080, servicePort: 18080, serviceAddress: 127.0.0.1, name: main, tags: {kuma.io/service: backend, kuma.io/protocol: http, kuma.io/zone: default, version: v1}}
  - {port: 8081, servicePort: 18081, serviceAddress: 127.0.0.1, tags: {kuma.io/service: backend-grpc, kuma.io/protocol: grpc, kuma.io/zone: default}}
  - {port: 5432, servicePort: 15432, serviceAddress: 127.0.0.1, tags: {kuma.io/service: db, kuma.io/protocol: tcp, kuma.io/zone: default}}
---
type: MeshService
mesh: default
name: backend
labels: {kuma.io/zone: default}
spec:
  selector: {dataplaneTags: {kuma.io/service: backend}}
  ports: [{port: 8080, name: main, appProtocol: http}]
  identities: [{type: ServiceTag, value: backend}]
`

func TestCases(t *testing.T) { policytest.Run(t, policies()...) }

// text prints a configuration.
func text(t testing.TB, res envoy.Resources) string {
	t.Helper()
	s, err := envoytest.Print(res)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// clientTLS returns a cluster's TLS, or nil for plaintext.
func clientTLS(t testing.TB, res envoy.Resources, cluster string) *tlsv3.UpstreamTlsContext {
	t.Helper()
	var c clusterv3.Cluster
	if err := res[envoy.ClusterType][cluster].Body.UnmarshalTo(&c); err != nil {
		t.Fatal(err)
	}
	if c.TransportSocket == nil {
		return nil
	}
	out := new(tlsv3.UpstreamTlsContext)
	if err := c.TransportSocket.GetTypedConfig().UnmarshalTo(out); err != nil {
		t.Fatal(err)
	}
	return out
}

func read(t testing.TB, docs string) []*resource.Resource {
	t.Helper()
	rs, err := policytest.Read(docs, kinds()...)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

const allowWeb = `
type: MeshTrafficPermission
name: web
spec:
  from: [{targetRef: {kind: MeshService, name: web}, default: {action: Allow}}]
`

// A changed permission changes no listener of HTTP, only what it discovers.
func TestPermissionsLeaveListenersAlone(t *testing.T) {
	w := policytest.NewWorld(t)
	before := w.Put(read(t, twoServices)...)
	after := w.Put(read(t, allowWeb)...)
	_, a := generate(t, generator(), before, "backend-1")
	_, b := generate(t, generator(), after, "backend-1")
	changed := map[string]bool{}
	for typ, byName := range b {
		for name, p := range byName {
			if a[typ][name] == nil || a[typ][name].Hash != p.Hash {
				changed[name] = true
			}
		}
		for name := range a[typ] {
			if byName[name] == nil {
				t.Errorf("%s is gone", name)
			}
		}
	}
	want := map[string]bool{
		"kuma:rbac:allow:inbound:127.0.0.12:8080": true, "kuma:rbac:allow:inbound:127.0.0.12:8081": true,
		// TCP has its permissions in the chain.
		"inbound:127.0.0.12:5432": true,
	}
	if diff := cmp.Diff(want, changed); diff != "" {
		t.Errorf("changed (-want +got):\n%s", diff)
	}
}

// With a link the proxy's certificate comes from kuma-dp, trust from ADS.
func TestLink(t *testing.T) {
	pic := policytest.Picture(t, twoServices, kinds()...)
	for _, link := range []bool{true, false} {
		c, err := generator().Generate(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "web-1"), Link: link})
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		for _, common := range []*tlsv3.CommonTlsContext{c.Inbounds[0].TLS.CommonTlsContext, clientTLS(t, res, "backend").GetCommonTlsContext()} {
			own := common.TlsCertificateSdsSecretConfigs[0]
			trust := common.GetCombinedValidationContext().ValidationContextSdsSecretConfig
			if got := own.SdsConfig.GetApiConfigSource() != nil; got != link {
				t.Errorf("link %v: the certificate comes over the link: %v", link, got)
			}
			if own.Name != "identity_cert:secret:default" || trust.Name != "mesh_ca:secret:default" || trust.SdsConfig.GetAds() == nil {
				t.Errorf("link %v: secrets %s and %s", link, own, trust)
			}
		}
		if link {
			if got := c.Inbounds[0].TLS.CommonTlsContext.TlsCertificateSdsSecretConfigs[0].SdsConfig.GetApiConfigSource().GrpcServices[0].GetEnvoyGrpc().ClusterName; got != "kuma:sds" {
				t.Errorf("the link's cluster is %q", got)
			}
		}
		if len(res[envoy.SecretType]) != 1 || strings.Contains(text(t, res), "private_key") {
			t.Error("there is more than the trust anchors among the secrets")
		}
	}
}

// A service whose last endpoint has gone keeps the protocol that is remembered.
func TestRememberedProtocol(t *testing.T) {
	w := policytest.NewWorld(t)
	w.Put(read(t, twoServices)...)
	pic := w.Remove(mesh.Dataplanes.Key("default", "backend-1"))
	_, res := generate(t, generator(), pic, "web-1")
	for call, want := range map[string]string{
		"GET http://127.0.0.1:10001/": "503: no endpoints in backend",
		"tcp://127.0.0.1:10002":       "503: no endpoints in db",
		"GET http://127.0.0.1:10003/": "503: no endpoints in default_backend__default_msvc_8080",
	} {
		d, err := envoytest.Route(res, call)
		if err != nil || d.Reason != want {
			t.Errorf("%s: %s, %v, want %s", call, d, err, want)
		}
	}
	if !strings.Contains(text(t, res), "name: outbound:backend") {
		t.Error("backend is no longer http")
	}
}

// Endpoints with host names are resolved by who can, else left out and told.
func TestHostNames(t *testing.T) {
	docs := strings.Replace(twoServices, "address: 127.0.0.12", "address: backend.example", 1)
	pic := policytest.Picture(t, docs, kinds()...)
	c, res := generate(t, generator(), pic, "web-1")
	if d, _ := envoytest.Route(res, "GET http://127.0.0.1:10001/"); d.Reason != "503: no endpoints in backend" {
		t.Errorf("without a resolver: %s", d)
	}
	if len(c.Issues) == 0 || !strings.Contains(c.Issues[0].Message, "backend.example") {
		t.Errorf("issues: %v", c.Issues)
	}
	ip := "10.0.0.7"
	g := proxy.New(proxy.Config{Policies: policies(), Resolve: func(h string) []string {
		if h != "backend.example" {
			return nil
		}
		return []string{ip}
	}})
	for _, ip = range []string{"10.0.0.7", "10.0.0.8"} {
		_, res = generate(t, g, pic, "web-1")
		if d, _ := envoytest.Route(res, "GET http://127.0.0.1:10001/"); !slices.Equal(d.Endpoints, []string{ip + ":8080"}) {
			t.Errorf("resolved: %s", d)
		}
	}
}

// What can't be done is left out and told; the rest is served (HRD-26).
func TestIssues(t *testing.T) {
	pic := policytest.Picture(t, `
type: Mesh
name: default
mtls: {enabledBackend: ca-1, backends: [{name: ca-1, type: builtin}]}
---
type: Dataplane
name: web
networking:
  address: 127.0.0.11
  inbound: [{port: 8080, tags: {kuma.io/service: web}}]
  outbound:
  - {port: 10001, backendRef: {kind: MeshService, name: gone, port: 80}}
  - {port: 10002, backendRef: {kind: MeshService, name: here, port: 81}}
  - {port: 10003, backendRef: {kind: MeshService, labels: {a: b}, port: 81}}
  - {port: 10004, tags: {kuma.io/service: web}}
---
type: Dataplane
name: nameless
networking:
  address: 127.0.0.12
  outbound: [{port: 10001, tags: {kuma.io/service: web}}]
---
type: MeshService
name: here
spec: {ports: [{port: 80}]}
`, kinds()...)
	for name, want := range map[string][]string{
		"web": {
			"leads back to itself", `MeshService "gone" does not exist`, `MeshService "here" has no port 81`, "no MeshService has the labels a=b",
			`the certificate of backend "ca-1" is not there yet`,
		},
		"nameless": {"no kuma.io/service tag", `the certificate of backend "ca-1" is not there yet`},
	} {
		c, res := generate(t, generator(), pic, name)
		if len(c.Issues) != len(want) {
			t.Errorf("%s: issues %v, want %d", name, c.Issues, len(want))
			continue
		}
		for i, w := range want {
			if !strings.Contains(c.Issues[i].Message, w) {
				t.Errorf("%s: issue %q, want %q", name, c.Issues[i].Message, w)
			}
		}
		port := map[string]string{"web": "10004", "nameless": "10001"}[name]
		if res[envoy.ListenerType]["outbound:127.0.0.1:"+port] == nil {
			t.Errorf("%s: the good outbound is not served", name)
		}
	}
	if _, err := generator().Generate(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "x")}); !errs.Is(err, errs.NotFound) {
		t.Errorf("no such Dataplane: %v", err)
	}
	if _, err := generator().Generate(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("x", "web")}); !errs.Is(err, errs.NotFound) {
		t.Errorf("no such Mesh: %v", err)
	}
}

// breakable is a policy that fails or panics where it is told to.
type breakable struct {
	Do string `json:"do,omitempty"`
}

// A policy that can't be applied is left out alone; others of its kind and of
// other kinds hold (HRD-26).
func TestOneBadPolicy(t *testing.T) {
	bad := policy.New(resource.Kind{Name: "Breakable", Plural: "breakables"}, nil, func(c *envoy.Config, r policy.Rules[breakable]) error {
		for _, o := range c.Outbounds {
			conf, ok := r.Outbound(&o.To)
			if !ok {
				continue
			}
			o.StatPrefix = conf.Do
			switch conf.Do {
			case "fail":
				return errors.New("it fails")
			case "panic":
				panic("it panics")
			}
		}
		return nil
	})
	all := append([]policy.Policy{bad}, policies()...)
	docs := twoServices + `
---
type: MeshTimeout
name: good
spec: {to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 3s}}]}
---
type: Breakable
name: z-good
spec: {to: [{targetRef: {kind: Mesh}, default: {do: good}}]}
`
	for _, do := range []string{"fail", "panic"} {
		more := "\n---\ntype: Breakable\nname: a-bad\nspec: {to: [{targetRef: {kind: Mesh}, default: {do: " + do + "}}]}\n"
		pic := policytest.Picture(t, docs+more, append(kinds(), bad.Kind())...)
		c, res := generate(t, proxy.New(proxy.Config{Policies: all}), pic, "web-1")
		if len(c.Issues) != 1 || c.Issues[0].Resource.Name != "a-bad" || !strings.Contains(c.Issues[0].Message, "it "+do) {
			t.Errorf("%s: issues %v", do, c.Issues)
		}
		if got := c.Outbounds[0].StatPrefix; got != "good" {
			t.Errorf("%s: the other policy of the kind did %q", do, got)
		}
		if d, err := envoytest.Route(res, "GET http://127.0.0.1:10001/"); err != nil || d.Connect != 3*time.Second {
			t.Errorf("%s: %s, %v", do, d, err)
		}
	}
}

func TestAffected(t *testing.T) {
	w := policytest.NewWorld(t)
	base := w.Put(read(t, twoServices+`
---
type: Mesh
name: other
---
type: Dataplane
name: lonely
networking: {address: 127.0.0.19, inbound: [{port: 80, servicePort: 8080, tags: {kuma.io/service: lonely}}]}
---
type: TrafficPermission
name: lonely
sources: [{match: {kuma.io/service: "*"}}]
destinations: [{match: {kuma.io/service: lonely}}]
---
type: MeshTimeout
name: lonely
spec:
  targetRef: {kind: MeshSubset, tags: {kuma.io/service: lonely}}
  to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 1s}}]
---
type: MeshService
name: lonely
spec: {ports: [{port: 80}]}
---
type: DataplaneInsight
name: backend-1
mTLS: {issuedBackend: old}
`)...)
	find := func(k resource.Key) *resource.Resource {
		r := base.Get(k)
		if r == nil {
			t.Fatalf("there is no %s", k)
		}
		return r
	}
	g := generator()
	inOther := read(t, strings.Replace(allowWeb, "name: web", "mesh: other\nname: web", 1))[0]
	secret := mesh.Secrets.Make("default", "dataplane-token-signing-key-default-1", &mesh.SecretSpec{})
	for name, c := range map[string]struct {
		of   *resource.Resource
		want []string
	}{
		"the mesh":                    {find(mesh.Meshes.Key("", "default")), []string{"web-1", "backend-1", "lonely"}},
		"another mesh":                {find(mesh.Meshes.Key("", "other")), nil},
		"a policy in another mesh":    {inOther, nil},
		"a policy for all":            {read(t, allowWeb)[0], []string{"web-1", "backend-1", "lonely"}},
		"a policy for one":            {find(resource.Key{Kind: "MeshTimeout", Mesh: "default", Name: "lonely"}), []string{"lonely"}},
		"an older permission for one": {find(mesh.TrafficPermissions.Key("default", "lonely")), []string{"lonely"}},
		"a proxy that web uses":       {find(mesh.Dataplanes.Key("default", "backend-1")), []string{"web-1", "backend-1"}},
		"a proxy that nobody uses":    {find(mesh.Dataplanes.Key("default", "lonely")), []string{"lonely"}},
		"a service that web uses":     {find(mesh.MeshServices.Key("default", "backend")), []string{"web-1"}},
		"a service that nobody uses":  {find(mesh.MeshServices.Key("default", "lonely")), nil},
		"the trust anchors":           {find(mesh.Secrets.Key("default", "default.ca-builtin-cert-ca-1")), []string{"web-1", "backend-1", "lonely"}},
		"another secret":              {secret, nil},
		"an insight in a STRICT mesh": {find(mesh.DataplaneInsights.Key("default", "backend-1")), nil},
	} {
		for _, change := range []state.Change{{Key: c.of.Key(), New: c.of}, {Key: c.of.Key(), Old: c.of}, {Key: c.of.Key(), Old: c.of, New: c.of}} {
			var got []string
			for _, d := range []string{"web-1", "backend-1", "lonely"} {
				if g.Affected(base, proxy.Proxy{Key: mesh.Dataplanes.Key("default", d)}, []state.Change{change}) {
					got = append(got, d)
				}
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%s concerns %v, want %v", name, got, c.want)
			}
		}
	}
	permissive := w.Put(read(t, strings.Replace(twoServices, "type: builtin", "type: builtin, mode: PERMISSIVE", 1))...)
	insight := find(mesh.DataplaneInsights.Key("default", "backend-1"))
	if !g.Affected(permissive, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "web-1")}, []state.Change{{Key: insight.Key(), New: insight}}) {
		t.Error("an insight does not concern its callers in a PERMISSIVE mesh")
	}
}

// What Affected says is checked against what Generate does: a proxy that is not
// affected has the same configuration as before.
func TestAffectedMissesNothing(t *testing.T) {
	w := policytest.NewWorld(t)
	docs := read(t, twoServices+"\n---\n"+allowWeb)
	pic := w.Put(docs...)
	g := generator()
	for _, r := range docs[1:] {
		if r.Name == "web-1" || r.Name == "backend-1" {
			continue
		}
		next := w.Remove(r.Key())
		changes, ok := next.Since(pic)
		if !ok {
			t.Fatal("the pictures are not connected")
		}
		for _, d := range []string{"web-1", "backend-1"} {
			_, a := generate(t, g, pic, d)
			_, b := generate(t, g, next, d)
			if !g.Affected(next, proxy.Proxy{Key: mesh.Dataplanes.Key("default", d)}, changes) && text(t, a) != text(t, b) {
				t.Errorf("without %s %s changes and is not affected", r.Key(), d)
			}
		}
		pic = next
	}
}

func TestExplain(t *testing.T) {
	pic := policytest.Picture(t, twoServices+`
---
type: TrafficPermission
name: all
sources: [{match: {kuma.io/service: "*"}}]
destinations: [{match: {kuma.io/service: "*"}}]
---
type: MeshTimeout
name: a
spec: {to: [{targetRef: {kind: MeshService, name: backend}, default: {connectionTimeout: 1s}}]}
---
type: MeshTimeout
name: b
spec: {to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 2s, idleTimeout: 3s}}]}
---
type: MeshTimeout
name: not-for-web
spec:
  targetRef: {kind: Dataplane, name: backend-1}
  to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 9s}}]
`, kinds()...)
	got, err := generator().Explain(pic, proxy.Proxy{Key: mesh.Dataplanes.Key("default", "web-1")})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, a := range got {
		for _, p := range a.Policies {
			lines = append(lines, a.Kind.Name+" "+p.Name)
		}
		for _, in := range a.Inbounds {
			lines = append(lines, a.Kind.Name+" "+in.Inbound.Name+" from "+in.Origins[0].Resource.Name)
		}
		for _, o := range a.Outbounds {
			raw, err := resource.Marshal(o.Conf)
			if err != nil {
				t.Fatal(err)
			}
			var from []string
			for _, x := range o.Origins {
				from = append(from, x.Resource.Name)
			}
			lines = append(lines, a.Kind.Name+" to "+o.Outbound.To.Name()+" "+string(raw)+" from "+strings.Join(from, " "))
		}
	}
	want := []string{
		"MeshTimeout b", "MeshTimeout a",
		`MeshTimeout to backend {"connectionTimeout":"1s","idleTimeout":"3s"} from b a`,
		`MeshTimeout to db {"connectionTimeout":"2s","idleTimeout":"3s"} from b`,
		`MeshTimeout to backend {"connectionTimeout":"1s","idleTimeout":"3s"} from b a`,
		"TrafficPermission all", "TrafficPermission inbound:127.0.0.11:8080 from all",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("explained (-want +got):\n%s", diff)
	}
}

// What is missing closes, it never opens (HRD-18): without trust anchors,
// permissions, MeshService identities or endpoints' certificates nothing is sent
// or taken in plaintext in a STRICT mesh.
func TestMissingPartsStayClosed(t *testing.T) {
	w := policytest.NewWorld(t)
	rs := read(t, twoServices+"\n---\n"+allowWeb)
	pic := w.Put(rs...)
	for _, gone := range []resource.Key{
		{},
		{Kind: "MeshTrafficPermission", Mesh: "default", Name: "web"},
		mesh.Secrets.Key("default", "default.ca-builtin-cert-ca-1"),
	} {
		if gone.Name != "" {
			pic = w.Remove(gone)
		}
		for _, d := range []string{"web-1", "backend-1"} {
			c, res := generate(t, generator(), pic, d)
			for _, in := range c.Inbounds {
				if in.Guard != envoy.Strict {
					t.Errorf("without %s, %s is open", gone, in.Name)
				}
				if d, err := envoytest.Call(res, "tcp://"+strings.TrimPrefix(in.Name, "inbound:"), envoytest.Caller{}); err != nil || !d.Refused {
					t.Errorf("without %s, %s takes plaintext: %s, %v", gone, in.Name, d, err)
				}
			}
			for _, o := range c.Outbounds {
				if clientTLS(t, res, o.Cluster.Name) == nil {
					t.Errorf("without %s, %s is plaintext", gone, o.Name)
				}
			}
			if gone.Kind == mesh.Secrets.Name {
				if len(res[envoy.SecretType]) != 0 {
					t.Errorf("there are secrets without trust anchors: %v", res[envoy.SecretType])
				}
			}
		}
	}
}

// Many certificates in a trust bundle are all anchors, each on its own line.
func TestTrustBundle(t *testing.T) {
	docs := strings.Replace(twoServices, "LS0tLS1CRUdJTg==", base64.StdEncoding.EncodeToString([]byte("one\ntwo")), 1)
	_, res := generate(t, generator(), policytest.Picture(t, docs, kinds()...), "web-1")
	var s tlsv3.Secret
	if err := res[envoy.SecretType]["mesh_ca:secret:default"].Body.UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	if got := string(s.GetValidationContext().GetTrustedCa().GetInlineBytes()); got != "one\ntwo\n" {
		t.Errorf("the bundle is %q", got)
	}
}

// An inbound whose address is a name needs a resolver.
func TestInboundByName(t *testing.T) {
	pic := policytest.Picture(t, strings.Replace(twoServices, "address: 127.0.0.12", "address: backend.example", 1), kinds()...)
	c, _ := generate(t, generator(), pic, "backend-1")
	if len(c.Inbounds) != 0 || len(c.Issues) != 3 || !strings.Contains(c.Issues[0].Message, `"backend.example" can't be resolved`) {
		t.Errorf("%d inbounds, issues %v", len(c.Inbounds), c.Issues)
	}
	g := proxy.New(proxy.Config{Policies: policies(), Resolve: func(string) []string { return []string{"10.0.0.7"} }})
	c, _ = generate(t, g, pic, "backend-1")
	if len(c.Inbounds) != 3 || c.Inbounds[0].Name != "inbound:10.0.0.7:8080" {
		t.Errorf("inbounds %v", c.Inbounds)
	}
}

// A deep equality of what is shared: proxies with one set of inputs hold the
// same packed resources, others don't.
func TestSharing(t *testing.T) {
	docs := twoServices + `
---
type: Dataplane
name: web-2
labels: {kuma.io/zone: default}
networking:
  address: 127.0.0.13
  inbound: [{port: 8080, servicePort: 18080, tags: {kuma.io/service: web, kuma.io/protocol: http}}]
  outbound: [{port: 10001, tags: {kuma.io/service: backend}}]
---
type: Dataplane
name: special
networking:
  address: 127.0.0.14
  inbound: [{port: 8080, servicePort: 18080, tags: {kuma.io/service: special, kuma.io/protocol: http}}]
  outbound: [{port: 10001, tags: {kuma.io/service: backend}}]
---
type: MeshTimeout
name: special
spec:
  targetRef: {kind: MeshService, name: special}
  to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 1s}}]
`
	pic := policytest.Picture(t, docs, kinds()...)
	g := generator()
	_, one := generate(t, g, pic, "web-1")
	_, two := generate(t, g, pic, "web-2")
	_, other := generate(t, g, pic, "special")
	for _, typ := range []string{envoy.ClusterType, envoy.ListenerType, envoy.EndpointType} {
		name := map[string]string{envoy.ListenerType: "outbound:127.0.0.1:10001"}[typ]
		if name == "" {
			name = "backend"
		}
		if one[typ][name] != two[typ][name] {
			t.Errorf("%s is not shared", name)
		}
		if same := one[typ][name] == other[typ][name]; same != (typ == envoy.EndpointType) {
			t.Errorf("%s is shared with another policy: %v", name, same)
		}
	}
	if d, err := envoytest.Route(other, "GET http://127.0.0.1:10001/"); err != nil || d.Connect != time.Second {
		t.Errorf("special: %s, %v", d, err)
	}
	if d, err := envoytest.Route(one, "GET http://127.0.0.1:10001/"); err != nil || d.Connect != 5*time.Second {
		t.Errorf("web: %s, %v", d, err)
	}
}
