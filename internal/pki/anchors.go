package pki

import (
	"crypto/x509"
	"fmt"
	"time"

	"kuma/internal/errs"
)

// maxAnchorsPEM is how many bytes a program is given that verifies a server.
const maxAnchorsPEM = 1 << 20

// Anchors are the certificates of a file by which a server is verified, and
// that is watched.
type Anchors struct{ Pool }

// Anchors loads the certificates by which a server is verified, and watches
// them: authorities, or a server's own certificate, which then is trusted by
// itself. Those that have ended are left out, with a warning; there must be one
// that is valid. Errors begin with the setting, name the file and say how to
// mend it. The name is that of the Expiry.
func (f *Files) Anchors(name, setting, file string) (*Anchors, error) {
	a := &Anchors{Pool{name: name, path: file}}
	if _, err := f.open(setting, a); err != nil {
		return nil, err
	}
	return a, nil
}

// PEM returns what is trusted now, and nothing else of the file.
func (a *Anchors) PEM() []byte { return encodeAll(a.Certificates()) }

// ServerAnchors reads the certificates of a text by which a server is verified,
// by the rules of Files.Anchors, and returns them as PEM, with notes of what was
// left out.
func ServerAnchors(text []byte, now time.Time) (clean []byte, notes []string, err error) {
	certs, notes, err := readAnchors(text, now)
	return encodeAll(certs), notes, err
}

func encodeAll(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, encodeCert(c.Raw)...)
	}
	return out
}

func readAnchors(text []byte, now time.Time) (certs []*x509.Certificate, notes []string, err error) {
	const mend = "give the certificates of the authorities that sign the server's certificate, as PEM"
	if len(text) > maxAnchorsPEM {
		return nil, nil, errs.New(errs.Invalid, "it has %d bytes, the limit is %d; %s", len(text), maxAnchorsPEM, mend)
	}
	all, err := strictCerts(text, maxPoolCerts, false)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "%w; %s", err, mend)
	}
	for i, c := range all {
		if now.After(c.NotAfter) {
			notes = append(notes, fmt.Sprintf("certificate %d (%s) ended at %s; a server that rests on it is refused", i+1, called(c), c.NotAfter.UTC().Format(time.RFC3339)))
			continue
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, nil, errs.New(errs.Invalid, "every certificate in it has ended, %s at %s; %s, or check the clock of this machine", called(all[0]), all[0].NotAfter.UTC().Format(time.RFC3339), mend)
	}
	return certs, notes, nil
}

func (a *Anchors) load(all []content, now time.Time) (func(), []string, error) {
	if len(all) != 1 || all[0].file != a.path {
		return nil, nil, errs.New(errs.Invalid, "%s is a directory; name the file itself", a.path)
	}
	certs, notes, err := readAnchors(all[0].data, now)
	if err != nil {
		return nil, nil, errs.New(errs.Invalid, "certificate file %s: %w", a.path, err)
	}
	for i, n := range notes {
		notes[i] = "certificate file " + a.path + ": " + n
	}
	t := &trusted{certs: certs, files: make([]string, len(certs))}
	for i := range certs {
		t.files[i] = a.path
	}
	return func() {
		a.now.Store(t)
		a.changes.Add(1)
	}, notes, nil
}

// life is that of the certificate that ends last: while a server's authority is
// replaced the file has the old one and the new one.
func (a *Anchors) life() (begin, end time.Time) {
	for _, c := range a.now.Load().certs {
		if c.NotAfter.After(end) {
			begin, end = c.NotBefore, c.NotAfter
		}
	}
	return begin, end
}
