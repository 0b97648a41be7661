package pgstore_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kuma/internal/cp/cptest"
	"kuma/internal/errs"
	"kuma/internal/store"
	"kuma/internal/store/pgstore"
	"kuma/internal/store/storetest"
	"kuma/test/lab"
	"kuma/test/postgres"
)

// secure is a server that speaks TLS, and its CA: the first user signs in with
// the password over TLS alone, "mesh" with a certificate, and "plain" without
// TLS alone.
func secure(t *testing.T) (*postgres.Server, *cptest.CA) {
	t.Helper()
	ca := cptest.NewCA(t)
	dir := t.TempDir()
	cert, key := ca.Pair(t, nil).PEM(t)
	o := postgres.Options{
		HBA: []string{
			"hostssl   all mesh   127.0.0.1/32 cert",
			"hostssl   all admin  127.0.0.1/32 scram-sha-256",
			"hostnossl all plain  127.0.0.1/32 scram-sha-256",
		},
		CertFile: filepath.Join(dir, "cert"), KeyFile: filepath.Join(dir, "key"), CAFile: filepath.Join(dir, "ca"),
	}
	if err := errors.Join(os.WriteFile(o.CertFile, cert, 0o600), os.WriteFile(o.KeyFile, key, 0o600), os.WriteFile(o.CAFile, ca.PEM(), 0o600)); err != nil {
		t.Fatal(err)
	}
	server := postgres.Start(t, o)
	server.Exec("postgres", "create role mesh login superuser; create role plain login superuser password '"+postgres.Password+"'")
	return server, ca
}

// trusting is the TLS of a client that trusts a CA, and has pairs of its own.
func trusting(ca *cptest.CA, pairs ...cptest.Pair) func() (*tls.Config, error) {
	return func() (*tls.Config, error) {
		c := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", MinVersion: tls.VersionTLS12}
		for _, p := range pairs {
			// Whatever CAs the server asks for.
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				pair := p.TLS()
				return &pair, nil
			}
		}
		return c, nil
	}
}

// named is a client's pair for a user.
func named(t *testing.T, ca *cptest.CA, user string) cptest.Pair {
	t.Helper()
	return ca.Pair(t, func(c *x509.Certificate) {
		c.Subject = pkix.Name{CommonName: user}
		c.ExtKeyUsage, c.DNSNames, c.IPAddresses = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, nil, nil
	})
}

func TestTLS(t *testing.T) {
	t.Parallel()
	server, ca := secure(t)
	c := config(server, server.Database())
	for _, user := range []string{"mesh", postgres.User} {
		c := c
		var asked atomic.Int32
		configure := trusting(ca, named(t, ca, user))
		log := new(logged)
		c.User, c.Log = user, log.logger()
		c.TLS = func() (*tls.Config, error) {
			asked.Add(1)
			return configure()
		}
		if user == "mesh" {
			c.Password = ""
			if _, err := pgstore.Migrate(t.Context(), c); err != nil {
				t.Fatal(err)
			}
		}
		s := open(t, c)
		storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
		states := s.Connections()
		if len(states) != 2 {
			t.Errorf("%d connections, want that of the lock and one for writes", len(states))
		}
		for _, state := range states {
			if state == nil || state.Version != tls.VersionTLS13 || state.ServerName != "localhost" {
				t.Errorf("a connection has TLS %+v, want 1.3", state)
			}
		}
		if got := server.Query("postgres", "select count(*) from pg_stat_ssl s join pg_stat_activity a using (pid) where s.ssl and a.usename = $1", user); got != "2" {
			t.Errorf("the server has %s connections of %s with TLS, want 2", got, user)
		}
		if pool := s.Pool(); pool.TotalConns() != 1 || pool.AcquireCount() == 0 || pool.MaxConns() != 3 {
			t.Errorf("pool: %d of %d connections, %d times used", pool.TotalConns(), pool.MaxConns(), pool.AcquireCount())
		}
		// The files may have changed since.
		before := asked.Load()
		cutLock(server, c.Database)
		soon(t, "a new connection asks for its TLS anew", func() bool { return asked.Load() > before })
		soon(t, "it is there", func() bool { return strings.Contains(log.String(), "has the database's lock again") })
		if n := len(s.Connections()); n != 2 {
			t.Errorf("%d connections, want 2", n)
		}
		s.Close()
		if got := server.Query(c.Database, "select holder || instance from mesh_state"); got != "" {
			t.Errorf("the database is still held by %q", got)
		}
		soon(t, "no connection is left", func() bool { return len(s.Connections()) == 0 })
	}
}

// TestPlaintext: without TLS, the connections say so.
func TestPlaintext(t *testing.T) {
	t.Parallel()
	_, _, s := served(t)
	for _, state := range s.Connections() {
		if state != nil {
			t.Errorf("a connection has TLS: %+v", state)
		}
	}
	if n := len(s.Connections()); n != 1 {
		t.Errorf("%d connections before the first write, want that of the lock", n)
	}
}

// silent is a port that takes connections, and answers nothing, or not what a
// PostgreSQL would.
func silent(t *testing.T, answer string) uint32 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			if answer != "" {
				_, _ = c.Write([]byte(answer))
				_ = c.Close()
			}
		}
	}()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

// TestUnreachable: every way in which a database can't be reached is told from
// the others, and its error says what to do.
func TestUnreachable(t *testing.T) {
	t.Parallel()
	server, ca := secure(t)
	clear := postgres.Start(t, postgres.Options{})
	clear.Exec("postgres", "create role weak login password '"+postgres.Password+"'")
	other := cptest.NewCA(t)
	for _, c := range []struct {
		name   string
		change func(*pgstore.Config)
		says   []string
	}{
		{"no TLS where it is a must", func(c *pgstore.Config) { c.TLS = nil }, []string{"no pg_hba.conf entry", "KUMA_STORE_POSTGRES_TLS_MODE to verifyFull"}},
		{"TLS where it is forbidden", func(c *pgstore.Config) { c.User = "plain" }, []string{"no pg_hba.conf entry", "has no line that lets this user"}},
		{"a server without TLS", func(c *pgstore.Config) { c.Port = uint32(clear.Port) }, []string{"does not speak TLS", "ssl = on"}},
		{"a wrong password", func(c *pgstore.Config) { c.Password = postgres.Password + "2" }, []string{"password authentication failed", "KUMA_STORE_POSTGRES_PASSWORD"}},
		{"no password", func(c *pgstore.Config) { c.Password = "" }, []string{"password", "KUMA_STORE_POSTGRES_PASSWORD"}},
		{"an unknown user", func(c *pgstore.Config) { c.User = "nobody" }, []string{"no pg_hba.conf entry", `user "nobody"`}},
		{"an unknown CA", func(c *pgstore.Config) { c.TLS = trusting(other) }, []string{"unknown authority", "KUMA_STORE_POSTGRES_TLS_CA_PATH"}},
		{"another name", func(c *pgstore.Config) {
			c.TLS = func() (*tls.Config, error) { return &tls.Config{RootCAs: ca.Pool(), ServerName: "db.example"}, nil }
		}, []string{"localhost", "db.example", "KUMA_STORE_POSTGRES_HOST"}},
		{"no certificate", func(c *pgstore.Config) { c.User = "mesh" }, []string{"valid client certificate", "KUMA_STORE_POSTGRES_TLS_CERT_PATH"}},
		{"a certificate of another CA", func(c *pgstore.Config) { c.User, c.TLS = "mesh", trusting(ca, named(t, other, "mesh")) }, []string{"does not take the client's certificate", "ssl_ca_file"}},
		{"a certificate of another user", func(c *pgstore.Config) { c.User, c.TLS = "mesh", trusting(ca, named(t, ca, "stranger")) }, []string{"certificate authentication failed", "common name"}},
		{"files that can't be read", func(c *pgstore.Config) {
			c.TLS = func() (*tls.Config, error) { return nil, errors.New("no such file ca.pem") }
		}, []string{"no such file ca.pem"}},
		{"no configuration", func(c *pgstore.Config) { c.TLS = func() (*tls.Config, error) { return nil, nil } }, []string{"TLS is wanted"}},
		{"no such database", func(c *pgstore.Config) { c.Database = "nothing" }, []string{`database "nothing" does not exist`, "KUMA_STORE_POSTGRES_DB_NAME"}},
		{"nobody listens", func(c *pgstore.Config) { c.Port = uint32(lab.FreePort(t)) }, []string{"connection refused", "KUMA_STORE_POSTGRES_PORT"}},
		{"no answer", func(c *pgstore.Config) { c.Port, c.ConnectTimeout = silent(t, ""), 200*time.Millisecond }, []string{"no answer in time", "KUMA_STORE_POSTGRES_CONNECTION_TIMEOUT"}},
		{"something else", func(c *pgstore.Config) { c.Port = silent(t, "HTTP/1.1 400 Bad Request\r\n\r\n") }, []string{"connect to"}},
		{"no such host", func(c *pgstore.Config) { c.Host = "db.invalid" }, []string{"db.invalid", "KUMA_STORE_POSTGRES_HOST"}},
		{"no rights", func(c *pgstore.Config) { c.Port, c.TLS, c.User = uint32(clear.Port), nil, "weak" }, []string{"permission denied", "GRANT"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			log := new(logged)
			config := config(server, "postgres")
			config.TLS, config.Log = trusting(ca), log.logger()
			c.change(&config)
			// A test that hangs is no good, and one that does has failed.
			ctx, stop := context.WithTimeout(t.Context(), patience)
			defer stop()
			_, err := pgstore.Migrate(ctx, config)
			storetest.Says(t, err, errs.Unavailable, append(c.says, config.Database)...)
			if said := err.Error() + log.String(); strings.Contains(said, postgres.Password) || strings.Contains(said, "\n") {
				t.Errorf("it says: %s", said)
			}
			if said := err.Error(); (strings.Contains(said, "tls: ") || strings.Contains(said, "x509: ")) && strings.Contains(said, "(127.0.0.1)") {
				t.Errorf("it says more than the cause: %s", said)
			}
			if strings.HasPrefix(err.Error(), "connect") {
				if _, opened := pgstore.Open(ctx, config); opened == nil || !strings.HasPrefix(opened.Error(), "connect to the database "+config.Database) {
					t.Errorf("Open: %v, Migrate: %v", opened, err)
				}
			}
			t.Log(err)
		})
	}
}

// TestEnvironment: the library's own settings in the environment, and its files in
// the home directory, do not count.
func TestEnvironment(t *testing.T) {
	server := postgres.Start(t, postgres.Options{})
	c := config(server, migrated(t, server))
	home := t.TempDir()
	bad := filepath.Join(home, ".postgresql", "root.crt")
	if err := os.Mkdir(filepath.Dir(bad), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{bad, filepath.Join(home, ".postgresql", "postgresql.crt"), filepath.Join(home, ".postgresql", "postgresql.key"), filepath.Join(home, ".pgpass"), filepath.Join(home, ".pg_service.conf")} {
		if err := os.WriteFile(file, []byte("no such thing\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range map[string]string{
		"HOME": home, "PGHOST": "db.invalid", "PGPORT": "x", "PGUSER": "nobody", "PGPASSWORD": "wrong", "PGDATABASE": "nothing", "PGCONNECT_TIMEOUT": "x",
		"PGOPTIONS": "-c default_transaction_read_only=on", "PGTARGETSESSIONATTRS": "no", "PGREQUIREAUTH": "no", "PGAPPNAME": "x", "PGTZ": "x",
		"PGSSLMODE": "no", "PGSSLNEGOTIATION": "no", "PGSSLCERTMODE": "no", "PGSSLSNI": "no", "PGCHANNELBINDING": "no", "PGMINPROTOCOLVERSION": "9", "PGMAXPROTOCOLVERSION": "8",
		"PGSSLROOTCERT": bad, "PGSSLCERT": bad, "PGSSLKEY": bad, "PGSSLPASSWORD": "x", "PGPASSFILE": bad, "PGSERVICEFILE": bad,
	} {
		t.Setenv(name, value)
	}
	s := open(t, c)
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
	s.Close()
	t.Setenv("PGSSLROOTCERT", "")
	s = open(t, c)
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
	s.Close()
	// This one alone the library can't be told to leave.
	t.Setenv("PGSERVICE", "mesh")
	_, err := pgstore.Open(t.Context(), c)
	storetest.Says(t, err, errs.Invalid, "PGSERVICE", "unset")
}
