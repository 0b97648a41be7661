package cp

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"slices"

	"kuma/internal/mesh"
	"kuma/internal/pki"
	"kuma/internal/state"
)

// expiries lists when each certificate ends that this control plane shows,
// signs with or trusts, sorted by name: the pairs and authorities of its
// servers, and the authorities of all meshes. The metric and the TLS report
// show the same list.
func (c *ControlPlane) expiries() []pki.Expiry {
	var out []pki.Expiry
	for _, of := range c.expiring {
		out = append(out, of()...)
	}
	out = append(out, meshAuthorities(c.tracker.Now())...)
	slices.SortStableFunc(out, func(a, b pki.Expiry) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.File, b.File))
	})
	return out
}

// meshAuthorities lists the authorities of all meshes, as "mesh-ca/<mesh>/<backend>".
// The first certificate of a bundle is the one that signs; the others are only
// trusted. A mesh whose secret is not there or can't be read has none: that is
// told where certificates are issued.
func meshAuthorities(pic *state.Picture) []pki.Expiry {
	var out []pki.Expiry
	for _, name := range pic.Meshes() {
		m := pic.Mesh(name)
		if m == nil || m.Spec.MTLS == nil {
			continue
		}
		for _, b := range m.Spec.MTLS.Backends {
			r := m.Get(mesh.Secrets.Name, mesh.BuiltinCertSecret(name, b.Name))
			if r == nil {
				continue
			}
			if cert := firstCertificate(mesh.Secrets.From(r).Spec.Data); cert != nil {
				out = append(out, pki.Expiry{Name: "mesh-ca/" + name + "/" + b.Name, Subject: subjectOf(cert), NotAfter: cert.NotAfter})
			}
		}
	}
	return out
}

// firstCertificate reads the first certificate of a PEM text; nil where there
// is none.
func firstCertificate(text []byte) *x509.Certificate {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}

// subjectOf is a certificate's subject, or its first name where that is empty.
func subjectOf(c *x509.Certificate) string {
	switch {
	case len(c.Subject.Names) > 0:
		return c.Subject.String()
	case len(c.URIs) > 0:
		return c.URIs[0].String()
	case len(c.DNSNames) > 0:
		return c.DNSNames[0]
	case len(c.IPAddresses) > 0:
		return c.IPAddresses[0].String()
	}
	return ""
}
