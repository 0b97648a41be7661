package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"

	"kuma/test/lab"
)

// startBare starts two Envoys without a control plane and returns the port that
// leads through both to the backend, and their processes.
func startBare(ctx context.Context, l *lab.Lab, backend int) (port int, pids []int, err error) {
	ports, err := l.Ports(2)
	if err != nil {
		return 0, nil, err
	}
	certs, err := certificates(l)
	if err != nil {
		return 0, nil, err
	}
	var p *lab.Process
	for _, c := range []struct{ name, config string }{
		{"bare-server", fmt.Sprintf(serverConfig, ports[0], certs["server"], certs["server-key"], certs["ca"], backend)},
		{"bare-caller", fmt.Sprintf(callerConfig, ports[1], certs["caller"], certs["caller-key"], certs["ca"], ports[0])},
	} {
		file, err := l.File(c.name+".yaml", c.config)
		if err != nil {
			return 0, nil, err
		}
		if p, err = l.Start(c.name, nil, l.Envoy, "-c", file, "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"); err != nil {
			return 0, nil, err
		}
		pids = append(pids, p.Cmd.Process.Pid)
	}
	return ports[1], pids, l.Await(ctx, p, "the bare Envoys answer", func() error {
		a, err := once(ports[1])
		if err == nil && !strings.HasPrefix(a, "HTTP/1.1 200") {
			err = fmt.Errorf("the answer is %q", a)
		}
		return err
	})
}

// certificates makes an authority and a certificate for each side, as a mesh's
// are: P-256 with a SPIFFE id.
func certificates(l *lab.Lab) (files map[string]string, err error) {
	files = map[string]string{}
	write := func(name, kind string, der []byte) {
		if err == nil {
			files[name], err = l.File("bare-"+name+".pem", string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
		}
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bare"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	if err != nil {
		return nil, err
	}
	write("ca", "CERTIFICATE", der)
	for i, name := range []string{"server", "caller"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i) + 2), URIs: []*url.URL{{Scheme: "spiffe", Host: "default", Path: "/" + name}},
			NotBefore: authority.NotBefore, NotAfter: authority.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, authority, key.Public(), authorityKey)
		if err != nil {
			return nil, err
		}
		write(name, "CERTIFICATE", der)
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		write(name+"-key", "PRIVATE KEY", private)
	}
	return files, err
}

// callerConfig has the listener's port, certificate, key, authority, and the
// server's port. Between the two it is HTTP/2, as between sidecars.
const callerConfig = `static_resources:
  listeners:
  - name: outbound
    address: {socket_address: {address: 127.0.0.1, port_value: %d}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: outbound
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: backend
              domains: ["*"]
              routes:
              - match: {prefix: /}
                route: {cluster: backend, timeout: 15s}
  clusters:
  - name: backend
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: backend
        common_tls_context:
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          alpn_protocols: [h2]
          tls_certificates:
          - {certificate_chain: {filename: %q}, private_key: {filename: %q}}
          validation_context:
            trusted_ca: {filename: %q}
            match_typed_subject_alt_names: [{san_type: URI, matcher: {exact: spiffe://default/server}}]
    load_assignment:
      cluster_name: backend
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]
`

// serverConfig has the listener's port, certificate, key, authority, and the
// backend's port.
const serverConfig = `static_resources:
  listeners:
  - name: inbound
    address: {socket_address: {address: 127.0.0.1, port_value: %d}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            alpn_protocols: [h2]
            tls_certificates:
            - {certificate_chain: {filename: %q}, private_key: {filename: %q}}
            validation_context:
              trusted_ca: {filename: %q}
              match_typed_subject_alt_names: [{san_type: URI, matcher: {prefix: spiffe://default/}}]
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: inbound
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
          route_config:
            virtual_hosts:
            - name: backend
              domains: ["*"]
              routes:
              - match: {prefix: /}
                route: {cluster: local, timeout: 15s}
  clusters:
  - name: local
    connect_timeout: 5s
    load_assignment:
      cluster_name: local
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}}]}]
`
