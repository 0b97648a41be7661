package cp

import (
	"context"
	"strings"

	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// secrets is where package auth finds keys and revocations.
type secrets struct{ store store.Store }

func secretKind(meshName string) *resource.Kind {
	if meshName == "" {
		return mesh.GlobalSecrets.Kind
	}
	return mesh.Secrets.Kind
}

func (s secrets) Secret(ctx context.Context, meshName, name string) ([]byte, error) {
	r, err := s.store.Get(ctx, resource.Key{Kind: secretKind(meshName).Name, Mesh: meshName, Name: name})
	if err != nil {
		return nil, err
	}
	return r.Spec.(*mesh.SecretSpec).Data, nil
}

func (s secrets) SecretNames(ctx context.Context, meshName, prefix string) ([]string, error) {
	all, _, err := s.store.List(ctx, secretKind(meshName).Name, meshName)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, r := range all {
		if strings.HasPrefix(r.Name, prefix) {
			out = append(out, r.Name)
		}
	}
	return out, nil
}
