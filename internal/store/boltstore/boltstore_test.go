package boltstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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

func put(t testing.TB, s store.Store, writes ...store.Write) uint64 {
	t.Helper()
	revision, err := s.Put(t.Context(), writes...)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// fruit returns a resource of about size bytes.
func fruit(name string, size int) *resource.Resource {
	return storetest.NewTypes().Fruit.Make("m", name, &storetest.FruitSpec{Colour: "red", Notes: map[string]string{"text": strings.Repeat("x", size)}})
}

// content is all that a store holds, comparable.
func content(t testing.TB, s store.Store) (map[resource.Key]resource.Resource, uint64) {
	t.Helper()
	list, revision, err := s.List(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	all := map[resource.Key]resource.Resource{}
	for _, r := range list {
		c := *r
		c.Kind = nil
		all[r.Key()] = c
	}
	return all, revision
}

// same fails the test if the store does not hold exactly what is wanted.
func same(t testing.TB, s store.Store, want map[resource.Key]resource.Resource, revision uint64) {
	t.Helper()
	got, at := content(t, s)
	if at != revision || !reflect.DeepEqual(got, want) {
		t.Fatalf("revision %d, want %d: %s", at, revision, cmp.Diff(want, got))
	}
}

// says fails the test unless the error is of the kind and has all the words.
func says(t testing.TB, err error, kind errs.Kind, words ...string) {
	t.Helper()
	if !errs.Is(err, kind) {
		t.Fatalf("error %v (%v), want one that is %v", err, errs.KindOf(err), kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error should have %q in it: %v", w, err)
		}
	}
}

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, filepath.Join(t.TempDir(), "kuma.db"))
	})
}

func TestReopen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kuma.db")
	s := open(t, path)
	types := storetest.NewTypes()
	for i := range 300 {
		put(t, s, store.Set(fruit(fmt.Sprint(i%100), i*20)))
	}
	labelled := fruit("labelled", 0)
	labelled.Labels, labelled.Status = map[string]string{"a": "b"}, &storetest.FruitStatus{Eaten: true}
	put(t, s, store.Create(labelled), store.Create(types.Basket.Make("", "b", &storetest.FruitSpec{Seeds: 3})))
	put(t, s, store.Remove(types.Fruit.Key("m", "7")))
	want, revision := content(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), store.Set(fruit("late", 0))); !errs.Is(err, errs.Unavailable) {
		t.Errorf("Put after Close: %v", err)
	}
	for _, err := range s.Watch(t.Context(), revision) {
		says(t, err, errs.Unavailable, "closed")
	}

	s = open(t, path)
	same(t, s, want, revision)
	if got := put(t, s, store.Replace(fruit("labelled", 0), revision-1)); got != revision+1 {
		t.Errorf("the next revision is %d, want %d", got, revision+1)
	}
	for _, since := range []uint64{0, revision - 1} {
		for _, err := range s.Watch(t.Context(), since) {
			if !errors.Is(err, store.ErrTooOld) {
				t.Errorf("Watch(%d), which is before the start: %v, want ErrTooOld", since, err)
			}
		}
	}
	for events := range s.Watch(t.Context(), revision) {
		if len(events) != 1 || events[0].Key.Name != "labelled" {
			t.Errorf("Watch from the start: %v", events)
		}
		break
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

// TestGroup checks that writes that share a way to the disk do not share an
// outcome.
func TestGroup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kuma.db")
	s := open(t, path)
	var all sync.WaitGroup
	var mu sync.Mutex
	made := map[string]int{}
	for range 32 {
		all.Go(func() {
			for i := range 10 {
				name := fmt.Sprint("n", i)
				_, err := s.Put(t.Context(), store.Create(fruit(name, 10)), store.Set(fruit("shared", i)))
				if err == nil {
					mu.Lock()
					made[name]++
					mu.Unlock()
				} else if !errs.Is(err, errs.Conflict) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	for i := range 10 {
		if n := made[fmt.Sprint("n", i)]; n != 1 {
			t.Errorf("n%d was made %d times", i, n)
		}
	}
	want, revision := content(t, s)
	if revision != 10 {
		t.Errorf("revision %d, want 10", revision)
	}
	s.Close()
	same(t, open(t, path), want, revision)
}

// TestSecondProcess uses a second Open for a second process: the lock knows no
// difference.
func TestSecondProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kuma.db")
	s := open(t, path)
	_, err := tryOpen(path)
	says(t, err, errs.Unavailable, path, "in use by another control plane", fmt.Sprintf("(process %d)", os.Getpid()), "stop that one")
	put(t, s, store.Set(fruit("a", 0)))
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
	put(t, s, store.Set(fruit("a", 0)))
	s.Close()
	open(t, path)
	if left, _ := filepath.Glob(path + "*"); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

// TestHidden is HRD-26: a resource that can't be read does not stop the others,
// nor the control plane. It is kept for the version that can read it.
func TestHidden(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kuma.db")
	types := storetest.NewTypes()
	s := open(t, path)
	put(t, s, store.Set(fruit("a", 0)), store.Set(fruit("b", 0)), store.Set(types.Basket.Make("", "x", &storetest.FruitSpec{Seeds: 1})))
	want, revision := content(t, s)
	s.Close()

	// An older version: no baskets, and fruits have no text in their notes.
	type older struct {
		Notes map[string]int `json:"notes"`
	}
	old := resource.Define[older](resource.Kind{Name: "Fruit", Scope: resource.Mesh, Shape: resource.Spec}, nil)
	var log bytes.Buffer
	c := boltstore.Config{Path: path, Kinds: []*resource.Kind{old.Kind}, Log: slog.New(slog.NewTextHandler(&log, nil))}
	s, err := boltstore.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	if list, _, _ := s.List(t.Context(), "", ""); len(list) != 0 {
		t.Errorf("shown: %v", list)
	}
	for _, want := range []string{`resource="Fruit \"a\" in mesh \"m\""`, `resource="Fruit \"b\"`, "kind=Basket resources=1"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("the log should have %q once: %s", want, log.String())
		}
	}
	// It must not write over what it can't read.
	_, err = s.Put(t.Context(), store.Set(old.Make("m", "a", &older{})))
	says(t, err, errs.Conflict, `Fruit "a" in mesh "m"`, "can't read", "the version that wrote it")
	_, err = s.Put(t.Context(), store.Set(types.Basket.Make("", "x", &storetest.FruitSpec{})))
	says(t, err, errs.Internal, "does not know this kind")
	put(t, s, store.Set(old.Make("m", "c", &older{})))
	put(t, s, store.Remove(old.Key("m", "c")))
	s.Close()
	same(t, open(t, path), want, revision+2)
}

// TestLimits is HRD-25: what is kept has a limit.
func TestLimits(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "kuma.db"))
	for _, c := range []struct {
		r    *resource.Resource
		kind errs.Kind
		says string
	}{
		{fruit("a\x00b", 0), errs.Invalid, "NUL"},
		{fruit(strings.Repeat("n", 5000), 0), errs.Invalid, "the limit is 4096"},
		{fruit("big", 17<<20), errs.Invalid, "the limit is 16777216"},
		{storetest.NewTypes().Fruit.Make("m", "a", &storetest.FruitSpec{Taste: inf()}), errs.Internal, "unsupported value"},
	} {
		_, err := s.Put(t.Context(), store.Set(fruit("ok", 0)), store.Set(c.r))
		says(t, err, c.kind, c.says)
	}
	if all, revision := content(t, s); len(all) != 0 || revision != 0 {
		t.Errorf("written: %v", all)
	}
	put(t, s, store.Set(fruit(strings.Repeat("n", 4000), 15<<20)))
}

func inf() float64 {
	zero := 0.0
	return 1 / zero
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
		says(t, err, c.kind, c.path, c.says)
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
		says(t, err, errs.Unavailable, path, what)
	})
	s := open(t, path)
	put(t, s, store.Set(fruit("a", 0)))
	s.Close()
	if os.Geteuid() != 0 {
		if err := os.Chmod(path, 0o400); err != nil {
			t.Fatal(err)
		}
		_, err := tryOpen(path)
		says(t, err, errs.Unavailable, path, "permission denied", "must be able to read and write")
		return
	}
	readOnly(t, dir, func(what string) {
		_, err := tryOpen(path)
		says(t, err, errs.Unavailable, path, what, "mount it for writing")
	})
	open(t, path)
}

// full writes until nothing more can be written, and checks that the store
// goes on with what it has; then, after room, that it writes again.
func full(t *testing.T, path string, what string, room func()) {
	s := open(t, path)
	put(t, s, store.Set(fruit("first", 1000)), store.Set(fruit("second", 1000)))
	var err error
	refused := 0
	var want map[resource.Key]resource.Resource
	var revision uint64
	for i := 0; refused < 3; i++ {
		if i == 1000 {
			t.Fatal("the disk is never full")
		}
		want, revision = content(t, s)
		if _, err = s.Put(t.Context(), store.Remove(fruit("first", 0).Key()), store.Set(fruit(fmt.Sprint(i), 100_000)), store.Set(fruit("first", 0))); !errs.Is(err, errs.Internal) {
			t.Fatalf("a key twice: %v", err)
		}
		if _, err = s.Put(t.Context(), store.Set(fruit(fmt.Sprint(i), 100_000)), store.Set(fruit("first", i))); err != nil {
			refused++
			says(t, err, errs.Unavailable, path, what, "nothing was changed")
			same(t, s, want, revision)
		}
	}
	if _, err := s.Get(t.Context(), fruit("second", 0).Key()); err != nil {
		t.Errorf("reading: %v", err)
	}
	room()
	if got := put(t, s, store.Set(fruit("after", 100_000)), store.Remove(fruit("second", 0).Key())); got != revision+1 {
		t.Errorf("revision %d, want %d", got, revision+1)
	}
	want, revision = content(t, s)
	s.Close()
	same(t, open(t, path), want, revision)
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
	says(t, err, errs.Unavailable, path, "no space left on device", "make room")
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
			writes = append(writes, store.Set(fruit(fmt.Sprint(i, "-", j), 2000)))
		}
		put(b, s, writes...)
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
