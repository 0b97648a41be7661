package proxy_test

import (
	"testing"

	"kuma/internal/envoy"
	"kuma/internal/envoy/envoytest"
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

func TestPrint(t *testing.T) {
	pic := policytest.Picture(t, twoServices, kinds()...)
	for _, n := range []string{"web-1", "backend-1"} {
		c, res := generate(t, generator(), pic, n)
		s, err := envoytest.Print(res)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(s)
		t.Log(c.Issues)
	}
}
