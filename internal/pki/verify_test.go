package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"kuma/internal/pki"
)

// Whoever can't verify a server is told which name was asked for, what was
// shown, and by what it was verified.
func TestDescribeVerify(t *testing.T) {
	t.Parallel()
	var hosts []string
	for i := range 14 {
		hosts = append(hosts, fmt.Sprintf("cp-%d.example", i))
	}
	cert, key, err := pki.GenerateTLS("server", append(hosts[:1:1], "192.0.2.7"), "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	many, manyKey, err := pki.GenerateTLS("server", hosts, "ecdsa")
	if err != nil {
		t.Fatal(err)
	}
	ask := func(cert, key []byte, trust []byte) error {
		t.Helper()
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		srv := httptest.NewUnstartedServer(http.NotFoundHandler())
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
		srv.Config.ErrorLog = log.New(io.Discard, "", 0)
		srv.StartTLS()
		t.Cleanup(srv.Close)
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(trust)
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
		resp, err := client.Get(srv.URL)
		if err == nil {
			_ = resp.Body.Close()
			t.Fatal("the server was believed")
		}
		return err
	}
	for _, c := range []struct {
		name string
		err  error
		want []string
	}{
		{"unknown authority", ask(cert, key, nil), []string{`asked for as "127.0.0.1" and verified by /etc/ca.crt; `, `the certificate seen is of "CN=cp-0.example", issued by "CN=cp-0.example", for cp-0.example, 192.0.2.7, until 2`}},
		{"another name", ask(cert, key, cert), []string{`asked for as "127.0.0.1"`, `for cp-0.example, 192.0.2.7,`}},
		{"many names", ask(many, manyKey, nil), []string{`cp-9.example, and 4 more`}},
		{"nothing shown", &tls.CertificateVerificationError{Err: errors.New("x")}, []string{`asked for as "127.0.0.1" and verified by /etc/ca.crt`}},
	} {
		got := pki.DescribeVerify(fmt.Errorf("ask: %w", c.err), "127.0.0.1", "/etc/ca.crt")
		for _, w := range c.want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: %q lacks %q", c.name, got, w)
			}
		}
	}
	for _, err := range []error{nil, errors.New("connection refused"), tls.RecordHeaderError{Msg: "x"}} {
		if got := pki.DescribeVerify(err, "a", "b"); got != "" {
			t.Errorf("%v: %q, want nothing", err, got)
		}
	}
}

// A server's own words can't fill the log or fake a line of it.
func TestDescribeVerifyHostile(t *testing.T) {
	t.Parallel()
	leaf := &x509.Certificate{DNSNames: []string{"a\nERROR fake", strings.Repeat("x", 100_000)}}
	leaf.Subject.CommonName = strings.Repeat("y", 100_000) + "\n"
	leaf.Issuer.CommonName = "evil\r\n\x1b[31m"
	got := pki.DescribeVerify(&tls.CertificateVerificationError{UnverifiedCertificates: []*x509.Certificate{leaf}, Err: errors.New("x")}, "cp", "it")
	if len(got) > 2000 || strings.ContainsAny(got, "\n\r\x1b") {
		t.Errorf("%d bytes: %.500q", len(got), got)
	}
}
