package mesh

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"kuma/internal/errs"
)

var (
	dnsLabel    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	tagKey      = regexp.MustCompile(`^[a-zA-Z0-9.\-_:/]+$`)
	tagValue    = regexp.MustCompile(`^[a-zA-Z0-9.\-_:]+$`)
	selectorTag = regexp.MustCompile(`^([a-zA-Z0-9.\-_:/]+|\*)$`)
)

// IsDNSLabel reports whether s may be a DNS label: lower case, 63 characters.
func IsDNSLabel(s string) bool { return dnsLabel.MatchString(s) }

// Protocols are those that a proxy treats as more than bytes, and "tcp".
func Protocols() []string { return []string{"grpc", "http", "http2", "kafka", "tcp"} }

// checkTags checks keys and values. In selectors a value may be "*" and may
// hold "/".
func checkTags(path string, tags map[string]string, selector bool) (bad []errs.Field) {
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		v := tags[k]
		at := fmt.Sprintf("%s[%q]", path, k)
		switch {
		case k == "":
			bad = append(bad, errs.Field{Path: path, Message: "tag name must be non-empty"})
		case !tagKey.MatchString(k):
			bad = append(bad, errs.Field{Path: at, Message: "tag name must consist of alphanumeric characters, dots, dashes, slashes, colons and underscores"})
		}
		switch {
		case v == "":
			bad = append(bad, errs.Field{Path: at, Message: "tag value must be non-empty"})
		case selector && !selectorTag.MatchString(v):
			bad = append(bad, errs.Field{Path: at, Message: "tag value must consist of alphanumeric characters, dots, dashes, slashes, colons and underscores or be \"*\""})
		case !selector && !tagValue.MatchString(v):
			bad = append(bad, errs.Field{Path: at, Message: "tag value must consist of alphanumeric characters, dots, dashes, colons and underscores"})
		}
	}
	return bad
}

// MatchTags reports whether tags has all of want; "*" in want is any value.
func MatchTags(want, tags map[string]string) bool {
	for k, v := range want {
		have, ok := tags[k]
		if !ok || v != "*" && v != have {
			return false
		}
	}
	return true
}

// FormatTags writes tags as "k=v k=v", sorted.
func FormatTags(tags map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		out = append(out, k+"="+tags[k])
	}
	return strings.Join(out, " ")
}
