package meshtimeout

import (
	"regexp"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"kuma/internal/envoy"
	"kuma/internal/policy"
	"kuma/internal/resource"
)

func apply(c *envoy.Config, r policy.Rules[Conf]) error {
	for _, in := range c.Inbounds {
		if conf, ok := r.Inbound(in); ok {
			stream(conf, in.Stream != nil, in.HTTP, in.Cluster)
			if in.Stream != nil && conf.IdleTimeout != nil {
				in.Stream.IdleTimeout = seconds(conf.IdleTimeout)
			}
		}
		if in.HTTP != nil && in.Guard != envoy.Open {
			perCaller(in, r.Matched(in))
		}
	}
	for _, o := range c.Outbounds {
		conf, ok := r.Outbound(&o.To)
		if !ok {
			continue
		}
		stream(conf, o.Stream != nil, o.HTTP, o.Cluster)
		if o.Stream != nil && conf.IdleTimeout != nil {
			o.Stream.IdleTimeout = seconds(conf.IdleTimeout)
		}
	}
	return nil
}

// stream sets what a listener and its cluster have for one configuration.
func stream(conf Conf, tcp bool, h *envoy.HTTP, cl *envoy.Cluster) {
	if cl != nil {
		if conf.ConnectionTimeout != nil {
			cl.ConnectTimeout = seconds(conf.ConnectionTimeout)
		}
		if !tcp {
			clusterOptions(conf, cl)
		}
	}
	if h == nil || conf.HTTP == nil {
		return
	}
	if d := conf.HTTP.StreamIdleTimeout; d != nil {
		h.StreamIdleTimeout = seconds(d)
	}
	if d := conf.HTTP.RequestHeadersTimeout; d != nil {
		h.RequestHeadersTimeout = seconds(d)
	}
	h.EachRoute(func(_ *routev3.Route, a *routev3.RouteAction) { onRoute(conf.HTTP, a) })
}

// onRoute sets what a route may have of its own. A try never lasts longer than
// the request that it belongs to.
func onRoute(conf *HTTP, a *routev3.RouteAction) {
	if conf.RequestTimeout != nil {
		a.Timeout = seconds(conf.RequestTimeout)
	}
	if conf.StreamIdleTimeout != nil {
		a.IdleTimeout = seconds(conf.StreamIdleTimeout)
	}
	if p := a.RetryPolicy; p != nil && p.PerTryTimeout.AsDuration() > 0 && a.Timeout.AsDuration() > 0 && p.PerTryTimeout.AsDuration() >= a.Timeout.AsDuration() {
		p.PerTryTimeout = nil
	}
}

func clusterOptions(conf Conf, cl *envoy.Cluster) {
	if cl.Protocol == nil {
		return
	}
	o := cl.Protocol.CommonHttpProtocolOptions
	if o == nil {
		o = new(corev3.HttpProtocolOptions)
		cl.Protocol.CommonHttpProtocolOptions = o
	}
	if conf.IdleTimeout != nil {
		o.IdleTimeout = seconds(conf.IdleTimeout)
	}
	if h := conf.HTTP; h != nil {
		if h.MaxStreamDuration != nil {
			o.MaxStreamDuration = seconds(h.MaxStreamDuration)
		}
		if h.MaxConnectionDuration != nil {
			o.MaxConnectionDuration = seconds(h.MaxConnectionDuration)
		}
	}
}

// perCaller puts a route for each match before the inbound's own. Routes can't
// look at certificates; they look at the header x-forwarded-client-cert, which the
// listener has set from the caller's certificate and nobody else can set.
func perCaller(in *envoy.Inbound, matched []policy.Matched[Conf]) {
	for _, v := range in.HTTP.Routes.VirtualHosts {
		general := v.Routes
		var routes []*routev3.Route
		for _, m := range matched {
			if m.Match.SpiffeID == nil || m.Conf.HTTP == nil {
				continue
			}
			for _, r := range general {
				own := proto.CloneOf(r)
				own.Match.Headers = append(own.Match.Headers, &routev3.HeaderMatcher{
					Name: "x-forwarded-client-cert",
					HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &matcherv3.StringMatcher{
						MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: callerRegex(m.Match.SpiffeID)}},
					}},
				})
				if a := own.GetRoute(); a != nil {
					onRoute(m.Conf.HTTP, a)
				}
				routes = append(routes, own)
			}
		}
		v.Routes = append(routes, general...)
	}
}

// callerRegex matches the header's value where one of the caller's names is the
// SPIFFE id, or lies below it for a prefix. "By=", the names of this proxy, come
// before the hash and are not the caller's.
func callerRegex(m *policy.SpiffeIDMatch) string {
	id := regexp.QuoteMeta(m.Value)
	if m.Type == policy.Prefix {
		id += "(/[^;,]*)?"
	}
	return "([^,]*;)?URI=" + id + "(;[^,]*)?"
}

func seconds(d *resource.Duration) *durationpb.Duration { return durationpb.New(d.Duration) }
