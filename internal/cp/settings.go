package cp

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"kuma/internal/auth"
	"kuma/internal/conf"
	"kuma/internal/errs"
)

// Ignored are the contract's settings that have no meaning here, with the
// reason that the operator is told.
func ignored() map[string]string {
	const (
		kubernetes = "this control plane runs without Kubernetes"
		polling    = "changes are pushed as they happen; nothing is polled"
		zones      = "this version serves one zone, without a global control plane"
		memory     = "reads are served from memory, and never from the database"
		later      = "this version does not have the part that it configures"
	)
	return map[string]string{
		"runtime.kubernetes": kubernetes, "KUMA_RUNTIME_KUBERNETES_*": kubernetes, "KUMA_INJECTOR_*": kubernetes,
		"store.kubernetes": kubernetes, "experimental.kubeOutboundsAsVIPs": kubernetes, "experimental.sidecarContainers": kubernetes,
		"store.postgres.readReplica": memory, "store.postgres.maxListQueryElements": memory,
		"store.postgres.maxIdleConnections":      "what is idle is closed after maxConnectionIdleTime, however much it is",
		"KUMA_STORE_POSTGRES_TLS_ROOT_CERT_PATH": "the variable is KUMA_STORE_POSTGRES_TLS_CA_PATH",
		"store.cache":                            "reads are served from memory and never stale", "store.upsert": "writes that collide are planned anew at once",
		"xdsServer.dataplaneConfigurationRefreshInterval": polling, "xdsServer.nackBackoff": "what Envoy refused is sent again when it changes",
		"dpServer.hds.refreshInterval": polling, "runtime.universal.vipRefreshInterval": polling, "runtime.universal.workload": polling, "runtime.universal.spire": later, "runtime.universal.zoneResourceCleanupAge": zones, "meshService.generationInterval": polling,
		"meshService.labelPropagation": later, "coreResources": later, "policies": later, "ipam": later, "dnsServer": later,
		"metrics.mesh": later, "metrics.zone": zones, "metrics.controlPlane": later, "metrics.openTelemetry": later, "metrics.dataplane.idleTimeout": polling,
		"multizone.global": zones, "multizone.zone": zones, "interCp.catalog": zones, "KUMA_MULTIZONE_*": zones,
		"tracing": later, "reports": "this product reports to nobody", "eventBus": polling,
		"experimental": later, "proxy": later, "defaults.skipTenantResources": later, "defaults.SkipHostnameGenerators": later,
		"KUMA_DEFAULTS_SKIP_HOSTNAME_GENERATORS": later,
		"general.resilientComponentBaseBackoff":  later, "general.resilientComponentMaxBackoff": later,
		"general.certGenerationCircuitBreakerMinProxies": later,
		"apiServer.gui": later, "apiServer.rootUrl": later,
		"bootstrapServer.params.xdsGrpcMaxReceiveMessageBytes": "Envoy's own gRPC client has no such limit",
		"bootstrapServer.params.corefileTemplatePath":          later,
	}
}

// Load reads the configuration: defaults, the file (if any), the environment.
// Warnings are for the operator.
func Load(file string, env []string) (Config, []string, error) {
	c := Default()
	warnings, err := conf.Load(&c, conf.Options{File: file, Env: env, Ignored: ignored()})
	if err != nil {
		return c, warnings, err
	}
	return c, warnings, c.check()
}

// check finds what can't be served.
func (c *Config) check() error {
	var bad []errs.Field
	add := func(path, format string, args ...any) {
		bad = append(bad, errs.Field{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	if c.Environment != "universal" {
		add("environment", "%q is not served by this version; use \"universal\"", c.Environment)
	}
	if c.Mode != "zone" && c.Mode != "standalone" {
		add("mode", "%q is not served by this version; use \"zone\"", c.Mode)
	}
	switch c.Store.Type {
	case "file", "memory":
	case inPostgres:
		bad = append(bad, c.Store.Postgres.check()...)
	default:
		add("store.type", "%q is not served by this version; use \"file\", \"postgres\" or \"memory\"", c.Store.Type)
	}
	if c.Multizone.Zone.Name == "" || len(c.Multizone.Zone.Name) > 63 {
		add("multizone.zone.name", "must have 1 to 63 characters")
	}
	c.AdminServer.check(add)
	if c.APIServer.Authn.Type == auth.AdminClientCerts && c.APIServer.Auth.ClientCertsDir == "" {
		add("apiServer.auth.clientCertsDir", "is needed where apiServer.authn.type is adminClientCerts: set KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR to a directory with the administrators' certificates")
	}
	if !c.APIServer.HTTP.Enabled && !c.APIServer.HTTPS.Enabled {
		add("apiServer", "both http.enabled and https.enabled are false; nobody could reach this control plane")
	}
	for _, p := range []struct {
		path string
		port uint32
	}{
		{"apiServer.http.port", c.APIServer.HTTP.Port},
		{"apiServer.https.port", c.APIServer.HTTPS.Port},
		{"dpServer.port", c.DPServer.Port},
		{"diagnostics.serverPort", c.Diagnostics.ServerPort},
		{"multizone.global.kds.grpcPort", c.Multizone.Global.KDS.GRPCPort},
		{"interCp.server.port", c.InterCP.Server.Port},
	} {
		if p.port < 1 || p.port > 65535 {
			add(p.path, "%d is not a port: it must be in the range [1, 65535]", p.port)
		}
	}
	for _, n := range []struct {
		path string
		v    int
	}{
		{"apiServer.maxConnections", c.APIServer.MaxConnections},
		{"dpServer.maxConnections", c.DPServer.MaxConnections},
		{"dpServer.maxConnectionsPerAddress", c.DPServer.MaxConnectionsPerAddress},
	} {
		if n.v < 2 {
			add(n.path, "%d is too few; must be at least 2", n.v)
		}
	}
	for _, d := range []struct {
		path string
		v    time.Duration
	}{
		{"xdsServer.quietPeriod", c.XDSServer.QuietPeriod},
		{"xdsServer.maxDelay", c.XDSServer.MaxDelay},
		{"xdsServer.dataplaneStatusFlushInterval", c.XDSServer.DataplaneStatusFlushInterval},
		{"dpServer.hds.interval", c.DPServer.HDS.Interval},
		{"general.dnsCacheTTL", c.General.DNSCacheTTL},
		{"runtime.universal.dataplaneCleanupAge", c.Runtime.Universal.DataplaneCleanupAge},
	} {
		if d.v <= 0 {
			add(d.path, "must be positive")
		}
	}
	for _, d := range c.APIServer.CORSAllowedDomains {
		if _, err := regexp.Compile("^(?:" + d + ")$"); err != nil {
			add("apiServer.corsAllowedDomains", "%q is not a regular expression: %v", d, err)
		}
	}
	bad = append(bad, c.MonitoringAssignmentServer.faults()...)
	if err := errs.Fields(bad...); err != nil {
		return err
	}
	// What the parts themselves refuse is told before anything is made, too.
	if _, err := auth.NewAccess(c.Access); err != nil {
		return err
	}
	if _, err := auth.NewAuthenticator(auth.AuthenticatorConfig{Users: c.APIServer.Authn}); err != nil {
		return err
	}
	if _, err := auth.NewProxyChecker(auth.ProxyCheckerConfig{Proxies: c.DPServer.Authn}); err != nil {
		return err
	}
	return c.checkTLS()
}

// workDir is where certificates and the store's file are.
func (c *Config) workDir() (string, error) {
	if c.General.WorkDir != "" {
		return filepath.Abs(c.General.WorkDir)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", errs.New(errs.Invalid, "there is no home directory for the work directory: set KUMA_GENERAL_WORK_DIR")
	}
	return filepath.Join(home, ".kuma"), nil
}
