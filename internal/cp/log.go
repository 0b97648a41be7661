package cp

import (
	"io"
	"log/slog"

	"kuma/internal/errs"
)

// Logger makes the log of a whole program: one line an entry, key=value. The
// level is "off", "info" or "debug".
func Logger(w io.Writer, level string) (*slog.Logger, error) {
	switch level {
	case "off":
		return slog.New(slog.DiscardHandler), nil
	case "info":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "debug":
		return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug})), nil
	}
	return nil, errs.New(errs.Invalid, "--log-level %q is unknown: use off, info or debug", level)
}
