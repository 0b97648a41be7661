package boltstore_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/store/boltstore"
	"kuma/internal/store/storetest"
)

var discard = slog.New(slog.DiscardHandler)

func tryOpen(path string) (*boltstore.Store, error) {
	return boltstore.Open(boltstore.Config{Path: path, Kinds: storetest.NewTypes().Kinds(), Log: discard})
}

func open(t testing.TB, path string) *boltstore.Store {
	t.Helper()
	s, err := tryOpen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// opener opens the file again and again.
func opener(path string) storetest.Opener {
	return func(t testing.TB, kinds []*resource.Kind, log *slog.Logger) storetest.Closing {
		t.Helper()
		s, err := boltstore.Open(boltstore.Config{Path: path, Kinds: kinds, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return storetest.Closing{Store: s, Close: s.Close}
	}
}

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, filepath.Join(t.TempDir(), "kuma.db"))
	})
}

func TestKept(t *testing.T) {
	t.Parallel()
	storetest.RunKept(t, 4096, func(t *testing.T) storetest.Opener {
		path := filepath.Join(t.TempDir(), "kuma.db")
		t.Cleanup(func() {
			if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
				t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
			}
		})
		return opener(path)
	})
}

// TestSecondProcess uses a second Open for a second process: the lock knows no
// difference.
func TestSecondProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kuma.db")
	s := open(t, path)
	_, err := tryOpen(path)
	storetest.Says(t, err, errs.Unavailable, path, "in use by another control plane", fmt.Sprintf("(process %d)", os.Getpid()), "stop that one")
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 0)))
	s.Close()
	open(t, path)
}

// TestFirstStarts starts many at once where there is no file yet: one gets it,
// and none makes it anew under the other.
func TestFirstStarts(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kuma.db")
	// What a process that was killed leaves behind.
	if err := os.WriteFile(path+".new-1", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	won := make(chan *boltstore.Store, 8)
	for range cap(won) {
		all.Go(func() {
			s, err := tryOpen(path)
			if err == nil {
				won <- s
			} else if !errs.Is(err, errs.Unavailable) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if len(won) != 1 {
		t.Fatalf("%d of them have the file", len(won))
	}
	s := <-won
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 0)))
	s.Close()
	open(t, path)
	if left, _ := filepath.Glob(path + "*"); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBadPlaces(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("not a database, but long enough to be taken for a header page of one"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		kind errs.Kind
		says string
	}{
		{filepath.Join(dir, "none", "kuma.db"), errs.Unavailable, "its directory must be there"},
		{filepath.Join(file, "kuma.db"), errs.Unavailable, "not a directory"},
		{dir, errs.Unavailable, "not a directory: set another path"},
		{file, errs.Internal, "is damaged"},
		{empty, errs.Internal, "it is empty"},
	} {
		_, err := tryOpen(c.path)
		storetest.Says(t, err, c.kind, c.path, c.says)
	}
}

// readOnly runs a part of a test where the directory can't be written.
func readOnly(t *testing.T, dir string, part func(what string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		if err := os.Chmod(dir, 0o500); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(dir, 0o700)
		part("permission denied")
		return
	}
	remount(t, dir, syscall.MS_REMOUNT|syscall.MS_RDONLY)
	part("read-only")
	remount(t, dir, syscall.MS_REMOUNT)
}

func remount(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", flags, "size=1m"); err != nil {
		t.Fatal(err)
	}
}

// smallDisk returns a directory on a disk of one megabyte, where the test may
// make one.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("no small disk to be had here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	if os.Geteuid() == 0 {
		dir = smallDisk(t)
	}
	path := filepath.Join(dir, "kuma.db")
	readOnly(t, dir, func(what string) {
		_, err := tryOpen(path)
		storetest.Says(t, err, errs.Unavailable, path, what)
	})
	s := open(t, path)
	storetest.Put(t, s, store.Set(storetest.FruitOf("a", 0)))
	s.Close()
	if os.Geteuid() != 0 {
		if err := os.Chmod(path, 0o400); err != nil {
			t.Fatal(err)
		}
		_, err := tryOpen(path)
		storetest.Says(t, err, errs.Unavailable, path, "permission denied", "must be able to read and write")
		return
	}
	readOnly(t, dir, func(what string) {
		_, err := tryOpen(path)
		storetest.Says(t, err, errs.Unavailable, path, what, "mount it for writing")
	})
	open(t, path)
}

// full writes until nothing more can be written, and checks that the store
// goes on with what it has; then, after room, that it writes again.
func full(t *testing.T, path string, what string, room func()) {
	s := open(t, path)
	storetest.Put(t, s, store.Set(storetest.FruitOf("first", 1000)), store.Set(storetest.FruitOf("second", 1000)))
	var err error
	refused := 0
	var want map[resource.Key]resource.Resource
	var revision uint64
	for i := 0; refused < 3; i++ {
		if i == 1000 {
			t.Fatal("the disk is never full")
		}
		want, revision = storetest.Content(t, s)
		if _, err = s.Put(t.Context(), store.Remove(storetest.FruitOf("first", 0).Key()), store.Set(storetest.FruitOf(fmt.Sprint(i), 100_000)), store.Set(storetest.FruitOf("first", 0))); !errs.Is(err, errs.Internal) {
			t.Fatalf("a key twice: %v", err)
		}
		if _, err = s.Put(t.Context(), store.Set(storetest.FruitOf(fmt.Sprint(i), 100_000)), store.Set(storetest.FruitOf("first", i))); err != nil {
			refused++
			storetest.Says(t, err, errs.Unavailable, path, what, "nothing was changed")
			storetest.Same(t, s, want, revision)
		}
	}
	if _, err := s.Get(t.Context(), storetest.FruitOf("second", 0).Key()); err != nil {
		t.Errorf("reading: %v", err)
	}
	room()
	if got := storetest.Put(t, s, store.Set(storetest.FruitOf("after", 100_000)), store.Remove(storetest.FruitOf("second", 0).Key())); got != revision+1 {
		t.Errorf("revision %d, want %d", got, revision+1)
	}
	want, revision = storetest.Content(t, s)
	s.Close()
	storetest.Same(t, open(t, path), want, revision)
}

func TestDiskFull(t *testing.T) {
	dir := smallDisk(t)
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 400_000), 0o600); err != nil {
		t.Fatal(err)
	}
	full(t, filepath.Join(dir, "kuma.db"), "no space left on device", func() {
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
	})
	// A first start on a full disk leaves nothing behind.
	if err := os.WriteFile(ballast, make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "other.db")
	_, err := tryOpen(path)
	storetest.Says(t, err, errs.Unavailable, path, "no space left on device", "make room")
	if left, _ := filepath.Glob(path + "*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFileSizeLimit(t *testing.T) {
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &was); err != nil {
		t.Fatal(err)
	}
	limit := func(l syscall.Rlimit) {
		t.Helper()
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &l); err != nil {
			t.Fatal(err)
		}
	}
	defer limit(was)
	limit(syscall.Rlimit{Cur: 900_000, Max: was.Max})
	full(t, filepath.Join(t.TempDir(), "kuma.db"), "file too large", func() { limit(was) })
}

func BenchmarkPut(b *testing.B) {
	storetest.BenchmarkPut(b, open(b, filepath.Join(b.TempDir(), "kuma.db")))
}

// BenchmarkFsync is what the disk itself needs: one page written in place, and
// synced.
func BenchmarkFsync(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4096)
	took := make([]time.Duration, 0, b.N)
	for i := 0; b.Loop(); i++ {
		page[0] = byte(i)
		start := time.Now()
		if _, err := f.WriteAt(page, int64(i%16)*4096); err != nil {
			b.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	storetest.ReportMedian(b, took)
}

// BenchmarkOpen is a start over a store of 1,000 proxies' size.
func BenchmarkOpen(b *testing.B) {
	path := filepath.Join(b.TempDir(), "kuma.db")
	s := open(b, path)
	for i := range 4 {
		var writes []store.Write
		for j := range 500 {
			writes = append(writes, store.Set(storetest.FruitOf(fmt.Sprint(i, "-", j), 2000)))
		}
		storetest.Put(b, s, writes...)
	}
	s.Close()
	for b.Loop() {
		s, err := tryOpen(path)
		if err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}
