package dp

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"kuma/internal/errs"
)

// envoyVersion is what `envoy --version` says: the number, and the whole of
// "commit/number/state/kind/library".
type envoyVersion struct{ number, build string }

// Releases of Envoy that the control plane's configuration is tried with.
const oldestMinor, newestMinor = 36, 40

// compatible reports whether this version was tried.
func (v envoyVersion) compatible() bool {
	major, minor, ok := v.release()
	return ok && major == 1 && minor >= oldestMinor && minor <= newestMinor
}

func (v envoyVersion) release() (major, minor int, ok bool) {
	parts := strings.Split(v.number, ".")
	if len(parts) < 2 {
		return 0, 0, false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return major, minor, err1 == nil && err2 == nil
}

func askVersion(ctx context.Context, binary string) (envoyVersion, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var out strings.Builder
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Stdout = &limited{w: &out, left: 4096}
	cmd.Stderr = cmd.Stdout
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return envoyVersion{}, errs.New(errs.Unavailable, "failed to get Envoy version: %s --version: %w: %s", binary, err, strings.TrimSpace(out.String()))
	}
	return parseVersion(binary, out.String())
}

func parseVersion(binary, out string) (envoyVersion, error) {
	_, build, ok := strings.Cut(out, "version:")
	build = strings.TrimSpace(build)
	parts := strings.Split(build, "/")
	if !ok || len(parts) != 5 {
		return envoyVersion{}, errs.New(errs.Invalid, "failed to get Envoy version: %s --version says %q; is it Envoy?", binary, strings.TrimSpace(out))
	}
	return envoyVersion{number: parts[1], build: build}, nil
}

// limited passes the first bytes on and drops the rest.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	if n := min(len(p), l.left); n > 0 {
		l.left -= n
		if _, err := l.w.Write(p[:n]); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// envoyArgs is Envoy's command line (contract).
func envoyArgs(cfg *Config, v envoyVersion, bootstrap string) []string {
	args := []string{
		"--config-path", bootstrap,
		"--drain-time-s", strconv.Itoa(int(cfg.DrainTime.Round(time.Second) / time.Second)),
		"--drain-strategy", "immediate",
		"--disable-hot-restart",
		"--log-level", cfg.envoyLogLevel(),
		// The log of refusals should be there when somebody looks; Envoy's own
		// default is to keep lines for 10 s.
		"--file-flush-interval-msec", "500",
	}
	if cfg.EnvoyComponentLogLevel != "" {
		args = append(args, "--component-log-level", cfg.EnvoyComponentLogLevel)
	}
	switch major, minor, ok := v.release(); {
	case cfg.Concurrency > 0:
		args = append(args, "--concurrency", strconv.Itoa(int(cfg.Concurrency)))
	case runtime.GOOS == "linux" && ok && major == 1 && minor < 40:
		// From 1.40 on it is what Envoy does by itself.
		args = append(args, "--cpuset-threads")
	}
	return args
}

func (c *Config) envoyLogLevel() string {
	switch {
	case c.EnvoyLogLevel != "":
		return c.EnvoyLogLevel
	case c.LogLevel != "":
		return c.LogLevel
	}
	return "info"
}

// envoy is a running Envoy. It never outlives kuma-dp.
type envoy struct {
	proc *os.Process
	// ended is closed when the process is gone; err says how.
	ended chan struct{}
	err   error
	log   *envoyLog
}

// startEnvoy runs Envoy in a process group of its own, with its log joined to
// kuma-dp's.
func startEnvoy(binary string, args []string, log *slog.Logger) (*envoy, error) {
	e := &envoy{ended: make(chan struct{}), log: &envoyLog{log: log}}
	started := make(chan error, 1)
	go func() {
		// The kernel ends the child when the thread that started it ends, so
		// this goroutine keeps its thread until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(e.ended)
		r, w, err := os.Pipe()
		if err != nil {
			started <- err
			return
		}
		cmd := exec.Command(binary, args...)
		cmd.Stdout, cmd.Stderr = w, w
		cmd.SysProcAttr = childAttributes()
		err = cmd.Start()
		_ = w.Close()
		if err != nil {
			_ = r.Close()
			started <- err
			return
		}
		var reading sync.WaitGroup
		reading.Go(func() {
			defer r.Close()
			e.log.read(r)
		})
		e.proc = cmd.Process
		started <- nil
		e.err = cmd.Wait()
		// A grandchild may hold the pipe: don't wait for it for ever.
		late := time.AfterFunc(time.Second, func() { _ = r.Close() })
		reading.Wait()
		late.Stop()
	}()
	if err := <-started; err != nil {
		return nil, errs.New(errs.Unavailable, "start Envoy %s: %w", binary, err)
	}
	return e, nil
}

// reason says why Envoy ended; nil after a clean exit or a request to end.
func (e *envoy) reason() error {
	<-e.ended
	exit, ok := errors.AsType[*exec.ExitError](e.err)
	if e.err == nil || ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
		return nil
	}
	if ok && exit.Exited() {
		if last := e.log.lastError(); last != "" {
			return errs.New(errs.Unavailable, "envoy ended with %s: %s", e.err, last)
		}
		return errs.New(errs.Unavailable, "envoy ended with %s", e.err)
	}
	return e.err
}

// stop asks Envoy to end, and ends it if it does not within the time given.
func (e *envoy) stop(patience time.Duration) {
	_ = e.proc.Signal(syscall.SIGTERM)
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-e.ended:
	case <-t.C:
		_ = e.proc.Kill()
		<-e.ended
	}
}

// envoyLog reads Envoy's log and writes it as our own.
type envoyLog struct {
	log *slog.Logger

	// seen says when a warning was last written, so that one which Envoy
	// repeats at each of its attempts is shown once a minute.
	seen map[string]time.Time

	// spoken says that Envoy itself has logged something. What comes before is
	// the loader's or a shell's, and may be why there is no Envoy.
	spoken bool

	mu   sync.Mutex
	last string
}

const (
	repeatInterval = time.Minute
	maxSeen        = 64
)

// repeated reports whether a message was written within the last minute.
// Numbers in it don't count: they are times and connections.
func (l *envoyLog) repeated(message string, now time.Time) bool {
	key := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' || r == '.' {
			return -1
		}
		return r
	}, message)
	if at, ok := l.seen[key]; ok && now.Sub(at) < repeatInterval {
		return true
	}
	if l.seen == nil || len(l.seen) >= maxSeen {
		l.seen = map[string]time.Time{}
	}
	l.seen[key] = now
	return false
}

// maxLogLine bounds a line of Envoy's log; longer ones are cut.
const maxLogLine = 16 << 10

func (l *envoyLog) read(r io.Reader) {
	b := bufio.NewReaderSize(r, maxLogLine)
	level := slog.LevelInfo
	for {
		line, err := b.ReadSlice('\n')
		if len(line) > 0 {
			level = l.line(strings.TrimRight(string(line), "\r\n"), level)
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = b.ReadSlice('\n')
		}
		if err != nil {
			return
		}
	}
}

// line writes one line. Lines that don't start with Envoy's own prefix continue
// the one before and have its level.
func (l *envoyLog) line(s string, before slog.Level) slog.Level {
	component, at, message, level, ok := parseEnvoyLine(s)
	if !ok {
		if s = strings.TrimSpace(s); s == "" {
			return before
		}
		if before >= slog.LevelError || !l.spoken {
			l.remember(s)
		}
		l.log.Log(context.Background(), before, "envoy", "text", s)
		return before
	}
	if !l.spoken {
		l.spoken = true
		l.remember("")
	}
	shown := level
	if level == slog.LevelInfo && inventory(message) {
		shown = slog.LevelDebug
	}
	if level >= slog.LevelError {
		l.remember(message)
	}
	if level >= slog.LevelWarn && l.repeated(message, time.Now()) {
		shown = slog.LevelDebug
	}
	l.log.Log(context.Background(), shown, "envoy", "text", strings.TrimSpace(message), "component", component, "at", at)
	return shown
}

func (l *envoyLog) remember(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = s
}

func (l *envoyLog) lastError() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// inventory tells the list of extensions and the sizes of header maps, some
// eighty lines at each start, from news.
func inventory(message string) bool {
	return strings.HasPrefix(message, "  ") || strings.HasPrefix(message, "statically linked extensions") || strings.HasPrefix(message, "HTTP header map info")
}

// parseEnvoyLine takes "[time][thread][level][component] [file:line] message"
// apart.
func parseEnvoyLine(s string) (component, at, message string, level slog.Level, ok bool) {
	field := func() (string, bool) {
		if !strings.HasPrefix(s, "[") {
			return "", false
		}
		f, rest, ok := strings.Cut(s[1:], "]")
		s = rest
		return f, ok
	}
	if _, ok = field(); !ok {
		return
	}
	if _, ok = field(); !ok {
		return
	}
	name, ok := field()
	if !ok {
		return
	}
	if level, ok = envoyLevels(name); !ok {
		return
	}
	if component, ok = field(); !ok {
		return
	}
	s = strings.TrimPrefix(s, " ")
	if rest := s; strings.HasPrefix(s, "[") {
		// A message may start with a bracket of its own, such as [C12].
		if f, found := field(); found && strings.Contains(f, ":") {
			at, s = f, strings.TrimPrefix(s, " ")
		} else {
			s = rest
		}
	}
	return component, at, s, level, true
}

func envoyLevels(name string) (slog.Level, bool) {
	switch name {
	case "trace", "debug":
		return slog.LevelDebug, true
	case "info":
		return slog.LevelInfo, true
	case "warning":
		return slog.LevelWarn, true
	case "error", "critical":
		return slog.LevelError, true
	}
	return 0, false
}
