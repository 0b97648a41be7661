package pki

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"time"

	"kuma/internal/errs"
)

// GenerateTLS makes a certificate that is its own authority, and its key, as
// PEM: what `kumactl generate tls-certificate` saves. The kind is "server" or
// "client", the key type "rsa" (2048 bits) or "ecdsa" (P-256). Hosts are DNS
// names and IP addresses; the first is also the subject's CN, since some
// clients want a subject. It is valid for ten years.
func GenerateTLS(kind string, hosts []string, keyType string) (cert, key []byte, err error) {
	var usage x509.ExtKeyUsage
	switch kind {
	case "server":
		usage = x509.ExtKeyUsageServerAuth
	case "client":
		usage = x509.ExtKeyUsageClientAuth
	default:
		return nil, nil, errs.New(errs.Invalid, "invalid certificate type %q", kind)
	}
	dns, ips, err := splitHosts(hosts)
	if err != nil {
		return nil, nil, err
	}
	var k Key
	switch keyType {
	case "rsa":
		k, err = newRSAKey(2048)
	case "ecdsa":
		k, err = NewKey()
	default:
		return nil, nil, errs.New(errs.Invalid, "invalid key type %q", keyType)
	}
	if err != nil {
		return nil, nil, err
	}
	return selfSign(k, &x509.Certificate{
		Subject:     commonName(hosts[0]),
		DNSNames:    dns,
		IPAddresses: ips,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
		IsCA:        true,
	}, 5*time.Minute, 10*Year)
}

// commonName makes a subject from a host; a CN has at most 64 characters
// (RFC 5280, ub-common-name).
func commonName(host string) pkix.Name { return pkix.Name{CommonName: host[:min(len(host), 64)]} }

// splitHosts sorts hosts into DNS names and addresses, without repeats.
func splitHosts(hosts []string) (dns []string, ips []net.IP, err error) {
	if len(hosts) == 0 {
		return nil, nil, errs.New(errs.Invalid, "a certificate needs a host name")
	}
	seen := map[string]bool{}
	for _, h := range hosts {
		ip := net.ParseIP(h)
		if ip != nil {
			h = ip.String()
		} else if !plainHost(h) {
			return nil, nil, errs.New(errs.Invalid, "%.80q is neither a host name nor an IP address", h)
		}
		switch {
		case seen[h]:
		case ip != nil:
			ips = append(ips, ip)
		default:
			dns = append(dns, h)
		}
		seen[h] = true
	}
	return dns, ips, nil
}

// plainHost accepts what can stand in a certificate as a DNS name, wildcards
// included.
func plainHost(h string) bool {
	if h == "" || len(h) > 253 || h[0] == '.' || h[len(h)-1] == '.' {
		return false
	}
	for _, c := range []byte(h) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' && c != '*' {
			return false
		}
	}
	return true
}
