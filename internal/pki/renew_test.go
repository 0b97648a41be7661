package pki

import (
	"testing"
	"time"
)

func TestRenewalDue(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	end := begin.Add(90 * 24 * time.Hour)
	day := func(n float64) time.Time { return begin.Add(time.Duration(n * float64(24*time.Hour))) }
	for name, c := range map[string]struct {
		now, last time.Time
		want      bool
	}{
		"new":                                   {now: begin, want: false},
		"young":                                 {now: day(10), last: day(9), want: false},
		"a moment before two thirds":            {now: day(60).Add(-time.Nanosecond), last: day(59), want: false},
		"two thirds":                            {now: day(60), last: day(59), want: true},
		"the last day":                          {now: day(89), want: true},
		"ended":                                 {now: day(91), want: true},
		"a jump forward over its whole rest":    {now: day(4000), last: day(10), want: true},
		"a jump forward within its first part":  {now: day(59), last: day(1), want: false},
		"back, and it was not due":              {now: day(20), last: day(30), want: false},
		"back by an hour, and it was due":       {now: day(60).Add(-time.Hour), last: day(60), want: true},
		"back by a month, and it was due":       {now: day(30), last: day(61), want: true},
		"back before its start":                 {now: day(-1), last: day(10), want: true},
		"back before its start, never asked":    {now: day(-1), want: true},
		"back to its start":                     {now: begin, last: day(1), want: false},
		"back after it ended":                   {now: day(5), last: day(95), want: true},
		"back to 1970":                          {now: time.Unix(0, 0), last: day(5), want: true},
		"the clock stands still, and it is due": {now: day(75), last: day(75), want: true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := RenewalDue(begin, end, c.now, c.last); got != c.want {
				t.Errorf("RenewalDue(now %v, last %v) = %v", c.now, c.last, got)
			}
		})
	}
}
