package resource_test

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"kuma/internal/resource"
)

func TestDurations(t *testing.T) {
	for _, c := range []struct {
		in          time.Duration
		text, proto string
	}{
		{0, "0s", "0s"},
		{time.Hour, "1h0m0s", "3600s"},
		{1500 * time.Millisecond, "1.5s", "1.500s"},
		{-500 * time.Millisecond, "-500ms", "-0.500s"},
		{time.Second + 20*time.Microsecond, "1.00002s", "1.000020s"},
		{time.Nanosecond, "1ns", "0.000000001s"},
		{math.MaxInt64, "2562047h47m16.854775807s", "9223372036.854775807s"},
		{math.MinInt64, "-2562047h47m16.854775808s", "-9223372036.854775808s"},
	} {
		text, err := json.Marshal(resource.Duration{Duration: c.in})
		if err != nil || string(text) != `"`+c.text+`"` {
			t.Errorf("%d: %s, %v; want %q", c.in, text, err, c.text)
		}
		proto, err := json.Marshal(resource.ProtoDuration{Duration: c.in})
		if err != nil || string(proto) != `"`+c.proto+`"` {
			t.Errorf("%d: %s, %v; want %q", c.in, proto, err, c.proto)
		}
		for _, form := range [][]byte{text, proto} {
			var d resource.Duration
			var p resource.ProtoDuration
			if err := json.Unmarshal(form, &d); err != nil || d.Duration != c.in {
				t.Errorf("%s is read as %v, %v", form, d, err)
			}
			if err := json.Unmarshal(form, &p); err != nil || p.Duration != c.in {
				t.Errorf("%s is read as %v, %v", form, p, err)
			}
		}
	}
	for _, bad := range []string{`5`, `""`, `"5"`, `"1d"`, `"s"`, `{}`, `true`, `"9999999999s"`, `"` + strings.Repeat("9", 1000) + `s"`} {
		var d resource.Duration
		var p resource.ProtoDuration
		err := d.UnmarshalJSON([]byte(bad))
		if err == nil || !strings.Contains(err.Error(), "duration") || len(err.Error()) > 300 {
			t.Errorf("%.20s: %v", bad, err)
		}
		if p.UnmarshalJSON([]byte(bad)) == nil || p.Duration != 0 {
			t.Errorf("%.20s is read as %v", bad, p)
		}
	}
	d := resource.Duration{Duration: time.Second}
	if err := json.Unmarshal([]byte(`null`), &d); err != nil || d.Duration != time.Second {
		t.Errorf("null changed it to %v, %v", d, err)
	}
}

func TestUint64(t *testing.T) {
	for in, want := range map[string]resource.Uint64{`5`: 5, `"5"`: 5, `"18446744073709551615"`: math.MaxUint64, `0`: 0, `null`: 3} {
		got := resource.Uint64(3)
		if err := json.Unmarshal([]byte(in), &got); err != nil || got != want {
			t.Errorf("%s is read as %d, %v", in, got, err)
		}
	}
	for _, bad := range []string{`-1`, `"x"`, `""`, `1.5`, `18446744073709551616`, `[]`, `"` + strings.Repeat("9", 1000) + `"`} {
		var got resource.Uint64
		if err := json.Unmarshal([]byte(bad), &got); err == nil || len(err.Error()) > 300 {
			t.Errorf("%.20s is read as %d, %v", bad, got, err)
		}
	}
	if b, err := json.Marshal(resource.Uint64(math.MaxUint64)); err != nil || string(b) != `"18446744073709551615"` {
		t.Errorf("written as %s, %v", b, err)
	}
}

func TestKeyAndKind(t *testing.T) {
	spec, flat := boxes()
	r := spec.Make("m", "a-hash", &boxSpec{})
	if got := r.Key().String(); got != `Box "a-hash" in mesh "m"` {
		t.Errorf("key: %s", got)
	}
	if got := flat.Key("", "b").String(); got != `FlatBox "b"` {
		t.Errorf("key: %s", got)
	}
	if r.DisplayName() != "a-hash" {
		t.Errorf("display name: %s", r.DisplayName())
	}
	r.Labels = map[string]string{resource.LabelDisplayName: "a"}
	if r.DisplayName() != "a" || r.KRI().Name != "a" || r.KRI().Short != "box" {
		t.Errorf("display name: %s, KRI: %v", r.DisplayName(), r.KRI())
	}
	if k := flat.Make("", "b", &boxSpec{}).KRI(); k.Short != "" || k.Name != "" {
		t.Errorf("a kind without KRI has %v", k)
	}
	if spec.From(r).Spec != r.Spec.(*boxSpec) {
		t.Error("From has another specification")
	}
	if flat.ArgName() != "flatbox" || (&resource.Kind{Name: "X", Singular: "the-x"}).ArgName() != "the-x" {
		t.Errorf("names for the command line: %s", flat.ArgName())
	}
	if spec.Scope.String()+spec.Shape.String()+flat.Scope.String()+flat.Shape.String() != "MeshSpecGlobalFlat" {
		t.Error("scopes and shapes have other names")
	}
}

func TestParseLife(t *testing.T) {
	cases := map[string]time.Duration{
		"": 0, "24h": 24 * time.Hour, "10y": 10 * 365 * 24 * time.Hour, "2w": 14 * 24 * time.Hour, "1d": 24 * time.Hour, "5m": 5 * time.Minute, "30s": 30 * time.Second, "1500ms": 1500 * time.Millisecond, "007d": 7 * 24 * time.Hour,
		"1h30m": -1, "1.5h": -1, "h": -1, "24": -1, "-1h": -1, "24 h": -1, "24H": -1, "1us": -1, "0s": -1, "101y": -1, "99999999999999999999h": -1, "9223372036854775807ms": -1,
	}
	for in, want := range cases {
		got, err := resource.ParseLife(in)
		if want < 0 {
			if err == nil {
				t.Errorf("%q = %v, %v, want it refused", in, got, err)
			}
			continue
		}
		if err != nil || got != want {
			t.Errorf("%q = %v, %v, want %v", in, got, err, want)
		}
	}
}
