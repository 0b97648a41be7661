package cp_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kuma/internal/conf"
	"kuma/internal/cp"
	"kuma/internal/cp/cptest"
	"kuma/internal/rest"
	"kuma/test/lab"
	"kuma/test/mitm"
	"kuma/test/postgres"
)

// database is a PostgreSQL server with TLS, and what its clients need.
type database struct {
	*postgres.Server
	dir string
	// ca signed the certificates of the server, for localhost alone, and of its
	// clients; stranger signed nothing.
	ca, stranger     *mitm.Authority
	caFile, otherCAs string
}

// pg starts a server with these lines of pg_hba.conf, by the seed's form.
func pg(t *testing.T, hba ...string) *database {
	t.Helper()
	d := &database{dir: t.TempDir()}
	var err error
	for _, a := range []**mitm.Authority{&d.ca, &d.stranger} {
		if *a, err = mitm.NewAuthority("database", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	d.caFile, d.otherCAs = d.write(t, "ca.crt", d.ca.PEM()), d.write(t, "other.crt", d.stranger.PEM())
	cert, key := d.pair(t, d.ca, "server", func(*x509.Certificate) {})
	d.Server = postgres.Start(t, postgres.Options{HBA: hba, CertFile: cert, KeyFile: key, CAFile: d.caFile})
	return d
}

func (d *database) write(t *testing.T, name string, text []byte) string {
	t.Helper()
	file := filepath.Join(d.dir, name)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// pair writes a pair for localhost that an authority signs; change alters it.
func (d *database) pair(t *testing.T, by *mitm.Authority, name string, change func(*x509.Certificate)) (cert, key string) {
	t.Helper()
	p, err := by.Leaf(change)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(p.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return d.write(t, name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate[0]})),
		d.write(t, name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// forClient makes a template a client's, called by that name.
func forClient(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.Subject.CommonName, c.DNSNames, c.ExtKeyUsage = name, nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
}

// in is a configuration with a database of this server; it verifies it fully.
func (d *database) in(t *testing.T, name string) cp.Config {
	t.Helper()
	cfg := config(t)
	cfg.Store.Type = "postgres"
	p := &cfg.Store.Postgres
	p.Host, p.Port, p.User, p.Password, p.DBName = "localhost", uint32(d.Port), postgres.User, conf.NewSecret(postgres.Password), name
	p.TLS = cp.PostgresTLS{Mode: "verifyFull", CAPath: d.caFile}
	return cfg
}

// asEnv is a configuration as variables of the program, as far as these tests
// change it.
func asEnv(cfg cp.Config) []string {
	p := cfg.Store.Postgres
	env := []string{
		"KUMA_GENERAL_WORK_DIR=" + cfg.General.WorkDir, "KUMA_STORE_TYPE=" + cfg.Store.Type, "KUMA_STORE_POSTGRES_HOST=" + p.Host,
		"KUMA_STORE_POSTGRES_USER=" + p.User, "KUMA_STORE_POSTGRES_PASSWORD=" + p.Password.Reveal(), "KUMA_STORE_POSTGRES_DB_NAME=" + p.DBName,
		"KUMA_STORE_POSTGRES_TLS_MODE=" + p.TLS.Mode, "KUMA_STORE_POSTGRES_TLS_CA_PATH=" + p.TLS.CAPath,
		"KUMA_API_SERVER_HTTP_INTERFACE=127.0.0.1", "KUMA_API_SERVER_HTTPS_INTERFACE=127.0.0.1",
	}
	for name, port := range map[string]uint32{
		"KUMA_STORE_POSTGRES_PORT": p.Port, "KUMA_API_SERVER_HTTP_PORT": cfg.APIServer.HTTP.Port, "KUMA_API_SERVER_HTTPS_PORT": cfg.APIServer.HTTPS.Port, "KUMA_DP_SERVER_PORT": cfg.DPServer.Port,
		"KUMA_DIAGNOSTICS_SERVER_PORT": cfg.Diagnostics.ServerPort, "KUMA_MONITORING_ASSIGNMENT_SERVER_PORT": cfg.MonitoringAssignmentServer.Port,
	} {
		env = append(env, fmt.Sprintf("%s=%d", name, port))
	}
	return env
}

// program runs a command of kuma-cp to its end.
func program(t *testing.T, cfg cp.Config, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, problem bytes.Buffer
	code = cp.Main(t.Context(), args, asEnv(cfg), &out, &problem)
	return code, out.String(), problem.String()
}

// migrated makes a database with tables and returns its name.
func (d *database) migrated(t *testing.T) string {
	t.Helper()
	name := d.Database()
	if code, _, problem := program(t, d.in(t, name), "migrate", "up"); code != 0 {
		t.Fatal(problem)
	}
	return name
}

// starts runs a control plane until it is ready, and ends it; or it returns why
// there is none.
func starts(t *testing.T, cfg cp.Config) (report rest.TLSReport, log string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	w := &watcher{what: "msg=ready ", seen: make(chan struct{})}
	c, err := cp.New(ctx, cfg, slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		return report, w.String(), err
	}
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	select {
	case <-w.seen:
		report = tlsReportOf(t, cfg)
	case <-time.After(patience):
		t.Errorf("not ready:\n%s", w)
	}
	cancel()
	return report, w.String(), <-done
}

func tlsReportOf(t *testing.T, cfg cp.Config) (report rest.TLSReport) {
	t.Helper()
	status, body := call(t, cfg, "GET", "/tls-report", "")
	if err := json.Unmarshal(body, &report); err != nil || status != http.StatusOK {
		t.Errorf("the report: %d %s %v", status, body, err)
	}
	return report
}

// TestPostgresTLS: each mode takes and refuses what seed 2 says of it, with a
// pg_hba.conf as it prints. What is refused gets no password.
func TestPostgresTLS(t *testing.T) {
	t.Parallel()
	db := pg(t, "hostssl all             all             0.0.0.0/0               password")
	name := db.migrated(t)
	const noName, noCA = "KUMA_STORE_POSTGRES_HOST", "KUMA_STORE_POSTGRES_TLS_CA_PATH"
	for _, c := range []struct {
		mode, ca, host string
		refused        string // a part of the reason; empty: it starts
		verified       string
	}{
		{"disable", "", "localhost", "KUMA_STORE_POSTGRES_TLS_MODE", ""},
		{"verifyNone", "", "localhost", "", "nothing"},
		{"verifyNone", "", "127.0.0.1", "", "nothing"},
		{"verifyCa", db.caFile, "localhost", "", "authorities of " + db.caFile + ", whatever the name"},
		{"verifyCa", db.caFile, "127.0.0.1", "", "authorities of " + db.caFile + ", whatever the name"},
		{"verifyCa", db.otherCAs, "localhost", noCA, ""},
		{"verifyCa", db.otherCAs, "127.0.0.1", noCA, ""},
		{"verifyFull", db.caFile, "localhost", "", "authorities of " + db.caFile + ", with the name localhost"},
		{"verifyFull", db.caFile, "127.0.0.1", noName, ""},
		{"verifyFull", db.otherCAs, "localhost", noCA, ""},
		{"verifyFull", db.otherCAs, "127.0.0.1", noName, ""}, // the first that is found
	} {
		for _, noSNI := range []bool{false, true} {
			what := fmt.Sprintf("%s, %s, %s, SNI %t", c.mode, filepath.Base(c.ca), c.host, !noSNI)
			cfg := db.in(t, name)
			cfg.Store.Postgres.Host, cfg.Store.Postgres.TLS = c.host, cp.PostgresTLS{Mode: c.mode, CAPath: c.ca, DisableSSLSNI: noSNI}
			report, log, err := starts(t, cfg)
			if (err == nil) != (c.refused == "") || err != nil && (!strings.Contains(err.Error(), c.refused) || strings.Contains(err.Error(), postgres.Password)) {
				t.Errorf("%s: %v, want one with %q", what, err, c.refused)
			}
			if strings.Contains(log, postgres.Password) {
				t.Errorf("%s: the log shows the password", what)
			}
			if c.refused != "" {
				continue
			}
			if len(report.Database) != 1 || report.Store != "postgres" {
				t.Errorf("%s: %+v", what, report.Database)
				continue
			}
			d := report.Database[0]
			if d.Version != "TLS 1.3" || d.Group == "" || d.Connections < 1 || d.VerifiedBy != c.verified || d.Certificate == nil || d.Certificate.Issuer != "CN=database" ||
				d.Address != net.JoinHostPort(c.host, fmt.Sprint(db.Port)) || d.Name != name || d.User != postgres.User {
				t.Errorf("%s: %+v", what, d)
			}
			if warned := strings.Contains(log, `level=WARN msg="the store's server`); warned {
				t.Errorf("%s: a warning, though the server is on this machine", what)
			}
		}
	}
}

// TestPostgresClientCertificate: pg_hba.conf's "cert" needs no password but a
// certificate with the user's name, and one that is replaced counts for the next
// connection.
func TestPostgresClientCertificate(t *testing.T) {
	t.Parallel()
	db := pg(t, "hostssl all all 0.0.0.0/0 cert")
	cert, key := db.pair(t, db.ca, "client", forClient(postgres.User))
	other, otherKey := db.pair(t, db.ca, "other", forClient("somebody"))
	strange, strangeKey := db.pair(t, db.stranger, "strange", forClient(postgres.User))
	name := db.Database()
	with := func(cert, key string) cp.Config {
		cfg := db.in(t, name)
		cfg.Store.Postgres.Password = conf.Secret{}
		cfg.Store.Postgres.TLS.CertPath, cfg.Store.Postgres.TLS.KeyPath = cert, key
		return cfg
	}
	log := new(bytes.Buffer)
	env := append(asEnv(with(cert, key)), "KUMA_STORE_POSTGRES_TLS_CERT_PATH="+cert, "KUMA_STORE_POSTGRES_TLS_KEY_PATH="+key)
	if code := cp.Main(t.Context(), []string{"migrate", "up"}, env, log, log); code != 0 {
		t.Fatal(log)
	}
	for what, c := range map[string]struct{ cert, key, want string }{
		"none":              {"", "", "KUMA_STORE_POSTGRES_TLS_CERT_PATH"},
		"another's name":    {other, otherKey, "common name"},
		"another authority": {strange, strangeKey, "KUMA_STORE_POSTGRES_TLS_CERT_PATH"},
		"another's key":     {cert, otherKey, "is not the key of certificate file"},
	} {
		if _, _, err := starts(t, with(c.cert, c.key)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want one with %q", what, err, c.want)
		}
	}

	cfg := with(cert, key)
	cfg.General.TLSReloadInterval = 20 * time.Millisecond
	_, logged := runLogged(t, cfg)
	meshed(t, cfg)
	shown := func() string {
		for _, c := range tlsReportOf(t, cfg).Certificates {
			if c.Name == "store-postgres" && c.File == cert {
				return c.NotAfter.Format(time.RFC3339)
			}
		}
		return "nothing"
	}
	before := shown()
	if _, page := get(t, fmt.Sprintf("http://127.0.0.1:%d/metrics", cfg.Diagnostics.ServerPort)); !strings.Contains(page, `kuma_certificate_expiry_timestamp_seconds{certificate="store-postgres",`) ||
		!strings.Contains(page, `kuma_certificate_expiry_timestamp_seconds{certificate="store-postgres-ca",`) ||
		!strings.Contains(page, `store_postgres_connections{type="open_connections",`) || !strings.Contains(page, "store_postgres_connections_max{") {
		t.Errorf("metrics are missing:\n%s", page)
	}
	// A bad one is refused, and the old goes on; a good one is taken over.
	good, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	db.write(t, "client.crt", []byte("rubbish"))
	eventually(t, "the bad file is told", func() bool {
		return strings.Contains(logged.String(), "a changed certificate file is refused") && strings.Contains(logged.String(), "KUMA_STORE_POSTGRES_TLS_CERT_PATH")
	})
	db.Restart()
	wrote := func(name string) func() bool {
		return func() bool {
			status, _ := call(t, cfg, "PUT", "/meshes/default/dataplanes/"+name, cptest.Dataplane("default", name, "web", "web"))
			return status == http.StatusCreated || status == http.StatusOK
		}
	}
	eventually(t, "it writes again with the old pair", wrote("one"))
	if got := shown(); got != before {
		t.Errorf("it shows %s, not %s", got, before)
	}
	db.write(t, "client.crt", good)
	db.pair(t, db.ca, "client", func(c *x509.Certificate) {
		forClient(postgres.User)(c)
		c.NotAfter = time.Now().Add(48 * time.Hour)
	})
	eventually(t, "the new pair is taken over", func() bool { return shown() != before })
	db.Restart()
	eventually(t, "it writes again with the new pair", wrote("two"))
}

// TestPostgresMigrate is the contract's command.
func TestPostgresMigrate(t *testing.T) {
	t.Parallel()
	db := pg(t)
	cfg := db.in(t, db.Database())
	if code, _, problem := program(t, cfg, "run"); code != 1 || !strings.Contains(problem, "kuma-cp migrate up") {
		t.Errorf("without tables: %d %s", code, problem)
	}
	version := conf.Build().Version
	for _, want := range []string{"DB has been migrated for Kuma " + version + "\n", "DB has already been migrated for Kuma " + version + "\n"} {
		if code, out, problem := program(t, cfg, "migrate", "up"); code != 0 || out != want {
			t.Errorf("%d %q %s, want %q", code, out, problem, want)
		}
	}
	file := db.write(t, "kuma-cp.yaml", fmt.Appendf(nil, "store: {type: postgres, postgres: {host: localhost, port: %d, user: %s, password: %s, dbName: %s, tls: {mode: verifyFull, caPath: %s}}}",
		db.Port, postgres.User, postgres.Password, cfg.Store.Postgres.DBName, db.caFile))
	var out, problem bytes.Buffer
	if code := cp.Main(t.Context(), []string{"migrate", "up", "-c", file}, nil, &out, &problem); code != 0 || !strings.Contains(out.String(), "already") {
		t.Errorf("from a file: %d %s %s", code, &out, &problem)
	}
	cfg.Store.Postgres.Password = conf.NewSecret("not-the-password")
	code, _, said := program(t, cfg, "migrate", "up")
	if code != 1 || !strings.Contains(said, "KUMA_STORE_POSTGRES_PASSWORD") || strings.Contains(said, "not-the-password") {
		t.Errorf("a wrong password: %d %s", code, said)
	}
	cfg.Store.Type = "memory"
	if code, _, said := program(t, cfg, "migrate", "up"); code != 1 || !strings.Contains(said, `there is nothing to migrate: store.type is "memory"`) {
		t.Errorf("in memory: %d %s", code, said)
	}
}

// TestPostgresKeeps: what was written is there after a restart, in another work
// directory.
func TestPostgresKeeps(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	first := db.in(t, name)
	stop := run(t, first)
	meshed(t, first)
	if status, body := call(t, first, "PUT", "/meshes/other", `{"type":"Mesh","name":"other"}`); status != http.StatusCreated {
		t.Fatal(status, string(body))
	}
	_, token := call(t, first, "GET", "/globalsecrets/admin-user-token", "")
	_, was := call(t, first, "GET", "/", "")
	stop()
	second := db.in(t, name)
	run(t, second)
	if status, body := call(t, second, "GET", "/meshes/other", ""); status != http.StatusOK {
		t.Error(status, string(body))
	}
	if _, again := call(t, second, "GET", "/globalsecrets/admin-user-token", ""); !bytes.Equal(token, again) {
		t.Errorf("another token: %s %s", token, again)
	}
	var before, after struct{ ClusterID string }
	_, is := call(t, second, "GET", "/", "")
	if err := errors.Join(json.Unmarshal(was, &before), json.Unmarshal(is, &after)); err != nil || before != after || before.ClusterID == "" {
		t.Errorf("another cluster: %s %s %v", was, is, err)
	}
	status, body := call(t, second, "GET", "/config", "")
	var shown struct {
		Store struct {
			Postgres struct{ User, Password string }
		}
	}
	if err := json.Unmarshal(body, &shown); err != nil || status != http.StatusOK || shown.Store.Postgres.Password != "*****" || shown.Store.Postgres.User != postgres.User || bytes.Contains(body, []byte(postgres.Password)) {
		t.Errorf("%d %s %v", status, body, err)
	}
}

// TestPostgresStandBy: a second control plane waits, says so, and takes over; a
// proxy of the first is served by the second, which has the same authority.
func TestPostgresStandBy(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	first, second := db.in(t, name), db.in(t, name)
	first.General.TLSCAStore, second.General.TLSCAStore = "store", "store"
	first.XDSServer.ReturnDelay, second.XDSServer.ReturnDelay = 2*time.Second, 2*time.Second
	stop := run(t, first)
	meshed(t, first)
	ca, err := os.ReadFile(filepath.Join(first.General.WorkDir, "kuma-cp.crt"))
	if err != nil {
		t.Fatal(err)
	}
	_, body := call(t, first, "POST", "/tokens/dataplane", `{"mesh":"default","name":"web"}`)
	join := func(cfg cp.Config) *cptest.LinkProxy {
		t.Helper()
		p := cptest.NewLinkProxy(cptest.LinkConfig{
			Address: fmt.Sprintf("127.0.0.1:%d", cfg.DPServer.Port), CA: ca, Token: strings.TrimSpace(string(body)), Mesh: "default", Name: "web", Dataplane: cptest.Dataplane("default", "web", "web"),
		})
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := p.Connect(ctx); err != nil {
			t.Fatal(err)
		}
		return p
	}
	proxy := join(first)

	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	defer cancel()
	log := &watcher{what: "this one stands by", seen: make(chan struct{})}
	done := make(chan error, 1)
	go func() {
		c, err := cp.New(ctx, second, slog.New(slog.NewTextHandler(log, nil)))
		if err == nil {
			err = c.Run(ctx)
		}
		done <- err
	}()
	select {
	case <-log.seen:
	case err := <-done:
		t.Fatal(err)
	case <-time.After(patience):
		t.Fatalf("it does not say that it stands by:\n%s", log)
	}
	diagnostics := fmt.Sprintf("http://127.0.0.1:%d", second.Diagnostics.ServerPort)
	for path, want := range map[string]int{"/healthy": 200, "/ready": 503, "/metrics": 200, "/logging": 404} {
		if status, said := get(t, diagnostics+path); status != want {
			t.Errorf("%s while it stands by: %d %s", path, status, said)
		}
	}
	if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", second.DPServer.Port)); err == nil {
		_ = c.Close()
		t.Error("proxies can connect to one that stands by")
	}

	proxy.Close()
	stop()
	eventually(t, "the second serves", func() bool { return strings.Contains(log.String(), "msg=ready ") })
	again, err := os.ReadFile(filepath.Join(second.General.WorkDir, "kuma-cp.crt"))
	if err != nil || !bytes.Equal(ca, again) {
		t.Errorf("another authority: %v\n%s%s", err, ca, again)
	}
	join(second).Close()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestPostgresUnfit: one that could not serve says so, and does not stand by to
// find out when it is needed.
func TestPostgresUnfit(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	run(t, db.in(t, name))
	cert, key := db.pair(t, db.ca, "unfit", nil)
	pair, missing := cp.ServerTLS{TLSCertFile: cert, TLSKeyFile: key}, cp.ServerTLS{TLSCertFile: "none.crt", TLSKeyFile: "none.key"}
	held, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = held.Close() }()
	taken := uint32(held.Addr().(*net.TCPAddr).Port)
	clients := t.TempDir()
	if err := os.Symlink(db.caFile, filepath.Join(clients, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	public := func(c *cp.Config) *cp.AdminPublic {
		p := &c.AdminServer.Public
		c.AdminServer.Local.Port = freePort(t)
		p.Enabled, p.Interface, p.TLSCertFile, p.TLSKeyFile, p.ClientCertsDir = true, "127.0.0.1", cert, key, clients
		return p
	}
	for want, change := range map[string]func(*cp.Config){
		"KUMA_DP_SERVER_TLS_CERT_FILE":                    func(c *cp.Config) { c.DPServer.ServerTLS = missing },
		"KUMA_API_SERVER_HTTPS_TLS_CERT_FILE":             func(c *cp.Config) { c.APIServer.HTTPS.ServerTLS = missing },
		"KUMA_API_SERVER_HTTPS_TLS_CA_FILE":               func(c *cp.Config) { c.APIServer.HTTPS.TLSCAFile = "none.crt" },
		"KUMA_API_SERVER_AUTH_CLIENT_CERTS_DIR":           func(c *cp.Config) { c.APIServer.Auth.ClientCertsDir = "none" },
		"KUMA_ADMIN_SERVER_PUBLIC_TLS_CERT_FILE":          func(c *cp.Config) { p := public(c); p.TLSCertFile, p.TLSKeyFile = "none.crt", "none.key" },
		"KUMA_ADMIN_SERVER_PUBLIC_CLIENT_CERTS_DIR":       func(c *cp.Config) { public(c).ClientCertsDir = "none" },
		"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_CERT_FILE": func(c *cp.Config) { m := &c.MonitoringAssignmentServer; m.TLSEnabled, m.ServerTLS = true, missing },
		"KUMA_MONITORING_ASSIGNMENT_SERVER_TLS_CA_FILE": func(c *cp.Config) {
			m := &c.MonitoringAssignmentServer
			m.TLSEnabled, m.ServerTLS, m.TLSCAFile = true, pair, "none.crt"
		},
		"KUMA_DIAGNOSTICS_TLS_CERT_FILE": func(c *cp.Config) { c.Diagnostics.TLSEnabled, c.Diagnostics.ServerTLS = true, missing },
		"kuma-cp.crt": func(c *cp.Config) {
			if err := errors.Join(os.MkdirAll(c.General.WorkDir, 0o700), os.WriteFile(filepath.Join(c.General.WorkDir, "kuma-cp.crt"), []byte("rubbish"), 0o600), os.WriteFile(filepath.Join(c.General.WorkDir, "kuma-cp.key"), []byte("rubbish"), 0o600)); err != nil {
				t.Fatal(err)
			}
		},
		"apiServer.corsAllowedDomains":           func(c *cp.Config) { c.APIServer.CORSAllowedDomains = []string{"("} },
		"KUMA_DP_SERVER_PORT":                    func(c *cp.Config) { c.DPServer.Port = taken },
		"KUMA_API_SERVER_HTTP_PORT":              func(c *cp.Config) { c.APIServer.HTTP.Port = taken },
		"KUMA_API_SERVER_HTTPS_PORT":             func(c *cp.Config) { c.APIServer.HTTPS.Port = taken },
		"KUMA_ADMIN_SERVER_LOCAL_PORT":           func(c *cp.Config) { c.AdminServer.Local.Port = taken },
		"KUMA_ADMIN_SERVER_PUBLIC_PORT":          func(c *cp.Config) { public(c).Port = taken },
		"KUMA_MONITORING_ASSIGNMENT_SERVER_PORT": func(c *cp.Config) { c.MonitoringAssignmentServer.Port = c.DPServer.Port },
		"KUMA_DIAGNOSTICS_SERVER_PORT":           func(c *cp.Config) { c.Diagnostics.TLSEnabled, c.Diagnostics.ServerPort = true, taken },
	} {
		unfit := db.in(t, name)
		change(&unfit)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		log := &watcher{what: "this one stands by", seen: make(chan struct{})}
		done := make(chan error, 1)
		go func() {
			_, err := cp.New(ctx, unfit, slog.New(slog.NewTextHandler(log, nil)))
			done <- err
		}()
		select {
		case <-log.seen:
			t.Errorf("%s: it stands by", want)
			cancel()
			<-done
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want one with %s", err, want)
			}
		}
		cancel()
	}
}

// TestPostgresOwnAuthority: that a control plane's authority is its own is said
// where it is so, and not where others on the database get the same.
func TestPostgresOwnAuthority(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	cfg := db.in(t, name)
	const alone, taken = "in the work directory alone", "the authority was taken over from the store"
	for _, c := range []struct {
		what, keep string
		fresh      bool // an empty work directory
		want       []string
	}{
		{"at first", "file", true, []string{alone}},
		{"again", "file", false, []string{alone}},
		{"from the store", "store", true, nil},
		{"no longer from the store", "file", true, []string{taken}},
		{"both have it", "file", false, nil},
	} {
		if c.fresh {
			cfg.General.WorkDir = filepath.Join(t.TempDir(), "work")
		}
		cfg.General.TLSCAStore = c.keep
		_, log, err := starts(t, cfg)
		if err != nil {
			t.Fatal(c.what, err)
		}
		for _, said := range []string{alone, taken} {
			if strings.Contains(log, said) != slices.Contains(c.want, said) {
				t.Errorf("%s: %q is said or not:\n%s", c.what, said, log)
			}
		}
	}
}

// TestPostgresStandByWithTLS: where diagnostics have TLS, one that stands by
// answers with a pair of files; the control plane's own certificate may be in the
// store, and so the port opens later, which is said.
func TestPostgresStandByWithTLS(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	run(t, db.in(t, name))
	cert, key := db.pair(t, db.ca, "diagnostics", nil)
	for what, pair := range map[string]cp.ServerTLS{"with a pair": {TLSCertFile: cert, TLSKeyFile: key}, "without": {}} {
		cfg := db.in(t, name)
		cfg.Diagnostics.TLSEnabled, cfg.Diagnostics.ServerTLS = true, pair
		ctx, cancel := context.WithCancel(t.Context())
		log := &watcher{what: "this one stands by", seen: make(chan struct{})}
		done := make(chan error, 1)
		go func() {
			_, err := cp.New(ctx, cfg, slog.New(slog.NewTextHandler(log, nil)))
			done <- err
		}()
		select {
		case <-log.seen:
		case err := <-done:
			t.Fatal(what, err)
		case <-time.After(patience):
			t.Fatalf("%s: it does not stand by:\n%s", what, log)
		}
		roots := x509.NewCertPool()
		roots.AddCert(db.ca.Cert)
		web := &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
		resp, err := web.Get(fmt.Sprintf("https://localhost:%d/healthy", cfg.Diagnostics.ServerPort))
		if err == nil {
			_ = resp.Body.Close()
		}
		if answers := err == nil && resp.StatusCode == http.StatusOK; answers != (pair.TLSCertFile != "") || answers == strings.Contains(log.String(), "the diagnostics port is closed until this control plane serves") {
			t.Errorf("%s: %v\n%s", what, err, log)
		}
		cancel()
		if err := <-done; err == nil {
			t.Errorf("%s: it serves", what)
		}
	}
}

// TestPostgresStandByEnds: SIGTERM ends one that stands by at once, and not as a
// failure; what it waited for is untouched.
func TestPostgresStandByEnds(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	first, second := db.in(t, name), db.in(t, name)
	run(t, first)
	log := &watcher{what: "this one stands by", seen: make(chan struct{})}
	c := exec.Command(os.Args[0], "run")
	c.Stderr, c.Env = log, append(asEnv(second), asProgram+"=1")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill() })
	select {
	case <-log.seen:
	case <-time.After(patience):
		t.Fatalf("it does not stand by:\n%s", log)
	}
	late := time.AfterFunc(patience, func() { _ = c.Process.Kill() })
	defer late.Stop()
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil || strings.Contains(log.String(), "Error:") || !strings.Contains(log.String(), "stopped before it served") {
		t.Errorf("%v\n%s", err, log)
	}
	if status, _ := get(t, fmt.Sprintf("http://127.0.0.1:%d/ready", first.Diagnostics.ServerPort)); status != http.StatusOK {
		t.Errorf("the first is not ready: %d", status)
	}
}

// TestPostgresLost: whose database another control plane has taken ends, with
// the reason.
func TestPostgresLost(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	cfg := db.in(t, name)
	log := &watcher{what: "msg=ready ", seen: make(chan struct{})}
	c, err := cp.New(t.Context(), cfg, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Run(t.Context()) }()
	select {
	case <-log.seen:
	case <-time.After(patience):
		t.Fatalf("not ready:\n%s", log)
	}
	db.Exec(name, "update mesh_state set holder = 'another', instance = 'cp-2', since = now()")
	db.Exec(name, "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()", name)
	select {
	case err := <-done:
		const reason = `another control plane, \"cp-2\", has taken over`
		if err == nil || !strings.Contains(err.Error(), strings.ReplaceAll(reason, `\`, "")) || !strings.HasPrefix(err.Error(), "this control plane ") {
			t.Errorf("%v", err)
		}
		if all := log.String(); strings.Count(all, reason) != 1 || strings.Contains(all, "a part of the control plane failed") {
			t.Errorf("the reason is not said once:\n%s", all)
		}
	case <-time.After(patience):
		t.Fatalf("it goes on:\n%s", log)
	}
}

// TestPostgresCutOff: a control plane that has been without its database for so long
// that another one may serve is not ready, and does not lead, until it is back.
func TestPostgresCutOff(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it waits for half a minute")
	}
	db := pg(t)
	at := fmt.Sprint("127.0.0.1:", lab.FreePort(t))
	wire := func() *lab.Relay {
		relay, err := lab.NewRelay(at, fmt.Sprint("127.0.0.1:", db.Port))
		if err != nil {
			t.Fatal(err)
		}
		return relay
	}
	relay := wire()
	cfg := db.in(t, db.migrated(t))
	cfg.Store.Postgres.Port = uint32(relay.Port())
	run(t, cfg)
	diagnostics := fmt.Sprintf("http://127.0.0.1:%d", cfg.Diagnostics.ServerPort)
	soon := func(ready int, says, leader string) {
		t.Helper()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(2 * patience); ; <-tick.C {
			code, said := get(t, diagnostics+"/ready")
			_, metrics := get(t, diagnostics+"/metrics")
			if code == ready && strings.Contains(said, says) && strings.Contains(metrics, "\nleader{zone=\"default\"} "+leader+"\n") {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("ready %d %q, want %d %q, and leader %s", code, said, ready, says, leader)
			}
		}
	}
	soon(http.StatusOK, "", "1")
	relay.Close()
	soon(http.StatusServiceUnavailable, "cut off from its store for ", "0")
	if code, body := call(t, cfg, "GET", "/meshes", ""); code != http.StatusOK {
		t.Errorf("reading meanwhile: %d %s", code, body)
	}
	relay = wire()
	defer relay.Close()
	soon(http.StatusOK, "", "1")
}

// TestPostgresOnTheWire is HRD-31 for the store: with verifyFull, nothing of what
// is kept, nor the password, can be read on the way; with disable, it can, so
// the listening is known to hear.
func TestPostgresOnTheWire(t *testing.T) {
	t.Parallel()
	db := pg(t, "host all all 0.0.0.0/0 password")
	for mode, readable := range map[string]bool{"verifyFull": false, "verifyCa": false, "verifyNone": false, "disable": true} {
		t.Run(mode, func(t *testing.T) {
			relay, err := lab.NewRelay("127.0.0.1:0", fmt.Sprint("127.0.0.1:", db.Port))
			if err != nil {
				t.Fatal(err)
			}
			defer relay.Close()
			cfg := db.in(t, db.migrated(t))
			cfg.Store.Postgres.Port, cfg.Store.Postgres.TLS.Mode = uint32(relay.Port()), mode
			run(t, cfg)
			meshed(t, cfg)
			const secret = "planted-value-of-a-secret-in-the-database"
			data := base64.StdEncoding.EncodeToString([]byte(secret))
			if status, body := call(t, cfg, "PUT", "/global-secrets/planted", `{"type":"GlobalSecret","name":"planted","data":"`+data+`"}`); status != http.StatusCreated {
				t.Fatal(status, string(body))
			}
			planted := leaks{}
			planted.plant("the secret", []byte(secret))
			planted.plant("the password", []byte(postgres.Password))
			planted.plant("a statement", []byte("mesh_resources"))
			heard, bytes := map[string]bool{}, 0
			for _, c := range relay.Conversations() {
				bytes += len(c.Sent) + len(c.Answered)
				for _, what := range planted.find(string(c.Sent) + "\n" + string(c.Answered)) {
					what, _, _ = strings.Cut(what, ",")
					heard[what] = true
				}
			}
			if bytes < 10_000 {
				t.Errorf("only %d bytes went over the wire", bytes)
			}
			for _, what := range []string{"the secret", "the password", "a statement"} {
				if heard[what] != readable {
					t.Errorf("%s can be read: %t", what, heard[what])
				}
			}
		})
	}
}

// TestPostgresTLSIsNotDroppedTo: a server that says that it has no TLS, as one in
// the middle may, gets nothing in clear.
func TestPostgresTLSIsNotDroppedTo(t *testing.T) {
	t.Parallel()
	db := pg(t)
	name := db.migrated(t)
	for _, mode := range []string{"verifyNone", "verifyCa", "verifyFull"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		said := make(chan []byte, 16)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					close(said)
					return
				}
				_ = c.SetDeadline(time.Now().Add(patience))
				b := make([]byte, 1024)
				n, _ := c.Read(b)
				_, _ = c.Write([]byte("N"))
				m, _ := c.Read(b[n:])
				said <- b[:n+m]
				_ = c.Close()
			}
		}()
		cfg := db.in(t, name)
		cfg.Store.Postgres.Port, cfg.Store.Postgres.TLS.Mode = uint32(l.Addr().(*net.TCPAddr).Port), mode
		if _, _, err := starts(t, cfg); err == nil || !strings.Contains(err.Error(), "TLS") {
			t.Errorf("%s: %v", mode, err)
		}
		_ = l.Close()
		connections := 0
		for heard := range said {
			connections++
			if len(heard) != 8 { // the request for TLS, and no more
				t.Errorf("%s: it said %q", mode, heard)
			}
		}
		if connections == 0 {
			t.Errorf("%s: it did not come", mode)
		}
	}
}
