// Package policy matches policies to a proxy, merges them in order, and hands
// the result to what a policy does.
//
// A policy is a package of its own that knows its configuration and how to
// apply it. It never parses, matches, orders or merges.
package policy

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// A Policy is one kind that shapes proxies' configurations.
type Policy interface {
	Kind() *resource.Kind
	// Prepare puts a mesh's policies of the kind in their order. Resources of
	// other kinds must not be among them. The result is never changed and holds
	// for all proxies.
	Prepare(all []*resource.Resource) Prepared
}

// Prepared is a mesh's policies of one kind, in order.
type Prepared interface {
	// Apply changes the configuration of the proxy as the policies that select it
	// say, except those left out. On an error the configuration is half changed:
	// make it anew. In a configuration without Self only "to" counts.
	Apply(c *envoy.Config, d mesh.Dataplane, except []resource.Key) error
	// Towards appends to b what tells the selected policies with a "to" from any
	// other choice among these: where it is the same, Apply does the same to an
	// outbound.
	Towards(b []byte, d mesh.Dataplane) []byte
	// Selected returns the policies that select the proxy, later ones win.
	Selected(d mesh.Dataplane) []*resource.Resource
	// Explain says what they come to, for each inbound and outbound.
	Explain(c *envoy.Config, d mesh.Dataplane) Applied
}

// New declares a policy. The kind's scope, shape and directions are filled in
// where they are not given; check may be nil and gets specifications whose types are
// right; apply sets fields on the open configuration.
func New[C any](k resource.Kind, check func(*Spec[C]) []errs.Field, apply func(*envoy.Config, Rules[C]) error) Policy {
	k.Scope, k.Shape = resource.Mesh, resource.Spec
	if k.Sync == 0 {
		k.Sync = resource.GlobalToZone | resource.ZoneToGlobal
	}
	traits := resource.PolicyTraits{}
	if k.Policy != nil {
		traits = *k.Policy
	}
	traits.TargetRef = true
	k.Policy = &traits
	return typed[C]{resource.Define(k, func(s *Spec[C]) []errs.Field {
		var bad []errs.Field
		if s.Default != nil && !traits.Default {
			bad = append(bad, errs.Field{Path: "spec.default", Message: "is not supported by this policy: write it within 'to', 'from' or 'rules'"})
		}
		if check != nil {
			bad = append(bad, check(s)...)
		}
		return bad
	}), apply}
}

type typed[C any] struct {
	t     resource.Type[Spec[C]]
	apply func(*envoy.Config, Rules[C]) error
}

func (p typed[C]) Kind() *resource.Kind { return p.t.Kind }

func (p typed[C]) Prepare(all []*resource.Resource) Prepared {
	out := &prepared[C]{policy: p}
	for _, r := range all {
		if r.Labels[mesh.LabelEffect] == "shadow" {
			continue
		}
		spec, ok := r.Spec.(*Spec[C])
		if !ok {
			continue
		}
		out.policies = append(out.policies, &entry[C]{r, spec, rankOf(r, spec.TargetRef)})
	}
	slices.SortStableFunc(out.policies, func(a, b *entry[C]) int {
		return cmp.Or(slices.Compare(a.rank, b.rank), byName(a.res, b.res))
	})
	for _, e := range out.policies {
		for i := range e.spec.To {
			out.to = append(out.to, toItem[C]{e, i, &e.spec.To[i]})
		}
	}
	slices.SortStableFunc(out.to, func(a, b toItem[C]) int {
		return cmp.Or(
			slices.Compare(a.entry.rank, b.entry.rank),
			cmp.Compare(specificity(a.item.TargetRef.Kind), specificity(b.item.TargetRef.Kind)),
			cmp.Compare(b2i(a.item.TargetRef.SectionName != ""), b2i(b.item.TargetRef.SectionName != "")),
			byName(a.entry.res, b.entry.res),
		)
	})
	return out
}

// entry is one policy with its place in the order.
type entry[C any] struct {
	res  *resource.Resource
	spec *Spec[C]
	rank []int
}

// toItem is one entry of a policy's "to".
type toItem[C any] struct {
	entry *entry[C]
	index int
	item  *Item[C]
}

type prepared[C any] struct {
	policy typed[C]
	// policies and to are in ascending order: later ones win.
	policies []*entry[C]
	to       []toItem[C]
}

func (p *prepared[C]) rules(d mesh.Dataplane, except []resource.Key, onlyTo bool) Rules[C] {
	var r Rules[C]
	for _, e := range p.policies {
		if onlyTo && len(e.spec.To) == 0 || !selects(e.res, e.spec.TargetRef, d) || slices.Contains(except, e.res.Key()) {
			continue
		}
		r.policies = append(r.policies, e)
	}
	for _, t := range p.to {
		if slices.Contains(r.policies, t.entry) {
			r.to = append(r.to, t)
		}
	}
	return r
}

func (p *prepared[C]) Towards(b []byte, d mesh.Dataplane) []byte {
	for i, e := range p.policies {
		if len(e.spec.To) > 0 && selects(e.res, e.spec.TargetRef, d) {
			b = binary.AppendUvarint(b, uint64(i)+1)
		}
	}
	return append(b, 0)
}

func (p *prepared[C]) Apply(c *envoy.Config, d mesh.Dataplane, except []resource.Key) (err error) {
	r := p.rules(d, except, c.Self == nil)
	if len(r.policies) == 0 {
		return nil
	}
	// A policy that was stored by another version may hold what no check has
	// seen. It must not take the control plane with it.
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("apply %s: %v", p.policy.t.Name, v)
		}
	}()
	return p.policy.apply(c, r)
}

func (p *prepared[C]) Selected(d mesh.Dataplane) []*resource.Resource {
	var out []*resource.Resource
	for _, e := range p.policies {
		if selects(e.res, e.spec.TargetRef, d) {
			out = append(out, e.res)
		}
	}
	return out
}

// Rules answers, for one proxy, which configuration holds where.
type Rules[C any] struct {
	policies []*entry[C]
	to       []toItem[C]
}

// Proxy returns the merged configuration of a policy that speaks of the proxy
// as a whole. It is false where no policy selects the proxy.
func (r Rules[C]) Proxy() (C, bool) {
	conf, origins := r.proxy()
	return conf, len(origins) > 0
}

// Last is the policy that wins, for what is told of the configuration as a
// whole; nil where there is none.
func (r Rules[C]) Last() *resource.Resource {
	if len(r.policies) == 0 {
		return nil
	}
	return r.policies[len(r.policies)-1].res
}

func (r Rules[C]) proxy() (conf C, origins []Origin) {
	for _, e := range r.policies {
		if e.spec.Default != nil {
			Merge(&conf, e.spec.Default)
			origins = append(origins, Origin{e.res, 0})
		}
	}
	return conf, origins
}

// Outbound returns the merged configuration towards a destination. It is false
// where no policy speaks of it.
func (r Rules[C]) Outbound(d *envoy.Destination) (C, bool) {
	conf, origins := r.outbound(d)
	return conf, len(origins) > 0
}

func (r Rules[C]) outbound(d *envoy.Destination) (conf C, origins []Origin) {
	for _, t := range r.to {
		if t.item.TargetRef.reaches(t.entry.res, d) {
			Merge(&conf, &t.item.Default)
			origins = append(origins, Origin{t.entry.res, t.index})
		}
	}
	return conf, origins
}

// Inbound returns the merged configuration for an inbound's callers in general:
// entries of "from" for the whole mesh, and of "rules" without matches. It is
// false where there are none.
func (r Rules[C]) Inbound(in *envoy.Inbound) (C, bool) {
	conf, origins := r.inbound(in)
	return conf, len(origins) > 0
}

func (r Rules[C]) inbound(in *envoy.Inbound) (conf C, origins []Origin) {
	for _, e := range r.policies {
		if !selectsInbound(e.spec.TargetRef, in) {
			continue
		}
		for i := range e.spec.From {
			if f := &e.spec.From[i]; f.TargetRef.Kind == "" || f.TargetRef.Kind == KindMesh {
				Merge(&conf, &f.Default)
				origins = append(origins, Origin{e.res, i})
			}
		}
		for i := range e.spec.Rules {
			if f := &e.spec.Rules[i]; len(f.Matches) == 0 {
				Merge(&conf, &f.Default)
				origins = append(origins, Origin{e.res, i})
			}
		}
	}
	return conf, origins
}

// Matched is the configuration for some of an inbound's callers.
type Matched[C any] struct {
	// Match says which.
	Match Match
	// Conf is merged over what holds for callers in general.
	Conf    C
	Origins []Origin
}

// Matched returns what holds for particular callers of an inbound: the first
// that matches counts. The policy that wins comes first, and within it exact
// matches before longer and shorter prefixes. Configurations of one and the
// same match are merged.
func (r Rules[C]) Matched(in *envoy.Inbound) []Matched[C] {
	type found struct {
		match   Match
		conf    C
		origins []Origin
		order   int
	}
	var all []*found
	for order, e := range r.policies {
		if !selectsInbound(e.spec.TargetRef, in) {
			continue
		}
		for i := range e.spec.Rules {
			rule := &e.spec.Rules[i]
			for _, m := range rule.Matches {
				at := slices.IndexFunc(all, func(f *found) bool { return f.match.equal(m) })
				if at < 0 {
					at, all = len(all), append(all, &found{match: m})
				}
				f := all[at]
				Merge(&f.conf, &rule.Default)
				f.origins, f.order = append(f.origins, Origin{e.res, i}), order
			}
		}
	}
	slices.SortStableFunc(all, func(a, b *found) int {
		return cmp.Or(cmp.Compare(b.order, a.order), cmp.Compare(b.match.weight(), a.match.weight()))
	})
	general, _ := r.inbound(in)
	var out []Matched[C]
	for _, f := range all {
		m := Matched[C]{Match: f.match, Origins: f.origins}
		Merge(&m.Conf, &general)
		Merge(&m.Conf, &f.conf)
		out = append(out, m)
	}
	return out
}

// A Source is one policy that selects an inbound, for policies whose entries
// are not merged.
type Source[C any] struct {
	Resource *resource.Resource
	Spec     *Spec[C]
}

// Sources returns the policies that select the inbound; later ones win.
func (r Rules[C]) Sources(in *envoy.Inbound) []Source[C] {
	var out []Source[C]
	for _, e := range r.policies {
		if selectsInbound(e.spec.TargetRef, in) {
			out = append(out, Source[C]{e.res, e.spec})
		}
	}
	return out
}

// An Origin is an entry of a policy that a configuration came from.
type Origin struct {
	Resource *resource.Resource
	// Index is the entry's place in "to", "from" or "rules".
	Index int
}

// Applied is what the policies of one kind come to for a proxy.
type Applied struct {
	Kind *resource.Kind
	// Policies are those that select the proxy; later ones win.
	Policies []*resource.Resource
	// Proxy is what holds for the proxy as a whole; nil for kinds that speak of
	// inbounds and outbounds.
	Proxy     *AppliedProxy
	Inbounds  []AppliedInbound
	Outbounds []AppliedOutbound
}

// AppliedProxy is what holds for a proxy as a whole.
type AppliedProxy struct {
	// Conf is a pointer to the kind's configuration type.
	Conf    any
	Origins []Origin
}

// AppliedInbound is what holds for an inbound.
type AppliedInbound struct {
	Inbound *envoy.Inbound
	// Match is set where it holds for some callers alone.
	Match *Match
	// From is set where it comes from an entry of "from" that names callers.
	From *TargetRef
	// Conf is a pointer to the kind's configuration type.
	Conf    any
	Origins []Origin
}

// AppliedOutbound is what holds for an outbound.
type AppliedOutbound struct {
	Outbound *envoy.Outbound
	// Conf is a pointer to the kind's configuration type.
	Conf    any
	Origins []Origin
}

func (p *prepared[C]) Explain(c *envoy.Config, d mesh.Dataplane) Applied {
	r := p.rules(d, nil, false)
	out := Applied{Kind: p.policy.t.Kind}
	for _, e := range r.policies {
		out.Policies = append(out.Policies, e.res)
	}
	if conf, origins := r.proxy(); len(origins) > 0 {
		out.Proxy = &AppliedProxy{&conf, origins}
	}
	for _, in := range c.Inbounds {
		for _, m := range r.Matched(in) {
			out.Inbounds = append(out.Inbounds, AppliedInbound{Inbound: in, Match: &m.Match, Conf: &m.Conf, Origins: m.Origins})
		}
		for _, s := range r.Sources(in) {
			for i := range s.Spec.From {
				if f := &s.Spec.From[i]; f.TargetRef.Kind != "" && f.TargetRef.Kind != KindMesh {
					out.Inbounds = append(out.Inbounds, AppliedInbound{Inbound: in, From: &f.TargetRef, Conf: &f.Default, Origins: []Origin{{s.Resource, i}}})
				}
			}
		}
		if conf, origins := r.inbound(in); len(origins) > 0 {
			out.Inbounds = append(out.Inbounds, AppliedInbound{Inbound: in, Conf: &conf, Origins: origins})
		}
	}
	for _, o := range c.Outbounds {
		if conf, origins := r.outbound(&o.To); len(origins) > 0 {
			out.Outbounds = append(out.Outbounds, AppliedOutbound{Outbound: o, Conf: &conf, Origins: origins})
		}
	}
	return out
}

// byName orders display names descending: "a" wins over "b".
func byName(a, b *resource.Resource) int {
	return cmp.Or(strings.Compare(b.DisplayName(), a.DisplayName()), strings.Compare(b.Name, a.Name))
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
