package upkeep_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/token"
	"kuma/internal/upkeep"
)

func authority(name string, b *mesh.Backend) (cert, key []byte, err error) {
	return []byte("cert of " + name), []byte("key of " + b.Name), nil
}

func keeper(s store.Store, tr *state.Tracker) *upkeep.Keeper {
	return upkeep.New(upkeep.Config{
		Store: s, Tracker: tr, Zone: "default", AdminToken: true, RoutingResources: true, Authority: authority,
		Kinds: []*resource.Kind{mesh.Meshes.Kind, mesh.TrafficPermissions.Kind}, Log: slog.New(slog.DiscardHandler),
	})
}

func keys(t *testing.T, s store.Store) []string {
	t.Helper()
	all, _, err := s.List(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range all {
		out = append(out, r.Key().String())
	}
	return out
}

func TestFirstStartAndLaterOnes(t *testing.T) {
	s := memstore.New()
	k := keeper(s, nil)
	if err := k.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`GlobalSecret "admin-user-token"`, `GlobalSecret "envoy-admin-ca"`, `GlobalSecret "user-token-signing-key-1"`, `GlobalSecret "zone-token-signing-key-1"`,
		`Mesh "default"`, `Zone "default"`,
		`Secret "dataplane-token-signing-key-default-1" in mesh "default"`, `TrafficPermission "allow-all-default" in mesh "default"`,
	}
	got := keys(t, s)
	for _, w := range want {
		if !strings.Contains(strings.Join(got, "\n"), w) {
			t.Errorf("%s was not made", w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("made %q", got)
	}
	admin, err := s.Get(t.Context(), mesh.GlobalSecrets.Key("", mesh.AdminUserToken))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := token.Unverified(string(mesh.GlobalSecrets.From(admin).Spec.Data), ""); err != nil {
		t.Errorf("the administrator's token: %v", err)
	}

	// What a user deletes stays deleted; what is needed to serve comes back.
	for _, key := range []resource.Key{mesh.TrafficPermissions.Key("default", "allow-all-default"), mesh.Meshes.Key("", "default"), mesh.GlobalSecrets.Key("", "user-token-signing-key-1")} {
		if _, err := s.Put(t.Context(), store.Remove(key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := k.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := strings.Join(keys(t, s), "\n")
	if strings.Contains(after, "allow-all") || strings.Contains(after, `Mesh "default"`) {
		t.Error("something that was deleted came back")
	}
	if !strings.Contains(after, "user-token-signing-key-1") {
		t.Error("there is no key for users' tokens")
	}
}

// TestAdminAuthorityIsKept: the authority of the admin listeners is made where
// there is none, and never replaced, whoever made it.
func TestAdminAuthorityIsKept(t *testing.T) {
	s := memstore.New()
	key := mesh.GlobalSecrets.Key("", mesh.EnvoyAdminCA)
	if _, err := s.Put(t.Context(), store.Create(mesh.GlobalSecrets.Make("", key.Name, &mesh.SecretSpec{Data: []byte("the original's")}))); err != nil {
		t.Fatal(err)
	}
	data := func() []byte {
		t.Helper()
		if err := keeper(s, nil).Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		r, err := s.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		return mesh.GlobalSecrets.From(r).Spec.Data
	}
	if got := data(); string(got) != "the original's" {
		t.Errorf("it became %d bytes", len(got))
	}
	if _, err := s.Put(t.Context(), store.Remove(key)); err != nil {
		t.Fatal(err)
	}
	made := data()
	if _, err := pki.OpenAdminCA(made); err != nil {
		t.Errorf("what was made can't be used: %v", err)
	}
	if again := data(); string(again) != string(made) {
		t.Error("it was made again")
	}
}

func TestANewMesh(t *testing.T) {
	s := memstore.New()
	k := keeper(s, nil)
	spec := &mesh.MeshSpec{
		SkipCreatingInitialPolicies: []string{"*"},
		MTLS:                        &mesh.MTLS{Backends: []mesh.Backend{{Name: "ca", Type: "builtin"}}},
	}
	m := mesh.Meshes.Make("", "m", spec)
	writes, err := k.Complete(t.Context(), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, w := range writes {
		names = append(names, w.Key.Name)
	}
	if diff := cmp.Diff([]string{"dataplane-token-signing-key-m-1", "m.ca-builtin-cert-ca", "m.ca-builtin-key-ca"}, names); diff != "" {
		t.Error(diff)
	}
	if _, err := s.Put(t.Context(), append(writes, store.Create(m))...); err != nil {
		t.Fatal(err)
	}
	if again, err := k.Complete(t.Context(), m, m); err != nil || len(again) != 0 {
		t.Errorf("an unchanged mesh needs %v, %v", again, err)
	}
	spec.MTLS.Backends[0].Type = "vault"
	if _, err := k.Complete(t.Context(), m, m); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "mtls.backends[0].type: could not find installed plugin for this type") {
		t.Errorf("an unknown sort of authority: %v", err)
	}
}

func TestServicesFollowDataplanes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := memstore.New()
		tr := state.New(state.Config{Store: s, Log: slog.New(slog.DiscardHandler)})
		k := keeper(s, tr)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- tr.Run(ctx) }()
		go func() { done <- k.Run(ctx) }()
		put := func(w ...store.Write) {
			t.Helper()
			if _, err := s.Put(ctx, w...); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		service := func() *resource.Resource {
			r, err := s.Get(ctx, mesh.MeshServices.Key("default", "web"))
			if err != nil {
				return nil
			}
			return r
		}
		m := &mesh.MeshSpec{}
		put(store.Set(mesh.Meshes.Make("", "default", m)), store.Set(dataplane("a", mesh.NotReady)))
		if service() != nil {
			t.Fatal("a MeshService was made although the mesh does not ask for them")
		}
		put(store.Set(mesh.Meshes.Make("", "default", &mesh.MeshSpec{MeshServices: &mesh.MeshServicesMode{Mode: mesh.ServicesEverywhere}})))
		want := &mesh.MeshServiceSpec{
			Selector:   mesh.ServiceSelector{DataplaneTags: map[string]string{mesh.TagService: "web"}},
			Ports:      []mesh.ServicePort{{Name: "80", Port: 80, TargetPort: &mesh.IntOrString{Number: 80}, AppProtocol: "http"}},
			Identities: []mesh.ServiceIdentity{{Type: mesh.IdentityTag, Value: "web"}},
			State:      mesh.ServiceUnavailable,
		}
		if diff := cmp.Diff(want, service().Spec); diff != "" {
			t.Error(diff)
		}
		put(store.Set(dataplane("a", mesh.Ready)))
		if got := mesh.MeshServices.From(service()).Spec.State; got != mesh.ServiceAvailable {
			t.Errorf("state %q with a ready inbound", got)
		}
		now := time.Now()
		put(store.Set(mesh.DataplaneInsights.Make("default", "a", &mesh.DataplaneInsightSpec{Subscriptions: []mesh.Subscription{{ConnectTime: &now}}})))
		if st := service().Status.(*mesh.MeshServiceStatus); st.DataplaneProxies.Healthy != 1 {
			t.Errorf("status %+v after the proxy connected", st.DataplaneProxies)
		}
		put(store.Remove(mesh.Dataplanes.Key("default", "a")))
		if r := service(); r == nil || r.Labels[mesh.LabelDeletionGracePeriod] == "" || mesh.MeshServices.From(r).Spec.State != mesh.ServiceUnavailable {
			t.Errorf("after the last Dataplane has gone: %+v", r)
		}
		if _, err := s.Get(ctx, mesh.DataplaneInsights.Key("default", "a")); !errs.Is(err, errs.NotFound) {
			t.Error("an insight outlived its Dataplane")
		}
		time.Sleep(time.Hour)
		if service() != nil {
			t.Error("the MeshService outlived its grace period")
		}
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

func dataplane(name string, st mesh.InboundState) *resource.Resource {
	return mesh.Dataplanes.Make("default", name, &mesh.DataplaneSpec{Networking: &mesh.Networking{
		Address: "127.0.0.1",
		Inbound: []mesh.Inbound{{Port: 80, State: st, Tags: map[string]string{mesh.TagService: "web", mesh.TagProtocol: "http"}}},
	}})
}
