package dp

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/proto/linkpb"
)

// realEnvoy is an Envoy to test with: the path in the variable ENVOY.
func realEnvoy(t *testing.T) string {
	t.Helper()
	p := os.Getenv("ENVOY")
	if p == "" {
		t.Skip("ENVOY names no Envoy")
	}
	return p
}

// tlsConfig is a first configuration for a real Envoy: one listener whose
// certificate comes from kuma-dp's own socket.
func tlsConfig(r bootstrapRequest, port uint32) string {
	return fmt.Sprintf(`
node: {id: default.web-1, cluster: web}
admin: {address: {pipe: {path: %[1]q, mode: 384}}}
static_resources:
  clusters:
  - name: kuma_sds
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: kuma_sds
      endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %[2]q}}}}]}]
  listeners:
  - name: inbound
    address: {socket_address: {address: 127.0.0.1, port_value: %[3]d}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_certificate_sds_secret_configs:
            - name: identity_cert:secret:default
              sds_config:
                resource_api_version: V3
                api_config_source:
                  api_type: DELTA_GRPC
                  transport_api_version: V3
                  grpc_services: [{envoy_grpc: {cluster_name: kuma_sds}}]
      filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: inbound
          route_config:
            virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 200, body: {inline_string: hello}}}]}]
          http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
`, filepath.Join(r.Workdir, "kuma-envoy-admin.sock"), filepath.Join(r.Workdir, "kuma-sds.sock"), port)
}

// HRD-30: Envoy's admin interface and the sockets beside it are for this user
// alone. A real Envoy gets its certificate over the local socket, serves TLS with it,
// and takes the next one without a restart.
func TestRealEnvoyServesIssuedCertificate(t *testing.T) {
	binary := realEnvoy(t)
	port := freePort(t)
	asked := make(chan time.Time, 8)
	p := &plane{config: func(r bootstrapRequest) string { return tlsConfig(r, port) }}
	p.serve = func(s *stream) error {
		if err := s.welcome(); err != nil {
			return err
		}
		if err := s.want("identity_cert:secret:default", "1"); err != nil {
			return err
		}
		if err := s.status(true); err != nil {
			return err
		}
		for {
			m, err := s.Recv()
			if err != nil {
				return err
			}
			switch m := m.GetMessage().(type) {
			case *linkpb.FromProxy_SigningRequest:
				asked <- time.Now()
				// The first certificate is due for renewal after a second.
				renew := time.Hour
				if len(asked) == 1 {
					renew = time.Second
				}
				if err := s.sign(m.SigningRequest, "spiffe://default/web", renew); err != nil {
					return err
				}
			case *linkpb.FromProxy_Leaving:
				if err := s.say(&linkpb.ToProxy{Message: &linkpb.ToProxy_LeaveNoted{LeaveNoted: &linkpb.LeaveNoted{}}}); err != nil {
					return err
				}
			}
		}
	}
	p.start(t)
	began := time.Now()
	r := launch(t, p, func(c *Config) { c.BinaryPath = binary; c.Concurrency = 1 })

	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.pem)
	seen := func() (serial string) {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}, DisableKeepAlives: true}, Timeout: patience}
		resp, err := client.Get(fmt.Sprintf("https://127.0.0.1:%d/", port))
		if err != nil {
			return ""
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		leaf := resp.TLS.PeerCertificates[0]
		if string(body) != "hello" || len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://default/web" {
			t.Errorf("body %q, names %v", body, leaf.URIs)
		}
		return leaf.SerialNumber.String()
	}
	var first string
	r.until("a TLS answer", func() bool { first = seen(); return first != "" })
	t.Logf("first TLS answer %s after the start", time.Since(began).Round(time.Millisecond))
	r.until("ready", func() bool { code, body, _ := r.ready(); return code == 200 && body == "LIVE\n" })
	r.until("the renewed certificate", func() bool { s := seen(); return s != "" && s != first })
	if len(asked) != 2 {
		t.Errorf("%d requests for certificates, want 2", len(asked))
	}
	for _, s := range []string{"starting main dispatch loop", "level=WARN msg=envoy"} {
		if !r.logs(s) {
			t.Errorf("the log lacks %q", s)
		}
	}
	for _, s := range []string{"statically linked", "envoy.filters.http", "PRIVATE KEY", aToken} {
		if r.logs(s) {
			t.Errorf("the log has %q", s)
		}
	}
	files, err := filepath.Glob(filepath.Join(r.cfg.TempDir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if i, err := os.Stat(f); err == nil && i.Mode().IsRegular() {
			if b, err := os.ReadFile(f); err != nil || strings.Contains(string(b), "PRIVATE KEY") {
				t.Errorf("%s holds a private key (%v)", f, err)
			}
		}
		if i, err := os.Stat(f); err == nil && i.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %s: others may open it", f, i.Mode())
		}
	}
	r.signals <- os.Interrupt
	if err := r.end(); err != nil {
		t.Errorf("ended with %v", err)
	}
	if left, _ := os.ReadDir(r.cfg.TempDir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
