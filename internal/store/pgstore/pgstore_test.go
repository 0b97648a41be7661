package pgstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/store/pgstore"
	"kuma/internal/store/storetest"
	"kuma/test/postgres"
)

// patience is how long a thing may take that is bound to happen.
const patience = time.Minute

// childPort, where set, makes this test binary a process that writes to the
// store of a server until it is killed.
const childPort = "PGSTORE_TEST_CHILD_PORT"

func TestMain(m *testing.M) {
	if port := os.Getenv(childPort); port != "" {
		c := config(&postgres.Server{Host: "127.0.0.1"}, "db1")
		_, err := fmt.Sscan(port, &c.Port)
		if err == nil {
			var s *pgstore.Store
			if s, err = pgstore.Open(context.Background(), c); err == nil {
				err = storetest.WriteForEver(s)
			}
		}
		fmt.Println("error", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

var discard = slog.New(slog.DiscardHandler)

// config is for a database of the server.
func config(s *postgres.Server, database string) pgstore.Config {
	return pgstore.Config{
		Host: s.Host, Port: uint32(s.Port), User: postgres.User, Password: postgres.Password, Database: database,
		ConnectTimeout: patience, Kinds: storetest.NewTypes().Kinds(), Instance: "first", Log: discard,
	}
}

// migrated makes a database that is ready to be used.
func migrated(t testing.TB, s *postgres.Server) string {
	t.Helper()
	name := s.Database()
	if changed, err := pgstore.Migrate(t.Context(), config(s, name)); err != nil || !changed {
		t.Fatalf("changed: %v, %v", changed, err)
	}
	return name
}

// served makes a server with one database, and opens that.
func served(t *testing.T) (*postgres.Server, pgstore.Config, *pgstore.Store) {
	t.Helper()
	server := postgres.Start(t, postgres.Options{})
	c := config(server, migrated(t, server))
	return server, c, open(t, c)
}

func open(t testing.TB, c pgstore.Config) *pgstore.Store {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	s, err := pgstore.Open(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// opener opens a database again and again.
func opener(c pgstore.Config) storetest.Opener {
	return func(t testing.TB, kinds []*resource.Kind, log *slog.Logger) storetest.Closing {
		t.Helper()
		c := c
		c.Kinds, c.Log = kinds, log
		s := open(t, c)
		return storetest.Closing{Store: s, Close: s.Close}
	}
}

// waiting is a store that has to wait until it may serve.
type waiting struct {
	log    logged
	opened <-chan *pgstore.Store
}

// opening opens a store aside.
func opening(t *testing.T, c pgstore.Config) <-chan *pgstore.Store {
	t.Helper()
	opened := make(chan *pgstore.Store, 1)
	go func() {
		defer close(opened)
		s, err := pgstore.Open(t.Context(), c)
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { s.Close() })
		opened <- s
	}()
	return opened
}

// standBy opens a store that has to wait.
func standBy(t *testing.T, c pgstore.Config, name string) *waiting {
	t.Helper()
	w := new(waiting)
	c.Instance, c.Log = name, w.log.logger()
	w.opened = opening(t, c)
	soon(t, "it stands by", func() bool { return strings.Contains(w.log.String(), "stands by") })
	if !strings.Contains(w.log.String(), "serving=first since=") {
		t.Errorf("the log should say who serves: %s", &w.log)
	}
	return w
}

// within is what comes before patience ends.
func within[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("not within %v: %s", patience, what)
		panic("unreachable")
	}
}

// soon waits until something is so.
func soon(t testing.TB, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !is(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("after %v it is not so: %s", patience, what)
		}
	}
}

// logged is a log to look into.
type logged struct {
	mu  sync.Mutex
	all bytes.Buffer
}

// Write is io.Writer's.
func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(b)
}

// String is all that was logged.
func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

func (l *logged) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func TestContract(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	template := migrated(t, server)
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, config(server, server.Copy(template)))
	})
	storetest.RunKept(t, 2048, func(t *testing.T) storetest.Opener {
		return opener(config(server, server.Copy(template)))
	})
}

func TestMigrate(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	name := server.Database()
	c := config(server, name)
	// Tables of another control plane, which are nobody's business here.
	server.Exec(name, "create table resources (name text); insert into resources values ('a'); create table schema_migrations (version bigint)")
	_, err := pgstore.Open(t.Context(), c)
	storetest.Says(t, err, errs.Unavailable, "has no tables yet", "kuma-cp migrate up", name)

	// Many at once: one of them does it.
	var all sync.WaitGroup
	var did atomic.Int32
	for range 6 {
		all.Go(func() {
			changed, err := pgstore.Migrate(t.Context(), c)
			if err != nil {
				t.Error(err)
			}
			if changed {
				did.Add(1)
			}
		})
	}
	all.Wait()
	if did.Load() != 1 {
		t.Errorf("%d migrations did something, want 1", did.Load())
	}
	s := open(t, c)
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 10)))
	want, revision := storetest.Content(t, s)
	if changed, err := pgstore.Migrate(t.Context(), c); changed || err != nil {
		t.Errorf("again, while one serves: %v, %v", changed, err)
	}
	storetest.Same(t, s, want, revision)
	s.Close()

	// A newer version has been here.
	server.Exec(name, "update mesh_state set schema_version = 99")
	for _, try := range []func() error{
		func() error { _, err := pgstore.Open(t.Context(), c); return err },
		func() error { _, err := pgstore.Migrate(t.Context(), c); return err },
	} {
		storetest.Says(t, try(), errs.Unavailable, "version 99", "newer", "KUMA_STORE_POSTGRES_TOLERATE_NEWER_DB_VERSIONS")
	}
	c.TolerateNewer = true
	if changed, err := pgstore.Migrate(t.Context(), c); changed || err != nil {
		t.Errorf("a newer one, tolerated: %v, %v", changed, err)
	}
	storetest.Same(t, open(t, c), want, revision)
	if got := server.Query(name, "select count(*) from resources"); got != "1" {
		t.Errorf("the other control plane's table has %s rows, want 1", got)
	}
}

func TestBadConfig(t *testing.T) {
	t.Parallel()
	good := pgstore.Config{Host: "127.0.0.1", Port: 5432, User: "u", Password: postgres.Password, Database: "d", Log: discard}
	for says, change := range map[string]func(*pgstore.Config){
		"KUMA_STORE_POSTGRES_PORT":    func(c *pgstore.Config) { c.Port = 65536 },
		"KUMA_STORE_POSTGRES_HOST":    func(c *pgstore.Config) { c.Host = "" },
		"KUMA_STORE_POSTGRES_USER":    func(c *pgstore.Config) { c.User = "" },
		"KUMA_STORE_POSTGRES_DB_NAME": func(c *pgstore.Config) { c.Database = "" },
	} {
		c := good
		change(&c)
		_, err := pgstore.Open(t.Context(), c)
		storetest.Says(t, err, errs.Invalid, says)
	}
}

func TestStandBy(t *testing.T) {
	t.Parallel()
	server, c, first := served(t)
	storetest.Put(t, first, store.Set(storetest.FruitOf("a", 10)))
	ctx, stop := context.WithCancel(t.Context())
	waits := make(chan error)
	go func() {
		_, err := pgstore.Open(ctx, c)
		waits <- err
	}()
	wire, c2 := newWire(t, c)
	second := standBy(t, c2, "second")
	stop()
	if err := within(t, "the wait ends with its context", waits); !errs.Is(err, errs.Unavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that was ended: %v", err)
	}
	storetest.Put(t, first, store.Set(storetest.FruitOf("b", 10)))
	want, revision := storetest.Content(t, first)
	// Who stands by goes on doing so where the database is away for a while.
	wire.sever()
	soon(t, "it says so", func() bool { return strings.Contains(second.log.String(), "goes on standing by") })
	wire.mend()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	s := within(t, "the other takes over", second.opened)
	storetest.Same(t, s, want, revision)
	storetest.Put(t, s, store.Set(storetest.FruitOf("c", 10)))
	if first.Err() != nil {
		t.Errorf("a store that was closed is not lost: %v", first.Err())
	}
	if got := server.Query(c.Database, "select instance from mesh_state"); got != "second" {
		t.Errorf("%q serves, want second", got)
	}
}

// TestStandByYields: after a time without the database, who served before has the
// first go at the lock.
func TestStandByYields(t *testing.T) {
	t.Parallel()
	_, c, first := served(t)
	storetest.Put(t, first, store.Set(storetest.FruitOf("a", 10)))
	wire, c2 := newWire(t, c)
	second := standBy(t, c2, "second")
	wire.sever()
	soon(t, "it says so", func() bool { return strings.Contains(second.log.String(), "goes on standing by") })
	first.Close()
	mended := time.Now()
	wire.mend()
	s := within(t, "the other takes over", second.opened)
	if waited := time.Since(mended); waited < 3*time.Second {
		t.Errorf("it took over after %v, want 3s at least", waited)
	}
	storetest.Put(t, s, store.Set(storetest.FruitOf("b", 10)))
}

// TestAway: a store knows how long it has been without the lock.
func TestAway(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	wire, c := newWire(t, config(server, migrated(t, server)))
	s := open(t, c)
	for range 2 {
		if away := s.Away(); away != 0 {
			t.Errorf("%v without the lock that it has", away)
		}
		wire.sever()
		soon(t, "it knows", func() bool { return s.Away() > 0 })
		before := s.Away()
		soon(t, "it goes on", func() bool { return s.Away() > before+10*time.Millisecond })
		wire.mend()
		soon(t, "it is over", func() bool { return s.Away() == 0 })
	}
}

// TestAnothersSession: a connection that has the lock before it was asked for is
// one that is shared with who serves, as a pooler's may be.
func TestAnothersSession(t *testing.T) {
	t.Parallel()
	server, c, s := served(t)
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 10)))
	key := server.Query(c.Database, "select (classid::bigint << 32) | objid::bigint from pg_locks where locktype = 'advisory'")
	take := "select pg_advisory_lock(" + key + ")"
	s.Close()
	wire, c := newWire(t, c)
	wire.set(func() { wire.first = take })
	_, err := pgstore.Open(t.Context(), c)
	storetest.Says(t, err, errs.Unavailable, "pgbouncer in transaction mode", "use session mode")
	if got := server.Query(c.Database, "select holder from mesh_state"); got != "" {
		t.Errorf("it has taken the database: %q", got)
	}

	// So is one that is found while standing by, and by who has lost it.
	wire.set(func() { wire.first = "" })
	s = open(t, c)
	log := new(logged)
	c.Log = log.logger()
	failed := make(chan error, 1)
	go func() {
		_, err := pgstore.Open(t.Context(), c)
		failed <- err
	}()
	soon(t, "it stands by", func() bool { return strings.Contains(log.String(), "stands by") })
	wire.set(func() {
		wire.first = take
		wire.cutAll()
	})
	storetest.Says(t, within(t, "the wait ends", failed), errs.Unavailable, "pgbouncer in transaction mode", "use session mode")
	soon(t, "it is without the lock", func() bool { return s.Away() > 0 })
	wire.set(func() { wire.first = "" })
	soon(t, "it has the lock again", func() bool { return s.Away() == 0 })
	storetest.Put(t, s, store.Set(storetest.FruitOf("b", 10)))
}

// isLost checks that a store knows that it is lost, and takes no writes.
func isLost(t *testing.T, s *pgstore.Store, words ...string) {
	t.Helper()
	within(t, "the store is told that it is lost", s.Lost())
	storetest.Says(t, s.Err(), errs.Unavailable, append(words, "start again")...)
	_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("late", 1)))
	storetest.Says(t, err, errs.Unavailable, append(words, "nothing was written")...)
	_, revision := storetest.Content(t, s)
	for _, err := range s.Watch(t.Context(), revision) {
		storetest.Says(t, err, errs.Unavailable, words...)
	}
}

// TestFence cuts a control plane off until another has taken over: it must not
// write anything any more, and must say so.
func TestFence(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	direct := config(server, migrated(t, server))
	wire, c := newWire(t, direct)
	first := open(t, c)
	storetest.Put(t, first, store.Set(storetest.FruitOf("a", 10)))
	second := standBy(t, direct, "second")
	wire.sever()
	_, err := first.Put(t.Context(), store.Set(storetest.FruitOf("b", 10)))
	storetest.Says(t, err, errs.Unavailable, "nothing was changed", fmt.Sprint("127.0.0.1:", c.Port))
	s := within(t, "the other takes over", second.opened)
	storetest.Put(t, s, store.Set(storetest.FruitOf("c", 10)))
	want, revision := storetest.Content(t, s)
	if first.Err() != nil {
		t.Fatalf("it can't know yet: %v", first.Err())
	}
	wire.mend()
	isLost(t, first, "second", "has taken over")
	storetest.Same(t, s, want, revision)
	s.Close()
	storetest.Same(t, open(t, direct), want, revision)
}

// TestFenceAlone is about the token, where the lock is of no help.
func TestFenceAlone(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	for _, c := range []struct{ name, sql, says string }{
		{"another took over", "update mesh_state set holder = 'x', instance = 'third', since = now()", `"third", has taken over`},
		{"the database went back", "update mesh_state set revision = revision - 1", "it is at revision 0, and this control plane is at 1"},
		{"the state is gone", "delete from mesh_state", "made anew"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			config := config(server, migrated(t, server))
			s := open(t, config)
			storetest.Put(t, s, store.Set(storetest.FruitOf("a", 10)))
			server.Exec(config.Database, c.sql)
			_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("b", 10)))
			storetest.Says(t, err, errs.Unavailable, c.says)
			isLost(t, s, c.says)
			if got := server.Query(config.Database, "select count(*) from mesh_resources"); got != "1" {
				t.Errorf("%s rows, want 1", got)
			}
		})
	}
	t.Run("told without a write", func(t *testing.T) {
		t.Parallel()
		config := config(server, migrated(t, server))
		s := open(t, config)
		server.Exec(config.Database, "update mesh_state set holder = 'x', instance = 'third', since = now()")
		cutLock(server, config.Database)
		isLost(t, s, `"third", has taken over`)
	})
}

// cutLock ends the connection that holds the lock.
func cutLock(s *postgres.Server, database string) {
	s.Exec(database, "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and database = (select oid from pg_database where datname = current_database())")
}

// TestLockAgain cuts the connection with the lock: it is made anew, and all goes
// on.
func TestLockAgain(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	c := config(server, migrated(t, server))
	log := new(logged)
	c.Log = log.logger()
	s := open(t, c)
	for i := range 5 {
		cutLock(server, c.Database)
		storetest.Put(t, s, store.Set(storetest.FruitOf("a", i)))
		soon(t, "the lock is there again", func() bool { return strings.Count(log.String(), "has the database's lock again") == i+1 })
	}
	if s.Err() != nil {
		t.Error(s.Err())
	}
	if got := server.Query(c.Database, "select count(*) from pg_locks where locktype = 'advisory'"); got != "1" {
		t.Errorf("%s locks, want 1", got)
	}
	server.Stop()
	soon(t, "it says that the lock can't be had", func() bool { return strings.Contains(log.String(), "reads go on") })
	_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("a", 7)))
	storetest.Says(t, err, errs.Unavailable, "write to", "connection refused", c.Database, fmt.Sprint(c.Port), "nothing was changed")
	if said := log.String() + err.Error(); strings.Contains(said, postgres.Password) {
		t.Errorf("the password was said: %s", said)
	}
	server.Launch()
	soon(t, "writes go on", func() bool {
		_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("a", 8)))
		return err == nil
	})
}

// writer writes transactions to a store until it is stopped, and knows what
// came of each.
type writer struct {
	all  sync.WaitGroup
	stop atomic.Bool
	mu   sync.Mutex
	// made and refused are the names of what was written, or not; unsure those
	// of which the store said that it did not know.
	made, refused, unsure []string
}

func (w *writer) start(s *pgstore.Store, writers int) {
	for n := range writers {
		w.all.Go(func() {
			for i := 0; !w.stop.Load(); i++ {
				name := fmt.Sprintf("w%d-%d", n, i)
				_, err := s.Put(context.Background(), store.Create(storetest.FruitOf(name, i%500)), store.Set(storetest.FruitOf(fmt.Sprint("shared", n), i%3000)))
				w.mu.Lock()
				switch {
				case err == nil:
					w.made = append(w.made, name)
				case strings.Contains(err.Error(), "it is not known"):
					w.unsure = append(w.unsure, name)
				case strings.Contains(err.Error(), "nothing was changed"):
					w.refused = append(w.refused, name)
				default:
					w.refused = append(w.refused, "!"+err.Error())
				}
				w.mu.Unlock()
			}
		})
	}
}

// count is how many transactions were made.
func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.made)
}

// check ends the writers, and holds what is in memory, and what a store reads
// that is opened on the same database, to what they were told.
func (w *writer) check(t *testing.T, s *pgstore.Store, c pgstore.Config) {
	t.Helper()
	w.stop.Store(true)
	w.all.Wait()
	soon(t, "a write is taken, which settles all that was in doubt", func() bool {
		_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("last", 1)))
		return err == nil
	})
	want, revision := storetest.Content(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	storetest.Same(t, open(t, c), want, revision)
	key := func(name string) resource.Key { return storetest.FruitOf(name, 0).Key() }
	for _, name := range w.made {
		if _, ok := want[key(name)]; !ok {
			t.Errorf("%s was acknowledged, and is not there", name)
		}
	}
	for _, name := range w.refused {
		if _, ok := want[key(name)]; ok || name[0] == '!' {
			t.Errorf("%s was refused, and is there: %v", name, ok)
		}
	}
	t.Logf("%d made, %d refused, %d unsure", len(w.made), len(w.refused), len(w.unsure))
}

// TestRestart crashes the server under a stream of writes.
func TestRestart(t *testing.T) {
	t.Parallel()
	server, c, s := served(t)
	w := new(writer)
	w.start(s, 4)
	for range 4 {
		before := w.count()
		soon(t, "writes go on", func() bool { return w.count() > before+50 })
		server.Kill()
		if _, err := s.Get(t.Context(), storetest.FruitOf("w0-0", 0).Key()); err != nil {
			t.Errorf("reading while the server is down: %v", err)
		}
		server.Launch()
	}
	before := w.count()
	soon(t, "writes go on", func() bool { return w.count() > before+50 })
	w.check(t, s, c)
}

// TestFailover makes a replica the primary. With one that the server waits for,
// nothing is lost; with one that is behind, the store knows that something is.
func TestFailover(t *testing.T) {
	t.Parallel()
	t.Run("a replica that has all", func(t *testing.T) {
		t.Parallel()
		primary := postgres.Start(t, postgres.Options{})
		replica := primary.Replica()
		direct := config(primary, migrated(t, primary))
		primary.Exec("postgres", "alter system set synchronous_standby_names = '*'")
		primary.Reload()
		soon(t, "the server waits for the replica", func() bool {
			return primary.Query("postgres", "select count(*) from pg_stat_replication where sync_state = 'sync'") == "1"
		})
		wire, c := newWire(t, direct)
		s := open(t, c)
		w := new(writer)
		w.start(s, 4)
		soon(t, "writes go on", func() bool { return w.count() > 100 })
		wire.set(func() { wire.to = net.JoinHostPort(replica.Host, fmt.Sprint(replica.Port)) })
		primary.Kill()
		// For a moment, the replica is not yet a primary.
		_, err := pgstore.Open(t.Context(), c)
		storetest.Says(t, err, errs.Unavailable, "is a replica", "KUMA_STORE_POSTGRES_HOST")
		replica.Promote()
		before := w.count()
		soon(t, "writes go on", func() bool { return w.count() > before+100 })
		w.check(t, s, c)
	})
	t.Run("a replica that is behind", func(t *testing.T) {
		t.Parallel()
		primary := postgres.Start(t, postgres.Options{})
		direct := config(primary, migrated(t, primary))
		wire, c := newWire(t, direct)
		s := open(t, c)
		storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
		replica := primary.Replica()
		replica.Stop()
		storetest.Put(t, s, store.Set(storetest.FruitOf("b", 1)))
		wire.set(func() { wire.to = net.JoinHostPort(replica.Host, fmt.Sprint(replica.Port)) })
		primary.Kill()
		replica.Launch()
		replica.Promote()
		isLost(t, s, "it is at revision 1, and this control plane is at 2")
		s.Close()
		if _, revision := storetest.Content(t, open(t, c)); revision != 1 {
			t.Errorf("revision %d, want 1", revision)
		}
	})
}

// TestCut cuts all connections again and again, anywhere.
func TestCut(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	wire, c := newWire(t, config(server, migrated(t, server)))
	s := open(t, c)
	w := new(writer)
	w.start(s, 2)
	rounds := 150
	if testing.Short() {
		rounds = 50
	}
	for i := range rounds {
		before := w.count()
		soon(t, "writes go on", func() bool { return w.count() > before+i%3 })
		wire.set(func() { wire.budget = i * 37 % 4000 })
		soon(t, "the cut is there", func() bool {
			wire.mu.Lock()
			defer wire.mu.Unlock()
			return wire.budget < 0
		})
	}
	w.check(t, s, c)
}

// TestAnswerLost is about a COMMIT that is not answered.
func TestAnswerLost(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	for _, c := range []struct {
		name string
		// carried: the COMMIT gets to the server. back: the server can be reached
		// at once after that.
		carried, back bool
		says          string
	}{
		{"made, and found out", true, true, ""},
		{"not made, and found out", false, true, "nothing was changed"},
		{"made, and not known", true, false, "it is not known whether the write was made"},
		{"not made, and not known", false, false, "it is not known whether the write was made"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			wire, config := newWire(t, config(server, migrated(t, server)))
			s := open(t, config)
			storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
			wire.set(func() {
				wire.onCommit = func() bool {
					wire.set(func() {
						wire.onCommit = nil
						wire.answerless, wire.down = c.carried, !c.back
					})
					if c.carried {
						return true
					}
					wire.cut()
					return false
				}
			})
			done := make(chan error, 1)
			go func() {
				_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("b", 1)))
				done <- err
			}()
			if c.carried {
				soon(t, "the server has made it", func() bool { return server.Query(config.Database, "select revision from mesh_state") == "2" })
				wire.set(func() {
					// At once: what comes between is neither answered nor cut.
					wire.cutAll()
					wire.answerless = false
				})
			}
			err := within(t, "the write ends", done)
			if c.says == "" && err != nil {
				t.Fatal(err)
			}
			if c.says != "" {
				storetest.Says(t, err, errs.Unavailable, c.says)
			}
			there := func() bool {
				_, err := s.Get(t.Context(), storetest.FruitOf("b", 1).Key())
				return err == nil
			}
			if !c.back {
				if there() {
					t.Error("a write is seen before it is known")
				}
				wire.mend()
				if c.carried {
					soon(t, "what was written is seen, without another write", there)
				}
			}
			storetest.Put(t, s, store.Set(storetest.FruitOf("c", 1)))
			if there() != c.carried {
				t.Errorf("there: %v, want %v", there(), c.carried)
			}
			want, revision := storetest.Content(t, s)
			s.Close()
			storetest.Same(t, open(t, config), want, revision)
		})
	}
}

// TestSlow is about a server that does not answer.
func TestSlow(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	t.Run("a lock", func(t *testing.T) {
		t.Parallel()
		c := config(server, migrated(t, server))
		s := open(t, c)
		letGo := server.Hold(c.Database, lockState)
		_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("a", 1)))
		letGo()
		storetest.Says(t, err, errs.Unavailable, "lock", "nothing was changed", "pg_stat_activity")
		storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
	})
	t.Run("a lock at the start", func(t *testing.T) {
		t.Parallel()
		// Such as one of a write that a control plane left behind which is gone.
		c := config(server, migrated(t, server))
		letGo := server.Hold(c.Database, lockState)
		opened := opening(t, c)
		soon(t, "it waits for the lock", func() bool {
			return server.Query(c.Database, "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'") == "1"
		})
		// It is waited for longer than by a write: one that has begun later gives
		// up first.
		server.Exec(c.Database, "set lock_timeout = '6s'; do $$ begin "+lockState+"; raise 'nobody has the lock'; exception when lock_not_available then null; end $$")
		letGo()
		storetest.Put(t, within(t, "it serves", opened), store.Set(storetest.FruitOf("a", 1)))
	})
	t.Run("reading at the start", func(t *testing.T) {
		t.Parallel()
		if testing.Short() {
			t.Skip("it takes longer than a transaction may be idle")
		}
		c := config(server, migrated(t, server))
		server.Exec(c.Database, "insert into mesh_resources (kind, mesh, name, revision, data) values ('Fruit', '', 'a', 1, 'x')")
		log := new(logged)
		c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(log, writes(func() {
			soon(t, "the server has waited for long, or no more", func() bool {
				return server.Query(c.Database, "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and now() - state_change < '16s'") == "0"
			})
		})), nil))
		open(t, c)
		if !strings.Contains(log.String(), "Fruit") {
			t.Errorf("nothing was slow: %s", log)
		}
	})
	t.Run("no answer", func(t *testing.T) {
		t.Parallel()
		wire, c := newWire(t, config(server, migrated(t, server)))
		s := open(t, c)
		storetest.Put(t, s, store.Set(storetest.FruitOf("a", 1)))
		mute := make(chan struct{})
		wire.set(func() { wire.mute = mute })
		_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("b", 1)))
		storetest.Says(t, err, errs.Unavailable, "no answer in time", "nothing was changed")
		wire.set(func() { wire.mute = nil })
		wire.cut()
		close(mute)
		soon(t, "writes go on", func() bool {
			_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("c", 1)))
			return err == nil
		})
		want, revision := storetest.Content(t, s)
		s.Close()
		storetest.Same(t, open(t, c), want, revision)
	})
}

// writes is called for what is written.
type writes func()

// Write is io.Writer's.
func (w writes) Write(b []byte) (int, error) {
	w()
	return len(b), nil
}

// lockState locks the row of mesh_state.
const lockState = "update mesh_state set holder = holder"

// TestKill kills a process that writes, at any moment.
func TestKill(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	name := migrated(t, server)
	rounds := 50
	if testing.Short() {
		rounds = 10
	}
	storetest.Kill(t, rounds, 50*time.Millisecond, func(int) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childPort+"="+fmt.Sprint(server.Port))
		return cmd
	}, opener(config(server, name)))
}

func BenchmarkPut(b *testing.B) {
	server := postgres.Start(b, postgres.Options{Fsync: true})
	storetest.BenchmarkPut(b, open(b, config(server, migrated(b, server))))
}

// BenchmarkOpen is a start over 10,000 resources of 2 kB.
func BenchmarkOpen(b *testing.B) {
	server := postgres.Start(b, postgres.Options{})
	c := config(server, migrated(b, server))
	s := open(b, c)
	for i := range 20 {
		var writes []store.Write
		for j := range 500 {
			writes = append(writes, store.Set(storetest.FruitOf(fmt.Sprint(i, "-", j), 2000)))
		}
		storetest.Put(b, s, writes...)
	}
	s.Close()
	for b.Loop() {
		s, err := pgstore.Open(b.Context(), c)
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}
