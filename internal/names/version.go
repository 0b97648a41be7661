package names

import (
	"strconv"
	"strings"
)

// Compatible reports whether two versions of this product's programs may work
// together: the same major, and minors at most two apart. A preview or a version
// of another form is taken as compatible (contract).
func Compatible(a, b string) bool {
	aMajor, aMinor, ok := release(a)
	if !ok {
		return true
	}
	bMajor, bMinor, ok := release(b)
	if !ok {
		return true
	}
	return aMajor == bMajor && max(aMinor, bMinor)-min(aMinor, bMinor) <= 2
}

// release reads the major and minor number of a released version.
func release(v string) (major, minor uint64, ok bool) {
	parts := strings.SplitN(strings.TrimPrefix(v, "v"), ".", 3)
	if len(parts) < 3 || strings.Contains(v, "-") {
		return 0, 0, false
	}
	major, err := strconv.ParseUint(parts[0], 10, 32)
	if err != nil {
		return 0, 0, false
	}
	minor, err = strconv.ParseUint(parts[1], 10, 32)
	return major, minor, err == nil
}
