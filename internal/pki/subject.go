package pki

import (
	"crypto/x509"
	"encoding/asn1"
	"maps"
	"net/url"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kuma/internal/errs"
)

const (
	maxNames   = 1000 // URIs in one certificate
	maxNameLen = 2048 // bytes of one URI; SPIFFE-ID 2.3 says 2048
)

// Subject is who a certificate is for. It is made by NewSubject or
// NewWorkload, from the Dataplane that the control plane holds for an
// authenticated proxy. The zero value is refused.
type Subject struct{ uris []*url.URL }

// NewSubject makes the subject of a classic mesh certificate: a SPIFFE id
// spiffe://<mesh>/<service> for each distinct service, in the given order,
// and then kuma://<tag>/<value> for each distinct value of each tag, sorted.
// There must be a service. Errors are Invalid.
func NewSubject(mesh string, services []string, tags map[string][]string) (Subject, error) {
	if len(services) == 0 {
		return Subject{}, errs.New(errs.Invalid, "a certificate needs a service: the Dataplane has no tag kuma.io/service and no label kuma.io/workload")
	}
	domain, err := spiffeid.TrustDomainFromString(mesh)
	if err != nil || domain.Name() != mesh {
		return Subject{}, errs.New(errs.Invalid, "mesh %q can't be a SPIFFE trust domain: use lower-case letters, digits, dots, dashes and underscores", mesh)
	}
	var names []string
	for _, service := range services {
		id, err := spiffeid.FromSegments(domain, service)
		if err != nil {
			return Subject{}, errs.New(errs.Invalid, "service %q can't be a SPIFFE id: %w", service, err)
		}
		if !slices.Contains(names, id.String()) {
			names = append(names, id.String())
		}
	}
	var extra []string
	for tag, values := range tags {
		for _, value := range values {
			extra = append(extra, "kuma://"+tag+"/"+value)
		}
	}
	slices.Sort(extra)
	return subject(append(names, slices.Compact(extra)...))
}

// NewWorkload makes the subject of a certificate with exactly one SPIFFE id,
// such as "spiffe://default.east.mesh.local/workload/web".
func NewWorkload(id string) (Subject, error) {
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return Subject{}, errs.New(errs.Invalid, "%q is not a SPIFFE id: %w", id, err)
	}
	if parsed.Path() == "" {
		return Subject{}, errs.New(errs.Invalid, "%q names a trust domain, not a workload: its path is empty", id)
	}
	return subject([]string{parsed.String()})
}

func subject(names []string) (Subject, error) {
	if len(names) > maxNames {
		return Subject{}, errs.New(errs.Invalid, "a certificate would have %d names, the limit is %d; a Dataplane needs fewer tags", len(names), maxNames)
	}
	s := Subject{uris: make([]*url.URL, 0, len(names))}
	for _, name := range names {
		u, err := url.Parse(name)
		if err != nil || u.Host == "" || len(name) > maxNameLen {
			return Subject{}, errs.New(errs.Invalid, "%.100q can't be a name in a certificate (a URI of at most %d bytes)", name, maxNameLen)
		}
		s.uris = append(s.uris, u)
	}
	return s, nil
}

// Names returns the URIs that the certificate will carry, in their order.
func (s Subject) Names() []string {
	out := make([]string, len(s.uris))
	for i, u := range s.uris {
		out[i] = u.String()
	}
	return out
}

// Equal reports whether both are for the same names.
func (s Subject) Equal(other Subject) bool { return slices.Equal(s.Names(), other.Names()) }

// ID returns the SPIFFE id of a certificate that must carry exactly one
// identity (X509-SVID, section 2): one URI, which is a SPIFFE id with a path,
// and no other name of any kind. Errors are Unauthenticated.
func ID(cert *x509.Certificate) (string, error) {
	seen, err := uriCount(cert)
	if err != nil {
		return "", err
	}
	if seen != 1 || len(cert.URIs) != 1 {
		return "", errs.New(errs.Unauthenticated, "certificate has %d URIs; exactly one SPIFFE id is wanted", seen)
	}
	id, err := spiffeid.FromURI(cert.URIs[0])
	if err != nil || id.Path() == "" || id.String() != cert.URIs[0].String() {
		return "", errs.New(errs.Unauthenticated, "certificate's name %q is not a workload's SPIFFE id", cert.URIs[0])
	}
	return id.String(), nil
}

// Classic returns the names of a classic certificate if it is one for the
// mesh: all its SPIFFE ids are in the mesh's trust domain, each with a path of
// one segment, and all other names are kuma:// URIs. One name that is anything
// else makes it an error, which is Unauthenticated.
func Classic(cert *x509.Certificate, mesh string) (services []string, err error) {
	if seen, err := uriCount(cert); err != nil || seen != len(cert.URIs) {
		return nil, errs.New(errs.Unauthenticated, "certificate has names that are not URIs")
	}
	set := map[string]bool{}
	for _, u := range cert.URIs {
		if u.Scheme == "kuma" {
			continue
		}
		id, err := spiffeid.FromURI(u)
		if err != nil || id.TrustDomain().Name() != mesh || id.Path() == "" || slices.Contains([]byte(id.Path()[1:]), '/') {
			return nil, errs.New(errs.Unauthenticated, "certificate's name %q is not a service of mesh %q", u, mesh)
		}
		set[id.Path()[1:]] = true
	}
	if len(set) == 0 {
		return nil, errs.New(errs.Unauthenticated, "certificate names no service of mesh %q", mesh)
	}
	return slices.Sorted(maps.Keys(set)), nil
}

// uriCount returns how many URIs a certificate names, and an error if it names
// anything else, such as what crypto/x509 skips (otherName).
func uriCount(cert *x509.Certificate) (int, error) {
	oid := asn1.ObjectIdentifier{2, 5, 29, 17} // subjectAltName, RFC 5280 4.2.1.6
	seen := 0
	for _, e := range cert.Extensions {
		if !e.Id.Equal(oid) {
			continue
		}
		var names []asn1.RawValue
		rest, err := asn1.Unmarshal(e.Value, &names)
		if err != nil || len(rest) > 0 {
			return 0, errs.New(errs.Unauthenticated, "certificate has a malformed list of names")
		}
		for _, n := range names {
			if n.Class != asn1.ClassContextSpecific || n.Tag != 6 { // uniformResourceIdentifier
				return 0, errs.New(errs.Unauthenticated, "certificate has a name beside its SPIFFE id that is not a URI")
			}
			seen++
		}
	}
	return seen, nil
}
