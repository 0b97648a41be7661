// Package policytest runs a folder of cases against one policy, and makes
// pictures of meshes for tests.
package policytest

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// Kinds are those of a mesh without policies.
func Kinds() []*resource.Kind {
	return []*resource.Kind{
		mesh.Meshes.Kind, mesh.Dataplanes.Kind, mesh.DataplaneInsights.Kind, mesh.MeshServices.Kind, mesh.Secrets.Kind, mesh.TrafficPermissions.Kind,
	}
}

// Read decodes and checks documents of YAML, divided by "---".
func Read(docs string, kinds ...*resource.Kind) ([]*resource.Resource, error) {
	var out []*resource.Resource
	for doc := range strings.SplitSeq("\n"+docs, "\n---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		raw, err := yaml.YAMLToJSON([]byte(doc))
		if err != nil {
			return nil, err
		}
		h, err := resource.Peek(raw)
		if err != nil {
			return nil, err
		}
		var kind *resource.Kind
		for _, k := range append(Kinds(), kinds...) {
			if k.Name == h.Type {
				kind = k
			}
		}
		if kind == nil {
			return nil, fmt.Errorf("there is no kind %q here", h.Type)
		}
		r, err := resource.Decode(kind, raw, false)
		if err != nil {
			return nil, err
		}
		if kind.Check != nil {
			if bad := kind.Check(r.Spec); len(bad) > 0 {
				return nil, errs.Fields(bad...)
			}
		}
		if kind.Scope == resource.Mesh && r.Mesh == "" {
			r.Mesh = "default"
		}
		out = append(out, r)
	}
	return out, nil
}

// World is a mesh under change: a store and the tracker that follows it.
type World struct {
	t       testing.TB
	store   *memstore.Store
	tracker *state.Tracker
}

// NewWorld starts an empty world, which ends with the test.
func NewWorld(t testing.TB) *World {
	w := &World{t: t, store: memstore.New()}
	w.tracker = state.New(state.Config{Store: w.store, Quiet: 1, Max: 1, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.tracker.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the tracker ended: %v", err)
		}
	})
	<-w.tracker.Ready()
	return w
}

// Put writes resources and returns the picture that has them.
func (w *World) Put(rs ...*resource.Resource) *state.Picture {
	w.t.Helper()
	writes := make([]store.Write, len(rs))
	for i, r := range rs {
		writes[i] = store.Set(r)
	}
	return w.commit(writes)
}

// Remove deletes a resource and returns the picture without it.
func (w *World) Remove(k resource.Key) *state.Picture {
	w.t.Helper()
	return w.commit([]store.Write{store.Remove(k)})
}

func (w *World) commit(writes []store.Write) *state.Picture {
	w.t.Helper()
	revision, err := w.store.Put(w.t.Context(), writes...)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.tracker.Await(w.t.Context(), revision); err != nil {
		w.t.Fatal(err)
	}
	return w.tracker.Now()
}

// Picture returns a picture of the documents.
func Picture(t testing.TB, docs string, kinds ...*resource.Kind) *state.Picture {
	t.Helper()
	rs, err := Read(docs, kinds...)
	if err != nil {
		t.Fatal(err)
	}
	return NewWorld(t).Put(rs...)
}
