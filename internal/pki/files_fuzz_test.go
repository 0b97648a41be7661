package pki

import (
	"testing"
	"time"

	"kuma/internal/errs"
)

// FuzzCertificateFiles: whatever is in the two files, the answer is a pair that
// can be shown now or an error of kind Invalid.
func FuzzCertificateFiles(f *testing.F) {
	cert, key, err := GenerateTLS("server", []string{"localhost"}, "ecdsa")
	if err != nil {
		f.Fatal(err)
	}
	other, _, err := GenerateTLS("client", []string{"localhost"}, "ecdsa")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(cert, key)
	f.Add(append(append([]byte("words\n"), cert...), other...), key)
	f.Add(key, cert)
	f.Add(append(append([]byte{}, cert...), key...), []byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	now := time.Now()
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		for _, names := range [][2]string{{"cert.pem", "key.pem"}, {"both.pem", "both.pem"}} {
			s, err := checkPair(ofServer, content{names[0], cert, 0o600}, content{names[1], key, 0o600}, now)
			switch {
			case err != nil:
				if !errs.Is(err, errs.Invalid) {
					t.Errorf("error %v is not of kind Invalid", err)
				}
			case len(s.sans) == 0 || now.After(s.end) || now.Before(s.pair.Leaf.NotBefore) || len(s.pair.Certificate) == 0 || s.pair.PrivateKey == nil:
				t.Errorf("a pair that can't be shown: %+v", s)
			}
		}
		if _, _, err := new(Pool).load([]content{{"ca.pem", cert, 0o600}}, now); err != nil && !errs.Is(err, errs.Invalid) {
			t.Errorf("error %v is not of kind Invalid", err)
		}
	})
}
