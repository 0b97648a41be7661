package dp

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"kuma/internal/errs"
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
			err := cfg.signpost(t.Context())
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
