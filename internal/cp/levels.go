package cp

import (
	"context"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"kuma/internal/errs"
)

const (
	// maxOverrides bounds how many components may have a level of their own.
	maxOverrides = 200
	// maxComponent bounds a component's name, in bytes.
	maxComponent = 256
)

// levelOff is above all levels that are used.
const levelOff = slog.Level(100)

// levels are the log levels that were changed while the control plane runs, by
// component. A component is a logger's name, or how it begins up to a dot. They
// end with the process.
type levels struct {
	mu sync.Mutex
	// set is replaced when it changes; nil means that none is.
	set atomic.Pointer[map[string]slog.Level]
}

func levelName(l slog.Level) string {
	switch l {
	case levelOff:
		return "off"
	case slog.LevelDebug:
		return "debug"
	}
	return "info"
}

// all returns the levels that are set, by component.
func (l *levels) all() map[string]string {
	out := map[string]string{}
	if set := l.set.Load(); set != nil {
		for c, level := range *set {
			out[c] = levelName(level)
		}
	}
	return out
}

// override sets a component's level, "off", "info" or "debug". Errors: Invalid,
// and Unavailable where there are too many.
func (l *levels) override(component, level string) error {
	var to slog.Level
	switch level {
	case "off":
		to = levelOff
	case "info":
		to = slog.LevelInfo
	case "debug":
		to = slog.LevelDebug
	default:
		return errs.New(errs.Invalid, "invalid log level: unknown log level %q", level)
	}
	if err := checkComponent(component); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	set := map[string]slog.Level{}
	if old := l.set.Load(); old != nil {
		set = maps.Clone(*old)
	}
	if set[component] = to; len(set) > maxOverrides {
		return errs.New(errs.Unavailable, "too many components have a log level of their own, the limit is %d: DELETE /logging resets all", maxOverrides)
	}
	l.set.Store(&set)
	return nil
}

// reset takes a component's level back; all of them where it is empty.
func (l *levels) reset(component string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := l.set.Load()
	if old == nil {
		return
	}
	set := maps.Clone(*old)
	delete(set, component)
	if component == "" || len(set) == 0 {
		l.set.Store(nil)
		return
	}
	l.set.Store(&set)
}

func checkComponent(name string) error {
	if name == "" || len(name) > maxComponent {
		return errs.New(errs.Invalid, "invalid component: it must have 1 to %d characters", maxComponent)
	}
	for part := range strings.SplitSeq(name, ".") {
		if part == "" || strings.Trim(part, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return errs.New(errs.Invalid, "invalid component: %q is not names of letters, digits, \"-\" and \"_\", joined by dots", name)
		}
	}
	return nil
}

// of returns the level of a logger, where one is set.
func (l *levels) of(logger string) (slog.Level, bool) {
	set := l.set.Load()
	if set == nil {
		return 0, false
	}
	for name := logger; name != ""; {
		if level, ok := (*set)[name]; ok {
			return level, true
		}
		i := strings.LastIndexByte(name, '.')
		if i < 0 {
			break
		}
		name = name[:i]
	}
	return 0, false
}

// logger returns a log whose lines are counted and whose levels can be changed.
func (l *levels) logger(log *slog.Logger, lines *prometheus.CounterVec) *slog.Logger {
	return slog.New(&leveled{Handler: log.Handler(), levels: l, lines: lines, counted: new(lineCounts)})
}

// lineCounts are one logger's counters, each made when it is first needed.
type lineCounts [4]struct {
	once sync.Once
	prometheus.Counter
}

// leveled is a logger's handler.
type leveled struct {
	slog.Handler
	levels *levels
	lines  *prometheus.CounterVec
	// name is the attribute "logger"; empty for the program itself.
	name    string
	counted *lineCounts
}

// Enabled asks what was set first, then the log itself.
func (h *leveled) Enabled(ctx context.Context, level slog.Level) bool {
	if set, ok := h.levels.of(h.name); ok {
		return level >= set
	}
	return h.Handler.Enabled(ctx, level)
}

// Handle counts a line and writes it.
func (h *leveled) Handle(ctx context.Context, r slog.Record) error {
	i, name := 3, "error"
	switch {
	case r.Level < slog.LevelInfo:
		i, name = 0, "debug"
	case r.Level < slog.LevelWarn:
		i, name = 1, "info"
	case r.Level < slog.LevelError:
		i, name = 2, "warn"
	}
	c := &h.counted[i]
	c.once.Do(func() { c.Counter = h.lines.WithLabelValues(h.name, name) })
	c.Inc()
	return h.Handler.Handle(ctx, r)
}

// WithAttrs notes the logger's name.
func (h *leveled) WithAttrs(attrs []slog.Attr) slog.Handler {
	out := *h
	out.Handler = h.Handler.WithAttrs(attrs)
	for _, a := range attrs {
		if a.Key == "logger" && a.Value.Kind() == slog.KindString && a.Value.String() != h.name {
			out.name, out.counted = a.Value.String(), new(lineCounts)
		}
	}
	return &out
}

// WithGroup keeps the name.
func (h *leveled) WithGroup(name string) slog.Handler {
	out := *h
	out.Handler = h.Handler.WithGroup(name)
	return &out
}
