package policy_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/policy"
	"kuma/internal/resource"
)

// conf has a field of every sort that a configuration may have.
type conf struct {
	Number     *int               `json:"number,omitempty"`
	Text       string             `json:"text,omitempty"`
	Wait       *resource.Duration `json:"wait,omitempty"`
	Inner      *inner             `json:"inner,omitempty"`
	Plain      inner              `json:"plain,omitzero"`
	List       []string           `json:"list,omitempty"`
	AppendList []string           `json:"appendList,omitempty"`
	Map        map[string]string  `json:"map,omitempty"`
}

type inner struct {
	A *int `json:"a,omitempty"`
	B *int `json:"b,omitempty"`
}

func ptr[T any](v T) *T { return &v }

func TestMerge(t *testing.T) {
	for name, c := range map[string]struct{ dst, src, want conf }{
		"what is left out stays": {conf{Number: ptr(1), Text: "a", List: []string{"x"}}, conf{}, conf{Number: ptr(1), Text: "a", List: []string{"x"}}},
		"a value wins":           {conf{Number: ptr(1), Text: "a"}, conf{Number: ptr(0), Text: "b"}, conf{Number: ptr(0), Text: "b"}},
		"a duration of 0 wins":   {conf{Wait: &resource.Duration{Duration: time.Hour}}, conf{Wait: &resource.Duration{}}, conf{Wait: &resource.Duration{}}},
		"objects are merged":     {conf{Inner: &inner{A: ptr(1), B: ptr(1)}}, conf{Inner: &inner{B: ptr(2)}}, conf{Inner: &inner{A: ptr(1), B: ptr(2)}}},
		"also those in place":    {conf{Plain: inner{A: ptr(1)}}, conf{Plain: inner{B: ptr(2)}}, conf{Plain: inner{A: ptr(1), B: ptr(2)}}},
		"lists are replaced":     {conf{List: []string{"a", "b"}}, conf{List: []string{"c"}}, conf{List: []string{"c"}}},
		"an empty list, too":     {conf{List: []string{"a", "b"}}, conf{List: []string{}}, conf{List: []string{}}},
		"append lists grow":      {conf{AppendList: []string{"a"}}, conf{AppendList: []string{"b"}}, conf{AppendList: []string{"a", "b"}}},
		"maps are merged":        {conf{Map: map[string]string{"a": "1", "b": "1"}}, conf{Map: map[string]string{"b": "2"}}, conf{Map: map[string]string{"a": "1", "b": "2"}}},
	} {
		policy.Merge(&c.dst, &c.src)
		if diff := cmp.Diff(c.want, c.dst); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// Merging is associative and, without append lists, idempotent; and it changes
// nothing but its destination.
func TestMergeLaws(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func() (c conf) {
		if r.IntN(2) == 0 {
			c.Number = ptr(r.IntN(3))
		}
		if r.IntN(2) == 0 {
			c.Inner = &inner{A: ptr(r.IntN(3))}
			if r.IntN(2) == 0 {
				c.Inner.B = ptr(r.IntN(3))
			}
		}
		if r.IntN(2) == 0 {
			c.List = []string{fmt.Sprint(r.IntN(3))}
		}
		if r.IntN(2) == 0 {
			c.Map = map[string]string{fmt.Sprint(r.IntN(2)): fmt.Sprint(r.IntN(3))}
		}
		return c
	}
	merged := func(list ...conf) (out conf) {
		for _, c := range list {
			policy.Merge(&out, &c)
		}
		return out
	}
	for range 500 {
		a, b, c := random(), random(), random()
		before := show(a) + show(b) + show(c)
		if diff := cmp.Diff(merged(merged(a, b), c), merged(a, merged(b, c))); diff != "" {
			t.Fatalf("not associative:\n%s", diff)
		}
		if diff := cmp.Diff(merged(a, b), merged(a, b, b)); diff != "" {
			t.Fatalf("not idempotent:\n%s", diff)
		}
		if after := show(a) + show(b) + show(c); before != after {
			t.Fatalf("changed %s to %s", before, after)
		}
	}
}

func show(c conf) string {
	raw, err := resource.Marshal(c)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

var anything = policy.New(resource.Kind{Name: "Anything", Plural: "anythings"}, nil, func(*envoy.Config, policy.Rules[conf]) error { return nil })

func made(name string, ref *policy.TargetRef, labels map[string]string) *resource.Resource {
	return &resource.Resource{
		Meta: resource.Meta{Mesh: "default", Name: name, Labels: labels}, Kind: anything.Kind(),
		Spec: &policy.Spec[conf]{TargetRef: ref, To: []policy.Item[conf]{{TargetRef: policy.TargetRef{Kind: policy.KindMesh}}}},
	}
}

var here = mesh.Dataplanes.From(&resource.Resource{
	Meta: resource.Meta{Mesh: "default", Name: "dp", Labels: map[string]string{
		mesh.LabelZone: "east", mesh.LabelOrigin: mesh.OriginZone, mesh.LabelNamespace: "ns", "app": "x",
	}},
	Kind: mesh.Dataplanes.Kind,
	Spec: &mesh.DataplaneSpec{Networking: &mesh.Networking{Inbound: []mesh.Inbound{
		{Port: 80, Name: "main", Tags: map[string]string{mesh.TagService: "a", "version": "v1"}},
		{Port: 81, Tags: map[string]string{mesh.TagService: "b"}},
	}}},
})

func TestSelects(t *testing.T) {
	type labels = map[string]string
	for name, c := range map[string]struct {
		ref    *policy.TargetRef
		labels labels
		want   bool
	}{
		"all":                              {nil, nil, true},
		"mesh":                             {&policy.TargetRef{Kind: policy.KindMesh}, nil, true},
		"sidecars":                         {&policy.TargetRef{Kind: policy.KindMesh, ProxyTypes: []policy.ProxyType{policy.Sidecar}}, nil, true},
		"gateways":                         {&policy.TargetRef{Kind: policy.KindMesh, ProxyTypes: []policy.ProxyType{policy.Gateway}}, nil, false},
		"dataplanes":                       {&policy.TargetRef{Kind: policy.KindDataplane}, nil, true},
		"labels":                           {&policy.TargetRef{Kind: policy.KindDataplane, Labels: labels{"app": "x"}}, nil, true},
		"other labels":                     {&policy.TargetRef{Kind: policy.KindDataplane, Labels: labels{"app": "y"}}, nil, false},
		"name in namespace":                {&policy.TargetRef{Kind: policy.KindDataplane, Name: "dp", Namespace: "ns"}, nil, true},
		"name in the policy's namespace":   {&policy.TargetRef{Kind: policy.KindDataplane, Name: "dp"}, labels{mesh.LabelNamespace: "ns"}, true},
		"name in another namespace":        {&policy.TargetRef{Kind: policy.KindDataplane, Name: "dp"}, labels{mesh.LabelNamespace: "other"}, false},
		"another name":                     {&policy.TargetRef{Kind: policy.KindDataplane, Name: "dp2", Namespace: "ns"}, nil, false},
		"section":                          {&policy.TargetRef{Kind: policy.KindDataplane, SectionName: "main"}, nil, true},
		"section by number":                {&policy.TargetRef{Kind: policy.KindDataplane, SectionName: "80"}, nil, true},
		"no such section":                  {&policy.TargetRef{Kind: policy.KindDataplane, SectionName: "x"}, nil, false},
		"subset":                           {&policy.TargetRef{Kind: policy.KindMeshSubset, Tags: labels{"version": "v1"}}, nil, true},
		"tags of two inbounds":             {&policy.TargetRef{Kind: policy.KindMeshSubset, Tags: labels{"version": "v1", mesh.TagService: "b"}}, nil, false},
		"service":                          {&policy.TargetRef{Kind: policy.KindMeshService, Name: "b"}, nil, true},
		"another service":                  {&policy.TargetRef{Kind: policy.KindMeshService, Name: "c"}, nil, false},
		"service subset":                   {&policy.TargetRef{Kind: policy.KindMeshServiceSubset, Name: "a", Tags: labels{"version": "v1"}}, nil, true},
		"service subset of another":        {&policy.TargetRef{Kind: policy.KindMeshServiceSubset, Name: "b", Tags: labels{"version": "v1"}}, nil, false},
		"unknown kind":                     {&policy.TargetRef{Kind: "MeshGateway", Name: "a"}, nil, false},
		"shadow":                           {nil, labels{mesh.LabelEffect: "shadow"}, false},
		"made in this zone":                {nil, labels{mesh.LabelOrigin: "zone", mesh.LabelZone: "east"}, true},
		"made in another zone":             {nil, labels{mesh.LabelOrigin: "zone", mesh.LabelZone: "west"}, false},
		"made by a producer elsewhere":     {nil, labels{mesh.LabelOrigin: "zone", mesh.LabelZone: "west", mesh.LabelPolicyRole: "producer"}, true},
		"a consumer's, same namespace":     {nil, labels{mesh.LabelPolicyRole: "consumer", mesh.LabelNamespace: "ns"}, true},
		"a consumer's, another namespace":  {nil, labels{mesh.LabelPolicyRole: "consumer", mesh.LabelNamespace: "other"}, false},
		"a workload's, another namespace":  {nil, labels{mesh.LabelPolicyRole: "workload-owner", mesh.LabelNamespace: "other"}, false},
		"the system's, another namespace":  {nil, labels{mesh.LabelPolicyRole: "system", mesh.LabelNamespace: "other"}, true},
		"global, with a zone not this one": {nil, labels{mesh.LabelOrigin: "global", mesh.LabelZone: "west"}, true},
	} {
		r := made("p", c.ref, c.labels)
		if got := policy.Selects(r, here); got != c.want {
			t.Errorf("%s: selects %v, want %v", name, got, c.want)
		}
		if got := len(anything.Prepare([]*resource.Resource{r}).Selected(here)) == 1; got != c.want {
			t.Errorf("%s: selected %v, want %v", name, got, c.want)
		}
	}
	other := made("p", nil, nil)
	other.Mesh = "other"
	if policy.Selects(other, here) {
		t.Error("a policy of another mesh selects the proxy")
	}
	if policy.Selects(mesh.Secrets.Make("default", "x", &mesh.SecretSpec{}), here) {
		t.Error("what is no policy selects the proxy")
	}
}

// The order is total and the contract's: what comes later wins.
func TestOrder(t *testing.T) {
	dp := func(name string, labels map[string]string, section string) *policy.TargetRef {
		return &policy.TargetRef{Kind: policy.KindDataplane, Name: name, Namespace: "ns", Labels: labels, SectionName: section}
	}
	zone := map[string]string{mesh.LabelOrigin: mesh.OriginZone, mesh.LabelZone: "east"}
	role := func(r string) map[string]string {
		return map[string]string{mesh.LabelOrigin: mesh.OriginZone, mesh.LabelZone: "east", mesh.LabelPolicyRole: r, mesh.LabelNamespace: "ns"}
	}
	want := []*resource.Resource{
		made("1-z", nil, nil),
		made("0-b", &policy.TargetRef{Kind: policy.KindMesh}, nil),
		made("0-a", &policy.TargetRef{Kind: policy.KindMesh}, nil),
		made("9-zone", nil, zone),
		made("9-producer", nil, role("producer")),
		made("9-consumer", nil, role("consumer")),
		made("9-owner", nil, role("workload-owner")),
		made("9-dataplane", dp("", nil, ""), nil),
		made("9-dataplane-section", dp("", nil, "main"), nil),
		made("9-labels", dp("", map[string]string{"app": "x"}, ""), nil),
		made("9-labels-section", dp("", map[string]string{"app": "x"}, "main"), nil),
		made("9-name", dp("dp", nil, ""), nil),
		made("9-name-section", dp("dp", nil, "main"), nil),
		made("9-subset", &policy.TargetRef{Kind: policy.KindMeshSubset, Tags: map[string]string{"version": "v1"}}, nil),
		made("9-service", &policy.TargetRef{Kind: policy.KindMeshService, Name: "a"}, nil),
		made("9-service-subset", &policy.TargetRef{Kind: policy.KindMeshServiceSubset, Name: "a"}, nil),
	}
	r := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		shuffled := slices.Clone(want)
		r.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		var got []string
		for _, p := range anything.Prepare(shuffled).Selected(here) {
			got = append(got, p.Name)
		}
		var names []string
		for _, p := range want {
			names = append(names, p.Name)
		}
		if diff := cmp.Diff(names, got); diff != "" {
			t.Fatalf("order (-want +got):\n%s", diff)
		}
	}
}

func TestWarnings(t *testing.T) {
	s := policy.Spec[conf]{TargetRef: &policy.TargetRef{Kind: policy.KindMeshSubset}, From: []policy.Item[conf]{{}}}
	want := []string{"MeshSubset value for 'targetRef.kind' is deprecated, use Dataplane instead", "'from' field is deprecated, use 'rules' instead"}
	if diff := cmp.Diff(want, s.Warnings()); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	if got := (&policy.Spec[conf]{TargetRef: &policy.TargetRef{Kind: policy.KindMesh}}).Warnings(); len(got) > 0 {
		t.Errorf("warnings of a policy that is up to date: %v", got)
	}
}

// Every list of a policy has a limit.
func TestLimits(t *testing.T) {
	s := policy.Spec[conf]{To: slices.Repeat([]policy.Item[conf]{{TargetRef: policy.TargetRef{Kind: policy.KindMesh}}}, policy.MaxItems+1)}
	bad := policy.CheckRefs(&s, policy.Allowed{To: []string{policy.KindMesh}})
	want := []errs.Field{{Path: "spec.to", Message: "has 1001 entries, the limit is 1000"}}
	if diff := cmp.Diff(want, bad); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
}
