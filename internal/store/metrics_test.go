package store_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/store/storetest"
)

// A store that is counted keeps the promises.
func TestCountedContract(t *testing.T) {
	storetest.Run(t, func(*testing.T) store.Store {
		return store.NewMetrics(storetest.NewTypes().Kinds()).Wrap(memstore.New())
	})
}

// TestCounted asks for this and that and looks at the series.
func TestCounted(t *testing.T) {
	types := storetest.NewTypes()
	m := store.NewMetrics([]*resource.Kind{types.Fruit.Kind})
	s := m.Wrap(memstore.New())
	ctx := t.Context()
	put := func(w ...store.Write) error {
		_, err := s.Put(ctx, w...)
		return err
	}
	apple, basket := types.Fruit.Make("m", "apple", &storetest.FruitSpec{}), types.Basket.Make("", "b", &storetest.FruitSpec{})
	for _, err := range []error{put(store.Create(apple), store.Set(basket)), put(store.Set(apple)), put(), put(store.Remove(basket.Key()))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := put(store.Create(apple)); !errs.Is(err, errs.Conflict) {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, apple.Key()); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"", "Fruit", "NoSuchKind"} {
		if _, _, err := s.List(ctx, kind, ""); err != nil {
			t.Fatal(err)
		}
	}
	for events, err := range s.Watch(ctx, 0) {
		if err != nil || len(events) != 4 {
			t.Errorf("%d events, %v", len(events), err)
		}
		break
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(m)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, series := range f.GetMetric() {
			var labels []string
			for _, l := range series.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			slices.Sort(labels)
			name := f.GetName() + " " + strings.Join(labels, " ")
			got[name] = series.GetCounter().GetValue() + float64(series.GetHistogram().GetSampleCount())
		}
	}
	want := map[string]float64{
		"store Fruit create": 2, "store Fruit update": 1, "store Fruit get": 1, "store Fruit list": 1, "store all list": 1,
		"store list other": 1, "store other update": 1, "store delete other": 1, "store_conflicts Fruit": 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if m.Reads() != 4 || m.Writes() != 5 {
		t.Errorf("%d reads and %d writes", m.Reads(), m.Writes())
	}
}

func BenchmarkCountedGet(b *testing.B) {
	types := storetest.NewTypes()
	apple := types.Fruit.Make("m", "apple", &storetest.FruitSpec{})
	for name, s := range map[string]store.Store{"bare": memstore.New(), "counted": store.NewMetrics(types.Kinds()).Wrap(memstore.New())} {
		b.Run(name, func(b *testing.B) {
			if _, err := s.Put(context.Background(), store.Set(apple)); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Get(context.Background(), apple.Key()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
