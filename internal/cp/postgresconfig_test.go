package cp

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/conf"
	"kuma/internal/errs"
	"kuma/internal/rest"
)

// The contract's variables and keys mean what they mean there.
func TestPostgresSettings(t *testing.T) {
	t.Parallel()
	env := map[string]string{
		"HOST": "db.example.com", "PORT": "5432", "USER": "me", "PASSWORD": "secret", "DB_NAME": "mesh", "DRIVER_NAME": "pgx", "CONNECTION_TIMEOUT": "7",
		"MAX_CONNECTION_IDLE_TIME": "1m", "MAX_CONNECTION_LIFETIME": "2m", "MAX_CONNECTION_LIFETIME_JITTER": "3s", "HEALTH_CHECK_INTERVAL": "4s",
		"MIN_OPEN_CONNECTIONS": "1", "MAX_OPEN_CONNECTIONS": "9", "TOLERATE_NEWER_DB_VERSIONS": "true",
		"TLS_MODE": "verifyFull", "TLS_CERT_PATH": "c", "TLS_KEY_PATH": "k", "TLS_CA_PATH": "ca", "TLS_DISABLE_SSLSNI": "true",
	}
	list := []string{"KUMA_STORE_TYPE=postgres"}
	for name, value := range env {
		list = append(list, "KUMA_STORE_POSTGRES_"+name+"="+value)
	}
	cfg, warnings, err := Load("", list)
	if err != nil || len(warnings) > 0 {
		t.Fatal(warnings, err)
	}
	got := cfg.Store.Postgres
	if got.Password.Reveal() != "secret" || strings.Contains(fmt.Sprintf("%+v %#v", cfg, got), "secret") {
		t.Errorf("%+v", got)
	}
	got.Password = conf.Secret{}
	want := Postgres{
		Host: "db.example.com", Port: 5432, User: "me", DBName: "mesh", DriverName: "pgx", ConnectionTimeout: 7,
		MaxConnectionIdleTime: time.Minute, MaxConnectionLifetime: 2 * time.Minute, MaxConnectionLifetimeJitter: 3 * time.Second, HealthCheckInterval: 4 * time.Second,
		MinOpenConnections: 1, MaxOpenConnections: 9, TLS: PostgresTLS{Mode: "verifyFull", CertPath: "c", KeyPath: "k", CAPath: "ca", DisableSSLSNI: true}, TolerateNewerDBVersions: true,
	}
	if got != want {
		t.Error(cmp.Diff(want, got, cmp.AllowUnexported(conf.Secret{})))
	}
	// Of those without a meaning here, the reason is said.
	for name, why := range map[string]string{
		"KUMA_STORE_POSTGRES_READ_REPLICA_HOST=h": "served from memory", "KUMA_STORE_POSTGRES_READ_REPLICA_RATIO=1": "served from memory",
		"KUMA_STORE_POSTGRES_MAX_LIST_QUERY_ELEMENTS=1": "served from memory", "KUMA_STORE_POSTGRES_MAX_IDLE_CONNECTIONS=1": "maxConnectionIdleTime",
		"KUMA_STORE_POSTGRES_TLS_ROOT_CERT_PATH=x": "KUMA_STORE_POSTGRES_TLS_CA_PATH",
	} {
		if _, warnings, err := Load("", []string{name}); err != nil || len(warnings) != 1 || !strings.Contains(warnings[0], why) {
			t.Errorf("%s: %q %v", name, warnings, err)
		}
	}
}

// What can't be used is told at the start, by the setting, in the contract's
// words where it has some. Of another store's type nothing is asked.
func TestPostgresSettingsRefused(t *testing.T) {
	t.Parallel()
	for set, want := range map[string]string{
		"TLS_MODE=foo":         "KUMA_STORE_POSTGRES_TLS_MODE: invalid mode: foo; use one of disable, verifyNone, verifyCa, verifyFull",
		"TLS_MODE=verifyca":    "KUMA_STORE_POSTGRES_TLS_MODE: invalid mode: verifyca; ",
		"TLS_MODE=":            "KUMA_STORE_POSTGRES_TLS_MODE: invalid mode: ; ",
		"TLS_MODE=verifyCa":    "KUMA_STORE_POSTGRES_TLS_CA_PATH: CAPath cannot be empty ",
		"TLS_MODE=verifyFull":  "KUMA_STORE_POSTGRES_TLS_CA_PATH: CAPath cannot be empty ",
		"TLS_CERT_PATH=c":      "KUMA_STORE_POSTGRES_TLS_KEY_PATH: KeyPath cannot be empty when CertPath is provided: ",
		"TLS_KEY_PATH=c":       "KUMA_STORE_POSTGRES_TLS_CERT_PATH: CertPath cannot be empty when KeyPath is provided: ",
		"DRIVER_NAME=postgres": "KUMA_STORE_POSTGRES_DRIVER_NAME: unknown driver name postgres; ",
		"HOST=":                "KUMA_STORE_POSTGRES_HOST: ",
		"HOST=a,b":             "KUMA_STORE_POSTGRES_HOST: ",
		"HOST=postgres://db":   "KUMA_STORE_POSTGRES_HOST: ",
		"HOST=/run/postgresql TLS_MODE=verifyNone": "KUMA_STORE_POSTGRES_TLS_MODE: a Unix socket (/run/postgresql) has no TLS",
		"PORT=0":                      "KUMA_STORE_POSTGRES_PORT: 0 is not a port",
		"PORT=65536":                  "KUMA_STORE_POSTGRES_PORT: 65536 is not a port",
		"USER=":                       "KUMA_STORE_POSTGRES_USER: ",
		"DB_NAME=":                    "KUMA_STORE_POSTGRES_DB_NAME: ",
		"CONNECTION_TIMEOUT=0":        "KUMA_STORE_POSTGRES_CONNECTION_TIMEOUT: 0 is not between",
		"MAX_CONNECTION_IDLE_TIME=0s": "KUMA_STORE_POSTGRES_MAX_CONNECTION_IDLE_TIME: must be positive",
		"MAX_CONNECTION_LIFETIME=-1s": "KUMA_STORE_POSTGRES_MAX_CONNECTION_LIFETIME: must be positive",
		"HEALTH_CHECK_INTERVAL=0s":    "KUMA_STORE_POSTGRES_HEALTH_CHECK_INTERVAL: must be positive",
		"MIN_OPEN_CONNECTIONS=-1":     "KUMA_STORE_POSTGRES_MIN_OPEN_CONNECTIONS: -1 is negative",
		"MIN_OPEN_CONNECTIONS=51":     "KUMA_STORE_POSTGRES_MAX_OPEN_CONNECTIONS: 50 is too few",
	} {
		var env []string
		for one := range strings.FieldsSeq(set) {
			env = append(env, "KUMA_STORE_POSTGRES_"+one)
		}
		if _, _, err := Load("", append(env, "KUMA_STORE_TYPE=postgres")); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", set, err, want)
		}
		if _, _, err := Load("", env); err != nil {
			t.Errorf("%s, although the store is a file: %v", set, err)
		}
	}
	for _, set := range []string{"MAX_CONNECTION_LIFETIME_JITTER=0s", "MAX_OPEN_CONNECTIONS=0", "PASSWORD=", "HOST=::1", "HOST=/run/postgresql"} {
		if _, _, err := Load("", []string{"KUMA_STORE_TYPE=postgres", "KUMA_STORE_POSTGRES_" + set}); err != nil {
			t.Errorf("%s: %v", set, err)
		}
	}
}

// Where others can read or change what goes to the store, that is said at the
// start and in the report, with what mends it; where it stays on this machine it
// is not.
func TestPostgresPosture(t *testing.T) {
	t.Parallel()
	const unverified, readable, foreign = "whoever is on the way can take", "can be read and changed on the way", "any server with a certificate of the same authority"
	for _, c := range []struct{ host, mode, warning, severity, finding string }{
		{"db.example.com", "disable", readable, rest.SeverityCritical, readable},
		{"10.0.0.5", "disable", readable, rest.SeverityCritical, readable},
		{"db.example.com", "verifyNone", unverified, rest.SeverityCritical, unverified},
		{"db.example.com", "verifyCa", "", rest.SeverityNote, foreign},
		{"db.example.com", "verifyFull", "", "", ""},
		{"localhost", "disable", "", "", ""},
		{"127.0.0.1", "verifyNone", "", "", ""},
		{"::1", "verifyCa", "", "", ""},
		{"/run/postgresql", "disable", "", "", ""},
	} {
		cfg := Default()
		cfg.Store.Type = inPostgres
		cfg.Store.Postgres.Host, cfg.Store.Postgres.TLS = c.host, PostgresTLS{Mode: c.mode}
		var log bytes.Buffer
		cfg.Store.posture(slog.New(slog.NewTextHandler(&log, nil)))
		if said := log.String(); strings.Contains(said, "level=WARN") != (c.warning != "") || !strings.Contains(said, c.warning) || c.warning != "" && !strings.Contains(said, "KUMA_STORE_POSTGRES_TLS_MODE=verifyFull") {
			t.Errorf("%s, %s: %s", c.host, c.mode, said)
		}
		found := findings{}
		r := reporter{cfg: cfg, database: func() []*tls.ConnectionState { return []*tls.ConnectionState{nil, nil} }, now: time.Now}
		links := r.databaseLinks(found)
		if len(links) != 1 || links[0].Connections != 2 || links[0].Version != "" {
			t.Errorf("%s, %s: %+v", c.host, c.mode, links)
		}
		all := found.list()
		if c.finding == "" && len(all) == 0 {
			continue
		}
		if len(all) != 1 || all[0].Severity != c.severity || !strings.Contains(all[0].Message, c.finding) || !strings.Contains(all[0].Mend, "KUMA_STORE_POSTGRES_TLS_MODE=verifyFull") {
			t.Errorf("%s, %s: %+v", c.host, c.mode, all)
		}
	}
	// Without a database there is nothing to say.
	if r := (&reporter{}); r.databaseLinks(findings{}) != nil {
		t.Error("a database out of nowhere")
	}
}

// Connections that are alike are one row; what is weak in them is a note, a
// certificate that ends soon a warning.
func TestPostgresConnections(t *testing.T) {
	t.Parallel()
	cfg := Default()
	cfg.Store.Type = inPostgres
	cfg.Store.Postgres.Host, cfg.Store.Postgres.TLS = "db.example.com", PostgresTLS{Mode: "verifyFull", CAPath: "ca.crt"}
	now := time.Now()
	shown := func(end time.Time) []*x509.Certificate { return []*x509.Certificate{{NotAfter: end}} }
	good := &tls.ConnectionState{Version: tls.VersionTLS13, CurveID: tls.X25519MLKEM768, CipherSuite: tls.TLS_AES_128_GCM_SHA256, PeerCertificates: shown(now.AddDate(1, 0, 0))}
	older := &tls.ConnectionState{Version: tls.VersionTLS12, CurveID: tls.X25519, CipherSuite: tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, PeerCertificates: shown(now.AddDate(0, 0, 7))}
	for name, c := range map[string]struct {
		states   []*tls.ConnectionState
		rows     []int
		findings []string
	}{
		"none":     {nil, []int{0}, nil},
		"good":     {[]*tls.ConnectionState{good, good}, []int{2}, nil},
		"older":    {[]*tls.ConnectionState{older}, []int{1}, []string{"warning the certificate ends soon", "note the connection to the store has TLS 1.2, although 1.3 is offered", "note the key exchange with the store has no post-quantum part"}},
		"one each": {[]*tls.ConnectionState{older, good, good}, []int{2, 1}, []string{"warning the certificate ends soon", "note the connection to the store has TLS 1.2", "note the key exchange with the store"}},
	} {
		found := findings{}
		r := reporter{cfg: cfg, database: func() []*tls.ConnectionState { return c.states }, now: func() time.Time { return now }}
		var rows []int
		for _, d := range r.databaseLinks(found) {
			rows = append(rows, d.Connections)
			if d.VerifiedBy != "authorities of ca.crt, with the name db.example.com" || d.Address != "db.example.com:15432" || d.Name != "kuma" || d.User != "kuma" {
				t.Errorf("%s: %+v", name, d)
			}
		}
		if !slices.Equal(rows, c.rows) {
			t.Errorf("%s: rows of %v, want %v", name, rows, c.rows)
		}
		all := found.list()
		if len(all) != len(c.findings) {
			t.Errorf("%s: %+v", name, all)
			continue
		}
		for i, f := range all {
			if !strings.HasPrefix(f.Severity+" "+f.Message, c.findings[i]) || f.About[0] != "store at db.example.com:15432" && f.About[0] != "certificate of the store at db.example.com:15432" {
				t.Errorf("%s: %+v, want %q", name, f, c.findings[i])
			}
		}
	}
}

// What is set and means nothing is told, and what is not set is not.
func TestPostgresSettingsWithoutEffect(t *testing.T) {
	t.Parallel()
	for set, want := range map[string]string{
		"": "",
		"KUMA_STORE_POSTGRES_TLS_MODE=verifyFull KUMA_STORE_POSTGRES_TLS_CA_PATH=x":                          `store.type is "file"`,
		"KUMA_STORE_POSTGRES_PASSWORD=hunter22":                                                              `store.type is "file"`,
		"KUMA_STORE_TYPE=memory KUMA_STORE_POSTGRES_HOST=db":                                                 `store.type is "memory"`,
		"KUMA_STORE_TYPE=postgres":                                                                           "",
		"KUMA_STORE_TYPE=postgres KUMA_STORE_POSTGRES_TLS_CA_PATH=x":                                         "KUMA_STORE_POSTGRES_TLS_CA_PATH means nothing, since KUMA_STORE_POSTGRES_TLS_MODE is disable",
		"KUMA_STORE_TYPE=postgres KUMA_STORE_POSTGRES_TLS_MODE=verifyNone KUMA_STORE_POSTGRES_TLS_CA_PATH=x": "KUMA_STORE_POSTGRES_TLS_CA_PATH means nothing, since KUMA_STORE_POSTGRES_TLS_MODE is verifyNone",
		"KUMA_STORE_TYPE=postgres KUMA_STORE_POSTGRES_TLS_CERT_PATH=x KUMA_STORE_POSTGRES_TLS_KEY_PATH=x":    "KUMA_STORE_POSTGRES_TLS_CERT_PATH means nothing",
	} {
		cfg, warnings, err := Load("", strings.Fields(set))
		if err != nil || len(warnings) > 0 {
			t.Errorf("%s: %q %v", set, warnings, err)
		}
		var log bytes.Buffer
		cfg.Store.posture(slog.New(slog.NewTextHandler(&log, nil)))
		if said := strings.ReplaceAll(log.String(), `\"`, `"`); (said == "") != (want == "") || !strings.Contains(said, want) || strings.Contains(said, "hunter22") {
			t.Errorf("%s: %s, want %q", set, said, want)
		}
	}
}
