package cp

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/errs"
)

// bare is a control plane with nothing but its diagnostics.
func bare(cfg Config, w io.Writer) *ControlPlane {
	m := newMetrics("east", nil)
	c := &ControlPlane{cfg: cfg, metrics: m}
	c.log = c.levels.logger(slog.New(slog.NewTextHandler(w, nil)), m.lines)
	return c
}

func ask(t *testing.T, h http.Handler, method, path, body string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w.Code, w.Body.String()
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
		c := bare(cfg, &log)
		c.posture()
		if said := strings.Contains(log.String(), "KUMA_DIAGNOSTICS_METRICS=false"); said != open {
			t.Errorf("metrics %t: it is said: %t", open, said)
		}
		for path, want := range map[string]int{"/metrics": map[bool]int{true: http.StatusOK, false: http.StatusNotFound}[open], "/healthy": http.StatusOK} {
			if code, _ := ask(t, c.diagnose(), http.MethodGet, path, ""); code != want {
				t.Errorf("metrics %t: %s: %d, want %d", open, path, code, want)
			}
		}
	}
}

// TestDiagnostics looks at what the port answers to whom.
func TestDiagnostics(t *testing.T) {
	nobody := func(*http.Request) error { return errs.New(errs.Denied, "no") }
	stranger := func(*http.Request) error { return errs.New(errs.Unauthenticated, "who?") }
	admin := func(*http.Request) error { return nil }
	for _, test := range []struct {
		name, method, path, body string
		who                      func(*http.Request) error
		debug                    bool
		code                     int
		says                     string
	}{
		{"root", "GET", "/", "", admin, true, 404, ""},
		{"healthy", "GET", "/healthy", "", nobody, false, 200, ""},
		{"not ready yet", "GET", "/ready", "", nobody, false, 503, ""},
		{"profiles are off", "GET", "/debug/pprof/", "", admin, false, 404, ""},
		{"profiles", "GET", "/debug/pprof/", "", admin, true, 200, "heap"},
		{"the memory", "GET", "/debug/pprof/heap?debug=1", "", admin, true, 200, "heap profile"},
		{"profiles are for administrators", "GET", "/debug/pprof/heap", "", nobody, true, 403, "no\n"},
		{"and not for strangers", "GET", "/debug/pprof/cmdline", "", stranger, true, 401, "who?\n"},
		{"levels", "GET", "/logging", "", nobody, false, 200, `{"components":{"kds":"debug"}}` + "\n"},
		{"a level", "PUT", "/logging", `{"component":"kds.sink","level":"off"}`, admin, false, 200, ""},
		{"a level by nobody", "PUT", "/logging", `{"component":"kds","level":"off"}`, nobody, false, 403, "no\n"},
		{"no level", "PUT", "/logging", `{"component":"kds","level":"zzz"}`, admin, false, 400, "invalid log level: unknown log level \"zzz\"\n"},
		{"no JSON", "PUT", "/logging", `secret-of-mine`, admin, false, 400, "invalid request body\n"},
		{"too long", "PUT", "/logging", `{"component":"` + strings.Repeat("a", 5000) + `"}`, admin, false, 400, "invalid request body\n"},
		{"no component", "PUT", "/logging", `{"level":"info"}`, admin, false, 400, "invalid component: it must have 1 to 256 characters\n"},
		{"long component", "PUT", "/logging", `{"level":"info","component":"` + strings.Repeat("a", 257) + `"}`, admin, false, 400, "invalid component: it must have 1 to 256 characters\n"},
		{"malformed component", "PUT", "/logging", `{"level":"info","component":"a..b"}`, admin, false, 400, `invalid component: "a..b"`},
		{"reset all", "DELETE", "/logging", "", admin, false, 200, ""},
		{"reset one", "DELETE", "/logging/kds", "", admin, false, 200, ""},
		{"reset one that is not set", "DELETE", "/logging/xyz", "", admin, false, 200, ""},
		{"reset by nobody", "DELETE", "/logging", "", nobody, false, 403, "no\n"},
		{"no such method", "POST", "/logging", "", admin, false, 405, "method not allowed\n"},
		{"nor there", "GET", "/logging/kds", "", admin, false, 405, "method not allowed\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := Default()
			cfg.Diagnostics.DebugEndpoints = test.debug
			c := bare(cfg, io.Discard)
			c.administers = test.who
			if err := c.levels.override("kds", "debug"); err != nil {
				t.Fatal(err)
			}
			code, said := ask(t, c.diagnose(), test.method, test.path, test.body)
			if code != test.code || !strings.Contains(said, test.says) || test.says == "" && said != "" && code == 200 {
				t.Errorf("%d %q, want %d %q", code, said, test.code, test.says)
			}
		})
	}
	c := bare(Default(), io.Discard)
	c.administers = admin
	c.ready.Store(true)
	if code, _ := ask(t, c.diagnose(), "GET", "/ready", ""); code != http.StatusOK {
		t.Errorf("ready, and /ready says %d", code)
	}
	for away, want := range map[time.Duration]int{0: 200, takeover - 1: 200, takeover: 503, takeover + time.Hour: 503} {
		c.away = func() time.Duration { return away }
		code, said := ask(t, c.diagnose(), "GET", "/ready", "")
		if code != want || (code == 503) != strings.Contains(said, "cut off from its store for "+away.String()) {
			t.Errorf("%v without the store's lock: %d %q, want %d", away, code, said, want)
		}
	}
	c.away = nil
	for i := range 201 {
		code, _ := ask(t, c.diagnose(), "PUT", "/logging", `{"component":"c`+strings.Repeat("x", i)+`","level":"debug"}`)
		if want := map[bool]int{true: 200, false: 429}[i < 200]; code != want {
			t.Fatalf("override %d: %d, want %d", i+1, code, want)
		}
	}
}

// TestLevels sets the levels of some loggers and looks at what is written and
// counted.
func TestLevels(t *testing.T) {
	var out bytes.Buffer
	c := bare(Default(), &out)
	xds, child, rest := c.log.With("logger", "xds"), c.log.With("logger", "xds.delta"), c.log.With("logger", "rest")
	say := func() string {
		out.Reset()
		for _, l := range []*slog.Logger{c.log, xds, child, rest.With("path", "/")} {
			l.Debug("d")
			l.Warn("w")
		}
		var said []string
		for line := range strings.Lines(out.String()) {
			_, after, _ := strings.Cut(line, "level=")
			level, after, _ := strings.Cut(after, " msg=")
			_, logger, _ := strings.Cut(strings.TrimSpace(after), "logger=")
			said = append(said, strings.TrimSpace(level[:1]+" "+strings.TrimSuffix(logger, " path=/")))
		}
		return strings.Join(said, ", ")
	}
	for _, step := range []struct{ component, level, want string }{
		{"", "", "W, W xds, W xds.delta, W rest"},
		{"xds", "debug", "W, D xds, W xds, D xds.delta, W xds.delta, W rest"},
		{"xds.delta", "off", "W, D xds, W xds, W rest"},
		{"xds", "", "W, W xds, W rest"},
		{"rest", "info", "W, W xds, W rest"},
	} {
		switch {
		case step.component == "":
		case step.level == "":
			c.levels.reset(step.component)
		default:
			if err := c.levels.override(step.component, step.level); err != nil {
				t.Fatal(err)
			}
		}
		if got := say(); got != step.want {
			t.Errorf("%s=%s: %s, want %s", step.component, step.level, got, step.want)
		}
	}
	if diff := cmp.Diff(map[string]string{"xds.delta": "off", "rest": "info"}, c.levels.all()); diff != "" {
		t.Error(diff)
	}
	c.levels.reset("")
	if got := say(); got != "W, W xds, W xds.delta, W rest" {
		t.Errorf("after the reset: %s", got)
	}
	_, page := ask(t, c.diagnose(), "GET", "/metrics", "")
	for _, want := range []string{
		`kuma_cp_log_lines_total{level="warn",logger="xds",zone="east"} 6`,
		`kuma_cp_log_lines_total{level="debug",logger="xds.delta",zone="east"} 1`,
		`kuma_cp_log_lines_total{level="warn",logger="",zone="east"} 6`,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("there is no %s", want)
		}
	}
}

// TestMeasure looks at the series that requests make, of those that strangers
// make up above all.
func TestMeasure(t *testing.T) {
	m := newMetrics("east", nil)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /meshes/{mesh}", func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, r.PathValue("mesh"))
	})
	h := m.api.measure(mux, byPattern(mux))
	for _, path := range []string{"/meshes/a", "/meshes/b", "/x", "/y/z"} {
		ask(t, h, "GET", path, "")
	}
	ask(t, h, "BREW", "/meshes/a", "")
	ask(t, h, "STEEP", "/x", "")
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, f := range families {
		if f.GetName() != "api_server_http_request_duration_seconds" {
			continue
		}
		for _, s := range f.GetMetric() {
			var labels []string
			for _, l := range s.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			got[strings.Join(labels, " ")] = s.GetHistogram().GetSampleCount()
		}
	}
	want := map[string]uint64{
		"code=200 handler=/meshes/{mesh} method=GET service= zone=east": 2,
		"code=404 handler=other method=GET service= zone=east":          2,
		"code=405 handler=other method=other service= zone=east":        1,
		"code=404 handler=other method=other service= zone=east":        1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
