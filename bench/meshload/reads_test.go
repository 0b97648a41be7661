package main

import (
	"strings"
	"testing"
)

func TestSumReads(t *testing.T) {
	for _, test := range []struct {
		page string
		want float64
		ok   bool
	}{
		{`# TYPE store histogram
store_bucket{operation="get",resource_type="Mesh",zone="default",le="+Inf"} 7
store_count{operation="get",resource_type="Mesh",zone="default"} 7
store_count{operation="create",resource_type="Mesh",zone="default"} 100
store_count{operation="list",resource_type="all",zone="default"} 2
store_sum{operation="list",resource_type="all",zone="default"} 0.5
`, 9, true},
		{`store_count{operation="create",resource_type="Mesh"} 100`, 0, true},
		{`store_count{operation="get"} x`, 0, false},
		{"other 1\n", 0, false},
	} {
		got, err := sumReads(strings.NewReader(test.page))
		if got != test.want || (err == nil) != test.ok {
			t.Errorf("%.40q: %v, %v", test.page, got, err)
		}
	}
}
