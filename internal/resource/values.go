package resource

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a length of time in the specifications of "spec" shaped kinds:
// Go's syntax in ("1h", "250ms"), Go's normal form out ("1h0m0s").
type Duration struct{ time.Duration }

// MarshalJSON writes the normal form.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(d.String()) }

// UnmarshalJSON reads Go's syntax.
func (d *Duration) UnmarshalJSON(b []byte) error { return readDuration(b, &d.Duration) }

// ProtoDuration is a length of time in flat shaped kinds: seconds with an "s",
// as protobuf's JSON form has it ("0.500s", "90s"); Go's syntax is read too.
type ProtoDuration struct{ time.Duration }

// MarshalJSON writes seconds with none, three, six or nine decimals.
func (d ProtoDuration) MarshalJSON() ([]byte, error) {
	seconds, nanos := int64(d.Duration/time.Second), int64(d.Duration%time.Second)
	sign := ""
	if d.Duration < 0 {
		sign, seconds, nanos = "-", -seconds, -nanos
	}
	decimals := ""
	switch {
	case nanos == 0:
	case nanos%1e6 == 0:
		decimals = fmt.Sprintf(".%03d", nanos/1e6)
	case nanos%1e3 == 0:
		decimals = fmt.Sprintf(".%06d", nanos/1e3)
	default:
		decimals = fmt.Sprintf(".%09d", nanos)
	}
	return fmt.Appendf(nil, `"%s%d%ss"`, sign, seconds, decimals), nil
}

// UnmarshalJSON reads either syntax.
func (d *ProtoDuration) UnmarshalJSON(b []byte) error { return readDuration(b, &d.Duration) }

// readDuration reads a duration. As everywhere in JSON, null changes nothing.
func readDuration(b []byte, into *time.Duration) error {
	if string(b) == "null" {
		return nil
	}
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return errors.New(`must be a duration such as "10s" or "1h30m", in quotes`)
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration; write a number and a unit, such as \"10s\", \"250ms\" or \"1h30m\"", short(s))
	}
	*into = v
	return nil
}

const year = 365 * 24 * time.Hour

// ParseLife reads a life as Mesh.mtls writes it: one integer and one unit of
// y (365 days), w, d, h, m, s or ms, such as "24h" or "10y". Compound values
// such as "1h30m" are refused. The empty text is zero, which means the
// default.
func ParseLife(text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	digits := len(text) - len(strings.TrimLeft(text, "0123456789"))
	var unit time.Duration
	switch text[digits:] {
	case "y":
		unit = year
	case "w":
		unit = 7 * 24 * time.Hour
	case "d":
		unit = 24 * time.Hour
	case "h":
		unit = time.Hour
	case "m":
		unit = time.Minute
	case "s":
		unit = time.Second
	case "ms":
		unit = time.Millisecond
	}
	n, err := strconv.ParseInt(text[:digits], 10, 64)
	if err != nil || unit == 0 || n > int64(100*year/unit) {
		return 0, fmt.Errorf("%.40q is not a life: write one integer and one unit of y, w, d, h, m, s, ms, at most 100y, such as 24h", text)
	}
	if n == 0 {
		return 0, fmt.Errorf("a life of %s is none: it must be positive", text)
	}
	return time.Duration(n) * unit, nil
}

// Uint64 is a number that flat shaped kinds write as a string, as protobuf's
// JSON form has it; a plain number is read too.
type Uint64 uint64

// MarshalJSON writes the number in quotes.
func (u Uint64) MarshalJSON() ([]byte, error) {
	return []byte(`"` + strconv.FormatUint(uint64(u), 10) + `"`), nil
}

// UnmarshalJSON reads the number with or without quotes.
func (u *Uint64) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	v, err := strconv.ParseUint(strings.Trim(string(b), `"`), 10, 64)
	if err != nil {
		return fmt.Errorf("%s is not a whole number from 0 to %d", short(string(b)), uint64(math.MaxUint64))
	}
	*u = Uint64(v)
	return nil
}

// An Enum is a string of which only some values have a meaning. The decoder
// refuses others and names these.
type Enum interface{ Values() []string }
