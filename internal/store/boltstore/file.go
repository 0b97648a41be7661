package boltstore

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"

	"kuma/internal/errs"
)

// lockTimeout is how long Open waits for another process to end. It covers a
// restart in which the old process is still on its way out.
const lockTimeout = time.Second

// lock makes the file this process's own until it ends, however it ends.
func lock(f *os.File) error {
	for end := time.Now().Add(lockTimeout); ; {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		if time.Now().After(end) {
			return errs.New(errs.Unavailable, "the store file %s is in use by another control plane%s: stop that one, or give this one a work directory of its own", f.Name(), holder(f))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// holder names the process that holds the file's lock, where the system tells
// (proc_locks(5)).
func holder(f *os.File) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return ""
	}
	defer locks.Close()
	inode := fmt.Sprintf(":%d", stat.Ino)
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 4242 fe:00:1311 0 EOF
		w := strings.Fields(lines.Text())
		if len(w) >= 6 && w[1] == "FLOCK" && w[3] == "WRITE" && strings.HasSuffix(w[5], inode) && w[4] != "0" {
			return " (process " + w[4] + ")"
		}
	}
	return ""
}

const leftover = ".new-"

// create makes a file without resources at path, whole or not at all. It does
// nothing if another process was faster.
func create(path string) error {
	t, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+leftover+"*")
	if err != nil {
		return err
	}
	defer os.Remove(t.Name())
	if err := t.Close(); err != nil {
		return err
	}
	db, err := bbolt.Open(t.Name(), 0o600, &bbolt.Options{NoSync: true, NoStatistics: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		if _, err := tx.CreateBucket(resourcesBucket); err != nil {
			return err
		}
		return (&state{Format: format}).write(meta)
	})
	if err = errors.Join(err, db.Sync(), db.Close()); err != nil {
		return err
	}
	if err := os.Link(t.Name(), path); err != nil {
		if _, there := os.Lstat(path); there == nil {
			return nil
		}
		// Not every file system has hard links.
		if err := os.Rename(t.Name(), path); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(path))
}

// removeLeftovers removes what processes that were killed while they made the
// file have left behind.
func removeLeftovers(path string) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+leftover) {
			_ = os.Remove(filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
}

// syncDir makes a directory's entries survive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return nil
}
