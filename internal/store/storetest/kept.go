package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// Closing is a store that is kept somewhere, and given back when it is closed.
type Closing struct {
	store.Store
	Close func() error
}

// Opener opens what the Closing before left. It may be called again when that
// is closed.
type Opener func(t testing.TB, kinds []*resource.Kind, log *slog.Logger) Closing

// Open opens a store with the kinds of NewTypes and no log.
func (o Opener) Open(t testing.TB) Closing {
	t.Helper()
	return o(t, NewTypes().Kinds(), slog.New(slog.DiscardHandler))
}

// FruitOf returns a resource of about size bytes.
func FruitOf(name string, size int) *resource.Resource {
	return NewTypes().Fruit.Make("m", name, &FruitSpec{Colour: "red", Notes: map[string]string{"text": strings.Repeat("x", size)}})
}

// Put commits writes that must be taken, and returns the revision.
func Put(t testing.TB, s store.Store, writes ...store.Write) uint64 {
	t.Helper()
	revision, err := s.Put(t.Context(), writes...)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// Content is all that a store holds, comparable, and its revision.
func Content(t testing.TB, s store.Store) (map[resource.Key]resource.Resource, uint64) {
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

// Same fails the test if the store does not hold exactly what is wanted.
func Same(t testing.TB, s store.Store, want map[resource.Key]resource.Resource, revision uint64) {
	t.Helper()
	got, at := Content(t, s)
	if at != revision || !reflect.DeepEqual(got, want) {
		t.Fatalf("revision %d, want %d: %s", at, revision, cmp.Diff(want, got))
	}
}

// Says fails the test unless the error is of the kind and has all the words.
func Says(t testing.TB, err error, kind errs.Kind, words ...string) {
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

// RunKept tests stores that outlive their process. Each call of make gives an
// Opener for another, empty one; maxKey is the longest key that is taken.
func RunKept(t *testing.T, maxKey int, make func(*testing.T) Opener) {
	t.Run("reopen", func(t *testing.T) { reopen(t, make(t)) })
	t.Run("writes that go together", func(t *testing.T) { together(t, make(t)) })
	t.Run("hidden resources", func(t *testing.T) { hidden(t, make(t)) })
	t.Run("limits", func(t *testing.T) { limits(t, make(t), maxKey) })
}

func reopen(t *testing.T, o Opener) {
	s := o.Open(t)
	types := NewTypes()
	for i := range 300 {
		Put(t, s, store.Set(FruitOf(fmt.Sprint(i%100), i*20)))
	}
	labelled := FruitOf("labelled", 0)
	labelled.Labels, labelled.Status = map[string]string{"a": "b"}, &FruitStatus{Eaten: true}
	Put(t, s, store.Create(labelled), store.Create(types.Basket.Make("", "b", &FruitSpec{Seeds: 3})))
	Put(t, s, store.Remove(types.Fruit.Key("m", "7")))
	want, revision := Content(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := s.Put(t.Context(), store.Set(FruitOf("late", 0))); !errs.Is(err, errs.Unavailable) {
		t.Errorf("Put after Close: %v", err)
	}
	for _, err := range s.Watch(t.Context(), revision) {
		Says(t, err, errs.Unavailable, "closed")
	}

	s = o.Open(t)
	Same(t, s, want, revision)
	if got := Put(t, s, store.Replace(FruitOf("labelled", 0), revision-1)); got != revision+1 {
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
}

// together checks that writes that share a transaction do not share an outcome.
func together(t *testing.T, o Opener) {
	s := o.Open(t)
	var all sync.WaitGroup
	var mu sync.Mutex
	made := map[string]int{}
	for range 32 {
		all.Go(func() {
			for i := range 10 {
				name := fmt.Sprint("n", i)
				_, err := s.Put(t.Context(), store.Create(FruitOf(name, 10)), store.Set(FruitOf("shared", i)))
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
	// More at once than goes in one transaction.
	for i := range 3 {
		all.Go(func() {
			if _, err := s.Put(t.Context(), store.Set(FruitOf(fmt.Sprint("large", i), 12<<20))); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	want, revision := Content(t, s)
	if revision != 13 || len(want) != 14 {
		t.Errorf("revision %d with %d resources, want 13 with 14", revision, len(want))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	Same(t, o.Open(t), want, revision)
}

// hidden is HRD-26: a resource that can't be read does not stop the others, nor
// the control plane. It is kept for the version that can read it.
func hidden(t *testing.T, o Opener) {
	types := NewTypes()
	s := o.Open(t)
	Put(t, s, store.Set(FruitOf("a", 0)), store.Set(FruitOf("b", 0)), store.Set(types.Basket.Make("", "x", &FruitSpec{Seeds: 1})))
	want, revision := Content(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// An older version: no baskets, and fruits have no text in their notes.
	type older struct {
		Notes map[string]int `json:"notes"`
	}
	old := resource.Define[older](resource.Kind{Name: "Fruit", Scope: resource.Mesh, Shape: resource.Spec}, nil)
	var log bytes.Buffer
	s = o(t, []*resource.Kind{old.Kind}, slog.New(slog.NewTextHandler(&log, nil)))
	if list, _, _ := s.List(t.Context(), "", ""); len(list) != 0 {
		t.Errorf("shown: %v", list)
	}
	for _, want := range []string{`resource="Fruit \"a\" in mesh \"m\""`, `resource="Fruit \"b\"`, "kind=Basket resources=1"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("the log should have %q once: %s", want, log.String())
		}
	}
	// It must not write over what it can't read.
	_, err := s.Put(t.Context(), store.Set(old.Make("m", "a", &older{})))
	Says(t, err, errs.Conflict, `Fruit "a" in mesh "m"`, "can't read", "the version that wrote it")
	_, err = s.Put(t.Context(), store.Set(types.Basket.Make("", "x", &FruitSpec{})))
	Says(t, err, errs.Internal, "does not know this kind")
	Put(t, s, store.Set(old.Make("m", "c", &older{})))
	Put(t, s, store.Remove(old.Key("m", "c")))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	Same(t, o.Open(t), want, revision+2)
}

// limits is HRD-25: what is kept has a limit.
func limits(t *testing.T, o Opener, maxKey int) {
	s := o.Open(t)
	for _, c := range []struct {
		r    *resource.Resource
		kind errs.Kind
		says string
	}{
		{FruitOf("a\x00b", 0), errs.Invalid, "NUL"},
		{FruitOf("a\xffb", 0), errs.Invalid, "UTF-8"},
		{FruitOf(strings.Repeat("n", maxKey), 0), errs.Invalid, fmt.Sprint("the limit is ", maxKey)},
		{FruitOf("big", 17<<20), errs.Invalid, "the limit is 16777216"},
		{NewTypes().Fruit.Make("m", "a", &FruitSpec{Taste: math.Inf(1)}), errs.Internal, "unsupported value"},
	} {
		_, err := s.Put(t.Context(), store.Set(FruitOf("ok", 0)), store.Set(c.r))
		Says(t, err, c.kind, c.says)
	}
	if all, revision := Content(t, s); len(all) != 0 || revision != 0 {
		t.Errorf("written: %v", all)
	}
	// The longest name, which nothing makes shorter, and the largest resource.
	name := make([]byte, maxKey-len("Fruit")-len("m"))
	for i := range name {
		name[i] = byte(i*i*7+i*13+i/3)%94 + '!'
	}
	Put(t, s, store.Set(FruitOf(string(name), 16<<20-len(name)*3-1000)))
	want, revision := Content(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	Same(t, o.Open(t), want, revision)
}
