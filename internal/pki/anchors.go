package pki

import (
	"crypto/x509"
	"fmt"
	"time"

	"kuma/internal/errs"
)

// few is how many certificates a file has at most that somebody has put together
// for one server. More are a bundle such as a system's, which whoever makes the
// system keeps in order: what has ended in it, and when it ends, says nothing.
const few = 16

// maxAnchorsPEM is how many bytes a program is given that verifies a server.
const maxAnchorsPEM = 1 << 20

// Anchors are the certificates of a file by which a server is verified, and
// that is watched.
type Anchors struct{ Pool }

// Anchors loads the certificates by which a server is verified, and watches
// them: authorities, or a server's own certificate, which then is trusted by
// itself. Those that have ended are left out, with a warning where the file is no
// bundle of many; there must be one that is valid. Errors begin with the
// setting, name the file and say how to mend it. The name is that of the
// Expiry.
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
	var ended *x509.Certificate // last
	for _, c := range all {
		switch {
		case !now.After(c.NotAfter):
			certs = append(certs, c)
		case ended == nil || c.NotAfter.After(ended.NotAfter):
			ended = c
		}
	}
	if len(certs) == 0 {
		return nil, nil, errs.New(errs.Invalid, "every certificate in it has ended, %s at %s; %s, or check the clock of this machine", called(all[0]), all[0].NotAfter.UTC().Format(time.RFC3339), mend)
	}
	if n := len(all) - len(certs); n > 0 && len(all) <= few {
		what := fmt.Sprintf("%d of its %d certificates have ended, the last of them (%s)", n, len(all), called(ended))
		if n == 1 {
			what = fmt.Sprintf("one of its %d certificates (%s) ended", len(all), called(ended))
		}
		notes = append(notes, fmt.Sprintf("%s at %s; a server that rests on what has ended is refused", what, ended.NotAfter.UTC().Format(time.RFC3339)))
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
// replaced the file has the old one and the new one. A bundle of many has none.
func (a *Anchors) life() (begin, end time.Time) {
	certs := a.now.Load().certs
	if len(certs) > few {
		return begin, end
	}
	for _, c := range certs {
		if c.NotAfter.After(end) {
			begin, end = c.NotBefore, c.NotAfter
		}
	}
	return begin, end
}
