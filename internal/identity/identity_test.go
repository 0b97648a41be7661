package identity_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/identity"
	"kuma/internal/mesh"
	"kuma/internal/pki/builtin"
	"kuma/internal/resource"
	"kuma/internal/state"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
)

type fixture struct {
	*testing.T
	store   store.Store
	tracker *state.Tracker
	issuer  *identity.Issuer
}

func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{T: t, store: memstore.New()}
	f.tracker = state.New(state.Config{Store: f.store, Quiet: time.Millisecond, Log: slog.New(slog.DiscardHandler)})
	done := make(chan error, 1)
	go func() { done <- f.tracker.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	<-f.tracker.Ready()
	f.issuer = identity.New(identity.Config{Picture: f.tracker.Now})
	root, err := builtin.NewRoot("default", builtin.Conf{})
	if err != nil {
		t.Fatal(err)
	}
	f.put(
		mesh.Meshes.Make("", "default", &mesh.MeshSpec{MTLS: &mesh.MTLS{EnabledBackend: "ca", Backends: []mesh.Backend{{Name: "ca", Type: "builtin"}}}}),
		mesh.Secrets.Make("default", mesh.BuiltinCertSecret("default", "ca"), &mesh.SecretSpec{Data: root.Cert}),
		mesh.Secrets.Make("default", mesh.BuiltinKeySecret("default", "ca"), &mesh.SecretSpec{Data: root.Key}),
		dataplane("web"),
	)
	return f
}

func (f *fixture) put(rs ...*resource.Resource) {
	f.Helper()
	var w []store.Write
	for _, r := range rs {
		w = append(w, store.Set(r))
	}
	rev, err := f.store.Put(f.Context(), w...)
	if err != nil {
		f.Fatal(err)
	}
	if err := f.tracker.Await(f.Context(), rev); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) dataplane() mesh.Dataplane {
	d, ok := f.tracker.Now().Mesh("default").Dataplane("dp")
	if !ok {
		f.Fatal("no dataplane")
	}
	return d
}

func dataplane(services ...string) *resource.Resource {
	n := &mesh.Networking{Address: "127.0.0.1"}
	for i, s := range services {
		n.Inbound = append(n.Inbound, mesh.Inbound{Port: uint32(80 + i), Tags: map[string]string{mesh.TagService: s, "version": "1"}})
	}
	return mesh.Dataplanes.Make("default", "dp", &mesh.DataplaneSpec{Networking: n})
}

// request asks for a certificate in names that are not the proxy's.
func request(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}, DNSNames: []string{"evil"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

const secret = "identity_cert:secret:default"

// HRD-22: names come from the Dataplane, never from the request.
func TestSignTakesNamesFromTheDataplane(t *testing.T) {
	f := start(t)
	c, err := f.issuer.Sign(t.Context(), f.tracker.Now(), f.dataplane(), secret, request(t))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(c.Chain)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	var uris []string
	for _, u := range leaf.URIs {
		uris = append(uris, u.String())
	}
	if diff := cmp.Diff([]string{"spiffe://default/web", "kuma://kuma.io/service/web", "kuma://version/1"}, uris); diff != "" {
		t.Error(diff)
	}
	if len(leaf.DNSNames) > 0 || leaf.Subject.CommonName != "" {
		t.Errorf("names of the request got in: %v %v", leaf.DNSNames, leaf.Subject)
	}
	if life := c.NotAfter.Sub(c.NotBefore).Round(time.Minute); life != 24*time.Hour {
		t.Errorf("life %v, want 24h", life)
	}
	if part := float64(c.RenewAt.Sub(c.NotBefore)) / float64(c.NotAfter.Sub(c.NotBefore)); part < 0.56 || part > 0.67 {
		t.Errorf("renewal after %.2f of its life", part)
	}
}

func TestAChangeUnderTheCertificateIsRefused(t *testing.T) {
	f := start(t)
	old, dp := f.tracker.Now(), f.dataplane()
	before := f.issuer.Wanted(old, dp)
	f.put(dataplane("web", "admin"))
	if _, err := f.issuer.Sign(t.Context(), old, dp, secret, request(t)); !errs.Is(err, errs.Conflict) {
		t.Errorf("a certificate for what the Dataplane was: %v, want a conflict", err)
	}
	if after := f.issuer.Wanted(f.tracker.Now(), f.dataplane()); cmp.Equal(before, after) {
		t.Error("another service must be another revision")
	}
	if _, err := f.store.Put(t.Context(), store.Remove(dp.Key())); err != nil {
		t.Fatal(err)
	}
	f.put(mesh.Zones.Make("", "z", &mesh.ZoneSpec{}))
	if _, err := f.issuer.Sign(t.Context(), old, dp, secret, request(t)); !errs.Is(err, errs.Conflict) {
		t.Errorf("a certificate for a Dataplane that is gone: %v, want a conflict", err)
	}
}

func TestNoCertificateWithoutServiceAuthorityOrRequest(t *testing.T) {
	f := start(t)
	if _, err := f.issuer.Sign(t.Context(), f.tracker.Now(), f.dataplane(), secret, []byte("rubbish")); !errs.Is(err, errs.Invalid) {
		t.Errorf("rubbish: %v", err)
	}
	if _, err := f.issuer.Sign(t.Context(), f.tracker.Now(), f.dataplane(), "identity_cert:secret:other", request(t)); !errs.Is(err, errs.Invalid) {
		t.Errorf("another mesh's secret: %v", err)
	}
	f.put(dataplane())
	if w := f.issuer.Wanted(f.tracker.Now(), f.dataplane()); len(w) != 0 {
		t.Errorf("a Dataplane without services wants %v", w)
	}
	f.put(dataplane("web"))
	if _, err := f.store.Put(t.Context(), store.Remove(mesh.Secrets.Key("default", mesh.BuiltinKeySecret("default", "ca")))); err != nil {
		t.Fatal(err)
	}
	f.put(mesh.Zones.Make("", "z", &mesh.ZoneSpec{}))
	if _, err := f.issuer.Sign(t.Context(), f.tracker.Now(), f.dataplane(), secret, request(t)); !errs.Is(err, errs.Unavailable) {
		t.Errorf("without the authority's key: %v", err)
	}
}

func TestKeyedReturnsTheKeyOfTheCertificate(t *testing.T) {
	f := start(t)
	c, key, err := f.issuer.Keyed(t.Context(), f.tracker.Now(), f.dataplane(), secret)
	if err != nil {
		t.Fatal(err)
	}
	kb, _ := pem.Decode(key)
	k, err := x509.ParseECPrivateKey(kb.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	cb, _ := pem.Decode(c.Chain)
	leaf, err := x509.ParseCertificate(cb.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !k.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the key is not the certificate's")
	}
}

func TestShortLivesAreRenewedAtTwoThirdsToo(t *testing.T) {
	f := start(t)
	f.put(mesh.Meshes.Make("", "default", &mesh.MeshSpec{MTLS: &mesh.MTLS{EnabledBackend: "ca", Backends: []mesh.Backend{{
		Name: "ca", Type: "builtin", DPCert: &mesh.DPCert{Rotation: &mesh.Rotation{Expiration: "30s"}},
	}}}}))
	now := time.Now()
	c, err := f.issuer.Sign(t.Context(), f.tracker.Now(), f.dataplane(), secret, request(t))
	if err != nil {
		t.Fatal(err)
	}
	if in := c.RenewAt.Sub(now); in < 15*time.Second || in > 21*time.Second {
		t.Errorf("a certificate of 30s is renewed after %s", in)
	}
}
