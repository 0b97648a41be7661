package boltstore_test

import (
	"log/slog"
	"path/filepath"
	"testing"

	"kuma/internal/store"
	"kuma/internal/store/boltstore"
	"kuma/internal/store/storetest"
)

func open(t testing.TB, path string) *boltstore.Store {
	t.Helper()
	s, err := boltstore.Open(boltstore.Config{Path: path, Kinds: storetest.NewTypes().Kinds(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, filepath.Join(t.TempDir(), "kuma.db"))
	})
}

func BenchmarkPut(b *testing.B) {
	storetest.BenchmarkPut(b, open(b, filepath.Join(b.TempDir(), "kuma.db")))
}
