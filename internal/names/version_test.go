package names_test

import (
	"testing"

	"kuma/internal/names"
)

func TestCompatible(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want bool
	}{
		{"2.14.3", "2.14.0", true},
		{"2.12.0", "2.14.0", true},
		{"2.11.9", "2.14.0", false},
		{"2.16.0", "2.14.0", true},
		{"2.17.0", "2.14.0", false},
		{"2.1.0", "2.0.0", true},
		{"v2.11.1", "2.14.0", false},
		{"3.14.0", "2.14.0", false},
		{"1.14.0", "2.14.0", false},
		{"2.0.0-preview.v123", "2.14.0", true},
		{"0.1.0-dev", "2.14.0", true},
		{"unknown", "2.14.0", true},
		{"", "2.14.0", true},
		{"2.14", "1.0.0", true},
		{"2.99999999999999999999.0", "2.14.0", true},
		{"-1.5.0", "2.14.0", true},
	} {
		if got := names.Compatible(test.a, test.b); got != test.want {
			t.Errorf("%q with %q: %t", test.a, test.b, got)
		}
		if got := names.Compatible(test.b, test.a); got != test.want {
			t.Errorf("%q with %q: %t", test.b, test.a, got)
		}
	}
}
