package token

import (
	"strings"
	"unicode"

	"github.com/google/uuid"

	"kuma/internal/errs"
)

// maxRevocations is the longest list of revoked ids that is read, in bytes.
const maxRevocations = 4 << 20

// Revocations is a set of revoked token ids (jti). The zero value is empty.
type Revocations struct {
	ids map[string]struct{}
	// Odd lists entries that no token made here can have, since they are not
	// UUIDs. They count all the same; whoever reads the list should say so,
	// since most often they are a slip of the pen.
	Odd []string
}

// ParseRevocations reads a list of ids, separated by commas, white space or
// both. Lists of several secrets are read by one call.
func ParseRevocations(lists ...string) (Revocations, error) {
	r := Revocations{ids: map[string]struct{}{}}
	for _, list := range lists {
		if len(list) > maxRevocations {
			return Revocations{}, errs.New(errs.Invalid, "list of revoked tokens has %d bytes, the limit is %d; rotate the signing key instead", len(list), maxRevocations)
		}
		for id := range strings.FieldsFuncSeq(list, func(c rune) bool { return c == ',' || c == '\ufeff' || unicode.IsSpace(c) }) {
			if u, err := uuid.Parse(id); err != nil {
				r.Odd = append(r.Odd, id)
			} else {
				r.ids[u.String()] = struct{}{}
			}
			r.ids[id] = struct{}{}
		}
	}
	return r, nil
}

// Has reports whether a token id is revoked. A token without an id never is.
func (r Revocations) Has(id string) bool {
	_, ok := r.ids[id]
	return ok && id != ""
}

// Len returns how many ids are revoked.
func (r Revocations) Len() int { return len(r.ids) }
