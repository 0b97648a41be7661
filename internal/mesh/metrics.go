package mesh

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"kuma/internal/errs"
)

// Metrics declares metrics backends.
type Metrics struct {
	// EnabledBackend names the backend in use; empty means that proxies expose no
	// metrics by this way. The policy MeshMetric is the other, and wins.
	EnabledBackend string           `json:"enabledBackend,omitempty"`
	Backends       []MetricsBackend `json:"backends,omitempty"`
}

// MetricsBackend is how proxies expose metrics.
type MetricsBackend struct {
	// Name is the backend's name in this mesh; a Dataplane's own needs none.
	Name string `json:"name,omitempty"`
	// Type is "prometheus".
	Type string `json:"type,omitempty"`
	// Conf is where and how Prometheus finds the metrics.
	Conf *PrometheusConf `json:"conf,omitempty"`
}

// PrometheusType is the type of backend that there is.
const PrometheusType = "prometheus"

// PrometheusConf is where and how Prometheus finds a proxy's metrics.
type PrometheusConf struct {
	// Port is where the proxy serves its metrics, at networking.address; the
	// default is 5670.
	Port uint32 `json:"port,omitempty"`
	// Path is the one path that is served; the default is /metrics.
	Path string `json:"path,omitempty"`
	// Tags are those of the service that the endpoint is; the default is
	// kuma.io/service: dataplane-metrics.
	Tags map[string]string `json:"tags,omitempty"`
	// SkipMTLS is the older form of TLS: true is disabled, false is
	// activeMTLSBackend.
	SkipMTLS *bool `json:"skipMTLS,omitempty"`
	// TLS says how the endpoint is secured.
	TLS *PrometheusTLS `json:"tls,omitempty"`
	// Aggregate lists endpoints of the workload whose metrics are served with the
	// proxy's.
	Aggregate []PrometheusAggregate `json:"aggregate,omitempty"`
	// Envoy chooses among Envoy's own metrics.
	Envoy *PrometheusEnvoy `json:"envoy,omitempty"`
}

// PrometheusTLS says how a metrics endpoint is secured.
type PrometheusTLS struct {
	Mode PrometheusTLSMode `json:"mode,omitempty"`
}

// PrometheusTLSMode is how a metrics endpoint is secured.
type PrometheusTLSMode string

// Modes of a metrics endpoint.
const (
	// MetricsMeshTLS demands a certificate of the mesh from Prometheus, where the
	// mesh has mutual TLS; where it has none the endpoint is plaintext (contract).
	MetricsMeshTLS PrometheusTLSMode = "activeMTLSBackend"
	// MetricsProvidedTLS serves with the certificate that kuma-dp names.
	MetricsProvidedTLS PrometheusTLSMode = "providedTLS"
	// MetricsPlain is plaintext.
	MetricsPlain PrometheusTLSMode = "disabled"
)

// Values lists the modes.
func (PrometheusTLSMode) Values() []string {
	return []string{string(MetricsMeshTLS), string(MetricsProvidedTLS), string(MetricsPlain)}
}

// PrometheusAggregate is an endpoint of the workload.
type PrometheusAggregate struct {
	// Name tells it from the others; a Dataplane's replaces the mesh's of the
	// same name.
	Name string `json:"name,omitempty"`
	// Port is the workload's.
	Port uint32 `json:"port,omitempty"`
	// Path is where it serves metrics; the default is /metrics.
	Path string `json:"path,omitempty"`
	// Enabled: false leaves it out; the default is true.
	Enabled *bool `json:"enabled,omitempty"`
	// Address is the workload's; the default is the address at which kuma-dp
	// reaches it.
	Address string `json:"address,omitempty"`
}

// PrometheusEnvoy chooses among Envoy's own metrics.
type PrometheusEnvoy struct {
	// FilterRegex keeps the metrics that match it (RE2).
	FilterRegex string `json:"filterRegex,omitempty"`
	// UsedOnly leaves out metrics that never changed; the default is true.
	UsedOnly *bool `json:"usedOnly,omitempty"`
}

// Defaults of a metrics endpoint (contract).
const (
	MetricsPort    = 5670
	MetricsPath    = "/metrics"
	MetricsService = "dataplane-metrics"
)

// Default fills in what a mesh's metrics backends leave out.
func (m *MeshSpec) Default() {
	if m.Metrics == nil {
		return
	}
	for i := range m.Metrics.Backends {
		b := &m.Metrics.Backends[i]
		if b.Type != PrometheusType {
			continue
		}
		if b.Conf == nil {
			b.Conf = new(PrometheusConf)
		}
		c := b.Conf
		if c.Port == 0 {
			c.Port = MetricsPort
		}
		if c.Path == "" {
			c.Path = MetricsPath
		}
		if len(c.Tags) == 0 {
			c.Tags = map[string]string{TagService: MetricsService}
		}
		if c.TLS == nil || c.TLS.Mode == "" {
			c.TLS = &PrometheusTLS{Mode: c.mode()}
		}
		if c.TLS.Mode == MetricsProvidedTLS {
			c.SkipMTLS = nil
		}
		for j := range c.Aggregate {
			if c.Aggregate[j].Path == "" {
				c.Aggregate[j].Path = MetricsPath
			}
		}
	}
}

// mode is how the endpoint is secured, by either form.
func (c *PrometheusConf) mode() PrometheusTLSMode {
	switch {
	case c.TLS != nil && c.TLS.Mode != "":
		return c.TLS.Mode
	case c.SkipMTLS != nil && *c.SkipMTLS:
		return MetricsPlain
	}
	return MetricsMeshTLS
}

// A MetricsEndpoint is where one proxy serves its metrics because its mesh says
// so in Mesh.metrics.
type MetricsEndpoint struct {
	Port uint32
	Path string
	Mode PrometheusTLSMode
	// Filter is a regular expression that Envoy's metrics must match, or "".
	Filter string
	// UsedOnly leaves out metrics that never changed.
	UsedOnly bool
	// Aggregate lists the workload's endpoints that are enabled.
	Aggregate []PrometheusAggregate
}

// MetricsOf returns where a proxy of the mesh serves its metrics: what the
// enabled backend says, and over it what the Dataplane says for itself. It is
// false where the mesh has no enabled backend.
func (m *MeshSpec) MetricsOf(d *DataplaneSpec) (MetricsEndpoint, bool) {
	if m == nil || m.Metrics == nil || m.Metrics.EnabledBackend == "" {
		return MetricsEndpoint{}, false
	}
	i := slices.IndexFunc(m.Metrics.Backends, func(b MetricsBackend) bool {
		return b.Name == m.Metrics.EnabledBackend && b.Type == PrometheusType
	})
	if i < 0 {
		return MetricsEndpoint{}, false
	}
	e := MetricsEndpoint{Port: MetricsPort, Path: MetricsPath, Mode: MetricsMeshTLS, UsedOnly: true}
	e.lay(m.Metrics.Backends[i].Conf)
	if d != nil && d.Metrics != nil && d.Metrics.Type == PrometheusType {
		e.lay(d.Metrics.Conf)
	}
	e.Aggregate = slices.DeleteFunc(e.Aggregate, func(a PrometheusAggregate) bool { return a.Enabled != nil && !*a.Enabled })
	return e, true
}

// lay puts what a configuration says over what was there.
func (e *MetricsEndpoint) lay(c *PrometheusConf) {
	if c == nil {
		return
	}
	if c.Port != 0 {
		e.Port = c.Port
	}
	if c.Path != "" {
		e.Path = c.Path
	}
	if c.SkipMTLS != nil || c.TLS != nil && c.TLS.Mode != "" {
		e.Mode = c.mode()
	}
	if c.Envoy != nil {
		if c.Envoy.FilterRegex != "" {
			e.Filter = c.Envoy.FilterRegex
		}
		if c.Envoy.UsedOnly != nil {
			e.UsedOnly = *c.Envoy.UsedOnly
		}
	}
	for _, a := range c.Aggregate {
		if a.Path == "" {
			a.Path = MetricsPath
		}
		if at := slices.IndexFunc(e.Aggregate, func(o PrometheusAggregate) bool { return o.Name == a.Name }); at >= 0 {
			e.Aggregate[at] = a
		} else {
			e.Aggregate = append(e.Aggregate, a)
		}
	}
}

// maxAggregate bounds how many endpoints of the workload one backend names.
const maxAggregate = 100

// checkMetrics checks one backend; at is its path. A Dataplane's own names no
// more than what it changes.
func checkMetrics(at string, b *MetricsBackend) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: at + path, Message: fmt.Sprintf(format, args...)})
	}
	if b.Type != PrometheusType {
		add(".type", "unknown backend type %q. Available backends: %q", b.Type, PrometheusType)
		return bad
	}
	c := b.Conf
	if c == nil {
		return nil
	}
	if c.Port > 65535 {
		add(".conf.port", "port must be in the range [1, 65535]")
	}
	if c.Path != "" {
		bad = append(bad, CheckMetricsPath(at+".conf.path", c.Path)...)
	}
	if c.SkipMTLS != nil && c.TLS != nil && c.TLS.Mode != "" && c.TLS.Mode != MetricsProvidedTLS && *c.SkipMTLS != (c.TLS.Mode == MetricsPlain) {
		add(".conf", "skipMTLS and tls configuration cannot be defined together")
	}
	bad = append(bad, checkTags(at+".conf.tags", c.Tags, false)...)
	if c.Envoy != nil && c.Envoy.FilterRegex != "" {
		if len(c.Envoy.FilterRegex) > 1000 {
			add(".conf.envoy.filterRegex", "has %d characters, the limit is 1000", len(c.Envoy.FilterRegex))
		} else if _, err := regexp.Compile(c.Envoy.FilterRegex); err != nil {
			add(".conf.envoy.filterRegex", "is no regular expression: %v", err)
		}
	}
	if len(c.Aggregate) > maxAggregate {
		add(".conf.aggregate", "has %d entries, the limit is %d", len(c.Aggregate), maxAggregate)
		return bad
	}
	seen := map[string]bool{}
	for i, a := range c.Aggregate {
		p := fmt.Sprintf(".conf.aggregate[%d]", i)
		switch {
		case a.Name == "":
			add(p+".name", "cannot be empty")
		case seen[a.Name]:
			add(p+".name", "duplicate entry %q: names must be unique", a.Name)
		}
		seen[a.Name] = true
		// What is left out altogether needs no port.
		if (a.Port < 1 || a.Port > 65535) && (a.Enabled == nil || *a.Enabled) {
			add(p+".port", "port must be in the range [1, 65535]")
		}
		if a.Path != "" {
			bad = append(bad, CheckMetricsPath(at+p+".path", a.Path)...)
		}
		if a.Address != "" {
			bad = append(bad, CheckHost(at+p+".address", a.Address)...)
		}
	}
	return bad
}

// CheckMetricsPath checks the path of a metrics endpoint.
func CheckMetricsPath(at, path string) []errs.Field {
	bad := func(format string, args ...any) []errs.Field {
		return []errs.Field{{Path: at, Message: fmt.Sprintf(format, args...)}}
	}
	switch {
	case !strings.HasPrefix(path, "/"):
		return bad("must begin with /")
	case len(path) > 1000:
		return bad("has %d characters, the limit is 1000", len(path))
	case strings.ContainsAny(path, "?#"):
		return bad("must be a path alone, without ? and #")
	}
	for _, c := range path {
		if c <= ' ' || c > '~' {
			return bad("must be printable ASCII without spaces")
		}
	}
	return nil
}

// CheckHost checks the address of something that is asked: an IP address or a
// domain name.
func CheckHost(at, host string) []errs.Field {
	ip, err := netip.ParseAddr(host)
	if err == nil && !ip.IsUnspecified() || err != nil && len(host) <= 253 && hostName.MatchString(host) {
		return nil
	}
	return []errs.Field{{Path: at, Message: "address has to be valid IP address or domain name"}}
}

// MetricLabels are the labels that a Dataplane's tags make on metrics: for each
// tag its first value, and under its name with an "s" all of them, between
// commas (contract).
func MetricLabels(tags map[string][]string) map[string]string {
	out := map[string]string{}
	for k, values := range tags {
		if len(values) == 0 {
			continue
		}
		k = labelName.ReplaceAllString(k, "_")
		out[k] = values[0]
		out[k+"s"] = "," + strings.Join(values, ",") + ","
	}
	return out
}

var labelName = regexp.MustCompile(`[^A-Za-z0-9_]`)

// UnknownService is the service of a proxy that names none (contract).
const UnknownService = "unknown"

// MainService is the service by which a proxy is known: its gateway's or its
// first inbound's, else UnknownService.
func (d *DataplaneSpec) MainService() string {
	for _, tags := range d.TagSets() {
		if s := tags[TagService]; s != "" {
			return s
		}
	}
	return UnknownService
}
