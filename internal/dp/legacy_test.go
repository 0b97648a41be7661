package dp

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"

	"kuma/internal/errs"
	"kuma/internal/socket"
)

// The API server of this machine is asked where proxies go; what it says is
// taken only where it leads to TLS, and what the user said stays.
func TestSignpost(t *testing.T) {
	for name, c := range map[string]struct {
		answer, ownCA string
		status        int
		at, ca, fault string
	}{
		"told":          {answer: `{"url":"https://localhost:5678","caCert":"PEM"}`, at: "https://localhost:5678", ca: "PEM"},
		"own authority": {answer: `{"url":"https://localhost:5678","caCert":"PEM"}`, ownCA: "MINE", at: "https://localhost:5678", ca: "MINE"},
		"no TLS":        {answer: `{"url":"http://localhost:5678"}`, fault: "is no https:// address"},
		"not JSON":      {answer: `welcome`, fault: "not a control plane's"},
		"another API":   {answer: `404: Page Not Found`, status: http.StatusNotFound, fault: "port of the control plane's server for proxies (5678 by default)"},
		"redirected":    {status: http.StatusFound, fault: "(status 302)"},
	} {
		t.Run(name, func(t *testing.T) {
			var asked *http.Request
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked = r
				if c.status != 0 {
					w.Header().Set("Location", "http://192.0.2.1/")
					w.WriteHeader(c.status)
				}
				_, _ = io.WriteString(w, c.answer)
			}))
			t.Cleanup(s.Close)
			cfg := Default()
			cfg.Log = slog.New(slog.DiscardHandler)
			cfg.ControlPlane.URL, cfg.ControlPlane.CACert, cfg.Token = s.URL, c.ownCA, "a token"
			if !cfg.ControlPlane.plain() {
				t.Fatalf("%s is on this machine", s.URL)
			}
			err := cfg.signpost(t.Context(), socket.Owner)
			if c.fault != "" {
				if err == nil || !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.fault) {
					t.Errorf("got error %v, want one with %q", err, c.fault)
				}
			} else if err != nil || cfg.ControlPlane.URL != c.at || cfg.ControlPlane.CACert != c.ca {
				t.Errorf("got %q, %q, %v, want %q, %q", cfg.ControlPlane.URL, cfg.ControlPlane.CACert, err, c.at, c.ca)
			}
			if asked.Method != http.MethodGet || asked.ContentLength > 0 || asked.Header.Get("Authorization") != "" {
				t.Errorf("the plain question says too much: %s, %d bytes", asked.Method, asked.ContentLength)
			}
		})
	}
}

// HRD-31: an address without TLS that is not this machine's is refused before
// anything is sent, and the error names the way that is meant.
func TestPlainAddress(t *testing.T) {
	for url, want := range map[string]string{
		"http://127.0.0.1:5681":       "",
		"http://localhost:5681":       "",
		"http://[::1]:5681":           "",
		"http://10.0.0.1:5681":        "https://10.0.0.1:5678",
		"http://cp.example":           "https://cp.example:5678",
		"http://localhost.evil:5681":  "https://localhost.evil:5678",
		"http://127.0.0.1.evil:5681":  "https://127.0.0.1.evil:5678",
		"ftp://127.0.0.1:5681":        "https://127.0.0.1:5678",
		"http://127.0.0.1@evil:5681/": "https://evil:5678",
	} {
		cfg := Default()
		cfg.ControlPlane.URL = url
		err := cfg.check()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", url, err, want)
		}
	}
}

// Without TLS nobody answers where TLS is spoken: the address is wrong, and
// waiting does not mend that.
func TestSignpostAtTLS(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	cert := newAuthority(t).server(t)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{cert}}).Handshake()
			_ = conn.Close()
		}
	}()
	cfg := Default()
	cfg.Log, cfg.ControlPlane.URL = slog.New(slog.DiscardHandler), "http://"+l.Addr().String()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	if err := cfg.signpost(ctx, socket.Owner); ctx.Err() != nil || !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "--cp-address=https://"+l.Addr().String()) || !strings.Contains(err.Error(), "--ca-cert-file") {
		t.Error(err)
	}
}

// HRD-31: who listens on this machine's port of the API is believed only where
// it is the administrator or the user of kuma-dp.
func TestSignpostOfAnother(t *testing.T) {
	t.Parallel()
	own := uint32(os.Getuid())
	for name, c := range map[string]struct {
		uid    uint32
		ok     bool
		passes bool
	}{
		"own":     {own, true, true},
		"root":    {0, true, true},
		"another": {own + 12345, true, false},
		"hidden":  {0, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked := false
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				asked = true
				_, _ = io.WriteString(w, `{"url":"https://localhost:5678","caCert":"PEM"}`)
			}))
			t.Cleanup(s.Close)
			cfg := Default()
			cfg.Log, cfg.ControlPlane.URL = slog.New(slog.DiscardHandler), s.URL
			port := netip.MustParseAddrPort(s.Listener.Addr().String())
			err := cfg.signpost(t.Context(), func(local, remote netip.AddrPort) (uint32, bool) {
				if local != port || remote == port {
					t.Errorf("asked who owns %s, connected to %s", local, remote)
				}
				return c.uid, c.ok
			})
			switch {
			case c.passes && (err != nil || cfg.ControlPlane.URL != "https://localhost:5678"):
				t.Errorf("%q, %v", cfg.ControlPlane.URL, err)
			case !c.passes && (!errs.Is(err, errs.Invalid) || asked || cfg.ControlPlane.URL != s.URL):
				t.Errorf("%q, asked %v: %v", cfg.ControlPlane.URL, asked, err)
			case !c.passes:
				for _, want := range []string{"--cp-address=https://", "--ca-cert-file", s.URL} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%q is not in %v", want, err)
					}
				}
			}
		})
	}
}
