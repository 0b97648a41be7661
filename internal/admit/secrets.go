package admit

import (
	"context"
	"strings"

	"kuma/internal/mesh"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// Secrets reads secrets out of a store, as package auth wants them. It is not
// for users: it asks nobody.
type Secrets struct{ Store store.Store }

// Secret returns a secret's bytes; an empty mesh means a GlobalSecret.
func (s Secrets) Secret(ctx context.Context, inMesh, name string) ([]byte, error) {
	r, err := s.Store.Get(ctx, resource.Key{Kind: secretKind(inMesh), Mesh: inMesh, Name: name})
	if err != nil {
		return nil, err
	}
	return r.Spec.(*mesh.SecretSpec).Data, nil
}

// SecretNames returns the names of secrets that start with the prefix.
func (s Secrets) SecretNames(ctx context.Context, inMesh, prefix string) ([]string, error) {
	all, _, err := s.Store.List(ctx, secretKind(inMesh), inMesh)
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

func secretKind(inMesh string) string {
	if inMesh == "" {
		return mesh.GlobalSecrets.Name
	}
	return mesh.Secrets.Name
}
