package mesh

import (
	"encoding/json"
	"time"

	"kuma/internal/resource"
)

// DataplaneInsightSpec is what is known of a proxy at run time: when it was
// connected, what it accepted and refused, and its certificate.
type DataplaneInsightSpec struct {
	Subscriptions []Subscription `json:"subscriptions,omitempty"`
	// MTLS is about the proxy's certificate.
	MTLS *MTLSInsight `json:"mTLS,omitempty"`
	// Metadata is the node metadata that Envoy sent, without secrets.
	Metadata json.RawMessage `json:"metadata,omitempty"`
	// Rejections are the configurations that Envoy refuses now, with its words.
	Rejections []Rejection `json:"rejections,omitempty"`
	// Readiness is what the proxy says of itself over its link.
	Readiness *ReadinessInsight `json:"readiness,omitempty"`
	// Trust is which authorities of the control plane the proxy has taken, where
	// several control planes share one.
	Trust *TrustInsight `json:"trust,omitempty"`
}

// TrustInsight is which authorities of the control plane a proxy has taken.
type TrustInsight struct {
	// Revision names them, in decimal.
	Revision string `json:"revision"`
	// Error is why it could not take them, or keep them.
	Error string `json:"error,omitempty"`
}

// Rejection is a configuration that Envoy refused.
type Rejection struct {
	TypeURL  string    `json:"typeUrl"`
	Resource string    `json:"resource,omitempty"`
	Message  string    `json:"message"`
	Time     time.Time `json:"time"`
}

// ReadinessInsight is what the proxy says of itself.
type ReadinessInsight struct {
	Ready  bool   `json:"ready"`
	Reason string `json:"reason,omitempty"`
}

// Subscription is one ADS stream.
type Subscription struct {
	ID                     string             `json:"id,omitempty"`
	ControlPlaneInstanceID string             `json:"controlPlaneInstanceId,omitempty"`
	ConnectTime            *time.Time         `json:"connectTime,omitempty"`
	DisconnectTime         *time.Time         `json:"disconnectTime,omitempty"`
	Status                 SubscriptionStatus `json:"status"`
	Version                *Version           `json:"version,omitempty"`
	Generation             uint32             `json:"generation,omitempty"`
}

// SubscriptionStatus counts responses, by type of resource.
type SubscriptionStatus struct {
	LastUpdateTime *time.Time `json:"lastUpdateTime,omitempty"`
	Total          Responses  `json:"total"`
	CDS            Responses  `json:"cds"`
	EDS            Responses  `json:"eds"`
	LDS            Responses  `json:"lds"`
	RDS            Responses  `json:"rds"`
}

// Responses counts what was sent and how it was received.
type Responses struct {
	Sent         resource.Uint64 `json:"responsesSent,omitempty"`
	Acknowledged resource.Uint64 `json:"responsesAcknowledged,omitempty"`
	Rejected     resource.Uint64 `json:"responsesRejected,omitempty"`
}

// Version is which programs a proxy runs.
type Version struct {
	KumaDP *KumaDPVersion `json:"kumaDp,omitempty"`
	Envoy  *EnvoyVersion  `json:"envoy,omitempty"`
	// Dependencies maps further programs to versions.
	Dependencies map[string]string `json:"dependencies,omitempty"`
}

// KumaDPVersion is kuma-dp's version.
type KumaDPVersion struct {
	Version   string `json:"version,omitempty"`
	GitTag    string `json:"gitTag,omitempty"`
	GitCommit string `json:"gitCommit,omitempty"`
	BuildDate string `json:"buildDate,omitempty"`
	// KumaCPCompatible is the control plane's judgement; false is said, since
	// readers take what is absent as true.
	KumaCPCompatible *bool `json:"kumaCpCompatible,omitempty"`
}

// EnvoyVersion is Envoy's version.
type EnvoyVersion struct {
	Version          string `json:"version,omitempty"`
	Build            string `json:"build,omitempty"`
	KumaDPCompatible bool   `json:"kumaDpCompatible,omitempty"`
}

// MTLSInsight is about a proxy's certificate.
type MTLSInsight struct {
	CertificateExpirationTime   *time.Time `json:"certificateExpirationTime,omitempty"`
	LastCertificateRegeneration *time.Time `json:"lastCertificateRegeneration,omitempty"`
	CertificateRegenerations    uint32     `json:"certificateRegenerations,omitempty"`
	IssuedBackend               string     `json:"issuedBackend,omitempty"`
	SupportedBackends           []string   `json:"supportedBackends,omitempty"`
}

// Online reports whether some stream of the proxy is open.
func (d *DataplaneInsightSpec) Online() bool {
	for i := range d.Subscriptions {
		if s := &d.Subscriptions[i]; s.ConnectTime != nil && s.DisconnectTime == nil {
			return true
		}
	}
	return false
}

// Left is when the proxy's last stream ended; zero while one is open, and for a
// proxy that has never had any.
func (d *DataplaneInsightSpec) Left() time.Time {
	var last time.Time
	for i := range d.Subscriptions {
		s := &d.Subscriptions[i]
		switch {
		case s.ConnectTime == nil:
		case s.DisconnectTime == nil:
			return time.Time{}
		case s.DisconnectTime.After(last):
			last = *s.DisconnectTime
		}
	}
	return last
}

// DataplaneInsights is the kind DataplaneInsight.
var DataplaneInsights = resource.Define[DataplaneInsightSpec](resource.Kind{
	Name: "DataplaneInsight", Plural: "dataplane-insights", Singular: "dataplane-insight", Scope: resource.Mesh, Shape: resource.Flat,
	Sync: resource.ZoneToGlobal, ReadOnly: true,
}, nil)
