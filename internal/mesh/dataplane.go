package mesh

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// DataplaneSpec is a proxy beside a workload: where it listens for others
// (inbounds), and which services it makes reachable for its workload
// (outbounds).
type DataplaneSpec struct {
	// Networking is required.
	Networking *Networking `json:"networking,omitempty"`
	// Metrics overrides the mesh's metrics backend for this proxy.
	Metrics *MetricsBackend `json:"metrics,omitempty"`
	// Probes are virtual probes; they are deprecated.
	Probes *Probes `json:"probes,omitempty"`
}

// Networking is a proxy's addresses and ports.
type Networking struct {
	// Address is where other proxies reach this one: an IP address or a name.
	Address string `json:"address,omitempty"`
	// AdvertisedAddress is what other proxies use instead, where it differs.
	AdvertisedAddress string `json:"advertisedAddress,omitempty"`
	// Inbound lists the services behind this proxy.
	Inbound []Inbound `json:"inbound,omitempty"`
	// Outbound lists the services that the workload reaches through it.
	Outbound []Outbound `json:"outbound,omitempty"`
	// Gateway makes the proxy one without inbounds.
	Gateway *Gateway `json:"gateway,omitempty"`
	// TransparentProxying says that traffic is redirected to the proxy.
	TransparentProxying *TransparentProxying `json:"transparentProxying,omitempty"`
	// Admin is about Envoy's admin interface.
	Admin *Admin `json:"admin,omitempty"`
}

// Inbound is a port on which other proxies reach a service.
type Inbound struct {
	// Port is where the proxy listens, 1 to 65535.
	Port uint32 `json:"port,omitempty"`
	// ServicePort is where the workload listens; the default is Port.
	ServicePort uint32 `json:"servicePort,omitempty"`
	// ServiceAddress is where the workload listens, an IP address; the default
	// is the inbound's address.
	ServiceAddress string `json:"serviceAddress,omitempty"`
	// Address is where the proxy listens, an IP address; the default is
	// networking.address.
	Address string `json:"address,omitempty"`
	// Tags name the service ("kuma.io/service"), its protocol
	// ("kuma.io/protocol") and whatever else policies should match.
	Tags map[string]string `json:"tags,omitempty"`
	// Health is the older form of State.
	Health *Health `json:"health,omitempty"`
	// ServiceProbe lets Envoy check the workload; an inbound whose check fails
	// leaves load balancing.
	ServiceProbe *ServiceProbe `json:"serviceProbe,omitempty"`
	// State says whether the inbound receives traffic.
	State InboundState `json:"state,omitempty"`
	// Name names the port.
	Name string `json:"name,omitempty"`
	// Protocol is what the workload speaks; it wins over the tag.
	Protocol string `json:"protocol,omitempty"`
}

// Health is the older form of an inbound's state.
type Health struct {
	Ready bool `json:"ready"`
}

// InboundState says whether an inbound receives traffic.
type InboundState string

// States of an inbound. The zero value is Ready.
const (
	Ready    InboundState = "Ready"
	NotReady InboundState = "NotReady"
	Ignored  InboundState = "Ignored"
)

// Values lists the states.
func (InboundState) Values() []string {
	return []string{string(Ready), string(NotReady), string(Ignored)}
}

// ServiceProbe is a TCP check of the workload by Envoy.
type ServiceProbe struct {
	// Interval between checks; the default is the control plane's (1 s).
	Interval *resource.ProtoDuration `json:"interval,omitempty"`
	// Timeout of one check; the default is the control plane's (2 s).
	Timeout *resource.ProtoDuration `json:"timeout,omitempty"`
	// UnhealthyThreshold is how many failures in a row count; the default is 1.
	UnhealthyThreshold *uint32 `json:"unhealthyThreshold,omitempty"`
	// HealthyThreshold is how many successes in a row count; the default is 1.
	HealthyThreshold *uint32 `json:"healthyThreshold,omitempty"`
	// TCP checks that a connection can be made.
	TCP *struct{} `json:"tcp,omitempty"`
}

// Outbound is a local port that leads to a service.
type Outbound struct {
	// Port is where the proxy listens for its workload, 1 to 65535.
	Port uint32 `json:"port,omitempty"`
	// Address is where it listens; the default is 127.0.0.1.
	Address string `json:"address,omitempty"`
	// Tags name the service; either Tags or BackendRef is set.
	Tags map[string]string `json:"tags,omitempty"`
	// BackendRef names a service resource.
	BackendRef *OutboundRef `json:"backendRef,omitempty"`
}

// OutboundRef names the destination of an outbound.
type OutboundRef struct {
	// Kind is MeshService.
	Kind   string            `json:"kind,omitempty"`
	Name   string            `json:"name,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	Port   uint32            `json:"port,omitempty"`
}

// Gateway is a proxy without inbounds of its own.
type Gateway struct {
	Type GatewayType       `json:"type,omitempty"`
	Tags map[string]string `json:"tags,omitempty"`
}

// GatewayType is who runs the gateway.
type GatewayType string

// Types of gateways. The zero value is Delegated.
const (
	Delegated GatewayType = "DELEGATED"
	BuiltIn   GatewayType = "BUILTIN"
)

// Values lists the types.
func (GatewayType) Values() []string { return []string{string(Delegated), string(BuiltIn)} }

// TransparentProxying says that traffic is redirected to the proxy.
type TransparentProxying struct {
	RedirectPortInbound  uint32             `json:"redirectPortInbound,omitempty"`
	RedirectPortOutbound uint32             `json:"redirectPortOutbound,omitempty"`
	DirectAccessServices []string           `json:"directAccessServices,omitempty"`
	ReachableServices    []string           `json:"reachableServices,omitempty"`
	IPFamilyMode         string             `json:"ipFamilyMode,omitempty"`
	ReachableBackends    *ReachableBackends `json:"reachableBackends,omitempty"`
}

// ReachableBackends narrows what a transparent proxy reaches.
type ReachableBackends struct {
	Refs []ReachableRef `json:"refs,omitempty"`
}

// ReachableRef names destinations by name or by labels.
type ReachableRef struct {
	Kind      string            `json:"kind,omitempty"`
	Name      string            `json:"name,omitempty"`
	Namespace string            `json:"namespace,omitempty"`
	Port      uint32            `json:"port,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
}

// Admin is about Envoy's admin interface.
type Admin struct {
	Port uint32 `json:"port,omitempty"`
}

// Probes are virtual probes.
type Probes struct {
	Port      uint32          `json:"port,omitempty"`
	Endpoints []ProbeEndpoint `json:"endpoints,omitempty"`
}

// ProbeEndpoint is one virtual probe.
type ProbeEndpoint struct {
	InboundPort uint32 `json:"inboundPort,omitempty"`
	InboundPath string `json:"inboundPath,omitempty"`
	Path        string `json:"path,omitempty"`
}

// Dataplanes is the kind Dataplane.
var Dataplanes = resource.Define(resource.Kind{
	Name: "Dataplane", Plural: "dataplanes", Short: "dp", Scope: resource.Mesh, Shape: resource.Flat,
	Sync:    resource.ZoneToGlobal,
	Columns: []resource.Column{{Name: "TAGS", Path: "networking.inbound[*].tags"}, {Name: "ADDRESS", Path: "networking.address"}},
}, checkDataplane)

// Dataplane is a Dataplane resource.
type Dataplane = resource.Object[DataplaneSpec]

// ListenAddress is where the proxy listens for this inbound.
func (i *Inbound) ListenAddress(n *Networking) string {
	if i.Address != "" {
		return i.Address
	}
	return n.Address
}

// Workload is where the workload listens.
func (i *Inbound) Workload(n *Networking) (address string, port uint32) {
	address, port = i.ServiceAddress, i.ServicePort
	if address == "" {
		address = i.ListenAddress(n)
	}
	if port == 0 {
		port = i.Port
	}
	return address, port
}

// Service is the inbound's value of kuma.io/service, or "".
func (i *Inbound) Service() string { return i.Tags[TagService] }

// EffectiveProtocol is what the workload speaks: the field, else the tag, else
// "tcp".
func (i *Inbound) EffectiveProtocol() string {
	if i.Protocol != "" {
		return i.Protocol
	}
	if p := i.Tags[TagProtocol]; p != "" {
		return p
	}
	return "tcp"
}

// Section is the inbound's name, or its port as text.
func (i *Inbound) Section() string {
	if i.Name != "" {
		return i.Name
	}
	return strconv.Itoa(int(i.Port))
}

// IsReady reports whether the inbound receives traffic.
func (i *Inbound) IsReady() bool {
	switch i.State {
	case NotReady, Ignored:
		return false
	case Ready:
		return true
	}
	return i.Health == nil || i.Health.Ready
}

// ReachAddress is where other proxies reach this inbound.
func (i *Inbound) ReachAddress(n *Networking) string {
	if n.AdvertisedAddress != "" {
		return n.AdvertisedAddress
	}
	return i.ListenAddress(n)
}

// Services returns the distinct kuma.io/service values, sorted.
func (d *DataplaneSpec) Services() []string {
	var out []string
	for _, tags := range d.TagSets() {
		if s := tags[TagService]; s != "" {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// TagSets returns the tags of each inbound and of the gateway.
func (d *DataplaneSpec) TagSets() []map[string]string {
	if d.Networking == nil {
		return nil
	}
	var out []map[string]string
	for i := range d.Networking.Inbound {
		if t := d.Networking.Inbound[i].Tags; len(t) > 0 {
			out = append(out, t)
		}
	}
	if g := d.Networking.Gateway; g != nil && len(g.Tags) > 0 {
		out = append(out, g.Tags)
	}
	return out
}

// Tags returns every distinct value of every tag, values sorted.
func (d *DataplaneSpec) Tags() map[string][]string {
	out := map[string][]string{}
	for _, tags := range d.TagSets() {
		for k, v := range tags {
			out[k] = append(out[k], v)
		}
	}
	for k, v := range out {
		slices.Sort(v)
		out[k] = slices.Compact(v)
	}
	return out
}

var hostName = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?)*\.?$`)

// MaxInbounds and MaxOutbounds bound one Dataplane, so that one object can't
// take the control plane's memory.
const (
	MaxInbounds  = 1000
	MaxOutbounds = 10000
)

func checkDataplane(d *DataplaneSpec) (bad []errs.Field) {
	n := d.Networking
	if n == nil {
		return []errs.Field{{Path: "networking", Message: "must be defined"}}
	}
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	checkHost := func(path, a string) {
		if ip, err := netip.ParseAddr(a); err == nil {
			if ip.IsUnspecified() {
				add(path, "must not be 0.0.0.0 or ::")
			}
		} else if len(a) > 253 || !hostName.MatchString(a) {
			add(path, "address has to be valid IP address or domain name")
		}
	}
	if n.Address == "" {
		add("networking.address", "address can't be empty")
	} else {
		checkHost("networking.address", n.Address)
	}
	if n.AdvertisedAddress != "" {
		checkHost("networking.advertisedAddress", n.AdvertisedAddress)
	}
	switch {
	case n.Gateway != nil:
		if len(n.Inbound) > 0 {
			add("networking", "inbound cannot be defined for gateway")
		}
		if n.Gateway.Type == BuiltIn {
			add("networking.gateway.type", "BUILTIN gateways are not part of this version; use DELEGATED")
		}
		if len(n.Gateway.Tags) > 0 && n.Gateway.Tags[TagService] == "" {
			add("networking.gateway.tags", "mandatory tag %q is missing", TagService)
		}
		if p := n.Gateway.Tags[TagProtocol]; p != "" && p != "tcp" {
			add(fmt.Sprintf("networking.gateway.tags[%q]", TagProtocol), "other values than TCP are not allowed")
		}
		bad = append(bad, checkTags("networking.gateway.tags", n.Gateway.Tags, false)...)
	case len(n.Inbound) == 0 && len(n.Outbound) == 0:
		add("networking", "has to contain at least one inbound interface or gateway")
	}
	if len(n.Inbound) > MaxInbounds {
		add("networking.inbound", "has %d entries, the limit is %d", len(n.Inbound), MaxInbounds)
		return bad
	}
	if len(n.Outbound) > MaxOutbounds {
		add("networking.outbound", "has %d entries, the limit is %d", len(n.Outbound), MaxOutbounds)
		return bad
	}
	listens := map[string]string{}
	sections := map[string]bool{}
	for i := range n.Inbound {
		at := fmt.Sprintf("networking.inbound[%d]", i)
		in := &n.Inbound[i]
		bad = append(bad, checkInbound(at, in, n)...)
		where := in.ListenAddress(n) + "|" + strconv.Itoa(int(in.Port))
		if other, dup := listens[where]; dup {
			add(at+".port", "listens where %s does", other)
		}
		listens[where] = at
		if in.Name != "" {
			if sections[in.Name] {
				add(at+".name", "%q is already used by another inbound", in.Name)
			}
			sections[in.Name] = true
		}
	}
	for i := range n.Outbound {
		at := fmt.Sprintf("networking.outbound[%d]", i)
		o := &n.Outbound[i]
		bad = append(bad, checkOutbound(at, o)...)
		where := o.ListenAddress() + "|" + strconv.Itoa(int(o.Port))
		if other, dup := listens[where]; dup {
			add(at+".port", "listens where %s does", other)
		}
		listens[where] = at
	}
	if d.Metrics != nil {
		bad = append(bad, checkMetrics("metrics", d.Metrics)...)
	}
	if t := n.TransparentProxying; t != nil {
		for _, p := range []struct {
			name string
			port uint32
		}{{"redirectPortInbound", t.RedirectPortInbound}, {"redirectPortOutbound", t.RedirectPortOutbound}} {
			if p.port > 65535 {
				add("networking.transparentProxing."+p.name, "port must be in the range [0, 65535]")
			}
		}
	}
	return bad
}

func checkInbound(at string, in *Inbound, n *Networking) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: at + path, Message: fmt.Sprintf(format, args...)})
	}
	if in.Port < 1 || in.Port > 65535 {
		add(".port", "port must be in the range [1, 65535]")
	}
	if in.ServicePort > 65535 {
		add(".servicePort", "servicePort must be in the range [0, 65535]")
	}
	for _, a := range []struct{ name, value string }{{"address", in.Address}, {"serviceAddress", in.ServiceAddress}} {
		if a.value == "" {
			continue
		}
		if ip, err := netip.ParseAddr(a.value); err != nil {
			add("."+a.name, "%s has to be valid IP address", a.name)
		} else if ip.IsUnspecified() && a.name == "serviceAddress" {
			add("."+a.name, "must not be 0.0.0.0 or ::")
		}
	}
	if in.ServiceAddress != "" && in.ServiceAddress == in.ListenAddress(n) {
		if _, p := in.Workload(n); p == in.Port {
			add(".serviceAddress", "serviceAddress and servicePort has to differ from address and port")
		}
	}
	if len(in.Tags) > 0 && in.Tags[TagService] == "" {
		add(".tags", "mandatory tag %q is missing", TagService)
	}
	allowed := Protocols()
	if p, ok := in.Tags[TagProtocol]; ok && !slices.Contains(allowed, p) {
		add(fmt.Sprintf(".tags[%q]", TagProtocol), "tag %q has an invalid value %q. Allowed values: %s", TagProtocol, p, strings.Join(allowed, ", "))
	}
	if in.Protocol != "" && !slices.Contains(allowed, in.Protocol) {
		add(".protocol", "protocol has an invalid value %q. Allowed values: %s", in.Protocol, strings.Join(allowed, ", "))
	}
	bad = append(bad, checkTags(at+".tags", in.Tags, false)...)
	if in.Name != "" && !dnsLabel.MatchString(in.Name) {
		add(".name", "must be a lower case DNS label of at most 63 characters")
	}
	if p := in.ServiceProbe; p != nil {
		for _, d := range []struct {
			name string
			v    *resource.ProtoDuration
		}{{"interval", p.Interval}, {"timeout", p.Timeout}} {
			if d.v != nil && d.v.Duration <= 0 {
				add(".serviceProbe."+d.name, "must have a positive value")
			}
		}
		for _, u := range []struct {
			name string
			v    *uint32
		}{{"unhealthyThreshold", p.UnhealthyThreshold}, {"healthyThreshold", p.HealthyThreshold}} {
			if u.v != nil && *u.v == 0 {
				add(".serviceProbe."+u.name, "must have a positive value")
			}
		}
	}
	return bad
}

// ListenAddress is where the proxy listens for its workload.
func (o *Outbound) ListenAddress() string {
	if o.Address != "" {
		return o.Address
	}
	return "127.0.0.1"
}

// Service is the outbound's value of kuma.io/service, or "".
func (o *Outbound) Service() string { return o.Tags[TagService] }

func checkOutbound(at string, o *Outbound) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: at + path, Message: fmt.Sprintf(format, args...)})
	}
	if o.Port < 1 || o.Port > 65535 {
		add(".port", "port must be in the range [1, 65535]")
	}
	if o.Address != "" {
		if _, err := netip.ParseAddr(o.Address); err != nil {
			add(".address", "address has to be valid IP address")
		}
	}
	switch {
	case o.BackendRef != nil && len(o.Tags) > 0:
		add("", "both backendRef and tags are defined; only one of them may be")
	case o.BackendRef != nil:
		r := o.BackendRef
		if r.Kind != "MeshService" {
			add(".backendRef.kind", "%s", refusedKind(r.Kind))
		}
		if (r.Name == "") == (len(r.Labels) == 0) {
			add(".backendRef", "exactly one of name and labels must be defined")
		}
		if r.Port < 1 || r.Port > 65535 {
			add(".backendRef.port", "port must be in the range [1, 65535]")
		}
	case o.Tags[TagService] == "":
		add(".tags", "mandatory tag %q is missing", TagService)
	}
	return append(bad, checkTags(at+".tags", o.Tags, false)...)
}

// refusedKind says that an outbound can't lead to a kind.
func refusedKind(kind string) string {
	if kind == "" {
		return "cannot be empty. Available values are: MeshService"
	}
	return fmt.Sprintf("invalid value %q. Available values are: MeshService", kind)
}

// Admitted reports whether the mesh's constraints let the Dataplane in; if not,
// reason says which rule stands against it.
func (m *MeshSpec) Admitted(mesh string, d *DataplaneSpec) (reason string, ok bool) {
	if m.Constraints == nil || m.Constraints.DataplaneProxy == nil {
		return "", true
	}
	c := m.Constraints.DataplaneProxy
	for _, tags := range d.TagSets() {
		for _, r := range c.Restrictions {
			if MatchTags(r.Tags, tags) {
				return fmt.Sprintf("dataplane cannot be a member of mesh %q because its tags matches restricted tags %q", mesh, FormatTags(r.Tags)), false
			}
		}
		if len(c.Requirements) > 0 && !slices.ContainsFunc(c.Requirements, func(r TagRule) bool { return MatchTags(r.Tags, tags) }) {
			return fmt.Sprintf("dataplane cannot be a member of mesh %q because its tags %q does not fulfill any requirements defined on the Mesh", mesh, FormatTags(tags)), false
		}
	}
	return "", true
}

// Clone returns a copy whose inbounds may be changed.
func (d *DataplaneSpec) Clone() *DataplaneSpec {
	c := *d
	if d.Networking != nil {
		n := *d.Networking
		n.Inbound = slices.Clone(n.Inbound)
		for i := range n.Inbound {
			n.Inbound[i].Tags = maps.Clone(n.Inbound[i].Tags)
		}
		if n.Gateway != nil {
			g := *n.Gateway
			g.Tags = maps.Clone(g.Tags)
			n.Gateway = &g
		}
		c.Networking = &n
	}
	return &c
}
