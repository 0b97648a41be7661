package cp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kuma/internal/cp"
	"kuma/internal/pki"
	"kuma/test/lab"
)

// asProgram makes the test binary the program kuma-cp.
const asProgram = "TEST_AS_KUMA_CP"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(cp.Main(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// config is a configuration with free ports and an empty work directory.
func config(t *testing.T) cp.Config {
	t.Helper()
	cfg := cp.Default()
	cfg.General.WorkDir = filepath.Join(t.TempDir(), "work")
	cfg.APIServer.HTTP.Interface, cfg.APIServer.HTTPS.Interface = "127.0.0.1", "127.0.0.1"
	for _, port := range []*uint32{&cfg.APIServer.HTTP.Port, &cfg.APIServer.HTTPS.Port, &cfg.DPServer.Port, &cfg.Diagnostics.ServerPort, &cfg.MonitoringAssignmentServer.Port} {
		*port = freePort(t)
	}
	// A handshake counts as headers, and takes its time on a busy machine.
	cfg.APIServer.ReadHeaderTimeout = patience
	return cfg
}

// freePort is a port for a control plane.
func freePort(t *testing.T) uint32 { return uint32(lab.FreePort(t)) }

// run runs a control plane until the test ends, or stop is called.
func run(t *testing.T, cfg cp.Config) (stop func()) {
	t.Helper()
	stop, _ = runLogged(t, cfg)
	return stop
}

// runLogged is run, with the log.
func runLogged(t *testing.T, cfg cp.Config) (stop func(), log *watcher) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	log = &watcher{what: "msg=ready ", seen: make(chan struct{})}
	c, err := cp.New(ctx, cfg, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-log.seen:
	case <-time.After(patience):
		t.Fatal("the control plane is not ready")
	}
	return stop, log
}

// watcher is a log that tells when something was logged.
type watcher struct {
	mu   sync.Mutex
	all  bytes.Buffer
	what string
	seen chan struct{}
	once sync.Once
}

// Write is an io.Writer's.
func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all.Write(p)
	if strings.Contains(w.all.String(), w.what) {
		w.once.Do(func() { close(w.seen) })
	}
	return len(p), nil
}

func (w *watcher) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.all.String()
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

// TestAssembly: all doors are open once the control plane says that it is
// ready, and all are closed when Run has returned.
func TestAssembly(t *testing.T) {
	cfg := config(t)
	stop := run(t, cfg)
	api := fmt.Sprintf("http://localhost:%d", cfg.APIServer.HTTP.Port)
	for _, path := range []string{"/", "/meshes/default", "/zones/default", "/_resources"} {
		if status, body := get(t, api+path); status != http.StatusOK {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	for _, path := range []string{"/ready", "/healthy"} {
		if status, _ := get(t, fmt.Sprintf("http://localhost:%d%s", cfg.Diagnostics.ServerPort, path)); status != http.StatusOK {
			t.Errorf("%s: %d", path, status)
		}
	}
	stop()
	for _, port := range []uint32{cfg.APIServer.HTTP.Port, cfg.APIServer.HTTPS.Port, cfg.DPServer.Port, cfg.Diagnostics.ServerPort, cfg.MonitoringAssignmentServer.Port} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			t.Errorf("port %d is still taken: %v", port, err)
			continue
		}
		_ = l.Close()
	}
}

// TestWorkDir: what the control plane keeps is its user's alone.
func TestWorkDir(t *testing.T) {
	cfg := config(t)
	run(t, cfg)
	info, err := os.Stat(cfg.General.WorkDir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the work directory has mode %o", info.Mode().Perm())
	}
	entries, err := os.ReadDir(cfg.General.WorkDir)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", e.Name(), info.Mode().Perm())
		}
	}
	for _, name := range []string{"kuma-cp.crt", "kuma-cp.key", "kuma.db"} {
		if !names[name] {
			t.Errorf("there is no %s", name)
		}
	}
	raw, err := os.ReadFile(filepath.Join(cfg.General.WorkDir, "kuma-cp.crt"))
	if err != nil {
		t.Fatal(err)
	}
	if b, rest := pem.Decode(raw); b == nil || b.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		t.Error("kuma-cp.crt is not one certificate")
	}
}

// TestPortInUse: the error names the port and the setting, and what New had
// opened is closed: with another port it starts.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		setting string
		port    func(*cp.Config) *uint32
	}{
		{"KUMA_API_SERVER_HTTP_PORT", func(c *cp.Config) *uint32 { return &c.APIServer.HTTP.Port }},
		{"KUMA_API_SERVER_HTTPS_PORT", func(c *cp.Config) *uint32 { return &c.APIServer.HTTPS.Port }},
		{"KUMA_DP_SERVER_PORT", func(c *cp.Config) *uint32 { return &c.DPServer.Port }},
		{"KUMA_DIAGNOSTICS_SERVER_PORT", func(c *cp.Config) *uint32 { return &c.Diagnostics.ServerPort }},
		{"KUMA_MONITORING_ASSIGNMENT_SERVER_PORT", func(c *cp.Config) *uint32 { return &c.MonitoringAssignmentServer.Port }},
	} {
		t.Run(c.setting, func(t *testing.T) {
			cfg := config(t)
			cfg.APIServer.HTTP.Interface, cfg.APIServer.HTTPS.Interface = "", ""
			port := c.port(&cfg)
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", *port))
			if err != nil {
				t.Fatal(err)
			}
			_, err = cp.New(t.Context(), cfg, slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("port %d", *port)) || !strings.Contains(err.Error(), c.setting) {
				t.Errorf("error %v, want one that names port %d and %s", err, *port, c.setting)
			}
			_ = l.Close()
			run(t, cfg)
		})
	}
}

// TestSecondControlPlane: a store's file has one control plane, and the other
// is told.
func TestSecondControlPlane(t *testing.T) {
	t.Parallel()
	first := config(t)
	run(t, first)
	second := config(t)
	second.General.WorkDir = first.General.WorkDir
	_, err := cp.New(t.Context(), second, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "in use by another control plane") || !strings.Contains(err.Error(), "kuma.db") {
		t.Errorf("error %v", err)
	}
	if status, _ := get(t, fmt.Sprintf("http://localhost:%d/meshes/default", first.APIServer.HTTP.Port)); status != http.StatusOK {
		t.Errorf("the first answers %d", status)
	}
}

// TestUnusableWorkDir: whatever is wrong with the directory or its files, one
// error says what and where, and a store that is there is left as it is.
func TestUnusableWorkDir(t *testing.T) {
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, cfg *cp.Config)
		want    []string
	}{
		{"a file is in its place", func(t *testing.T, cfg *cp.Config) { write(t, cfg.General.WorkDir, "x") }, []string{"work directory", "KUMA_GENERAL_WORK_DIR"}},
		{"a damaged store", func(t *testing.T, cfg *cp.Config) {
			write(t, filepath.Join(cfg.General.WorkDir, "kuma.db"), strings.Repeat("damaged ", 9000))
		}, []string{"kuma.db", "damaged", "backup"}},
		{"an authority that is none", func(t *testing.T, cfg *cp.Config) {
			write(t, filepath.Join(cfg.General.WorkDir, "kuma-cp.crt"), "x")
			write(t, filepath.Join(cfg.General.WorkDir, "kuma-cp.key"), "x")
		}, []string{"kuma-cp.crt"}},
		{"a read-only directory", func(t *testing.T, cfg *cp.Config) {
			if runtime.GOOS != "linux" {
				t.Skip("needs a directory that is read-only for everyone")
			}
			cfg.General.WorkDir = "/sys/kernel" // not even root may create a file there
		}, []string{"/sys/kernel"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := config(t)
			c.prepare(t, &cfg)
			before, _ := os.ReadFile(filepath.Join(cfg.General.WorkDir, "kuma.db"))
			_, err := cp.New(t.Context(), cfg, slog.New(slog.DiscardHandler))
			if err == nil {
				t.Fatal("it starts")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
			if after, _ := os.ReadFile(filepath.Join(cfg.General.WorkDir, "kuma.db")); before != nil && !bytes.Equal(before, after) {
				t.Error("the store's file was changed")
			}
		})
	}
}

// TestSignals: SIGTERM ends the program with 0 and closes the store; SIGKILL
// leaves one that opens again.
func TestSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs signals")
	}
	cfg := config(t)
	start := func() (*exec.Cmd, *watcher) {
		t.Helper()
		log := &watcher{what: "msg=ready ", seen: make(chan struct{})}
		c := exec.Command(os.Args[0], "run")
		c.Stderr = log
		c.Env = []string{
			asProgram + "=1", "KUMA_GENERAL_WORK_DIR=" + cfg.General.WorkDir,
			fmt.Sprintf("KUMA_API_SERVER_HTTP_PORT=%d", cfg.APIServer.HTTP.Port), fmt.Sprintf("KUMA_API_SERVER_HTTPS_PORT=%d", cfg.APIServer.HTTPS.Port),
			fmt.Sprintf("KUMA_DP_SERVER_PORT=%d", cfg.DPServer.Port), fmt.Sprintf("KUMA_DIAGNOSTICS_SERVER_PORT=%d", cfg.Diagnostics.ServerPort),
			fmt.Sprintf("KUMA_MONITORING_ASSIGNMENT_SERVER_PORT=%d", cfg.MonitoringAssignmentServer.Port),
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Process.Kill() })
		select {
		case <-log.seen:
		case <-time.After(patience):
			t.Fatalf("not ready:\n%s", log)
		}
		return c, log
	}
	c, _ := start()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		c, log := start()
		if err := c.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		err := c.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok || err != nil {
			t.Errorf("%v: exit code %v\n%s", signal, exit, log)
		}
		if !strings.Contains(log.String(), "msg=stopped") {
			t.Errorf("%v: the log does not say that it stopped:\n%s", signal, log)
		}
	}
}

// TestLogFile: the log goes into a file that is its user's alone, where one is
// named; one that can't be written is an error before anything starts.
func TestLogFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cp.log")
	var out, err bytes.Buffer
	env := []string{"KUMA_MODE=global", "KUMA_GENERAL_WORKDIR=x"}
	if code := cp.Main(t.Context(), []string{"run", "--log-output-path", path}, env, &out, &err); code != 1 || strings.Contains(err.String(), "WARN") {
		t.Errorf("exit code %d: %s", code, err.String())
	}
	raw, readErr := os.ReadFile(path)
	if readErr != nil || !strings.Contains(string(raw), "KUMA_GENERAL_WORKDIR is not known; the nearest known one is KUMA_GENERAL_WORK_DIR") {
		t.Errorf("the file has %q, %v", raw, readErr)
	}
	if info, statErr := os.Stat(path); statErr != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v %v", info, statErr)
	}
	err.Reset()
	if code := cp.Main(t.Context(), []string{"run", "--log-output-path", filepath.Join(dir, "none", "cp.log")}, env, &out, &err); code != 1 || !strings.Contains(err.String(), "Error: --log-output-path: ") {
		t.Errorf("exit code %d: %s", code, err.String())
	}
}

// TestSettings: the configuration without a setting can be served, and
// each setting that is wrong is named with its key.
func TestSettings(t *testing.T) {
	if _, warnings, err := cp.Load("", nil); err != nil || len(warnings) > 0 {
		t.Fatalf("defaults: %v %q", err, warnings)
	}
	for setting, want := range map[string]string{
		"KUMA_MODE=global":                                       `mode: "global" is not served`,
		"KUMA_ENVIRONMENT=kubernetes":                            `environment: "kubernetes" is not served`,
		"KUMA_STORE_TYPE=etcd":                                   `store.type: "etcd" is not served`,
		"KUMA_MULTIZONE_ZONE_NAME=" + strings.Repeat("z", 64):    "multizone.zone.name",
		"KUMA_DP_SERVER_PORT=0":                                  "dpServer.port: 0 is not a port",
		"KUMA_API_SERVER_MAX_CONNECTIONS=0":                      "apiServer.maxConnections: 0 is too few",
		"KUMA_DP_SERVER_MAX_CONNECTIONS=-1":                      "dpServer.maxConnections: -1 is too few",
		"KUMA_DP_SERVER_MAX_CONNECTIONS_PER_ADDRESS=1":           "dpServer.maxConnectionsPerAddress: 1 is too few",
		"KUMA_DIAGNOSTICS_SERVER_PORT=65536":                     "diagnostics.serverPort: 65536 is not a port",
		"KUMA_API_SERVER_HTTPS_REQUIRE_CLIENT_CERT=true":         "KUMA_API_SERVER_HTTPS_REQUIRE_CLIENT_CERT: needs to know whose certificates are taken",
		"KUMA_API_SERVER_AUTHN_TYPE=adminClientCerts":            "apiServer.auth.clientCertsDir: is needed where apiServer.authn.type is adminClientCerts",
		"KUMA_DP_SERVER_AUTHN_DP_PROXY_TYPE=serviceAccountToken": `dpServer.authn.dpProxy.type: there is no authentication named "serviceAccountToken"`,
		"KUMA_ACCESS_ANONYMOUS=open":                             `access.anonymous: "open"`,
		"KUMA_GENERAL_TLS_MAX_VERSION=TLSv1_1":                   "KUMA_GENERAL_TLS_MAX_VERSION: unsupported tls version: TLSv1_1",
		"KUMA_GENERAL_TLS_CIPHER_SUITES=RC4":                     `KUMA_GENERAL_TLS_CIPHER_SUITES: there is no cipher suite "RC4"`,
	} {
		_, _, err := cp.Load("", []string{setting})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s gives %v, want %q", setting, err, want)
		}
	}
}

// TestClusterID: a cluster keeps its name over restarts, also where its
// certificates are new.
func TestClusterID(t *testing.T) {
	cfg := config(t)
	dir := cfg.General.WorkDir
	id := func() string {
		defer run(t, cfg)()
		_, body := get(t, fmt.Sprintf("http://127.0.0.1:%d/", cfg.APIServer.HTTP.Port))
		var index struct{ ClusterID string }
		if err := json.Unmarshal([]byte(body), &index); err != nil {
			t.Fatal(err)
		}
		return index.ClusterID
	}
	first := id()
	for _, f := range []string{pki.CAFile, pki.CAKeyFile, pki.ServerFile, pki.ServerKeyFile} {
		if err := os.Remove(filepath.Join(dir, f)); err != nil {
			t.Fatal(err)
		}
	}
	if again := id(); again != first || first == "" {
		t.Errorf("the cluster is %q, and was %q", again, first)
	}
}
