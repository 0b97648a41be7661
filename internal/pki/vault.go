package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kuma/internal/errs"
)

// RotationFile is where the work directory keeps an authority that is being
// rotated: both pairs and how far it has come. It is there only meanwhile.
const RotationFile = "kuma-cp-rotation.json"

// RetiredFile and RetiredKeyFile keep the pair that was retired last. Nothing reads
// them: they are for who finds that it was a mistake.
const (
	RetiredFile    = "kuma-cp-retired.crt"
	RetiredKeyFile = "kuma-cp-retired.key"
)

// maxState bounds what is read of a kept authority, in bytes.
const maxState = 1 << 20

// vaultTimeout bounds one call of a Vault.
const vaultTimeout = 30 * time.Second

// Vault keeps the authority as one secret text that several control planes
// share.
type Vault interface {
	// Load returns the text and its version; nothing and 0 where there is none.
	Load(ctx context.Context) (text []byte, version uint64, err error)
	// Save replaces the text of this version (0: there must be none) and returns
	// the new version. It is a Conflict where another has changed it.
	Save(ctx context.Context, text []byte, version uint64) (uint64, error)
}

// vault is where the authority is kept.
type vault interface {
	// load returns what is kept; its current authority is empty where nothing is.
	load() (authorities, uint64, error)
	save(s authorities, version uint64) (uint64, error)
}

// authority is one pair.
type authority struct {
	cert *x509.Certificate
	// text are the certificates as PEM: cert first, and whatever else a user
	// has put into the file.
	text    []byte
	key     crypto.Signer
	keyText []byte
	// serves: it is a pair of the original, served as it is.
	serves bool
}

// authorities are the control plane's authority and, while it is rotated, the
// next one. They are never changed once made.
type authorities struct {
	// Step is how far the rotation has come, Since when it got there.
	Step  Step
	Since time.Time
	// Automatic: the control plane began the rotation by itself.
	Automatic bool
	// Held is until when no rotation begins by itself, since somebody has aborted
	// one; zero where nobody has.
	Held time.Time

	current authority
	next    *authority
	// cross is the next authority's certificate signed by the current one, DER;
	// nil where that one has expired or may not sign.
	cross []byte
	// retired is the pair that was retired last, where a shared vault keeps it,
	// or is just to be kept.
	retired *keptPair
}

// kept is how authorities are written, as JSON.
type kept struct {
	Format    int       `json:"format"`
	Step      Step      `json:"step"`
	Since     time.Time `json:"since"`
	Automatic bool      `json:"automatic,omitempty"`
	Held      time.Time `json:"held,omitzero"`
	Current   keptPair  `json:"current"`
	Next      *keptPair `json:"next,omitempty"`
	Cross     string    `json:"cross,omitempty"`
	// Retired is not looked into.
	Retired *keptPair `json:"retired,omitempty"`
}

type keptPair struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// newAuthority makes a pair.
func newAuthority() (authority, error) {
	key, err := NewKey()
	if err != nil {
		return authority{}, err
	}
	id := make([]byte, 4)
	rand.Read(id) // never fails (crypto/rand)
	cert, keyText, err := selfSign(key, &x509.Certificate{
		Subject:    pkix.Name{Organization: []string{"Kuma"}, CommonName: "kuma-cp CA " + hex.EncodeToString(id)},
		KeyUsage:   x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:       true,
		MaxPathLen: -1,
	}, serverBackdate, caLife)
	if err != nil {
		return authority{}, err
	}
	return readAuthority(cert, keyText)
}

// readAuthority reads a pair from PEM. Expiry is not looked at.
func readAuthority(cert, key []byte) (authority, error) {
	certs, err := parseCerts(cert)
	if err != nil {
		return authority{}, err
	}
	a := authority{cert: certs[0], keyText: key}
	for _, c := range certs {
		a.text = append(a.text, encodeCert(c.Raw)...)
	}
	if a.key, err = parseKey(key); err != nil {
		return authority{}, err
	}
	if !samePublic(a.key.Public(), a.cert.PublicKey) {
		return authority{}, errs.New(errs.Invalid, "the key is not that of the certificate %q", named(a.cert))
	}
	if a.serves = serves(a.cert); a.serves {
		return a, nil
	}
	if err := CheckCA(a.cert); err != nil {
		return authority{}, errs.New(errs.Invalid, "neither an authority nor a server's certificate: %w", err)
	}
	return a, nil
}

// fits reports whether a server certificate can be kept: signed by the
// authority, for the hosts, with more than a third of its life left.
func (a authority) fits(leaf *x509.Certificate, hosts []string, exact bool, now, last time.Time) bool {
	if a.cert.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) != nil || !bytes.Equal(leaf.RawIssuer, a.cert.RawSubject) {
		return false
	}
	have, want := sans(leaf), slices.Clone(hosts)
	slices.Sort(have)
	slices.Sort(want)
	for _, h := range want {
		if _, ok := slices.BinarySearch(have, h); !ok {
			return false
		}
	}
	return (!exact || len(have) == len(want)) && !RenewalDue(leaf.NotBefore, leaf.NotAfter, now, last)
}

// signer is who signs server certificates now, and what is sent between the two.
func (s authorities) signer() (authority, [][]byte) {
	if s.Step != StepSwitched {
		return s.current, nil
	}
	if s.cross == nil {
		return *s.next, nil
	}
	return *s.next, [][]byte{s.cross}
}

// anchors are what users give to clients: from the preparation on both.
func (s authorities) anchors() []byte {
	if s.next == nil {
		return s.current.text
	}
	return slices.Concat(s.current.text, s.next.text)
}

// bundle is what proxies are sent: from the distribution on both.
func (s authorities) bundle() []byte {
	if s.Step == StepSteady || s.Step == StepPrepared {
		return s.current.text
	}
	return s.anchors()
}

// revisionOf names a bundle, so that all who hold the same one call it alike.
func revisionOf(bundle []byte) int64 {
	sum := sha256.Sum256(bundle)
	return int64(binary.BigEndian.Uint64(sum[:8]) >> 1)
}

func (a authority) kept() *keptPair { return &keptPair{string(a.text), string(a.keyText)} }

// encode writes authorities.
func (s authorities) encode() ([]byte, error) {
	k := kept{Format: 1, Step: s.Step, Since: s.Since.UTC(), Automatic: s.Automatic, Held: s.Held.UTC(), Current: *s.current.kept(), Retired: s.retired}
	if s.next != nil {
		k.Next = s.next.kept()
	}
	if s.cross != nil {
		k.Cross = string(encodeCert(s.cross))
	}
	text, err := json.MarshalIndent(k, "", "  ")
	if err == nil {
		_, err = decodeAuthorities(text) // what can't be read back must not be written
	}
	return text, err
}

// decodeAuthorities reads what encode wrote, and believes none of it.
func decodeAuthorities(text []byte) (authorities, error) {
	bad := func(format string, args ...any) (authorities, error) {
		return authorities{}, errs.New(errs.Invalid, format, args...)
	}
	if len(text) > maxState {
		return bad("it has %d bytes, the limit is %d", len(text), maxState)
	}
	var k kept
	if err := json.Unmarshal(text, &k); err != nil {
		return bad("not the JSON that was expected: %w", err)
	}
	if k.Format != 1 {
		return bad("it has the format %d, which this version does not know; use the version that wrote it, or a newer one", k.Format)
	}
	s := authorities{Step: k.Step, Since: k.Since, Automatic: k.Automatic, Held: k.Held, retired: k.Retired}
	var err error
	if s.current, err = readAuthority([]byte(k.Current.Cert), []byte(k.Current.Key)); err != nil {
		return bad("its present authority: %w", err)
	}
	switch k.Step {
	case StepSteady:
		if k.Next != nil || k.Cross != "" {
			return bad("there is a next authority, though nothing is being rotated")
		}
		return s, nil
	case StepPrepared, StepDistributed, StepSwitched:
	default:
		return bad("the step %q is not known", k.Step)
	}
	if k.Next == nil {
		return bad("there is no next authority, though a rotation is %s", k.Step)
	}
	next, err := readAuthority([]byte(k.Next.Cert), []byte(k.Next.Key))
	if err != nil {
		return bad("its next authority: %w", err)
	}
	if next.serves {
		return bad("its next authority is a server's certificate")
	}
	s.next = &next
	if k.Cross == "" {
		return s, nil
	}
	cross, err := parseCerts([]byte(k.Cross))
	if err != nil {
		return bad("the cross-signed certificate: %w", err)
	}
	c := cross[0]
	if !samePublic(next.key.Public(), c.PublicKey) || !bytes.Equal(c.RawSubject, next.cert.RawSubject) || c.CheckSignatureFrom(s.current.cert) != nil {
		return bad("the cross-signed certificate is not that of the next authority, signed by the present one")
	}
	s.cross = c.Raw
	return s, nil
}

// CheckKept returns why a text is no authority as a Vault keeps it, or nil.
func CheckKept(text []byte) error {
	_, err := decodeAuthorities(text)
	return err
}

// crossSign signs the next authority's certificate by the present one. It is nil
// where nobody would believe that: a server's certificate that may not sign, or
// no authority below it.
func (a authority) crossSign(next authority, now time.Time) ([]byte, error) {
	if CheckCA(a.cert) != nil || a.cert.MaxPathLenZero {
		return nil, nil
	}
	number, err := serial()
	if err != nil {
		return nil, err
	}
	n := next.cert
	start, end := now.Add(-serverBackdate), n.NotAfter
	if a.cert.NotBefore.After(start) {
		start = a.cert.NotBefore
	}
	if a.cert.NotAfter.Before(end) {
		end = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: number, RawSubject: n.RawSubject, SubjectKeyId: n.SubjectKeyId, NotBefore: start, NotAfter: end,
		KeyUsage: n.KeyUsage, IsCA: true, BasicConstraintsValid: true, MaxPathLen: -1,
	}, a.cert, n.PublicKey, a.key)
	if err != nil {
		return nil, errs.New(errs.Internal, "sign the next authority's certificate by the present one: %w", err)
	}
	return der, nil
}

// sharedVault keeps authorities in a Vault.
type sharedVault struct{ Vault }

func (v sharedVault) load() (authorities, uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), vaultTimeout)
	defer cancel()
	text, version, err := v.Load(ctx)
	if err != nil || version == 0 {
		return authorities{}, 0, err
	}
	s, err := decodeAuthorities(text)
	if err != nil {
		return s, version, errs.New(errs.KindOf(err), "the control plane's authority in the store: %w; restore the secret, or remove it to have a new one made (clients then need the new %s)", err, CAFile)
	}
	return s, version, nil
}

func (v sharedVault) save(s authorities, version uint64) (uint64, error) {
	text, err := s.encode()
	if err != nil {
		return 0, errs.New(errs.Internal, "write the control plane's authority: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), vaultTimeout)
	defer cancel()
	return v.Save(ctx, text, version)
}

// dirVault keeps authorities in a directory: kuma-cp.crt and kuma-cp.key, and
// RotationFile while they are rotated. That file is written first and decides;
// the others follow from it, whenever a writer was killed.
type dirVault struct{ dir string }

func (v dirVault) path(name string) string { return filepath.Join(v.dir, name) }

func (v dirVault) load() (authorities, uint64, error) {
	certFile, keyFile, rotation := v.path(CAFile), v.path(CAKeyFile), v.path(RotationFile)
	haveCert, haveKey := filled(certFile), filled(keyFile)
	if there(rotation) {
		if !haveCert && !haveKey { // the user wants a new authority, and gets one
			return authorities{}, 0, os.Remove(rotation)
		}
		s, err := v.rotation()
		if err != nil {
			return s, 0, err
		}
		if s.Step != StepSteady || s.Held.IsZero() || !haveCert || !haveKey {
			return s, 0, v.follow(s)
		}
		// An abort changes no key: another one was put there by somebody since.
		if key, err := readFile(keyFile); err != nil || bytes.Equal(key, s.current.keyText) {
			return s, 0, v.follow(s)
		}
		if err := os.Remove(rotation); err != nil {
			return authorities{}, 0, errs.New(errs.Internal, "end the rotation of the authority: %w", err)
		}
	}
	switch {
	case haveCert && !haveKey:
		return authorities{}, 0, errs.New(errs.Invalid, "%s is there, but its key %s is missing; bring the key back, or remove the certificate to have a new authority made (clients then need the new %s)", certFile, keyFile, CAFile)
	case !haveCert: // a key alone was left by a crash: nobody trusts it yet
		return authorities{}, 0, nil
	}
	s, err := v.pair()
	return s, 0, err
}

// rotation reads RotationFile.
func (v dirVault) rotation() (authorities, error) {
	file := v.path(RotationFile)
	text, err := readFile(file)
	if err != nil {
		return authorities{}, errs.New(errs.Invalid, "read the rotation of the authority: %w", err)
	}
	s, err := decodeAuthorities(text)
	if err != nil {
		return s, errs.New(errs.KindOf(err), "%s: %w; bring the file back, or remove it to go on with the authority in %s", file, err, CAFile)
	}
	return s, nil
}

// pair reads kuma-cp.crt and kuma-cp.key, which are there.
func (v dirVault) pair() (authorities, error) {
	certFile, keyFile := v.path(CAFile), v.path(CAKeyFile)
	mend := fmt.Sprintf("or remove both %s and %s to have new ones made (clients then need the new %s)", CAFile, CAKeyFile, CAFile)
	pair, text, err := LoadPair(certFile, keyFile)
	if err != nil {
		return authorities{}, errs.New(errs.KindOf(err), "%w; %s", err, mend)
	}
	keyText, err := readFile(keyFile)
	if err != nil {
		return authorities{}, errs.New(errs.Invalid, "read the key: %w", err)
	}
	s := authorities{Step: StepSteady, Since: pair.Leaf.NotBefore}
	if s.current, err = readAuthority(text, keyText); err != nil {
		return s, errs.New(errs.KindOf(err), "%s: %w; %s", certFile, err, mend)
	}
	return s, nil
}

// CheckAuthority tells whether OpenControlPlane could use the authority that a
// directory holds, and changes nothing. It is content where there is none, or one
// that lacks its key or has ended: another may come from a Vault. Errors are
// those of OpenControlPlane.
func CheckAuthority(dir string) error {
	v := dirVault{dir}
	if v.lacks() != "" {
		return nil
	}
	read := v.pair
	if there(v.path(RotationFile)) {
		read = v.rotation
	}
	_, err := read()
	return err
}

// oldSuffix is for files that are no longer used, and kept for a person.
const oldSuffix = ".old"

// nothing is what a directory lacks that holds no authority at all.
const nothing = "there is none"

// lacks says why a directory holds no authority that could be taken over, where
// that is no fault of anybody; empty where it holds one, or what load must judge.
func (v dirVault) lacks() string {
	certFile, keyFile := v.path(CAFile), v.path(CAKeyFile)
	haveCert, haveKey := filled(certFile), filled(keyFile)
	switch {
	case !haveCert:
		return nothing
	case there(v.path(RotationFile)):
		return ""
	case !haveKey:
		return "its key " + CAKeyFile + " is missing"
	}
	text, err := readFile(certFile)
	if err != nil {
		return ""
	}
	keyText, err := readFile(keyFile)
	if err != nil {
		return ""
	}
	certs, err := parseCerts(text)
	if err != nil {
		return ""
	}
	key, err := parseKey(keyText)
	if err != nil {
		return ""
	}
	switch end := certs[0].NotAfter; {
	case !samePublic(key.Public(), certs[0].PublicKey):
		return CAKeyFile + " is not its key"
	case time.Now().After(end):
		return "it ended at " + end.UTC().Format(time.RFC3339)
	}
	return ""
}

// follow makes the files say what the rotation does.
func (v dirVault) follow(s authorities) error {
	if have, err := readFile(v.path(CAKeyFile)); err != nil || !bytes.Equal(have, s.current.keyText) {
		if err := writeFile(v.path(CAKeyFile), s.current.keyText); err != nil {
			return err
		}
	}
	if have, err := readFile(v.path(CAFile)); err != nil || !bytes.Equal(have, s.anchors()) {
		if err := writeFile(v.path(CAFile), s.anchors()); err != nil {
			return err
		}
	}
	if s.Step != StepSteady || time.Now().Before(s.Held) {
		return nil
	}
	err := os.Remove(v.path(RotationFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.Internal, "end the rotation of the authority: %w", err)
	}
	return nil
}

func (v dirVault) save(s authorities, _ uint64) (uint64, error) {
	if s.Step == StepSteady && !filled(v.path(CAFile)) && !there(v.path(RotationFile)) {
		return 0, writePair(v.path(CAFile), v.path(CAKeyFile), s.current.text, s.current.keyText)
	}
	if old := s.retired; old != nil { // beside the others, before its own files are written over
		if err := writePair(v.path(RetiredFile), v.path(RetiredKeyFile), []byte(old.Cert), []byte(old.Key)); err != nil {
			return 0, err
		}
		s.retired = nil
	}
	text, err := s.encode()
	if err != nil {
		return 0, errs.New(errs.Internal, "write the rotation of the authority: %w", err)
	}
	if err := writeFile(v.path(RotationFile), text); err != nil {
		return 0, err
	}
	return 0, v.follow(s)
}
