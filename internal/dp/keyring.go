package dp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"sync"
	"time"

	"kuma/internal/errs"
	"kuma/proto/linkpb"
)

// keyring holds this proxy's private keys and certificates, in memory only. The
// link fills it, the secret server reads it.
type keyring struct {
	mu      sync.Mutex
	entries map[string]*entry
	// changed is closed and replaced whenever something in it changes.
	changed chan struct{}
	count   uint64
}

// entry is one secret. The certificate in use stays until another takes its
// place.
type entry struct {
	revision string
	// next is the key of the request that is under way, if key is set, and when
	// to make the next request else.
	next    *ecdsa.PrivateKey
	askAt   time.Time
	current secret
}

// secret is a certificate with its key, both PEM.
type secret struct {
	chain, key []byte
	version    string
	notAfter   time.Time
}

// maxSecrets bounds how many certificates a control plane may ask for.
const maxSecrets = 256

// answerWait is how long an answer to a request may take.
const answerWait = 30 * time.Second

func newKeyring() *keyring {
	return &keyring{entries: map[string]*entry{}, changed: make(chan struct{})}
}

// want takes the list of secrets over that the control plane says are needed.
// What is no longer listed is dropped; a changed revision is asked for anew.
func (k *keyring) want(list []*linkpb.Identities_Identity, now time.Time) error {
	if len(list) > maxSecrets {
		return errs.New(errs.Invalid, "the control plane asks for %d certificates, the limit is %d", len(list), maxSecrets)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	keep := map[string]*entry{}
	for _, id := range list {
		e := k.entries[id.GetSecret()]
		if e == nil {
			e = &entry{askAt: now, revision: id.GetRevision()}
		}
		if e.revision != id.GetRevision() {
			e.revision, e.askAt, e.next = id.GetRevision(), now, nil
		}
		keep[id.GetSecret()] = e
	}
	k.entries = keep
	k.touch()
	return nil
}

// reconnected forgets the requests that went out over a link that broke.
func (k *keyring) reconnected(now time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, e := range k.entries {
		if e.next != nil {
			e.next, e.askAt = nil, now
		}
	}
}

// due returns the requests to send now, each with a key made for it, and when
// the next one will be due.
func (k *keyring) due(now time.Time) (out []*linkpb.SigningRequest, next time.Time, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, e := range k.entries {
		if !e.askAt.After(now) {
			key, csr, err := newRequest()
			if err != nil {
				return nil, time.Time{}, err
			}
			e.next, e.askAt = key, now.Add(answerWait)
			out = append(out, &linkpb.SigningRequest{Secret: name, Revision: e.revision, Csr: csr})
		}
		if next.IsZero() || e.askAt.Before(next) {
			next = e.askAt
		}
	}
	return out, next, nil
}

func newRequest() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, errs.New(errs.Internal, "make a private key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, errs.New(errs.Internal, "make a certificate request: %w", err)
	}
	return key, csr, nil
}

// put takes a certificate. It must be for the key that was made for it; an
// answer to a request that is no longer wanted is dropped without an error.
func (k *keyring) put(c *linkpb.Certificate, now time.Time) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	e := k.entries[c.GetSecret()]
	if e == nil || e.next == nil || e.revision != c.GetRevision() {
		return nil
	}
	key := e.next
	again := func(err error, after time.Duration) error {
		e.next, e.askAt = nil, now.Add(max(after, 100*time.Millisecond))
		return err
	}
	if c.GetError() != "" {
		return again(errs.New(errs.Unavailable, "the control plane gave no certificate for %s: %s", c.GetSecret(), c.GetError()), time.Duration(c.GetRetryAfterMs())*time.Millisecond)
	}
	notAfter, err := matches(c.GetChain(), key)
	if err != nil {
		return again(errs.New(errs.Invalid, "the control plane's certificate for %s can't be used: %w", c.GetSecret(), err), 5*time.Second)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return again(errs.New(errs.Internal, "write a private key: %w", err), 5*time.Second)
	}
	renew := time.Unix(c.GetRenewAt(), 0)
	if soonest := now.Add(time.Second); renew.Before(soonest) {
		renew = soonest
	}
	k.count++
	e.next, e.askAt = nil, renew
	e.current = secret{
		chain: bytes.Clone(c.GetChain()), notAfter: notAfter, version: fmt.Sprint(k.count),
		key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	}
	k.touch()
	return nil
}

// matches checks that a chain starts with a certificate for the key.
func matches(chain []byte, key *ecdsa.PrivateKey) (notAfter time.Time, err error) {
	block, _ := pem.Decode(chain)
	if block == nil || block.Type != "CERTIFICATE" {
		return time.Time{}, fmt.Errorf("it is not PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return time.Time{}, err
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !key.PublicKey.Equal(pub) {
		return time.Time{}, fmt.Errorf("it is for another key")
	}
	return leaf.NotAfter, nil
}

func (k *keyring) touch() {
	close(k.changed)
	k.changed = make(chan struct{})
}

// get returns the secrets of these names that are there, and a channel that is
// closed when that may have changed.
func (k *keyring) get(names map[string]bool) (map[string]secret, <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[string]secret{}
	for n := range names {
		if e := k.entries[n]; e != nil && e.current.version != "" {
			out[n] = e.current
		}
	}
	return out, k.changed
}
