package token_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/token"
)

var testKey = sync.OnceValue(func() *rsa.PrivateKey {
	pem, err := token.NewSigningKey()
	if err != nil {
		panic(err)
	}
	key, err := token.ParseSigningKey(pem)
	if err != nil {
		panic(err)
	}
	return key
})

// ring is a Keys with one key, number 1.
type ring struct {
	revoked token.Revocations
	err     error
}

func (r ring) Key(_ context.Context, kid string) (*rsa.PublicKey, error) {
	if r.err != nil {
		return nil, r.err
	}
	if kid != "1" {
		return nil, token.MissingKey(kid, token.DataplaneKeyPrefix("default"), "default")
	}
	return &testKey().PublicKey, nil
}

func (r ring) Revoked(_ context.Context, id string) (bool, error) { return r.revoked.Has(id), nil }

func signer(t testing.TB) *token.Signer {
	t.Helper()
	s, err := token.NewSigner("1", testKey())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func verifier() *token.Verifier { return token.New(token.Config{Keys: ring{}}) }

func TestRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		want := token.DataplaneClaims{Name: "web-1", Mesh: "default", Tags: map[string][]string{"kuma.io/service": {"web"}}, Workload: "w"}
		text, err := signer(t).Dataplane(want, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		d, err := verifier().Dataplane(t.Context(), text)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, d.Claims()); diff != "" {
			t.Error(diff)
		}
		if s := d.Stamp(); s.KID != "1" || len(s.ID) != 36 || !s.Expires.Equal(time.Now().Add(time.Hour)) {
			t.Errorf("stamp = %+v", s)
		}
		head, body, _ := strings.Cut(text, ".")
		body, _, _ = strings.Cut(body, ".")
		if got := decode(t, head); got != `{"alg":"RS256","kid":"1","typ":"JWT"}` {
			t.Errorf("header = %s", got)
		}
		var payload map[string]any
		if err := json.Unmarshal([]byte(decode(t, body)), &payload); err != nil {
			t.Fatal(err)
		}
		now := float64(time.Now().Unix())
		delete(payload, "jti")
		if diff := cmp.Diff(map[string]any{
			"Name": "web-1", "Mesh": "default", "Tags": map[string]any{"kuma.io/service": []any{"web"}}, "Type": "", "Workload": "w",
			"exp": now + 3600, "nbf": now - 5, "iat": now - 5,
		}, payload); diff != "" {
			t.Error(diff)
		}

		zt, err := signer(t).Zone(token.ZoneClaims{Zone: "east", Scope: []string{"ingress"}}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if z, err := verifier().Zone(t.Context(), zt); err != nil || z.Allows("east", "ingress") != nil || z.Allows("west", "ingress") == nil || z.Allows("east", "egress") == nil {
			t.Errorf("zone token: %+v, %v", z, err)
		}
		ut, err := signer(t).User(token.UserClaims{Name: "jo", Groups: []string{"a"}}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		u, err := verifier().User(t.Context(), ut)
		if err != nil || u.Name() != "jo" || !slices.Equal(u.Groups(), []string{"a"}) {
			t.Errorf("user token: %+v, %v", u, err)
		}

		time.Sleep(time.Hour)
		if _, err := verifier().Dataplane(t.Context(), text); err == nil || !strings.Contains(err.Error(), "expired since") {
			t.Errorf("after its end: %v", err)
		}
	})
}

func decode(t *testing.T, s string) string {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestConfusion is HRD-11: every way to make a token mean what its issuer did
// not is refused.
func TestConfusion(t *testing.T) {
	now := time.Now()
	claims := func(change map[string]any) jwt.MapClaims {
		c := jwt.MapClaims{"Name": "a", "Mesh": "default", "Tags": nil, "Type": "", "Workload": "", "exp": now.Add(time.Hour).Unix(), "nbf": now.Add(-time.Minute).Unix(), "jti": "x"}
		for k, v := range change {
			if c[k] = v; v == "absent" {
				delete(c, k)
			}
		}
		return c
	}
	make := func(method jwt.SigningMethod, key any, header map[string]any, c jwt.MapClaims) string {
		tok := jwt.NewWithClaims(method, c)
		tok.Header["kid"] = "1"
		for k, v := range header {
			if tok.Header[k] = v; v == "absent" {
				delete(tok.Header, k)
			}
		}
		s, err := tok.SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	rs := func(header map[string]any, change map[string]any) string {
		return make(jwt.SigningMethodRS256, testKey(), header, claims(change))
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public := token.PublicPEM(&testKey().PublicKey)
	good := rs(nil, nil)
	parts := strings.Split(good, ".")
	const parse = "could not parse token"
	type h = map[string]any
	cases := map[string]struct {
		text string
		want string // empty: accepted
	}{
		"good":                          {good, ""},
		"alg none":                      {make(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, nil, claims(nil)), "unsupported token alg none"},
		"alg None, no signature":        {b64(`{"alg":"None","kid":"1"}`) + "." + parts[1] + ".", "unsupported token alg None"},
		"HMAC with the public key PEM":  {make(jwt.SigningMethodHS256, public, nil, claims(nil)), "unsupported token alg HS256"},
		"HMAC with the public key DER":  {make(jwt.SigningMethodHS256, x509.MarshalPKCS1PublicKey(&testKey().PublicKey), nil, claims(nil)), "unsupported token alg HS256"},
		"RS512 with the right key":      {make(jwt.SigningMethodRS512, testKey(), nil, claims(nil)), "unsupported token alg RS512"},
		"PS256 with the right key":      {make(jwt.SigningMethodPS256, testKey(), nil, claims(nil)), "unsupported token alg PS256"},
		"ES256":                         {make(jwt.SigningMethodES256, ec, nil, claims(nil)), "unsupported token alg ES256"},
		"another key of the same size":  {make(jwt.SigningMethodRS256, other, nil, claims(nil)), "signature does not fit"},
		"alg not a string":              {b64(`{"alg":5,"kid":"1"}`) + "." + parts[1] + "." + parts[2], "unsupported token alg 5"},
		"key in the header":             {make(jwt.SigningMethodRS256, other, h{"jwk": h{"kty": "RSA"}}, claims(nil)), "signature does not fit"},
		"crit":                          {rs(h{"crit": []string{"exp"}}, nil), "header crit"},
		"zip":                           {rs(h{"zip": "DEF"}, nil), "header zip"},
		"typ of another use":            {rs(h{"typ": "at+jwt"}, nil), "header typ"},
		"kid missing":                   {rs(h{"kid": "absent"}, nil), "JWT token must have kid header"},
		"kid a number":                  {rs(h{"kid": 1}, nil), "JWT token kid header must be a string"},
		"kid empty":                     {rs(h{"kid": ""}, nil), "header kid: is empty"},
		"kid padded with white space":   {rs(h{"kid": " 1"}, nil), "header kid: holds"},
		"kid padded with zeros":         {rs(h{"kid": "0001"}, nil), ""},
		"kid with a sign":               {rs(h{"kid": "+1"}, nil), "there is no signing key with KID +1"},
		"kid a path":                    {rs(h{"kid": "../1"}, nil), "there is no signing key with KID ../1"},
		"kid unknown":                   {rs(h{"kid": "7"}, nil), `there is no signing key with KID 7. Secret of name "dataplane-token-signing-key-default-7" in mesh "default" is not found. If signing key was rotated, regenerate the token`},
		"kid long":                      {rs(h{"kid": strings.Repeat("1", 300)}, nil), "header kid: has 300 bytes"},
		"exp missing":                   {rs(nil, h{"exp": "absent"}), "claim exp is missing"},
		"exp null":                      {rs(nil, h{"exp": nil}), parse},
		"exp a string":                  {rs(nil, h{"exp": "9999999999"}), parse},
		"exp zero":                      {rs(nil, h{"exp": 0}), parse},
		"expired":                       {rs(nil, h{"exp": now.Add(-time.Second).Unix()}), "is expired since"},
		"nbf in the future":             {rs(nil, h{"nbf": now.Add(time.Hour).Unix()}), "token is not yet valid: 'valid_from' date is in the future. Check if the system clock"},
		"audience":                      {rs(nil, h{"aud": "other"}), "audience"},
		"audience list":                 {rs(nil, h{"aud": []string{"a", "b"}}), "audience"},
		"claims of a zone token":        {rs(nil, h{"Zone": "z"}), "issued for another purpose"},
		"claims of a user token":        {rs(nil, h{"Groups": []string{"mesh-system:admin"}}), "issued for another purpose"},
		"claims in another case":        {rs(nil, h{"mesh": "other", "name": "b"}), ""},
		"Mesh not a string":             {rs(nil, h{"Mesh": []string{"default"}}), "claim Mesh must be a string"},
		"Tags not an object":            {rs(nil, h{"Tags": "kuma.io/service"}), "claim Tags must be an object of lists"},
		"Tags values not lists":         {rs(nil, h{"Tags": h{"a": "b"}}), `claim Tags["a"] must be a list of strings`},
		"jti not a string":              {rs(nil, h{"jti": 5}), "claim jti must be a string"},
		"standard base64":               {parts[0] + "=." + parts[1] + "." + parts[2], parse},
		"two parts":                     {parts[0] + "." + parts[1], parse},
		"four parts":                    {good + ".x", parse},
		"signature cut":                 {good[:len(good)-6], parse},
		"empty":                         {"", parse},
		"white space around":            {" " + good + "\n", parse},
		"bearer":                        {"Bearer " + good, parse},
		"too long":                      {good + strings.Repeat("A", token.MaxSize), "the limit is 8192"},
		"claims not an object":          {b64(`{"alg":"RS256","kid":"1"}`) + "." + b64(`[]`) + "." + parts[2], parse},
		"header of an unsigned twin":    {b64(`{"alg":"RS256","kid":"1","typ":"JWT"} `) + "." + parts[1] + "." + parts[2], "signature does not fit"},
		"duplicate kid, last one signs": {b64(`{"alg":"RS256","kid":"1","kid":"2"}`) + "." + parts[1] + "." + parts[2], "no signing key with KID 2"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			d, err := verifier().Dataplane(t.Context(), c.text)
			if c.want == "" {
				if err != nil || d.Claims().Name != "a" {
					t.Fatalf("got %+v, %v, want it accepted", d, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error = %v, want one with %q", err, c.want)
			}
			if !errs.Is(err, errs.Unauthenticated) {
				t.Errorf("kind = %v", errs.KindOf(err))
			}
			if d.Allows(token.Proxy{Mesh: "default", Name: "a"}) == nil {
				t.Error("a refused token allows a proxy")
			}
		})
	}
}

func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// TestPurpose is HRD-11: with one key for all purposes (offline keys), a token
// still counts only for its own.
func TestPurpose(t *testing.T) {
	s, v, ctx := signer(t), verifier(), t.Context()
	dp, err1 := s.Dataplane(token.DataplaneClaims{Name: "mesh-system:admin", Mesh: "default"}, time.Hour)
	zone, err2 := s.Zone(token.ZoneClaims{Zone: "z", Scope: []string{"ingress"}}, time.Hour)
	user, err3 := s.User(token.UserClaims{Name: "jo", Groups: []string{}}, time.Hour)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	_, dpZone := v.Zone(ctx, dp)
	_, dpUser := v.User(ctx, dp)
	_, zoneDP := v.Dataplane(ctx, zone)
	_, zoneUser := v.User(ctx, zone)
	_, userDP := v.Dataplane(ctx, user)
	_, userZone := v.Zone(ctx, user)
	for i, err := range []error{dpZone, dpUser, zoneDP, zoneUser, userDP, userZone} {
		if !errs.Is(err, errs.Unauthenticated) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if token.Dataplane.Allows(token.Dataplane{}, token.Proxy{}) == nil || token.Zone.Allows(token.Zone{}, "", "") == nil || (token.User{}).Name() != "" {
		t.Error("a zero value allows something")
	}
	if _, err := s.User(token.UserClaims{}, time.Hour); !errs.Is(err, errs.Invalid) {
		t.Errorf("user without a name: %v", err)
	}
	if _, err := s.Zone(token.ZoneClaims{}, 0); !errs.Is(err, errs.Invalid) {
		t.Errorf("no life: %v", err)
	}
	if _, err := s.User(token.UserClaims{Name: "x", Groups: []string{strings.Repeat("g", token.MaxSize)}}, time.Hour); !errs.Is(err, errs.Invalid) {
		t.Errorf("long token: %v", err)
	}
}

// TestEveryByteCounts is HRD-06: a token altered in any byte is refused.
func TestEveryByteCounts(t *testing.T) {
	text, err := signer(t).Dataplane(token.DataplaneClaims{Name: "a", Mesh: "default"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	v := verifier()
	for i := range len(text) {
		for _, c := range []byte{'A', 'b', '_', '.'} {
			if text[i] == c {
				continue
			}
			if _, err := v.Dataplane(t.Context(), text[:i]+string(c)+text[i+1:]); err == nil {
				t.Fatalf("byte %d changed from %c to %c: accepted", i, text[i], c)
			}
		}
	}
}

func TestKeysFail(t *testing.T) {
	text, err := signer(t).Dataplane(token.DataplaneClaims{Mesh: "default"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	v := token.New(token.Config{Keys: ring{err: errs.New(errs.Unavailable, "store is closed")}})
	if _, err := v.Dataplane(t.Context(), text); !errs.Is(err, errs.Unavailable) || err.Error() != "find the key of the token: store is closed" {
		t.Errorf("error = %v", err)
	}
	d, err := verifier().Dataplane(t.Context(), text)
	if err != nil {
		t.Fatal(err)
	}
	revoked, err := token.ParseRevocations("a, " + d.Stamp().ID + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := token.New(token.Config{Keys: ring{revoked: revoked}}).Dataplane(t.Context(), text); err == nil || err.Error() != "token is revoked" {
		t.Errorf("error = %v", err)
	}
}

func TestAllows(t *testing.T) {
	type tags = map[string][]string
	proxy := token.Proxy{Mesh: "m", Name: "web-1", Workload: "w", Tags: tags{"kuma.io/service": {"web", "api"}, "version": {"1"}}}
	cases := map[string]struct {
		claims token.DataplaneClaims
		want   string
	}{
		"nothing":        {token.DataplaneClaims{}, ""},
		"all":            {token.DataplaneClaims{Mesh: "m", Name: "web-1", Type: "dataplane", Workload: "w", Tags: tags{"kuma.io/service": {"web", "api", "x"}}}, ""},
		"mesh":           {token.DataplaneClaims{Mesh: "n"}, "authentication failed: proxy mesh from requestor: m is different than in token: n"},
		"name":           {token.DataplaneClaims{Name: "web-2"}, "authentication failed: proxy name from requestor: web-1 is different than in token: web-2"},
		"type":           {token.DataplaneClaims{Type: "ingress"}, "authentication failed: proxy type from requestor: dataplane is different than in token: ingress"},
		"tag missing":    {token.DataplaneClaims{Tags: tags{"k": {"v"}}}, `dataplane has no tag "k" required by the token`},
		"tag value":      {token.DataplaneClaims{Tags: tags{"kuma.io/service": {"web", "b"}}}, `dataplane contains tag "kuma.io/service" with value "api" which is not allowed with this token. Allowed values in token are ["web" "b"]`},
		"no value":       {token.DataplaneClaims{Tags: tags{"version": {}}}, `dataplane contains tag "version" with value "1" which is not allowed with this token. Allowed values in token are []`},
		"other workload": {token.DataplaneClaims{Workload: "b"}, `dataplane workload "w" is not allowed with this token. Allowed workload in token is "b"`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			err := mint(t, c.claims).Allows(proxy)
			if got := text(err); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
	none := proxy
	none.Workload = ""
	if got := text(mint(t, token.DataplaneClaims{Workload: "b"}).Allows(none)); got != "dataplane has no workload label required by the token" {
		t.Error(got)
	}
	if mint(t, token.DataplaneClaims{Name: "a"}).Bound() == nil || mint(t, token.DataplaneClaims{Name: "a", Tags: tags{"kuma.io/service": {"b"}}}).Bound() != nil {
		t.Error("Bound is wrong")
	}
}

// TestCovers is HRD-04: random pairs of token and proxy, against the literal
// rule.
func TestCovers(t *testing.T) {
	r := mathrand.New(mathrand.NewPCG(1, 2))
	pick := func(s ...string) string { return s[r.IntN(len(s))] }
	some := func() []string {
		var out []string
		for _, v := range []string{"x", "y", "z"} {
			if r.IntN(2) == 0 {
				out = append(out, v)
			}
		}
		return out
	}
	allowed := 0
	for range 300 {
		c := token.DataplaneClaims{Mesh: pick("", "m", "n"), Name: pick("", "", "a", "b"), Type: pick("", "", "dataplane", "ingress"), Workload: pick("", "", "w", "v"), Tags: map[string][]string{}}
		if r.IntN(2) == 0 {
			c.Tags[pick("s", "t")] = some()
		}
		d := mint(t, c)
		for range 40 {
			p := token.Proxy{Mesh: pick("m", "n"), Name: pick("a", "b"), Type: pick("", "dataplane", "ingress"), Workload: pick("", "w", "v"), Tags: map[string][]string{"s": some(), "t": some()}}
			kind := p.Type
			if kind == "" {
				kind = "dataplane"
			}
			want := (c.Mesh == "" || c.Mesh == p.Mesh) && (c.Name == "" || c.Name == p.Name) && (c.Type == "" || c.Type == kind) && (c.Workload == "" || c.Workload == p.Workload)
			for tag := range maps.Keys(c.Tags) {
				want = want && len(p.Tags[tag]) > 0
				for _, v := range p.Tags[tag] {
					want = want && slices.Contains(c.Tags[tag], v)
				}
			}
			if err := d.Allows(p); (err == nil) != want {
				t.Fatalf("token %+v, proxy %+v: %v, want allowed = %t", c, p, err, want)
			}
			if want {
				allowed++
			}
		}
	}
	if allowed < 100 {
		t.Errorf("only %d pairs were allowed: the test is too weak", allowed)
	}
}

func mint(t *testing.T, c token.DataplaneClaims) token.Dataplane {
	t.Helper()
	text, err := signer(t).Dataplane(c, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	d, err := verifier().Dataplane(t.Context(), text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// FuzzVerify is HRD-09: no text crashes a verifier, and none that was not
// signed is accepted.
func FuzzVerify(f *testing.F) {
	good, err := signer(f).Dataplane(token.DataplaneClaims{Name: "a"}, time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("")
	f.Add("a.b.c")
	f.Add(b64(`{"alg":"none","kid":"1"}`) + "." + b64(`{"exp":1e400}`) + ".")
	f.Add(b64(`{"alg":"RS256","kid":{"a":[]}}`) + "." + b64(`{"exp":-1}`) + "." + b64("x"))
	f.Add(b64(`{"alg":"RS256","kid":"1"}`) + "." + b64(`null`) + "." + b64("x"))
	v := verifier()
	f.Fuzz(func(t *testing.T, s string) {
		_, err := v.Dataplane(context.Background(), s)
		if (err == nil) != (s == good) {
			t.Errorf("%q: %v", s, err)
		}
		if _, err := token.Unverified(s, "f"); err != nil && !errs.Is(err, errs.Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	})
}
