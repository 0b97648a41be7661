package pki

import (
	"strconv"
	"strings"
	"time"

	"kuma/internal/errs"
)

// ParseLife reads a life as Mesh.mtls writes it: one integer and one unit of
// y (365 days), w, d, h, m, s or ms, such as "24h" or "10y". Compound values
// such as "1h30m" are refused. The empty text is zero, which means the
// default. Errors are Invalid.
func ParseLife(text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	digits := len(text) - len(strings.TrimLeft(text, "0123456789"))
	var unit time.Duration
	switch text[digits:] {
	case "y":
		unit = Year
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
	if err != nil || unit == 0 || n > int64(100*Year/unit) {
		return 0, errs.New(errs.Invalid, "%.40q is not a life: write one integer and one unit of y, w, d, h, m, s, ms, at most 100y, such as 24h", text)
	}
	if n == 0 {
		return 0, errs.New(errs.Invalid, "a life of %s is none: it must be positive", text)
	}
	return time.Duration(n) * unit, nil
}
