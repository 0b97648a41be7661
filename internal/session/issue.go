package session

import (
	"maps"
	"time"
)

// Issued is a certificate that the proxy was issued.
type Issued struct {
	// Revision says what it was made from; RenewAt is when the next is due.
	Revision string
	RenewAt  time.Time
	// Chain and Key are PEM; only a proxy without a link has them here.
	Chain, Key []byte
}

// Issued returns what was issued for a secret in this session.
func (st *Stream) Issued(secret string) (Issued, bool) {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	i, ok := st.session.issued[secret]
	return i, ok
}

// SetIssued records what was issued. It is kept as long as the session: a proxy
// that reconnects keeps its certificates.
func (st *Stream) SetIssued(secret string, i Issued) {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	if st.session.issued == nil {
		st.session.issued = map[string]Issued{}
	}
	st.session.issued[secret] = i
}

// KeepIssued forgets what was issued for other secrets than these.
func (st *Stream) KeepIssued(wanted func(secret string) bool) {
	st.reg.mu.Lock()
	defer st.reg.mu.Unlock()
	maps.DeleteFunc(st.session.issued, func(secret string, _ Issued) bool { return !wanted(secret) })
}
