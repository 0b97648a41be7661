package policy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
)

// Spec is what all policies have in common: which proxies they select, and what
// holds for their outgoing and incoming traffic.
type Spec[C any] struct {
	// TargetRef selects the proxies, or some of their inbounds; all of the mesh
	// where it is left out.
	TargetRef *TargetRef `json:"targetRef,omitempty"`
	// Default is the configuration of a policy that speaks of the proxy as a whole.
	Default *C `json:"default,omitempty"`
	// To is about traffic from the selected proxies to destinations.
	To []Item[C] `json:"to,omitempty"`
	// From is about traffic to the selected inbounds from callers.
	From []Item[C] `json:"from,omitempty"`
	// Rules is about traffic to the selected inbounds; it takes the place of From.
	Rules []Rule[C] `json:"rules,omitempty"`
}

// Item is a configuration towards a destination, or for callers.
type Item[C any] struct {
	// TargetRef says which.
	TargetRef TargetRef `json:"targetRef"`
	// Default is the configuration.
	Default C `json:"default,omitzero"`
}

// Rule is a configuration for an inbound's traffic.
type Rule[C any] struct {
	// Matches narrow the rule to some callers; one of them is enough.
	Matches []Match `json:"matches,omitempty"`
	// Default is the configuration.
	Default C `json:"default,omitzero"`
}

// TargetRef names proxies, destinations or callers.
type TargetRef struct {
	// Kind says what the other fields mean.
	Kind string `json:"kind,omitempty"`
	// Name is a resource's, or a service's.
	Name string `json:"name,omitempty"`
	// Namespace is that of the resource named.
	Namespace string `json:"namespace,omitempty"`
	// Mesh is reserved.
	Mesh string `json:"mesh,omitempty"`
	// Tags choose among inbounds or callers.
	Tags map[string]string `json:"tags,omitempty"`
	// Labels choose resources.
	Labels map[string]string `json:"labels,omitempty"`
	// SectionName is a port's or an inbound's name, or its number.
	SectionName string `json:"sectionName,omitempty"`
	// ProxyTypes narrows kind Mesh and MeshSubset to Sidecar or Gateway.
	ProxyTypes []ProxyType `json:"proxyTypes,omitempty"`
}

// ProxyType is a sort of proxy.
type ProxyType string

// Sorts of proxies.
const (
	Sidecar ProxyType = "Sidecar"
	Gateway ProxyType = "Gateway"
)

// Values lists the types.
func (ProxyType) Values() []string { return []string{string(Sidecar), string(Gateway)} }

// Kinds that a targetRef may have in this version.
const (
	KindMesh              = "Mesh"
	KindDataplane         = "Dataplane"
	KindMeshSubset        = "MeshSubset"
	KindMeshService       = "MeshService"
	KindMeshServiceSubset = "MeshServiceSubset"
)

// specificity orders the kinds: the higher one wins.
func specificity(kind string) int {
	switch kind {
	case KindDataplane:
		return 2
	case KindMeshSubset:
		return 3
	case KindMeshService:
		return 5
	case KindMeshServiceSubset:
		return 8
	}
	return 1
}

// Match says which callers are meant; both parts must hold.
type Match struct {
	SpiffeID *SpiffeIDMatch `json:"spiffeID,omitempty"`
	SNI      *SNIMatch      `json:"sni,omitempty"`
}

// SpiffeIDMatch matches a workload's SPIFFE id.
type SpiffeIDMatch struct {
	// Type is Exact, or Prefix: the id itself and what lies below it.
	Type SpiffeIDMatchType `json:"type"`
	// Value is a SPIFFE id.
	Value string `json:"value"`
}

// SpiffeIDMatchType is how to compare SPIFFE ids.
type SpiffeIDMatchType string

// Ways to compare SPIFFE ids.
const (
	Exact  SpiffeIDMatchType = "Exact"
	Prefix SpiffeIDMatchType = "Prefix"
)

// Values lists the ways.
func (SpiffeIDMatchType) Values() []string { return []string{string(Exact), string(Prefix)} }

// SNIMatch matches the server name that the caller asked for.
type SNIMatch struct {
	// Type is Exact.
	Type string `json:"type"`
	// Value is a DNS name.
	Value string `json:"value"`
}

// Caller is the match as a condition on certificates; ServerName goes with it.
func (m Match) Caller() envoy.Caller {
	switch {
	case m.SpiffeID == nil:
		return envoy.Caller{}
	case m.SpiffeID.Type == Prefix:
		return envoy.Caller{Under: m.SpiffeID.Value}
	default:
		return envoy.Caller{ID: m.SpiffeID.Value}
	}
}

// ServerName is the server name demanded, or "".
func (m Match) ServerName() string {
	if m.SNI == nil {
		return ""
	}
	return m.SNI.Value
}

func (m Match) equal(o Match) bool {
	return m.ServerName() == o.ServerName() && (m.SpiffeID == nil) == (o.SpiffeID == nil) && (m.SpiffeID == nil || *m.SpiffeID == *o.SpiffeID)
}

// weight orders matches: with a server name first, then exact ids, then longer
// prefixes.
func (m Match) weight() int {
	w := 0
	if m.SNI != nil {
		w = 1 << 30
	}
	switch {
	case m.SpiffeID == nil:
		return w
	case m.SpiffeID.Type == Exact:
		return w + 1<<29
	default:
		return w + len(m.SpiffeID.Value)
	}
}

// Check returns what is wrong with the match, with paths under at.
func (m Match) Check(at string) (bad []errs.Field) {
	if m.SpiffeID == nil && m.SNI == nil {
		return []errs.Field{{Path: at, Message: "must have at least one of 'spiffeID', 'sni'"}}
	}
	if s := m.SpiffeID; s != nil {
		if s.Type == "" {
			bad = append(bad, errs.Field{Path: at + ".spiffeID.type", Message: "must be set, to one of: Exact, Prefix"})
		}
		if _, err := spiffeid.FromString(s.Value); err != nil {
			bad = append(bad, errs.Field{Path: at + ".spiffeID", Message: "must be a valid Spiffe ID: " + err.Error()})
		}
	}
	if s := m.SNI; s != nil {
		switch s.Type {
		case "Exact":
		case "":
			bad = append(bad, errs.Field{Path: at + ".sni.type", Message: "must be set"})
		default:
			bad = append(bad, errs.Field{Path: at + ".sni.type", Message: fmt.Sprintf("unrecognized type %q, supported values are: Exact", s.Type)})
		}
		if !isSubdomain(s.Value) {
			bad = append(bad, errs.Field{Path: at + ".sni.value", Message: "must be a DNS name in lower case, such as \"backend.example.com\""})
		}
	}
	return bad
}

func isSubdomain(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !mesh.IsDNSLabel(label) {
			return false
		}
	}
	return true
}

// isGateway reports whether the proxy counts as a gateway.
func isGateway(d mesh.Dataplane) bool {
	return d.Spec.Networking != nil && d.Spec.Networking.Gateway != nil
}

// Selects reports whether a policy of any kind selects the proxy. It is false
// for resources that are no policies with a targetRef.
func Selects(r *resource.Resource, d mesh.Dataplane) bool {
	t, ok := r.Spec.(interface{ target() *TargetRef })
	return ok && r.Labels[mesh.LabelEffect] != "shadow" && selects(r, t.target(), d)
}

func (s *Spec[C]) target() *TargetRef { return s.TargetRef }

// selects reports whether the policy selects the proxy: any of its inbounds, or
// all of it.
func selects(r *resource.Resource, ref *TargetRef, d mesh.Dataplane) bool {
	if r.Mesh != d.Mesh || !inReach(r, d) {
		return false
	}
	if ref == nil {
		return true
	}
	switch ref.Kind {
	case "", KindMesh:
		return ref.hasProxyType(d)
	case KindDataplane:
		switch {
		case ref.Name != "":
			if ref.Name != d.DisplayName() || ref.namespace(r) != d.Labels[mesh.LabelNamespace] {
				return false
			}
		case len(ref.Labels) > 0:
			if !mesh.MatchTags(ref.Labels, d.Labels) {
				return false
			}
		}
		return ref.SectionName == "" || slices.ContainsFunc(inbounds(d), func(in mesh.Inbound) bool { return isSection(ref.SectionName, in.Section(), in.Port) })
	case KindMeshSubset:
		return ref.hasProxyType(d) && slices.ContainsFunc(d.Spec.TagSets(), func(t map[string]string) bool { return mesh.MatchTags(ref.Tags, t) })
	case KindMeshService, KindMeshServiceSubset:
		return slices.ContainsFunc(d.Spec.TagSets(), func(t map[string]string) bool {
			return t[mesh.TagService] == ref.Name && mesh.MatchTags(ref.Tags, t)
		})
	}
	return false
}

// selectsInbound reports whether a policy that selects the inbound's proxy
// selects the inbound too.
func selectsInbound(ref *TargetRef, in *envoy.Inbound) bool {
	if ref == nil {
		return true
	}
	switch ref.Kind {
	case KindDataplane:
		return ref.SectionName == "" || isSection(ref.SectionName, in.Section, in.Port)
	case KindMeshSubset:
		return mesh.MatchTags(ref.Tags, in.Tags)
	case KindMeshService, KindMeshServiceSubset:
		return in.Tags[mesh.TagService] == ref.Name && mesh.MatchTags(ref.Tags, in.Tags)
	}
	return true
}

// inReach reports whether a policy's zone and namespace let it touch the proxy.
func inReach(r *resource.Resource, d mesh.Dataplane) bool {
	role := r.Labels[mesh.LabelPolicyRole]
	if r.Labels[mesh.LabelOrigin] == mesh.OriginZone && role != roleProducer && d.Labels[mesh.LabelOrigin] != "" &&
		r.Labels[mesh.LabelZone] != d.Labels[mesh.LabelZone] {
		return false
	}
	if role == roleConsumer || role == roleWorkloadOwner {
		return r.Labels[mesh.LabelNamespace] == d.Labels[mesh.LabelNamespace]
	}
	return true
}

// Roles of policies, as the label kuma.io/policy-role has them.
const (
	roleProducer      = "producer"
	roleConsumer      = "consumer"
	roleWorkloadOwner = "workload-owner"
)

// rankOf is a policy's place in the order: compared from the left, higher wins.
func rankOf(r *resource.Resource, ref *TargetRef) []int {
	kind, byWhat, section := 1, 0, 0
	if ref != nil {
		kind = specificity(ref.Kind)
		if ref.Kind == KindDataplane {
			switch {
			case ref.Name != "":
				byWhat = 2
			case len(ref.Labels) > 0:
				byWhat = 1
			}
			section = b2i(ref.SectionName != "")
		}
	}
	role := map[string]int{roleProducer: 1, roleConsumer: 2, roleWorkloadOwner: 3}[r.Labels[mesh.LabelPolicyRole]]
	return []int{kind, byWhat, section, b2i(r.Labels[mesh.LabelOrigin] == mesh.OriginZone), role}
}

func (t *TargetRef) hasProxyType(d mesh.Dataplane) bool {
	if len(t.ProxyTypes) == 0 {
		return true
	}
	if isGateway(d) {
		return slices.Contains(t.ProxyTypes, Gateway)
	}
	return slices.Contains(t.ProxyTypes, Sidecar)
}

// namespace is that of the resource named: the policy's own by default.
func (t *TargetRef) namespace(policy *resource.Resource) string {
	if t.Namespace != "" {
		return t.Namespace
	}
	return policy.Labels[mesh.LabelNamespace]
}

// reaches reports whether an entry of "to" speaks of the destination.
func (t *TargetRef) reaches(policy *resource.Resource, d *envoy.Destination) bool {
	switch t.Kind {
	case "", KindMesh:
		return true
	case KindMeshService:
		if d.MeshService == "" {
			return t.SectionName == "" && len(t.Labels) == 0 && t.Name == d.Service
		}
		if t.SectionName != "" && !isSection(t.SectionName, d.Section, d.Port) {
			return false
		}
		if len(t.Labels) > 0 {
			return mesh.MatchTags(t.Labels, d.Labels)
		}
		return t.Name == d.MeshService && t.namespace(policy) == d.Namespace
	}
	return false
}

// isSection reports whether a sectionName means the port of that name or
// number.
func isSection(name, section string, port uint32) bool {
	return name == section || name == strconv.FormatUint(uint64(port), 10)
}

func inbounds(d mesh.Dataplane) []mesh.Inbound {
	if d.Spec.Networking == nil {
		return nil
	}
	return d.Spec.Networking.Inbound
}

// Allowed lists the kinds that a policy's targetRefs may have.
type Allowed struct {
	Top, To, From []string
	// Section allows a sectionName on a top-level Dataplane.
	Section bool
}

// MaxItems bounds each list of a policy.
const MaxItems = 1000

// CheckRefs returns what is wrong with a policy's targetRefs and its sections,
// with paths from the document's root.
func CheckRefs[C any](s *Spec[C], a Allowed) (bad []errs.Field) {
	if s.TargetRef != nil {
		bad = append(bad, checkTop("spec.targetRef", s.TargetRef, a)...)
	}
	if len(s.Rules) > 0 {
		if len(s.From) > 0 {
			bad = append(bad, errs.Field{Path: "spec", Message: "field 'from' must be empty when 'rules' is defined"})
		}
		if len(s.To) > 0 {
			bad = append(bad, errs.Field{Path: "spec", Message: "field 'to' must be empty when 'rules' is defined"})
		}
	}
	for _, l := range []struct {
		name  string
		items []Item[C]
		kinds []string
	}{{"to", s.To, a.To}, {"from", s.From, a.From}} {
		if len(l.items) > 0 && len(l.kinds) == 0 {
			bad = append(bad, errs.Field{Path: "spec." + l.name, Message: "is not supported by this policy"})
			continue
		}
		if len(l.items) > MaxItems {
			bad = append(bad, errs.Field{Path: "spec." + l.name, Message: fmt.Sprintf("has %d entries, the limit is %d", len(l.items), MaxItems)})
			continue
		}
		for i := range l.items {
			at := fmt.Sprintf("spec.%s[%d].targetRef", l.name, i)
			bad = append(bad, checkItem(at, l.name, &l.items[i].TargetRef, l.kinds)...)
		}
	}
	if len(s.Rules) > MaxItems {
		bad = append(bad, errs.Field{Path: "spec.rules", Message: fmt.Sprintf("has %d entries, the limit is %d", len(s.Rules), MaxItems)})
		return bad
	}
	for i := range s.Rules {
		if n := len(s.Rules[i].Matches); n > MaxItems {
			bad = append(bad, errs.Field{Path: fmt.Sprintf("spec.rules[%d].matches", i), Message: fmt.Sprintf("has %d entries, the limit is %d", n, MaxItems)})
			continue
		}
		for j, m := range s.Rules[i].Matches {
			bad = append(bad, m.Check(fmt.Sprintf("spec.rules[%d].matches[%d]", i, j))...)
		}
	}
	return bad
}

func checkTop(at string, t *TargetRef, a Allowed) []errs.Field {
	fields := map[string][]string{
		KindMesh:              {"proxyTypes"},
		KindDataplane:         {"name", "namespace", "labels"},
		KindMeshSubset:        {"tags", "proxyTypes"},
		KindMeshService:       {"name"},
		KindMeshServiceSubset: {"name", "tags"},
	}[t.Kind]
	if t.Kind == KindDataplane && a.Section {
		fields = append(fields, "sectionName")
	}
	bad := checkRef(at, t, a.Top, fields)
	if len(bad) == 0 && t.Kind == KindDataplane && t.Name != "" && len(t.Labels) > 0 {
		bad = append(bad, errs.Field{Path: at, Message: "only one of 'name' and 'labels' may be set"})
	}
	return bad
}

func checkItem(at, list string, t *TargetRef, kinds []string) []errs.Field {
	fields := map[string][]string{
		KindMeshSubset:        {"tags"},
		KindMeshService:       {"name"},
		KindMeshServiceSubset: {"name", "tags"},
	}[t.Kind]
	if t.Kind == KindMeshService && list == "to" {
		fields = []string{"name", "namespace", "labels", "sectionName"}
	}
	bad := checkRef(at, t, kinds, fields)
	if len(bad) == 0 && t.Kind == KindMeshService && list == "to" && t.Name != "" && len(t.Labels) > 0 {
		bad = append(bad, errs.Field{Path: at, Message: "only one of 'name' and 'labels' may be set"})
	}
	return bad
}

// checkRef checks the kind, and that no field is set which it doesn't have.
func checkRef(at string, t *TargetRef, kinds, fields []string) (bad []errs.Field) {
	if t.Kind == "" {
		return []errs.Field{{Path: at + ".kind", Message: "must be set, to one of: " + strings.Join(kinds, ", ")}}
	}
	if !slices.Contains(kinds, t.Kind) {
		return []errs.Field{{Path: at + ".kind", Message: fmt.Sprintf("value '%s' is not supported, it must be one of: %s", t.Kind, strings.Join(kinds, ", "))}}
	}
	set := map[string]bool{
		"name": t.Name != "", "namespace": t.Namespace != "", "mesh": t.Mesh != "", "tags": len(t.Tags) > 0,
		"labels": len(t.Labels) > 0, "sectionName": t.SectionName != "", "proxyTypes": t.ProxyTypes != nil,
	}
	for _, f := range slices.Sorted(maps.Keys(set)) {
		if set[f] && !slices.Contains(fields, f) {
			bad = append(bad, errs.Field{Path: at + "." + f, Message: "must not be set with kind " + t.Kind})
		}
	}
	if t.ProxyTypes != nil && len(t.ProxyTypes) == 0 {
		bad = append(bad, errs.Field{Path: at + ".proxyTypes", Message: "must not be empty"})
	}
	switch {
	case t.Name == "" && (t.Kind == KindMeshServiceSubset || t.Kind == KindMeshService && len(t.Labels) == 0):
		bad = append(bad, errs.Field{Path: at + ".name", Message: "must be set with kind " + t.Kind})
	case t.Namespace != "" && t.Name == "":
		bad = append(bad, errs.Field{Path: at + ".namespace", Message: "must not be set without a name"})
	}
	for _, k := range slices.Sorted(maps.Keys(t.Tags)) {
		if k == "" || t.Tags[k] == "" {
			bad = append(bad, errs.Field{Path: fmt.Sprintf("%s.tags[%q]", at, k), Message: "must have a key and a value"})
		}
	}
	return bad
}

// Warnings says what of the policy is out of date though it works.
func (s *Spec[C]) Warnings() (out []string) {
	if t := s.TargetRef; t != nil {
		switch t.Kind {
		case KindMeshSubset, KindMeshService, KindMeshServiceSubset:
			out = append(out, t.Kind+" value for 'targetRef.kind' is deprecated, use Dataplane instead")
		}
	}
	if len(s.From) > 0 {
		text := "'from' field is deprecated, use 'rules' instead"
		if c, ok := any(new(C)).(interface{ FromWarning() string }); ok {
			text = c.FromWarning()
		}
		out = append(out, text)
	}
	return out
}
