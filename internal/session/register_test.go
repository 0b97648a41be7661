package session_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/session"
	"kuma/internal/store"
	"kuma/internal/store/memstore"
	"kuma/internal/token"
)

// overtaken is a store in which another writes right after a stream has read
// its Dataplane in order to register it.
type overtaken struct {
	store.Store
	key  resource.Key
	then func()
	gets int
}

func (o *overtaken) Get(ctx context.Context, k resource.Key) (*resource.Resource, error) {
	r, err := o.Store.Get(ctx, k)
	if k == o.key {
		if o.gets++; o.gets == 2 { // the first is that of who asks whether the stream may disturb the holder
			o.then()
		}
	}
	return r, err
}

// HRD-04: what is written while a stream registers is neither undone by it nor
// replaced by who may not.
func TestRegistrationReadsAgainWhatWasWrittenMeanwhile(t *testing.T) {
	const left = "kuma.io/left-inbounds"
	decoded := func(t *testing.T, doc string) *resource.Resource {
		r, err := resource.Decode(mesh.Dataplanes.Kind, []byte(doc), false)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	gone := strings.Replace(document("web", `,"state":"NotReady"`), `"name":"web"`, `"name":"web","labels":{"`+left+`":"0"}`, 1)
	moved := strings.Replace(gone, `"address":"127.0.0.1"`, `"address":"127.0.0.7"`, 1)
	foreign := strings.Replace(document("web", ""), `"kuma.io/service":"web"`, `"kuma.io/service":"backend"`, 1)
	for _, c := range []struct {
		name             string
		before           string
		meanwhile        string // empty deletes it
		brings           string
		refused          string
		address, service string
	}{
		{name: "an operator moves one that comes back", before: gone, meanwhile: moved, address: "127.0.0.7", service: "web"},
		{name: "an operator makes one of another service", meanwhile: foreign, brings: document("web", ""), refused: "not allowed with this token", address: "127.0.0.1", service: "backend"},
		{name: "an operator makes another service of it", before: document("web", ""), meanwhile: foreign, brings: strings.Replace(document("web", ""), "8080", "8081", 1), refused: "not allowed with this token", address: "127.0.0.1", service: "backend"},
		{name: "an operator deletes it", before: gone, refused: "not found"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := start(t, memstore.New())
				key, err := token.NewSigningKey()
				if err != nil {
					t.Fatal(err)
				}
				p.put(mesh.Secrets.Make("default", token.KeyName(token.DataplaneKeyPrefix("default"), 1), &mesh.SecretSpec{Data: key}))
				secrets := admit.Secrets{Store: p.store}
				proxies := auth.DefaultProxies()
				checker, err := auth.NewProxyChecker(auth.ProxyCheckerConfig{Proxies: proxies, Secrets: secrets})
				if err != nil {
					t.Fatal(err)
				}
				raw, err := auth.NewIssuer(auth.IssuerConfig{Proxies: proxies, Secrets: secrets}).Dataplane(p.ctx, auth.DataplaneRequest{Mesh: "default", Tags: map[string][]string{"kuma.io/service": {"web"}}, ValidFor: "1h"})
				if err != nil {
					t.Fatal(err)
				}
				if c.before != "" {
					p.put(decoded(t, c.before))
				}
				at := mesh.Dataplanes.Key("default", "web")
				between := &overtaken{Store: p.store, key: at, then: func() {
					if c.meanwhile == "" {
						if _, err := p.store.Put(p.ctx, store.Remove(at)); err != nil {
							t.Error(err)
						}
						return
					}
					p.put(decoded(t, c.meanwhile))
				}}
				sessions := session.New(session.Config{
					Tracker: p.tracker, Store: between, Gate: admit.New(admit.Config{Store: p.store, Zone: "default"}), Credentials: checker,
				})
				n := node("web", "i")
				n.Dataplane = c.brings
				st, err := sessions.Open(p.ctx, session.ADS, n, raw)
				if c.refused == "" && err != nil || c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)) {
					t.Errorf("got %v, want %q", err, c.refused)
				}
				got, err := p.store.Get(p.ctx, at)
				if st != nil {
					defer st.Close()
				}
				if c.meanwhile == "" {
					if !errs.Is(err, errs.NotFound) {
						t.Errorf("what was deleted is back: %+v, %v", got, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				has := mesh.Dataplanes.From(got).Spec.Networking
				in := has.Inbound[0]
				if has.Address != c.address || in.Tags[mesh.TagService] != c.service {
					t.Errorf("%s at %s, want %s at %s: what was written meanwhile is gone", in.Tags[mesh.TagService], has.Address, c.service, c.address)
				}
				if !in.IsReady() || got.Labels[left] != "" {
					t.Errorf("ready %t with labels %v: it is back and ready", in.IsReady(), got.Labels)
				}
			})
		})
	}
}
