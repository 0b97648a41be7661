package dp

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// configure reads flags and an environment as the command does.
func configure(t *testing.T, args []string, env map[string]string) (Config, []string, error) {
	t.Helper()
	cfg := Default()
	list := cfg.settings()
	set := pflag.NewFlagSet("run", pflag.ContinueOnError)
	register(set, list)
	if err := set.Parse(args); err != nil {
		return cfg, nil, err
	}
	warnings, err := fromEnv(list, set.Changed, func(k string) string { return env[k] })
	return cfg, warnings, err
}

func TestSettings(t *testing.T) {
	t.Parallel()
	env := map[string]string{
		"KUMA_CONTROL_PLANE_URL": "https://cp:1", "KUMA_CONTROL_PLANE_CA_CERT": "pem", "KUMA_CONTROL_PLANE_CA_CERT_FILE": "/ca", "KUMA_CONTROL_PLANE_TLS_SKIP_VERIFY": "true",
		"KUMA_CONTROL_PLANE_RETRY_BACKOFF": "7s", "KUMA_CONTROL_PLANE_RETRY_MAX_DURATION": "8m", "KUMA_DATAPLANE_NAME": "n", "KUMA_DATAPLANE_MESH": "m",
		"KUMA_DATAPLANE_PROXY_TYPE": "ingress", "KUMA_DATAPLANE_RUNTIME_RESOURCE_PATH": "/dp", "KUMA_DATAPLANE_RUNTIME_RESOURCE": "dp", "KUMA_DATAPLANE_RUNTIME_TOKEN_PATH": "/t",
		"KUMA_DATAPLANE_RUNTIME_TOKEN": "t", "KUMA_DATAPLANE_RUNTIME_BINARY_PATH": "/envoy", "KUMA_DATAPLANE_RUNTIME_SOCKET_DIR": "/old", "KUMA_DATAPLANE_RUNTIME_CONFIG_DIR": "/w",
		"KUMA_DATAPLANE_RUNTIME_CONCURRENCY": "3", "KUMA_DATAPLANE_RUNTIME_ENVOY_LOG_LEVEL": "debug", "KUMA_DATAPLANE_RUNTIME_ENVOY_COMPONENT_LOG_LEVEL": "http:trace",
		"KUMA_DATAPLANE_DRAIN_TIME": "9s", "KUMA_READINESS_PORT": "9", "KUMA_DATAPLANE_RUNTIME_LINK_ENABLED": "false",
		"KUMA_DATAPLANE_RUNTIME_ENVOY_XDS_TRANSPORT_PROTOCOL_VARIANT": "DELTA_GRPC", "KUMA_DATAPLANE_RUNTIME_BIND_OUTBOUNDS": "true",
		"KUMA_DATAPLANE_RUNTIME_UNIFIED_RESOURCE_NAMING_ENABLED": "true", "KUMA_DATAPLANE_RUNTIME_STRICT_INBOUND_PORTS_ENABLED": "false",
		"KUMA_DATAPLANE_RUNTIME_REUSE_PORT_ENABLED": "false", "KUMA_DATAPLANE_RUNTIME_IPV6_ENABLED": "false", "KUMA_DATAPLANE_RUNTIME_SPIRE_SUPPORTED": "true",
		"KUMA_DATAPLANE_RUNTIME_SPIRE_SOCKET_PATH": "/s", "KUMA_DATAPLANE_RUNTIME_METRICS_CERT_PATH": "/mc", "KUMA_DATAPLANE_RUNTIME_METRICS_KEY_PATH": "/mk",
		"KUMA_DATAPLANE_RUNTIME_DYNAMIC_SYSTEM_CA_PATH": "/sys", "KUMA_DATAPLANE_RUNTIME_DYNAMIC_CONFIGURATION_REFRESH_INTERVAL": "2s", "KUMA_DNS_ENVOY_DNS_PORT": "53", "KUMA_DATAPLANE_RESOURCES_MAX_MEMORY_BYTES": "1024",
	}
	want := Config{
		ControlPlane: ControlPlane{URL: "https://cp:1", CACert: "pem", CACertFile: "/ca", SkipVerify: true, RetryBackoff: 7 * time.Second, RetryMaxDuration: 8 * time.Minute},
		Name:         "n", Mesh: "m", ProxyType: "ingress", ResourcePath: "/dp", Resource: "dp", TokenPath: "/t", Token: "t", BinaryPath: "/envoy", WorkDir: "/w",
		Concurrency: 3, EnvoyLogLevel: "debug", EnvoyComponentLogLevel: "http:trace", DrainTime: 9 * time.Second, ReadinessPort: 9, ReadinessAddress: "127.0.0.1",
		DeltaXDS: true, BindOutbounds: true, UnifiedNaming: true, SPIRE: true, SPIRESocket: "/s", MetricsCert: "/mc", MetricsKey: "/mk", SystemCAPath: "/sys", DynamicInterval: 2 * time.Second,
		DNSPort: 53, MaxMemory: 1024, LogLevel: "info", TempDir: Default().TempDir,
	}
	got, warnings, err := configure(t, nil, env)
	if err != nil || len(warnings) != 0 {
		t.Errorf("error %v, warnings %v", err, warnings)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("from the environment: %s", d)
	}

	// Flags win, the binary's path and the older names of the directory too.
	got, _, err = configure(t, []string{"--cp-address", "https://flag", "--binary-path", "flag", "--config-dir", "/flag", "--skip-verify=false", "-v", "a=b=c", "--dataplane-var", "d=e", "-d", "-"}, env)
	if err != nil {
		t.Fatal(err)
	}
	if got.ControlPlane.URL != "https://flag" || got.BinaryPath != "flag" || got.WorkDir != "/flag" || got.ControlPlane.SkipVerify || got.ResourcePath != "-" {
		t.Errorf("flags: %+v", got)
	}
	if d := cmp.Diff(map[string]string{"a": "b=c", "d": "e"}, got.Vars); d != "" {
		t.Error(d)
	}
	got, _, err = configure(t, []string{"--skip-verify", "--bind-outbounds"}, nil)
	if err != nil || !got.ControlPlane.SkipVerify || !got.BindOutbounds {
		t.Errorf("flags without a value: %+v, %v", got, err)
	}
	if d := cmp.Diff(Default(), func() Config { c, _, _ := configure(t, nil, nil); return c }()); d != "" {
		t.Errorf("without settings: %s", d)
	}

	// What has no effect is taken and said.
	_, warnings, err = configure(t, []string{"--dns-enabled=false", "--transparent-proxy"}, map[string]string{"KUMA_APPLICATION_PROBE_PROXY_PORT": "9001"})
	if err != nil || len(warnings) != 3 || !strings.HasPrefix(warnings[0], "--dns-enabled has no effect: ") || !strings.HasPrefix(warnings[2], "KUMA_APPLICATION_PROBE_PROXY_PORT has no effect") {
		t.Errorf("warnings %q, %v", warnings, err)
	}
	for name, value := range map[string]string{"KUMA_READINESS_PORT": "x", "KUMA_DATAPLANE_DRAIN_TIME": "5", "KUMA_DATAPLANE_RUNTIME_LINK_ENABLED": "maybe", "KUMA_DATAPLANE_RUNTIME_ENVOY_XDS_TRANSPORT_PROTOCOL_VARIANT": "X"} {
		if _, _, err := configure(t, nil, map[string]string{name: value}); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), value) {
			t.Errorf("%s=%s: %v", name, value, err)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		change func(*Config)
		want   string
	}{
		{func(*Config) {}, ""},
		{func(c *Config) { c.ControlPlane.URL = "https://" }, "--cp-address"},
		{func(c *Config) { c.ControlPlane.URL = "%" }, "--cp-address"},
		{func(c *Config) { c.ProxyType = "router" }, "--proxy-type"},
		{func(c *Config) { c.Resource, c.ResourcePath = "a", "b" }, "--dataplane"},
		{func(c *Config) { c.ReadinessPort = 0 }, "KUMA_READINESS_PORT"},
		{func(c *Config) { c.ReadinessPort = 65536 }, "KUMA_READINESS_PORT"},
		{func(c *Config) { c.DNSPort = 65536 }, "--dns-envoy-port"},
		{func(c *Config) { c.DrainTime = -1 }, "--drain-time"},
		{func(c *Config) { c.DrainTime = 25 * time.Hour }, "--drain-time"},
		{func(c *Config) { c.ControlPlane.RetryBackoff = 0 }, "KUMA_CONTROL_PLANE_RETRY_BACKOFF"},
		{func(c *Config) { c.ControlPlane.RetryMaxDuration = 0 }, "KUMA_CONTROL_PLANE_RETRY_MAX_DURATION"},
		{func(c *Config) { c.MetricsCert = "a" }, "--metrics-cert-path"},
		{func(c *Config) { c.DynamicInterval = time.Millisecond }, "KUMA_DATAPLANE_RUNTIME_DYNAMIC_CONFIGURATION_REFRESH_INTERVAL"},
		{func(c *Config) { c.Concurrency = 5000 }, "--concurrency"},
		{func(c *Config) { c.EnvoyLogLevel = "loud" }, "--envoy-log-level"},
	} {
		cfg := Default()
		c.change(&cfg)
		err := cfg.check()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)) {
			t.Errorf("want an error about %q, got %v", c.want, err)
		}
	}
}

func TestRender(t *testing.T) {
	t.Parallel()
	out, warnings, err := render(`name: {{ name }} {{ a.b }} {{ missing }} {{> /etc/passwd }}`, map[string]string{"name": `"a<b>&c"`, "a.b": "x"})
	if err != nil || out != `name: "a<b>&c" x  ` {
		t.Errorf("%q, %v", out, err)
	}
	if len(warnings) != 1 || !strings.HasSuffix(warnings[0], ": missing") {
		t.Errorf("warnings %q", warnings)
	}
	if _, _, err := render("{{ open", nil); err == nil {
		t.Error("a broken template was taken")
	}
	if _, _, err := render("", map[string]string{"a": "1", "a.b": "2"}); err == nil || !strings.Contains(err.Error(), `"a.b"`) {
		t.Errorf("contradicting variables: %v", err)
	}
}

func TestNamed(t *testing.T) {
	t.Parallel()
	cfg := Default()
	cfg.Mesh = "default"
	if me, _, err := cfg.load("pod-1.ns"); err != nil || me.name != "pod-1.ns" || me.mesh != "default" || me.doc != "" {
		t.Errorf("the pod's name: %+v, %v", me, err)
	}
	cfg.Name = "web-1"
	if me, _, err := cfg.load("pod-1.ns"); err != nil || me.name != "web-1" {
		t.Errorf("the name: %+v, %v", me, err)
	}
	cfg.Name, cfg.Mesh = "Web", "M"
	if _, _, err := cfg.load(""); err == nil || !strings.Contains(err.Error(), "--name: ") || !strings.Contains(err.Error(), "--mesh: ") {
		t.Errorf("bad names: %v", err)
	}
}

func TestEnvoyArgs(t *testing.T) {
	t.Parallel()
	cfg := Default()
	for _, c := range []struct {
		version string
		change  func(*Config)
		want    string
	}{
		{"1.40.0", func(*Config) {}, "--config-path f --drain-time-s 30 --drain-strategy immediate --disable-hot-restart --log-level info --file-flush-interval-msec 500"},
		{"1.36.4", func(*Config) {}, "--config-path f --drain-time-s 30 --drain-strategy immediate --disable-hot-restart --log-level info --file-flush-interval-msec 500 --cpuset-threads"},
		{"1.36.4", func(c *Config) { c.Concurrency = 2; c.LogLevel = "off" }, "--config-path f --drain-time-s 30 --drain-strategy immediate --disable-hot-restart --log-level off --file-flush-interval-msec 500 --concurrency 2"},
		{"1.40.0", func(c *Config) { c.EnvoyLogLevel, c.EnvoyComponentLogLevel = "trace", "http:debug" }, "--config-path f --drain-time-s 30 --drain-strategy immediate --disable-hot-restart --log-level trace --file-flush-interval-msec 500 --component-log-level http:debug"},
	} {
		cfg := cfg
		c.change(&cfg)
		if got := strings.Join(envoyArgs(&cfg, envoyVersion{number: c.version}, "f"), " "); got != c.want {
			t.Errorf("%s: %s\nwant %s", c.version, got, c.want)
		}
	}
	for number, want := range map[string]bool{"1.40.0": true, "1.36.4": true, "1.35.9": false, "1.41.0": false, "2.38.0": false, "x": false} {
		if got := (envoyVersion{number: number}).compatible(); got != want {
			t.Errorf("%s: compatible is %t", number, got)
		}
	}
}

// Envoy's log in our form: inventory at debug, continuations at the level of
// the line before, a warning that comes at every attempt shown once.
func TestEnvoyLog(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	l := &envoyLog{log: slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelInfo, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))}
	l.read(strings.NewReader(`[2026-11-21 15:11:41.280][187][info][main] [source/server/server.cc:465] statically linked extensions; for details see
[2026-11-21 15:11:41.280][187][info][main] [source/server/server.cc:467]   envoy.filters.http: a, b
[2026-11-21 15:11:41.280][187][info][main] [source/server/server.cc:1098] starting main dispatch loop
[2026-11-21 15:11:41.280][187][warning][config] [a.cc:1] stream to ads_cluster closed: 14, since 1s ago
[2026-11-21 15:11:42.280][187][warning][config] [a.cc:1] stream to ads_cluster closed: 14, since 12s ago
[2026-11-21 15:11:42.280][187][debug][http] [a.cc:1] [C1][S2] hidden
[2026-11-21 15:11:42.280][187][info][http] [a.cc:1] [C1][S2] shown
[2026-11-21 15:11:43.280][187][critical][main] [b.cc:2] error initializing configuration
  at line 3

` + strings.Repeat("z", 3*maxLogLine) + "\nno newline"))
	want := `level=INFO msg=envoy text="starting main dispatch loop" component=main at=source/server/server.cc:1098
level=WARN msg=envoy text="stream to ads_cluster closed: 14, since 1s ago" component=config at=a.cc:1
level=INFO msg=envoy text="[C1][S2] shown" component=http at=a.cc:1
level=ERROR msg=envoy text="error initializing configuration" component=main at=b.cc:2
level=ERROR msg=envoy text="at line 3"
level=ERROR msg=envoy text=` + strings.Repeat("z", maxLogLine) + `
level=ERROR msg=envoy text="no newline"
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
	if l.lastError() != "no newline" {
		t.Errorf("last error %q", l.lastError())
	}
	// What the loader says counts until Envoy itself speaks.
	l = &envoyLog{log: slog.New(slog.DiscardHandler)}
	l.read(strings.NewReader("envoy: error while loading shared libraries: libm.so.6\n"))
	if !strings.Contains(l.lastError(), "libm.so.6") {
		t.Errorf("last error %q", l.lastError())
	}
	l.read(strings.NewReader("[2026-11-21 15:11:41.280][187][info][main] [a.cc:1] starting\n"))
	if l.lastError() != "" {
		t.Errorf("last error %q", l.lastError())
	}
}

func TestAdminAddress(t *testing.T) {
	t.Parallel()
	for config, want := range map[string]string{
		`admin: {address: {pipe: {path: /a.sock}}}`:                                       "unix /a.sock",
		`admin: {address: {socketAddress: {address: 127.0.0.1, portValue: 9901}}}`:        "tcp 127.0.0.1:9901",
		`{"admin": {"address": {"socket_address": {"address": "::1", "port_value": 1}}}}`: "tcp [::1]:1",
		`node: {}`: "",
		`{`:        "",
	} {
		a, err := newAdmin([]byte(config))
		got := ""
		if err == nil {
			got = a.network + " " + a.address
		}
		if got != want {
			t.Errorf("%s: %q, want %q", config, got, want)
		}
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	b := backoff{limit: 3 * time.Second}
	for _, top := range []time.Duration{200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond, 1600 * time.Millisecond, 3 * time.Second, 3 * time.Second} {
		if d := b.pause(); d < top/2 || d > top {
			t.Errorf("pause of %s, want %s to %s", d, top/2, top)
		}
	}
	b.reset()
	if d := b.pause(); d > 200*time.Millisecond {
		t.Errorf("after a reset: %s", d)
	}
}

// command runs kuma-dp's command line.
func command(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = Main(t.Context(), args, func(string) string { return "" }, strings.NewReader(""), &o, &e)
	return code, o.String(), e.String()
}

func TestCommands(t *testing.T) {
	t.Parallel()
	if code, out, _ := command(t, "version"); code != 0 || !strings.HasPrefix(out, "Kuma: ") {
		t.Errorf("version: %d %q", code, out)
	}
	if code, out, _ := command(t, "version", "-a"); code != 0 || !strings.Contains(out, "Git Commit:") {
		t.Errorf("version -a: %d %q", code, out)
	}
	if code, out, _ := command(t, "completion", "bash"); code != 0 || !strings.Contains(out, "kuma-dp") {
		t.Errorf("completion: %d", code)
	}
	if code, _, e := command(t, "run", "--log-level", "loud"); code != 1 || !strings.HasPrefix(e, "Error: --log-level: ") {
		t.Errorf("run --log-level: %d %q", code, e)
	}
	if code, _, e := command(t, "run", "--no-such-flag"); code != 1 || !strings.Contains(e, "--no-such-flag") {
		t.Errorf("an unknown flag: %d %q", code, e)
	}
	if code, _, e := command(t, "run", "--log-output-path", t.TempDir()); code != 1 || !strings.Contains(e, "--log-output-path") {
		t.Errorf("a log that can't be written: %d %q", code, e)
	}
	if code, _, e := command(t, "run", "--log-level", "off"); code != 1 || !strings.HasPrefix(e, "Error: there is no Dataplane") {
		t.Errorf("nothing to run: %d %q", code, e)
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	asked := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked++; asked < 3 {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(s.Close)
	if code, _, e := command(t, "wait", "--url", s.URL, "--check-frequency", "1ms", "--request-timeout", patience.String()); code != 0 || asked != 3 {
		t.Errorf("wait: %d %q after %d questions", code, e, asked)
	}
	asked = -1 << 30
	// It is given longer where that was too short for a first answer.
	for all := 50 * time.Millisecond; ; all *= 2 {
		code, _, e := command(t, "wait", "--url", s.URL, "--check-frequency", "5ms", "--timeout", all.String())
		if code == 1 && strings.Contains(e, fmt.Sprintf("not ready within %s: status 503: not yet", all)) {
			break
		}
		if code != 1 || all > patience {
			t.Fatalf("wait: %d %q", code, e)
		}
	}
	for _, u := range []string{"http://example.com/ready", "http://10.0.0.1/ready", "nonsense", "ftp://localhost/"} {
		if code, _, e := command(t, "wait", "--url", u); code != 1 || !strings.Contains(e, fmt.Sprintf("%q", u)) {
			t.Errorf("wait for %s: %d %q", u, code, e)
		}
	}
}

// Without --url both places are asked: whoever listens at the first counts.
func TestWaitForEither(t *testing.T) {
	t.Parallel()
	ready := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(ready.Close)
	unready := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(unready.Close)
	nobody := fmt.Sprintf("http://127.0.0.1:%d/ready", freePort(t))
	if err := wait(t.Context(), http.DefaultClient, []string{nobody, ready.URL}, time.Millisecond, patience); err != nil {
		t.Error(err)
	}
	if err := wait(t.Context(), http.DefaultClient, []string{unready.URL, ready.URL}, time.Millisecond, 100*time.Millisecond); err == nil {
		t.Error("what listens at the first place is not ready, and the second is asked")
	}
}

// A state is logged once, whatever port an attempt came from.
func TestChanges(t *testing.T) {
	var out strings.Builder
	c := changes{log: slog.New(slog.NewTextHandler(&out, nil))}
	for _, text := range []string{
		"read tcp 127.0.0.1:40001->127.0.0.1:5678: read: connection reset by peer",
		"read tcp 127.0.0.1:40002->127.0.0.1:5678: read: connection reset by peer",
		"read tcp [::1]:40003->[::1]:5678: read: connection reset by peer",
		"read tcp [::1]:40004->[::1]:5678: read: connection reset by peer",
		"EOF",
	} {
		c.warn("it is away", errors.New(text))
	}
	if n := strings.Count(out.String(), "it is away"); n != 3 {
		t.Errorf("%d lines for three states:\n%s", n, out.String())
	}
}
