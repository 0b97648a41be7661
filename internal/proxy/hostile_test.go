package proxy_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"kuma/internal/envoy/envoytest"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/policy/meshtimeout"
	"kuma/internal/policy/meshtrafficpermission"
	"kuma/internal/policy/policytest"
	"kuma/internal/proxy"
	"kuma/internal/resource"
)

// words are what a hostile user might write where the gate lets anything
// through that has the right letters.
func words(r *rand.Rand) string {
	return pickOne(r, "web", "backend", ".", "-", "a.b", "x:y:z", "_", "kuma.io", "localhost", "none", "mesh", "0", "..", "A", strings.Repeat("long-", 80))
}

func pickOne[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

func hostileTags(r *rand.Rand) map[string]string {
	tags := map[string]string{mesh.TagService: words(r)}
	for range r.IntN(3) {
		tags[pickOne(r, "version", "kuma.io/zone", "a/b", "x:y", "kuma.io/service/x")] = words(r)
	}
	if r.IntN(2) == 0 {
		tags[mesh.TagProtocol] = pickOne(r, mesh.Protocols()...)
	}
	return tags
}

func hostileRef(r *rand.Rand, kinds ...string) policy.TargetRef {
	t := policy.TargetRef{Kind: pickOne(r, kinds...)}
	switch t.Kind {
	case policy.KindMeshService:
		t.Name = words(r)
	case policy.KindMeshServiceSubset:
		t.Name, t.Tags = words(r), hostileTags(r)
	case policy.KindMeshSubset:
		t.Tags = hostileTags(r)
	case policy.KindDataplane:
		if r.IntN(2) == 0 {
			t.Labels = map[string]string{words(r): words(r)}
		}
	}
	return t
}

func hostileMatch(r *rand.Rand) policy.Match {
	m := policy.Match{SpiffeID: &policy.SpiffeIDMatch{Type: pickOne(r, policy.Exact, policy.Prefix), Value: "spiffe://" + pickOne(r, "default", "x") + pickOne(r, "", "/a", "/a.b", "/a_b-c.", "/"+strings.Repeat("long", 100))}}
	if r.IntN(4) == 0 {
		m.SNI = &policy.SNIMatch{Type: "Exact", Value: "a.b"}
	}
	return m
}

// hostile makes an object that passes its kind's check, or nil.
func hostile(r *rand.Rand, i int) *resource.Resource {
	top := hostileRef(r, policy.KindMesh, policy.KindDataplane, policy.KindMeshSubset, policy.KindMeshService, policy.KindMeshServiceSubset)
	var out *resource.Resource
	switch r.IntN(6) {
	case 0, 1:
		net := &mesh.Networking{Address: pickOne(r, "10.0.0.1", "::1", "host.example", "fe80::1")}
		for j := range r.IntN(4) {
			net.Inbound = append(net.Inbound, mesh.Inbound{
				Port: uint32(1 + r.IntN(65535)), ServicePort: uint32(r.IntN(65536)), ServiceAddress: pickOne(r, "", "127.0.0.1", "::1"),
				Tags: hostileTags(r), Name: pickOne(r, "", fmt.Sprintf("p%d", j)), State: pickOne(r, mesh.Ready, mesh.NotReady, mesh.Ignored, ""),
			})
		}
		for j := range 1 + r.IntN(4) {
			o := mesh.Outbound{Port: uint32(1000 + j), Address: pickOne(r, "", "127.0.0.2", "::1")}
			if r.IntN(3) == 0 {
				o.BackendRef = &mesh.OutboundRef{Kind: "MeshService", Name: fmt.Sprintf("svc-%d", r.IntN(20)), Port: 80}
			} else {
				o.Tags = hostileTags(r)
			}
			net.Outbound = append(net.Outbound, o)
		}
		out = mesh.Dataplanes.Make("default", fmt.Sprintf("dp-%d", i), &mesh.DataplaneSpec{Networking: net})
	case 2:
		out = mesh.MeshServices.Make("default", fmt.Sprintf("svc-%d", i%20), &mesh.MeshServiceSpec{
			Selector:   mesh.ServiceSelector{DataplaneTags: hostileTags(r)},
			Ports:      []mesh.ServicePort{{Port: 80, AppProtocol: pickOne(r, "", "http", "grpc", "tcp"), TargetPort: &mesh.IntOrString{Number: uint32(1 + r.IntN(65535))}}},
			Identities: []mesh.ServiceIdentity{{Type: pickOne(r, mesh.IdentityTag, mesh.IdentitySPIFFE), Value: words(r)}},
		})
	case 3:
		out = mesh.TrafficPermissions.Make("default", fmt.Sprintf("tp-%d", i), &mesh.TrafficPermissionSpec{
			Sources: []mesh.Selector{{Match: hostileTags(r)}, {Match: map[string]string{mesh.TagService: "*"}}}, Destinations: []mesh.Selector{{Match: hostileTags(r)}},
		})
	case 4:
		spec := &policy.Spec[meshtrafficpermission.Conf]{TargetRef: &top}
		for range 1 + r.IntN(3) {
			if r.IntN(2) == 0 {
				spec.Rules = append(spec.Rules, policy.Rule[meshtrafficpermission.Conf]{Default: meshtrafficpermission.Conf{
					Allow: []policy.Match{hostileMatch(r)}, Deny: []policy.Match{hostileMatch(r)}, AllowWithShadowDeny: []policy.Match{hostileMatch(r)},
				}})
			} else {
				spec.From = append(spec.From, policy.Item[meshtrafficpermission.Conf]{
					TargetRef: hostileRef(r, policy.KindMesh, policy.KindMeshSubset, policy.KindMeshService, policy.KindMeshServiceSubset),
					Default:   meshtrafficpermission.Conf{Action: pickOne(r, meshtrafficpermission.Allow, meshtrafficpermission.Deny, meshtrafficpermission.AllowWithShadowDeny)},
				})
			}
		}
		out = &resource.Resource{Meta: resource.Meta{Mesh: "default", Name: fmt.Sprintf("mtp-%d", i)}, Kind: meshtrafficpermission.Policy.Kind(), Spec: spec}
	default:
		d := func() *resource.Duration {
			return &resource.Duration{Duration: pickOne[time.Duration](r, 0, 1, 1<<40, 1<<62)}
		}
		conf := meshtimeout.Conf{ConnectionTimeout: d(), IdleTimeout: d(), HTTP: &meshtimeout.HTTP{RequestTimeout: d(), StreamIdleTimeout: d(), MaxStreamDuration: d(), MaxConnectionDuration: d(), RequestHeadersTimeout: d()}}
		spec := &policy.Spec[meshtimeout.Conf]{TargetRef: &top}
		if r.IntN(2) == 0 {
			spec.To = []policy.Item[meshtimeout.Conf]{{TargetRef: hostileRef(r, policy.KindMesh, policy.KindMeshService), Default: conf}}
		} else {
			m := hostileMatch(r)
			m.SNI = nil
			spec.Rules = []policy.Rule[meshtimeout.Conf]{{Default: conf}, {Matches: []policy.Match{m}, Default: meshtimeout.Conf{HTTP: &meshtimeout.HTTP{RequestTimeout: d()}}}}
		}
		out = &resource.Resource{Meta: resource.Meta{Mesh: "default", Name: fmt.Sprintf("mt-%d", i)}, Kind: meshtimeout.Policy.Kind(), Spec: spec}
	}
	if len(out.Kind.Check(out.Spec)) > 0 {
		return nil
	}
	return out
}

// Whatever passes the gate, every proxy gets a configuration that keeps Envoy's
// rules (HRD-26). Many are made at once.
func TestHostileObjects(t *testing.T) {
	kept := map[string]int{}
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 9))
		rs := read(t, strings.Replace(twoServices, "type: builtin", "type: builtin, mode: "+pickOne(r, "STRICT", "PERMISSIVE"), 1))
		seen := map[resource.Key]bool{}
		for i := range 150 {
			if o := hostile(r, i); o != nil && !seen[o.Key()] {
				seen[o.Key()] = true
				if o.Kind == mesh.MeshServices.Kind {
					o.Labels = map[string]string{words(r): words(r)}
				}
				rs = append(rs, o)
				kept[o.Kind.Name]++
			}
		}
		pic := policytest.NewWorld(t).Put(rs...)
		g := generator()
		var wg sync.WaitGroup
		for _, o := range pic.Mesh("default").List(mesh.Dataplanes.Name) {
			wg.Go(func() {
				c, err := g.Generate(pic, proxy.Proxy{Key: o.Key(), AccessLogPath: "/tmp/log", Link: seed%2 == 0})
				if err != nil {
					t.Errorf("%s: %v", o.Name, err)
					return
				}
				res, err := c.Encode()
				if err != nil {
					t.Errorf("%s: %v", o.Name, err)
					return
				}
				if err := envoytest.Validate(res); err != nil {
					t.Errorf("seed %d: %s: %v", seed, o.Name, err)
				}
				if _, err := g.Explain(pic, proxy.Proxy{Key: o.Key()}); err != nil {
					t.Errorf("%s: %v", o.Name, err)
				}
			})
		}
		wg.Wait()
	}
	for _, k := range []string{"Dataplane", "MeshService", "TrafficPermission", "MeshTrafficPermission", "MeshTimeout"} {
		if kept[k] < 20 {
			t.Errorf("only %d of kind %s passed the gate", kept[k], k)
		}
	}
}
