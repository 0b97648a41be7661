package cp_test

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"kuma/internal/cp"
	"kuma/internal/mads"
)

// TestMonitoringAssignments: the port is open by default, a request that waits
// does not hold up the end, and the port can be closed.
func TestMonitoringAssignments(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	stop := run(t, cfg)
	url := fmt.Sprintf("http://127.0.0.1:%d%s", cfg.MonitoringAssignmentServer.Port, mads.Path)
	ask := func(body string) (*http.Response, error) {
		r, err := http.Post(url, "application/json", strings.NewReader(body))
		if err == nil {
			_ = r.Body.Close()
		}
		return r, err
	}
	r, err := ask("{}")
	if err != nil || r.StatusCode != http.StatusOK || r.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Fatalf("%v %v", r, err)
	}
	answering := func(n string) func() bool {
		return func() bool {
			_, page := get(t, fmt.Sprintf("http://127.0.0.1:%d/metrics", cfg.Diagnostics.ServerPort))
			return regexp.MustCompile(`(?m)^mads_server_http_requests_inflight{handler="` + mads.Path + `".*} ` + n + `$`).MatchString(page)
		}
	}
	// The version of no targets at all is always the same.
	version := emptyVersion(t, url)
	eventually(t, "that was answered", answering("0"))
	waiting := make(chan error, 1)
	go func() {
		r, err := http.Post(url+"?fetch-timeout=5m", "application/json", strings.NewReader(`{"version_info":"`+version+`"}`))
		if err == nil {
			_ = r.Body.Close()
			if r.StatusCode != http.StatusNotModified {
				err = fmt.Errorf("status %d", r.StatusCode)
			}
		}
		waiting <- err
	}()
	eventually(t, "the request waits", answering("1"))
	select {
	case err := <-waiting:
		t.Fatalf("it does not wait: %v", err)
	default:
	}
	stop()
	if err := <-waiting; err != nil {
		t.Errorf("at the end: %v", err)
	}

	cfg = config(t)
	cfg.MonitoringAssignmentServer.Enabled = false
	run(t, cfg)
	if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", cfg.MonitoringAssignmentServer.Port)); err == nil {
		_ = c.Close()
		t.Error("the port is open though it is not enabled")
	}
}

// emptyVersion is what a control plane without targets answers.
func emptyVersion(t *testing.T, url string) string {
	r, err := http.Post(url, "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Error(err)
		return ""
	}
	defer func() { _ = r.Body.Close() }()
	var version string
	if _, err := fmt.Fscanf(r.Body, `{"version_info":%q`, &version); err != nil {
		t.Errorf("read the version: %v", err)
	}
	return version
}

// TestMonitoringAssignmentSettings: what can't be served is named with its
// variable.
func TestMonitoringAssignmentSettings(t *testing.T) {
	t.Parallel()
	const env = "KUMA_MONITORING_ASSIGNMENT_SERVER_"
	for _, c := range []struct {
		set  []string
		want string
	}{
		{[]string{"PORT=0"}, env + "PORT: 0 is not a port"},
		{[]string{"DEFAULT_FETCH_TIMEOUT=0s"}, env + "DEFAULT_FETCH_TIMEOUT: must be positive"},
		{[]string{"ASSIGNMENT_REFRESH_INTERVAL=0s"}, env + "ASSIGNMENT_REFRESH_INTERVAL: must be positive"},
		{[]string{"API_VERSIONS=v1,v2"}, env + `API_VERSIONS: must be "v1"`},
		{[]string{"REQUIRE_CLIENT_CERT=true", "TLS_CA_FILE=ca.pem"}, env + "REQUIRE_CLIENT_CERT: needs TLS: set " + env + "TLS_ENABLED=true"},
		{[]string{"REQUIRE_CLIENT_CERT=true", "TLS_ENABLED=true"}, env + "REQUIRE_CLIENT_CERT: needs to know whose certificates are taken: set " + env + "TLS_CA_FILE"},
		{[]string{"TLS_ENABLED=true", "TLS_CERT_FILE=a.pem"}, env + "TLS_KEY_FILE"},
		{[]string{"TLS_MIN_VERSION=TLSv1_1"}, env + "TLS_MIN_VERSION: unsupported tls version: TLSv1_1"},
		{[]string{"TLS_CIPHER_SUITES=RC4"}, env + "TLS_CIPHER_SUITES: there is no cipher suite"},
	} {
		var set []string
		for _, s := range c.set {
			set = append(set, env+s)
		}
		_, _, err := cp.Load("", set)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q gives %v, want %q", c.set, err, c.want)
		}
	}
	cfg, warnings, err := cp.Load("", []string{env + "ASSIGNMENT_REFRESH_INTERVAL=5s", env + "API_VERSIONS=v1", env + "DEFAULT_FETCH_TIMEOUT=10s", env + "TLS_ENABLED=true"})
	if err != nil || len(warnings) > 0 {
		t.Errorf("%v %q", err, warnings)
	}
	if m := cfg.MonitoringAssignmentServer; m.DefaultFetchTimeout != 10*time.Second || m.AssignmentRefreshInterval != 5*time.Second || !m.TLSEnabled || !m.Enabled {
		t.Errorf("%+v", m)
	}
	free := config(t)
	free.MonitoringAssignmentServer.TLSEnabled = true
	free.MonitoringAssignmentServer.TLSCertFile, free.MonitoringAssignmentServer.TLSKeyFile = "/nowhere.pem", "/nowhere.key"
	if _, err := cp.New(t.Context(), free, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), env+"TLS_CERT_FILE") || !strings.Contains(err.Error(), "/nowhere.pem") {
		t.Errorf("a file that is not there: %v", err)
	}
}
