package pki

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"
)

// DescribeVerify says, for a TLS client's error, what its verification of the
// server saw: the name that was asked for, the certificate that the server
// showed (subject, issuer, names, end), and by what it was verified: trusted is
// the caller's word for that, such as the name of a file. It is empty where the
// error is another one. What the server says of itself is quoted and cut.
func DescribeVerify(err error, asked, trusted string) string {
	e, ok := errors.AsType[*tls.CertificateVerificationError](err)
	if !ok {
		return ""
	}
	if len(e.UnverifiedCertificates) == 0 {
		return fmt.Sprintf("it was asked for as %q and verified by %s", asked, trusted)
	}
	leaf := e.UnverifiedCertificates[0]
	var names []string
	for _, n := range leaf.DNSNames {
		if len(n) > 253 || strings.ContainsFunc(n, func(r rune) bool { return !strings.ContainsRune(hostLetters, r) }) {
			n = fmt.Sprintf("%.253q", n)
		}
		names = append(names, n)
	}
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	for _, u := range leaf.URIs {
		names = append(names, fmt.Sprintf("%.253q", u))
	}
	const most = 10
	switch {
	case len(names) == 0:
		names = []string{"no name at all"}
	case len(names) > most:
		names = append(names[:most], fmt.Sprintf("and %d more", len(names)-most))
	}
	return fmt.Sprintf("it was asked for as %q and verified by %s; the certificate seen is of %.300q, issued by %.300q, for %s, until %s",
		asked, trusted, leaf.Subject.String(), leaf.Issuer.String(), strings.Join(names, ", "), leaf.NotAfter.UTC().Format(time.RFC3339))
}

// hostLetters are those of a DNS name that needs no quotation marks.
const hostLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._*"
