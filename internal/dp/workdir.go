package dp

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kuma/internal/errs"
	"kuma/internal/names"
)

const (
	bootstrapFile = "bootstrap.yaml"
	lockFile      = "kuma-dp.lock"
)

// workdir is the directory in which kuma-dp and its Envoy meet. A lock on a
// file in it says that its owner lives; the kernel lets go of the lock however
// the owner ends.
type workdir struct {
	path    string
	sockets names.Sockets
	token   string // the file with the token, if kuma-dp wrote one
	temp    bool
	lock    *os.File
}

// openWorkdir makes a working directory, or takes the one given, after it has
// removed what earlier runs of the same proxy left behind when they were killed.
func openWorkdir(cfg *Config, me dataplane) (*workdir, error) {
	w := &workdir{path: cfg.WorkDir}
	if w.path == "" {
		prefix := "kuma-dp-" + short(me.mesh+"."+me.name) + "-"
		sweep(cfg.TempDir, prefix, cfg.Log)
		p, err := os.MkdirTemp(cfg.TempDir, prefix)
		if err != nil {
			return nil, errs.New(errs.Unavailable, "make a working directory: %w; name a writable one with --work-dir", err)
		}
		w.path, w.temp = p, true
	} else {
		p, err := filepath.Abs(w.path)
		if err == nil {
			err = os.MkdirAll(p, 0o711)
		}
		if err != nil {
			return nil, errs.New(errs.Unavailable, "make working directory %s: %w; name a writable one with --work-dir", w.path, err)
		}
		w.path = p
	}
	w.sockets = names.Sockets{Dir: w.path, Proxy: me.name, Mesh: me.mesh}
	for _, s := range []string{w.sockets.Admin(), w.sockets.SDS()} {
		if filepath.Dir(s) != w.path || len(w.path)+len("/kuma-envoy-admin") > 98 {
			w.close()
			return nil, errs.New(errs.Invalid, "working directory %s: its path is too long for Unix sockets; name a shorter one with --work-dir", w.path)
		}
	}
	take := hold
	if w.temp {
		take = claim
	}
	lock, err := take(filepath.Join(w.path, lockFile))
	if err != nil {
		temp := w.temp
		w.temp = false
		if temp {
			_ = os.RemoveAll(w.path)
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errs.New(errs.Conflict, "working directory %s is in use by another kuma-dp; end that one, or name another directory with --work-dir", w.path)
		}
		return nil, errs.New(errs.Unavailable, "lock working directory %s: %w", w.path, err)
	}
	w.lock = lock
	w.clean()
	// Nobody else may enter while sockets are made, which get their own
	// permissions only after they exist.
	if err := os.Chmod(w.path, 0o700); err != nil {
		w.close()
		return nil, errs.New(errs.Unavailable, "prepare working directory %s: %w", w.path, err)
	}
	return w, nil
}

// admit lets others pass through the directory, as the contract has it. Each
// file in it has its own permissions.
func (w *workdir) admit() error { return os.Chmod(w.path, 0o711) }

// write puts a file into the directory that only its owner can read.
func (w *workdir) write(name string, data []byte) (string, error) {
	p := filepath.Join(w.path, name)
	_ = os.Remove(p)
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return "", errs.New(errs.Unavailable, "write %s: %w", p, err)
	}
	return p, nil
}

// clean removes this program's own files, and nothing else.
func (w *workdir) clean() {
	for _, p := range []string{filepath.Join(w.path, bootstrapFile), w.sockets.Admin(), w.sockets.SDS(), w.sockets.Trust(), w.sockets.AccessLog(), w.sockets.Metrics(), w.sockets.DynamicConfig(), w.sockets.MetricsCertificate(), w.token} {
		if p != "" {
			_ = os.Remove(p)
		}
	}
}

// close removes the directory if it was a temporary one, and else what this
// program put there.
func (w *workdir) close() {
	if w.temp {
		_ = os.RemoveAll(w.path)
	} else if w.lock != nil {
		w.clean()
		_ = os.Remove(w.lock.Name())
	}
	if w.lock != nil {
		_ = w.lock.Close()
	}
}

// claim makes a lock file that is locked from the moment at which it can be
// seen: a sweeper never finds it free.
func claim(path string) (*os.File, error) {
	f, err := hold(path + ".new")
	if err != nil {
		return nil, err
	}
	if err := os.Rename(path+".new", path); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func hold(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// sweep removes directories whose owner is gone. Only directories of this user
// count, and only those that hold a lock file of ours that nobody locks.
func sweep(dir, prefix string, log *slog.Logger) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		// A random number of MkdirTemp follows the prefix, and nothing else.
		if len(e.Name()) <= len(prefix) || e.Name()[:len(prefix)] != prefix || !digits(e.Name()[len(prefix):]) || !mine(p) {
			continue
		}
		lock := filepath.Join(p, lockFile)
		if _, err := os.Lstat(lock); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		f, err := hold(lock)
		if err != nil {
			continue
		}
		if err := os.RemoveAll(p); err != nil {
			log.Warn("could not remove a working directory that an earlier run left", "directory", p, "error", err)
		} else {
			log.Info("removed a working directory that an earlier run left", "directory", p)
		}
		_ = f.Close()
	}
}

func mine(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && int(st.Uid) == os.Geteuid()
}

func digits(s string) bool {
	for _, c := range s {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != ""
}

// short keeps a proxy's name short enough for the paths of Unix sockets.
func short(name string) string {
	if len(name) <= 30 {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return fmt.Sprintf("%s~%s", name[:20], hex.EncodeToString(sum[:4]))
}
