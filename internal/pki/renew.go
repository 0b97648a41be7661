package pki

import "time"

// RenewalDue decides whether it is time to renew a certificate that lasts from
// notBefore to notAfter. Now is what the clock shows, last what it showed when
// this was asked before (zero: never).
//
// Both are looked at since clocks are set: a certificate is as old as the later
// of the two says, so that a renewal which was due and failed stays due when
// the clock goes back. A certificate that starts in the future was made while
// the clock was ahead, and is due at once: nobody takes it today.
func RenewalDue(notBefore, notAfter, now, last time.Time) bool {
	if now.Before(notBefore) {
		return true
	}
	if last.After(now) {
		now = last
	}
	return !now.Before(RenewAt(notBefore, notAfter, 0))
}
