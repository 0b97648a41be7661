package resource

import (
	"encoding/json"
	"fmt"
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
func (d *Duration) UnmarshalJSON(b []byte) error {
	v, err := readDuration(b)
	d.Duration = v
	return err
}

// ProtoDuration is a length of time in flat shaped kinds: seconds with an "s",
// as protobuf's JSON form has it ("0.500s", "90s"); Go's syntax is read too.
type ProtoDuration struct{ time.Duration }

// MarshalJSON writes seconds with none, three, six or nine decimals.
func (d ProtoDuration) MarshalJSON() ([]byte, error) {
	decimals := 0
	switch {
	case d.Duration%time.Second == 0:
	case d.Duration%time.Millisecond == 0:
		decimals = 3
	case d.Duration%time.Microsecond == 0:
		decimals = 6
	default:
		decimals = 9
	}
	return json.Marshal(strconv.FormatFloat(d.Seconds(), 'f', decimals, 64) + "s")
}

// UnmarshalJSON reads either syntax.
func (d *ProtoDuration) UnmarshalJSON(b []byte) error {
	v, err := readDuration(b)
	d.Duration = v
	return err
}

func readDuration(b []byte) (time.Duration, error) {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return 0, fmt.Errorf("must be a duration such as \"10s\" or \"1h30m\", in quotes")
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a duration; write a number and a unit, such as \"10s\", \"250ms\" or \"1h30m\"", s)
	}
	return v, nil
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
	v, err := strconv.ParseUint(strings.Trim(string(b), `"`), 10, 64)
	if err != nil {
		return fmt.Errorf("%s is not a number of 0 or more", b)
	}
	*u = Uint64(v)
	return nil
}

// An Enum is a string of which only some values have a meaning. The decoder
// refuses others and names these.
type Enum interface{ Values() []string }
