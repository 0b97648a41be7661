// Package storetest holds the promises of store.Store as tests. Every store
// runs them.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// FruitSpec is a specification to test with.
type FruitSpec struct {
	Colour string            `json:"colour,omitempty"`
	Seeds  int               `json:"seeds,omitempty"`
	Notes  map[string]string `json:"notes,omitempty"`
	// Taste is a number that JSON can't always say.
	Taste float64 `json:"taste,omitempty"`
}

// FruitStatus is a status to test with.
type FruitStatus struct {
	Eaten bool `json:"eaten,omitempty"`
}

// Types has two kinds to test with, made anew on each call.
type Types struct {
	// Fruit belongs to a mesh and has a status.
	Fruit resource.Type[FruitSpec]
	// Basket is global.
	Basket resource.Type[FruitSpec]
}

// NewTypes defines the kinds.
func NewTypes() Types {
	return Types{
		Fruit: resource.Define[FruitSpec](resource.Kind{
			Name: "Fruit", Plural: "fruits", Short: "fru", Scope: resource.Mesh, Shape: resource.Spec,
			NewStatus: func() any { return new(FruitStatus) },
		}, nil),
		Basket: resource.Define[FruitSpec](resource.Kind{Name: "Basket", Plural: "baskets"}, nil),
	}
}

// Kinds lists the kinds.
func (t Types) Kinds() []*resource.Kind { return []*resource.Kind{t.Fruit.Kind, t.Basket.Kind} }

// Run tests stores that open makes. Each call makes an empty one that knows the
// kinds of NewTypes and is closed when the test ends.
func Run(t *testing.T, open func(*testing.T) store.Store) {
	for _, c := range []struct {
		name string
		test func(*suite)
	}{
		{"empty", (*suite).empty},
		{"versions and times", (*suite).versions},
		{"conditions", (*suite).conditions},
		{"a transaction is all or nothing", (*suite).transaction},
		{"writes that make no sense", (*suite).nonsense},
		{"lists are ordered", (*suite).lists},
		{"what was read or passed in stays", (*suite).shared},
		{"watch from a revision", (*suite).watchFrom},
		{"watch what happens", (*suite).watchNew},
		{"batches hold whole transactions", (*suite).watchWhole},
		{"watch ends", (*suite).watchEnds},
		{"a slow reader is told", (*suite).slow},
		{"a cancelled write", (*suite).cancelled},
		{"writers of one resource", (*suite).contended},
		{"writers and watchers", (*suite).crowd},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, stop := context.WithTimeout(t.Context(), time.Minute)
			defer stop()
			c.test(&suite{T: t, Types: NewTypes(), s: open(t), ctx: ctx})
		})
	}
}

type suite struct {
	*testing.T
	Types
	s   store.Store
	ctx context.Context
}

func (t *suite) fruit(mesh, name, colour string) *resource.Resource {
	return t.Fruit.Make(mesh, name, &FruitSpec{Colour: colour})
}

// put commits writes and returns the revision.
func (t *suite) put(writes ...store.Write) uint64 {
	t.Helper()
	revision, err := t.s.Put(t.ctx, writes...)
	if err != nil {
		t.Fatalf("Put: %v", err)
	}
	return revision
}

func (t *suite) get(key resource.Key) *resource.Resource {
	t.Helper()
	r, err := t.s.Get(t.ctx, key)
	if err != nil {
		t.Fatalf("Get: %v", err)
	}
	return r
}

// refused commits writes that must fail with the kind, and checks that the
// revision stays.
func (t *suite) refused(kind errs.Kind, text string, writes ...store.Write) {
	t.Helper()
	_, before, _ := t.s.List(t.ctx, "", "")
	_, err := t.s.Put(t.ctx, writes...)
	if !errs.Is(err, kind) || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("Put: %v; want %v with %q", err, kind, text)
	}
	if _, after, _ := t.s.List(t.ctx, "", ""); after != before {
		t.Errorf("revision moved from %d to %d by a write that failed", before, after)
	}
}

// names lists what is there, as "mesh/name".
func (t *suite) names(kind, mesh string) string {
	t.Helper()
	list, _, err := t.s.List(t.ctx, kind, mesh)
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	var b []string
	for _, r := range list {
		b = append(b, r.Mesh+"/"+r.Name)
	}
	return strings.Join(b, " ")
}

// follow reads changes after since until there are n of them.
func (t *suite) follow(since uint64, n int) []store.Event {
	t.Helper()
	var all []store.Event
	for events, err := range t.s.Watch(t.ctx, since) {
		if err != nil {
			t.Fatalf("Watch: %v", err)
		}
		if all = append(all, events...); len(all) >= n {
			break
		}
	}
	if len(all) != n {
		t.Fatalf("Watch(%d): got %d changes, want %d", since, len(all), n)
	}
	return all
}

// story writes changes down: "2 + Fruit "a" in mesh "m" red".
func story(events []store.Event) string {
	var b strings.Builder
	for _, e := range events {
		if e.Resource == nil {
			fmt.Fprintf(&b, "%d - %s\n", e.Revision, e.Key)
			continue
		}
		fmt.Fprintf(&b, "%d + %s %s\n", e.Revision, e.Key, e.Resource.Spec.(*FruitSpec).Colour)
	}
	return b.String()
}

func (t *suite) empty() {
	if _, err := t.s.Get(t.ctx, t.Fruit.Key("m", "a")); !errs.Is(err, errs.NotFound) {
		t.Errorf("Get of nothing: %v", err)
	}
	list, revision, err := t.s.List(t.ctx, "Fruit", "")
	if len(list) != 0 || revision != 0 || err != nil {
		t.Errorf("List of nothing: %v, %d, %v", list, revision, err)
	}
	if revision := t.put(); revision != 0 {
		t.Errorf("a Put without writes took revision %d", revision)
	}
}

func (t *suite) versions() {
	start := time.Now()
	r := t.fruit("m", "a", "red")
	r.Labels, r.Status = map[string]string{"l": "v"}, &FruitStatus{Eaten: true}
	first := t.put(store.Create(r), store.Create(t.fruit("m", "b", "blue")))
	if first != 1 {
		t.Errorf("the first revision is %d, want 1", first)
	}
	a := t.get(r.Key())
	if a.Version != first || t.get(t.Fruit.Key("m", "b")).Version != first {
		t.Errorf("version %d; want the transaction's revision %d", a.Version, first)
	}
	if a.Created.Before(start.Add(-time.Second)) || a.Created.After(time.Now().Add(time.Second)) || !a.Modified.Equal(a.Created) {
		t.Errorf("created %v, modified %v; want now, twice", a.Created, a.Modified)
	}
	if a.Created.Location() != time.UTC {
		t.Errorf("created in %v, want UTC", a.Created.Location())
	}
	if a.Labels["l"] != "v" || !a.Status.(*FruitStatus).Eaten {
		t.Errorf("labels %v, status %v", a.Labels, a.Status)
	}
	second := t.put(store.Set(t.fruit("m", "a", "green")))
	again := t.get(r.Key())
	if second != 2 || again.Version != second {
		t.Errorf("revision %d, version %d; want 2, 2", second, again.Version)
	}
	if !again.Created.Equal(a.Created) || again.Modified.Before(a.Modified) {
		t.Errorf("created %v, modified %v after an update of %v", again.Created, again.Modified, a.Created)
	}
	if again.Spec.(*FruitSpec).Colour != "green" || again.Labels != nil || again.Status != nil {
		t.Errorf("the update left something of the old state: %+v", again)
	}
	if b := t.get(t.Fruit.Key("m", "b")); b.Version != first {
		t.Errorf("another resource's version moved to %d", b.Version)
	}
	t.put(store.Remove(r.Key()))
	t.put(store.Create(r))
	if made := t.get(r.Key()); made.Version != 4 || made.Created.Before(again.Modified) {
		t.Errorf("made again: version %d, created %v; want 4, and not before %v", made.Version, made.Created, again.Modified)
	}
}

func (t *suite) conditions() {
	a := t.fruit("m", "a", "red")
	t.refused(errs.Conflict, "does not exist", store.Replace(a, 1))
	t.refused(errs.NotFound, `Fruit "a" in mesh "m" not found`, store.Remove(a.Key()))
	t.put(store.Create(a))
	t.refused(errs.Conflict, "exists already, in version 1", store.Create(a))
	t.put(store.Replace(t.fruit("m", "a", "green"), 1))
	t.refused(errs.Conflict, "has version 2; version 1 was expected", store.Replace(a, 1))
	t.refused(errs.Conflict, "has version 2", store.Write{Key: a.Key(), If: store.Condition{Version: 1}})
	if c := t.get(a.Key()).Spec.(*FruitSpec).Colour; c != "green" {
		t.Errorf("a refused write left %q", c)
	}
	// The same name in another mesh and kind is another resource.
	t.put(store.Create(t.fruit("n", "a", "red")), store.Create(t.Basket.Make("", "a", &FruitSpec{})))
	t.put(store.Write{Key: a.Key(), If: store.Condition{Version: 2}})
	if _, err := t.s.Get(t.ctx, a.Key()); !errs.Is(err, errs.NotFound) {
		t.Errorf("Get of what was deleted: %v", err)
	}
	if got := t.names("", ""); got != "/a n/a" {
		t.Errorf("left: %q", got)
	}
}

func (t *suite) transaction() {
	t.put(store.Create(t.fruit("m", "a", "red")), store.Create(t.fruit("m", "b", "red")))
	t.refused(errs.Conflict, `Fruit "d"`,
		store.Set(t.fruit("m", "a", "blue")),
		store.Remove(t.Fruit.Key("m", "b")),
		store.Create(t.fruit("m", "c", "blue")),
		store.Create(t.Basket.Make("", "b", &FruitSpec{})),
		store.Replace(t.fruit("m", "d", "blue"), 7),
	)
	if got := t.names("", ""); got != "m/a m/b" || t.get(t.Fruit.Key("m", "a")).Version != 1 {
		t.Errorf("a part of a refused transaction is there: %q", got)
	}
	t.follow(0, 2)
}

func (t *suite) nonsense() {
	a := t.fruit("m", "a", "red")
	t.refused(errs.Internal, "another key", store.Write{Key: t.Fruit.Key("m", "b"), Resource: a})
	t.refused(errs.Internal, "twice", store.Set(a), store.Set(a))
	if got := t.names("", ""); got != "" {
		t.Errorf("left: %q", got)
	}
}

func (t *suite) lists() {
	for _, name := range []string{"m/b", "k/z", "m/a", "n/a", "mm/a", "m/ab", "m/a-b"} {
		mesh, name, _ := strings.Cut(name, "/")
		t.put(store.Create(t.fruit(mesh, name, "")))
	}
	last := t.put(store.Create(t.Basket.Make("", "x", &FruitSpec{})), store.Create(t.Basket.Make("", "B", &FruitSpec{})))
	for _, c := range []struct{ kind, mesh, want string }{
		{"Fruit", "", "k/z m/a m/a-b m/ab m/b mm/a n/a"},
		{"Fruit", "m", "m/a m/a-b m/ab m/b"},
		{"Fruit", "mm", "mm/a"},
		{"Fruit", "l", ""},
		{"Fruit", "z", ""},
		{"Basket", "", "/B /x"},
		{"Basket", "m", ""},
		{"Nothing", "", ""},
		{"", "", "/B /x k/z m/a m/a-b m/ab m/b mm/a n/a"},
		{"", "m", "m/a m/a-b m/ab m/b"},
	} {
		if got := t.names(c.kind, c.mesh); got != c.want {
			t.Errorf("List(%q, %q): %q, want %q", c.kind, c.mesh, got, c.want)
		}
	}
	if _, revision, _ := t.s.List(t.ctx, "Basket", ""); revision != last {
		t.Errorf("listed at revision %d, want %d", revision, last)
	}
}

func (t *suite) shared() {
	in := t.fruit("m", "a", "red")
	in.Labels = map[string]string{"l": "v"}
	was := *in
	t.put(store.Create(in))
	if !reflect.DeepEqual(*in, was) {
		t.Errorf("Put changed what was passed in: %+v", in)
	}
	read := t.get(in.Key())
	listed, _, _ := t.s.List(t.ctx, "Fruit", "")
	first := listed[0]
	copied := *read
	t.put(store.Set(t.fruit("m", "a", "blue")), store.Create(t.fruit("m", "0", "")), store.Create(t.fruit("m", "z", "")))
	t.put(store.Remove(in.Key()))
	if !reflect.DeepEqual(*read, copied) {
		t.Errorf("a later Put changed what was read: %+v", read)
	}
	if len(listed) != 1 || listed[0] != first || listed[0].Spec.(*FruitSpec).Colour != "red" {
		t.Errorf("a later Put changed a list that was read: %+v", listed)
	}
	part, _, _ := t.s.List(t.ctx, "Fruit", "m")
	_ = append(part, in)
	t.put(store.Create(t.fruit("n", "a", "")))
	_ = append(part, in)
	if got := t.names("Fruit", ""); got != "m/0 m/z n/a" {
		t.Errorf("who appends to a list changes it for others: %q", got)
	}
}

func (t *suite) watchFrom() {
	t.put(store.Create(t.fruit("m", "a", "red")))
	t.put(store.Set(t.fruit("m", "a", "green")), store.Create(t.fruit("m", "b", "blue")))
	t.put(store.Remove(t.Fruit.Key("m", "a")))
	want := []string{
		"1 + Fruit \"a\" in mesh \"m\" red\n",
		"2 + Fruit \"a\" in mesh \"m\" green\n2 + Fruit \"b\" in mesh \"m\" blue\n",
		"3 - Fruit \"a\" in mesh \"m\"\n",
	}
	for since, n := range []int{4, 3, 1} {
		got := t.follow(uint64(since), n)
		if diff := cmp.Diff(strings.Join(want[since:], ""), story(got)); diff != "" {
			t.Errorf("Watch(%d): %s", since, diff)
		}
		for _, e := range got {
			if e.Resource != nil && (e.Resource.Version != e.Revision || e.Resource.Key() != e.Key) {
				t.Errorf("the event of %s at %d has %s in version %d", e.Key, e.Revision, e.Resource.Key(), e.Resource.Version)
			}
		}
	}
	for _, err := range t.s.Watch(t.ctx, 99) {
		if !errors.Is(err, store.ErrTooOld) {
			t.Errorf("Watch from a revision that never was: %v, want ErrTooOld", err)
		}
	}
}

// watchNew is about lost wake-ups: each write must wake the reader, however
// the two meet.
func (t *suite) watchNew() {
	seen := make(chan uint64)
	go func() {
		defer close(seen)
		for events, err := range t.s.Watch(t.ctx, 0) {
			if err != nil {
				t.Errorf("Watch: %v", err)
				return
			}
			for _, e := range events {
				seen <- e.Revision
			}
			if events[len(events)-1].Revision == 200 {
				return
			}
		}
	}()
	for i := range uint64(200) {
		t.put(store.Set(t.fruit("m", "a", fmt.Sprint(i))))
		if got, ok := <-seen; !ok || got != i+1 {
			t.Fatalf("saw revision %d, want %d", got, i+1)
		}
	}
}

func (t *suite) watchWhole() {
	var writers sync.WaitGroup
	defer writers.Wait()
	writers.Go(func() {
		for i := range 100 {
			colour := fmt.Sprint(i)
			if _, err := t.s.Put(t.ctx, store.Set(t.fruit("m", "a", colour)), store.Set(t.fruit("m", "b", colour)), store.Set(t.fruit("m", "c", colour))); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for events, err := range t.s.Watch(t.ctx, 0) {
		if err != nil || len(events)%3 != 0 {
			t.Fatalf("a batch of %d changes, %v; want threes", len(events), err)
		}
		if events[len(events)-1].Revision == 100 {
			break
		}
	}
}

func (t *suite) watchEnds() {
	ctx, stop := context.WithCancel(t.ctx)
	defer stop()
	t.put(store.Create(t.fruit("m", "a", "")))
	batches := 0
	for _, err := range t.s.Watch(ctx, 0) {
		if err != nil {
			t.Errorf("the end of the context is no error, but: %v", err)
		}
		batches++
		stop()
	}
	if batches != 1 {
		t.Errorf("%d batches, want 1", batches)
	}
	for range t.s.Watch(ctx, 0) {
		t.Error("a batch after the context's end")
	}
}

func (t *suite) slow() {
	const size = 500
	batch := func() {
		var writes []store.Write
		for i := range size {
			writes = append(writes, store.Set(t.fruit("m", fmt.Sprint(i), "")))
		}
		t.put(writes...)
	}
	batch()
	batches, told := 0, false
	for events, err := range t.s.Watch(t.ctx, 0) {
		switch {
		case errors.Is(err, store.ErrTooOld):
			told = true
		case told || err != nil || len(events) != size:
			t.Fatalf("batch of %d, %v, after ErrTooOld: %v", len(events), err, told)
		default:
			batches++
			for range store.HistoryLimit/size + 2 {
				batch()
			}
		}
	}
	if batches != 1 || !told {
		t.Fatalf("%d batches, told: %v; want one, then ErrTooOld, then the end", batches, told)
	}
	list, revision, _ := t.s.List(t.ctx, "", "")
	if len(list) != size {
		t.Errorf("%d resources, want %d", len(list), size)
	}
	t.put(store.Create(t.fruit("n", "x", "new")))
	if got := story(t.follow(revision, 1)); !strings.Contains(got, `"x" in mesh "n" new`) {
		t.Errorf("after listing: %s", got)
	}
}

func (t *suite) cancelled() {
	ctx, stop := context.WithCancel(t.ctx)
	stop()
	_, err := t.s.Put(ctx, store.Create(t.fruit("m", "a", "")))
	if !errs.Is(err, errs.Unavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("Put: %v; want unavailable because of the context", err)
	}
	if got := t.names("", ""); got != "" {
		t.Errorf("written: %q", got)
	}
}

// contended lets writers count one number up, each from what it read. A lost
// update would leave it too low.
func (t *suite) contended() {
	const writers, each = 8, 20
	t.put(store.Create(t.Basket.Make("", "n", &FruitSpec{})))
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for done := 0; done < each; {
				r, err := t.s.Get(t.ctx, t.Basket.Key("", "n"))
				if err != nil {
					t.Error(err)
					return
				}
				next := t.Basket.Make("", "n", &FruitSpec{Seeds: r.Spec.(*FruitSpec).Seeds + 1})
				switch _, err := t.s.Put(t.ctx, store.Replace(next, r.Version)); {
				case err == nil:
					done++
				case !errs.Is(err, errs.Conflict):
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	if got := t.get(t.Basket.Key("", "n")).Spec.(*FruitSpec).Seeds; got != writers*each {
		t.Errorf("counted to %d, want %d", got, writers*each)
	}
}

// crowd lets writers make, change and delete, and readers rebuild the state
// from the changes: all must end with what the store lists.
func (t *suite) crowd() {
	const writers, each, watchers = 6, 50, 4
	var writing, watching sync.WaitGroup
	finals := make([]map[resource.Key]uint64, watchers)
	for i := range watchers {
		watching.Go(func() {
			state, last := map[resource.Key]uint64{}, uint64(0)
			finals[i] = state
			for events, err := range t.s.Watch(t.ctx, 0) {
				if err != nil {
					t.Errorf("Watch: %v", err)
					return
				}
				for _, e := range events {
					if e.Revision != last && e.Revision != last+1 {
						t.Errorf("revision %d after %d", e.Revision, last)
						return
					}
					last = e.Revision
					if e.Resource == nil {
						delete(state, e.Key)
						continue
					}
					state[e.Key] = e.Resource.Version
					if e.Key.Kind == "Basket" {
						return
					}
				}
			}
		})
	}
	for w := range writers {
		writing.Go(func() {
			last := uint64(0)
			for i := range each {
				r := t.fruit("m", fmt.Sprintf("%d-%d", w, i%7), fmt.Sprint(i))
				write := store.Set(r)
				if i >= 7 && i%5 == 0 {
					write = store.Remove(r.Key())
				}
				revision, err := t.s.Put(t.ctx, write, store.Set(t.fruit("n", fmt.Sprint(w), fmt.Sprint(i))))
				if errs.Is(err, errs.NotFound) {
					continue
				}
				if err != nil || revision <= last {
					t.Errorf("Put: revision %d after %d, %v", revision, last, err)
					return
				}
				last = revision
				if got, err := t.s.Get(t.ctx, t.Fruit.Key("n", fmt.Sprint(w))); err != nil || got.Version != revision {
					t.Errorf("wrote version %d, read %v, %v", revision, got, err)
					return
				}
			}
		})
	}
	writing.Wait()
	t.put(store.Create(t.Basket.Make("", "end", &FruitSpec{})))
	watching.Wait()
	want := map[resource.Key]uint64{}
	list, _, _ := t.s.List(t.ctx, "", "")
	for _, r := range list {
		want[r.Key()] = r.Version
	}
	for _, got := range finals {
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("a reader's picture is not the store's: %s", diff)
		}
	}
}

// BenchmarkPut measures an update of one resource of about 1 kB, by one writer
// and by 16 at once.
func BenchmarkPut(b *testing.B, s store.Store) {
	types := NewTypes()
	spec := &FruitSpec{Colour: "red", Notes: map[string]string{"text": strings.Repeat("x", 1000)}}
	b.Run("one writer", func(b *testing.B) {
		b.ReportAllocs()
		r := types.Fruit.Make("m", "a", spec)
		took := make([]time.Duration, 0, b.N)
		for b.Loop() {
			start := time.Now()
			if _, err := s.Put(b.Context(), store.Set(r)); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(start))
		}
		ReportMedian(b, took)
	})
	b.Run("16 writers", func(b *testing.B) {
		var n sync.Mutex
		next := 0
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			n.Lock()
			next++
			r := types.Fruit.Make("m", fmt.Sprint("p", next), spec)
			n.Unlock()
			for pb.Next() {
				if _, err := s.Put(b.Context(), store.Set(r)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// ReportMedian adds the median to a benchmark's results, in microseconds.
func ReportMedian(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
}
