package token_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
	"kuma/internal/token"
)

func block(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func TestParseSigningKey(t *testing.T) {
	key := testKey()
	pkcs1 := x509.MarshalPKCS1PrivateKey(key)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecDER, err := x509.MarshalPKCS8PrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	huge := new(big.Int).SetBit(big.NewInt(1), 30000, 1)
	hugeDER, err := asn1.Marshal(struct {
		V    int
		N, E *big.Int
	}{0, huge, big.NewInt(3)})
	if err != nil {
		t.Fatal(err)
	}
	damaged := bytes.Clone(pkcs1)
	damaged[len(damaged)/2] ^= 1
	cases := map[string]struct {
		data []byte
		want string
	}{
		"PKCS#1":         {block("RSA PRIVATE KEY", pkcs1), ""},
		"PKCS#1 as DER":  {pkcs1, ""},
		"PKCS#8":         {block("PRIVATE KEY", pkcs8), ""},
		"text before":    {append([]byte("# my key\n"), block("RSA PRIVATE KEY", pkcs1)...), ""},
		"EC":             {block("PRIVATE KEY", ecDER), "must be an RSA key"},
		"public":         {token.PublicPEM(&key.PublicKey), `invalid key encoding "RSA PUBLIC KEY"`},
		"not PEM":        {[]byte("hello"), "key is not PEM"},
		"empty":          {nil, "key is not PEM"},
		"cut PEM":        {block("RSA PRIVATE KEY", pkcs1)[:200], "key is not PEM"},
		"DER of nothing": {[]byte{0x30, 0x00}, "not an RSA private key"},
		"damaged":        {damaged, "not a sound RSA private key"},
		"huge (HRD-24)":  {block("RSA PRIVATE KEY", hugeDER), "RSA key has 30001 bits; it must have 2048 to 8192"},
		"text too long":  {bytes.Repeat([]byte("x"), 1<<20), "the limit is 32768"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			got, err := token.ParseSigningKey(c.data)
			if c.want == "" {
				if err != nil || !got.Equal(key) {
					t.Fatalf("error = %v", err)
				}
				return
			}
			if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want one with %q", err, c.want)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("it took %v to refuse", d)
			}
		})
	}
}

func TestParsePublicKey(t *testing.T) {
	pub := &testKey().PublicKey
	pkix, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct {
		data []byte
		want string
	}{
		"PKCS#1":  {token.PublicPEM(pub), ""},
		"PKIX":    {block("PUBLIC KEY", pkix), ""},
		"private": {block("RSA PRIVATE KEY", nil), `invalid key encoding "RSA PRIVATE KEY"`},
		"not PEM": {[]byte("hello"), "key is not PEM"},
		"DER":     {pkix, "key is not PEM"},
		"empty":   {block("PUBLIC KEY", nil), "public key is not PKIX"},
		"small":   {token.PublicPEM(&small.PublicKey), "RSA key has 1024 bits"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := token.ParsePublicKey(c.data)
			if c.want == "" {
				if err != nil || !got.Equal(pub) {
					t.Fatalf("error = %v", err)
				}
				return
			}
			if !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error = %v, want one with %q", err, c.want)
			}
		})
	}
}

// TestSerials is HRD-11: key numbers are normalised.
func TestSerials(t *testing.T) {
	const p = "user-token-signing-key"
	cases := map[string]struct {
		names  []string
		latest string
		serial int
		find   map[string]string
	}{
		"none":      {names: []string{"other-1", p, p + "-"}, find: map[string]string{"0": "", "1": ""}},
		"highest":   {names: []string{p + "-2", p + "-10", p + "-9"}, latest: p + "-10", serial: 10, find: map[string]string{"9": p + "-9", "3": ""}},
		"padded":    {names: []string{p + "-1", p + "-0002"}, latest: p + "-0002", serial: 2, find: map[string]string{"2": p + "-0002"}},
		"both":      {names: []string{p + "-0002", p + "-2"}, latest: p + "-2", serial: 2, find: map[string]string{"2": p + "-2"}},
		"no number": {names: []string{p + "-old"}, latest: p + "-old", serial: 0, find: map[string]string{"0": p + "-old"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			latest, serial, ok := token.Latest(p, c.names)
			if latest != c.latest || serial != c.serial || ok != (c.latest != "") {
				t.Errorf("latest = %q, %d, %t", latest, serial, ok)
			}
			for kid, want := range c.find {
				if got, _ := token.Find(p, c.names, kid); got != want {
					t.Errorf("find %s = %q, want %q", kid, got, want)
				}
			}
		})
	}
	if _, err := token.NewSigner("a b", testKey()); !errs.Is(err, errs.Invalid) {
		t.Errorf("signer with a broken kid: %v", err)
	}
	if got := token.MissingKey("3", token.UserKeyPrefix, "").Error(); got != `there is no signing key with KID 3. GlobalSecret of name "user-token-signing-key-3" is not found. If signing key was rotated, regenerate the token` {
		t.Error(got)
	}
}

// TestRevocations is HRD-11: revocation lists are trimmed and validated.
func TestRevocations(t *testing.T) {
	const a, b = "6b3a5a1e-0a51-4a6c-8c1a-0d4f5a2c9b10", "e0f9d2b4-7f0f-4b4e-9d2a-5f2f7f0c1a22"
	cases := map[string]struct {
		lists []string
		has   []string
		odd   []string
	}{
		"empty":        {lists: []string{"", " \n,, "}},
		"contract":     {lists: []string{a + "," + b + "\n"}, has: []string{a, b}},
		"spaces":       {lists: []string{" " + a + " ,\r\n\t" + b + " , "}, has: []string{a, b}},
		"lines":        {lists: []string{a + "\n" + b}, has: []string{a, b}},
		"two secrets":  {lists: []string{a, b}, has: []string{a, b}},
		"upper case":   {lists: []string{strings.ToUpper(a)}, has: []string{a}},
		"not an id":    {lists: []string{a + ";" + b}, odd: []string{a + ";" + b}},
		"own id":       {lists: []string{"my-token"}, has: []string{"my-token"}, odd: []string{"my-token"}},
		"byte order":   {lists: []string{"\ufeff" + a}, has: []string{a}},
		"wide a space": {lists: []string{"\u00a0" + a + "\u2003"}, has: []string{a}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			r, err := token.ParseRevocations(c.lists...)
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range c.has {
				if !r.Has(id) {
					t.Errorf("%s is not revoked", id)
				}
			}
			if diff := cmp.Diff(c.odd, r.Odd); diff != "" {
				t.Error(diff)
			}
			if r.Has("") || r.Has("x") {
				t.Error("something else is revoked")
			}
		})
	}
	if _, err := token.ParseRevocations(strings.Repeat("a", 5<<20)); !errs.Is(err, errs.Invalid) {
		t.Errorf("huge list: %v", err)
	}
}

func TestUnverified(t *testing.T) {
	good, err := signer(t).Dataplane(token.DataplaneClaims{Name: "a"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct{ in, source, want string }{
		"good":          {good, "f", ""},
		"white space":   {"\n " + good + "\r\n", "f", ""},
		"empty file":    {" \n", "/t", "token under file /t is empty"},
		"empty text":    {"", "", "token is empty"},
		"line break":    {good[:20] + "\n" + good[20:], "f", "Token shouldn't contain line breaks within the token, only at the start or end"},
		"not a token":   {"hello", "f", "not valid JWT token. Can't parse it.: token is malformed: token contains an invalid number of segments"},
		"long":          {strings.Repeat("a", 9000), "f", "token has 9000 bytes, the limit is 8192"},
		"not base64":    {"a.b.c", "f", "not valid JWT token. Can't parse it.: token is malformed: could not base64 decode header: illegal base64 data at input byte 0"},
		"parts missing": {good[:strings.LastIndex(good, ".")], "f", "not valid JWT token. Can't parse it.: token is malformed: token contains an invalid number of segments"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			got, err := token.Unverified(c.in, c.source)
			if c.want == "" {
				if err != nil || got != good {
					t.Fatalf("got %q, %v", got, err)
				}
				return
			}
			if want := "dataplane token is invalid, in Kubernetes you must mount a serviceAccount token, in universal you must start your proxy with a generated token.: " + c.want; text(err) != want {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
}

// FuzzParseKey is HRD-09: no text crashes the decoders of keys.
func FuzzParseKey(f *testing.F) {
	f.Add(block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(testKey())))
	f.Add(token.PublicPEM(&testKey().PublicKey))
	f.Add([]byte("hello"))
	f.Add([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0x02})
	f.Add(block("PRIVATE KEY", []byte{0x30, 0x03, 0x02, 0x01, 0x00}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := token.ParseSigningKey(data); err != nil && !errs.Is(err, errs.Invalid) {
			t.Error(err)
		}
		if _, err := token.ParsePublicKey(data); err != nil && !errs.Is(err, errs.Invalid) {
			t.Error(err)
		}
	})
}
