package auth

import (
	"bytes"
	"context"
	"crypto/rsa"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"

	"kuma/internal/errs"
	"kuma/internal/token"
)

// Secrets is where signing keys and revocations are kept. An empty mesh means
// GlobalSecrets. A secret that is not there is errs.NotFound.
type Secrets interface {
	// Secret returns a secret's bytes, which the caller must not change.
	Secret(ctx context.Context, mesh, name string) ([]byte, error)
	// SecretNames returns the names that start with the prefix.
	SecretNames(ctx context.Context, mesh, prefix string) ([]string, error)
}

// ValidatorConfig says which keys verify tokens.
type ValidatorConfig struct {
	// UseSecrets takes the signing keys that are kept as secrets.
	UseSecrets bool `json:"useSecrets"`
	// PublicKeys are further keys, tried first. They are set in a file alone.
	PublicKeys []PublicKey `json:"publicKeys" env:"-"`
}

// PublicKey is a key whose private half is kept elsewhere.
type PublicKey struct {
	// KID is the key's number, as tokens name it.
	KID string `json:"kid"`
	// Mesh is the mesh that a dataplane token's key is for; empty means all.
	Mesh string `json:"mesh,omitempty"`
	// Key is PEM of an RSA public key.
	Key string `json:"key,omitempty"`
	// KeyFile is a file with such PEM, in place of Key.
	KeyFile string `json:"keyFile,omitempty"`
}

// maxKeyFile is the largest public key file that is read, in bytes.
const maxKeyFile = 64 << 10

// parsedKey is a configured public key.
type parsedKey struct {
	kid, mesh string
	key       *rsa.PublicKey
}

// parsePublicKeys reads the configured keys, so that a broken one stops the
// start and not every stream.
func parsePublicKeys(at string, keys []PublicKey) ([]parsedKey, error) {
	var out []parsedKey
	for i, k := range keys {
		where := fmt.Sprintf("%s.publicKeys[%d]", at, i)
		if (k.Key == "") == (k.KeyFile == "") {
			return nil, errs.New(errs.Invalid, "%s: exactly one of key and keyFile must be set", where)
		}
		if k.KID == "" {
			return nil, errs.New(errs.Invalid, "%s.kid: must be set", where)
		}
		text := []byte(k.Key)
		if k.KeyFile != "" {
			st, err := os.Stat(k.KeyFile)
			if err == nil && st.Size() > maxKeyFile {
				return nil, errs.New(errs.Invalid, "%s.keyFile: %s has %d bytes, the limit is %d", where, k.KeyFile, st.Size(), maxKeyFile)
			}
			if err == nil {
				text, err = os.ReadFile(k.KeyFile)
			}
			if err != nil {
				return nil, errs.New(errs.Invalid, "%s.keyFile: %w", where, err)
			}
		}
		key, err := token.ParsePublicKey(text)
		if err != nil {
			return nil, errs.New(errs.Invalid, "%s: %w", where, err)
		}
		out = append(out, parsedKey{normalSerial(k.KID), k.Mesh, key})
	}
	return out, nil
}

// normalSerial strips leading zeros from a decimal, as tokens' kids are.
func normalSerial(kid string) string {
	if n, err := strconv.ParseUint(kid, 10, 63); err == nil {
		return strconv.FormatUint(n, 10)
	}
	return kid
}

// place is where a secret is.
type place struct{ mesh, name string }

// material keeps what was parsed from secrets. An entry counts only while the
// secret has the very bytes that it was parsed from, so that it can't be stale.
type material struct {
	mu      sync.Mutex
	keys    map[place]parsedSecret[*rsa.PrivateKey]
	publics map[place]parsedSecret[*rsa.PublicKey]
	revoked map[place]parsedSecret[token.Revocations]
}

type parsedSecret[T any] struct {
	from  []byte
	value T
}

// maxMaterial bounds each map; beyond it all is parsed anew.
const maxMaterial = 10_000

func newMaterial() *material {
	return &material{
		keys:    map[place]parsedSecret[*rsa.PrivateKey]{},
		publics: map[place]parsedSecret[*rsa.PublicKey]{},
		revoked: map[place]parsedSecret[token.Revocations]{},
	}
}

// remember parses bytes unless they are those that were parsed before.
func remember[T any](mu *sync.Mutex, m map[place]parsedSecret[T], k place, from []byte, parse func([]byte) (T, error)) (T, error) {
	mu.Lock()
	known, ok := m[k]
	mu.Unlock()
	if ok && bytes.Equal(known.from, from) {
		return known.value, nil
	}
	v, err := parse(from)
	if err != nil {
		return v, err
	}
	mu.Lock()
	defer mu.Unlock()
	if len(m) >= maxMaterial {
		clear(m)
	}
	m[k] = parsedSecret[T]{from, v}
	return v, nil
}

// keySource is token.Keys for one purpose.
type keySource struct {
	secrets    Secrets
	material   *material
	static     []parsedKey
	useSecrets bool
	// mesh is where the keys' secrets are; empty means GlobalSecrets.
	mesh string
	// prefix starts their names; publicPrefix those of public halves.
	prefix, publicPrefix string
	revocations          []place
	log                  *slog.Logger
}

// Key returns the public key with the number kid.
func (k *keySource) Key(ctx context.Context, kid string) (*rsa.PublicKey, error) {
	for _, s := range k.static {
		if s.kid == kid && (s.mesh == "" || s.mesh == k.mesh) {
			return s.key, nil
		}
	}
	if !k.useSecrets {
		return nil, errs.New(errs.NotFound, "there is no signing key with KID %s: it is not one of the configured public keys, and keys kept as secrets are switched off (useSecrets)", kid)
	}
	for _, prefix := range []string{k.prefix, k.publicPrefix} {
		if prefix == "" {
			continue
		}
		at, data, err := k.find(ctx, prefix, kid)
		if errs.Is(err, errs.NotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if prefix == k.publicPrefix {
			return remember(&k.material.mu, k.material.publics, at, data, token.ParsePublicKey)
		}
		private, err := remember(&k.material.mu, k.material.keys, at, data, token.ParseSigningKey)
		if err != nil {
			return nil, errs.New(errs.KindOf(err), "secret %q: %w", at.name, err)
		}
		return &private.PublicKey, nil
	}
	return nil, token.MissingKey(kid, k.prefix, k.mesh)
}

// find returns the secret with the key of a number, however its name pads it.
func (k *keySource) find(ctx context.Context, prefix, kid string) (place, []byte, error) {
	at := place{k.mesh, prefix + "-" + kid}
	data, err := k.secrets.Secret(ctx, at.mesh, at.name)
	if err == nil || !errs.Is(err, errs.NotFound) {
		return at, data, err
	}
	all, err := k.secrets.SecretNames(ctx, k.mesh, prefix+"-")
	if err != nil {
		return at, nil, err
	}
	name, ok := token.Find(prefix, all, kid)
	if !ok {
		return at, nil, errs.New(errs.NotFound, "secret %q not found", at.name)
	}
	at.name = name
	data, err = k.secrets.Secret(ctx, at.mesh, at.name)
	return at, data, err
}

// signer returns the key that signs: the one with the highest number.
func (k *keySource) signer(ctx context.Context) (*token.Signer, error) {
	all, err := k.secrets.SecretNames(ctx, k.mesh, k.prefix+"-")
	if err != nil {
		return nil, err
	}
	name, serial, ok := token.Latest(k.prefix, all)
	if !ok {
		return nil, token.MissingKey("1", k.prefix, k.mesh)
	}
	at := place{k.mesh, name}
	data, err := k.secrets.Secret(ctx, at.mesh, at.name)
	if err != nil {
		return nil, err
	}
	key, err := remember(&k.material.mu, k.material.keys, at, data, token.ParseSigningKey)
	if err != nil {
		return nil, errs.New(errs.Internal, "secret %q: %w", name, err)
	}
	return token.NewSigner(strconv.Itoa(serial), key)
}

// Revoked reports whether a token's id is on the list in any of the places.
func (k *keySource) Revoked(ctx context.Context, id string) (bool, error) {
	for _, at := range k.revocations {
		data, err := k.secrets.Secret(ctx, at.mesh, at.name)
		if errs.Is(err, errs.NotFound) {
			continue
		}
		if err != nil {
			return false, err
		}
		list, err := remember(&k.material.mu, k.material.revoked, at, data, func(b []byte) (token.Revocations, error) {
			r, err := token.ParseRevocations(string(b))
			if err == nil && len(r.Odd) > 0 {
				k.log.WarnContext(ctx, "revocation list has entries that are no token ids", "mesh", at.mesh, "secret", at.name, "entries", len(r.Odd), "first", short(r.Odd[0]))
			}
			return r, err
		})
		if err != nil {
			// A list that can't be read must not let revoked tokens in.
			return false, errs.New(errs.Internal, "secret %q: %w", at.name, err)
		}
		if list.Has(id) {
			return true, nil
		}
	}
	return false, nil
}

func short(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}
