package pgstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sys/unix"

	"kuma/internal/errs"
	"kuma/internal/store"
)

// A peer that is gone without a word is noticed within keepIdle + keepCount ×
// keepInterval where nothing is on its way, and within unanswered where
// something is.
const (
	keepIdle     = 10 * time.Second
	keepInterval = 5 * time.Second
	keepCount    = 3
	unanswered   = 25 * time.Second
)

// session is set on every connection. What is left in the middle of a
// transaction by a connection that broke must end soon, for it keeps the next
// write waiting. Where a database was told not to wait for the disk, it waits
// for it here: a write that is acknowledged stays.
const session = `set statement_timeout = '10s';
set lock_timeout = '5s';
set idle_in_transaction_session_timeout = '15s';
select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'`

// unset has a value for all that the library would take from the environment, or
// from files of the home directory, and is the better off without. What counts
// is set afterwards.
const unset = `host=localhost port=5432 user=none password=none database=none application_name=none options='' timezone=UTC connect_timeout=0 target_session_attrs=any
passfile='' servicefile='' sslmode=disable sslrootcert='' sslcert='' sslkey='' sslpassword='' sslcertmode=allow sslnegotiation='' sslsni=1
min_protocol_version=3.0 max_protocol_version=3.0 channel_binding=prefer require_auth=''`

// readWrite is how all transactions are made. Each that writes begins by
// locking the one row of mesh_state; what it reads after that is the present
// state, which no snapshot from before would show.
var readWrite = pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}

// dialer makes connections, and knows those that are open.
type dialer struct {
	// where is the database in words, without secrets.
	where   string
	user    string
	timeout time.Duration
	tls     func() (*tls.Config, error)
	pool    *pgxpool.Config

	mu sync.Mutex
	// links are those that are open, and whether they have got through: signed
	// in.
	links map[*link]bool
}

// link is a connection to the server.
type link struct {
	net.Conn
	dialer *dialer
	// tls is its state, or nil without TLS.
	tls *tls.ConnectionState
}

// Close is net.Conn's.
func (l *link) Close() error {
	l.dialer.mu.Lock()
	delete(l.dialer.links, l)
	l.dialer.mu.Unlock()
	return l.Conn.Close()
}

func newDialer(c Config) (*dialer, error) {
	if c.Port == 0 || c.Port > math.MaxUint16 {
		return nil, errs.New(errs.Invalid, "the port of PostgreSQL is %d: set KUMA_STORE_POSTGRES_PORT to one from 1 to 65535", c.Port)
	}
	if c.Host == "" || c.User == "" || c.Database == "" {
		return nil, errs.New(errs.Invalid, "PostgreSQL needs a host, a user and a database: set KUMA_STORE_POSTGRES_HOST, KUMA_STORE_POSTGRES_USER and KUMA_STORE_POSTGRES_DB_NAME")
	}
	orElse := func(d, otherwise time.Duration) time.Duration {
		if d > 0 {
			return d
		}
		return otherwise
	}
	d := &dialer{
		where: fmt.Sprintf("the database %s at %s", c.Database, net.JoinHostPort(c.Host, fmt.Sprint(c.Port))),
		user:  c.User, timeout: orElse(c.ConnectTimeout, 5*time.Second), tls: c.TLS, links: map[*link]bool{},
	}
	if service := os.Getenv("PGSERVICE"); service != "" {
		// The one setting that can't be overruled.
		return nil, errs.New(errs.Invalid, "the environment has PGSERVICE=%s, which counts for nothing here: unset it", service)
	}
	pool, err := pgxpool.ParseConfig(unset)
	if err != nil {
		return nil, errs.New(errs.Invalid, "the environment's own settings for PostgreSQL, which begin with PG, can't be used: %w: unset them", err)
	}
	cc := pool.ConnConfig
	cc.Host, cc.Port, cc.User, cc.Password, cc.Database = c.Host, uint16(c.Port), c.User, c.Password, c.Database
	cc.TLSConfig, cc.Fallbacks, cc.SSLNegotiation, cc.SSLCertMode = nil, nil, "", ""
	cc.MinProtocolVersion, cc.MaxProtocolVersion, cc.RequireAuth, cc.ChannelBinding = "3.0", "3.0", "", "prefer"
	cc.KerberosSrvName, cc.KerberosSpn = "", ""
	cc.ConnectTimeout, cc.DialFunc, cc.ValidateConnect, cc.AfterConnect = d.timeout, d.dial, nil, d.arrive
	cc.RuntimeParams = map[string]string{"application_name": applicationName(c.Instance), "client_encoding": "UTF8"}
	// No message is longer than the largest row.
	cc.MaxProtocolMessageBodyLen = store.MaxRecord + 1<<20
	cc.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
	pool.BeforeConnect = func(_ context.Context, cc *pgx.ConnConfig) error { return d.secure(cc) }
	pool.MaxConns = 3
	if c.MaxConnections > 0 {
		pool.MaxConns = max(c.MaxConnections-1, 1)
	}
	pool.MinConns = min(max(c.MinConnections-1, 0), pool.MaxConns)
	pool.MaxConnIdleTime = orElse(c.MaxIdleTime, 30*time.Minute)
	pool.MaxConnLifetime = orElse(c.MaxLifetime, time.Hour)
	pool.MaxConnLifetimeJitter = orElse(c.MaxLifetimeJitter, time.Minute)
	pool.HealthCheckPeriod = orElse(c.HealthCheckInterval, 30*time.Second)
	pool.PingTimeout = 3 * time.Second
	d.pool = pool
	return d, nil
}

// applicationName is what the server shows in pg_stat_activity; it cuts longer
// ones off.
func applicationName(instance string) string {
	name := strings.TrimSpace("kuma-cp " + strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, instance))
	return name[:min(len(name), 63)]
}

// secure gives a connection that is to be made its TLS.
func (d *dialer) secure(cc *pgx.ConnConfig) error {
	if d.tls == nil {
		return nil
	}
	var err error
	if cc.TLSConfig, err = d.tls(); err != nil {
		return err
	}
	if cc.TLSConfig == nil {
		return errors.New("TLS is wanted, and there is no configuration for it")
	}
	return nil
}

func (d *dialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepIdle, Interval: keepInterval, Count: keepCount},
		Control: func(network, _ string, c syscall.RawConn) error {
			if !strings.HasPrefix(network, "tcp") {
				return nil
			}
			var err error
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unanswered.Milliseconds()))
			}), err)
		},
	}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l := &link{Conn: conn, dialer: d}
	d.mu.Lock()
	d.links[l] = false
	d.mu.Unlock()
	return l, nil
}

// arrive is called where a connection is there and signed in.
func (d *dialer) arrive(ctx context.Context, conn *pgconn.PgConn) error {
	ctx, stop := context.WithTimeout(ctx, d.timeout)
	defer stop()
	var state *tls.ConnectionState
	under := conn.Conn()
	if secured, ok := under.(*tls.Conn); ok {
		s := secured.ConnectionState()
		state, under = &s, secured.NetConn()
	}
	if (d.tls != nil) != (state != nil) {
		return errors.New("the connection should have TLS, and has none")
	}
	if l, ok := under.(*link); ok {
		d.mu.Lock()
		l.tls = state
		d.links[l] = true
		d.mu.Unlock()
	}
	_, err := conn.Exec(ctx, session).ReadAll()
	return err
}

// connections has the TLS state of each connection that is there.
func (d *dialer) connections() []*tls.ConnectionState {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []*tls.ConnectionState
	for l, up := range d.links {
		if up {
			out = append(out, l.tls)
		}
	}
	return out
}

// connect makes a connection that is in no pool.
func (d *dialer) connect(ctx context.Context) (*pgx.Conn, error) {
	cc := d.pool.ConnConfig.Copy()
	if err := d.secure(cc); err != nil {
		return nil, d.unreachable(err)
	}
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, d.unreachable(err)
	}
	return conn, nil
}

// hangUp ends a connection, in order where that is soon done.
func hangUp(conn *pgx.Conn) {
	ctx, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	_ = conn.Close(ctx)
}

// isBroken tells an error of the connection, after which there is no other
// statement on it, from one of a statement.
func isBroken(err error) bool {
	p, ok := errors.AsType[*pgconn.PgError](err)
	return !ok || p.Severity == "FATAL" || p.Severity == "PANIC" || p.SeverityUnlocalized == "FATAL" || p.SeverityUnlocalized == "PANIC"
}

// unreachable is the error for a connection that could not be made.
func (d *dialer) unreachable(err error) error {
	if _, ok := errors.AsType[*errs.Error](err); ok {
		return err
	}
	return &errs.Error{Kind: errs.Unavailable, Message: fmt.Sprintf("connect to %s as %s: %s%s", d.where, d.user, words(err), hint(err)), Cause: err}
}

// failed is the error for something that was tried on a connection.
func (d *dialer) failed(what string, err error) error {
	if _, ok := errors.AsType[*errs.Error](err); ok {
		return err
	}
	return &errs.Error{Kind: errs.Unavailable, Message: fmt.Sprintf("%s %s: %s%s", what, d.where, words(err), hint(err)), Cause: err}
}

// words says an error of the library in one line.
func words(err error) string {
	if p, ok := errors.AsType[*pgconn.PgError](err); ok {
		if p.Detail != "" {
			return p.Message + " (" + p.Detail + ")"
		}
		return p.Message
	}
	if pgconn.Timeout(err) || errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	if c, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		err = errors.Unwrap(c)
	}
	// Where TLS fails, what was being sent when it did says nothing.
	if cause := tlsCause(err); cause != nil {
		err = cause
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}

// tlsCause is the error of TLS alone that is in another one, or nil.
func tlsCause(err error) error {
	for _, prefix := range []string{"tls: ", "x509: ", "remote error: tls: "} {
		if strings.HasPrefix(err.Error(), prefix) {
			return err
		}
	}
	switch outer := err.(type) {
	case interface{ Unwrap() error }:
		if inner := outer.Unwrap(); inner != nil {
			return tlsCause(inner)
		}
	case interface{ Unwrap() []error }:
		for _, inner := range outer.Unwrap() {
			if cause := tlsCause(inner); cause != nil {
				return cause
			}
		}
	}
	return nil
}

// hint says what to do about an error.
func hint(err error) string {
	if h := causeHint(err); h != "" {
		return ": " + h
	}
	return ""
}

func causeHint(err error) string {
	if p, ok := errors.AsType[*pgconn.PgError](err); ok {
		return serverHint(p)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return "the server's certificate is not from a CA in KUMA_STORE_POSTGRES_TLS_CA_PATH: set that to the file with the server's CA"
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return "set KUMA_STORE_POSTGRES_HOST to a name that the server's certificate has, give the server a certificate with this name, or set KUMA_STORE_POSTGRES_TLS_MODE=verifyCa, which does not look at names"
	}
	if c, ok := errors.AsType[x509.CertificateInvalidError](err); ok && c.Reason == x509.Expired {
		return "give the server a new certificate, and check the clocks"
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return "check KUMA_STORE_POSTGRES_HOST, and that this machine can resolve it"
	}
	said := err.Error()
	for _, h := range []struct {
		when bool
		do   string
	}{
		{strings.Contains(said, "server refused TLS connection"), "the server does not speak TLS: set ssl = on there with a certificate; or KUMA_STORE_POSTGRES_TLS_MODE=disable, which sends secrets and the password over the network in plain text"},
		{strings.Contains(said, "remote error: tls: protocol version"), "the server does not speak this version of TLS: set ssl_min_protocol_version and ssl_max_protocol_version there"},
		{strings.Contains(said, "remote error: tls:"), "the server does not take the client's certificate: set KUMA_STORE_POSTGRES_TLS_CERT_PATH and KUMA_STORE_POSTGRES_TLS_KEY_PATH to a pair from the CA that the server has as its ssl_ca_file"},
		// With TLS 1.3 the server looks at the client's certificate after the client
		// has gone on; where its refusal comes too late to be read, it is a reset.
		{errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE), "the server hung up, as it does where it does not take the client's certificate: KUMA_STORE_POSTGRES_TLS_CERT_PATH and KUMA_STORE_POSTGRES_TLS_KEY_PATH are to be a pair from the CA that the server has as its ssl_ca_file; the server's log has the reason"},
		{errors.Is(err, syscall.ECONNREFUSED), "nothing listens there: check KUMA_STORE_POSTGRES_HOST and KUMA_STORE_POSTGRES_PORT, and that the server runs"},
		{errors.Is(err, syscall.ENOENT), "there is no such socket: check KUMA_STORE_POSTGRES_HOST, and that the server runs"},
		{pgconn.Timeout(err) || errors.Is(err, context.DeadlineExceeded), "check that the server runs and that nothing between here and there drops the packets; KUMA_STORE_POSTGRES_CONNECTION_TIMEOUT is how long it may take"},
	} {
		if h.when {
			return h.do
		}
	}
	return ""
}

// serverHint says what to do about what the server answers. The codes are
// those of PostgreSQL's appendix A.
func serverHint(p *pgconn.PgError) string {
	switch p.Code {
	case "28P01":
		return "check KUMA_STORE_POSTGRES_USER and KUMA_STORE_POSTGRES_PASSWORD"
	case "28000":
		switch {
		case strings.Contains(p.Message, "no encryption"), strings.Contains(p.Message, "SSL off"):
			return "the server takes no connection without TLS: set KUMA_STORE_POSTGRES_TLS_MODE to verifyFull, and KUMA_STORE_POSTGRES_TLS_CA_PATH to the file with its CA"
		case strings.Contains(p.Message, "pg_hba.conf"):
			return "the server's pg_hba.conf has no line that lets this user into this database from here: add one"
		case strings.Contains(p.Message, "requires a valid client certificate"):
			return "set KUMA_STORE_POSTGRES_TLS_CERT_PATH and KUMA_STORE_POSTGRES_TLS_KEY_PATH to a pair from the CA that the server has as its ssl_ca_file"
		case strings.Contains(p.Message, "certificate authentication failed"):
			return "the common name of the client's certificate must be KUMA_STORE_POSTGRES_USER, or be mapped to it in the server's pg_ident.conf"
		}
		return "check KUMA_STORE_POSTGRES_USER, and the server's pg_hba.conf"
	case "3D000":
		return "make it (createdb), or set KUMA_STORE_POSTGRES_DB_NAME"
	case "42501":
		return "give the user the right to it: GRANT CREATE ON SCHEMA for kuma-cp migrate up; or let one user migrate and run"
	case "25006":
		return "this server is a replica, or was set to read-only: set KUMA_STORE_POSTGRES_HOST to the primary"
	case "42P05", "26000":
		return "something between here and the server shares connections, such as pgbouncer in transaction mode: use session mode, or connect to the server itself"
	case "53100":
		return "the server's disk is full: make room"
	case "53300":
		return "the server has no connection to spare: raise its max_connections, or the limit of the user or the database"
	case "57P03":
		return "the server is on its way up or down: try again"
	case "55P03", "57014":
		return "the server was too slow, or something else holds a lock: look at pg_stat_activity there"
	}
	return ""
}
