package envoytest

import (
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	netrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"

	"kuma/internal/envoy"
)

// Caller is who connects to an inbound.
type Caller struct {
	// Names are the URI names in its certificate. With none it speaks plaintext.
	Names []string
	// ServerName is what it asks for.
	ServerName string
	// Foreign says that it speaks TLS of its own, not that of the mesh.
	Foreign bool
}

// Decision is what became of a request or a connection.
type Decision struct {
	// Refused says that it went nowhere; Reason is why: "403" with the policy,
	// "closed", "no listener" and so on.
	Refused bool
	Reason  string
	// Policy is the one that refused, or "" where none allowed.
	Policy string
	// Shadow says that a policy not in force would have refused.
	Shadow bool
	// Cluster is where it went, Endpoints its addresses, and TLS what was used on
	// the way: the server name and the names demanded of the peer.
	Cluster   string
	Endpoints []string
	TLS       string
	// Timeout bounds the request, IdleTimeout its idling, Connect the making of a
	// connection; Retries is how often it is tried again.
	Timeout, IdleTimeout, Connect time.Duration
	Retries                       uint32
}

// String says it in a sentence.
func (d Decision) String() string {
	if d.Refused {
		return "refused: " + d.Reason
	}
	s := "goes to cluster " + d.Cluster
	if d.TLS != "" {
		s += " with TLS " + d.TLS
	} else {
		s += " in plaintext"
	}
	s += fmt.Sprintf(", timeout %s, idle %s, connect %s", d.Timeout, d.IdleTimeout, d.Connect)
	if d.Retries > 0 {
		s += fmt.Sprintf(", %d retries", d.Retries)
	}
	return s + ", endpoints [" + strings.Join(d.Endpoints, " ") + "]"
}

// Route tells where a workload's request goes, such as
// "GET http://127.0.0.1:10001/", or its connection: "tcp://127.0.0.1:10002".
func Route(res envoy.Resources, request string) (Decision, error) {
	return Call(res, request, Caller{})
}

// Call tells what becomes of a request or a connection of a caller to a
// listener, which is named by its address in the request.
func Call(res envoy.Resources, request string, c Caller) (Decision, error) {
	method, raw, ok := strings.Cut(request, " ")
	if !ok {
		method, raw = "", request
	}
	u, err := url.Parse(raw)
	if err != nil {
		return Decision{}, err
	}
	w := walker{res: res, caller: c, method: method, url: u}
	return w.listener()
}

type walker struct {
	res    envoy.Resources
	caller Caller
	method string
	url    *url.URL
	out    Decision
}

func get[M proto.Message](res envoy.Resources, typ, name string) (M, bool, error) {
	var zero M
	p := res[typ][name]
	if p == nil {
		return zero, false, nil
	}
	m, err := p.Body.UnmarshalNew()
	if err != nil {
		return zero, false, err
	}
	return m.(M), true, nil
}

func refused(reason string, args ...any) (Decision, error) {
	return Decision{Refused: true, Reason: fmt.Sprintf(reason, args...)}, nil
}

func (w *walker) listener() (Decision, error) {
	for name := range w.res[envoy.ListenerType] {
		l, _, err := get[*listenerv3.Listener](w.res, envoy.ListenerType, name)
		if err != nil {
			return Decision{}, err
		}
		a := l.Address.GetSocketAddress()
		if net.JoinHostPort(a.GetAddress(), strconv.Itoa(int(a.GetPortValue()))) == w.url.Host {
			return w.chain(l)
		}
	}
	return refused("no listener")
}

// chain finds the filter chain as Envoy does: the transport first, then the
// application protocol, the more specific one wins.
func (w *walker) chain(l *listenerv3.Listener) (Decision, error) {
	transport := "tls"
	if len(w.caller.Names) == 0 && !w.caller.Foreign {
		transport = "raw_buffer"
	}
	mesh := transport == "tls" && !w.caller.Foreign
	inspected := slices.ContainsFunc(l.ListenerFilters, func(f *listenerv3.ListenerFilter) bool { return f.Name == "envoy.filters.listener.tls_inspector" })
	var best *listenerv3.FilterChain
	score := -1
	for _, c := range l.FilterChains {
		m := c.GetFilterChainMatch()
		if m != nil && !inspected {
			return Decision{}, fmt.Errorf("%s matches on TLS without an inspector", l.Name)
		}
		n := 0
		if t := m.GetTransportProtocol(); t != "" {
			if t != transport {
				continue
			}
			n++
		}
		if p := m.GetApplicationProtocols(); len(p) > 0 {
			if !mesh || !slices.Contains(p, envoy.ALPN) {
				continue
			}
			n++
		}
		if n > score {
			best, score = c, n
		}
	}
	if best == nil {
		return refused("closed: no filter chain")
	}
	if best.TransportSocket != nil {
		var t tlsv3.DownstreamTlsContext
		if err := best.TransportSocket.GetTypedConfig().UnmarshalTo(&t); err != nil {
			return Decision{}, err
		}
		if transport != "tls" || w.caller.Foreign {
			return refused("closed: TLS of the mesh is demanded")
		}
		v := t.CommonTlsContext.GetCombinedValidationContext().GetDefaultValidationContext()
		if !t.RequireClientCertificate.GetValue() || !slices.ContainsFunc(v.GetMatchTypedSubjectAltNames(), func(m *tlsv3.SubjectAltNameMatcher) bool {
			return slices.ContainsFunc(w.caller.Names, func(n string) bool { return matches(m.Matcher, n) })
		}) {
			return refused("closed: the certificate is not of the mesh")
		}
	} else if transport == "tls" {
		// The workload terminates it.
		w.caller.Names = nil
	}
	if !inspected {
		w.caller.ServerName = ""
	}
	return w.filters(best.Filters)
}

func (w *walker) filters(filters []*listenerv3.Filter) (Decision, error) {
	for _, f := range filters {
		m, err := f.GetTypedConfig().UnmarshalNew()
		if err != nil {
			return Decision{}, err
		}
		switch m := m.(type) {
		case *netrbacv3.RBAC:
			ok, err := w.rbac(m.Rules, m.Matcher, m.ShadowRules)
			if err != nil {
				return Decision{}, err
			}
			if !ok {
				w.out.Refused, w.out.Reason = true, "closed"
				return w.out, nil
			}
		case *tcpproxyv3.TcpProxy:
			w.out.Cluster, w.out.IdleTimeout = m.GetCluster(), m.IdleTimeout.AsDuration()
			return w.cluster()
		case *hcmv3.HttpConnectionManager:
			return w.http(m)
		default:
			return Decision{}, fmt.Errorf("the filter %s is not known here", f.Name)
		}
	}
	return refused("closed: no terminal filter")
}

func (w *walker) http(h *hcmv3.HttpConnectionManager) (Decision, error) {
	for _, f := range h.HttpFilters {
		a := f.GetTypedConfig()
		if f.GetConfigDiscovery() != nil {
			x, ok, err := get[*corev3.TypedExtensionConfig](w.res, envoy.ExtensionType, f.Name)
			if err != nil {
				return Decision{}, err
			}
			if !ok {
				return refused("500: the extension %s is missing", f.Name)
			}
			a = x.TypedConfig
		}
		if a.MessageName() != "envoy.extensions.filters.http.rbac.v3.RBAC" {
			continue
		}
		var m httprbacv3.RBAC
		if err := a.UnmarshalTo(&m); err != nil {
			return Decision{}, err
		}
		ok, err := w.rbac(m.Rules, m.Matcher, m.ShadowRules)
		if err != nil {
			return Decision{}, err
		}
		if !ok {
			w.out.Refused, w.out.Reason = true, "403"
			return w.out, nil
		}
	}
	headers := map[string]string{":method": w.method}
	if h.ForwardClientCertDetails == hcmv3.HttpConnectionManager_SANITIZE_SET && len(w.caller.Names) > 0 {
		headers["x-forwarded-client-cert"] = "By=spiffe://default/self;Hash=00;URI=" + strings.Join(w.caller.Names, ";URI=")
	}
	for _, v := range h.GetRouteConfig().VirtualHosts {
		for _, r := range v.Routes {
			if !routeMatches(r.Match, w.url.Path, headers) {
				continue
			}
			a := r.GetRoute()
			w.out.Cluster, w.out.Timeout, w.out.IdleTimeout = a.GetCluster(), a.Timeout.AsDuration(), a.IdleTimeout.AsDuration()
			w.out.Retries = a.GetRetryPolicy().GetNumRetries().GetValue()
			return w.cluster()
		}
	}
	return refused("404")
}

func routeMatches(m *routev3.RouteMatch, path string, headers map[string]string) bool {
	if !strings.HasPrefix(path, m.GetPrefix()) || m.GetPath() != "" && m.GetPath() != path {
		return false
	}
	for _, h := range m.Headers {
		v, ok := headers[strings.ToLower(h.Name)]
		if !ok || !matches(h.GetStringMatch(), v) {
			return false
		}
	}
	return true
}

func (w *walker) cluster() (Decision, error) {
	c, ok, err := get[*clusterv3.Cluster](w.res, envoy.ClusterType, w.out.Cluster)
	if err != nil {
		return Decision{}, err
	}
	if !ok {
		return refused("503: no cluster %s", w.out.Cluster)
	}
	w.out.Connect = c.ConnectTimeout.AsDuration()
	if c.TransportSocket != nil {
		var t tlsv3.UpstreamTlsContext
		if err := c.TransportSocket.GetTypedConfig().UnmarshalTo(&t); err != nil {
			return Decision{}, err
		}
		w.out.TLS = t.Sni
		for _, m := range t.CommonTlsContext.GetCombinedValidationContext().GetDefaultValidationContext().GetMatchTypedSubjectAltNames() {
			if p := m.Matcher.GetPrefix(); p != "" {
				w.out.TLS += " " + p + "*"
			}
			w.out.TLS += " " + m.Matcher.GetExact()
		}
		w.out.TLS = strings.TrimSpace(w.out.TLS)
	}
	cla := c.LoadAssignment
	if c.GetType() == clusterv3.Cluster_EDS {
		if cla, ok, err = get[*endpointv3.ClusterLoadAssignment](w.res, envoy.EndpointType, c.Name); err != nil {
			return Decision{}, err
		} else if !ok {
			return refused("503: no endpoint set %s", c.Name)
		}
	}
	for _, l := range cla.GetEndpoints() {
		for _, e := range l.LbEndpoints {
			a := e.GetEndpoint().Address.GetSocketAddress()
			w.out.Endpoints = append(w.out.Endpoints, net.JoinHostPort(a.GetAddress(), strconv.Itoa(int(a.GetPortValue()))))
		}
	}
	if len(w.out.Endpoints) == 0 {
		return refused("503: no endpoints in %s", c.Name)
	}
	return w.out, nil
}

// rbac decides as Envoy's filter does, and notes which policy refused.
func (w *walker) rbac(rules *rbacv3.RBAC, matcher *xdsmatcherv3.Matcher, shadow *rbacv3.RBAC) (bool, error) {
	if shadow != nil {
		if ok, _ := w.rules(shadow); !ok {
			w.out.Shadow = true
		}
	}
	switch {
	case rules != nil:
		ok, policy := w.rules(rules)
		if !ok {
			w.out.Policy = policy
		}
		return ok, nil
	case matcher != nil:
		for _, m := range matcher.GetMatcherList().GetMatchers() {
			hit, err := w.predicate(m.Predicate)
			if err != nil {
				return false, err
			}
			if hit {
				var a rbacv3.Action
				if err := m.OnMatch.GetAction().TypedConfig.UnmarshalTo(&a); err != nil {
					return false, err
				}
				if a.Action == rbacv3.RBAC_DENY {
					w.out.Policy = a.Name
				}
				return a.Action != rbacv3.RBAC_DENY, nil
			}
		}
		return false, nil
	}
	return true, nil
}

func (w *walker) rules(r *rbacv3.RBAC) (ok bool, policy string) {
	for name, p := range r.Policies {
		permitted := slices.ContainsFunc(p.Permissions, func(x *rbacv3.Permission) bool {
			return x.GetAny() || x.GetRequestedServerName() != nil && matches(x.GetRequestedServerName(), w.caller.ServerName)
		})
		if permitted && slices.ContainsFunc(p.Principals, w.principal) {
			return r.Action != rbacv3.RBAC_DENY, name
		}
	}
	return r.Action == rbacv3.RBAC_DENY, ""
}

func (w *walker) principal(p *rbacv3.Principal) bool {
	switch id := p.Identifier.(type) {
	case *rbacv3.Principal_Any:
		return id.Any
	case *rbacv3.Principal_AndIds:
		return !slices.ContainsFunc(id.AndIds.Ids, func(p *rbacv3.Principal) bool { return !w.principal(p) })
	case *rbacv3.Principal_OrIds:
		return slices.ContainsFunc(id.OrIds.Ids, w.principal)
	case *rbacv3.Principal_NotId:
		return !w.principal(id.NotId)
	case *rbacv3.Principal_Authenticated_:
		return slices.ContainsFunc(w.caller.Names, func(n string) bool { return matches(id.Authenticated.PrincipalName, n) })
	}
	panic(fmt.Sprintf("the principal %T is not known here", p.Identifier))
}

func (w *walker) predicate(p *xdsmatcherv3.Matcher_MatcherList_Predicate) (bool, error) {
	switch t := p.MatchType.(type) {
	case *xdsmatcherv3.Matcher_MatcherList_Predicate_AndMatcher:
		for _, x := range t.AndMatcher.Predicate {
			if hit, err := w.predicate(x); !hit || err != nil {
				return false, err
			}
		}
		return true, nil
	case *xdsmatcherv3.Matcher_MatcherList_Predicate_OrMatcher:
		for _, x := range t.OrMatcher.Predicate {
			if hit, err := w.predicate(x); hit || err != nil {
				return hit, err
			}
		}
		return false, nil
	case *xdsmatcherv3.Matcher_MatcherList_Predicate_NotMatcher:
		hit, err := w.predicate(t.NotMatcher)
		return !hit, err
	case *xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_:
		var value string
		switch t.SinglePredicate.Input.TypedConfig.MessageName() {
		case "envoy.extensions.matching.common_inputs.ssl.v3.UriSanInput":
			value = strings.Join(w.caller.Names, ",")
		case "envoy.extensions.matching.common_inputs.network.v3.ServerNameInput":
			value = w.caller.ServerName
		default:
			return false, fmt.Errorf("the input %s is not known here", t.SinglePredicate.Input.Name)
		}
		if value == "" {
			// Envoy matches nothing where there is nothing.
			return false, nil
		}
		m := t.SinglePredicate.GetValueMatch()
		if r := m.GetSafeRegex(); r != nil {
			return regexp.MustCompile(`\A(?:` + r.Regex + `)\z`).MatchString(value), nil
		}
		return m.GetExact() == value, nil
	}
	return false, fmt.Errorf("the predicate %T is not known here", p.MatchType)
}

// matches is Envoy's string matcher; regular expressions match as a whole.
func matches(m *matcherv3.StringMatcher, s string) bool {
	switch p := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		return p.Exact == s
	case *matcherv3.StringMatcher_Prefix:
		return strings.HasPrefix(s, p.Prefix)
	case *matcherv3.StringMatcher_SafeRegex:
		return regexp.MustCompile(`\A(?:` + p.SafeRegex.Regex + `)\z`).MatchString(s)
	}
	panic(fmt.Sprintf("the matcher %T is not known here", m.GetMatchPattern()))
}
