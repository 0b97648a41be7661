package pki

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Gap is a server's pair whose file ends with a certificate of an issuer that
// is neither in the file nor known here. Either the file lacks an intermediate
// authority, and clients refuse the server; or a private root signed the last
// certificate, and clients have it: that can't be told from here.
type Gap struct {
	// Name is that of the pair's Expiry.
	Name string
	// File is the certificate file.
	File string
	// Subject is that of the file's last certificate, Issuer that of the
	// certificate that may be missing.
	Subject, Issuer string
	// URL is where the last certificate says that its issuer's is; empty where
	// it does not.
	URL string
}

// String says what is missing and how to mend it.
func (g Gap) String() string {
	from := ""
	if g.URL != "" {
		from = fmt.Sprintf(" (the certificate says that it is at %.300q)", g.URL)
	}
	return fmt.Sprintf("certificate file %s: its last certificate (%.300s) was issued by %.300q, which is not in the file and no authority that is known here; clients that have only the root above it refuse the server. Append the issuer's certificate to the file%s; nothing is to be done where clients have the issuer itself as their authority",
		g.File, g.Subject, g.Issuer, from)
}

// Gaps lists the servers' pairs whose chain is not known to be complete: empty
// where FilesConfig has no Known.
func (f *Files) Gaps() []Gap {
	f.mu.Lock()
	all := slices.Clone(f.watched)
	f.mu.Unlock()
	var out []Gap
	for _, w := range all {
		if p, ok := w.of.(*Pair); ok {
			if g := f.gap(p, time.Now()); g != nil {
				out = append(out, *g)
			}
		}
	}
	return out
}

// gap returns what a pair's file lacks, or nil.
func (f *Files) gap(p *Pair, now time.Time) *Gap {
	if f.cfg.Known == nil || p.whose == ofClient { // those who verify a client are elsewhere
		return nil
	}
	last := p.now.Load().last
	if bytes.Equal(last.RawIssuer, last.RawSubject) && last.CheckSignature(last.SignatureAlgorithm, last.RawTBSCertificate, last.Signature) == nil {
		return nil // it signed itself: there is nothing above it
	}
	known := x509.NewCertPool()
	add := func(certs []*x509.Certificate) {
		for _, c := range certs {
			if cannotSign(c) == "" {
				known.AddCert(c)
			}
		}
	}
	add(f.cfg.Known())
	f.mu.Lock()
	for _, w := range f.watched {
		switch of := w.of.(type) {
		case *Pool:
			add(of.Certificates())
		case *Anchors:
			add(of.Certificates())
		}
	}
	f.mu.Unlock()
	if !unknown(last, known, now) {
		return nil
	}
	if machine, err := x509.SystemCertPool(); err == nil && !unknown(last, machine, now) {
		return nil
	}
	g := &Gap{Name: p.name, File: p.certFile, Subject: called(last), Issuer: last.Issuer.String()}
	if len(last.IssuingCertificateURL) > 0 {
		g.URL = last.IssuingCertificateURL[0]
	}
	return g
}

// unknown reports whether none of these authorities signed a certificate. What
// else may be wrong with it is not asked here.
func unknown(c *x509.Certificate, among *x509.CertPool, now time.Time) bool {
	_, err := c.Verify(x509.VerifyOptions{Roots: among, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	_, is := errors.AsType[x509.UnknownAuthorityError](err)
	return is
}
