package dp

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
)

func name(t *testing.T, a *anypb.Any) string {
	t.Helper()
	var s tlsv3.Secret
	if err := a.UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	if len(s.GetTlsCertificate().GetPrivateKey().GetInlineBytes()) == 0 {
		t.Errorf("%s has no private key", s.GetName())
	}
	return s.GetName()
}

// Both protocols: a name that is not there yet waits, a new certificate is
// pushed, and nothing is sent twice.
func TestSDS(t *testing.T) {
	t.Parallel()
	k := newKeyring()
	path := filepath.Join(shortTemp(t), "s.sock")
	l, err := listenSDS(path)
	if err != nil {
		t.Fatal(err)
	}
	server := newSDS(k, slog.New(slog.DiscardHandler))
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	delta, err := client.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	whole, err := client.StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := delta.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	if err := whole.Send(&discoveryv3.DiscoveryRequest{ResourceNames: []string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}

	ca := newAuthority(t)
	give := func(names ...string) {
		t.Helper()
		list, _, err := k.due(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		given := 0
		for _, r := range list {
			for _, n := range names {
				if r.GetSecret() == n {
					given++
					if err := k.put(ca.answer(t, r, time.Now().Add(time.Hour)), time.Now()); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		if given != len(names) {
			t.Fatalf("%d of %v given", given, names)
		}
	}
	expectDelta := func(want string) *discoveryv3.DeltaDiscoveryResponse {
		t.Helper()
		m, err := delta.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.GetResources()) != 1 || m.GetResources()[0].GetName() != want || name(t, m.GetResources()[0].GetResource()) != want {
			t.Fatalf("got %v, want %s alone", m.GetResources(), want)
		}
		return m
	}
	expectWhole := func(want ...string) {
		t.Helper()
		m, err := whole.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.GetResources()) != len(want) {
			t.Fatalf("%d secrets, want %v", len(m.GetResources()), want)
		}
		for i, r := range m.GetResources() {
			if name(t, r) != want[i] {
				t.Errorf("secret %d is %s, want %s", i, name(t, r), want[i])
			}
		}
	}
	if err := k.want(wants("a", "1", "c", "1"), time.Now()); err != nil {
		t.Fatal(err)
	}
	give("c", "a") // nobody asked for c
	first := expectDelta("a")
	expectWhole("a")
	if err := delta.Send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: first.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	if err := k.want(wants("a", "1", "b", "1", "c", "1"), time.Now()); err != nil {
		t.Fatal(err)
	}
	give("b")
	expectDelta("b")
	expectWhole("a", "b")
	if err := k.want(wants("a", "2", "b", "1", "c", "1"), time.Now()); err != nil {
		t.Fatal(err)
	}
	give("a")
	again := expectDelta("a")
	expectWhole("a", "b")
	if again.GetResources()[0].GetVersion() == first.GetResources()[0].GetVersion() {
		t.Error("a renewed certificate has the old version")
	}

	// A stream that comes back says what it has and gets only what is new.
	back, err := client.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := back.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"a", "b"}, InitialResourceVersions: map[string]string{
		"a": again.GetResources()[0].GetVersion(), "b": "older",
	}}); err != nil {
		t.Fatal(err)
	}
	m, err := back.Recv()
	if err != nil || len(m.GetResources()) != 1 || m.GetResources()[0].GetName() != "b" {
		t.Errorf("after coming back: %v, %v", m, err)
	}
}
