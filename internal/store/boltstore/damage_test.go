package boltstore_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"kuma/internal/errs"
	"kuma/internal/store"
	"kuma/internal/store/storetest"
)

// TestDamage changes a file in many ways. Each must be noticed when the file is
// opened, or be of no consequence: never a crash, never other data.
func TestDamage(t *testing.T) {
	for _, size := range []int{3, 120} {
		t.Run(fmt.Sprint(size, " resources"), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, "kuma.db")
			s := open(t, path)
			for i := range size {
				storetest.Put(t, s, store.Set(storetest.FruitOf(fmt.Sprint(i), i%50*100)))
			}
			for i := range size / 3 {
				storetest.Put(t, s, store.Remove(storetest.FruitOf(fmt.Sprint(i*3), 0).Key()))
			}
			want, revision := storetest.Content(t, s)
			s.Close()
			good, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			try := func(what string, bad []byte) (noticed bool) {
				t.Helper()
				if err := os.WriteFile(path, bad, 0o600); err != nil {
					t.Fatal(err)
				}
				s, err := tryOpen(path)
				if err != nil {
					storetest.Says(t, err, errs.Internal, path, "is damaged", "backup")
					after, _ := os.ReadFile(path)
					if string(after) != string(bad) {
						t.Errorf("%s: the damaged file was changed", what)
					}
					return true
				}
				defer s.Close()
				if got, at := storetest.Content(t, s); at != revision {
					// A header page that is not valid means the state before.
					if at != revision-1 {
						t.Fatalf("%s: %d resources at revision %d, want %d at %d", what, len(got), at, len(want), revision)
					}
					return false
				}
				storetest.Same(t, s, want, revision)
				// And what follows must be as good.
				storetest.Put(t, s, store.Set(storetest.FruitOf("new", 5000)), store.Set(storetest.FruitOf("1", 10)))
				after, next := storetest.Content(t, s)
				s.Close()
				s, err = tryOpen(path)
				if err != nil {
					t.Fatalf("%s: opened, written, and then: %v", what, err)
				}
				defer s.Close()
				storetest.Same(t, s, after, next)
				return false
			}
			if try("nothing", good) {
				t.Fatal("the good file was refused")
			}
			for _, n := range []int{1, 15, 16, 79, 100, 4096, 5000, 8191, 8192, 12288, 16383, len(good) / 2} {
				if !try(fmt.Sprint("cut off at ", n), good[:n]) {
					if n < len(good)/2 {
						t.Errorf("cut off at %d: not noticed", n)
					}
				}
			}
			random := rand.New(rand.NewPCG(1, uint64(size)))
			changed := func(f func(b []byte)) []byte {
				b := append([]byte(nil), good...)
				f(b)
				return b
			}
			rounds, noticed := 100, 0
			if testing.Short() {
				rounds = 30
			}
			for i := range rounds {
				// Half of them where it hurts most: headers of pages and elements.
				at := random.IntN(len(good))
				if i%2 == 0 {
					at = at&^4095 + random.IntN(64)
				}
				bit := byte(1) << random.IntN(8)
				if try(fmt.Sprintf("bit %#x of byte %d", bit, at), changed(func(b []byte) { b[at] ^= bit })) {
					noticed++
				}
			}
			for i := range rounds / 4 {
				from, to := random.IntN(len(good))&^4095, random.IntN(len(good))&^4095
				if try(fmt.Sprint("page zeroed ", from), changed(func(b []byte) { clear(b[from : from+4096]) })) {
					noticed++
				}
				if try(fmt.Sprint("page ", from, " written to ", to), changed(func(b []byte) { copy(b[to:to+4096], good[from:]) })) {
					noticed++
				}
				if try(fmt.Sprint("noise from ", from), changed(func(b []byte) {
					for j := range 256 {
						b[from+j*(1+i%3)] = byte(random.Uint32())
					}
				})) {
					noticed++
				}
			}
			if noticed < rounds/10 {
				t.Errorf("only %d of the changes were noticed", noticed)
			}
			t.Logf("file of %d bytes: %d changes noticed", len(good), noticed)
		})
	}
}

// TestDamageWhileOpen cuts the file off under a store that has it open.
func TestDamageWhileOpen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kuma.db")
	s := open(t, path)
	for i := range 100 {
		storetest.Put(t, s, store.Set(storetest.FruitOf(fmt.Sprint(i), 1000)))
	}
	want, revision := storetest.Content(t, s)
	if err := os.Truncate(path, 8192); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err := s.Put(t.Context(), store.Set(storetest.FruitOf("new", 0)))
		storetest.Says(t, err, errs.Unavailable, path, "can't be written any more", "restart the control plane")
	}
	storetest.Same(t, s, want, revision)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	_, err := tryOpen(path)
	storetest.Says(t, err, errs.Internal, path, "cut off")
}
