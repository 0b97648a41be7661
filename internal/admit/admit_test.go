package admit_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

// hook gives each new Mesh a secret, and refuses one backend.
type hook struct{}

func (hook) Complete(_ context.Context, m, old *resource.Resource) ([]store.Write, error) {
	if b := mesh.Meshes.From(m).Spec.EnabledBackend(); b != nil && b.Type == "vault" {
		return nil, errs.Fields(errs.Field{Path: "mtls.backends[0].type", Message: "could not find installed plugin for this type"})
	}
	if old != nil {
		return nil, nil
	}
	return []store.Write{store.Create(mesh.Secrets.Make(m.Name, "needed", &mesh.SecretSpec{Data: []byte("x")}))}, nil
}

func newGate(t *testing.T, change ...func(*admit.Config)) (*admit.Gate, store.Store) {
	t.Helper()
	access, err := auth.NewAccess(auth.DefaultAccess())
	if err != nil {
		t.Fatal(err)
	}
	cfg := admit.Config{Store: memstore.New(), Access: access, Zone: "zone-1", Meshes: hook{}}
	for _, c := range change {
		c(&cfg)
	}
	return admit.New(cfg), cfg.Store
}

// admin writes as the administrator, without conditions.
func put(t *testing.T, g *admit.Gate, rs ...*resource.Resource) ([]admit.Result, error) {
	t.Helper()
	var changes []admit.Change
	for _, r := range rs {
		changes = append(changes, admit.Change{Resource: r})
	}
	return g.Put(t.Context(), auth.Admin(), changes...)
}

func mustPut(t *testing.T, g *admit.Gate, rs ...*resource.Resource) []admit.Result {
	t.Helper()
	out, err := put(t, g, rs...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func newMesh(name string, change ...func(*mesh.MeshSpec)) *resource.Resource {
	spec := &mesh.MeshSpec{}
	for _, c := range change {
		c(spec)
	}
	return mesh.Meshes.Make("", name, spec)
}

func mtls(backend, kind string) func(*mesh.MeshSpec) {
	return func(m *mesh.MeshSpec) {
		m.MTLS = &mesh.MTLS{EnabledBackend: backend, Backends: []mesh.Backend{{Name: backend, Type: kind}}}
	}
}

func newDataplane(name string, change ...func(*mesh.DataplaneSpec)) *resource.Resource {
	spec := &mesh.DataplaneSpec{Networking: &mesh.Networking{Address: "192.0.2.1", Inbound: []mesh.Inbound{{Port: 80, Tags: map[string]string{mesh.TagService: "web"}}}}}
	for _, c := range change {
		c(spec)
	}
	return mesh.Dataplanes.Make("m", name, spec)
}

func probed(d *mesh.DataplaneSpec) {
	d.Networking.Inbound[0].ServiceProbe = &mesh.ServiceProbe{TCP: &struct{}{}}
}

func labelled(r *resource.Resource, labels map[string]string) *resource.Resource {
	c := *r
	c.Labels = labels
	return &c
}

// fields returns an error's fields, "path: message", or the error itself.
func fields(err error) string {
	var out []string
	for _, f := range errs.FieldsOf(err) {
		out = append(out, f.Path+": "+f.Message)
	}
	if len(out) == 0 && err != nil {
		return errs.KindOf(err).String() + ": " + err.Error()
	}
	return strings.Join(out, "; ")
}

func TestLabels(t *testing.T) {
	g, s := newGate(t)
	given := newDataplane("d")
	mustPut(t, g, newMesh("m"), given)
	for key, want := range map[resource.Key]map[string]string{
		mesh.Meshes.Key("", "m"):        nil,
		mesh.Secrets.Key("m", "needed"): {mesh.LabelMesh: "m"},
		mesh.Dataplanes.Key("m", "d"): {
			mesh.LabelMesh: "m", mesh.LabelOrigin: "zone", mesh.LabelZone: "zone-1", mesh.LabelEnv: "universal", mesh.LabelProxyType: "sidecar",
		},
	} {
		r, err := s.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, r.Labels); d != "" {
			t.Errorf("%s (-want +got):\n%s", key, d)
		}
	}
	if given.Labels != nil || given.Spec.(*mesh.DataplaneSpec).Networking.Inbound[0].Tags[mesh.TagZone] != "" {
		t.Error("the resource that was given was changed")
	}
	gw := newDataplane("gw", func(d *mesh.DataplaneSpec) {
		d.Networking.Inbound = nil
		d.Networking.Gateway = &mesh.Gateway{Tags: map[string]string{mesh.TagService: "gw"}}
	})
	r := mustPut(t, g, labelled(gw, map[string]string{mesh.LabelProxyType: "zoneegress"}))[0].Resource
	if r.Labels[mesh.LabelProxyType] != "gateway" || r.Spec.(*mesh.DataplaneSpec).Networking.Gateway.Tags[mesh.TagZone] != "zone-1" {
		t.Errorf("gateway: %v %+v", r.Labels, r.Spec)
	}
}

func TestLabelRules(t *testing.T) {
	g, _ := newGate(t)
	mustPut(t, g, newMesh("m"), labelled(newDataplane("d"), map[string]string{mesh.LabelDisplayName: "d0"}))
	at := func(label, message string) string { return fmt.Sprintf("labels[%q]: %s", label, message) }
	for _, c := range []struct {
		labels map[string]string
		want   string
	}{
		{map[string]string{mesh.LabelDisplayName: "d0", "a.example/b_c": "x.y"}, ""},
		{map[string]string{mesh.LabelDisplayName: "d0", "a": ""}, ""},
		{nil, at(mesh.LabelDisplayName, "is immutable, it cannot be removed")},
		{map[string]string{mesh.LabelDisplayName: "d1"}, at(mesh.LabelDisplayName, "is immutable, it cannot be changed")},
		{map[string]string{mesh.LabelOrigin: "moon"}, at(mesh.LabelOrigin, `must be "zone" or "global"`)},
		{map[string]string{mesh.LabelDisplayName: "d0", mesh.LabelOrigin: "global"}, at(mesh.LabelOrigin, "is immutable, it cannot be changed") + "; " + at(mesh.LabelZone, "is immutable, it cannot be removed")},
		{map[string]string{mesh.LabelZone: "zone-2"}, at(mesh.LabelZone, `must be the zone of this control plane, "zone-1"`)},
		{map[string]string{mesh.LabelMesh: "n"}, at(mesh.LabelMesh, `must be the resource's mesh, "m"`)},
		{map[string]string{mesh.LabelWorkload: "1a"}, at(mesh.LabelWorkload, "must have at most 63 lower case letters, digits and '-', start with a letter and end with a letter or digit")},
		{map[string]string{"a": strings.Repeat("x", 64)}, at("a", "the label's value must have at most 63 letters, digits, '-', '_' and '.', and start and end with a letter or digit")},
		{map[string]string{"A.example/b": "x"}, at("A.example/b", "the label's name must have a DNS name before the '/'")},
		{map[string]string{mesh.LabelDisplayName: "d0", mesh.LabelRegisteredBy: mesh.RegisteredByStream}, at(mesh.LabelRegisteredBy, "is set by the control plane alone")},
	} {
		_, err := put(t, g, labelled(newDataplane("d"), c.labels))
		if got := fields(err); got != c.want {
			t.Errorf("%v:\n got %s\nwant %s", c.labels, got, c.want)
		}
	}
	// What a stream registered stays marked when a user edits it.
	if _, err := g.Put(t.Context(), auth.ControlPlane(), admit.Change{Resource: labelled(newDataplane("s"), map[string]string{mesh.LabelRegisteredBy: mesh.RegisteredByStream})}); err != nil {
		t.Fatal(err)
	}
	if got := mustPut(t, g, newDataplane("s"))[0].Resource.Labels[mesh.LabelRegisteredBy]; got != mesh.RegisteredByStream {
		t.Errorf("the mark is %q", got)
	}
}

func TestRules(t *testing.T) {
	g, s := newGate(t)
	ctx := t.Context()
	mustPut(t, g, newMesh("m", mtls("ca-1", "builtin")))
	mustPut(t, g, mesh.Secrets.Make("m", mesh.BuiltinKeySecret("m", "ca-1"), &mesh.SecretSpec{}))
	for name, c := range map[string]struct {
		r    *resource.Resource
		want string
	}{
		"bad specification":    {newDataplane("d", func(d *mesh.DataplaneSpec) { d.Networking = nil }), "networking: must be defined"},
		"no such mesh":         {mesh.Secrets.Make("x", "a", &mesh.SecretSpec{}), `mesh: mesh "x" does not exist`},
		"no mesh":              {mesh.Secrets.Make("", "a", &mesh.SecretSpec{}), "mesh: cannot be empty"},
		"mesh of a global":     {mesh.Zones.Make("m", "a", &mesh.ZoneSpec{}), "mesh: Zone is not part of a mesh: leave this out"},
		"no name":              {mesh.Zones.Make("", "", &mesh.ZoneSpec{}), "name: cannot be empty"},
		"long name":            {mesh.Zones.Make("", strings.Repeat("a", 254), &mesh.ZoneSpec{}), "name: cannot be longer than 253 characters"},
		"long mesh name":       {newMesh(strings.Repeat("a", 64)), "name: cannot be longer than 63 characters"},
		"another authority":    {newMesh("m", mtls("ca-2", "builtin")), "mtls.enabledBackend: Changing CA when mTLS is enabled is forbidden. Disable mTLS first and then change the CA"},
		"unknown authority":    {newMesh("n", mtls("v", "vault")), "mtls.backends[0].type: could not find installed plugin for this type"},
		"the same authority":   {newMesh("m", mtls("ca-1", "builtin")), ""},
		"read-only":            {mesh.DataplaneInsights.Make("m", "d", &mesh.DataplaneInsightSpec{}), "not allowed: On zone control plane you can only modify zone resources. DataplaneInsight is written by the control plane alone.\n"},
		"mesh name with slash": {mesh.Secrets.Make("a/b", "a", &mesh.SecretSpec{}), "mesh: invalid characters: it must consist of lower case letters, digits, '-', '_' and '.', at most 253"},
	} {
		if _, err := put(t, g, c.r); fields(err) != c.want {
			t.Errorf("%s:\n got %s\nwant %s", name, fields(err), c.want)
		}
	}
	secret := mesh.Secrets.Key("m", mesh.BuiltinKeySecret("m", "ca-1"))
	const inUse = `name: The secret "m.ca-builtin-key-ca-1" that you are trying to remove is currently in use in Mesh "m" in mTLS backend "ca-1". Please remove the reference from the "ca-1" backend before removing the secret.`
	if err := g.Delete(ctx, auth.Admin(), mesh.Secrets.Kind, secret, store.Condition{}); fields(err) != inUse {
		t.Errorf("secret in use: %s", fields(err))
	}
	mustPut(t, g, newMesh("m"))
	if err := g.Delete(ctx, auth.Admin(), mesh.Secrets.Kind, secret, store.Condition{}); err != nil {
		t.Errorf("secret that nothing uses: %v", err)
	}

	// Deleting a mesh: not with Dataplanes, then with all that is in it.
	mustPut(t, g, newDataplane("d"))
	if _, err := s.Put(ctx, store.Set(mesh.DataplaneInsights.Make("m", "d", &mesh.DataplaneInsightSpec{}))); err != nil {
		t.Fatal(err)
	}
	if err := g.Delete(ctx, auth.Admin(), mesh.Meshes.Kind, mesh.Meshes.Key("", "m"), store.Condition{}); fields(err) != "mesh: unable to delete mesh, there are still some dataplanes attached" {
		t.Errorf("mesh with Dataplanes: %v", err)
	}
	if err := g.Delete(ctx, auth.Admin(), mesh.Dataplanes.Kind, mesh.Dataplanes.Key("m", "d"), store.Condition{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, mesh.DataplaneInsights.Key("m", "d")); !errs.Is(err, errs.NotFound) {
		t.Errorf("the insight outlives its Dataplane: %v", err)
	}
	if err := g.Delete(ctx, auth.Admin(), mesh.Meshes.Kind, mesh.Meshes.Key("", "m"), store.Condition{}); err != nil {
		t.Fatal(err)
	}
	if all, _, _ := s.List(ctx, "", ""); len(all) != 0 {
		t.Errorf("left after the mesh: %d", len(all))
	}
	if err := g.Delete(ctx, auth.Admin(), mesh.Meshes.Kind, mesh.Meshes.Key("", "m"), store.Condition{}); !errs.Is(err, errs.NotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	unsafe, _ := newGate(t, func(c *admit.Config) { c.UnsafeDelete = true })
	mustPut(t, unsafe, newMesh("m"), newDataplane("d"))
	if err := unsafe.Delete(ctx, auth.Admin(), mesh.Meshes.Kind, mesh.Meshes.Key("", "m"), store.Condition{}); err != nil {
		t.Errorf("unsafe delete: %v", err)
	}
}

func TestMembership(t *testing.T) {
	g, _ := newGate(t)
	mustPut(t, g, newMesh("m", func(m *mesh.MeshSpec) {
		m.Constraints = &mesh.Constraints{DataplaneProxy: &mesh.ProxyConstraints{Restrictions: []mesh.TagRule{{Tags: map[string]string{"legacy": "*"}}}, Requirements: []mesh.TagRule{{Tags: map[string]string{mesh.TagZone: "zone-1"}}}}}
	}))
	mustPut(t, g, newDataplane("ok"))
	_, err := put(t, g, newDataplane("d", func(d *mesh.DataplaneSpec) { d.Networking.Inbound[0].Tags["legacy"] = "yes" }))
	if want := `networking: dataplane cannot be a member of mesh "m" because its tags matches restricted tags "legacy=*"`; fields(err) != want {
		t.Errorf("got %s\nwant %s", fields(err), want)
	}
}

func TestProbedInbounds(t *testing.T) {
	g, _ := newGate(t)
	state := func(r []admit.Result) (mesh.InboundState, bool) {
		in := r[0].Resource.Spec.(*mesh.DataplaneSpec).Networking.Inbound[0]
		return in.State, in.IsReady()
	}
	if s, _ := state(mustPut(t, g, newMesh("m"), newDataplane("x"))[1:]); s != "" {
		t.Errorf("without a probe: %q", s)
	}
	made := mustPut(t, g, newDataplane("d", probed))
	if s, ready := state(made); s != mesh.NotReady || ready {
		t.Errorf("a new one is %q", s)
	}
	measured := newDataplane("d", probed, func(d *mesh.DataplaneSpec) {
		d.Networking.Inbound[0].State, d.Networking.Inbound[0].Health = mesh.Ready, &mesh.Health{Ready: true}
	})
	r, err := g.Put(t.Context(), auth.ControlPlane(), admit.Change{Resource: measured, Measured: true})
	if err != nil {
		t.Fatal(err)
	}
	if s, ready := state(r); s != mesh.Ready || !ready {
		t.Errorf("a measured one is %q", s)
	}
	if s, _ := state(mustPut(t, g, newDataplane("d", probed))); s != mesh.Ready {
		t.Errorf("written again it is %q: what was measured is lost", s)
	}
	moved := newDataplane("d", probed, func(d *mesh.DataplaneSpec) { d.Networking.Inbound[0].Port = 81 })
	if s, _ := state(mustPut(t, g, moved)); s != mesh.NotReady {
		t.Errorf("on another port it is %q", s)
	}
}

func TestAllOrNothing(t *testing.T) {
	g, s := newGate(t)
	_, err := put(t, g, newMesh("m"), newDataplane("d"), mesh.Zones.Make("", "BAD", &mesh.ZoneSpec{}))
	if err == nil || !strings.Contains(err.Error(), `Zone "BAD"`) {
		t.Errorf("the error does not say which: %v", err)
	}
	if all, _, _ := s.List(t.Context(), "", ""); len(all) != 0 {
		t.Errorf("half of a list was written: %d", len(all))
	}
	if _, err := put(t, g, newMesh("m"), newMesh("m")); !errs.Is(err, errs.Invalid) {
		t.Errorf("one twice: %v", err)
	}
	results := mustPut(t, g, newMesh("m"), newDataplane("d"))
	if !results[0].Created || results[0].Resource.Version != results[1].Resource.Version || results[0].Resource.Version == 0 {
		t.Errorf("results: %+v", results)
	}
	if tried, err := g.Try(t.Context(), auth.Admin(), admit.Change{Resource: newMesh("n")}); err != nil || !tried[0].Created {
		t.Errorf("try: %v %v", tried, err)
	}
	if _, err := s.Get(t.Context(), mesh.Meshes.Key("", "n")); !errs.Is(err, errs.NotFound) {
		t.Errorf("a try wrote: %v", err)
	}
}

// TestPermission: nothing passes for who may not (HRD-03, behind the API).
// That a mesh is missing is said last, so that a caller who is about to make it
// knows that all else is sound.
func TestMissingMesh(t *testing.T) {
	g, _ := newGate(t)
	_, err := g.Try(t.Context(), auth.Admin(), admit.Change{Resource: newDataplane("web")})
	if !errors.Is(err, admit.ErrNoMesh) || fields(err) != `mesh: mesh "m" does not exist` {
		t.Errorf("sound, without its mesh: %v", err)
	}
	_, err = g.Try(t.Context(), auth.Admin(), admit.Change{Resource: newDataplane("web", func(d *mesh.DataplaneSpec) { d.Networking.Inbound[0].Port = 0 })})
	if err == nil || errors.Is(err, admit.ErrNoMesh) {
		t.Errorf("not sound: %v", err)
	}
}

func TestPermission(t *testing.T) {
	g, s := newGate(t)
	mustPut(t, g, newMesh("m"))
	_, before, _ := s.List(t.Context(), "", "")
	for _, r := range []*resource.Resource{newMesh("m"), newDataplane("d"), mesh.Secrets.Make("m", "s", &mesh.SecretSpec{}), mesh.GlobalSecrets.Make("", "s", &mesh.SecretSpec{})} {
		if _, err := g.Put(t.Context(), auth.Anonymous(), admit.Change{Resource: r}); !errs.Is(err, errs.Denied) {
			t.Errorf("put %s: %v", r.Key(), err)
		}
		if err := g.Delete(t.Context(), auth.Caller{}, r.Kind, r.Key(), store.Condition{}); !errs.Is(err, errs.Denied) {
			t.Errorf("delete %s: %v", r.Key(), err)
		}
	}
	if _, after, _ := s.List(t.Context(), "", ""); after != before {
		t.Error("something was written")
	}
	frozen, _ := newGate(t, func(c *admit.Config) { c.ReadOnly = true })
	if _, err := put(t, frozen, newMesh("m")); !errs.Is(err, errs.NotAllowed) {
		t.Errorf("read-only: %v", err)
	}
	if _, err := frozen.Put(t.Context(), auth.ControlPlane(), admit.Change{Resource: newMesh("m")}); err != nil {
		t.Errorf("the control plane itself: %v", err)
	}
}

// TestOvertaken: changes without a condition are made on what is there then;
// none is lost, and a mesh never gains a Dataplane while it goes.
func TestOvertaken(t *testing.T) {
	g, s := newGate(t)
	mustPut(t, g, newMesh("m"))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 20 {
				if _, err := g.Put(t.Context(), auth.ControlPlane(), admit.Change{Resource: mesh.Secrets.Make("m", fmt.Sprint("s", n), &mesh.SecretSpec{Data: []byte{byte(i)}})}); err != nil {
					t.Errorf("writer %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	wg.Go(func() {
		for n := range 50 {
			_, err := g.Put(t.Context(), auth.ControlPlane(), admit.Change{Resource: newDataplane(fmt.Sprint("d", n))})
			if err != nil && fields(err) != `mesh: mesh "m" does not exist` {
				t.Errorf("dataplane: %v", err)
			}
		}
	})
	_ = g.Delete(t.Context(), auth.Admin(), mesh.Meshes.Kind, mesh.Meshes.Key("", "m"), store.Condition{})
	wg.Wait()
	all, _, err := s.List(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), mesh.Meshes.Key("", "m")); err != nil && len(all) != 0 {
		t.Errorf("%d resources are left of a mesh that is gone", len(all))
	}
}

// authorityVault keeps what a control plane would keep in the secret.
type authorityVault struct{ text []byte }

func (v *authorityVault) Load(context.Context) ([]byte, uint64, error) {
	return v.text, uint64(min(len(v.text), 1)), nil
}

func (v *authorityVault) Save(_ context.Context, text []byte, _ uint64) (uint64, error) {
	v.text = text
	return 1, nil
}

// What would keep the control plane from starting again is not taken in.
func TestControlPlaneAuthority(t *testing.T) {
	g, s := newGate(t)
	v := &authorityVault{}
	if _, err := pki.OpenControlPlane(pki.ControlPlaneConfig{Dir: t.TempDir(), Vault: v}); err != nil {
		t.Fatal(err)
	}
	secret := func(text string) *resource.Resource {
		return mesh.GlobalSecrets.Make("", mesh.ControlPlaneCA, &mesh.SecretSpec{Data: []byte(text)})
	}
	mustPut(t, g, secret(string(v.text)))
	for _, text := range []string{"rubbish", "", "{}", strings.Replace(string(v.text), "steady", "switched", 1)} {
		_, err := put(t, g, secret(text))
		if got := fields(err); !strings.HasPrefix(got, "data: ") || !strings.Contains(got, "kumactl ca rotate control-plane") || strings.Contains(got, "PRIVATE KEY") {
			t.Errorf("%.10q: %s", text, got)
		}
	}
	if r, err := s.Get(t.Context(), mesh.GlobalSecrets.Key("", mesh.ControlPlaneCA)); err != nil || string(mesh.GlobalSecrets.From(r).Spec.Data) != string(v.text) {
		t.Errorf("the good one is gone: %v", err)
	}
	mustPut(t, g, mesh.GlobalSecrets.Make("", "other", &mesh.SecretSpec{Data: []byte("rubbish")}))
}
