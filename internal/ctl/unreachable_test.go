package ctl

import (
	"fmt"
	"net/url"
	"strings"
	"syscall"
	"testing"
)

// A server that refuses a client's certificate may end the connection before its
// alert is read; what kumactl sees then is an error of the socket alone.
func TestConnectionEndedAfterClientCertificate(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		certFile string
		cause    error
		want     bool
	}{
		{"anna.crt", syscall.EPIPE, true},
		{"anna.crt", syscall.ECONNRESET, true},
		{"anna.crt", syscall.EHOSTUNREACH, false},
		{"", syscall.ECONNRESET, false},
	} {
		base := &url.URL{Scheme: "https", Host: "cp.example:5682"}
		said := (&client{base: base, certFile: c.certFile}).unreachable(&url.Error{Op: "Get", URL: base.String(), Err: fmt.Errorf("write: %w", c.cause)}).Error()
		if strings.Contains(said, "client certificate "+c.certFile+":") != c.want {
			t.Errorf("%q, %v: %s", c.certFile, c.cause, said)
		}
	}
}
