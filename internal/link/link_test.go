package link_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"kuma/internal/auth"
	"kuma/internal/cp/cptest"
	"kuma/internal/envoy"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/session"
	"kuma/internal/state"
	"kuma/proto/linkpb"
)

// patience is how long a test waits for what takes milliseconds on a machine
// with nothing else to do.
const patience = 30 * time.Second

// client is kuma-dp's end of a link.
type client struct {
	*testing.T
	grpc.BidiStreamingClient[linkpb.FromProxy, linkpb.ToProxy]
	close context.CancelFunc
}

func dial(t *testing.T, d *cptest.Doors, token string, h *linkpb.Hello) *client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", token)
	}
	s, err := linkpb.NewLinkClient(d.Conn()).Stream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t, s, cancel}
	if h != nil {
		c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Hello{Hello: h}})
	}
	return c
}

func hello(name, service string) *linkpb.Hello {
	return &linkpb.Hello{Mesh: "default", Name: name, Instance: "i-" + name, Dataplane: cptest.Dataplane("default", name, service)}
}

func (c *client) say(m *linkpb.FromProxy) {
	c.Helper()
	if err := c.Send(m); err != nil {
		c.Fatal(err)
	}
}

// hear waits for a message of a sort and skips others.
func hear[M any](c *client, get func(*linkpb.ToProxy) *M) *M {
	c.Helper()
	for {
		m, err := c.Recv()
		if err != nil {
			c.Fatalf("waiting for a %T: %v", new(M), err)
		}
		if x := get(m); x != nil {
			return x
		}
	}
}

func (c *client) sign(secret, revision string, csr []byte) *linkpb.Certificate {
	c.Helper()
	c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_SigningRequest{SigningRequest: &linkpb.SigningRequest{Secret: secret, Revision: revision, Csr: csr}}})
	return hear(c, (*linkpb.ToProxy).GetCertificate)
}

func request(t *testing.T) (csr, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"ignored.example"}}, k); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return csr, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func ads(t *testing.T, d *cptest.Doors, c cptest.ADSConfig) *cptest.ADS {
	t.Helper()
	c.Conn, c.Mesh = d.Conn(), "default"
	a := cptest.NewADS(c)
	if err := a.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func await(t *testing.T, d *cptest.Doors, what string, condition func(*state.Picture) bool) {
	t.Helper()
	changed, stop := d.Tracker.Subscribe()
	defer stop()
	ctx := within(t)
	for !condition(d.Tracker.Now()) {
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("it did not happen that %s", what)
		}
	}
}

func decode(t *testing.T, doc string) *resource.Resource {
	t.Helper()
	r, err := resource.Decode(mesh.Dataplanes.Kind, []byte(doc), false)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestLifeOfALink(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true})
	d.Mesh("default", true)
	token := d.Token(auth.DataplaneRequest{Mesh: "default", Name: "web"})
	h := hello("web", "web")
	// Envoy may be first: it waits for the link.
	a := ads(t, d, cptest.ADSConfig{Name: "web", Token: token, Metadata: cptest.Metadata(h.GetInstance(), "", session.FeatureLink)})

	c := dial(t, d, token, h)
	if w := hear(c, (*linkpb.ToProxy).GetWelcome); w.GetControlPlaneInstance() != "cp-test" {
		t.Errorf("welcome %v", w)
	}
	ids := hear(c, (*linkpb.ToProxy).GetIdentities).GetIdentities()
	if len(ids) != 1 || ids[0].GetSecret() != "identity_cert:secret:default" || ids[0].GetRevision() == "" {
		t.Fatalf("identities %v", ids)
	}
	if _, err := a.WaitComplete(within(t)); err != nil {
		t.Fatal(err)
	}
	if s := hear(c, (*linkpb.ToProxy).GetConfigStatus); !s.GetComplete() || len(s.GetRejections()) > 0 {
		t.Errorf("status %v", s)
	}
	csr, key := request(t)
	cert := c.sign(ids[0].GetSecret(), ids[0].GetRevision(), csr)
	pair, err := tls.X509KeyPair(cert.GetChain(), key)
	if err != nil {
		t.Fatalf("certificate %v: %v", cert, err)
	}
	if uris := pair.Leaf.URIs; uris[0].String() != "spiffe://default/web" || len(pair.Leaf.DNSNames) > 0 {
		t.Errorf("the certificate names %v %v", uris, pair.Leaf.DNSNames)
	}
	if renew, end := time.Unix(cert.GetRenewAt(), 0), time.Unix(cert.GetNotAfter(), 0); !renew.Before(end) || time.Until(renew) < time.Hour {
		t.Errorf("renew at %s, ends at %s", renew, end)
	}
	await(t, d, "the insight shows the certificate", func(p *state.Picture) bool {
		r := p.Get(mesh.DataplaneInsights.Key("default", "web"))
		return r != nil && mesh.DataplaneInsights.From(r).Spec.MTLS != nil
	})
	c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Readiness{Readiness: &linkpb.Readiness{Reason: "the disk is full"}}})
	await(t, d, "the insight shows the readiness", func(p *state.Picture) bool {
		r := p.Get(mesh.DataplaneInsights.Key("default", "web"))
		x := mesh.DataplaneInsights.From(r).Spec.Readiness
		return x != nil && !x.Ready && x.Reason == "the disk is full"
	})

	// Another service, another certificate.
	old := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web"))
	r := decode(t, cptest.Dataplane("default", "web", "backend"))
	r.Labels = old.Labels
	d.Put(r)
	if again := hear(c, (*linkpb.ToProxy).GetIdentities).GetIdentities(); len(again) != 1 || again[0].GetRevision() == ids[0].GetRevision() {
		t.Errorf("identities after the change: %v", again)
	}
}

// A control plane that shows a certificate of somebody else's authority has
// proxies forget the one of its own that they were sent before.
func TestNoOwnAuthority(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true})
	d.Mesh("default", true)
	c := dial(t, d, d.Token(auth.DataplaneRequest{Mesh: "default", Name: "web"}), hello("web", "web"))
	if told := hear(c, (*linkpb.ToProxy).GetTrust); len(told.GetBundle()) > 0 || told.GetRevision() != 0 {
		t.Errorf("told %v", told)
	}
	c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_TrustNoted{TrustNoted: &linkpb.TrustNoted{Error: "x"}}})
	c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Readiness{Readiness: &linkpb.Readiness{Ready: true}}})
	await(t, d, "it is ready", func(pic *state.Picture) bool {
		r := pic.Get(mesh.DataplaneInsights.Key("default", "web"))
		return r != nil && mesh.DataplaneInsights.From(r).Spec.Readiness != nil
	})
	if all := d.Sessions.List(); len(all) != 1 || all[0].Trust != (session.Trust{}) {
		t.Errorf("there is nothing to acknowledge: %+v", all)
	}
}

func TestCertificateRefused(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", true)
	c := dial(t, d, "", hello("web", "web"))
	id := hear(c, (*linkpb.ToProxy).GetIdentities).GetIdentities()[0]
	if x := c.sign(id.GetSecret(), id.GetRevision(), []byte("no request")); x.GetError() == "" || x.GetRetryAfterMs() < 20 || len(x.GetChain()) > 0 {
		t.Errorf("a garbled request: %v", x)
	}
	csr, _ := request(t)
	first := c.sign("another secret", "1", csr)
	second := c.sign("another secret", "1", csr)
	if first.GetError() == "" || second.GetRetryAfterMs() != 2*first.GetRetryAfterMs() {
		t.Errorf("a secret that is not its own: %v, then %v", first, second)
	}
	if x := c.sign(id.GetSecret(), id.GetRevision(), make([]byte, 1<<20)); !strings.Contains(x.GetError(), "too large") {
		t.Errorf("a huge request: %v", x)
	}
	if x := c.sign(id.GetSecret(), id.GetRevision(), csr); x.GetError() != "" || len(x.GetChain()) == 0 {
		t.Errorf("a good request after all that: %v", x)
	}
	const more = 40 // of which one a second is taken
	for range more {
		c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_SigningRequest{SigningRequest: &linkpb.SigningRequest{Secret: id.GetSecret(), Csr: csr}}})
	}
	limited := 0
	for range more {
		if strings.Contains(hear(c, (*linkpb.ToProxy).GetCertificate).GetError(), "too many signing requests") {
			limited++
		}
	}
	if limited < 3 {
		t.Errorf("%d of %d further requests were limited", limited, more)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true, Patience: time.Millisecond})
	d.Mesh("default", false)
	token := d.Token(auth.DataplaneRequest{Mesh: "default"})
	holder := dial(t, d, token, hello("held", "web"))
	hear(holder, (*linkpb.ToProxy).GetWelcome)
	other := hello("held", "web")
	other.Instance = "another"
	unknownMesh := hello("web", "web")
	unknownMesh.Mesh = "nomesh"
	noDataplane := hello("absent", "web")
	noDataplane.Dataplane = ""
	for _, c := range []struct {
		name, token, want string
		hello             *linkpb.Hello
		retry             bool
	}{
		{"another proxy's token", d.Token(auth.DataplaneRequest{Mesh: "default", Name: "x"}), "proxy name from requestor: web is different than in token: x", hello("web", "web"), false},
		{"no token", "", "got 0", hello("web", "web"), false},
		{"name taken", token, "there is already an active stream from this node, try again later", other, true},
		{"unknown mesh", token, "authentication failed", unknownMesh, false},
		{"no Dataplane", token, "not found; create a Dataplane in Kuma CP first", noDataplane, true},
		{"nameless", token, "must name the proxy", &linkpb.Hello{Mesh: "default"}, false},
		{"long name", token, "the limit is 253", &linkpb.Hello{Mesh: "default", Name: strings.Repeat("x", 300)}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			x := dial(t, d, c.token, c.hello)
			r := hear(x, (*linkpb.ToProxy).GetRefusal)
			if !strings.Contains(r.GetReason(), c.want) || r.GetRetry() != c.retry {
				t.Errorf("refusal %v, want %q, retry %t", r, c.want, c.retry)
			}
			if _, err := x.Recv(); status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the stream ended with %v", err)
			}
		})
	}
	t.Run("not Hello first", func(t *testing.T) {
		t.Parallel()
		x := dial(t, d, token, nil)
		x.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Leaving{Leaving: &linkpb.Leaving{}}})
		if r := hear(x, (*linkpb.ToProxy).GetRefusal); !strings.Contains(r.GetReason(), "must be Hello") {
			t.Errorf("refusal %v", r)
		}
	})
}

// endpoints are the names of the Dataplanes behind a service, as a proxy has them.
func endpoints(v cptest.View, service string) []string {
	m := new(endpointv3.ClusterLoadAssignment)
	if v.Resources[envoy.EndpointType][service] == nil || v.Resources[envoy.EndpointType][service].UnmarshalTo(m) != nil {
		return nil
	}
	var out []string
	for _, l := range m.GetEndpoints() {
		for _, e := range l.GetLbEndpoints() {
			out = append(out, e.GetEndpoint().GetHostname())
		}
	}
	return out
}

func TestLeaving(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	caller := ads(t, d, cptest.ADSConfig{Name: "caller", Metadata: cptest.Metadata("c", cptest.Dataplane("default", "caller", "caller", "web"))})
	if _, err := caller.WaitComplete(within(t)); err != nil {
		t.Fatal(err)
	}
	has := func(want ...string) {
		t.Helper()
		if _, err := caller.Wait(within(t), func(v cptest.View) bool { return slices.Equal(endpoints(v, "web"), want) }); err != nil {
			t.Fatalf("endpoints %v: %v", want, err)
		}
	}
	leave := func(c *client) {
		t.Helper()
		c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Leaving{Leaving: &linkpb.Leaving{}}})
		hear(c, (*linkpb.ToProxy).GetLeaveNoted)
	}
	able := func(c *client) {
		t.Helper()
		hear(c, (*linkpb.ToProxy).GetWelcome)
		c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Readiness{Readiness: &linkpb.Readiness{Ready: true}}})
	}
	c := dial(t, d, "", hello("web-1", "web"))
	able(c)
	own := ads(t, d, cptest.ADSConfig{Name: "web-1", Metadata: cptest.Metadata("i-web-1", "", session.FeatureLink)})
	if _, err := own.WaitComplete(within(t)); err != nil {
		t.Fatal(err)
	}
	has("web-1")
	leave(c)
	if d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web-1")) != nil {
		t.Error("the Dataplane is still there after its leaving was noted")
	}
	has()
	if v := own.View(); v.Err != nil || !v.Complete {
		t.Errorf("who leaves keeps its own configuration until the end: %v", v.Err)
	}
	// A new run takes the name while the old one still drains.
	h := hello("web-1", "web")
	h.Instance = "next"
	able(dial(t, d, "", h))
	has("web-1")

	t.Run("made by the API", func(t *testing.T) {
		doc := strings.Replace(cptest.Dataplane("default", "web-2", "web"), `"inbound":[`, `"inbound":[{"port":8081,"state":"NotReady","tags":{"kuma.io/service":"web"}},`, 1)
		d.Put(decode(t, doc))
		has("web-1", "web-2")
		h := hello("web-2", "web")
		h.Dataplane = ""
		c := dial(t, d, "", h)
		hear(c, (*linkpb.ToProxy).GetWelcome)
		leave(c)
		has("web-1")
		if d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web-2")) == nil {
			t.Error("a Dataplane that the API made was removed")
		}
		c.close()
		h.Instance = "next"
		able(dial(t, d, "", h))
		has("web-1", "web-2")
		spec := mesh.Dataplanes.From(d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web-2"))).Spec
		if spec.Networking.Inbound[0].IsReady() || !spec.Networking.Inbound[1].IsReady() {
			t.Errorf("states after its return: %+v", spec.Networking.Inbound)
		}
	})
}

// Who comes gets no traffic before it says that it can serve; a link that breaks
// and comes back changes nothing.
func TestArriving(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	key := mesh.Dataplanes.Key("default", "web")
	serves := func() bool {
		return mesh.Dataplanes.From(d.Tracker.Now().Get(key)).Spec.Networking.Inbound[0].IsReady()
	}
	say := func(c *client, ready bool) {
		c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Readiness{Readiness: &linkpb.Readiness{Ready: ready, Reason: "envoy not ready"}}})
	}
	h := hello("web", "web")
	c := dial(t, d, "", h)
	hear(c, (*linkpb.ToProxy).GetWelcome)
	say(c, false)
	await(t, d, "the insight shows the readiness", func(p *state.Picture) bool {
		r := p.Get(mesh.DataplaneInsights.Key("default", "web"))
		return r != nil && mesh.DataplaneInsights.From(r).Spec.Readiness != nil
	})
	if serves() {
		t.Error("it gets traffic before it can serve")
	}
	c.close()
	c = dial(t, d, "", h)
	hear(c, (*linkpb.ToProxy).GetWelcome)
	if serves() {
		t.Error("it gets traffic after its link broke while it started")
	}
	say(c, true)
	await(t, d, "it gets traffic", func(*state.Picture) bool { return serves() })
	version := d.Tracker.Now().Get(key).Version
	c.close()
	c = dial(t, d, "", h)
	hear(c, (*linkpb.ToProxy).GetWelcome)
	if now := d.Tracker.Now().Get(key); !serves() || now.Version != version {
		t.Error("a link that came back changed the Dataplane")
	}
	// Another run of it, after a kill.
	c.close()
	h = hello("web", "web")
	h.Instance = "next"
	c = dial(t, d, "", h)
	hear(c, (*linkpb.ToProxy).GetWelcome)
	if serves() {
		t.Error("the next run gets traffic before it can serve")
	}
	say(c, true)
	await(t, d, "the next run gets traffic", func(*state.Picture) bool { return serves() })
}

func TestInspect(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	key := session.Key{Mesh: "default", Name: "web"}
	if _, err := d.Link.Inspect(within(t), key, linkpb.Inspect_STATS, false, false); !errs.Is(err, errs.NotFound) {
		t.Errorf("without a link: %v", err)
	}
	c := dial(t, d, "", hello("web", "web"))
	hear(c, (*linkpb.ToProxy).GetWelcome)
	type answer struct {
		page []byte
		err  error
	}
	inspect := func(ctx context.Context) <-chan answer {
		out := make(chan answer, 1)
		go func() {
			page, err := d.Link.Inspect(ctx, key, linkpb.Inspect_STATS, true, true)
			out <- answer{page, err}
		}()
		return out
	}
	reply := func(r *linkpb.InspectReply) {
		c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_InspectReply{InspectReply: r}})
	}
	got := inspect(within(t))
	q := hear(c, (*linkpb.ToProxy).GetInspect)
	if q.GetPage() != linkpb.Inspect_STATS || !q.GetAll() || !q.GetJson() {
		t.Errorf("question %v", q)
	}
	reply(&linkpb.InspectReply{Id: q.GetId() + 7, Chunk: []byte("stray"), Done: true})
	reply(&linkpb.InspectReply{Id: q.GetId(), Chunk: []byte("a: 1\n")})
	reply(&linkpb.InspectReply{Id: q.GetId(), Chunk: []byte("b: 2\n"), Done: true})
	if a := <-got; a.err != nil || string(a.page) != "a: 1\nb: 2\n" {
		t.Errorf("page %q, %v", a.page, a.err)
	}
	got = inspect(within(t))
	q = hear(c, (*linkpb.ToProxy).GetInspect)
	reply(&linkpb.InspectReply{Id: q.GetId(), Error: "Envoy is not up"})
	if a := <-got; !errs.Is(a.err, errs.Unavailable) || !strings.Contains(a.err.Error(), "Envoy is not up") {
		t.Errorf("an error: %v", a.err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got = inspect(ctx)
	hear(c, (*linkpb.ToProxy).GetInspect)
	cancel()
	if a := <-got; !errs.Is(a.err, errs.Unavailable) {
		t.Errorf("given up: %v", a.err)
	}
	got = inspect(within(t))
	hear(c, (*linkpb.ToProxy).GetInspect)
	c.close()
	if a := <-got; !errs.Is(a.err, errs.Unavailable) || !strings.Contains(a.err.Error(), "has ended") {
		t.Errorf("the link ended: %v", a.err)
	}
}

func TestRefusedConfigurationIsTold(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	c := dial(t, d, "", hello("web", "web"))
	hear(c, (*linkpb.ToProxy).GetWelcome)
	ads(t, d, cptest.ADSConfig{
		Name: "web", Metadata: cptest.Metadata("i-web", "", session.FeatureLink),
		Refuse: func(url string, r *discoveryv3.Resource) string {
			if url == envoy.ListenerType {
				return "cannot bind '127.0.0.1:8080': Address already in use"
			}
			return ""
		},
	})
	s := hear(c, (*linkpb.ToProxy).GetConfigStatus)
	if s.GetComplete() || len(s.GetRejections()) != 1 || s.GetRejections()[0].GetResource() != "inbound:127.0.0.1:8080" || !strings.Contains(s.GetRejections()[0].GetMessage(), "Address already in use") {
		t.Errorf("status %v", s)
	}
	// What could not be put into it at all is told too, and that it can be now.
	key := session.Key{Mesh: "default", Name: "web"}
	for _, list := range [][]string{{"no certificate"}, {"no certificate", "no port"}, nil} {
		d.Sessions.SetLeftOut(key, list)
		if s := hear(c, (*linkpb.ToProxy).GetConfigStatus); !slices.Equal(s.GetLeftOut(), list) || len(s.GetRejections()) != 1 {
			t.Errorf("status %v, want that %q is left out", s, list)
		}
	}
	c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Denials{Denials: &linkpb.Denials{Denials: []*linkpb.Denials_Denial{{Caller: "x"}}, Dropped: 4}}})
	c.say(&linkpb.FromProxy{}) // what a newer kuma-dp says is not an end
	c.say(&linkpb.FromProxy{Message: &linkpb.FromProxy_Leaving{Leaving: &linkpb.Leaving{}}})
	hear(c, (*linkpb.ToProxy).GetLeaveNoted)
	if n := d.Link.Stats().Denied.Load(); n != 5 {
		t.Errorf("%d denials counted, want 5", n)
	}
}
