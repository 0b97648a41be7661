package dp

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// A sieve decides which of Envoy's metrics a scraper gets (contract: first the
// profiles, then what is excluded, then what is included all the same). The
// zero value lets everything through.
type sieve struct {
	profile          profile
	exclude, include []selector
}

// profile is a ready-made choice of metrics, from the broadest to the
// narrowest.
type profile int

const (
	allMetrics profile = iota
	basicMetrics
	noMetrics
)

// profileOf returns the broadest of those named; "Basic" is in force where none
// is.
func profileOf(names []string) (profile, error) {
	if len(names) == 0 {
		return basicMetrics, nil
	}
	out := noMetrics
	for _, n := range names {
		i := slices.Index([]string{"All", "Basic", "None"}, n)
		if i < 0 {
			return 0, fmt.Errorf("%.40q is no profile; it must be All, Basic or None", n)
		}
		out = min(out, profile(i))
	}
	return out, nil
}

// selector chooses families of metrics by their names.
type selector func(name string) bool

// Limits of what a configuration may ask for.
const (
	maxSelectors = 500
	maxPattern   = 1024
)

// newSelector makes one of its configuration.
func newSelector(kind, match string) (selector, error) {
	if match == "" || len(match) > maxPattern {
		return nil, fmt.Errorf("match must have between 1 and %d bytes", maxPattern)
	}
	switch kind {
	case "Exact":
		return func(name string) bool { return name == match }, nil
	case "Prefix":
		return func(name string) bool { return strings.HasPrefix(name, match) }, nil
	case "Contains":
		return func(name string) bool { return strings.Contains(name, match) }, nil
	case "Regex":
		// RE2: its time grows with the name's length and no faster.
		re, err := regexp.Compile(match)
		if err != nil {
			return nil, fmt.Errorf("match: %w", err)
		}
		return re.MatchString, nil
	}
	return nil, fmt.Errorf("%.40q is no type of a selector; it must be Exact, Prefix, Regex or Contains", kind)
}

func chosen(list []selector, name string) bool {
	return slices.ContainsFunc(list, func(s selector) bool { return s(name) })
}

// silent reports whether nothing can pass, so that Envoy need not be asked.
func (s *sieve) silent() bool { return s.profile == noMetrics && len(s.include) == 0 }

// family decides about a family of metrics. Where inner is false, those of its
// series go that tell of the mesh's own plumbing.
func (s *sieve) family(name string) (pass, inner bool) {
	if chosen(s.include, name) {
		return true, true
	}
	if chosen(s.exclude, name) {
		return false, false
	}
	switch s.profile {
	case allMetrics:
		return true, true
	case basicMetrics:
		return basic(name), false
	}
	return false, false
}

// basic reports whether a family belongs to the profile "Basic" (contract).
func basic(name string) bool {
	for _, part := range []string{
		"rq_time", "cx_length_ms", "cx_count", "_rq", "bytes", "timeout", "health_check", "lb_healthy_panic", "cx_destroy",
		"error", "fail", "reset", "eject", "overflow", "cancelled", "max_duration_reached", "no_cluster", "no_route",
		"no_filter_chain", "reject", "denied", "days_until_first_cert_expiring", "rbac", "cx_active", "cx_connect",
		"circuit_breakers", "cx_total", "ssl_handshake", "ssl_context_update_by_sds",
	} {
		if strings.Contains(name, part) {
			return true
		}
	}
	for _, begin := range []string{"envoy_server", "envoy_control_plane", "envoy_dns_filter", "envoy_dns_cares", "kuma_dp_dns"} {
		if strings.HasPrefix(name, begin) {
			return true
		}
	}
	switch name {
	case "envoy_cluster_membership_degraded", "envoy_cluster_membership_healthy", "envoy_cluster_membership_total", "envoy_cluster_ssl_handshake":
		return true
	}
	return false
}

// Labels by which Envoy says what a series is of.
const (
	clusterLabel  = "envoy_cluster_name"
	httpLabel     = "envoy_http_conn_manager_prefix"
	tcpLabel      = "envoy_tcp_prefix"
	addressLabel  = "envoy_listener_address"
	listenerLabel = "listener"
)

// plumbing reports whether a series is of what the mesh itself runs on.
func plumbing(l *metricLine) bool {
	for _, s := range l.labels {
		switch string(s.name) {
		case clusterLabel:
			if plumbingName(string(s.value)) {
				return true
			}
		case httpLabel, tcpLabel, addressLabel, listenerLabel:
			// A service may well be called "admin", a listener of ours is.
			if v := string(s.value); v == "admin" || plumbingName(v) || strings.Contains(v, "kuma-mesh-metric-config") {
				return true
			}
		}
	}
	return false
}

// plumbingName reports whether a cluster or listener belongs to the mesh
// itself. Envoy writes "_" for ":" in the names of statistics.
func plumbingName(name string) bool {
	for _, begin := range []string{"_", "system_", "kuma:metrics:", "kuma_metrics_", "tracing:", "tracing_", "meshtrace:", "meshtrace_"} {
		if strings.HasPrefix(name, begin) {
			return true
		}
	}
	switch name {
	case "ads_cluster", "access_log_sink", "kuma:envoy:admin", "kuma_envoy_admin", "kuma:sds", "kuma_sds", "kuma:readiness", "kuma_readiness", "hijacker":
		return true
	}
	return strings.Contains(name, "opentelemetry")
}

// traffic reports whether a series tells of the mesh's traffic: that of a
// cluster or of an HTTP listener which is not plumbing.
func traffic(l *metricLine) bool {
	return (l.label(clusterLabel) != nil || l.label(httpLabel) != nil) && !plumbing(l)
}
