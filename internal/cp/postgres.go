package cp

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kuma/internal/catalog"
	"kuma/internal/conf"
	"kuma/internal/errs"
	"kuma/internal/pki"
	"kuma/internal/rest"
	"kuma/internal/store/pgstore"
)

// inPostgres is the store's type for a PostgreSQL database.
const inPostgres = "postgres"

// Postgres says where the store's database is, and how it is connected to.
type Postgres struct {
	// Host is the server's name, address, or directory of its Unix socket.
	Host string `json:"host"`
	// Port is the server's.
	Port uint32 `json:"port"`
	// User is who the control plane is there.
	User string `json:"user"`
	// Password is the user's, and never shown; a certificate may take its place.
	Password conf.Secret `json:"password"`
	// DBName is the database's.
	DBName string `json:"dbName"`
	// DriverName is "pgx": there is no other.
	DriverName string `json:"driverName"`
	// ConnectionTimeout bounds the making of a connection, in seconds.
	ConnectionTimeout int `json:"connectionTimeout"`
	// MaxConnectionIdleTime and MaxConnectionLifetime end connections that were
	// idle, or there, for so long; the lifetime is longer by up to
	// MaxConnectionLifetimeJitter, at random. HealthCheckInterval is how often
	// that is looked at.
	MaxConnectionIdleTime       time.Duration `json:"maxConnectionIdleTime"`
	MaxConnectionLifetime       time.Duration `json:"maxConnectionLifetime"`
	MaxConnectionLifetimeJitter time.Duration `json:"maxConnectionLifetimeJitter"`
	HealthCheckInterval         time.Duration `json:"healthCheckInterval"`
	// MinOpenConnections are kept open; MaxOpenConnections bounds them, 0 does
	// not.
	MinOpenConnections int32 `json:"minOpenConnections"`
	MaxOpenConnections int32 `json:"maxOpenConnections"`
	// TLS is how connections are encrypted.
	TLS PostgresTLS `json:"tls"`
	// TolerateNewerDBVersions starts though a newer version has migrated the
	// database.
	TolerateNewerDBVersions bool `json:"tolerateNewerDBVersions"`
}

// PostgresTLS is how connections to the store's database are encrypted.
type PostgresTLS struct {
	// Mode is "disable" (the default: all is readable on the way), "verifyNone"
	// (encrypted, with whoever answers), "verifyCa" (with a server whose
	// certificate CAPath vouches for) or "verifyFull" (and that has the host's
	// name).
	Mode string `json:"mode"`
	// CertPath and KeyPath are the pair that is shown to the server, PEM.
	CertPath string `json:"certPath"`
	KeyPath  string `json:"keyPath"`
	// CAPath holds the authorities of the server's certificate, PEM.
	CAPath string `json:"caPath"`
	// DisableSSLSNI keeps the host's name out of the handshake, where it is in
	// clear. It is verified all the same.
	DisableSSLSNI bool `json:"disableSSLSNI"`
}

// The modes of PostgresTLS.
const (
	tlsDisable    = "disable"
	tlsVerifyNone = "verifyNone"
	tlsVerifyCA   = "verifyCa"
	tlsVerifyFull = "verifyFull"
)

func defaultPostgres() Postgres {
	return Postgres{
		Host: "127.0.0.1", Port: 15432, User: "kuma", Password: conf.NewSecret("kuma"), DBName: "kuma", DriverName: "pgx", ConnectionTimeout: 5,
		MaxConnectionIdleTime: 30 * time.Minute, MaxConnectionLifetime: time.Hour, MaxConnectionLifetimeJitter: time.Minute,
		HealthCheckInterval: 30 * time.Second, MaxOpenConnections: 50, TLS: PostgresTLS{Mode: tlsDisable},
	}
}

// postgresEnv begins the names of the settings' variables.
const postgresEnv = "KUMA_STORE_POSTGRES"

// verified tells whether the mode verifies the server.
func (p PostgresTLS) verified() bool { return p.Mode == tlsVerifyCA || p.Mode == tlsVerifyFull }

// local tells whether the server is on this machine, so that no network leads
// there.
func (p Postgres) local() bool { return strings.HasPrefix(p.Host, "/") || loopback(p.Host) }

// at is where the server is, for people.
func (p Postgres) at() string { return net.JoinHostPort(p.Host, fmt.Sprint(p.Port)) }

// check finds what can't be used. The contract's texts begin what is said.
func (p Postgres) check() (bad []errs.Field) {
	add := func(suffix, format string, args ...any) {
		bad = append(bad, errs.Field{Path: postgresEnv + suffix, Message: fmt.Sprintf(format, args...)})
	}
	if socket := strings.HasPrefix(p.Host, "/"); !socket && net.ParseIP(p.Host) == nil && !hostname(p.Host) {
		add("_HOST", "%q is neither a host name nor an IP address; give it without scheme and port, and only one", p.Host)
	} else if socket && p.TLS.Mode != tlsDisable {
		add("_TLS_MODE", "a Unix socket (%s) has no TLS, and leads to this machine only; set it to %s, or KUMA_STORE_POSTGRES_HOST to a host", p.Host, tlsDisable)
	}
	if p.Port < 1 || p.Port > math.MaxUint16 {
		add("_PORT", "%d is not a port: it must be in the range [1, 65535]", p.Port)
	}
	if p.User == "" {
		add("_USER", "is missing: set it to the user that the database knows")
	}
	if p.DBName == "" {
		add("_DB_NAME", "is missing: set it to the name of the database")
	}
	if p.DriverName != "pgx" {
		add("_DRIVER_NAME", "unknown driver name %s; the only one is pgx, the default", p.DriverName)
	}
	if p.ConnectionTimeout < 1 || p.ConnectionTimeout > 3600 {
		add("_CONNECTION_TIMEOUT", "%d is not between 1 and 3600 seconds", p.ConnectionTimeout)
	}
	for suffix, d := range map[string]time.Duration{
		"_MAX_CONNECTION_IDLE_TIME": p.MaxConnectionIdleTime, "_MAX_CONNECTION_LIFETIME": p.MaxConnectionLifetime,
		"_MAX_CONNECTION_LIFETIME_JITTER": p.MaxConnectionLifetimeJitter + 1, "_HEALTH_CHECK_INTERVAL": p.HealthCheckInterval,
	} {
		if d <= 0 {
			add(suffix, "must be positive")
		}
	}
	if p.MinOpenConnections < 0 {
		add("_MIN_OPEN_CONNECTIONS", "%d is negative", p.MinOpenConnections)
	}
	if p.MaxOpenConnections < 0 || p.MaxOpenConnections > 0 && p.MaxOpenConnections < p.MinOpenConnections {
		add("_MAX_OPEN_CONNECTIONS", "%d is too few: it must be at least KUMA_STORE_POSTGRES_MIN_OPEN_CONNECTIONS, which is %d, or 0 for no limit", p.MaxOpenConnections, p.MinOpenConnections)
	}
	t := p.TLS
	if modes := []string{tlsDisable, tlsVerifyNone, tlsVerifyCA, tlsVerifyFull}; !slices.Contains(modes, t.Mode) {
		add("_TLS_MODE", "invalid mode: %s; use one of %s", t.Mode, strings.Join(modes, ", "))
	}
	if t.verified() && t.CAPath == "" {
		add("_TLS_CA_PATH", "CAPath cannot be empty where KUMA_STORE_POSTGRES_TLS_MODE is %s: set it to the file with the authority of the server's certificate", t.Mode)
	}
	if t.CertPath != "" && t.KeyPath == "" {
		add("_TLS_KEY_PATH", "KeyPath cannot be empty when CertPath is provided: set both, or none")
	}
	if t.KeyPath != "" && t.CertPath == "" {
		add("_TLS_CERT_PATH", "CertPath cannot be empty when KeyPath is provided: set both, or none")
	}
	slices.SortFunc(bad, func(a, b errs.Field) int { return cmp.Compare(a.Path, b.Path) })
	return bad
}

// idle lists what is set and means nothing by what else is set.
func (c StoreConfig) idle() []string {
	p, was := c.Postgres, defaultPostgres()
	if c.Type != inPostgres {
		same := p.Password.Equal(was.Password)
		if p.Password, was.Password = (conf.Secret{}), (conf.Secret{}); p != was || !same {
			return []string{fmt.Sprintf("settings of store.postgres mean nothing, since store.type is %q: KUMA_STORE_TYPE=postgres uses them", c.Type)}
		}
		return nil
	}
	var out []string
	if p.TLS.CAPath != "" && !p.TLS.verified() {
		out = append(out, fmt.Sprintf("KUMA_STORE_POSTGRES_TLS_CA_PATH means nothing, since KUMA_STORE_POSTGRES_TLS_MODE is %s, which does not verify the server: verifyFull does", p.TLS.Mode))
	}
	if p.TLS.CertPath != "" && p.TLS.Mode == tlsDisable {
		out = append(out, "KUMA_STORE_POSTGRES_TLS_CERT_PATH means nothing, since KUMA_STORE_POSTGRES_TLS_MODE is disable: there is no TLS")
	}
	return out
}

// posture says at the start what of the connection to the store others can read.
func (c StoreConfig) posture(log *slog.Logger) {
	for _, warning := range c.idle() {
		log.Warn("setting without effect", "warning", warning)
	}
	if c.Type != inPostgres {
		return
	}
	if c.Postgres.local() {
		if c.Postgres.TLS.Mode == tlsVerifyNone {
			log.Info("the store's server is not verified; it is on this machine", "store", c.Postgres.at())
		}
		return
	}
	const mend = "KUMA_STORE_POSTGRES_TLS_MODE=verifyFull, and KUMA_STORE_POSTGRES_TLS_CA_PATH with the authority of the server's certificate"
	switch c.Postgres.TLS.Mode {
	case tlsDisable:
		log.Warn("the connection to the store has no TLS: the database's password and all secrets, keys of authorities included, can be read and changed on the way", "store", c.Postgres.at(), "mend", mend)
	case tlsVerifyNone:
		log.Warn("the store's server is not verified: whoever is on the way can take its place, and read and change all secrets, keys of authorities included", "store", c.Postgres.at(), "mend", mend)
	}
}

// client is how the database is connected to; nil means without TLS. Its files
// are opened, checked, and watched from then on.
func (p Postgres) client(files *pki.Files) (*pki.Client, error) {
	if p.TLS.Mode == tlsDisable {
		return nil, nil
	}
	c := &pki.Client{Host: p.Host, NoSNI: p.TLS.DisableSSLSNI, AnyName: p.TLS.Mode == tlsVerifyCA, Unverified: !p.TLS.verified()}
	var err error
	if p.TLS.verified() {
		if c.Anchors, err = files.Anchors("store-postgres-ca", postgresEnv+"_TLS_CA_PATH", p.TLS.CAPath); err != nil {
			return nil, err
		}
	}
	if p.TLS.CertPath != "" {
		if c.Pair, err = files.ClientPair("store-postgres", postgresEnv+"_TLS_CERT_PATH", p.TLS.CertPath, p.TLS.KeyPath); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// database is what package pgstore needs.
func (p Postgres) database(files *pki.Files, instance string, log *slog.Logger) (pgstore.Config, error) {
	client, err := p.client(files)
	if err != nil {
		return pgstore.Config{}, err
	}
	c := pgstore.Config{
		Host: p.Host, Port: p.Port, User: p.User, Password: p.Password.Reveal(), Database: p.DBName,
		ConnectTimeout: time.Duration(p.ConnectionTimeout) * time.Second, MaxConnections: p.MaxOpenConnections, MinConnections: p.MinOpenConnections,
		MaxIdleTime: p.MaxConnectionIdleTime, MaxLifetime: p.MaxConnectionLifetime, MaxLifetimeJitter: max(p.MaxConnectionLifetimeJitter, 1),
		HealthCheckInterval: p.HealthCheckInterval, TolerateNewer: p.TolerateNewerDBVersions, Kinds: catalog.Kinds(), Instance: instance, Log: log,
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = math.MaxInt32
	}
	if client != nil {
		c.TLS = client.TLS
	}
	return c, nil
}

// openPostgres opens the store's database, and stands by while another control
// plane serves from it. Meanwhile the certificate files are followed, and the
// diagnostics port says that this one is alive.
func (c *ControlPlane) openPostgres(ctx context.Context, instance string) error {
	log := c.log.With("logger", "store")
	if err := c.checkTakeover(); err != nil {
		return err
	}
	cfg, err := c.cfg.Store.Postgres.database(c.files, instance, log)
	if err != nil {
		return err
	}
	waiting, stop := context.WithCancel(ctx)
	var aside sync.WaitGroup
	aside.Go(func() {
		tick := time.NewTicker(c.cfg.General.TLSReloadInterval)
		defer tick.Stop()
		for {
			select {
			case <-waiting.Done():
				return
			case <-tick.C:
				c.files.Look()
			}
		}
	})
	alive, err := c.aliveServer()
	if err != nil {
		stop()
		aside.Wait()
		return err
	}
	if alive != nil {
		aside.Go(func() {
			if err := alive.run(waiting); err != nil {
				log.Warn("the diagnostics port does not answer while this control plane stands by", "error", err)
			}
		})
	}
	s, err := pgstore.Open(ctx, cfg)
	stop()
	aside.Wait()
	if err != nil {
		return err
	}
	c.store, c.close, c.postgres, c.away = s, s.Close, s, s.Away
	c.metrics.zoned.MustRegister(newPoolMetrics(s.Pool))
	return nil
}

// checkTakeover finds what would keep this control plane from serving once it has
// the store: one that stands by is not to find out when it is needed. The files
// that are opened after the store are looked at, and the ports are tried.
func (c *ControlPlane) checkTakeover() error {
	cfg := &c.cfg
	// Another one opens the files, so that nothing is watched twice.
	look := &ControlPlane{cfg: c.cfg, files: pki.NewFiles(pki.FilesConfig{Log: slog.New(slog.DiscardHandler)})}
	for _, s := range []struct {
		env     string
		opened  bool
		tls     ServerTLS
		clients []clientSource
	}{
		{"KUMA_DP_SERVER", true, cfg.DPServer.ServerTLS, nil},
		{"KUMA_API_SERVER_HTTPS", cfg.APIServer.HTTPS.Enabled, cfg.APIServer.HTTPS.ServerTLS, cfg.APIServer.clients()},
		{adminEnv, cfg.AdminServer.opened() && cfg.AdminServer.Public.Enabled, cfg.AdminServer.Public.pair(), cfg.AdminServer.Public.clients()},
		{madsEnv, cfg.MonitoringAssignmentServer.Enabled && cfg.MonitoringAssignmentServer.TLSEnabled, cfg.MonitoringAssignmentServer.ServerTLS, cfg.MonitoringAssignmentServer.clients()},
		{"KUMA_DIAGNOSTICS", cfg.Diagnostics.TLSEnabled, cfg.Diagnostics.ServerTLS, nil},
	} {
		if !s.opened {
			continue
		}
		if _, err := look.certificateOf(s.env, s.tls); err != nil {
			return err
		}
		if _, err := look.clientCAs(false, s.clients...); err != nil {
			return err
		}
	}
	if cfg.General.TLSCertFile == "" && cfg.General.TLSCAStore == caInFile {
		dir, err := cfg.workDir()
		if err != nil {
			return err
		}
		if err := pki.CheckAuthority(dir); err != nil {
			return err
		}
	}
	for _, d := range cfg.doorways() {
		l, err := d.listen()
		if err != nil {
			return err
		}
		defer func() { _ = l.Close() }() // at the end, so that no two are one
	}
	return nil
}

// doorways are the ports that this control plane opens.
func (c *Config) doorways() []doorway {
	out := []doorway{{"the server for proxies", "KUMA_DP_SERVER_PORT", "", c.DPServer.Port}}
	if h := c.APIServer.HTTP; h.Enabled {
		out = append(out, doorway{"the API server", "KUMA_API_SERVER_HTTP_PORT", h.Interface, h.Port})
	}
	if h := c.APIServer.HTTPS; h.Enabled {
		out = append(out, doorway{"the API server", "KUMA_API_SERVER_HTTPS_PORT", h.Interface, h.Port})
	}
	out = append(out, c.AdminServer.doorways()...)
	if m := c.MonitoringAssignmentServer; m.Enabled {
		out = append(out, doorway{"the server for monitoring assignments", madsEnv + "_PORT", "", m.Port})
	}
	return append(out, doorway{"the diagnostics server", "KUMA_DIAGNOSTICS_SERVER_PORT", "", c.Diagnostics.ServerPort})
}

// sayAlone says that proxies of this control plane are its own, where that is so:
// nobody else on the database has its authority, or gets it from there.
func (c *ControlPlane) sayAlone() {
	if c.postgres != nil && c.cfg.General.TLSCertFile == "" && c.cfg.DPServer.TLSCertFile == "" && c.certs.Alone() {
		c.log.Info("the control plane's own authority is in the work directory alone: another control plane on this database, with a directory of its own, has another one, which proxies of this one do not trust; KUMA_GENERAL_TLS_CA_STORE=store shares it")
	}
}

// aliveServer answers on the diagnostics port until there is more to tell. It is
// nil where that port has TLS with the control plane's own certificate: its
// authority may be in the store.
func (c *ControlPlane) aliveServer() (*server, error) {
	d := c.cfg.Diagnostics
	own := d.TLSEnabled && d.TLSCertFile == "" && c.general == nil
	if own {
		c.log.Info("the diagnostics port is closed until this control plane serves: its certificate may be in the store; KUMA_DIAGNOSTICS_TLS_CERT_FILE gives it one of its own")
		return nil, nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthy", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "the control plane waits for its store", http.StatusServiceUnavailable)
	})
	if d.Metrics {
		mux.Handle("GET /metrics", promhttp.HandlerFor(c.metrics.registry, promhttp.HandlerOpts{ErrorLog: quiet(c.log), MaxRequestsInFlight: 8, Timeout: 20 * time.Second}))
	}
	l, err := listen("the diagnostics server", "KUMA_DIAGNOSTICS_SERVER_PORT", "", d.ServerPort)
	if err != nil {
		return nil, err
	}
	s := &server{
		&http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10, ErrorLog: quiet(c.log)},
		limited{l, &limit{max: 1000, each: 500, setting: "none", eachSetting: "none", log: c.log.With("logger", "diagnostics")}},
		d.TLSEnabled,
	}
	if d.TLSEnabled {
		t, err := c.serverTLS("KUMA_DIAGNOSTICS", d.ServerTLS, nil)
		if err != nil {
			_ = l.Close()
			return nil, err
		}
		secure(s.Server, t)
	}
	return s, nil
}

// takeover is after how long without the database's lock a control plane is no
// longer ready, nor the leader: by then another one has taken over, if there is
// one. The server gives the lock free about 25 s after it last heard of it.
const takeover = 30 * time.Second

// cutOff is for how long the control plane has been without its store's lock, once
// that is long enough for another one to have taken over; 0 before.
func (c *ControlPlane) cutOff() time.Duration {
	if c.away == nil {
		return 0
	}
	if away := c.away(); away >= takeover {
		return away
	}
	return 0
}

// followStore ends with an error when the store is another's.
func (c *ControlPlane) followStore(ctx context.Context) error {
	if c.postgres == nil {
		<-ctx.Done()
		return nil
	}
	select {
	case <-c.postgres.Lost():
		return c.postgres.Err()
	case <-ctx.Done():
		return nil
	}
}

// lost is why the store is another's; nil while it isn't.
func (c *ControlPlane) lost() error {
	if c.postgres == nil {
		return nil
	}
	return c.postgres.Err()
}

// migrate makes the tables of the store's database, or brings them up to date.
func migrate(ctx context.Context, cfg Config, log *slog.Logger) (changed bool, err error) {
	if cfg.Store.Type != inPostgres {
		return false, errs.New(errs.Invalid, "there is nothing to migrate: store.type is %q, and only a database has tables (KUMA_STORE_TYPE=postgres)", cfg.Store.Type)
	}
	cfg.Store.posture(log)
	files := pki.NewFiles(pki.FilesConfig{Log: log.With("logger", "tls")})
	db, err := cfg.Store.Postgres.database(files, instanceID(), log.With("logger", "store"))
	if err != nil {
		return false, err
	}
	return pgstore.Migrate(ctx, db)
}

// poolMetrics are those of the connections to the database, under the names
// that dashboards know.
type poolMetrics struct {
	stat                                            func() *pgxpool.Stat
	connections, most, acquire, closed, count, wait *prometheus.Desc
}

func newPoolMetrics(stat func() *pgxpool.Stat) *poolMetrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("store_postgres_"+name, help, labels, nil)
	}
	return &poolMetrics{
		stat:        stat,
		connections: desc("connections", "Connections to the store's database, that of the lock left out.", "type"),
		most:        desc("connections_max", "How many connections there may be."),
		acquire:     desc("connection_acquire", "Connections that were asked for, by what became of that.", "type"),
		closed:      desc("connection_closed", "Connections that were closed, by the reason.", "type"),
		count:       desc("connection_wait_count", "How often nobody had a connection left, and one had to wait."),
		wait:        desc("connection_wait_duration", "How long was waited for connections, in seconds."),
	}
}

// Describe is prometheus.Collector's.
func (m *poolMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.connections, m.most, m.acquire, m.closed, m.count, m.wait} {
		ch <- d
	}
}

// Collect is prometheus.Collector's.
func (m *poolMetrics) Collect(ch chan<- prometheus.Metric) {
	s := m.stat()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge(m.connections, float64(s.TotalConns()), "open_connections")
	gauge(m.connections, float64(s.AcquiredConns()), "in_use")
	gauge(m.connections, float64(s.IdleConns()), "idle")
	gauge(m.most, float64(s.MaxConns()))
	counter(m.acquire, float64(s.AcquireCount()), "acquired")
	counter(m.acquire, float64(s.CanceledAcquireCount()), "cancelled")
	counter(m.closed, float64(s.MaxIdleDestroyCount()), "max_idle_time")
	counter(m.closed, float64(s.MaxLifetimeDestroyCount()), "max_lifetime")
	counter(m.count, float64(s.EmptyAcquireCount()))
	counter(m.wait, s.EmptyAcquireWaitTime().Seconds())
}

// databaseLinks describes the connections to the store's database, those that are
// alike together.
func (r *reporter) databaseLinks(found findings) []rest.TLSDatabase {
	if r.database == nil {
		return nil
	}
	p := r.cfg.Store.Postgres
	about := "store at " + p.at()
	const mend = "KUMA_STORE_POSTGRES_TLS_MODE=verifyFull and KUMA_STORE_POSTGRES_TLS_CA_PATH"
	verified := byNothing
	switch p.TLS.Mode {
	case tlsDisable:
		if !p.local() {
			found.add(rest.SeverityCritical, "what is sent to the store, the password and all secrets included, can be read and changed on the way", about, mend)
		}
	case tlsVerifyNone:
		if !p.local() {
			found.add(rest.SeverityCritical, "the store's server is not verified: whoever is on the way can take its place, and read and change all", about, mend)
		}
	case tlsVerifyCA:
		verified = "authorities of " + p.TLS.CAPath + ", whatever the name"
		if !p.local() {
			found.add(rest.SeverityNote, "any server with a certificate of the same authority is taken for the store", about, "KUMA_STORE_POSTGRES_TLS_MODE=verifyFull")
		}
	case tlsVerifyFull:
		verified = "authorities of " + p.TLS.CAPath + ", with the name " + p.Host
	}
	var out []rest.TLSDatabase
	for _, s := range r.database() {
		d := rest.TLSDatabase{Address: p.at(), Name: p.DBName, User: p.User, VerifiedBy: verified}
		if s != nil {
			d.Version, d.Group, d.Cipher = tls.VersionName(s.Version), groupName(s.CurveID), tls.CipherSuiteName(s.CipherSuite)
			if len(s.PeerCertificates) > 0 {
				d.Certificate = certified(s.PeerCertificates[0])
			}
		}
		i := slices.IndexFunc(out, func(o rest.TLSDatabase) bool {
			return o.Version == d.Version && o.Group == d.Group && o.Cipher == d.Cipher && sameCertificate(o.Certificate, d.Certificate)
		})
		if i < 0 {
			i, out = len(out), append(out, d)
		}
		out[i].Connections++
	}
	slices.SortFunc(out, func(a, b rest.TLSDatabase) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), cmp.Compare(a.Version, b.Version), cmp.Compare(a.Group, b.Group), cmp.Compare(a.Cipher, b.Cipher))
	})
	if len(out) == 0 { // between two connections
		out = append(out, rest.TLSDatabase{Address: p.at(), Name: p.DBName, User: p.User, VerifiedBy: verified})
	}
	for _, d := range out {
		if d.Version == "" {
			continue
		}
		if d.Version != tls.VersionName(tls.VersionTLS13) {
			found.add(rest.SeverityNote, "the connection to the store has "+d.Version+", although 1.3 is offered", about, "update the database's server, or its ssl_max_protocol_version")
		}
		if !postQuantum(d.Group) {
			found.add(rest.SeverityNote, "the key exchange with the store has no post-quantum part: who records the traffic today may read it one day", about, "ssl_groups = 'X25519MLKEM768:X25519' in postgresql.conf, of PostgreSQL 18 or newer with OpenSSL 3.5 or newer")
		}
		if d.Certificate != nil {
			r.ends(found, "certificate of the "+about, d.Certificate.NotAfter, endsSoon, "give the database's server a new one")
		}
	}
	return out
}

func sameCertificate(a, b *rest.TLSCertificate) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}
