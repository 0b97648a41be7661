package token

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"

	"kuma/internal/errs"
)

const (
	minBits = 2048
	maxBits = 8192
	// maxKeyText is the longest key that is read, in bytes. A private key of
	// 8192 bits takes about 6,400 as PEM.
	maxKeyText = 32 << 10
	// maxKID is the longest key id, in bytes.
	maxKID = 253
)

// NewSigningKey makes an RSA key of 2048 bits and returns it as PEM, PKCS#1
// (RFC 8017), as signing keys are stored.
func NewSigningKey() ([]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, minBits)
	if err != nil {
		return nil, errs.New(errs.Internal, "make a signing key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), nil
}

// ParseSigningKey reads a private RSA key of 2048 to 8192 bits: PEM with
// PKCS#1 or PKCS#8, or the bare DER of PKCS#1. Errors are Invalid and never
// show the key.
func ParseSigningKey(data []byte) (*rsa.PrivateKey, error) {
	der, kind, err := unwrap(data, "RSA PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	switch kind {
	case "RSA PRIVATE KEY":
	case "PRIVATE KEY":
		var p struct {
			Version   int
			Algorithm pkix.AlgorithmIdentifier
			Key       []byte
			Rest      asn1.RawValue `asn1:"optional"`
		}
		if _, err := asn1.Unmarshal(der, &p); err != nil {
			return nil, errs.New(errs.Invalid, "signing key is not a PKCS#8 private key: %w", err)
		}
		if !p.Algorithm.Algorithm.Equal(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}) {
			return nil, errs.New(errs.Invalid, "signing key must be an RSA key; make one with: kumactl generate signing-key --format pem")
		}
		der = p.Key
	default:
		return nil, errs.New(errs.Invalid, `invalid key encoding %q; a signing key is PEM of type "RSA PRIVATE KEY" or "PRIVATE KEY"`, kind)
	}
	// The size is looked at first: checking a private key costs time that
	// grows with the cube of its size.
	var head struct {
		Version int
		N       *big.Int
	}
	if err := firstTwo(der, &head.Version, &head.N); err != nil {
		return nil, errs.New(errs.Invalid, "signing key is not an RSA private key: %w", err)
	}
	if err := checkBits(head.N.BitLen()); err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return nil, errs.New(errs.Invalid, "signing key is not a sound RSA private key: %w", err)
	}
	return key, nil
}

// ParsePublicKey reads a public RSA key of 2048 to 8192 bits from PEM: PKCS#1
// ("RSA PUBLIC KEY") or PKIX ("PUBLIC KEY"). Errors are Invalid.
func ParsePublicKey(data []byte) (*rsa.PublicKey, error) {
	der, kind, err := unwrap(data, "")
	if err != nil {
		return nil, err
	}
	var key *rsa.PublicKey
	switch kind {
	case "RSA PUBLIC KEY":
		if key, err = x509.ParsePKCS1PublicKey(der); err != nil {
			return nil, errs.New(errs.Invalid, "public key is not PKCS#1: %w", err)
		}
	case "PUBLIC KEY":
		any, err := x509.ParsePKIXPublicKey(der)
		if err != nil {
			return nil, errs.New(errs.Invalid, "public key is not PKIX: %w", err)
		}
		var ok bool
		if key, ok = any.(*rsa.PublicKey); !ok {
			return nil, errs.New(errs.Invalid, "public key must be an RSA key, it is a %T", any)
		}
	default:
		return nil, errs.New(errs.Invalid, `invalid key encoding %q; a public key is PEM of type "RSA PUBLIC KEY" or "PUBLIC KEY"`, kind)
	}
	if err := checkBits(key.N.BitLen()); err != nil {
		return nil, err
	}
	return key, nil
}

// PublicPEM returns a public key as PEM of PKCS#1, the form that operators
// put into a control plane's configuration.
func PublicPEM(key *rsa.PublicKey) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(key)})
}

// unwrap returns the DER in a PEM text and the type of its block. Data that
// is not PEM is taken as bare DER of the type bare, if that is not empty.
func unwrap(data []byte, bare string) (der []byte, kind string, err error) {
	if len(data) > maxKeyText {
		return nil, "", errs.New(errs.Invalid, "key has %d bytes, the limit is %d", len(data), maxKeyText)
	}
	if block, _ := pem.Decode(data); block != nil {
		return block.Bytes, block.Type, nil
	}
	if bare == "" || len(data) == 0 || data[0] != 0x30 { // 0x30: a DER sequence
		return nil, "", errs.New(errs.Invalid, "key is not PEM: it must start with a line such as -----BEGIN RSA PRIVATE KEY----- and be complete")
	}
	return data, bare, nil
}

// firstTwo reads the first two integers of a DER sequence.
func firstTwo(der []byte, version *int, n **big.Int) error {
	var seq asn1.RawValue
	if _, err := asn1.Unmarshal(der, &seq); err != nil {
		return err
	}
	if seq.Tag != asn1.TagSequence || !seq.IsCompound {
		return errors.New("not a sequence")
	}
	rest, err := asn1.Unmarshal(seq.Bytes, version)
	if err != nil {
		return err
	}
	_, err = asn1.Unmarshal(rest, n)
	return err
}

func checkBits(bits int) error {
	if bits < minBits || bits > maxBits {
		return errs.New(errs.Invalid, "RSA key has %d bits; it must have %d to %d", bits, minBits, maxBits)
	}
	return nil
}

// normalKID refuses ids that no key can have and strips leading zeros from a
// decimal, so that "0002" and "2" are one key.
func normalKID(kid string) (string, error) {
	if kid == "" {
		return "", errors.New("is empty")
	}
	if len(kid) > maxKID {
		return "", fmt.Errorf("has %d bytes, the limit is %d", len(kid), maxKID)
	}
	decimal := true
	for _, r := range kid {
		if r <= ' ' || r > '~' {
			return "", fmt.Errorf("holds the character %q", r)
		}
		decimal = decimal && r >= '0' && r <= '9'
	}
	if decimal {
		if kid = strings.TrimLeft(kid, "0"); kid == "" {
			kid = "0"
		}
	}
	return kid, nil
}

// Prefixes of the names of secrets that hold signing keys and revocations.
const (
	UserKeyPrefix        = "user-token-signing-key"
	ZoneKeyPrefix        = "zone-token-signing-key"
	ZonePublicKeyPrefix  = "zone-token-signing-public-key"
	UserRevocations      = "user-token-revocations"
	ZoneRevocations      = "zone-token-revocations"
	dataplaneKeyPrefix   = "dataplane-token-signing-key-"
	dataplaneRevocations = "dataplane-token-revocations-"
)

// DataplaneKeyPrefix is the prefix of the names of a mesh's signing keys.
func DataplaneKeyPrefix(mesh string) string { return dataplaneKeyPrefix + mesh }

// DataplaneRevocations is the name of the secret that lists a mesh's revoked
// dataplane tokens. Both the mesh's own Secret and the GlobalSecret of this
// name count.
func DataplaneRevocations(mesh string) string { return dataplaneRevocations + mesh }

// KeyName is the name of the secret with the key of a serial.
func KeyName(prefix string, serial int) string { return prefix + "-" + strconv.Itoa(serial) }

// Serial returns the serial in the name of a signing key, "<prefix>-<n>". A
// suffix that is not a number counts as 0, as the contract says. It is false
// for names without the prefix.
func Serial(prefix, name string) (int, bool) {
	suffix, ok := strings.CutPrefix(name, prefix+"-")
	if !ok || suffix == "" {
		return 0, false
	}
	n, err := strconv.ParseUint(suffix, 10, 31)
	if err != nil {
		return 0, true
	}
	return int(n), true
}

// Latest returns the name and serial of the key that signs: the one with the
// highest serial. Where two names have one serial ("-2" and "-0002"), the
// plain one wins. It is false if no name has the prefix.
func Latest(prefix string, names []string) (name string, serial int, ok bool) {
	serial = -1
	for _, n := range names {
		if s, is := Serial(prefix, n); is {
			serial = max(serial, s)
		}
	}
	if serial < 0 {
		return "", 0, false
	}
	name, ok = Find(prefix, names, strconv.Itoa(serial))
	return name, serial, ok
}

// Find returns the name of the key that a token's kid means: the one with
// that serial, however the number in its name is padded.
func Find(prefix string, names []string, kid string) (name string, ok bool) {
	var found []string
	for _, n := range names {
		if s, is := Serial(prefix, n); is && strconv.Itoa(s) == kid {
			if n == KeyName(prefix, s) {
				return n, true
			}
			found = append(found, n)
		}
	}
	if len(found) == 0 {
		return "", false
	}
	return slices.Min(found), true
}

// MissingKey is the contract's error for a key that is not there; its kind is
// NotFound. The mesh is empty for keys that are GlobalSecrets.
func MissingKey(kid, prefix, mesh string) error {
	where := fmt.Sprintf("GlobalSecret of name %q is not found", prefix+"-"+kid)
	if mesh != "" {
		where = fmt.Sprintf("Secret of name %q in mesh %q is not found", prefix+"-"+kid, mesh)
	}
	return errs.New(errs.NotFound, "there is no signing key with KID %s. %s. If signing key was rotated, regenerate the token", kid, where)
}
