package cp

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// TestRefusals: a failed handshake is counted and told, one a minute; who goes
// away is not.
func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		r := newRefusals(slog.New(slog.NewTextHandler(&out, nil)))
		for _, err := range []error{io.EOF, fmt.Errorf("read: %w", syscall.ECONNRESET), errors.New("tls: too old"), errors.New("tls: too old"), errors.New("tls: too old")} {
			r.handshake("dp-server", "192.0.2.1:1", err)
		}
		http := stdlog.New(errorLog{"api-https", r, slog.New(slog.DiscardHandler)}, "", 0)
		http.Printf("http: TLS handshake error from %s: %v", "[2001:db8::1]:99", errors.New("tls: client didn't provide a certificate"))
		http.Printf("http: TLS handshake error from %s: %v", "[2001:db8::1]:99", io.EOF)
		http.Print("http: superfluous response.WriteHeader call")
		time.Sleep(time.Minute)
		r.handshake("dp-server", "192.0.2.2:2", tls.AlertError(48))

		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		want := []string{
			`server=dp-server from=192.0.2.1:1 error="tls: too old" unsaid=0`,
			`server=api-https from=[2001:db8::1]:99 error="tls: client didn't provide a certificate" unsaid=0`,
			`server=dp-server from=192.0.2.2:2 error="tls: unknown certificate authority" unsaid=2`,
		}
		if len(lines) != len(want) {
			t.Fatalf("the log:\n%s", out.String())
		}
		for i, w := range want {
			if !strings.HasSuffix(lines[i], w) {
				t.Errorf("line %d is %s, want %s", i, lines[i], w)
			}
		}
		for server, want := range map[string]float64{"dp-server": 4, "api-https": 1} {
			var m dto.Metric
			if err := r.count.WithLabelValues(server).Write(&m); err != nil || m.GetCounter().GetValue() != want {
				t.Errorf("%s: counted %v, want %v (%v)", server, m.GetCounter().GetValue(), want, err)
			}
		}
	})
}
