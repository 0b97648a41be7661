package xds_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kuma/internal/auth"
	"kuma/internal/cp/cptest"
	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/names"
	"kuma/internal/resource"
	"kuma/internal/session"
	"kuma/internal/state"
)

// within is a context for what takes milliseconds on a machine with nothing else
// to do.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// connect opens ADS for a proxy that brings its Dataplane.
func connect(t *testing.T, d *cptest.Doors, c cptest.ADSConfig) *cptest.ADS {
	t.Helper()
	if c.Conn == nil {
		c.Conn = d.Conn()
	}
	if c.Mesh == "" {
		c.Mesh = "default"
	}
	a := cptest.NewADS(c)
	if err := a.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

func complete(t *testing.T, a *cptest.ADS) cptest.View {
	t.Helper()
	v, err := a.WaitComplete(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// await waits for a condition of the stored resources.
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

func insightOf(pic *state.Picture, name string) *mesh.DataplaneInsightSpec {
	r := pic.Get(mesh.DataplaneInsights.Key("default", name))
	if r == nil {
		return &mesh.DataplaneInsightSpec{}
	}
	return mesh.DataplaneInsights.From(r).Spec
}

// labelled changes what the plain configuration reads from the mesh's labels.
func labelled(d *cptest.Doors, key, value string) {
	old := d.Tracker.Now().Mesh("default").Resource
	m := *old
	m.Labels = map[string]string{key: value}
	for k, v := range old.Labels {
		if k != key {
			m.Labels[k] = v
		}
	}
	d.Put(&m)
}

func TestFirstConfiguration(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Every: 20 * time.Millisecond})
	d.Mesh("default", true)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web", "backend"))})
	v := complete(t, a)
	if diff := cmp.Diff([]string{
		"CDS +backend", "EDS +backend", "LDS +inbound:127.0.0.1:8080 +outbound:127.0.0.1:10000", "SDS +identity_cert:secret:default", "ECDS +rbac:8080",
	}, sorted(v.Events)); diff != "" {
		t.Errorf("responses (-want +got):\n%s", diff)
	}
	secret := new(tlsv3.Secret)
	if err := v.Resources[envoy.SecretType][names.IdentitySecret("default")].UnmarshalTo(secret); err != nil {
		t.Fatal(err)
	}
	if key := secret.GetTlsCertificate().GetPrivateKey().GetInlineBytes(); !strings.Contains(string(key), "PRIVATE KEY") {
		t.Error("a proxy without a link has no key")
	}
	r := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web"))
	if r == nil || r.Labels[mesh.LabelRegisteredBy] != mesh.RegisteredByStream {
		t.Errorf("the Dataplane was not registered as a stream's: %+v", r)
	}
	await(t, d, "the insight shows the certificate and the versions", func(p *state.Picture) bool {
		i := insightOf(p, "web")
		return i.Online() && i.MTLS != nil && i.MTLS.IssuedBackend == "ca" && i.Subscriptions[0].Version.Envoy.Version == "1.40.0" &&
			!strings.Contains(string(i.Metadata), "dataplane.instance")
	})
	await(t, d, "the session is complete", func(*state.Picture) bool {
		info, ok := d.Sessions.Find(session.Key{Mesh: "default", Name: "web"})
		return ok && info.Status.Complete // the insight's last change of the picture comes after it
	})
	a.Close()
	await(t, d, "the insight shows the end", func(p *state.Picture) bool { return !insightOf(p, "web").Online() })
}

// sorted puts the secret, whose issue takes its own time, after the listeners.
func sorted(events []string) []string {
	order := []string{"CDS", "EDS", "LDS", "SDS", "ECDS"}
	slices.SortStableFunc(events, func(a, b string) int {
		x, _, _ := strings.Cut(a, " ")
		y, _, _ := strings.Cut(b, " ")
		return slices.Index(order, x) - slices.Index(order, y)
	})
	return events
}

func TestAProxyWithALinkGetsNoKey(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Generate: func(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
		n2 := *n
		n2.Link = false // refers to the secret, as a faulty configuration would
		return cptest.Plain(pic, &n2)
	}})
	d.Mesh("default", true)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web"), session.FeatureLink)})
	// Its Dataplane is not registered by ADS: it waits for the link.
	if r, err := d.Store.Get(t.Context(), mesh.Dataplanes.Key("default", "web")); err == nil {
		t.Fatalf("ADS registered %v", r.Key())
	}
	d.Put(dataplane(t, cptest.Dataplane("default", "web", "web")))
	v, err := a.Wait(within(t), func(v cptest.View) bool {
		return slices.Contains(v.Events, "SDS -identity_cert:secret:default")
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := v.Names(envoy.SecretType); len(got) > 0 {
		t.Errorf("ADS carried %v", got)
	}
}

// A key that this control plane makes and sends is never without a line in the
// log, and the line is without the key.
func TestKeysThatAreSentAreLogged(t *testing.T) {
	t.Parallel()
	const line = "a private key was made by the control plane and sent over ADS, since this proxy has no link"
	for _, c := range []struct {
		name     string
		mtls     bool
		features []string
		want     int
	}{{"without a link", true, nil, 2}, {"with a link", true, []string{session.FeatureLink}, 0}, {"without mTLS", false, nil, 0}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			log := new(lines)
			d := cptest.OpenDoors(t, cptest.DoorsConfig{Log: slog.New(slog.NewTextHandler(log, nil))})
			d.Mesh("default", c.mtls)
			if len(c.features) > 0 {
				d.Put(dataplane(t, cptest.Dataplane("default", "web", "web")))
			}
			a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web"), c.features...)})
			complete(t, a)
			if c.want > 0 { // its services change, and so does its certificate
				v := a.View()
				d.Put(dataplane(t, cptest.Dataplane("default", "web", "backend")))
				if _, err := a.Wait(within(t), func(now cptest.View) bool {
					secret := names.IdentitySecret("default")
					has := now.Resources[envoy.SecretType][secret]
					return has != nil && string(has.GetValue()) != string(v.Resources[envoy.SecretType][secret].GetValue())
				}); err != nil {
					t.Fatal(err)
				}
			}
			if n := log.count(line); n != c.want {
				t.Errorf("%d lines, want %d:\n%s", n, c.want, log)
			}
			if c.want > 0 && log.count("mesh=default", "name=web", "instance=i1") < c.want {
				t.Errorf("who got the key is not said:\n%s", log)
			}
			if log.count("PRIVATE KEY") > 0 {
				t.Errorf("a key is in the log:\n%s", log)
			}
		})
	}
}

// lines is a log.
type lines struct {
	mu  sync.Mutex
	all strings.Builder
}

// Write is an io.Writer's.
func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// count is how many lines have all of the words.
func (l *lines) count(words ...string) (n int) {
	for line := range strings.Lines(l.String()) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			n++
		}
	}
	return n
}

func dataplane(t *testing.T, doc string) *resource.Resource {
	t.Helper()
	r, err := resource.Decode(mesh.Dataplanes.Kind, []byte(doc), false)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestReturningProxyIsSentOnlyWhatDiffers(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", true)
	cfg := cptest.ADSConfig{Name: "web", Conn: d.Conn(), Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web", "backend"))}
	a := connect(t, d, cfg)
	before := complete(t, a)
	version := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web")).Version

	again := func(t *testing.T, want ...string) {
		t.Helper()
		a.Close()
		seen := len(a.View().Events)
		if err := a.Connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		// It has all from before, so complete says nothing of what is still to come.
		v, err := a.Wait(within(t), func(v cptest.View) bool { return len(v.Events)-seen >= len(want) })
		if diff := cmp.Diff(want, v.Events[seen:]); diff != "" || err != nil {
			t.Errorf("after its return (-want +got):\n%s%v", diff, err)
		}
	}
	t.Run("nothing", func(t *testing.T) {
		again(t, "CDS", "LDS")
		if v := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web")).Version; v != version {
			t.Errorf("the unchanged Dataplane was written again: version %d, then %d", version, v)
		}
	})
	t.Run("rules", func(t *testing.T) {
		a.Close()
		labelled(d, "rules", "x")
		again(t, "CDS", "LDS", "ECDS +rbac:8080")
	})
	t.Run("changed cluster gets its endpoints again", func(t *testing.T) {
		a.Close()
		labelled(d, "stat", "x")
		again(t, "CDS +backend", "EDS +backend", "LDS")
	})
	if len(before.Names(envoy.SecretType)) != 1 {
		t.Error("no secret")
	}

	t.Run("after a restart of the control plane", func(t *testing.T) {
		a.Close()
		d.Stop()
		d = cptest.OpenDoors(t, cptest.DoorsConfig{Store: d.Store})
		b := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cfg.Metadata})
		complete(t, b)
		if v := d.Tracker.Now().Get(mesh.Dataplanes.Key("default", "web")).Version; v != version {
			t.Errorf("the unchanged Dataplane was written again: version %d, then %d", version, v)
		}
	})
}

// Versions are the same on every control plane, so that a proxy which moves or
// outlives a restart is not sent what it has.
func TestVersionsSurviveARestart(t *testing.T) {
	t.Parallel()
	versions := func(d *cptest.Doors) map[string]string {
		out := map[string]string{}
		a := connect(t, d, cptest.ADSConfig{
			Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web", "backend")),
			Refuse: func(url string, r *discoveryv3.Resource) string {
				out[url+" "+r.GetName()] = r.GetVersion()
				return ""
			},
		})
		complete(t, a)
		a.Close()
		return out
	}
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	first := versions(d)
	d.Stop()
	if diff := cmp.Diff(first, versions(cptest.OpenDoors(t, cptest.DoorsConfig{Store: d.Store}))); diff != "" || len(first) < 5 {
		t.Errorf("versions differ:\n%s", diff)
	}
}

func TestChanges(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web", "a", "b"))})
	complete(t, a)
	step := func(what string, change func(), want ...string) {
		t.Helper()
		seen := len(a.View().Events)
		change()
		v, err := a.Wait(within(t), func(v cptest.View) bool { return len(v.Events) >= seen+len(want) })
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if diff := cmp.Diff(want, v.Events[seen:]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	step("rules alone", func() { labelled(d, "rules", "x") }, "ECDS +rbac:8080")
	step("an endpoint", func() { d.Put(dataplane(t, cptest.Dataplane("default", "a-1", "a"))) }, "EDS +a")
	step("clusters", func() { labelled(d, "stat", "x") }, "CDS +a +b", "EDS +a +b")
	replace := func(outbounds ...string) func() {
		return func() {
			r := dataplane(t, cptest.Dataplane("default", "web", "web", outbounds...))
			r.Labels = map[string]string{mesh.LabelRegisteredBy: mesh.RegisteredByStream}
			d.Put(r)
		}
	}
	step("what is gone goes last", replace("a"), "LDS -outbound:127.0.0.1:10001", "CDS -b")
	step("what is new comes before its users", replace("a", "c"), "CDS +c", "EDS +c", "LDS +outbound:127.0.0.1:10001")
	step("both", replace("d"), "CDS +d", "EDS +d", "LDS +outbound:127.0.0.1:10000 -outbound:127.0.0.1:10001", "CDS -a -c")
}

func TestNothingIsMadeForOthersChanges(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	d.Mesh("other", false)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web"))})
	complete(t, a)
	made, asked := d.XDS.Stats().Generated.Load(), d.Affected.Load()
	for i := range 3 {
		d.Put(dataplane(t, cptest.Dataplane("other", fmt.Sprint("x-", i), "x")))
	}
	labelled(d, "rules", "now") // proves that the earlier ones were looked at
	if _, err := a.Wait(within(t), func(v cptest.View) bool { return v.Events[len(v.Events)-1] == "ECDS +rbac:8080" && len(v.Events) > 3 }); err != nil {
		t.Fatal(err)
	}
	if n := d.XDS.Stats().Generated.Load() - made; n != 1 {
		t.Errorf("%d configurations were made, want 1", n)
	}
	if d.Affected.Load() == asked {
		t.Error("nobody asked whether the changes matter")
	}
}

// TestAgedConfiguration: what ages is made again, although nothing changed.
func TestAgedConfiguration(t *testing.T) {
	t.Parallel()
	ages := sync.OnceValue(func() time.Time { return time.Now().Add(200 * time.Millisecond) })
	var old atomic.Bool // what was made last
	d := cptest.OpenDoors(t, cptest.DoorsConfig{
		Generate: func(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
			res, err := cptest.Plain(pic, n)
			if err != nil {
				return nil, err
			}
			name := "new"
			if old.Store(time.Now().Before(ages())); old.Load() {
				name = "old"
			}
			p, err := envoy.Pack(name, &listenerv3.Listener{Name: name})
			if err != nil {
				return nil, err
			}
			res[envoy.ListenerType][name] = p
			return res, nil
		},
		Again: func(*session.Node) time.Time {
			if old.Load() {
				return ages()
			}
			return time.Time{}
		},
	})
	d.Mesh("default", false)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web"))})
	if _, err := a.Wait(within(t), func(v cptest.View) bool {
		listeners := v.Resources[envoy.ListenerType]
		return listeners["new"] != nil && listeners["old"] == nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestRefusedConfiguration(t *testing.T) {
	t.Parallel()
	var bad atomic.Pointer[string]
	set := func(s string) { bad.Store(&s) }
	set("inbound:127.0.0.1:8080")
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	a := connect(t, d, cptest.ADSConfig{
		Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web", "backend")),
		Refuse: func(url string, r *discoveryv3.Resource) string {
			if url == envoy.ListenerType && r.GetName() == *bad.Load() {
				return "it does not please"
			}
			return ""
		},
	})
	await(t, d, "the insight shows the refusal", func(p *state.Picture) bool {
		list := insightOf(p, "web").Rejections
		return len(list) == 1 && list[0].TypeURL == envoy.ListenerType && list[0].Resource == "inbound:127.0.0.1:8080" && strings.Contains(list[0].Message, "it does not please")
	})
	info, _ := d.Sessions.Find(session.Key{Mesh: "default", Name: "web"})
	if info.Status.Complete || len(info.Status.Rejections) != 1 {
		t.Errorf("status %+v", info.Status)
	}
	// An endpoint's change does not bring the refused bytes again; the next
	// change of the listener itself does, at once.
	set("")
	d.Put(dataplane(t, cptest.Dataplane("default", "backend-1", "backend")))
	v, err := a.Wait(within(t), func(v cptest.View) bool { return v.Events[len(v.Events)-1] == "EDS +backend" && len(v.Events) > 3 })
	if err != nil {
		t.Fatal(err)
	}
	seen := len(v.Events)
	labelled(d, "listener", "mended")
	if v, err = a.Wait(within(t), func(v cptest.View) bool { return len(v.Events) == seen+2 }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"LDS +inbound:127.0.0.1:8080", "ECDS +rbac:8080"}, v.Events[seen:]); diff != "" {
		t.Errorf("after the refusal (-want +got):\n%s", diff)
	}
	await(t, d, "the refusal is over", func(p *state.Picture) bool { return len(insightOf(p, "web").Rejections) == 0 })
	if d.XDS.Stats().Rejected.Load() != 1 {
		t.Errorf("%d refusals counted, want 1", d.XDS.Stats().Rejected.Load())
	}
}

// HRD-04: a proxy is let in only if its token covers it, what it brings, and
// what that replaces.
func TestRefusedStreams(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true, Patience: time.Millisecond})
	d.Mesh("default", false)
	d.Put(dataplane(t, cptest.Dataplane("default", "taken", "backend")))
	whole := d.Token(auth.DataplaneRequest{Mesh: "default"})
	web := d.Token(auth.DataplaneRequest{Mesh: "default", Name: "web", Tags: map[string][]string{"kuma.io/service": {"web"}}})
	onlyWeb := d.Token(auth.DataplaneRequest{Mesh: "default", Tags: map[string][]string{"kuma.io/service": {"web"}}})
	for _, c := range []struct {
		name, proxy, token, brings, want string
		md                               map[string]any
	}{
		{name: "no token", proxy: "web", want: `request must have exactly 1 "authorization" header, got 0`},
		{name: "garbage", proxy: "web", token: "x.y.z", want: "authentication failed: "},
		{name: "another proxy's", proxy: "other", token: web, want: "authentication failed: proxy name from requestor: other is different than in token: web"},
		{name: "another service", proxy: "web", token: web, brings: cptest.Dataplane("default", "web", "backend"), want: `dataplane contains tag "kuma.io/service" with value "backend" which is not allowed with this token. Allowed values in token are ["web"]`},
		{name: "replaces another's", proxy: "taken", token: onlyWeb, brings: cptest.Dataplane("default", "taken", "web"), want: `value "backend" which is not allowed`},
		{name: "none there", proxy: "web", token: whole, want: `resource "default.web" not found; create a Dataplane in Kuma CP first or pass it as an argument to kuma-dp`},
		{name: "another key", proxy: "web", token: whole, brings: cptest.Dataplane("default", "other", "web"), want: "proxyId default.web does not match proxy resource default.other"},
		{name: "not a Dataplane", proxy: "web", token: whole, brings: `{"type":"Mesh","name":"default"}`, want: "it must be a Dataplane"},
		{name: "origin", proxy: "web", token: whole, brings: strings.Replace(cptest.Dataplane("default", "web", "web"), `"name":"web"`, `"name":"web","labels":{"kuma.io/origin":"global"}`, 1), want: "kuma.io/origin"},
		{name: "bad Dataplane", proxy: "web", token: whole, brings: strings.Replace(cptest.Dataplane("default", "web", "web"), "8080", "80800", 1), want: "port must be in the range [1, 65535]"},
		{name: "proxy type", proxy: "web", token: whole, md: map[string]any{"dataplane.proxyType": "ingress"}, want: `unsupported proxy type "ingress"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			md := c.md
			if md == nil {
				md = cptest.Metadata("i-"+c.name, c.brings)
			}
			a := connect(t, d, cptest.ADSConfig{Name: c.proxy, Token: c.token, Metadata: md})
			err := a.WaitEnd(within(t))
			if status.Code(err) != codes.Unknown || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want Unknown with %q", err, c.want)
			}
			if r, err := d.Store.Get(t.Context(), mesh.Dataplanes.Key("default", c.proxy)); err == nil && r.Name != "taken" {
				t.Errorf("%s was registered", r.Key())
			}
		})
	}
}

// HRD-04: a token that does not cover a proxy does not even end its streams.
func TestWhoMayNotBeAProxyDoesNotDisturbIt(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true})
	d.Mesh("default", false)
	token := func(service string) string {
		return d.Token(auth.DataplaneRequest{Mesh: "default", Tags: map[string][]string{"kuma.io/service": {service}}})
	}
	md := cptest.Metadata("same", cptest.Dataplane("default", "web", "web"))
	a := connect(t, d, cptest.ADSConfig{Name: "web", Token: token("web"), Metadata: md})
	complete(t, a)
	if err := connect(t, d, cptest.ADSConfig{Name: "web", Token: token("backend"), Metadata: md}).WaitEnd(within(t)); !strings.Contains(err.Error(), "not allowed with this token") {
		t.Errorf("got %v", err)
	}
	labelled(d, "rules", "x") // proves that the holder is served
	if _, err := a.Wait(within(t), func(v cptest.View) bool { return v.Events[len(v.Events)-1] == "ECDS +rbac:8080" && len(v.Events) > 3 }); err != nil {
		t.Error(err)
	}
}

// HRD-23, HRD-22: what the token no longer covers ends at once.
func TestRevocationEndsStreams(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Tokens: true})
	d.Mesh("default", false)
	token := d.Token(auth.DataplaneRequest{Mesh: "default", Tags: map[string][]string{"kuma.io/service": {"web"}}})
	open := func(name string) *cptest.ADS {
		a := connect(t, d, cptest.ADSConfig{Name: name, Token: token, Metadata: cptest.Metadata("i-"+name, cptest.Dataplane("default", name, "web"))})
		complete(t, a)
		return a
	}
	a, b := open("web-1"), open("web-2")
	d.Put(dataplane(t, cptest.Dataplane("default", "web-1", "backend")))
	if err := a.WaitEnd(within(t)); !strings.Contains(err.Error(), `value "backend" which is not allowed`) {
		t.Errorf("a Dataplane that changed under its token: %v", err)
	}
	for _, r := range d.Tracker.Now().Mesh("default").List(mesh.Secrets.Name) {
		d.Remove(r.Key())
	}
	if err := b.WaitEnd(within(t)); !strings.Contains(err.Error(), "authentication failed: ") {
		t.Errorf("a signing key that is gone: %v", err)
	}
}

func TestTakeover(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Patience: 50 * time.Millisecond})
	d.Mesh("default", false)
	brings := cptest.Dataplane("default", "web", "web")
	open := func(instance string) *cptest.ADS {
		return connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata(instance, brings)})
	}
	first := open("i1")
	complete(t, first)

	second := open("i1")
	complete(t, second)
	if err := first.WaitEnd(within(t)); !strings.Contains(err.Error(), "a newer stream of the same proxy has taken over") {
		t.Errorf("the older stream of the same instance: %v", err)
	}

	for range 3 { // it does not evict, however often it comes
		if err := open("i2").WaitEnd(within(t)); !strings.Contains(err.Error(), "there is already an active stream from this node, try again later") {
			t.Errorf("another live holder: %v", err)
		}
	}
	if err := second.View().Err; err != nil {
		t.Errorf("the holder was evicted: %v", err)
	}

	second.Close()
	third := open("i3")
	complete(t, third)

	t.Run("foreign", func(t *testing.T) {
		md := func(workdir string) map[string]any {
			m := cptest.Metadata("", cptest.Dataplane("default", "old", "old"))
			m["workdir"] = workdir
			return m
		}
		a := connect(t, d, cptest.ADSConfig{Name: "old", Metadata: md("/tmp/a")})
		complete(t, a)
		if err := connect(t, d, cptest.ADSConfig{Name: "old", Metadata: md("/tmp/b")}).WaitEnd(within(t)); !strings.Contains(err.Error(), "already an active stream") {
			t.Errorf("another work directory: %v", err)
		}
		complete(t, connect(t, d, cptest.ADSConfig{Name: "old", Metadata: md("/tmp/a")}))
	})
}

// HRD-09, HRD-26: a fault in one proxy's configuration ends that stream, or
// leaves the proxy what it has; the others are served.
func TestOneBadProxy(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{Generate: func(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
		switch {
		case n.Name == "panics":
			panic("planted")
		case n.Name == "fails" && pic.Mesh("default").Resource.Labels["stat"] == "bad":
			return nil, errors.New("planted error")
		}
		return cptest.Plain(pic, n)
	}})
	d.Mesh("default", false)
	open := func(name string) *cptest.ADS {
		return connect(t, d, cptest.ADSConfig{Name: name, Metadata: cptest.Metadata("i-"+name, cptest.Dataplane("default", name, "web", "x"))})
	}
	if err := open("panics").WaitEnd(within(t)); status.Code(err) != codes.Internal || strings.Contains(err.Error(), "planted") {
		t.Errorf("a panic ended the stream with %v", err)
	}
	fails, good := open("fails"), open("good")
	complete(t, fails)
	complete(t, good)
	labelled(d, "stat", "bad")
	await(t, d, "the insight says why", func(p *state.Picture) bool {
		list := insightOf(p, "fails").Rejections
		return len(list) == 1 && strings.Contains(list[0].Message, "planted error")
	})
	if _, err := good.Wait(within(t), func(v cptest.View) bool { return slices.Contains(v.Events[3:], "CDS +x") }); err != nil {
		t.Error(err)
	}
	labelled(d, "stat", "good")
	if _, err := fails.Wait(within(t), func(v cptest.View) bool { return slices.Contains(v.Events[3:], "CDS +x") }); err != nil {
		t.Error(err)
	}
	await(t, d, "the insight is clean again", func(p *state.Picture) bool { return len(insightOf(p, "fails").Rejections) == 0 })
}

func TestCertificateFollowsTheDataplane(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", true)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web"))})
	v := complete(t, a)
	first := v.Resources[envoy.SecretType][names.IdentitySecret("default")]
	d.Put(dataplane(t, cptest.Dataplane("default", "web", "backend")))
	if _, err := a.Wait(within(t), func(v cptest.View) bool {
		now := v.Resources[envoy.SecretType][names.IdentitySecret("default")]
		return now != nil && string(now.GetValue()) != string(first.GetValue())
	}); err != nil {
		t.Error(err)
	}
}

func TestOddRequests(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", false)
	ads := discoveryv3.NewAggregatedDiscoveryServiceClient(d.Conn())
	t.Run("state of the world", func(t *testing.T) {
		s, err := ads.StreamAggregatedResources(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "DELTA_GRPC") {
			t.Errorf("got %v", err)
		}
	})
	open := func(t *testing.T) discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient {
		s, err := ads.DeltaAggregatedResources(within(t))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	d.Put(dataplane(t, cptest.Dataplane("default", "web", "web")))
	node := func(id string) *discoveryv3.DeltaDiscoveryRequest {
		return &discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: id}, TypeUrl: envoy.ClusterType}
	}
	for _, c := range []struct {
		name, want string
		requests   []*discoveryv3.DeltaDiscoveryRequest
	}{
		{"no node", "must have a node", []*discoveryv3.DeltaDiscoveryRequest{{TypeUrl: envoy.ClusterType}}},
		{"no mesh", "it must be <mesh>.<name>", []*discoveryv3.DeltaDiscoveryRequest{node("web")}},
		{"another node", "Node ID cannot be changed after stream is initialized", []*discoveryv3.DeltaDiscoveryRequest{node("default.web"), node("default.other")}},
		{"no type", "names no type", []*discoveryv3.DeltaDiscoveryRequest{{Node: &corev3.Node{Id: "default.web"}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t)
			for _, r := range c.requests {
				if err := s.Send(r); err != nil {
					t.Fatal(err)
				}
			}
			for {
				if _, err := s.Recv(); err != nil {
					if !strings.Contains(err.Error(), c.want) {
						t.Errorf("got %v, want %q", err, c.want)
					}
					return
				}
			}
		})
	}
	t.Run("unknown type and name", func(t *testing.T) {
		s := open(t)
		r := node("default.web")
		r.TypeUrl, r.ResourceNamesSubscribe = "type.googleapis.com/envoy.service.runtime.v3.Runtime", []string{"gateway.listeners"}
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
		got, err := s.Recv()
		if err != nil || !slices.Equal(got.GetRemovedResources(), []string{"gateway.listeners"}) {
			t.Errorf("got %v, %v: what does not exist must be said to be removed", got, err)
		}
	})
}

// HRD-25: who opens a stream and says nothing, or does not read, holds nothing
// for long.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{FirstMessage: 50 * time.Millisecond, Generate: func(pic *state.Picture, n *session.Node) (envoy.Resources, error) {
		r, err := cptest.Plain(pic, n)
		if err != nil {
			return nil, err
		}
		r[envoy.ClusterType] = map[string]*envoy.Packed{}
		for i := range 40 { // more than all windows on the way hold
			name := fmt.Sprint("c-", i)
			if r[envoy.ClusterType][name], err = envoy.Pack(name, &corev3.Node{Id: strings.Repeat("x", 200_000)}); err != nil {
				return nil, err
			}
		}
		return r, nil
	}})
	d.Mesh("default", false)
	ads := discoveryv3.NewAggregatedDiscoveryServiceClient(d.Conn())
	silent, err := ads.DeltaAggregatedResources(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := silent.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a silent stream ended with %v", err)
	}

	d.Put(dataplane(t, cptest.Dataplane("default", "web", "web")))
	open := func() discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient {
		s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(d.Conn()).DeltaAggregatedResources(within(t))
		if err == nil {
			err = s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: envoy.ClusterType, Node: &corev3.Node{Id: "default.web"}})
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	deaf := open() // never reads, so that the control plane can't send on
	await(t, d, "the deaf one is let in", func(*state.Picture) bool {
		if d.XDS.Stats().Streams.Load() == 0 {
			d.Put(dataplane(t, cptest.Dataplane("default", "tick", "tick")))
		}
		return d.XDS.Stats().Streams.Load() > 0
	})
	next := open()
	got, err := next.Recv()
	if err != nil || len(got.GetResources()) == 0 {
		t.Errorf("the newer stream got %v", err)
	}
	for err = nil; err == nil; {
		_, err = deaf.Recv()
	}
	if !strings.Contains(err.Error(), "a newer stream of the same proxy has taken over") {
		t.Errorf("the deaf one ended with %v", err)
	}
}

// A certificate that can't be issued is tried again, and holds up nothing else.
func TestAuthorityComesLater(t *testing.T) {
	t.Parallel()
	d := cptest.OpenDoors(t, cptest.DoorsConfig{})
	d.Mesh("default", true)
	key := mesh.Secrets.Key("default", mesh.BuiltinKeySecret("default", "ca"))
	kept, err := d.Store.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	d.Remove(key)
	a := connect(t, d, cptest.ADSConfig{Name: "web", Metadata: cptest.Metadata("i1", cptest.Dataplane("default", "web", "web", "backend"))})
	v, err := a.Wait(within(t), func(v cptest.View) bool { return slices.Contains(v.Events, "ECDS +rbac:8080") })
	if err != nil {
		t.Fatal(err)
	}
	if v.Complete || len(v.Names(envoy.SecretType)) > 0 || slices.ContainsFunc(v.Events, func(e string) bool { return strings.HasPrefix(e, "SDS") }) {
		t.Errorf("without an authority: %v", v.Events)
	}
	d.Put(kept)
	complete(t, a)
}
