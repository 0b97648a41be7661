package cp

import (
	"fmt"
	"net/http"
	"slices"
	"time"

	"kuma/internal/errs"
	"kuma/internal/mads"
)

// MonitoringAssignmentServer tells Prometheus which proxies to scrape
// (kuma_sd_configs).
type MonitoringAssignmentServer struct {
	Enabled bool   `json:"enabled"`
	Port    uint32 `json:"port"`
	// DefaultFetchTimeout is how long a request waits for a change that does not
	// say how long.
	DefaultFetchTimeout time.Duration `json:"defaultFetchTimeout"`
	// AssignmentRefreshInterval is the shortest time between two renewals of what
	// is told while proxies come and go; without a change nothing is done.
	AssignmentRefreshInterval time.Duration `json:"assignmentRefreshInterval"`
	// APIVersions are those that are served: "v1", which is the only one.
	APIVersions []string `json:"apiVersions"`
	// TLSEnabled serves with TLS instead of without.
	TLSEnabled bool `json:"tlsEnabled"`
	ServerTLS
	// RequireClientCert refuses clients without a certificate that TLSCAFile
	// verifies (ours): otherwise whoever reaches the port learns of every proxy's
	// address, port and tags.
	RequireClientCert bool `json:"requireClientCert"`
	// TLSCAFile holds the authorities of clients' certificates, PEM (ours).
	TLSCAFile string `json:"tlsCaFile"`
}

// madsEnv begins the names of this server's variables.
const madsEnv = "KUMA_MONITORING_ASSIGNMENT_SERVER"

func defaultMADS() MonitoringAssignmentServer {
	return MonitoringAssignmentServer{Enabled: true, Port: 5676, DefaultFetchTimeout: 30 * time.Second, AssignmentRefreshInterval: time.Second, APIVersions: []string{"v1"}}
}

// faults finds what can't be served.
func (m *MonitoringAssignmentServer) faults() (bad []errs.Field) {
	add := func(suffix, format string, args ...any) {
		bad = append(bad, errs.Field{Path: madsEnv + suffix, Message: fmt.Sprintf(format, args...)})
	}
	if m.Port < 1 || m.Port > 65535 {
		add("_PORT", "%d is not a port: it must be in the range [1, 65535]", m.Port)
	}
	if m.DefaultFetchTimeout <= 0 {
		add("_DEFAULT_FETCH_TIMEOUT", "must be positive, such as 30s")
	}
	if m.AssignmentRefreshInterval <= 0 {
		add("_ASSIGNMENT_REFRESH_INTERVAL", "must be positive, such as 1s")
	}
	if i := slices.IndexFunc(m.APIVersions, func(v string) bool { return v != "v1" }); i >= 0 || len(m.APIVersions) == 0 {
		add("_API_VERSIONS", "must be \"v1\", the only version that there is; to serve none set %s_ENABLED=false", madsEnv)
	}
	if m.RequireClientCert {
		if !m.TLSEnabled {
			add("_REQUIRE_CLIENT_CERT", "needs TLS: set %s_TLS_ENABLED=true", madsEnv)
		}
		if m.TLSCAFile == "" {
			add("_REQUIRE_CLIENT_CERT", "needs to know whose certificates are taken: set %s_TLS_CA_FILE (a file with the authorities)", madsEnv)
		}
	}
	return bad
}

// clients are those whose certificates the server takes.
func (m *MonitoringAssignmentServer) clients() []clientSource {
	return []clientSource{{"monitoring-assignment-server-client-ca", madsEnv + "_TLS_CA_FILE", m.TLSCAFile}}
}

// openMADS opens the port at which Prometheus asks which proxies to scrape.
func (c *ControlPlane) openMADS() error {
	cfg := c.cfg.MonitoringAssignmentServer
	if !cfg.Enabled {
		return nil
	}
	log := c.log.With("logger", "mads")
	handler := mads.New(mads.Config{Tracker: c.tracker, Timeout: cfg.DefaultFetchTimeout, Every: cfg.AssignmentRefreshInterval, Log: log})
	one := func(r *http.Request) string {
		if r.URL.Path == mads.Path {
			return mads.Path
		}
		return "unknown"
	}
	s := &http.Server{
		// The handler itself bounds how long a request may take: it may wait.
		Handler:           c.metrics.mads.measure(c.whenReady(handler), one),
		ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
	}
	s.RegisterOnShutdown(handler.Close)
	if cfg.TLSEnabled {
		clients, err := c.clientCAs(cfg.RequireClientCert, cfg.clients()...)
		if err != nil {
			return err
		}
		t, err := c.serverTLS(madsEnv, cfg.ServerTLS, clients)
		if err != nil {
			return err
		}
		secure(s, t)
	}
	l, err := listen("the server for monitoring assignments", madsEnv+"_PORT", "", cfg.Port)
	if err != nil {
		return err
	}
	c.http = append(c.http, server{s, limited{l, &limit{max: 2000, each: 1000, setting: "none", eachSetting: "none", log: log}}, cfg.TLSEnabled})
	return nil
}

// madsPosture says at start who learns where the proxies are.
func (c *ControlPlane) madsPosture() {
	cfg := c.cfg.MonitoringAssignmentServer
	switch {
	case !cfg.Enabled || cfg.RequireClientCert:
	case cfg.TLSEnabled:
		c.log.Info("whoever reaches this port learns the addresses and tags of proxies with metrics; "+madsEnv+"_REQUIRE_CLIENT_CERT=true and "+madsEnv+"_TLS_CA_FILE end it", "port", cfg.Port)
	default:
		c.log.Info("whoever reaches this port learns the addresses and tags of proxies with metrics, without TLS; "+madsEnv+"_TLS_ENABLED=true with "+madsEnv+"_REQUIRE_CLIENT_CERT=true and "+madsEnv+"_TLS_CA_FILE, or "+madsEnv+"_ENABLED=false, end it", "port", cfg.Port)
	}
}
