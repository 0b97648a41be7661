package cp

import (
	"strings"
	"testing"
)

func TestWriteMetrics(t *testing.T) {
	n := 0.0
	count := func() float64 { n++; return n }
	var out strings.Builder
	if err := writeMetrics(&out, "east", []metric{
		{"a_total", "counter", "What it is.", `result="ok"`, count},
		{"a_total", "counter", "What it is.", `result="bad"`, count},
		{"b", "gauge", "Another.", "", count},
	}); err != nil {
		t.Fatal(err)
	}
	want := `# HELP a_total What it is.
# TYPE a_total counter
a_total{result="ok",zone="east"} 1
a_total{result="bad",zone="east"} 2
# HELP b Another.
# TYPE b gauge
b{zone="east"} 3
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}
