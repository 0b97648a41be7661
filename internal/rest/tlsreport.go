package rest

import (
	"context"
	"net/http"
	"time"

	"kuma/internal/auth"
	"kuma/internal/errs"
)

// TLSReporter says how every link of the mesh is encrypted and authenticated.
// A mesh narrows the proxies down to its own; empty means all. Errors are
// NotFound for a mesh that is not there.
type TLSReporter interface {
	TLSReport(ctx context.Context, mesh string) (TLSReport, error)
}

// TLSReport is the answer of GET /tls-report: what is connected to this
// instance of the control plane now, and what is not as it should be.
type TLSReport struct {
	// Time is when the report was made.
	Time time.Time `json:"time"`
	// Instance names the control plane's process that made it.
	Instance string `json:"instance"`
	// Store is where resources are kept: "file" or "memory", to which no network
	// leads, or "postgres".
	Store string `json:"store"`
	// Database are the connections to the store's database that are open, those
	// that are alike together; absent where the store is none.
	Database []TLSDatabase `json:"database,omitempty"`
	// Servers are this instance's own ports.
	Servers []TLSServer `json:"servers"`
	// Links are the connections to them that are open, at most 20,000.
	Links []TLSLink `json:"links"`
	// LinksLeftOut is how many there are beyond.
	LinksLeftOut int `json:"linksLeftOut"`
	// Envoys are connections between proxies, as the one that accepted them
	// counts them. At most 50 proxies are asked.
	Envoys []TLSEnvoy `json:"envoys"`
	// EnvoysLeftOut is how many proxies were not asked.
	EnvoysLeftOut int `json:"envoysLeftOut"`
	// Certificates are those that this instance shows, signs with or trusts.
	Certificates []TLSCertificate `json:"certificates"`
	// Findings are what is not as it should be, the gravest first.
	Findings []TLSFinding `json:"findings"`
}

// TLSServer is a port of this instance.
type TLSServer struct {
	// Name is "dp-server", "api-http", "api-https", "diagnostics",
	// "monitoring-assignment-server", "admin-server" or "other".
	Name string `json:"name"`
	// Address is where it listens.
	Address string `json:"address"`
	// TLS says whether it has TLS.
	TLS bool `json:"tls"`
	// MinVersion is the oldest version that it takes; empty without TLS.
	MinVersion string `json:"minVersion,omitempty"`
	// ClientCertificates is "none", "asked for" or "required"; empty without TLS.
	ClientCertificates string `json:"clientCertificates,omitempty"`
	// Certificate is the one that it shows now.
	Certificate *TLSCertificate `json:"certificate,omitempty"`
}

// TLSDatabase are connections to the store's database that are alike.
type TLSDatabase struct {
	// Address is the server's host and port.
	Address string `json:"address"`
	// Name is the database's.
	Name string `json:"name"`
	// User is who this instance is there.
	User string `json:"user"`
	// Connections is how many there are.
	Connections int `json:"connections"`
	// Version is the protocol's, such as "TLS 1.3"; empty without TLS.
	Version string `json:"version"`
	// Group is that of the key exchange, such as "X25519MLKEM768".
	Group string `json:"group"`
	// Cipher is the cipher suite, by its name in TLS's registry.
	Cipher string `json:"cipher"`
	// Certificate is what the server showed.
	Certificate *TLSCertificate `json:"certificate,omitempty"`
	// VerifiedBy says by what this instance knows the server.
	VerifiedBy string `json:"verifiedBy"`
}

// TLSLink is one open connection.
type TLSLink struct {
	// Kind is the sort of peer: "proxy", "user", "prometheus", "diagnostics" or
	// "unknown".
	Kind string `json:"kind"`
	// Peer is the proxy as mesh/name, the user who sent the last request, or
	// empty where it did not say.
	Peer string `json:"peer"`
	// Mesh is a proxy's.
	Mesh string `json:"mesh,omitempty"`
	// Streams are a proxy's: "ads", "hds", "link".
	Streams []string `json:"streams,omitempty"`
	// Server is the name of the port.
	Server string `json:"server"`
	// Remote is the address and port that the connection comes from.
	Remote string `json:"remote"`
	// Since is when it came.
	Since time.Time `json:"since"`
	// Version is the protocol's, such as "TLS 1.3"; empty without TLS.
	Version string `json:"version"`
	// Group is that of the key exchange, such as "X25519MLKEM768".
	Group string `json:"group"`
	// Cipher is the cipher suite, by its name in TLS's registry.
	Cipher string `json:"cipher"`
	// Certificate is what this instance showed.
	Certificate *TLSCertificate `json:"certificate,omitempty"`
	// ClientCertificate is what the peer showed.
	ClientCertificate *TLSCertificate `json:"clientCertificate,omitempty"`
	// VerifiedBy says how this instance knows the peer.
	VerifiedBy string `json:"verifiedBy"`
}

// TLSEnvoy is what one proxy counted of the connections that other proxies made
// to it, since its start.
type TLSEnvoy struct {
	// Mesh is the proxy's mesh.
	Mesh string `json:"mesh"`
	// Proxy is the proxy's name.
	Proxy string `json:"proxy"`
	// Certificate is the one that it shows.
	Certificate *TLSCertificate `json:"certificate,omitempty"`
	// VerifiedBy names the authority on which both sides rely.
	VerifiedBy string `json:"verifiedBy"`
	// Versions counts connections by protocol, such as "TLSv1.3".
	Versions map[string]uint64 `json:"versions"`
	// Groups counts them by the key exchange's group, such as "X25519MLKEM768".
	Groups map[string]uint64 `json:"groups"`
	// Ciphers counts them by cipher suite.
	Ciphers map[string]uint64 `json:"ciphers"`
	// Refused counts connections that were refused because of the peer's
	// certificate.
	Refused uint64 `json:"refused"`
	// Error says why the proxy could not be asked; empty where it was.
	Error string `json:"error,omitempty"`
}

// TLSCertificate is a certificate.
type TLSCertificate struct {
	// Name says which one of the control plane's own it is; empty elsewhere.
	Name string `json:"name,omitempty"`
	// File is where it was read from; empty where it was not.
	File string `json:"file,omitempty"`
	// Subject is its subject, or its first name where it has none.
	Subject string `json:"subject"`
	// Issuer is who signed it; empty where that is not known.
	Issuer string `json:"issuer,omitempty"`
	// NotAfter is its end.
	NotAfter time.Time `json:"notAfter"`
}

// How grave a finding is.
const (
	// SeverityCritical: something is readable or can be taken over by others.
	SeverityCritical = "critical"
	// SeverityWarning: something is weaker than it could be, or soon ends.
	SeverityWarning = "warning"
	// SeverityNote: something that can't be known, or that others have to mend.
	SeverityNote = "note"
)

// TLSFinding is something that is not as it should be.
type TLSFinding struct {
	// Severity is "critical", "warning" or "note".
	Severity string `json:"severity"`
	// Message says what it is.
	Message string `json:"message"`
	// About names whom it concerns, the first ten.
	About []string `json:"about"`
	// Count is how many it concerns.
	Count int `json:"count"`
	// Mend says what to do.
	Mend string `json:"mend"`
}

// tlsReport declares the TLS report.
func (s *Server) tlsReport() {
	s.add(http.MethodGet, "/tls-report", does(auth.ViewTLS, "view the TLS report"), s.showTLSReport)
}

func (s *Server) showTLSReport(w http.ResponseWriter, r *request) error {
	const title = "Could not make the TLS report"
	if s.cfg.TLSReporter == nil {
		return during(title, errs.New(errs.Unavailable, "this control plane makes no TLS report"))
	}
	report, err := s.cfg.TLSReporter.TLSReport(r.Context(), r.URL.Query().Get("mesh"))
	if err != nil {
		return during(title, err)
	}
	s.answer(w, http.StatusOK, report)
	return nil
}
