package dp

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kuma/proto/linkpb"
)

func wants(pairs ...string) (out []*linkpb.Identities_Identity) {
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, &linkpb.Identities_Identity{Secret: pairs[i], Revision: pairs[i+1]})
	}
	return out
}

// answer makes the certificate that a control plane would give.
func (a *authority) answer(t *testing.T, r *linkpb.SigningRequest, renew time.Time) *linkpb.Certificate {
	t.Helper()
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(csr.URIs)+len(csr.DNSNames)+len(csr.IPAddresses) != 0 || csr.Subject.String() != "" {
		t.Errorf("the request carries names: %v %v", csr.URIs, csr.Subject)
	}
	if k, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		t.Errorf("the request's key is %T", csr.PublicKey)
	}
	der, err := a.issue(csr.PublicKey, "spiffe://default/web", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return &linkpb.Certificate{Secret: r.GetSecret(), Revision: r.GetRevision(), Chain: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), RenewAt: renew.Unix()}
}

func (k *keyring) only(t *testing.T) *linkpb.SigningRequest {
	t.Helper()
	list, _, err := k.due(time.Now())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d requests (%v), want 1", len(list), err)
	}
	return list[0]
}

func (k *keyring) none(t *testing.T) {
	t.Helper()
	if list, _, err := k.due(time.Now()); err != nil || len(list) != 0 {
		t.Fatalf("%d requests (%v), want none", len(list), err)
	}
}

func TestKeyring(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		k := newKeyring()
		name := map[string]bool{"id": true}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		have := func() secret { m, _ := k.get(name); return m["id"] }

		must(k.want(wants("id", "1"), time.Now()))
		first := k.only(t)
		k.none(t) // it is under way
		must(k.put(a.answer(t, first, time.Now().Add(time.Hour)), time.Now()))
		one := have()
		pair, err := tls.X509KeyPair(one.chain, one.key)
		must(err)
		if _, ok := pair.PrivateKey.(*ecdsa.PrivateKey); !ok {
			t.Errorf("key is %T", pair.PrivateKey)
		}

		// The same list again changes nothing; a late copy of an answer neither.
		must(k.want(wants("id", "1"), time.Now()))
		k.none(t)
		must(k.put(a.answer(t, first, time.Now()), time.Now()))
		if have().version != one.version {
			t.Error("an answer without a request was taken")
		}

		// Renewal: a new key, and the old certificate until the new one is there.
		time.Sleep(time.Hour)
		second := k.only(t)
		if string(second.GetCsr()) == string(first.GetCsr()) || have().version != one.version {
			t.Error("renewal does not make a new key, or drops the old certificate")
		}
		must(k.put(a.answer(t, second, time.Now().Add(time.Hour)), time.Now()))
		two := have()
		if two.version == one.version || string(two.key) == string(one.key) {
			t.Error("the renewed certificate was not taken")
		}

		// Another revision asks at once; an answer to the old one is not taken.
		must(k.want(wants("id", "2"), time.Now()))
		third := k.only(t)
		old := a.answer(t, third, time.Now())
		old.Revision = "1"
		must(k.put(old, time.Now()))
		if have().version != two.version {
			t.Error("a certificate of another revision was taken")
		}

		// No certificate: asked again after the time that the control plane says.
		err = k.put(&linkpb.Certificate{Secret: "id", Revision: "2", Error: "no authority", RetryAfterMs: 3000}, time.Now())
		if err == nil || !strings.Contains(err.Error(), "no authority") {
			t.Errorf("error: %v", err)
		}
		k.none(t)
		time.Sleep(3 * time.Second)
		fourth := k.only(t)

		// A certificate for another key, or none at all, is refused.
		stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		der, err := a.issue(stranger.Public(), "", time.Hour)
		must(err)
		bad := &linkpb.Certificate{Secret: "id", Revision: "2", Chain: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
		if err := k.put(bad, time.Now()); err == nil || !strings.Contains(err.Error(), "another key") {
			t.Errorf("error: %v", err)
		}
		time.Sleep(5 * time.Second)
		_ = fourth
		k.only(t)
		if err := k.put(&linkpb.Certificate{Secret: "id", Revision: "2", Chain: []byte("x")}, time.Now()); err == nil || !strings.Contains(err.Error(), "not PEM") {
			t.Errorf("error: %v", err)
		}
		if have().version != two.version {
			t.Error("a bad answer replaced a good certificate")
		}

		// A link that broke under a request: asked again on the next one.
		time.Sleep(5 * time.Second)
		k.only(t)
		k.none(t)
		k.reconnected(time.Now())
		k.only(t)

		// What is not listed any more is gone, and readers are told.
		_, changed := k.get(name)
		must(k.want(nil, time.Now()))
		<-changed
		if have().version != "" {
			t.Error("a certificate that is not listed is still there")
		}
		if err := k.want(make([]*linkpb.Identities_Identity, maxSecrets+1), time.Now()); err == nil {
			t.Error("no limit on the number of certificates")
		}
	})
}
