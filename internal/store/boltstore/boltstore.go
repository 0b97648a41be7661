// Package boltstore is a store in one file, for a control plane that stands
// alone: a bbolt database, and all of its contents in memory.
//
// The file is the truth. A write is in the file, and on the disk, before
// anyone sees it; reads never touch the file. Writes that arrive while another
// is on its way to the disk go there together, each with its own conditions,
// revision and outcome.
//
// The file has two buckets. "resources" has a record per resource, under kind,
// mesh and name with a NUL between them; "meta" has one record, "state". Every
// record begins with a checksum, and the state has the number of records and
// the sum of their checksums, so that damage is noticed when the file is
// opened, and never served.
package boltstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"syscall"

	"go.etcd.io/bbolt"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// Config is what Open needs.
type Config struct {
	// Path is the file's. It is made if it isn't there; its directory must be.
	Path string
	// Kinds are those that the store keeps. Resources of others that are in the
	// file stay there, unseen.
	Kinds []*resource.Kind
	// Log is told about what is in the file and can't be shown. Required.
	Log *slog.Logger
}

// Store is a store in one file.
type Store struct {
	*store.Keeper
	path string
	log  *slog.Logger
	file *os.File

	// The fields below are for who writes, alone.
	db     *bbolt.DB
	state  state
	broken error
}

// maxKey is the longest kind, mesh and name together.
const maxKey = 4096

// Open opens the file, or makes it. Its errors say what to do: the file is in
// use by another process, can't be read or written (errs.Unavailable), or is
// damaged or too new (errs.Internal). A resource in it that can't be decoded
// is logged and hidden; it stays in the file.
func Open(c Config) (*Store, error) {
	s := &Store{path: c.Path, log: c.Log}
	s.Keeper = store.NewKeeper(store.Place{
		Name: "the store file " + c.Path, MaxKey: maxKey, Kinds: c.Kinds, Log: c.Log,
		Ready: func() error { return s.broken },
		Write: s.write,
	})
	err := s.open()
	if err == nil {
		return s, nil
	}
	if s.file != nil {
		s.abandon()
	}
	if _, ok := errors.AsType[*errs.Error](err); ok {
		return nil, err
	}
	return nil, errs.New(errs.Unavailable, "open the store file %s: %w%s", s.path, err, hint(err))
}

func (s *Store) open() error {
	if _, err := os.Stat(s.path); errors.Is(err, os.ErrNotExist) {
		if err := create(s.path); err != nil {
			return err
		}
	}
	return guard(func() error {
		var err error
		s.db, err = bbolt.Open(s.path, 0o600, &bbolt.Options{
			FreelistType: bbolt.FreelistMapType,
			NoStatistics: true,
			OpenFile:     s.openFile,
		})
		if err != nil {
			return err
		}
		return s.load()
	}, s.damaged)
}

// openFile opens the file for bbolt: locked, so that it is ours to read, and
// then checked, so that bbolt, which trusts its file, may trust it.
func (s *Store) openFile(path string, _ int, _ os.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	s.file = f
	if err := lock(f); err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		s.log.Warn("the store file has secrets in it and can be read by others: take their rights away with chmod 600", "path", path, "mode", info.Mode().Perm().String())
	}
	removeLeftovers(path)
	spare, err := checkFile(f, info.Size())
	if err != nil {
		if _, ok := errors.AsType[*os.PathError](err); ok {
			return nil, err
		}
		return nil, s.damaged(err)
	}
	if spare {
		s.log.Warn("one of the store file's two header pages is not valid; the other one is used. This is so after a power failure during a write; if there was none, check the disk", "path", path)
	}
	return f, nil
}

func (s *Store) damaged(what error) error {
	return errs.New(errs.Internal, "the store file %s is damaged: %w. Nothing in it was changed. Restore it from a backup; or move it away, and the control plane starts with an empty store", s.path, what)
}

// load reads all that is in the file.
func (s *Store) load() error {
	err := s.db.View(func(tx *bbolt.Tx) error {
		meta, resources := tx.Bucket(metaBucket), tx.Bucket(resourcesBucket)
		if meta == nil || resources == nil {
			return s.damaged(errors.New("it is a database, but not one of a control plane"))
		}
		var err error
		if s.state, err = readState(meta); err != nil {
			return s.damaged(err)
		}
		if s.state.Format != format {
			return errs.New(errs.Internal, "the store file %s has format %d; this version reads format %d: start the newer version that wrote it, or move the file away to start with an empty store", s.path, s.state.Format, format)
		}
		found := state{Format: format, Revision: s.state.Revision}
		err = resources.ForEach(func(k, v []byte) error {
			sum, payload, err := unseal(k, v)
			if err != nil {
				return fmt.Errorf("record %q: %w", k, err)
			}
			found.Records++
			found.Sum += sum
			key, err := parseKey(k)
			if err != nil {
				return err
			}
			s.Load(key, payload)
			return nil
		})
		if err == nil && found != s.state {
			err = fmt.Errorf("it should have %d records with checksum %x, and has %d with %x", s.state.Records, s.state.Sum, found.Records, found.Sum)
		}
		if err != nil {
			return s.damaged(err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.Start(s.state.Revision)
	return nil
}

// guard runs what uses bbolt, which panics, or touches memory that isn't
// there, where its file is not as it should be.
func guard(f func() error, damaged func(error) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = damaged(fmt.Errorf("reading it failed: %v", p))
		}
	}()
	return f()
}

// abandon gives the file back without bbolt, which may wait for ever for what a
// panic left behind. It may have the file mapped, so closing would not unlock.
func (s *Store) abandon() error {
	return errors.Join(syscall.Flock(int(s.file.Fd()), syscall.LOCK_UN), s.file.Close())
}

// write takes records to the disk in one transaction. What can't be written
// now, because the disk is full, read-only or broken, is errs.Unavailable;
// nothing has changed then, and a later Put works once the reason is gone.
func (s *Store) write(plan *store.Plan, records []store.Record) error {
	next := s.state
	next.Revision = plan.Revision()
	err := s.update(func(meta, resources *bbolt.Bucket) error {
		for _, r := range records {
			if err := next.apply(resources, r); err != nil {
				return err
			}
		}
		return next.write(meta)
	})
	if err == nil {
		s.state = next
	}
	return err
}

// update runs one transaction of the file. Its errors are for the callers of
// Put.
func (s *Store) update(f func(meta, resources *bbolt.Bucket) error) error {
	err := guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			meta, resources := tx.Bucket(metaBucket), tx.Bucket(resourcesBucket)
			was, err := readState(meta)
			if err == nil && was != s.state {
				err = fmt.Errorf("it is at revision %d, not %d: a write that failed has reached it after all, or another process has written to it", was.Revision, s.state.Revision)
			}
			if err != nil {
				s.broken = errs.New(errs.Unavailable, "the store file %s can't be written any more: %w: restart the control plane, which then reads it anew", s.path, err)
				return s.broken
			}
			return f(meta, resources)
		})
	}, func(err error) error {
		s.broken = errs.New(errs.Unavailable, "the store file %s can't be written any more: %w: restart the control plane, which then checks it", s.path, err)
		return s.broken
	})
	if err == nil || errors.Is(err, s.broken) {
		return err
	}
	return errs.New(errs.Unavailable, "write to the store file %s: %w; nothing was changed%s", s.path, err, hint(err))
}

// Close gives the file back. Later writes fail, and those who watch are told.
func (s *Store) Close() error {
	var err error
	waited := s.Exclusive(context.Background(), func() { err = s.close() })
	return errors.Join(waited, err)
}

func (s *Store) close() error {
	closed := errs.New(errs.Unavailable, "the control plane is stopping: store %s: %w", s.path, os.ErrClosed)
	s.End(closed)
	was := s.broken
	s.broken = closed
	switch {
	case was == nil:
		return s.db.Close()
	case errors.Is(was, os.ErrClosed):
		return nil
	default:
		return s.abandon()
	}
}

// hint says what to do about an error of the file system.
func hint(err error) string {
	for _, h := range []struct {
		what []syscall.Errno
		do   string
	}{
		{[]syscall.Errno{syscall.ENOSPC, syscall.EDQUOT}, "the disk, or the quota, is full: make room, and try again"},
		{[]syscall.Errno{syscall.EFBIG}, "a limit of the file's size was reached: raise it (ulimit -f), and try again"},
		{[]syscall.Errno{syscall.EROFS}, "the file system is read-only: mount it for writing, or set another path"},
		{[]syscall.Errno{syscall.EACCES, syscall.EPERM}, "the user that runs the control plane must be able to read and write the file, and to write its directory"},
		{[]syscall.Errno{syscall.ENOENT}, "its directory must be there: make it, or set another path"},
		{[]syscall.Errno{syscall.EISDIR}, "a file is wanted, not a directory: set another path"},
		{[]syscall.Errno{syscall.EIO}, "the disk can't be read or written: check it"},
	} {
		for _, e := range h.what {
			// bbolt does not wrap all of its errors.
			if errors.Is(err, e) || strings.Contains(err.Error(), e.Error()) {
				return ": " + h.do
			}
		}
	}
	return ""
}

const format = 1

var (
	metaBucket      = []byte("meta")
	resourcesBucket = []byte("resources")
	stateKey        = []byte("state")
)

// state is what the file says of itself.
type state struct {
	Format   int    `json:"format"`
	Revision uint64 `json:"revision"`
	// Records is the number of records in the bucket of resources; Sum is the
	// sum of their checksums.
	Records uint64 `json:"records"`
	Sum     uint64 `json:"sum"`
}

func readState(meta *bbolt.Bucket) (state, error) {
	var st state
	_, payload, err := unseal(stateKey, meta.Get(stateKey))
	if err == nil {
		err = json.Unmarshal(payload, &st)
	}
	if err != nil {
		return st, fmt.Errorf("its state record: %w", err)
	}
	return st, nil
}

func (st *state) write(meta *bbolt.Bucket) error {
	payload, err := json.Marshal(st)
	if err != nil {
		return err
	}
	return meta.Put(stateKey, seal(stateKey, payload))
}

// apply makes a change in the file and keeps count.
func (st *state) apply(resources *bbolt.Bucket, r store.Record) error {
	key := formatKey(r.Key)
	if old := resources.Get(key); old != nil {
		st.Records--
		st.Sum -= sumOf(old)
	}
	if r.Payload == nil {
		return resources.Delete(key)
	}
	value := seal(key, r.Payload)
	st.Records++
	st.Sum += sumOf(value)
	return resources.Put(key, value)
}
