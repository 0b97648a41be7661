package cp

import (
	"io"
	"log/slog"
	"os"

	"gopkg.in/natefinch/lumberjack.v2"

	"kuma/internal/errs"
)

// logOutput is where the log goes to, and from which level on.
type logOutput struct {
	level, path               string
	maxSize, maxAge, maxFiles int
}

// open makes the log, with a file that is rotated where one is wanted.
func (o *logOutput) open(stderr io.Writer) (*slog.Logger, error) {
	if o.path == "" {
		return Logger(stderr, o.level)
	}
	// Opened once here, so that a path that can't be written is told now.
	f, err := os.OpenFile(o.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return nil, errs.New(errs.Invalid, "--log-output-path: %w", err)
	}
	return Logger(&lumberjack.Logger{Filename: o.path, MaxSize: o.maxSize, MaxAge: o.maxAge, MaxBackups: o.maxFiles}, o.level)
}

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
