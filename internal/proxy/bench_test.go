package proxy_test

import (
	"fmt"
	"testing"

	"kuma/internal/mesh"
	"kuma/internal/policy/policytest"
	"kuma/internal/proxy"
	"kuma/internal/resource"
	"kuma/internal/state"
)

// fleet is a mesh with mutual TLS and n proxies, each with one inbound and five
// outbounds, of n/20 services.
func fleet(t testing.TB, n int) *state.Picture {
	docs := `
type: Mesh
name: default
mtls: {enabledBackend: ca-1, backends: [{name: ca-1, type: builtin}]}
---
type: Secret
name: default.ca-builtin-cert-ca-1
data: LS0tLS1CRUdJTg==
---
type: MeshTimeout
name: all
spec:
  to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 5s, idleTimeout: 1h, http: {requestTimeout: 15s, streamIdleTimeout: 30m}}}]
  from: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 10s, idleTimeout: 2h, http: {requestTimeout: 0s, streamIdleTimeout: 1h, maxStreamDuration: 0s}}}]
---
type: MeshTrafficPermission
name: all
spec:
  from: [{targetRef: {kind: Mesh}, default: {action: Allow}}]
`
	rs, err := policytest.Read(docs, kinds()...)
	if err != nil {
		t.Fatal(err)
	}
	services := n / 20
	for i := range n {
		net := &mesh.Networking{
			Address: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255),
			Inbound: []mesh.Inbound{{Port: 8080, ServicePort: 80, Tags: map[string]string{
				mesh.TagService: fmt.Sprintf("svc-%d", i%services), mesh.TagProtocol: "http", mesh.TagZone: "default", "version": "v1",
			}}},
		}
		for j := range 5 {
			net.Outbound = append(net.Outbound, mesh.Outbound{Port: uint32(10000 + j), Tags: map[string]string{mesh.TagService: fmt.Sprintf("svc-%d", (i+j)%services)}})
		}
		r := mesh.Dataplanes.Make("default", fmt.Sprintf("dp-%04d", i), &mesh.DataplaneSpec{Networking: net})
		r.Labels = map[string]string{mesh.LabelZone: "default", mesh.LabelMesh: "default", mesh.LabelProxyType: "sidecar"}
		rs = append(rs, r)
	}
	return policytest.NewWorld(t).Put(rs...)
}

func proxyOf(i int) proxy.Proxy {
	return proxy.Proxy{Key: resource.Key{Kind: mesh.Dataplanes.Name, Mesh: "default", Name: fmt.Sprintf("dp-%04d", i)}, Link: true, AccessLogPath: "/tmp/log"}
}

// BenchmarkGenerate is one proxy of a thousand: its configuration anew, packed.
func BenchmarkGenerate(b *testing.B) {
	pic := fleet(b, 1000)
	g := generator()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		c, err := g.Generate(pic, proxyOf(i%1000))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.Encode(); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

// BenchmarkAffected is the question whether a policy that selects nobody
// concerns a proxy.
func BenchmarkAffected(b *testing.B) {
	pic := fleet(b, 1000)
	g := generator()
	rs, err := policytest.Read(`
type: MeshTimeout
name: nobody
spec:
  targetRef: {kind: MeshSubset, tags: {kuma.io/service: nobody}}
  to: [{targetRef: {kind: Mesh}, default: {connectionTimeout: 7s}}]
`, kinds()...)
	if err != nil {
		b.Fatal(err)
	}
	changes := []state.Change{{Key: rs[0].Key(), New: rs[0]}}
	for b.Loop() {
		if g.Affected(pic, proxyOf(7), changes) {
			b.Fatal("it does")
		}
	}
}
