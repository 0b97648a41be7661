package pki

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"strings"
	"time"

	"kuma/internal/errs"
)

// maxHosts is how many names one certificate may have: more make a handshake
// that servers refuse.
const maxHosts = 500

// GenerateTLS makes a certificate that is its own authority, and its key, as
// PEM: what `kumactl generate tls-certificate` saves. The kind is "server" or
// "client", the key type "rsa" (2048 bits) or "ecdsa" (P-256). Hosts are DNS
// names, a wildcard as their first label included, and IP addresses; the first
// is also the subject's CN, since some clients want a subject. A client may
// have none: its subject is then "client". It is valid for ten years. Errors
// are Invalid.
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
	var dns []string
	var ips []net.IP
	subject := pkix.Name{CommonName: "client"}
	if len(hosts) > 0 || kind != "client" {
		if hosts, err = namedHosts(hosts); err != nil {
			return nil, nil, err
		}
		if dns, ips, err = splitHosts(hosts); err != nil {
			return nil, nil, err
		}
		subject = commonName(hosts[0])
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
		Subject:     subject,
		DNSNames:    dns,
		IPAddresses: ips,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
		IsCA:        true,
	}, 5*time.Minute, 10*Year)
}

// namedHosts checks hosts that a user typed more closely than those of the
// machine: what no client would ever match is refused.
func namedHosts(hosts []string) ([]string, error) {
	if len(hosts) > maxHosts {
		return nil, errs.New(errs.Invalid, "there are %d host names, the limit is %d", len(hosts), maxHosts)
	}
	out := make([]string, len(hosts))
	for i, h := range hosts {
		h = strings.TrimSpace(h)
		out[i] = h
		if net.ParseIP(h) != nil {
			continue
		}
		for j, label := range strings.Split(h, ".") {
			switch {
			case label == "", len(label) > 63, j > 0 && label == "*", label != "*" && strings.Contains(label, "*"), h == "*":
				return nil, errs.New(errs.Invalid, "%.80q is neither a host name nor an IP address: it must be a name such as cp.example or *.cp.example, without scheme and port", h)
			}
		}
	}
	return out, nil
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
			return nil, nil, errs.New(errs.Invalid, "%.80q is neither a host name nor an IP address; give it without scheme and port", h)
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
