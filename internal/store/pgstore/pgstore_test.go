package pgstore_test

import (
	"bytes"
	"context"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/store/pgstore"
	"kuma/internal/store/storetest"
	"kuma/test/postgres"
)

// patience is how long a thing may take that is bound to happen.
const patience = 30 * time.Second

var discard = slog.New(slog.DiscardHandler)

// config is for a database of the server.
func config(s *postgres.Server, database string) pgstore.Config {
	return pgstore.Config{
		Host: s.Host, Port: uint32(s.Port), User: postgres.User, Password: postgres.Password, Database: database,
		Kinds: storetest.NewTypes().Kinds(), Instance: "first", Log: discard,
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
}

func TestReopen(t *testing.T) {
	t.Parallel()
	server := postgres.Start(t, postgres.Options{})
	c := config(server, migrated(t, server))
	s := open(t, c)
	put(t, s, store.Create(fruit("a", 10)), store.Create(fruit("b", 2000)))
	put(t, s, store.Set(fruit("a", 20)))
	put(t, s, store.Remove(fruit("b", 0).Key()), store.Create(fruit("c", 1)))
	want, revision := content(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), store.Set(fruit("late", 0))); !errs.Is(err, errs.Unavailable) {
		t.Errorf("Put after Close: %v", err)
	}
	s = open(t, c)
	same(t, s, want, revision)
	if got := put(t, s, store.Replace(fruit("a", 0), 2)); got != revision+1 {
		t.Errorf("the next revision is %d, want %d", got, revision+1)
	}
}
