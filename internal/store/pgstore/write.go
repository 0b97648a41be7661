package pgstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"kuma/internal/errs"
	"kuma/internal/store"
)

const (
	// writeLimit bounds a transaction, from getting a connection to the answer
	// to its COMMIT.
	writeLimit = 10 * time.Second
	// settleLimit bounds the finding out whether a transaction was committed
	// whose answer was lost.
	settleLimit = 5 * time.Second
	// attempts is how many connections a transaction is tried on: those that
	// were idle may all have broken.
	attempts = 3
)

// doubt is a transaction of which it isn't known whether it was committed.
type doubt struct {
	plan  *store.Plan
	token string
}

// ready refuses writes to a store that is closed or lost, and those before
// which the outcome of an earlier one can't be found out.
func (s *Store) ready() error {
	s.mu.Lock()
	broken := s.broken
	s.mu.Unlock()
	switch {
	case broken != nil:
		return notWritten(broken)
	case s.doubt == nil:
		return nil
	}
	ctx, stop := context.WithTimeout(context.Background(), settleLimit)
	defer stop()
	err := s.onConnection(ctx, func(conn *pgx.Conn) error { return s.conclude(ctx, conn) })
	if err != nil {
		return s.unchanged("write to", fmt.Errorf("the outcome of an earlier write has to be found out first, and can't be: %w", err))
	}
	return nil
}

func notWritten(why error) error { return errs.New(errs.Unavailable, "nothing was written: %w", why) }

// unchanged is the error of a write of which it is certain that it wasn't made.
func (s *Store) unchanged(what string, err error) error {
	if gone := s.Err(); gone != nil {
		return notWritten(gone)
	}
	return &errs.Error{Kind: errs.Unavailable, Message: fmt.Sprintf("%s %s: %s; nothing was changed%s", what, s.where, words(err), hint(err)), Cause: err}
}

// conclude finds out about the transaction in doubt, and shows it if it is
// there. The caller writes.
func (s *Store) conclude(ctx context.Context, conn *pgx.Conn) error {
	there, err := s.settle(ctx, conn, s.doubt.token)
	if err != nil {
		return err
	}
	if there {
		s.Publish(s.doubt.plan)
	}
	s.log.Info("the outcome of a write is known again, whose answer was lost", "store", s.where, "written", there)
	s.doubt = nil
	return nil
}

// onConnection runs f on a connection of the pool.
func (s *Store) onConnection(ctx context.Context, f func(*pgx.Conn) error) error {
	c, err := s.pooled.Acquire(ctx)
	if err != nil {
		return s.unreachable(err)
	}
	defer c.Release()
	return f(c.Conn())
}

// settle tells whether a transaction is in the database. A transaction whose
// COMMIT was sent has locked the row of mesh_state before; so this waits until
// the server has done with it, and it can't be committed after this any more.
// It is a write itself, so that a server that waits for its replicas has waited
// for them with that transaction too.
func (s *Store) settle(ctx context.Context, conn *pgx.Conn, token string) (bool, error) {
	var written string
	err := conn.QueryRow(ctx, "update mesh_state set holder = holder where holder = $1 returning written", s.holder).Scan(&written)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, s.displaced(ctx, conn)
	}
	return written == token, err
}

// displaced finds out who has taken over, or what else keeps the row of
// mesh_state from being this store's.
func (s *Store) displaced(ctx context.Context, conn *pgx.Conn) error {
	var by holding
	err := conn.QueryRow(ctx, "select holder, instance, since, revision from mesh_state").Scan(&by.holder, &by.instance, &by.since, &by.revision)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	return s.lose(by)
}

// write commits records in one transaction. Unless its outcome is not known,
// which the error says then, nothing has changed where it fails.
func (s *Store) write(plan *store.Plan, records []store.Record) error {
	ctx, stop := context.WithTimeout(context.Background(), writeLimit)
	defer stop()
	token := rand.Text()
	var err error
	for range attempts {
		sent := false
		err = s.onConnection(ctx, func(conn *pgx.Conn) error {
			var err error
			sent, err = s.transact(ctx, conn, token, plan.Revision(), records)
			return err
		})
		switch {
		case err == nil:
			return nil
		case sent:
			return s.resolve(doubt{plan, token}, err)
		}
		if _, told := errors.AsType[*errs.Error](err); told || !isBroken(err) || ctx.Err() != nil {
			break
		}
		// It broke, and so, most likely, did all others.
		s.pooled.Reset()
	}
	return s.unchanged("write to", err)
}

// transact makes one transaction. Where it fails, it tells whether its COMMIT
// was sent and may have been done.
func (s *Store) transact(ctx context.Context, conn *pgx.Conn, token string, revision uint64, records []store.Record) (sent bool, err error) {
	var batch pgx.Batch
	batch.BeginTx(readWrite)
	batch.Queue("update mesh_state set revision = $1, written = $2 where holder = $3 and revision = $4", int64(revision), token, s.holder, int64(s.Revision()))
	for _, r := range records {
		if r.Payload == nil {
			batch.Queue("delete from mesh_resources where kind = $1 and mesh = $2 and name = $3", r.Key.Kind, r.Key.Mesh, r.Key.Name)
			continue
		}
		batch.Queue("insert into mesh_resources (kind, mesh, name, revision, data) values ($1, $2, $3, $4, $5) on conflict (kind, mesh, name) do update set revision = excluded.revision, data = excluded.data",
			r.Key.Kind, r.Key.Mesh, r.Key.Name, int64(r.Revision), r.Payload)
	}
	results := conn.SendBatch(ctx, &batch)
	tx := results.Tx()
	ours := false
	_, err = results.Exec() // begin
	if err == nil {
		var tag pgconn.CommandTag
		tag, err = results.Exec()
		ours = tag.RowsAffected() == 1
	}
	if closed := results.Close(); err == nil {
		err = closed
	}
	if err == nil && !ours {
		err = s.displaced(ctx, conn)
	}
	if err != nil {
		// An error here changes nothing: without COMMIT there is no transaction.
		if tx != nil {
			_ = tx.Rollback(ctx)
		}
		return false, err
	}
	err = tx.Commit(ctx)
	// Only the server's own word is taken for a refusal: the library says of some
	// errors that nothing was sent, after it was.
	if errors.Is(err, pgx.ErrTxCommitRollback) || err != nil && !isBroken(err) {
		return false, err
	}
	return true, err
}

// resolve finds out about a transaction whose COMMIT was not answered. Where
// that takes too long, the transaction stays in doubt.
func (s *Store) resolve(d doubt, lost error) error {
	ctx, stop := context.WithTimeout(context.Background(), settleLimit)
	defer stop()
	// A connection from before is of no use.
	s.pooled.Reset()
	there := false
	err := lost
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, pollEvery) {
		err = s.onConnection(ctx, func(conn *pgx.Conn) error {
			var err error
			there, err = s.settle(ctx, conn, d.token)
			return err
		})
		if err == nil || s.Err() != nil || !pause(ctx, wait) {
			break
		}
	}
	switch {
	case err == nil && there:
		return nil
	case err == nil:
		return s.unchanged("write to", fmt.Errorf("the connection broke before the end: %w", lost))
	}
	s.doubt = &d
	if gone := s.Err(); gone != nil {
		err = gone
	}
	return &errs.Error{Kind: errs.Unavailable, Message: fmt.Sprintf("write to %s: the connection broke at the end (%s), and it is not known whether the write was made: %s: read again what is there before you repeat it", s.where, words(lost), words(err)), Cause: err}
}
