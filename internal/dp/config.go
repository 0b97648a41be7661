package dp

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"kuma/internal/errs"
)

// Config is all that a run of kuma-dp is told. Default gives the values that
// hold where nothing is said; each field's flag and environment variable are in
// the table of settings.
type Config struct {
	// ControlPlane is how the control plane is reached.
	ControlPlane ControlPlane
	// Mesh and Name say which Dataplane this is, where it was created
	// beforehand; with Resource or ResourcePath they come from there.
	Mesh, Name string
	// ProxyType is "dataplane", the only kind that this version runs.
	ProxyType string
	// Resource is a Dataplane, or a mustache template of one, as YAML or JSON;
	// ResourcePath is a file with it, "-" for standard input. One of the two.
	Resource, ResourcePath string
	// Vars fill the template. Dotted names build nested maps.
	Vars map[string]string
	// Token is the dataplane token, TokenPath a file with it. Token wins.
	Token, TokenPath string
	// BinaryPath is Envoy: a path, or a name that is looked for in PATH, the
	// current directory and beside kuma-dp. Default "envoy".
	BinaryPath string
	// WorkDir is where sockets and Envoy's first configuration are put. Empty
	// means a new directory in the system's temporary directory, removed at exit.
	WorkDir string
	// StateDir is where the control plane's authorities are kept over restarts.
	// It is made with mode 0700; one that is there must belong to the user that
	// kuma-dp runs as, and no other may be able to write it. Empty means
	// Home/.kuma/dp/<mesh>.<name>.
	StateDir string
	// Home is the user's home directory; empty means that there is none.
	Home string
	// Concurrency is the number of Envoy's worker threads; 0 lets Envoy choose.
	Concurrency uint32
	// EnvoyLogLevel is the level of Envoy's log; empty means kuma-dp's.
	// EnvoyComponentLogLevel sets single components: "upstream:debug,http:trace".
	EnvoyLogLevel, EnvoyComponentLogLevel string
	// DrainTime is how long connections may finish after a request to stop.
	// Default 30 s, at most a day.
	DrainTime time.Duration
	// ReadinessPort is where GET /ready is answered. Default 9902; 0 is refused.
	ReadinessPort uint32
	// ReadinessAddress is where that port is opened: 127.0.0.1, or all
	// interfaces in a pod.
	ReadinessAddress string
	// Link is whether kuma-dp keeps its own stream to the control plane, and
	// with it its private keys to itself. Default true.
	Link bool
	// DeltaXDS, BindOutbounds, UnifiedNaming, StrictInboundPorts and ReusePort
	// are features announced to the control plane.
	DeltaXDS, BindOutbounds, UnifiedNaming, StrictInboundPorts, ReusePort bool
	// IPv6 says whether the host has IPv6. Default true.
	IPv6 bool
	// SPIRE and SPIRESocket announce a SPIRE agent on this host.
	SPIRE       bool
	SPIRESocket string
	// MetricsCert and MetricsKey are paths of the certificate with which Envoy
	// serves its metrics, PEM, the leaf first, and of its key. Both or neither.
	MetricsCert, MetricsKey string
	// DynamicInterval is the pause between two looks at what the control plane
	// configures for kuma-dp itself. Default 1 s, at least 100 ms.
	DynamicInterval time.Duration
	// SystemCAPath is the host's bundle of certificate authorities; empty means
	// the first that exists of the places where Linux distributions put it.
	SystemCAPath string
	// DNSPort is the port of Envoy's DNS listener, told to the control plane.
	// Default 15054.
	DNSPort uint32
	// MaxMemory is how much memory the proxy may use, in bytes; 0 means the
	// limit of its control group.
	MaxMemory uint64
	// LogLevel is "off", "info" or "debug" and decides Envoy's level where
	// EnvoyLogLevel is empty.
	LogLevel string

	// Log receives kuma-dp's log and Envoy's.
	Log *slog.Logger
	// Stdin is read where ResourcePath is "-".
	Stdin io.Reader
	// Path and TempDir are the environment's PATH and temporary directory.
	Path, TempDir string
	// CacheDir is where the version of an Envoy is remembered; empty means that
	// it is asked at each start.
	CacheDir string
	// Signals are requests to stop (interrupt, terminated) and to drain
	// (SIGUSR2). It may be nil; the end of Run's context is a request to stop.
	Signals <-chan os.Signal
	// Started, if set, is called with Envoy's process id once it runs.
	Started func(pid int)
}

// ControlPlane is how the control plane is reached.
type ControlPlane struct {
	// URL is its data plane server: https, port 5678 by default.
	URL string
	// CACert is the authority of its certificate as PEM, CACertFile a file with
	// it. CACert wins; with neither the system's authorities count.
	CACert, CACertFile string
	// SkipVerify turns the verification of its certificate off.
	SkipVerify bool
	// RetryBackoff is the longest pause between attempts (default 3 s, they
	// start at 0.2 s); RetryMaxDuration is how long the first configuration is
	// tried for (default 5 min).
	RetryBackoff, RetryMaxDuration time.Duration
}

// Default returns the configuration that holds where nothing is said.
func Default() Config {
	return Config{
		ControlPlane: ControlPlane{URL: "https://localhost:5678", RetryBackoff: 3 * time.Second, RetryMaxDuration: 5 * time.Minute},
		ProxyType:    "dataplane", BinaryPath: "envoy", DrainTime: 30 * time.Second,
		ReadinessPort: 9902, ReadinessAddress: "127.0.0.1",
		Link: true, StrictInboundPorts: true, ReusePort: true, IPv6: true,
		DNSPort: 15054, LogLevel: "info", TempDir: os.TempDir(), DynamicInterval: time.Second,
	}
}

// A setting is one flag, one environment variable, or both. What has no effect
// in this version is accepted, and said so when it is set.
type setting struct {
	flag, short string
	env         []string // the first wins
	usage       string
	value       pflag.Value
	boolean     bool
	// idle says why the setting has no effect; empty if it has one.
	idle string
}

// ignored is the value of a setting without effect.
type ignored struct {
	text string
	kind string
}

func (v *ignored) String() string     { return v.text }
func (v *ignored) Set(s string) error { v.text = s; return nil }
func (v *ignored) Type() string       { return v.kind }

const (
	noDNS     = "this version has no DNS proxy of its own"
	noTProxy  = "transparent proxying is not part of this version; list outbounds in the Dataplane"
	noOTel    = "this version has no OpenTelemetry pipe"
	noProbes  = "this version has no application probe proxy"
	noBackoff = "kuma-dp restarts none of its parts"
)

// settings is the one table of kuma-dp's configuration (contract).
func (c *Config) settings() []setting {
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	str := func(p *string) pflag.Value { set.StringVar(p, "v", *p, ""); return take(set) }
	yes := func(p *bool) pflag.Value { set.BoolVar(p, "v", *p, ""); return take(set) }
	num := func(p *uint32) pflag.Value { set.Uint32Var(p, "v", *p, ""); return take(set) }
	big := func(p *uint64) pflag.Value { set.Uint64Var(p, "v", *p, ""); return take(set) }
	dur := func(p *time.Duration) pflag.Value { set.DurationVar(p, "v", *p, ""); return take(set) }
	none := func(kind string) pflag.Value { return &ignored{kind: kind} }
	const rt = "KUMA_DATAPLANE_RUNTIME_"
	cp := &c.ControlPlane
	return []setting{
		{flag: "cp-address", env: []string{"KUMA_CONTROL_PLANE_URL"}, value: str(&cp.URL), usage: "URL of the control plane's data plane server"},
		{flag: "ca-cert-file", env: []string{"KUMA_CONTROL_PLANE_CA_CERT_FILE"}, value: str(&cp.CACertFile), usage: "file with the authority of the control plane's certificate (default: the system's authorities)"},
		{env: []string{"KUMA_CONTROL_PLANE_CA_CERT"}, value: str(&cp.CACert)},
		{flag: "skip-verify", env: []string{"KUMA_CONTROL_PLANE_TLS_SKIP_VERIFY"}, value: yes(&cp.SkipVerify), boolean: true, usage: "do not verify the control plane's certificate; unsafe"},
		{env: []string{"KUMA_CONTROL_PLANE_RETRY_BACKOFF"}, value: dur(&cp.RetryBackoff)},
		{env: []string{"KUMA_CONTROL_PLANE_RETRY_MAX_DURATION"}, value: dur(&cp.RetryMaxDuration)},
		{flag: "name", env: []string{"KUMA_DATAPLANE_NAME"}, value: str(&c.Name), usage: "name of the Dataplane, where it was created beforehand"},
		{flag: "mesh", env: []string{"KUMA_DATAPLANE_MESH"}, value: str(&c.Mesh), usage: "mesh of the Dataplane, where it was created beforehand"},
		{flag: "proxy-type", env: []string{"KUMA_DATAPLANE_PROXY_TYPE"}, value: str(&c.ProxyType), usage: "kind of proxy: dataplane"},
		{flag: "dataplane-file", short: "d", env: []string{rt + "RESOURCE_PATH"}, value: str(&c.ResourcePath), usage: "file with the Dataplane or a template of it; - for standard input"},
		{flag: "dataplane", env: []string{rt + "RESOURCE"}, value: str(&c.Resource), usage: "the Dataplane or a template of it"},
		{flag: "dataplane-var", short: "v", value: (*vars)(&c.Vars), usage: "variable for the template, as name=value; may be repeated"},
		{flag: "dataplane-token-file", env: []string{rt + "TOKEN_PATH"}, value: str(&c.TokenPath), usage: "file with the dataplane token"},
		{flag: "dataplane-token", env: []string{rt + "TOKEN"}, value: str(&c.Token), usage: "the dataplane token; other users of this machine can read it from the process list, prefer the file"},
		{flag: "binary-path", env: []string{rt + "BINARY_PATH"}, value: str(&c.BinaryPath), usage: "Envoy: a path, or a name to look for in PATH, the current directory and beside kuma-dp"},
		{flag: "work-dir", env: []string{rt + "WORK_DIR", rt + "CONFIG_DIR", rt + "SOCKET_DIR"}, value: str(&c.WorkDir), usage: "directory for sockets and Envoy's first configuration (default: a temporary one)"},
		{flag: "config-dir", value: str(&c.WorkDir), usage: "older name of --work-dir"},
		{flag: "socket-dir", value: str(&c.WorkDir), usage: "older name of --work-dir"},
		{flag: "state-dir", env: []string{rt + "STATE_DIR"}, value: str(&c.StateDir), usage: "directory where the control plane's authorities are kept over restarts (default: $HOME/.kuma/dp/<mesh>.<name>)"},
		{flag: "concurrency", env: []string{rt + "CONCURRENCY"}, value: num(&c.Concurrency), usage: "number of Envoy's worker threads; 0 lets Envoy choose"},
		{flag: "envoy-log-level", env: []string{rt + "ENVOY_LOG_LEVEL"}, value: str(&c.EnvoyLogLevel), usage: "trace, debug, info, warning, error, critical or off (default: the level of --log-level)"},
		{flag: "envoy-component-log-level", env: []string{rt + "ENVOY_COMPONENT_LOG_LEVEL"}, value: str(&c.EnvoyComponentLogLevel), usage: "levels of single components of Envoy, such as upstream:debug,http:trace"},
		{flag: "drain-time", env: []string{"KUMA_DATAPLANE_DRAIN_TIME"}, value: dur(&c.DrainTime), usage: "how long connections may finish after a request to stop"},
		{env: []string{"KUMA_READINESS_PORT"}, value: num(&c.ReadinessPort)},
		{env: []string{rt + "LINK_ENABLED"}, value: yes(&c.Link)},
		{env: []string{rt + "ENVOY_XDS_TRANSPORT_PROTOCOL_VARIANT"}, value: (*variant)(&c.DeltaXDS)},
		{flag: "bind-outbounds", env: []string{rt + "BIND_OUTBOUNDS"}, value: yes(&c.BindOutbounds), boolean: true, usage: "bind outbounds to the addresses of their services"},
		{env: []string{rt + "UNIFIED_RESOURCE_NAMING_ENABLED"}, value: yes(&c.UnifiedNaming)},
		{env: []string{rt + "STRICT_INBOUND_PORTS_ENABLED"}, value: yes(&c.StrictInboundPorts)},
		{env: []string{rt + "REUSE_PORT_ENABLED"}, value: yes(&c.ReusePort)},
		{env: []string{rt + "IPV6_ENABLED"}, value: yes(&c.IPv6)},
		{env: []string{rt + "SPIRE_SUPPORTED"}, value: yes(&c.SPIRE)},
		{env: []string{rt + "SPIRE_SOCKET_PATH"}, value: str(&c.SPIRESocket)},
		{flag: "metrics-cert-path", env: []string{rt + "METRICS_CERT_PATH"}, value: str(&c.MetricsCert), usage: "certificate with which Envoy serves its metrics"},
		{flag: "metrics-key-path", env: []string{rt + "METRICS_KEY_PATH"}, value: str(&c.MetricsKey), usage: "key of that certificate"},
		{env: []string{rt + "DYNAMIC_CONFIGURATION_REFRESH_INTERVAL"}, value: dur(&c.DynamicInterval)},
		{env: []string{rt + "DYNAMIC_SYSTEM_CA_PATH"}, value: str(&c.SystemCAPath)},
		{flag: "dns-envoy-port", env: []string{"KUMA_DNS_ENVOY_DNS_PORT"}, value: num(&c.DNSPort), usage: "port of Envoy's DNS listener"},
		{env: []string{"KUMA_DATAPLANE_RESOURCES_MAX_MEMORY_BYTES"}, value: big(&c.MaxMemory)},

		{flag: "dns-enabled", env: []string{"KUMA_DNS_ENABLED"}, value: none("bool"), boolean: true, usage: "serve DNS", idle: noDNS},
		{flag: "dns-coredns-port", env: []string{"KUMA_DNS_CORE_DNS_PORT"}, value: none("uint32"), usage: "port of CoreDNS", idle: noDNS},
		{flag: "dns-prometheus-port", env: []string{"KUMA_DNS_PROMETHEUS_PORT"}, value: none("uint32"), usage: "port of CoreDNS's metrics", idle: noDNS},
		{flag: "dns-coredns-path", env: []string{"KUMA_DNS_CORE_DNS_BINARY_PATH"}, value: none("string"), usage: "CoreDNS's binary", idle: noDNS},
		{flag: "dns-coredns-config-template-path", env: []string{"KUMA_DNS_CORE_DNS_CONFIG_TEMPLATE_PATH"}, value: none("string"), usage: "template of CoreDNS's configuration", idle: noDNS},
		{flag: "dns-server-config-dir", env: []string{"KUMA_DNS_CONFIG_DIR"}, value: none("string"), usage: "directory of CoreDNS's configuration", idle: noDNS},
		{flag: "dns-enable-logging", env: []string{"KUMA_DNS_ENABLE_LOGGING"}, value: none("bool"), boolean: true, usage: "log DNS queries", idle: noDNS},
		{env: []string{"KUMA_DNS_PROXY_PORT"}, value: none("uint32"), idle: noDNS},
		{flag: "transparent-proxy", env: []string{rt + "TRANSPARENT_PROXY"}, value: none("bool"), boolean: true, usage: "the proxy gets its traffic by redirection", idle: noTProxy},
		{flag: "transparent-proxy-config", value: none("string"), usage: "configuration of the redirection", idle: noTProxy},
		{env: []string{rt + "OTEL_PIPE_ENABLED"}, value: none("bool"), idle: noOTel},
		{env: []string{"KUMA_APPLICATION_PROBE_PROXY_PORT"}, value: none("uint32"), idle: noProbes},
		{env: []string{"KUMA_DATAPLANE_RESILIENT_COMPONENT_BASE_BACKOFF"}, value: none("duration"), idle: noBackoff},
		{env: []string{"KUMA_DATAPLANE_RESILIENT_COMPONENT_MAX_BACKOFF"}, value: none("duration"), idle: noBackoff},
	}
}

// take returns the value of a flag set that holds one flag named "v", and
// leaves the set empty for the next.
func take(set *pflag.FlagSet) pflag.Value {
	v := set.Lookup("v").Value
	*set = *pflag.NewFlagSet("", pflag.ContinueOnError)
	return v
}

// register adds the settings that have a flag to a command.
func register(set *pflag.FlagSet, list []setting) {
	for _, s := range list {
		if s.flag == "" {
			continue
		}
		f := set.VarPF(s.value, s.flag, s.short, s.usage)
		if s.boolean {
			f.NoOptDefVal = "true"
		}
		f.Hidden = s.idle != "" || strings.HasPrefix(s.usage, "older name")
	}
}

// fromEnv reads what no flag has set from the environment, and returns a
// warning for each setting without effect.
func fromEnv(list []setting, changed func(flag string) bool, env func(string) string) (warnings []string, err error) {
	flagWins := map[pflag.Value]bool{}
	for _, s := range list {
		if s.flag != "" && changed(s.flag) {
			flagWins[s.value] = true
			if s.flag == "config-dir" || s.flag == "socket-dir" {
				for _, o := range list {
					if o.flag == "work-dir" {
						flagWins[o.value] = true
					}
				}
			}
		}
	}
	for _, s := range list {
		source := "--" + s.flag
		given := flagWins[s.value]
		if !given {
			for _, name := range s.env {
				text := env(name)
				if text == "" {
					continue
				}
				if err := s.value.Set(text); err != nil {
					return nil, errs.New(errs.Invalid, "environment variable %s: %q is not valid: %w", name, text, err)
				}
				given, source = true, name
				break
			}
		}
		if given && s.idle != "" {
			warnings = append(warnings, source+" has no effect: "+s.idle)
		}
	}
	return warnings, nil
}

// vars collects name=value pairs.
type vars map[string]string

func (v *vars) String() string { return "" }
func (v *vars) Type() string   { return "name=value" }

func (v *vars) Set(s string) error {
	name, value, ok := strings.Cut(s, "=")
	if !ok || name == "" {
		return fmt.Errorf("%q must have the form name=value", s)
	}
	if *v == nil {
		*v = vars{}
	}
	(*v)[name] = value
	return nil
}

// variant reads the contract's name of Envoy's transport.
type variant bool

func (v *variant) String() string { return "" }
func (v *variant) Type() string   { return "string" }

func (v *variant) Set(s string) error {
	switch s {
	case "GRPC":
		*v = false
	case "DELTA_GRPC":
		*v = true
	default:
		return fmt.Errorf("it must be GRPC or DELTA_GRPC")
	}
	return nil
}

// check finds what can't work and says how to mend it.
func (c *Config) check() error {
	bad := func(field, format string, args ...any) error {
		return errs.Fields(errs.Field{Path: field, Message: fmt.Sprintf(format, args...)})
	}
	u, err := url.Parse(c.ControlPlane.URL)
	switch {
	case err != nil:
		return bad("--cp-address", "%q is not a URL: %v", c.ControlPlane.URL, err)
	case c.ControlPlane.plain():
		// The API server on this machine, as in Kuma 0.7.
	case u.Scheme != "https":
		return bad("--cp-address", "%q must start with https://: the control plane's data plane server (port 5678 by default) speaks TLS only; http:// is for the API server of this machine alone: write https://%s", c.ControlPlane.URL, net.JoinHostPort(cmp.Or(u.Hostname(), "HOST"), "5678"))
	case u.Host == "":
		return bad("--cp-address", "%q has no host; write https://HOST:5678", c.ControlPlane.URL)
	}
	switch c.ProxyType {
	case "dataplane":
	case "ingress", "egress":
		return bad("--proxy-type", "%q: zone proxies are not part of this version; use dataplane", c.ProxyType)
	default:
		return bad("--proxy-type", "%q is unknown; it must be dataplane", c.ProxyType)
	}
	switch {
	case c.Resource != "" && c.ResourcePath != "":
		return bad("--dataplane", "and --dataplane-file exclude each other; give one")
	case c.ReadinessPort == 0 || c.ReadinessPort > 65535:
		return bad("KUMA_READINESS_PORT", "%d is not a port; it must be in the range [1, 65535]", c.ReadinessPort)
	case c.DNSPort > 65535:
		return bad("--dns-envoy-port", "%d is not a port; it must be in the range [0, 65535]", c.DNSPort)
	case c.DrainTime < 0 || c.DrainTime > 24*time.Hour:
		return bad("--drain-time", "%s must be between 0s and 24h", c.DrainTime)
	case c.ControlPlane.RetryBackoff <= 0:
		return bad("KUMA_CONTROL_PLANE_RETRY_BACKOFF", "%s must be positive", c.ControlPlane.RetryBackoff)
	case c.ControlPlane.RetryMaxDuration <= 0:
		return bad("KUMA_CONTROL_PLANE_RETRY_MAX_DURATION", "%s must be positive", c.ControlPlane.RetryMaxDuration)
	case (c.MetricsCert == "") != (c.MetricsKey == ""):
		return bad("--metrics-cert-path", "and --metrics-key-path need each other; give both")
	case c.DynamicInterval < 100*time.Millisecond || c.DynamicInterval > time.Hour:
		return bad("KUMA_DATAPLANE_RUNTIME_DYNAMIC_CONFIGURATION_REFRESH_INTERVAL", "%s must be between 100ms and 1h", c.DynamicInterval)
	case c.Concurrency > 1024:
		return bad("--concurrency", "%d is more than the 1024 that are allowed", c.Concurrency)
	}
	if !envoyLevel(c.EnvoyLogLevel) {
		return bad("--envoy-log-level", "%q is unknown; it must be one of trace, debug, info, warning, error, critical, off", c.EnvoyLogLevel)
	}
	return nil
}

func envoyLevel(s string) bool {
	switch s {
	case "", "trace", "debug", "info", "warning", "warn", "error", "critical", "off":
		return true
	}
	return false
}

// systemCA finds the host's bundle of certificate authorities.
func (c *Config) systemCA() string {
	if c.SystemCAPath != "" {
		return c.SystemCAPath
	}
	for _, p := range []string{
		"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
		"/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
	} {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// memory is how many bytes the proxy may use; 0 if nothing limits it.
func (c *Config) memory() uint64 {
	if c.MaxMemory != 0 {
		return c.MaxMemory
	}
	for _, p := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		// A group without a limit says "max", or a number near 2^63.
		if n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil && n < 1<<62 {
			return n
		}
		return 0
	}
	return 0
}

const (
	maxCA        = 1 << 20
	maxToken     = 64 << 10
	maxDataplane = 1 << 20
)

// pipePatience is how long a pipe is waited for that stands in place of a file:
// whoever writes into it may have to ask a control plane first.
const pipePatience = 30 * time.Second

func readLimited(file string, limit int64) ([]byte, error) {
	return readWithin(file, limit, pipePatience)
}

// readWithin reads a file of at most limit bytes. Where it is a pipe, such as a
// shell makes it of <(command), what is written into it has to come, whole,
// within the patience.
func readWithin(file string, limit int64, patience time.Duration) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe's open does not wait for its writer
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode()&fs.ModeNamedPipe == 0 {
		return readAll(f, limit)
	}
	end := time.Now().Add(patience)
	ready, err := awaitInput(f, end)
	if err == nil && !ready {
		err = fmt.Errorf("it is a pipe into which nobody has written anything within %v", patience)
	}
	if err != nil {
		return nil, err
	}
	if err := f.SetReadDeadline(end); err != nil {
		return nil, err
	}
	b, err := readAll(f, limit)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("it is a pipe whose writer has not ended within %v", patience)
	}
	return b, err
}

// awaitInput waits until a file can be read, or a pipe's writer was there and has
// gone; false where nothing of this has come by the end.
func awaitInput(f *os.File, end time.Time) (ready bool, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false, err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		on := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(on, int(max(time.Until(end), 0)/time.Millisecond))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			ready, failed = n > 0, err
			return
		}
	})
	return ready, errors.Join(err, failed)
}

func readAll(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("it has more than the %d bytes that are allowed", limit)
	}
	return b, err
}

// locate finds Envoy's binary.
func (c *Config) locate() (string, error) {
	executable := func(p string) bool {
		i, err := os.Stat(p)
		return err == nil && i.Mode().IsRegular() && i.Mode()&0o111 != 0
	}
	tried := []string{c.BinaryPath}
	if filepath.IsAbs(c.BinaryPath) || strings.ContainsRune(c.BinaryPath, filepath.Separator) {
		if executable(c.BinaryPath) {
			return filepath.Abs(c.BinaryPath)
		}
	}
	if !filepath.IsAbs(c.BinaryPath) {
		dirs := filepath.SplitList(c.Path)
		if wd, err := os.Getwd(); err == nil {
			dirs = append(dirs, wd)
		}
		if self, err := os.Executable(); err == nil {
			dirs = append(dirs, filepath.Dir(self))
		}
		tried = tried[:0]
		for _, d := range dirs {
			p := filepath.Join(d, c.BinaryPath)
			if executable(p) {
				return filepath.Abs(p)
			}
			tried = append(tried, p)
		}
	}
	return "", errs.New(errs.NotFound, "failed to get Envoy version: could not find executable binary in any of the following paths: %v; install Envoy, or name it with --binary-path", tried)
}
