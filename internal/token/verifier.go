package token

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"kuma/internal/errs"
)

// Keys is what a Verifier looks up. One Keys serves one purpose (and, for
// dataplane tokens, one mesh), so a token never verifies with the key of
// another purpose.
type Keys interface {
	// Key returns the public key with the number kid, which is normalised: a
	// decimal has no leading zeros. A missing key is errs.NotFound; MissingKey
	// makes that error.
	Key(ctx context.Context, kid string) (*rsa.PublicKey, error)
	// Revoked reports whether the token with this id (jti) is revoked.
	Revoked(ctx context.Context, id string) (bool, error)
}

// Config is what a Verifier needs.
type Config struct {
	Keys Keys
	// Hint is added to the error of a token that does not verify, such as
	// "the store is in memory: keys are made anew at each start". May be
	// empty.
	Hint string
}

// Verifier turns a token's text into a verified value. It is safe for
// concurrent use.
type Verifier struct {
	keys   Keys
	hint   string
	parser *jwt.Parser
}

// New makes a Verifier.
func New(c Config) *Verifier {
	return &Verifier{keys: c.Keys, hint: c.Hint, parser: jwt.NewParser(
		jwt.WithValidMethods([]string{jwt.SigningMethodRS256.Alg()}),
		jwt.WithExpirationRequired(),
		jwt.WithStrictDecoding(),
		jwt.WithJSONNumber(),
	)}
}

// Dataplane verifies a dataplane token. Errors are Unauthenticated, or of the
// kind that Keys gave where the keys could not be read.
func (v *Verifier) Dataplane(ctx context.Context, text string) (Dataplane, error) {
	f, stamp, err := v.verify(ctx, text, "Zone", "Scope", "Groups")
	if err != nil {
		return Dataplane{}, err
	}
	c := DataplaneClaims{Name: f.text("Name"), Mesh: f.text("Mesh"), Type: f.text("Type"), Workload: f.text("Workload"), Tags: f.lists("Tags")}
	if f.err != nil {
		return Dataplane{}, f.err
	}
	return Dataplane{claims: c, stamp: stamp, verified: true}, nil
}

// Zone verifies a zone token. Errors are as for Dataplane.
func (v *Verifier) Zone(ctx context.Context, text string) (Zone, error) {
	f, stamp, err := v.verify(ctx, text, "Name", "Mesh", "Tags", "Type", "Workload", "Groups")
	if err != nil {
		return Zone{}, err
	}
	c := ZoneClaims{Zone: f.text("Zone"), Scope: f.list("Scope")}
	if f.err != nil {
		return Zone{}, f.err
	}
	return Zone{claims: c, stamp: stamp, verified: true}, nil
}

// User verifies a user token. Errors are as for Dataplane.
func (v *Verifier) User(ctx context.Context, text string) (User, error) {
	f, stamp, err := v.verify(ctx, text, "Mesh", "Tags", "Type", "Workload", "Zone", "Scope")
	if err != nil {
		return User{}, err
	}
	c := UserClaims{Name: f.text("Name"), Groups: f.list("Groups")}
	if f.err != nil {
		return User{}, f.err
	}
	if c.Name == "" {
		return User{}, refused("could not parse token: claim Name is empty, so this is no user token")
	}
	return User{claims: c, stamp: stamp}, nil
}

// verify checks everything that all tokens have in common. The foreign claims
// are those of tokens for other purposes: a token that carries one is refused,
// whatever key signed it.
func (v *Verifier) verify(ctx context.Context, text string, foreign ...string) (*fields, Stamp, error) {
	if len(text) > MaxSize {
		return nil, Stamp{}, refused("could not parse token: it has %d bytes, the limit is %d", len(text), MaxSize)
	}
	var kid string
	var lookup error
	claims := jwt.MapClaims{}
	parsed, err := v.parser.ParseWithClaims(text, claims, func(t *jwt.Token) (any, error) {
		if kid, lookup = header(t.Header); lookup != nil {
			return nil, lookup
		}
		var key *rsa.PublicKey
		if key, lookup = v.key(ctx, kid); lookup != nil {
			return nil, lookup
		}
		return key, nil
	})
	switch {
	case lookup != nil:
		return nil, Stamp{}, lookup
	case err != nil:
		return nil, Stamp{}, v.explain(parsed, err)
	}
	for _, name := range foreign {
		if c, ok := claims[name]; ok && c != nil {
			return nil, Stamp{}, refused("could not parse token: it carries the claim %s, so it was issued for another purpose", name)
		}
	}
	if aud, ok := claims["aud"]; ok && aud != nil {
		return nil, Stamp{}, refused("could not parse token: it is meant for the audience %q; tokens of the mesh have none", aud)
	}
	f := &fields{claims: claims}
	stamp := Stamp{ID: f.text("jti"), KID: kid}
	if f.err != nil {
		return nil, Stamp{}, f.err
	}
	exp, err := claims.GetExpirationTime()
	if err != nil || exp == nil {
		return nil, Stamp{}, refused("could not parse token: claim exp is not a time")
	}
	stamp.Expires = exp.Time
	revoked, err := v.keys.Revoked(ctx, stamp.ID)
	if err != nil {
		return nil, Stamp{}, errs.New(errs.KindOf(err), "read the revocations: %w", err)
	}
	if revoked {
		return nil, Stamp{}, refused("token is revoked")
	}
	return f, stamp, nil
}

// key finds the public key and checks its size before it is used.
func (v *Verifier) key(ctx context.Context, kid string) (*rsa.PublicKey, error) {
	key, err := v.keys.Key(ctx, kid)
	switch {
	case errs.Is(err, errs.NotFound):
		return nil, &errs.Error{Kind: errs.Unauthenticated, Message: err.Error(), Cause: err}
	case err != nil:
		return nil, errs.New(errs.KindOf(err), "find the key of the token: %w", err)
	case key == nil:
		return nil, errs.New(errs.Internal, "find the key of the token: there is none with KID %s", kid)
	}
	if err := checkBits(key.N.BitLen()); err != nil {
		return nil, errs.New(errs.Internal, "key %s: %w", kid, err)
	}
	return key, nil
}

// header checks the parts of a token's header that decide how it is read, and
// returns the number of its key.
func header(h map[string]any) (kid string, err error) {
	if _, ok := h["crit"]; ok {
		return "", refused("could not parse token: header crit demands extensions that are not known here")
	}
	if _, ok := h["zip"]; ok {
		return "", refused("could not parse token: header zip is not known here")
	}
	if typ, ok := h["typ"]; ok {
		if s, _ := typ.(string); !strings.EqualFold(s, "JWT") {
			return "", refused("could not parse token: header typ is %v, not JWT", typ)
		}
	}
	value, ok := h["kid"]
	if !ok {
		return "", refused("JWT token must have kid header")
	}
	s, ok := value.(string)
	if !ok {
		return "", refused("JWT token kid header must be a string")
	}
	if kid, err = normalKID(s); err != nil {
		return "", refused("could not parse token: header kid: %w", err)
	}
	return kid, nil
}

// explain turns the parser's error into the contract's words.
func (v *Verifier) explain(parsed *jwt.Token, err error) error {
	if parsed != nil {
		if alg, ok := parsed.Header["alg"]; ok && alg != jwt.SigningMethodRS256.Alg() {
			return refused("unsupported token alg %v. Allowed algorithms are %s", alg, jwt.SigningMethodRS256.Alg())
		}
	}
	hint := ""
	if v.hint != "" {
		hint = ". " + v.hint
	}
	switch {
	case errors.Is(err, jwt.ErrTokenNotValidYet):
		return refused("token is not yet valid: 'valid_from' date is in the future. Check if the system clock is right here and where the token was made")
	case errors.Is(err, jwt.ErrTokenExpired):
		when := ""
		if exp, err := parsed.Claims.GetExpirationTime(); err == nil && exp != nil {
			when = " since " + exp.UTC().Format(time.RFC3339)
		}
		return refused("could not parse token: it is expired%s; generate a new one", when)
	case errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return refused("could not parse token: claim exp is missing; a token must have an end")
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return refused("could not parse token: its signature does not fit the key %v; was it issued by another control plane?%s", parsed.Header["kid"], hint)
	default:
		return refused("could not parse token: %w%s", err, hint)
	}
}

func refused(format string, args ...any) error {
	return errs.New(errs.Unauthenticated, format, args...)
}

// fields reads claims by their exact names, and keeps the first error.
type fields struct {
	claims jwt.MapClaims
	err    error
}

func (f *fields) text(name string) string {
	switch c := f.claims[name].(type) {
	case nil:
		return ""
	case string:
		return c
	default:
		f.fail(name, "a string", c)
		return ""
	}
}

func (f *fields) list(name string) []string { return f.asList(name, f.claims[name]) }

func (f *fields) asList(name string, claim any) []string {
	if claim == nil {
		return nil
	}
	items, ok := claim.([]any)
	if !ok {
		f.fail(name, "a list of strings", claim)
		return nil
	}
	out := make([]string, 0, len(items))
	for _, item := range items {
		s, ok := item.(string)
		if !ok {
			f.fail(name, "a list of strings", claim)
			return nil
		}
		out = append(out, s)
	}
	return out
}

func (f *fields) lists(name string) map[string][]string {
	claim := f.claims[name]
	if claim == nil {
		return nil
	}
	object, ok := claim.(map[string]any)
	if !ok {
		f.fail(name, "an object of lists", claim)
		return nil
	}
	out := make(map[string][]string, len(object))
	for key, value := range object {
		out[key] = f.asList(fmt.Sprintf("%s[%q]", name, key), value)
	}
	return out
}

func (f *fields) fail(name, want string, got any) {
	if f.err == nil {
		text, _ := json.Marshal(got)
		f.err = refused("could not parse token: claim %s must be %s, it is %.40s", name, want, text)
	}
}
