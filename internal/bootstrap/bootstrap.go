// Package bootstrap answers kuma-dp's first question: with which configuration
// should my Envoy start?
package bootstrap

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// MaxRequest is the largest request that is read, in bytes.
const MaxRequest = 2 << 20

// Credentials verifies proxies' tokens.
type Credentials interface {
	// Required tells whether proxies must present a token at all.
	Required() bool
	// Verify checks a token for the proxy of this mesh and name, whatever else
	// the proxy says of itself. Errors are Unauthenticated or Denied and say why.
	Verify(ctx context.Context, token, mesh, name string) (Credential, error)
}

// Credential is a token that was verified.
type Credential interface {
	// Covers is an error of kind Denied where the token's holder may not be this
	// Dataplane.
	Covers(dp mesh.Dataplane) error
}

// Config is what a Server needs.
type Config struct {
	// Store is asked directly: a mesh that was just made counts at once.
	Store       store.Store
	Credentials Credentials
	// CA is the anchor of the control plane's own certificate, PEM; Hosts are
	// the names and addresses that the certificate is for.
	CA    func() []byte
	Hosts func() []string
	// XDSHost and XDSPort override where Envoy connects to; empty and 0 mean
	// the host that kuma-dp used, and Port.
	XDSHost string
	XDSPort uint32
	// Port is that of the server which proxies connect to.
	Port uint32
	// AdminAddress, AdminPort and AdminUnixSocket place Envoy's admin interface.
	AdminAddress       string
	AdminPort          uint32
	AdminUnixSocket    bool
	AdminAccessLogPath string
	ReadinessPort      uint32
	ConnectTimeout     time.Duration
	// HDS lets Envoy open a stream for health checks.
	HDS bool
	// Lenient drops unknown fields of a Dataplane instead of refusing them.
	Lenient bool
	Log     *slog.Logger
}

// Server answers POST /bootstrap.
type Server struct{ cfg Config }

// New makes a server.
func New(cfg Config) *Server { return &Server{cfg} }

// refusal is an answer other than 200.
type refusal struct {
	status int
	text   string
}

func (r refusal) Error() string { return r.text }

func refuse(status int, format string, args ...any) error {
	return refusal{status, fmt.Sprintf(format, args...)}
}

// ServeHTTP answers one request. Refusals are plain text for kuma-dp's log.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "405: Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxRequest))
	if err != nil {
		http.Error(w, fmt.Sprintf("the request could not be read: it may have at most %d bytes", MaxRequest), http.StatusRequestEntityTooLarge)
		return
	}
	answer, err := s.answer(r.Context(), r.Host, body)
	if no, refused := errors.AsType[refusal](err); refused {
		s.cfg.Log.Info("bootstrap refused", "remote", r.RemoteAddr, "status", no.status, "reason", no.text)
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(no.status)
		_, _ = io.WriteString(w, no.text)
		return
	}
	if err != nil {
		s.cfg.Log.Error("bootstrap failed", "remote", r.RemoteAddr, "error", err)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	if !strings.Contains(r.Header.Get("Accept"), "application/json") {
		w.Header().Set("Content-Type", "text/x-yaml")
		_, _ = w.Write(answer.Bootstrap)
		return
	}
	raw, err := json.Marshal(answer)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(raw)
}

// answer is ServeHTTP without HTTP.
func (s *Server) answer(ctx context.Context, host string, body []byte) (*Response, error) {
	req := new(Request)
	if err := json.Unmarshal(body, req); err != nil {
		return nil, refuse(http.StatusBadRequest, "")
	}
	if req.ProxyType != "" && req.ProxyType != "dataplane" {
		return nil, refuse(http.StatusUnprocessableEntity, "proxyType: %q is not served by this version; use \"dataplane\"", req.ProxyType)
	}
	if s.cfg.Credentials.Required() && req.DataplaneToken == "" {
		return nil, refuse(http.StatusUnprocessableEntity, "Dataplane Token is required. Generate token using 'kumactl generate dataplane-token > /path/file' and provide it via --dataplane-token-file=/path/file argument to Kuma DP")
	}
	if req.Mesh == "" || req.Name == "" {
		return nil, refuse(http.StatusUnprocessableEntity, "mesh and name of the Dataplane must be given")
	}
	// Who has no token for this name learns nothing of what there is.
	var credential Credential
	if s.cfg.Credentials.Required() {
		var err error
		if credential, err = s.cfg.Credentials.Verify(ctx, req.DataplaneToken, req.Mesh, req.Name); err != nil {
			return nil, refused(err)
		}
	}
	host = hostOnly(host)
	if s.cfg.XDSHost != "" {
		host = s.cfg.XDSHost
	}
	ca, err := s.trust(host, req.CACert)
	if err != nil {
		return nil, err
	}
	dp, doc, err := s.dataplane(ctx, req)
	if err != nil {
		return nil, err
	}
	if credential != nil {
		if err := credential.Covers(dp); err != nil {
			return nil, refused(err)
		}
	}
	port := s.cfg.XDSPort
	if port == 0 {
		port = s.cfg.Port
	}
	p := params{req: req, dataplane: dp, resource: doc, host: host, port: port, ca: ca, cfg: &s.cfg}
	raw, err := render(p)
	if err != nil {
		return nil, err
	}
	res := &Response{Bootstrap: raw}
	if p.trustFile() {
		res.Trust = ca
	}
	if n := dp.Spec.Networking; n != nil {
		res.Configuration.Networking.Address = n.Address
	}
	m, err := s.cfg.Store.Get(ctx, mesh.Meshes.Key("", req.Mesh))
	if err != nil && !errs.Is(err, errs.NotFound) {
		return nil, err
	}
	if m != nil {
		if e, ok := mesh.Meshes.From(m).Spec.MetricsOf(dp.Spec); ok {
			for _, a := range e.Aggregate {
				res.Configuration.Metrics.Aggregate = append(res.Configuration.Metrics.Aggregate, Aggregate{a.Name, a.Address, a.Port, a.Path})
			}
		}
	}
	return res, nil
}

// refused is the answer to a token that does not do.
func refused(err error) error {
	switch errs.KindOf(err) {
	case errs.Unauthenticated:
		return refuse(http.StatusUnauthorized, "%v", err)
	case errs.Denied:
		return refuse(http.StatusForbidden, "%v", err)
	}
	return err
}

// hostOnly drops the port of a Host header.
func hostOnly(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return strings.Trim(host, "[]")
}

// trust returns the anchors by which Envoy verifies this control plane: those
// that kuma-dp was given, else our own.
func (s *Server) trust(host, given string) ([]byte, error) {
	hosts := s.cfg.Hosts()
	if !slices.ContainsFunc(hosts, func(h string) bool { return covers(h, host) }) {
		return nil, refuse(http.StatusBadRequest, `A data plane proxy is trying to connect to the control plane using %q address, but the certificate in the control plane has the following SANs %q. Either:
1) let the proxy use one of these names: kuma-dp --cp-address
2) give the control plane a certificate that has this name: KUMA_DP_SERVER_TLS_CERT_FILE and KUMA_DP_SERVER_TLS_KEY_FILE, or KUMA_GENERAL_TLS_CERT_FILE and KUMA_GENERAL_TLS_KEY_FILE
3) name the host that proxies should use instead: KUMA_BOOTSTRAP_SERVER_PARAMS_XDS_HOST`, host, hosts)
	}
	if given == "" {
		return s.cfg.CA(), nil
	}
	rest, found := []byte(given), false
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, refuse(http.StatusBadRequest, "the CA certificate given with --ca-cert-file or KUMA_CONTROL_PLANE_CA_CERT_FILE can't be parsed: %v", err)
		}
		if !cert.IsCA {
			return nil, refuse(http.StatusBadRequest, "A data plane proxy is trying to verify the control plane using the certificate %q which is not a certificate authority (basic constraint 'CA' is set to 'false'). Provide CA that was used to sign a certificate used in the control plane by using 'kuma-dp run --ca-cert-file=file' or via KUMA_CONTROL_PLANE_CA_CERT_FILE", cert.Subject.String())
		}
		found = true
	}
	if !found {
		return nil, refuse(http.StatusBadRequest, "the CA certificate given with --ca-cert-file or KUMA_CONTROL_PLANE_CA_CERT_FILE holds no PEM block of type CERTIFICATE")
	}
	return []byte(given), nil
}

// covers reports whether a certificate's name is for the host.
func covers(name, host string) bool {
	if strings.EqualFold(name, host) {
		return true
	}
	if suffix, wild := strings.CutPrefix(name, "*."); wild {
		_, rest, ok := strings.Cut(host, ".")
		return ok && strings.EqualFold(rest, suffix)
	}
	a, b := net.ParseIP(name), net.ParseIP(host)
	return a != nil && a.Equal(b)
}

// dataplane returns the Dataplane that the request is for: the one it carries,
// with its document as JSON, or the one that was created beforehand.
func (s *Server) dataplane(ctx context.Context, req *Request) (mesh.Dataplane, string, error) {
	none := mesh.Dataplane{}
	if req.DataplaneResource == "" {
		r, err := s.cfg.Store.Get(ctx, mesh.Dataplanes.Key(req.Mesh, req.Name))
		if errs.Is(err, errs.NotFound) {
			return none, "", refuse(http.StatusNotFound, "")
		}
		if err != nil {
			return none, "", err
		}
		return mesh.Dataplanes.From(r), "", nil
	}
	doc, err := yaml.YAMLToJSON([]byte(req.DataplaneResource))
	if err != nil {
		return none, "", refuse(http.StatusUnprocessableEntity, "the Dataplane is not valid YAML: %v", err)
	}
	r, err := resource.Decode(mesh.Dataplanes.Kind, doc, s.cfg.Lenient)
	if err != nil {
		return none, "", refuse(http.StatusUnprocessableEntity, "%v", err)
	}
	if r.Mesh == "" {
		r.Mesh = req.Mesh
	}
	if r.Mesh != req.Mesh || r.Name != req.Name {
		return none, "", refuse(http.StatusUnprocessableEntity, "the Dataplane is %q of mesh %q, but the request is for %q of mesh %q", r.Name, r.Mesh, req.Name, req.Mesh)
	}
	if bad := r.Kind.Check(r.Spec); len(bad) > 0 {
		return none, "", refuse(http.StatusUnprocessableEntity, "%v", errs.Fields(bad...))
	}
	m, err := s.cfg.Store.Get(ctx, mesh.Meshes.Key("", r.Mesh))
	if errs.Is(err, errs.NotFound) {
		return none, "", refuse(http.StatusUnprocessableEntity, "mesh: mesh %q does not exist", r.Mesh)
	}
	if err != nil {
		return none, "", err
	}
	dp := mesh.Dataplanes.From(r)
	if reason, ok := mesh.Meshes.From(m).Spec.Admitted(r.Mesh, dp.Spec); !ok {
		return none, "", refuse(http.StatusUnprocessableEntity, "%s", reason)
	}
	if n := dp.Spec.Networking; n.TransparentProxying != nil && len(n.Outbound) > 0 {
		return none, "", refuse(http.StatusUnprocessableEntity, "networking.outbound: should be empty since dataplane is in Transparent Proxying mode")
	}
	text, err := compact(doc)
	return dp, text, err
}
