package meshtrafficpermission_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"kuma/internal/envoy/envoytest"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/policy/meshtrafficpermission"
	"kuma/internal/policy/policytest"
	"kuma/internal/resource"
)

const inbound = "GET http://127.0.0.12:8080/"

func world(t testing.TB) []*resource.Resource {
	t.Helper()
	rs, err := policytest.Read(`
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
labels: {app: backend}
networking:
  address: 127.0.0.12
  inbound: [{port: 8080, servicePort: 80, tags: {kuma.io/service: backend, kuma.io/protocol: http}}]
`)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// caller is a proxy as its tags, one value each, as an inbound has them.
type caller map[string]string

func (c caller) names() []string {
	out := []string{"spiffe://default/" + c[mesh.TagService]}
	for _, k := range slices.Sorted(maps.Keys(c)) {
		out = append(out, "kuma://"+k+"/"+c[k])
	}
	return out
}

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

// TestFromAgainstReference makes random sets of policies with "from" and asks
// for every caller who may exist: the answer is that of the last entry, in the
// contract's order, that names the caller (HRD-16).
func TestFromAgainstReference(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		rs := world(t)
		var sets []*resource.Resource
		for i := range 1 + r.IntN(4) {
			spec := &policy.Spec[meshtrafficpermission.Conf]{TargetRef: pick(r, nil,
				&policy.TargetRef{Kind: policy.KindMesh}, &policy.TargetRef{Kind: policy.KindDataplane, Labels: map[string]string{"app": "backend"}},
				&policy.TargetRef{Kind: policy.KindDataplane, Name: "backend"}, &policy.TargetRef{Kind: policy.KindMeshService, Name: "backend"},
				&policy.TargetRef{Kind: policy.KindMeshService, Name: "other"})}
			for range 1 + r.IntN(4) {
				ref := policy.TargetRef{Kind: policy.KindMesh}
				switch r.IntN(4) {
				case 1:
					ref = policy.TargetRef{Kind: policy.KindMeshSubset, Tags: map[string]string{pick(r, "env", "version"): pick(r, "a", "b")}}
				case 2:
					ref = policy.TargetRef{Kind: policy.KindMeshService, Name: pick(r, "web", "web2")}
				case 3:
					ref = policy.TargetRef{Kind: policy.KindMeshServiceSubset, Name: pick(r, "web", "web2"), Tags: map[string]string{"env": pick(r, "a", "b"), "version": "a"}}
				}
				action := pick(r, meshtrafficpermission.Allow, meshtrafficpermission.Deny, meshtrafficpermission.AllowWithShadowDeny)
				spec.From = append(spec.From, policy.Item[meshtrafficpermission.Conf]{TargetRef: ref, Default: meshtrafficpermission.Conf{Action: action}})
			}
			sets = append(sets, &resource.Resource{
				Meta: resource.Meta{Mesh: "default", Name: fmt.Sprintf("p%d", i)}, Kind: meshtrafficpermission.Policy.Kind(), Spec: spec,
			})
		}
		rs = append(rs, sets...)
		res := policytest.Generate(t, []policy.Policy{meshtrafficpermission.Policy}, rs, mesh.Dataplanes.Key("default", "backend"))
		for _, svc := range []string{"web", "web2", "third"} {
			for _, env := range []string{"a", "b", "c"} {
				for _, version := range []string{"a", "b"} {
					c := caller{mesh.TagService: svc, "env": env, "version": version}
					action := reference(sets, c)
					d, err := envoytest.Call(res, inbound, envoytest.Caller{Names: c.names()})
					if err != nil {
						t.Fatal(err)
					}
					wantRefused := action != meshtrafficpermission.Allow && action != meshtrafficpermission.AllowWithShadowDeny
					if d.Refused != wantRefused || d.Shadow != (action == meshtrafficpermission.AllowWithShadowDeny) {
						t.Fatalf("seed %d: %v: %s (shadow %v), want action %q", seed, c, d, d.Shadow, action)
					}
				}
			}
		}
	}
}

// reference says what the contract wants, by the plainest means: of all entries
// that name the caller, in ascending order, the last one.
func reference(sets []*resource.Resource, c caller) (action meshtrafficpermission.Action) {
	type ranked struct {
		rank  int
		name  string
		items []policy.Item[meshtrafficpermission.Conf]
	}
	var all []ranked
	for _, r := range sets {
		s := r.Spec.(*policy.Spec[meshtrafficpermission.Conf])
		rank := 1
		if s.TargetRef != nil {
			switch {
			case s.TargetRef.Name == "other":
				continue
			case s.TargetRef.Kind == policy.KindDataplane && s.TargetRef.Name == "":
				rank = 2
			case s.TargetRef.Kind == policy.KindDataplane:
				rank = 3
			case s.TargetRef.Kind == policy.KindMeshService:
				rank = 4
			}
		}
		all = append(all, ranked{rank, r.Name, s.From})
	}
	slices.SortFunc(all, func(a, b ranked) int {
		if a.rank != b.rank {
			return a.rank - b.rank
		}
		return strings.Compare(b.name, a.name)
	})
	for _, p := range all {
		for _, it := range p.items {
			t := it.TargetRef
			if t.Name != "" && t.Name != c[mesh.TagService] || !mesh.MatchTags(t.Tags, c) {
				continue
			}
			action = it.Default.Action
		}
	}
	return action
}

// TestRulesAgainstLiteralMeaning makes random rules over ids that are near one
// another and compares with what the words mean (HRD-13, HRD-16, HRD-21): Exact
// is equality, Prefix ends on a segment, a denial wins, and a caller with several
// SPIFFE ids is allowed only as a whole.
func TestRulesAgainstLiteralMeaning(t *testing.T) {
	ids := []string{
		"spiffe://default/a", "spiffe://default/ab", "spiffe://default/a/b", "spiffe://default/a.b", "spiffe://default/aXb",
		"spiffe://default/a/b/c", "spiffe://default/a.b/c", "spiffe://default/a-b", "spiffe://default/b",
	}
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 2))
		rs := world(t)
		var allow, deny []policy.Match
		for i := range 1 + r.IntN(3) {
			spec := &policy.Spec[meshtrafficpermission.Conf]{}
			var conf meshtrafficpermission.Conf
			for range 1 + r.IntN(4) {
				m := policy.Match{SpiffeID: &policy.SpiffeIDMatch{Type: pick(r, policy.Exact, policy.Prefix), Value: pick(r, ids...)}}
				if r.IntN(3) == 0 {
					conf.Deny, deny = append(conf.Deny, m), append(deny, m)
				} else {
					conf.Allow, allow = append(conf.Allow, m), append(allow, m)
				}
			}
			spec.Rules = []policy.Rule[meshtrafficpermission.Conf]{{Default: conf}}
			rs = append(rs, &resource.Resource{
				Meta: resource.Meta{Mesh: "default", Name: fmt.Sprintf("p%d", i)}, Kind: meshtrafficpermission.Policy.Kind(), Spec: spec,
			})
		}
		res := policytest.Generate(t, []policy.Policy{meshtrafficpermission.Policy}, rs, mesh.Dataplanes.Key("default", "backend"))
		for _, id := range ids {
			for _, second := range append([]string{"", "kuma://version/v1", "kuma://x/spiffe://default/a"}, ids...) {
				if second == id {
					continue
				}
				names := []string{id}
				if second != "" {
					names = append(names, second)
				}
				want := !slices.ContainsFunc(deny, func(m policy.Match) bool {
					return slices.ContainsFunc(names, func(n string) bool { return means(m, n) })
				}) &&
					slices.ContainsFunc(allow, func(m policy.Match) bool {
						return !slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "spiffe://") && !means(m, n) }) &&
							// An exact id among several is not the whole caller; a
							// prefix of them all is.
							(m.SpiffeID.Type == policy.Prefix || !strings.HasPrefix(second, "spiffe://"))
					})
				d, err := envoytest.Call(res, inbound, envoytest.Caller{Names: names})
				if err != nil {
					t.Fatal(err)
				}
				if d.Refused == want {
					t.Fatalf("seed %d: %v: %s; allowed should be %v\nallow %v\ndeny %v", seed, names, d, want, show(allow), show(deny))
				}
			}
		}
	}
}

func means(m policy.Match, id string) bool {
	return id == m.SpiffeID.Value || m.SpiffeID.Type == policy.Prefix && strings.HasPrefix(id, m.SpiffeID.Value+"/")
}

func show(list []policy.Match) (out []string) {
	for _, m := range list {
		out = append(out, string(m.SpiffeID.Type)+" "+m.SpiffeID.Value)
	}
	return out
}
