// Package pgstore is a store in a PostgreSQL database, of which one control
// plane at a time serves, with all of its contents in memory; others on the
// same database stand by.
//
// The database is the truth. A write is committed before anyone sees it; reads
// never ask the database. Writes that arrive while another is on its way go in
// one transaction, each with its own conditions, revision and outcome.
//
// Who serves holds an advisory lock of the database for as long as a connection
// of its own lasts, and has put a token of its own into the one row of the
// table mesh_state when it took over. The lock is for the taking over; the token
// is what counts: every transaction begins by moving that row on from the
// revision that is in memory to the next, if the token is still there. So a
// control plane that was cut off while another took over can't write anything,
// and what is in memory is what is in the database.
//
// It works with PostgreSQL 12 and later, directly or through pgbouncer in
// session mode. Transaction mode is not supported: there an advisory lock stays
// behind on a connection that is somebody else's next, who has it then, too. The
// token still keeps the data safe, but two control planes may take the database
// from each other again and again. A connection that has the lock before it asks
// for it, or no longer has it after, is refused; so are statements that clash.
// Where a pooler happens to show none of these, nothing is noticed.
package pgstore

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// Config is what Open and Migrate need.
type Config struct {
	// Host and Port are the server's; User, Password and Database are what it is
	// told. The password is never logged and is in no error.
	Host                     string
	Port                     uint32
	User, Password, Database string
	// ConnectTimeout bounds the making of one connection, TLS and sign-in
	// included; 0 means five seconds.
	ConnectTimeout time.Duration
	// MaxConnections bounds the connections, that of the lock included; 0 means
	// four, and fewer than two are two. MinConnections are kept open.
	MaxConnections, MinConnections int32
	// MaxIdleTime and MaxLifetime end connections that were idle, or there, for
	// so long; the lifetime is longer by up to MaxLifetimeJitter, at random.
	// HealthCheckInterval is how often that is looked at. 0 means the
	// contract's default: 30 minutes, an hour, a minute, 30 seconds.
	MaxIdleTime, MaxLifetime, MaxLifetimeJitter, HealthCheckInterval time.Duration
	// TLS gives the configuration of a new connection; it is called for each, so
	// that replaced files count. With it there is never a connection without
	// TLS. Nil means no TLS.
	TLS func() (*tls.Config, error)
	// TolerateNewer lets Open use a database that a newer version has migrated.
	TolerateNewer bool
	// Kinds are those that the store keeps. Resources of others that are in the
	// database stay there, unseen.
	Kinds []*resource.Kind
	// Instance is this control plane's name, shown to those that stand by.
	Instance string
	// Log is told who else serves, about connections that are lost and made
	// anew, and about what is in the database and can't be shown. Required.
	Log *slog.Logger
}

// Store is a store in a PostgreSQL database.
type Store struct {
	*store.Keeper
	*dialer
	pooled        *pgxpool.Pool
	log           *slog.Logger
	instance      string
	tolerateNewer bool
	// holder is the token by which the database knows this store.
	holder string

	// lock is the connection that holds the lock. It is the guard's, until that
	// has ended.
	lock    *pgx.Conn
	end     context.CancelFunc
	guarded chan struct{}
	closed  sync.Once

	// doubt is a transaction that may be in the database, or not. It is for who
	// writes, alone.
	doubt *doubt

	lost   chan struct{}
	mu     sync.Mutex
	broken error
	gone   error
	// away is when the lock went; zero while it is there.
	away time.Time
}

const (
	// pollEvery is how often a store that stands by tries for the lock, and
	// tellEvery how often it says that it stands by.
	pollEvery = time.Second
	tellEvery = time.Minute
	// yield is how long a store that stands by and could not reach the database
	// leaves the lock to who had it, and has lost its connection, most likely, for
	// the same reason: that tries every pollEvery at least.
	yield = 3 * time.Second
	// askLimit bounds a question about the state of things.
	askLimit = 5 * time.Second
	// loadLimit bounds the reading of all there is.
	loadLimit = 10 * time.Minute
	// maxKey is the longest kind, mesh and name together; an index has no room
	// for much longer ones.
	maxKey = 2048
)

// Open connects, waits until no other control plane serves from the database,
// and reads all that is in it. It says at once, and then every minute, for whom
// it waits; the end of ctx ends the wait. That the database can't be reached is
// an error at once, but not while it waits: then it tries again, and lets whoever
// served before go first. Tables that are missing, or of another version, are an
// error that says what to do. All errors but those of a wrong Config are
// errs.Unavailable.
//
// It asks for the lock every second, rather than waiting for it in the server:
// a statement that waits keeps the server from cleaning up behind everybody, and
// would not notice a connection that is half dead.
func Open(ctx context.Context, c Config) (*Store, error) {
	d, err := newDialer(c)
	if err != nil {
		return nil, err
	}
	s := &Store{
		dialer: d, log: c.Log, instance: c.Instance, tolerateNewer: c.TolerateNewer,
		guarded: make(chan struct{}), lost: make(chan struct{}),
	}
	s.Keeper = store.NewKeeper(store.Place{
		Name: s.where, MaxKey: maxKey, Kinds: c.Kinds, Log: c.Log,
		Ready: s.ready,
		Write: s.write,
	})
	if err := s.takeOver(ctx); err != nil {
		s.drop()
		return nil, err
	}
	guard, end := context.WithCancel(context.Background())
	s.end = end
	if s.pooled, err = pgxpool.NewWithConfig(guard, d.pool); err != nil {
		end()
		hangUp(s.lock)
		return nil, errs.New(errs.Internal, "%w", err)
	}
	go s.guard(guard)
	return s, nil
}

var (
	// errHeld says that another has the lock.
	errHeld = errors.New("another control plane has the lock")
	// errShared says that a connection's session is not its own.
	errShared = errors.New("the connection is shared with others")
)

// shared is the error of a connection whose session is not its own.
func (s *Store) shared() error {
	return &errs.Error{
		Kind: errs.Unavailable, Cause: errShared,
		Message: fmt.Sprintf("%s is behind something that shares connections, such as pgbouncer in transaction mode, and the lock went astray: use session mode, or connect to the server itself", s.where),
	}
}

// takeOver waits for the lock, makes the database this store's, and reads it.
func (s *Store) takeOver(ctx context.Context) error {
	var told time.Time
	away, late := false, false
	for {
		by, err := s.try(ctx, late)
		held := errors.Is(err, errHeld)
		late = err != nil && !held
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
		case !held && (told.IsZero() || !isBroken(err) || errors.Is(err, errTables) || errors.Is(err, errShared)):
			return s.failed("take over", err)
		case away != held && time.Since(told) < tellEvery:
			// That was said a moment ago.
		case held:
			s.log.Info("another control plane serves from the database; this one stands by", "store", s.where, "serving", by.instance, "since", by.since)
			told, away = time.Now(), false
		default:
			s.log.Warn("the database can't be reached; this control plane goes on standing by", "store", s.where, "error", s.failed("ask", err))
			told, away = time.Now(), true
		}
		if !pause(ctx, pollEvery) {
			return errs.New(errs.Unavailable, "wait for %s: %w", s.where, ctx.Err())
		}
	}
}

// pause waits, and reports whether ctx still goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// holding is what the database says about who serves.
type holding struct {
	holder, instance string
	since            *time.Time
	revision         uint64
	// had: the connection had the lock before it asked for it.
	had bool
}

// try takes the database over, if nobody serves from it. It keeps the
// connection, in s.lock, for the next time, or while the store serves. One that
// is late, as it could not reach the database before, leaves the lock to others
// for a while.
func (s *Store) try(ctx context.Context, late bool) (by holding, err error) {
	if s.lock == nil {
		if err := s.prepare(ctx); err != nil {
			return by, err
		}
		if late && !pause(ctx, yield) {
			return by, ctx.Err()
		}
	}
	asking, stop := context.WithTimeout(ctx, s.timeout+askLimit)
	defer stop()
	defer func() {
		if err != nil && !errors.Is(err, errHeld) {
			s.drop()
		}
	}()
	by, got, err := s.ask(asking, s.lock)
	switch {
	case err != nil:
	case by.had:
		err = s.shared()
	case !got:
		err = errHeld
	}
	if err == nil {
		// The wait may have been long.
		err = s.checkSchema(asking, s.lock)
	}
	if err == nil {
		err = s.take(ctx, s.lock)
	}
	return by, err
}

// prepare makes the lock's connection, to a database that can be used.
func (s *Store) prepare(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, s.timeout+askLimit)
	defer stop()
	var err error
	if s.lock, err = s.connectLock(ctx); err != nil {
		return err
	}
	if err := s.checkSchema(ctx, s.lock); err != nil {
		s.drop()
		return err
	}
	return nil
}

// drop gives the lock's connection up.
func (s *Store) drop() {
	if s.lock != nil {
		hangUp(s.lock)
		s.lock = nil
	}
}

// connectLock makes a connection that is to hold the lock. A server that hears
// no more of it is to notice soon, so that another can take over; not every
// server can be told so.
func (s *Store) connectLock(ctx context.Context) (*pgx.Conn, error) {
	conn, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	asking, stop := context.WithTimeout(ctx, askLimit)
	defer stop()
	for _, set := range []string{
		fmt.Sprint("set tcp_keepalives_idle = ", int(keepIdle.Seconds())),
		fmt.Sprint("set tcp_keepalives_interval = ", int(keepInterval.Seconds())),
		fmt.Sprint("set tcp_keepalives_count = ", keepCount),
		fmt.Sprint("set tcp_user_timeout = ", unanswered.Milliseconds()),
		"set idle_session_timeout = 0", // since PostgreSQL 14
	} {
		if _, err := conn.Exec(asking, set); err != nil && isBroken(err) {
			hangUp(conn)
			return nil, s.unreachable(err)
		}
	}
	return conn, nil
}

// ask tells who serves, and takes the lock where it is free. A session that has it
// gets it again; so it is looked up first. A replica has locks too, which say
// nothing about the primary's, so it is refused.
func (s *Store) ask(ctx context.Context, conn *pgx.Conn) (by holding, got bool, err error) {
	replica := false
	err = conn.QueryRow(ctx, "with lock as materialized (select "+hasLock+" as had) select holder, instance, since, revision, had, pg_is_in_recovery(), pg_try_advisory_lock($1) from mesh_state, lock", int64(lockServe)).
		Scan(&by.holder, &by.instance, &by.since, &by.revision, &by.had, &replica, &got)
	if err == nil && replica {
		err = errs.New(errs.Unavailable, "%s is a replica, which can't be written: set KUMA_STORE_POSTGRES_HOST to the primary", s.where)
	}
	return by, got, err
}

// hasLock tells whether a session has the lock $1.
const hasLock = "exists (select from pg_locks where locktype = 'advisory' and pid = pg_backend_pid() and (classid::bigint << 32 | objid::bigint) = $1)"

// take makes the database this store's and reads all that is in it. Whoever
// served before has either committed what it was writing, and it is read here,
// or never will.
func (s *Store) take(ctx context.Context, conn *pgx.Conn) error {
	ctx, stop := context.WithTimeout(ctx, loadLimit)
	defer stop()
	s.holder = rand.Text()
	s.Forget()
	var revision uint64
	err := pgx.BeginTxFunc(ctx, conn, readWrite, func(tx pgx.Tx) error {
		// What is read may take this side longer than the server would wait.
		if _, err := tx.Exec(ctx, "set local statement_timeout = 0; set local lock_timeout = 0; set local idle_in_transaction_session_timeout = 0"); err != nil {
			return err
		}
		var locked bool
		err := tx.QueryRow(ctx, "update mesh_state set holder = $2, instance = $3, since = now() returning revision, "+hasLock,
			int64(lockServe), s.holder, s.instance).Scan(&revision, &locked)
		if err != nil {
			return err
		}
		if !locked {
			return s.shared()
		}
		rows, err := tx.Query(ctx, "select kind, mesh, name, data from mesh_resources")
		if err != nil {
			return err
		}
		var key resource.Key
		var data []byte
		_, err = pgx.ForEachRow(rows, []any{&key.Kind, &key.Mesh, &key.Name, &data}, func() error {
			s.Load(key, data)
			return nil
		})
		return err
	})
	if err == nil {
		s.Start(revision)
	}
	return err
}

// guard keeps the lock until ctx ends or the store is lost.
func (s *Store) guard(ctx context.Context) {
	defer close(s.guarded)
	for {
		// Nobody ever notifies: this ends with the connection, or with ctx.
		_, err := s.lock.WaitForNotification(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			continue
		}
		s.gotLock(false)
		s.log.Warn("the connection that holds the database's lock broke; it is made anew", "store", s.where, "error", words(err))
		s.drop()
		if !s.regain(ctx) {
			return
		}
		s.gotLock(true)
		s.log.Info("this control plane has the database's lock again", "store", s.where)
	}
}

// regain gets the lock back, and reports whether it did.
func (s *Store) regain(ctx context.Context) bool {
	var told time.Time
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, pollEvery) {
		err := s.reacquire(ctx)
		if err == nil {
			return true
		}
		s.drop()
		if s.Err() != nil || ctx.Err() != nil {
			return false
		}
		if time.Since(told) >= tellEvery {
			s.log.Warn("the database's lock can't be had; reads go on", "store", s.where, "error", s.failed("lock", err))
			told = time.Now()
		}
		if !pause(ctx, wait) {
			return false
		}
	}
}

// reacquire gets the lock on a new connection, if the database is still this
// store's and what is in it is what is in memory.
func (s *Store) reacquire(ctx context.Context) error {
	var err error
	if s.lock, err = s.connectLock(ctx); err != nil {
		return err
	}
	asking, stop := context.WithTimeout(ctx, askLimit)
	defer stop()
	by, got, err := s.ask(asking, s.lock)
	switch {
	case err != nil:
		return err
	case by.holder != s.holder:
		return s.lose(by)
	case by.had:
		return s.shared()
	case !got:
		// Most likely the server hasn't noticed yet that the old connection is
		// gone.
		return errHeld
	}
	waited := s.Exclusive(asking, func() {
		if s.doubt != nil {
			err = s.conclude(asking, s.lock)
		}
		if err != nil {
			return
		}
		if by, _, err = s.ask(asking, s.lock); err == nil && (by.holder != s.holder || by.revision != s.Revision()) {
			err = s.lose(by)
		}
	})
	return errors.Join(waited, err)
}

// lose ends the store's service: the database is not, or no longer, what it
// left there.
func (s *Store) lose(by holding) error {
	var why string
	switch {
	case by.holder != s.holder && by.since != nil:
		why = fmt.Sprintf("another control plane, %q, has taken over at %s", by.instance, by.since.UTC().Format(time.RFC3339))
	case by.holder != s.holder:
		why = "another control plane had taken over and has given it back, or it was made anew"
	default:
		why = fmt.Sprintf("it is at revision %d, and this control plane is at %d: it was restored, or is a replica that had not got everything when it became the primary", by.revision, s.Revision())
	}
	err := errs.New(errs.Unavailable, "this control plane does not serve from %s any more: %s: it has to start again", s.where, why)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone != nil {
		return s.gone
	}
	s.gone, s.broken = err, err
	s.End(err)
	close(s.lost)
	s.log.Error("the database is lost to this control plane, which has to start again", "store", s.where, "error", why)
	return err
}

// Lost is closed when the store can't be written any more because another
// control plane has taken over, or the database has gone back to an older
// state. The process is to end: it starts again as one that stands by.
func (s *Store) Lost() <-chan struct{} { return s.lost }

// Err says why the store was lost, and is nil before that.
func (s *Store) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone
}

// Away is for how long the store has not had the database's lock, as far as it
// knows; 0 where it has it. It goes on with what is in memory meanwhile, and
// another control plane may have taken over.
func (s *Store) Away() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away.IsZero() {
		return 0
	}
	return max(time.Since(s.away), 1)
}

// gotLock notes that the lock is there, or went.
func (s *Store) gotLock(there bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away = (time.Time{}); !there {
		s.away = time.Now()
	}
}

// Connections has an entry for each connection that is open now: the state of
// its TLS, or nil where it has none.
func (s *Store) Connections() []*tls.ConnectionState { return s.connections() }

// Pool tells about the connections for writes. The lock's connection is not
// one of them.
func (s *Store) Pool() *pgxpool.Stat { return s.pooled.Stat() }

// Close gives the database back, for another control plane to serve from.
// Later writes fail, and those who watch are told.
func (s *Store) Close() error {
	s.closed.Do(s.close)
	return nil
}

func (s *Store) close() {
	s.end()
	<-s.guarded
	_ = s.Exclusive(context.Background(), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		closed := errs.New(errs.Unavailable, "the control plane is stopping: store %s: %w", s.where, os.ErrClosed)
		if s.broken == nil {
			s.broken = closed
		}
		s.End(closed)
	})
	if s.lock != nil {
		ctx, stop := context.WithTimeout(context.Background(), time.Second)
		defer stop()
		// Both only make it quicker and clearer for who comes next: the lock goes
		// with the connection, and the token is worth nothing without this store.
		_, _ = s.lock.Exec(ctx, "update mesh_state set holder = '', instance = '', since = null where holder = $1", s.holder)
		_, _ = s.lock.Exec(ctx, "select pg_advisory_unlock($1)", int64(lockServe))
		s.drop()
	}
	// A connection that is half dead takes its time to end, and may.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.pooled.Close()
	}()
	limit := time.NewTimer(time.Second)
	defer limit.Stop()
	select {
	case <-ended:
	case <-limit.C:
	}
}
