// Package pgstore is a store in a PostgreSQL database, of which one control
// plane at a time serves; others on the same database stand by.
package pgstore

import (
	"context"
	"crypto/tls"
	"log/slog"
	"time"

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
	*store.Memory
}

// Open connects, waits until no other control plane serves from the database,
// and reads all that is in it. The end of ctx ends the wait.
func Open(ctx context.Context, c Config) (*Store, error) {
	return nil, errs.New(errs.Unavailable, "not built yet")
}

// Migrate makes the tables, or brings them up to date, and tells whether there
// was anything to do. Nothing that is in them is lost.
func Migrate(ctx context.Context, c Config) (changed bool, err error) {
	return false, errs.New(errs.Unavailable, "not built yet")
}

// Put is store.Store's.
func (s *Store) Put(ctx context.Context, writes ...store.Write) (uint64, error) {
	return 0, errs.New(errs.Unavailable, "not built yet")
}

// Lost is closed when the store can't be written any more because another
// control plane has taken over, or the database has gone back to an older
// state. The process is to end: it starts again as one that stands by.
func (s *Store) Lost() <-chan struct{} { return nil }

// Err says why the store was lost, and is nil before that.
func (s *Store) Err() error { return nil }

// Connections has an entry for each connection that is open now: the state of
// its TLS, or nil where it has none.
func (s *Store) Connections() []*tls.ConnectionState { return nil }

// Pool tells about the connections for writes. The lock's connection is not
// one of them.
func (s *Store) Pool() *pgxpool.Stat { return nil }

// Close gives the database back, for another control plane to serve from.
// Later writes fail, and those who watch are told.
func (s *Store) Close() error { return nil }
