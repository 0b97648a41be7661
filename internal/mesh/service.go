package mesh

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"kuma/internal/errs"
	"kuma/internal/resource"
)

// MeshServiceSpec is a service of the mesh: which proxies stand behind it, on
// which ports, under which identities.
type MeshServiceSpec struct {
	// Selector says which proxies stand behind the service.
	Selector ServiceSelector `json:"selector,omitzero"`
	// Ports are the service's ports.
	Ports []ServicePort `json:"ports,omitempty"`
	// Identities are those that its proxies may show. The system keeps them.
	Identities []ServiceIdentity `json:"identities,omitempty"`
	// State says whether any proxy is ready. The system keeps it.
	State ServiceState `json:"state,omitempty"`
}

// ServiceSelector names proxies in one of three ways.
type ServiceSelector struct {
	// DataplaneTags selects inbounds that have all these tags.
	DataplaneTags map[string]string `json:"dataplaneTags,omitempty"`
	// DataplaneRef selects one proxy.
	DataplaneRef *DataplaneRef `json:"dataplaneRef,omitempty"`
	// DataplaneLabels selects proxies by labels.
	DataplaneLabels *LabelSelector `json:"dataplaneLabels,omitempty"`
}

// DataplaneRef names one proxy.
type DataplaneRef struct {
	Name string `json:"name,omitempty"`
}

// LabelSelector selects by labels.
type LabelSelector struct {
	MatchLabels map[string]string `json:"matchLabels,omitempty"`
}

// ServicePort is a port of a service.
type ServicePort struct {
	// Name names the port; empty means its number.
	Name string `json:"name,omitempty"`
	// Port is the service's port, 1 to 65535.
	Port uint32 `json:"port"`
	// TargetPort is the inbound's port, as a number, or its name; the default
	// is Port.
	TargetPort *IntOrString `json:"targetPort,omitempty"`
	// AppProtocol is what the service speaks; the default is tcp.
	AppProtocol string `json:"appProtocol,omitempty"`
}

// Section is the port's name, or its number as text.
func (p *ServicePort) Section() string {
	if p.Name != "" {
		return p.Name
	}
	return strconv.Itoa(int(p.Port))
}

// Protocol is what the service speaks; tcp by default.
func (p *ServicePort) Protocol() string {
	if p.AppProtocol == "" {
		return "tcp"
	}
	return p.AppProtocol
}

// Target reports whether the inbound stands behind this port.
func (p *ServicePort) Target(in *Inbound) bool {
	switch {
	case p.TargetPort == nil:
		return in.Port == p.Port
	case p.TargetPort.Name != "":
		return in.Name == p.TargetPort.Name
	default:
		return in.Port == p.TargetPort.Number
	}
}

// IntOrString is a port's number or its name.
type IntOrString struct {
	Number uint32
	Name   string
}

// MarshalJSON writes whichever is set.
func (v IntOrString) MarshalJSON() ([]byte, error) {
	if v.Name != "" {
		return json.Marshal(v.Name)
	}
	return json.Marshal(v.Number)
}

// UnmarshalJSON reads either.
func (v *IntOrString) UnmarshalJSON(b []byte) error {
	*v = IntOrString{}
	if strings.HasPrefix(string(b), `"`) {
		return json.Unmarshal(b, &v.Name)
	}
	if err := json.Unmarshal(b, &v.Number); err != nil {
		return fmt.Errorf("must be a port's number or its name")
	}
	return nil
}

// ServiceIdentity is an identity that a service's proxies may show.
type ServiceIdentity struct {
	Type  ServiceIdentityType `json:"type"`
	Value string              `json:"value"`
}

// ServiceIdentityType says how to read an identity's value.
type ServiceIdentityType string

// Types of service identities.
const (
	// IdentityTag: the value is a kuma.io/service tag.
	IdentityTag ServiceIdentityType = "ServiceTag"
	// IdentitySPIFFE: the value is a SPIFFE id.
	IdentitySPIFFE ServiceIdentityType = "SpiffeID"
)

// Values lists the types.
func (ServiceIdentityType) Values() []string {
	return []string{string(IdentityTag), string(IdentitySPIFFE)}
}

// ServiceState says whether any proxy is ready.
type ServiceState string

// States of a service.
const (
	ServiceAvailable   ServiceState = "Available"
	ServiceUnavailable ServiceState = "Unavailable"
)

// Values lists the states.
func (ServiceState) Values() []string {
	return []string{string(ServiceAvailable), string(ServiceUnavailable)}
}

// MeshServiceStatus is what the system knows of a service.
type MeshServiceStatus struct {
	TLS              *ServiceTLS     `json:"tls,omitempty"`
	DataplaneProxies *ServiceProxies `json:"dataplaneProxies,omitempty"`
}

// ServiceTLS says whether all proxies of the service have certificates.
type ServiceTLS struct {
	// Status is Ready or NotReady; once Ready it stays so.
	Status string `json:"status"`
}

// ServiceProxies counts the proxies behind a service.
type ServiceProxies struct {
	Connected int `json:"connected"`
	Healthy   int `json:"healthy"`
	Total     int `json:"total"`
}

// MeshServices is the kind MeshService.
var MeshServices = resource.Define(resource.Kind{
	Name: "MeshService", Plural: "meshservices", Short: "msvc", Scope: resource.Mesh, Shape: resource.Spec,
	Sync:      resource.ZoneToGlobal | resource.GlobalToZone,
	NewStatus: func() any { return new(MeshServiceStatus) },
}, checkMeshService)

// MeshService is a MeshService resource.
type MeshService = resource.Object[MeshServiceSpec]

func checkMeshService(s *MeshServiceSpec) (bad []errs.Field) {
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	set := 0
	if s.Selector.DataplaneTags != nil {
		set++
		bad = append(bad, checkTags("spec.selector.dataplaneTags", s.Selector.DataplaneTags, false)...)
	}
	if s.Selector.DataplaneRef != nil {
		set++
	}
	if s.Selector.DataplaneLabels != nil {
		set++
	}
	if set > 1 {
		add("spec.selector", "must have only one type defined")
	}
	if len(s.Ports) > MaxInbounds {
		add("spec.ports", "has %d entries, the limit is %d", len(s.Ports), MaxInbounds)
		return bad
	}
	ports := map[uint32]bool{}
	names := map[string]bool{}
	for i := range s.Ports {
		p := &s.Ports[i]
		at := fmt.Sprintf("spec.ports[%d]", i)
		if p.Port < 1 || p.Port > 65535 {
			add(at+".port", "port must be in the range [1, 65535]")
		}
		if ports[p.Port] {
			add(at+".port", "%d is already used by another port", p.Port)
		}
		ports[p.Port] = true
		if names[p.Section()] {
			add(at+".name", "%q is already used by another port", p.Section())
		}
		names[p.Section()] = true
		if p.Name != "" && !dnsLabel.MatchString(p.Name) {
			add(at+".name", "must be a lower case DNS label of at most 63 characters")
		}
		if t := p.TargetPort; t != nil && t.Name == "" && (t.Number < 1 || t.Number > 65535) {
			add(at+".targetPort", "port must be in the range [1, 65535]")
		}
		if p.AppProtocol != "" && !slices.Contains(Protocols(), p.AppProtocol) {
			add(at+".appProtocol", "%q is not supported. Allowed values: %s", p.AppProtocol, strings.Join(Protocols(), ", "))
		}
	}
	return bad
}

// Selects reports whether the inbound of a Dataplane with these labels stands
// behind the service, on any port.
func (s *MeshServiceSpec) Selects(name string, labels map[string]string, in *Inbound) bool {
	switch sel := s.Selector; {
	case sel.DataplaneRef != nil:
		return sel.DataplaneRef.Name == name
	case sel.DataplaneLabels != nil:
		return MatchTags(sel.DataplaneLabels.MatchLabels, labels)
	case len(sel.DataplaneTags) > 0:
		return MatchTags(sel.DataplaneTags, in.Tags)
	}
	return false
}
