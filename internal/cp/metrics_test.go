package cp

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
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

// Who reads the metrics need not say who he is: the log says so, and how to end
// it, and that ends it.
func TestMetricsCanBeClosed(t *testing.T) {
	for _, open := range []bool{true, false} {
		var log bytes.Buffer
		cfg := Default()
		if !cfg.Diagnostics.Metrics {
			t.Error("metrics are not served by default")
		}
		cfg.Diagnostics.Metrics = open
		c := &ControlPlane{cfg: cfg, log: slog.New(slog.NewTextHandler(&log, nil))}
		c.posture()
		if said := strings.Contains(log.String(), "KUMA_DIAGNOSTICS_METRICS=false"); said != open {
			t.Errorf("metrics %t: it is said: %t", open, said)
		}
		for path, want := range map[string]int{"/metrics": map[bool]int{true: http.StatusOK, false: http.StatusNotFound}[open], "/healthy": http.StatusOK} {
			w := httptest.NewRecorder()
			c.diagnose().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			if w.Code != want {
				t.Errorf("metrics %t: %s: %d, want %d", open, path, w.Code, want)
			}
		}
	}
}
