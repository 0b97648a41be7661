package envoy

import (
	"regexp"
	"strings"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	sslinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Access says who may call an inbound. It is the one model into which every
// kind of permission is translated. Deny wins; who is not allowed is refused.
type Access struct {
	Deny  []Grant
	Allow []Grant
	// Shadow lists callers who are allowed and would be refused if the policy
	// were in force: they are counted.
	Shadow []Grant
}

// A Grant is some callers and the policy that speaks of them.
type Grant struct {
	// Policy is shown where a refusal is logged.
	Policy string
	// Callers are who is meant.
	Callers Caller
	// ServerName, where set, narrows the grant to connections that ask for it.
	ServerName string
}

// A Caller is a condition on the names (URI SANs) in a caller's certificate. At
// most one field is set; none means anyone.
//
// A certificate may hold several SPIFFE ids, one for each service of its proxy.
// ID and Under mean the caller as a whole where they allow: each of its SPIFFE ids
// must match, so that for ID it has only one. Where they deny, one that matches
// is enough.
type Caller struct {
	// Name is met where one of the names is this.
	Name string
	// NamePrefix is met where one of the names begins so.
	NamePrefix string
	// ID is met by the workload whose SPIFFE id is this.
	ID string
	// Under is met by the workload whose SPIFFE id is this or lies below it: it
	// ends on a path segment.
	Under string
	// All, Any and Not combine.
	All []Caller
	Any []Caller
	Not *Caller
}

// whole reports whether the condition needs all names at once.
func (c Caller) whole() bool {
	if c.ID != "" || c.Under != "" {
		return true
	}
	for _, s := range c.All {
		if s.whole() {
			return true
		}
	}
	for _, s := range c.Any {
		if s.whole() {
			return true
		}
	}
	return c.Not != nil && c.Not.whole()
}

// principal is the condition in the form that looks at the names one by one.
func (c Caller) principal() *rbacv3.Principal {
	switch {
	case c.Name != "" || c.ID != "":
		return named(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: c.Name + c.ID}})
	case c.NamePrefix != "":
		return named(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: c.NamePrefix}})
	case c.Under != "":
		return named(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{
			Regex: regexp.QuoteMeta(c.Under) + "(/.*)?",
		}}})
	case len(c.All) > 0:
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: principals(c.All)}}}
	case len(c.Any) > 0:
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: principals(c.Any)}}}
	case c.Not != nil:
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: c.Not.principal()}}
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
}

func principals(list []Caller) []*rbacv3.Principal {
	out := make([]*rbacv3.Principal, len(list))
	for i, c := range list {
		out[i] = c.principal()
	}
	return out
}

func named(m *matcherv3.StringMatcher) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: m}}}
}

// otherNames is what may follow the SPIFFE id among the names that Envoy joins
// by commas: names that are no SPIFFE ids.
const otherNames = "(,kuma://[^,]*)*"

// predicate is the condition in the form that looks at all names at once,
// joined by commas. No name has a comma: neither SPIFFE ids nor tags may.
func (c Caller) predicate() *xdsmatcherv3.Matcher_MatcherList_Predicate {
	switch {
	case c.Name != "":
		return allNames(`(.*,)?` + regexp.QuoteMeta(c.Name) + `(,.*)?`)
	case c.NamePrefix != "":
		return allNames(`(.*,)?` + regexp.QuoteMeta(c.NamePrefix) + `.*`)
	case c.ID != "":
		return allNames(regexp.QuoteMeta(c.ID) + otherNames)
	case c.Under != "":
		under := regexp.QuoteMeta(c.Under) + `(/[^,]*)?`
		return allNames(under + `(,` + under + `)*` + otherNames)
	case len(c.All) == 1:
		return c.All[0].predicate()
	case len(c.All) > 1:
		return &xdsmatcherv3.Matcher_MatcherList_Predicate{MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_AndMatcher{AndMatcher: predicates(c.All)}}
	case len(c.Any) == 1:
		return c.Any[0].predicate()
	case len(c.Any) > 1:
		return &xdsmatcherv3.Matcher_MatcherList_Predicate{MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_OrMatcher{OrMatcher: predicates(c.Any)}}
	case c.Not != nil:
		return &xdsmatcherv3.Matcher_MatcherList_Predicate{MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_NotMatcher{NotMatcher: c.Not.predicate()}}
	}
	return allNames(`.*`)
}

func predicates(list []Caller) *xdsmatcherv3.Matcher_MatcherList_Predicate_PredicateList {
	out := new(xdsmatcherv3.Matcher_MatcherList_Predicate_PredicateList)
	for _, c := range list {
		out.Predicate = append(out.Predicate, c.predicate())
	}
	return out
}

// allNames matches all names, joined by commas, as a whole.
func allNames(regex string) *xdsmatcherv3.Matcher_MatcherList_Predicate {
	return single("envoy.matching.inputs.uri_san", &sslinputsv3.UriSanInput{}, &xdsmatcherv3.StringMatcher{
		MatchPattern: &xdsmatcherv3.StringMatcher_SafeRegex{SafeRegex: &xdsmatcherv3.RegexMatcher{
			EngineType: &xdsmatcherv3.RegexMatcher_GoogleRe2{GoogleRe2: &xdsmatcherv3.RegexMatcher_GoogleRE2{}}, Regex: regex,
		}},
	})
}

func single(name string, input proto.Message, m *xdsmatcherv3.StringMatcher) *xdsmatcherv3.Matcher_MatcherList_Predicate {
	return &xdsmatcherv3.Matcher_MatcherList_Predicate{MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
		SinglePredicate: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate{
			Input:   &xdscorev3.TypedExtensionConfig{Name: name, TypedConfig: emptyAny(input)},
			Matcher: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: m},
		},
	}}
}

// emptyAny packs a message without fields, which can't fail.
func emptyAny(m proto.Message) *anypb.Any {
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())}
}

// rbac is a filter's rules in one of Envoy's two forms: rules or matcher.
type rbac struct {
	rules   *rbacv3.RBAC
	matcher *xdsmatcherv3.Matcher
	shadow  *rbacv3.RBAC
}

// empty reports whether the filter would let everything through, uncounted.
func (r rbac) empty() bool { return r.rules == nil && r.matcher == nil && r.shadow == nil }

// denials is the filter that comes first. It refuses, and counts shadow denials.
func (a *Access) denials() (r rbac) {
	if len(a.Deny) > 0 {
		r.rules = rulesOf(rbacv3.RBAC_DENY, a.Deny)
	}
	if len(a.Shadow) > 0 {
		r.shadow = rulesOf(rbacv3.RBAC_DENY, a.Shadow)
	}
	return r
}

// allowances is the filter that comes second. It refuses who is not allowed.
func (a *Access) allowances() (r rbac) {
	for _, g := range a.Allow {
		if g.Callers.whole() {
			return rbac{matcher: matcherOf(a.Allow)}
		}
	}
	return rbac{rules: rulesOf(rbacv3.RBAC_ALLOW, a.Allow)}
}

// rulesOf puts the grants of one policy together under its name.
func rulesOf(action rbacv3.RBAC_Action, grants []Grant) *rbacv3.RBAC {
	out := &rbacv3.RBAC{Action: action, Policies: map[string]*rbacv3.Policy{}}
	for _, g := range grants {
		key := g.Policy
		permission := &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
		if g.ServerName != "" {
			key += "sni_" + g.ServerName
			permission = &rbacv3.Permission{Rule: &rbacv3.Permission_RequestedServerName{RequestedServerName: &matcherv3.StringMatcher{
				MatchPattern: &matcherv3.StringMatcher_Exact{Exact: g.ServerName},
			}}}
		}
		p := out.Policies[key]
		if p == nil {
			p = &rbacv3.Policy{Permissions: []*rbacv3.Permission{permission}}
			out.Policies[key] = p
		}
		p.Principals = append(p.Principals, g.Callers.principal())
	}
	return out
}

// matcherOf allows what one of the grants allows, and refuses the rest.
func matcherOf(grants []Grant) *xdsmatcherv3.Matcher {
	list := new(xdsmatcherv3.Matcher_MatcherList)
	for _, g := range grants {
		p := g.Callers.predicate()
		if g.ServerName != "" {
			p = &xdsmatcherv3.Matcher_MatcherList_Predicate{MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_AndMatcher{
				AndMatcher: &xdsmatcherv3.Matcher_MatcherList_Predicate_PredicateList{Predicate: []*xdsmatcherv3.Matcher_MatcherList_Predicate{
					p,
					single("envoy.matching.inputs.server_name", &networkinputsv3.ServerNameInput{}, &xdsmatcherv3.StringMatcher{
						MatchPattern: &xdsmatcherv3.StringMatcher_Exact{Exact: g.ServerName},
					}),
				}},
			}}
		}
		action := &rbacv3.Action{Name: g.Policy, Action: rbacv3.RBAC_ALLOW}
		packed, err := anypb.New(action)
		if err != nil {
			// Only a name that is not UTF-8 can't be packed; names of policies are
			// ASCII. Without it the grant allows nobody.
			continue
		}
		list.Matchers = append(list.Matchers, &xdsmatcherv3.Matcher_MatcherList_FieldMatcher{
			Predicate: p,
			OnMatch: &xdsmatcherv3.Matcher_OnMatch{OnMatch: &xdsmatcherv3.Matcher_OnMatch_Action{
				Action: &xdscorev3.TypedExtensionConfig{Name: "envoy.filters.rbac.action", TypedConfig: packed},
			}},
		})
	}
	return &xdsmatcherv3.Matcher{MatcherType: &xdsmatcherv3.Matcher_MatcherList_{MatcherList: list}}
}

// wantsServerName reports whether some grant looks at the server name.
func (a *Access) wantsServerName() bool {
	for _, list := range [][]Grant{a.Deny, a.Allow, a.Shadow} {
		for _, g := range list {
			if g.ServerName != "" {
				return true
			}
		}
	}
	return false
}

// denialPrefix starts the details that Envoy gives for a refusal by RBAC.
const denialPrefix = "rbac_access_denied_matched_policy"

// DeniedBy reads the policy from the details of a refusal, as they stand in
// "reason" of the log of refusals. It is "" where no policy refused: none
// allowed. It returns false for details of anything else.
func DeniedBy(details string) (policy string, ok bool) {
	rest, ok := strings.CutPrefix(details, denialPrefix)
	if !ok {
		return "", false
	}
	policy = strings.TrimSuffix(strings.TrimPrefix(rest, "["), "]")
	if policy == "none" {
		policy = ""
	}
	return policy, true
}
