package pgstore

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/jackc/pgx/v5"

	"kuma/internal/errs"
)

// Advisory locks of this database. Both numbers are arbitrary, and for ever.
const (
	// lockServe is held by the control plane that serves; lockMigrate while
	// tables are made or changed.
	lockServe   = 0x6b756d61_6d657368
	lockMigrate = 0x6b756d61_6d657369
)

//go:embed migrations/*.sql
var migrations embed.FS

// steps returns the migrations' SQL, that of version 1 first.
func steps() ([]string, error) {
	// In the order of their names.
	files, err := migrations.ReadDir("migrations")
	if err != nil {
		return nil, err
	}
	out := make([]string, len(files))
	for i, f := range files {
		if !strings.HasPrefix(f.Name(), fmt.Sprintf("%04d_", i+1)) {
			return nil, fmt.Errorf("the migration %s should begin with %04d", f.Name(), i+1)
		}
		b, err := migrations.ReadFile(path.Join("migrations", f.Name()))
		if err != nil {
			return nil, err
		}
		out[i] = string(b)
	}
	return out, nil
}

// schemaVersion is that of the tables in the database; 0 where there are none.
func schemaVersion(ctx context.Context, q interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
},
) (int, error) {
	var there bool
	if err := q.QueryRow(ctx, "select to_regclass('mesh_state') is not null").Scan(&there); err != nil || !there {
		return 0, err
	}
	var version int
	err := q.QueryRow(ctx, "select schema_version from mesh_state").Scan(&version)
	if errors.Is(err, pgx.ErrNoRows) {
		err = errors.New("the table mesh_state has no row: restore the database from a backup")
	}
	return version, err
}

// Migrate makes the tables, or brings them up to date, and tells whether there
// was anything to do. All of it happens in one transaction, or nothing; nothing
// that is in the tables is lost. Of several at once, one does it and the others
// wait. A control plane may be serving. Tables of a newer version are refused,
// or, with TolerateNewer, left as they are.
func Migrate(ctx context.Context, c Config) (changed bool, err error) {
	d, err := newDialer(c)
	if err != nil {
		return false, err
	}
	conn, err := d.connect(ctx)
	if err != nil {
		return false, err
	}
	defer hangUp(conn)
	all, err := steps()
	if err != nil {
		return false, errs.New(errs.Internal, "migrate: %w", err)
	}
	version := 0
	err = pgx.BeginTxFunc(ctx, conn, readWrite, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local lock_timeout = '60s'; set local statement_timeout = '10min'"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "select pg_advisory_xact_lock($1)", int64(lockMigrate)); err != nil {
			return err
		}
		if version, err = schemaVersion(ctx, tx); err != nil || version >= len(all) {
			return err
		}
		for i, sql := range all[version:] {
			if _, err := tx.Conn().PgConn().Exec(ctx, sql).ReadAll(); err != nil {
				return fmt.Errorf("step %d: %w", version+i+1, err)
			}
		}
		_, err := tx.Exec(ctx, "update mesh_state set schema_version = $1", len(all))
		changed = true
		return err
	})
	switch {
	case err != nil:
		return false, d.failed("migrate", err)
	case version > len(all) && !c.TolerateNewer:
		return false, newer(d, version, len(all))
	}
	return changed, nil
}

// errTables says that the tables can't be used.
var errTables = errors.New("the tables are of another version")

func unusable(format string, args ...any) error {
	return &errs.Error{Kind: errs.Unavailable, Message: fmt.Sprintf(format, args...), Cause: errTables}
}

// newer refuses a database that a newer version has migrated.
func newer(d *dialer, found, known int) error {
	return unusable("%s has tables of version %d, which a newer control plane has made; this one knows version %d: start the newer one, or set KUMA_STORE_POSTGRES_TOLERATE_NEWER_DB_VERSIONS=true to try with this one", d.where, found, known)
}

// checkSchema refuses tables that this version can't use.
func (s *Store) checkSchema(ctx context.Context, conn *pgx.Conn) error {
	all, err := steps()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	switch version, err := schemaVersion(ctx, conn); {
	case err != nil:
		return err
	case version == 0:
		return unusable("%s has no tables yet: run kuma-cp migrate up, with the same settings", s.where)
	case version < len(all):
		return unusable("%s has tables of version %d, and this control plane needs version %d: run kuma-cp migrate up, with the same settings", s.where, version, len(all))
	case version > len(all) && !s.tolerateNewer:
		return newer(s.dialer, version, len(all))
	}
	return nil
}
