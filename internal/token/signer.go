package token

import (
	"crypto/rsa"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"

	"kuma/internal/errs"
)

// Signer mints tokens with one key.
type Signer struct {
	kid string
	key *rsa.PrivateKey
}

// NewSigner makes a Signer. The kid goes into the header of each token; for a
// key that is kept as a secret it is the serial as a decimal.
func NewSigner(kid string, key *rsa.PrivateKey) (*Signer, error) {
	normal, err := normalKID(kid)
	if err != nil {
		return nil, errs.New(errs.Invalid, "key id %q: %w", kid, err)
	}
	if key == nil {
		return nil, errs.New(errs.Internal, "no signing key is given")
	}
	if err := checkBits(key.N.BitLen()); err != nil {
		return nil, err
	}
	return &Signer{kid: normal, key: key}, nil
}

// Dataplane mints a dataplane token. A negative life makes a token that has
// expired already, as the contract allows; zero is an error.
func (s *Signer) Dataplane(c DataplaneClaims, life time.Duration) (string, error) {
	return s.sign(jwt.MapClaims{"Name": c.Name, "Mesh": c.Mesh, "Tags": c.Tags, "Type": c.Type, "Workload": c.Workload}, life)
}

// Zone mints a zone token. A zero life is an error.
func (s *Signer) Zone(c ZoneClaims, life time.Duration) (string, error) {
	return s.sign(jwt.MapClaims{"Zone": c.Zone, "Scope": c.Scope}, life)
}

// User mints a user token. A zero life or an empty name is an error.
func (s *Signer) User(c UserClaims, life time.Duration) (string, error) {
	if c.Name == "" {
		return "", errs.Fields(errs.Field{Path: "name", Message: "cannot be empty"})
	}
	return s.sign(jwt.MapClaims{"Name": c.Name, "Groups": c.Groups}, life)
}

func (s *Signer) sign(claims jwt.MapClaims, life time.Duration) (string, error) {
	if life == 0 {
		return "", errs.Fields(errs.Field{Path: "validFor", Message: "cannot be empty or nil"})
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return "", errs.New(errs.Internal, "make a token id: %w", err)
	}
	now := time.Now()
	claims["exp"] = now.Add(life).Unix()
	claims["nbf"] = now.Add(-Backdate).Unix()
	claims["iat"] = now.Add(-Backdate).Unix()
	claims["jti"] = id.String()
	t := jwt.NewWithClaims(jwt.SigningMethodRS256, claims)
	t.Header["kid"] = s.kid
	text, err := t.SignedString(s.key)
	if err != nil {
		return "", errs.New(errs.Internal, "sign a token: %w", err)
	}
	if len(text) > MaxSize {
		return "", errs.New(errs.Invalid, "the token would have %d bytes, more than the %d that are read; name fewer tags or groups", len(text), MaxSize)
	}
	return text, nil
}
