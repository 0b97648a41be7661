package upkeep

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sync/errgroup"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/pki/builtin"
	"kuma/internal/resource"
	"kuma/internal/store"
	"kuma/internal/token"
)

// initial is a policy that a new mesh is born with (contract).
type initial struct {
	kind, name string
	// routing ones are made only where the contract's setting asks for them.
	routing bool
	spec    string
}

var initials = []initial{
	{kind: "MeshTimeout", name: "mesh-timeout-all-", spec: `"spec":{"targetRef":{"kind":"Mesh","proxyTypes":["Sidecar"]},
		"to":[{"targetRef":{"kind":"Mesh"},"default":{"connectionTimeout":"5s","idleTimeout":"1h","http":{"requestTimeout":"15s","streamIdleTimeout":"30m"}}}],
		"from":[{"targetRef":{"kind":"Mesh"},"default":{"connectionTimeout":"10s","idleTimeout":"2h","http":{"requestTimeout":"0s","streamIdleTimeout":"1h","maxStreamDuration":"0s"}}}]}`},
	{kind: "MeshTimeout", name: "mesh-gateways-timeout-all-", spec: `"spec":{"targetRef":{"kind":"Mesh","proxyTypes":["Gateway"]},
		"to":[{"targetRef":{"kind":"Mesh"},"default":{"idleTimeout":"1h","http":{"streamIdleTimeout":"5s"}}}],
		"from":[{"targetRef":{"kind":"Mesh"},"default":{"idleTimeout":"5m","http":{"streamIdleTimeout":"5s","requestHeadersTimeout":"500ms"}}}]}`},
	{kind: "TrafficPermission", name: "allow-all-", routing: true, spec: `"sources":[{"match":{"kuma.io/service":"*"}}],"destinations":[{"match":{"kuma.io/service":"*"}}]`},
}

// Complete returns what is written together with a Mesh: for a new one its
// signing key and initial policies, and, whenever a builtin backend is
// declared whose secrets are not there, those. The policies are made once: one
// that a user deletes stays deleted.
func (k *Keeper) Complete(ctx context.Context, m, old *resource.Resource) ([]store.Write, error) {
	spec := mesh.Meshes.From(m).Spec
	var writes []store.Write
	if old == nil {
		key, err := k.signingKey()
		if err != nil {
			return nil, err
		}
		w, err := k.unlessThere(ctx, secret(m.Name, token.KeyName(token.DataplaneKeyPrefix(m.Name), 1), key))
		if err != nil {
			return nil, err
		}
		writes = append(writes, w...)
		for _, d := range initials {
			r, err := k.initial(d, m.Name, spec)
			if err != nil {
				return nil, err
			}
			if r != nil {
				writes = append(writes, store.Set(r))
			}
		}
	}
	if spec.MTLS == nil {
		return writes, nil
	}
	var bad []errs.Field
	for i := range spec.MTLS.Backends {
		b := &spec.MTLS.Backends[i]
		if b.Type != builtin.Type {
			bad = append(bad, errs.Field{Path: fmt.Sprintf("mtls.backends[%d].type", i), Message: "could not find installed plugin for this type"})
			continue
		}
		_, errCert := k.cfg.Store.Get(ctx, mesh.Secrets.Key(m.Name, mesh.BuiltinCertSecret(m.Name, b.Name)))
		_, errKey := k.cfg.Store.Get(ctx, mesh.Secrets.Key(m.Name, mesh.BuiltinKeySecret(m.Name, b.Name)))
		if errCert == nil && errKey == nil {
			continue
		}
		for _, err := range []error{errCert, errKey} {
			if err != nil && !errs.Is(err, errs.NotFound) {
				return nil, err
			}
		}
		cert, key, err := k.cfg.Authority(m.Name, b)
		if errs.Is(err, errs.Invalid) {
			bad = append(bad, errs.Under(fmt.Sprintf("mtls.backends[%d].conf", i), []errs.Field{{Message: err.Error()}})...)
			continue
		}
		if err != nil {
			return nil, err
		}
		writes = append(writes,
			store.Set(secret(m.Name, mesh.BuiltinCertSecret(m.Name, b.Name), cert)),
			store.Set(secret(m.Name, mesh.BuiltinKeySecret(m.Name, b.Name), key)))
	}
	return writes, errs.Fields(bad...)
}

// initial makes one default policy of a mesh, or nil where it is not wanted.
func (k *Keeper) initial(d initial, meshName string, spec *mesh.MeshSpec) (*resource.Resource, error) {
	i := slices.IndexFunc(k.cfg.Kinds, func(kind *resource.Kind) bool { return kind.Name == d.kind })
	skip := spec.SkipCreatingInitialPolicies
	if i < 0 || d.routing && !k.cfg.RoutingResources || slices.Contains(skip, "*") || slices.Contains(skip, d.kind) {
		return nil, nil
	}
	doc := fmt.Sprintf(`{"type":%q,"mesh":%q,"name":%q,%s}`, d.kind, meshName, d.name+meshName, d.spec)
	r, err := resource.Decode(k.cfg.Kinds[i], []byte(doc), false)
	if err != nil {
		return nil, fmt.Errorf("initial policy %s: %w", d.name, err)
	}
	r.Labels = map[string]string{mesh.LabelMesh: meshName}
	if !d.routing {
		r.Labels[mesh.LabelOrigin], r.Labels[mesh.LabelZone], r.Labels[mesh.LabelEnv] = mesh.OriginZone, k.cfg.Zone, mesh.EnvUniversal
	}
	return r, nil
}

func secret(meshName, name string, data []byte) *resource.Resource {
	r := mesh.Secrets.Make(meshName, name, &mesh.SecretSpec{Data: data})
	r.Labels = map[string]string{mesh.LabelMesh: meshName}
	return r
}

// unlessThere returns the write of a resource, or none if it exists.
func (k *Keeper) unlessThere(ctx context.Context, r *resource.Resource) ([]store.Write, error) {
	switch _, err := k.cfg.Store.Get(ctx, r.Key()); {
	case err == nil:
		return nil, nil
	case errs.Is(err, errs.NotFound):
		return []store.Write{store.Create(r)}, nil
	default:
		return nil, err
	}
}

// admin makes the key that signs users' tokens, where there is none, and the
// administrator's token.
func (k *Keeper) admin(all []*resource.Resource, there []string) ([]store.Write, error) {
	var writes []store.Write
	name, serial, ok := token.Latest(token.UserKeyPrefix, there)
	var pem []byte
	if ok {
		pem = mesh.GlobalSecrets.From(all[slices.Index(there, name)]).Spec.Data
	} else {
		var err error
		if pem, err = token.NewSigningKey(); err != nil {
			return nil, err
		}
		serial = 1
		writes = append(writes, store.Create(mesh.GlobalSecrets.Make("", token.KeyName(token.UserKeyPrefix, serial), &mesh.SecretSpec{Data: pem})))
	}
	if !k.cfg.AdminToken || slices.Contains(there, mesh.AdminUserToken) {
		return writes, nil
	}
	key, err := token.ParseSigningKey(pem)
	if err != nil {
		return nil, fmt.Errorf("make the administrator's token with %s: %w", name, err)
	}
	signer, err := token.NewSigner(strconv.Itoa(serial), key)
	if err != nil {
		return nil, err
	}
	text, err := signer.User(token.UserClaims{Name: auth.AdminName, Groups: []string{auth.AdminGroup}}, token.DefaultValidity)
	if err != nil {
		return nil, err
	}
	return append(writes, store.Create(mesh.GlobalSecrets.Make("", mesh.AdminUserToken, &mesh.SecretSpec{Data: []byte(text)}))), nil
}

// Prepare makes what a control plane needs before it serves anyone: signing
// keys where there are none at all, the administrator's token, the authority of
// the admin listeners of proxies without a link, this zone's Zone, and, in a store that nothing was ever written to, the Mesh "default".
// It is one transaction: a start that is cut short leaves no half.
func (k *Keeper) Prepare(ctx context.Context) error {
	all, revision, err := k.cfg.Store.List(ctx, mesh.GlobalSecrets.Name, "")
	if err != nil {
		return err
	}
	var there []string
	for _, r := range all {
		there = append(there, r.Name)
	}
	var mu sync.Mutex
	var writes []store.Write
	add := func(w ...store.Write) {
		mu.Lock()
		defer mu.Unlock()
		writes = append(writes, w...)
	}
	var g errgroup.Group // keys take a while: make them side by side
	g.Go(func() error {
		w, err := k.admin(all, there)
		add(w...)
		return err
	})
	g.Go(func() error {
		if _, _, ok := token.Latest(token.ZoneKeyPrefix, there); ok {
			return nil
		}
		pem, err := token.NewSigningKey()
		if err != nil {
			return err
		}
		add(store.Create(mesh.GlobalSecrets.Make("", token.KeyName(token.ZoneKeyPrefix, 1), &mesh.SecretSpec{Data: pem})))
		return nil
	})
	g.Go(func() error {
		if slices.Contains(there, mesh.EnvoyAdminCA) {
			return nil
		}
		pair, err := pki.NewAdminCA()
		if err != nil {
			return err
		}
		add(store.Create(mesh.GlobalSecrets.Make("", mesh.EnvoyAdminCA, &mesh.SecretSpec{Data: pair})))
		return nil
	})
	g.Go(func() error {
		w, err := k.unlessThere(ctx, mesh.Zones.Make("", k.cfg.Zone, &mesh.ZoneSpec{}))
		add(w...)
		return err
	})
	if revision == 0 && !k.cfg.SkipMesh {
		g.Go(func() error {
			m := mesh.Meshes.Make("", "default", &mesh.MeshSpec{})
			w, err := k.Complete(ctx, m, nil)
			add(append([]store.Write{store.Create(m)}, w...)...)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if len(writes) == 0 {
		return nil
	}
	_, err = k.cfg.Store.Put(ctx, writes...)
	return err
}
