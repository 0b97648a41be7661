package bootstrap

import (
	"encoding/json"
)

// Request is what kuma-dp sends to POST /bootstrap (contract).
type Request struct {
	Mesh               string            `json:"mesh"`
	Name               string            `json:"name"`
	ProxyType          string            `json:"proxyType"`
	DataplaneToken     string            `json:"dataplaneToken"`
	DataplaneTokenPath string            `json:"dataplaneTokenPath"`
	DataplaneResource  string            `json:"dataplaneResource"`
	Version            json.RawMessage   `json:"version"`
	CACert             string            `json:"caCert"`
	DynamicMetadata    map[string]string `json:"dynamicMetadata"`
	DNSPort            uint32            `json:"dnsPort"`
	ReadinessPort      uint32            `json:"readinessPort"`
	// AppProbeProxyDisabled is true where the probe proxy is enabled: the
	// contract's historic inversion.
	AppProbeProxyDisabled bool     `json:"appProbeProxyDisabled"`
	OperatingSystem       string   `json:"operatingSystem"`
	Features              []string `json:"features"`
	Workdir               string   `json:"workdir"`
	MetricsResources      struct {
		CertPath string `json:"certPath"`
		KeyPath  string `json:"keyPath"`
	} `json:"metricsResources"`
	SystemCAPath string `json:"systemCaPath"`
	IPv6Enabled  bool   `json:"ipv6Enabled"`
	// Instance is a random id that our kuma-dp makes when it starts.
	Instance string `json:"instance"`
}

// Response is the JSON answer.
type Response struct {
	// Bootstrap is Envoy's configuration, YAML; base64 in JSON.
	Bootstrap     []byte        `json:"bootstrap"`
	Configuration Configuration `json:"kumaSidecarConfiguration"`
	// Trust is ours: the authorities by which Envoy is to verify the control
	// plane, PEM, for a kuma-dp that writes them into the file which Envoy watches.
	Trust []byte `json:"trust,omitempty"`
}

// Configuration is what kuma-dp needs to know for itself.
type Configuration struct {
	Networking struct {
		CorefileTemplate []byte `json:"corefileTemplate"`
		Address          string `json:"address"`
	} `json:"networking"`
	Metrics struct {
		Aggregate []Aggregate `json:"aggregate"`
	} `json:"metrics"`
}

// Aggregate is an endpoint of the workload whose metrics kuma-dp serves with the
// proxy's, because Mesh.metrics says so.
type Aggregate struct {
	Name string `json:"name"`
	// Address may be empty: then it is at the proxy's own.
	Address string `json:"address"`
	Port    uint32 `json:"port"`
	Path    string `json:"path"`
}

// FeatureLink is announced by a kuma-dp that opens a link and keeps its own
// keys.
const FeatureLink = "feature-link"

// FeatureTrustFile is announced by a kuma-dp that writes the authorities by which
// Envoy verifies the control plane into a file of its working directory.
const FeatureTrustFile = "feature-trust-file"

// SDSCluster is the static cluster that leads to kuma-dp's own secrets.
const SDSCluster = "kuma:sds"
