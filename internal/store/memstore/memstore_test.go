package memstore_test

import (
	"testing"

	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/store/storetest"
)

func TestContract(t *testing.T) {
	storetest.Run(t, func(*testing.T) store.Store { return memstore.New() })
}

func BenchmarkPut(b *testing.B) {
	storetest.BenchmarkPut(b, memstore.New())
}
