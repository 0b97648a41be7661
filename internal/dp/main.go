package dp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"gopkg.in/natefinch/lumberjack.v2"

	"kuma/internal/conf"
	"kuma/internal/errs"
)

// Main is the command kuma-dp. It returns the exit code: 0, or 1 after it has
// written "Error: …" to stderr.
func Main(ctx context.Context, args []string, env func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use: "kuma-dp", Short: "Runs one proxy of a service mesh",
		Long:         "kuma-dp runs one Envoy for a service mesh: it gets the proxy's configuration from the control plane and keeps the proxy's private keys.",
		SilenceUsage: true, SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	var out logOutput
	p := root.PersistentFlags()
	p.StringVar(&out.level, "log-level", "info", "log level: off, info or debug")
	p.StringVar(&out.path, "log-output-path", "", "file to log into (default: standard error)")
	p.IntVar(&out.maxSize, "log-max-size", 100, "size in megabytes at which a log file is rotated")
	p.IntVar(&out.maxAge, "log-max-age", 30, "days that rotated log files are kept")
	p.IntVar(&out.maxFiles, "log-max-retained-files", 1000, "number of rotated log files that are kept")
	root.AddCommand(runCommand(&out, env, stdin, stderr), waitCommand(), versionCommand(stdout))
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "Error:", err)
		return 1
	}
	return 0
}

// logOutput is where the log goes to, and from which level on.
type logOutput struct {
	level, path               string
	maxSize, maxAge, maxFiles int
}

func (o *logOutput) open(stderr io.Writer) (*slog.Logger, error) {
	level := slog.LevelInfo
	switch o.level {
	case "off":
		return slog.New(slog.DiscardHandler), nil
	case "debug":
		level = slog.LevelDebug
	case "info":
	default:
		return nil, errs.Fields(errs.Field{Path: "--log-level", Message: fmt.Sprintf("%q is unknown; it must be one of off, info, debug", o.level)})
	}
	w := stderr
	if o.path != "" {
		// Opened once here, so that a path that can't be written is told now.
		f, err := os.OpenFile(o.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return nil, errs.New(errs.Invalid, "--log-output-path: %w", err)
		}
		if err := f.Close(); err != nil {
			return nil, errs.New(errs.Unavailable, "--log-output-path: %w", err)
		}
		w = &lumberjack.Logger{Filename: o.path, MaxSize: o.maxSize, MaxAge: o.maxAge, MaxBackups: o.maxFiles}
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})), nil
}

func runCommand(out *logOutput, env func(string) string, stdin io.Reader, stderr io.Writer) *cobra.Command {
	cfg := Default()
	list := cfg.settings()
	cmd := &cobra.Command{
		Use: "run", Short: "Run a proxy", Args: cobra.NoArgs,
		Long: "Runs a proxy: asks the control plane for its configuration, then runs Envoy until it is asked to stop.",
		Example: `  kuma-dp run --cp-address=https://cp:5678 --ca-cert-file=kuma-cp.crt \
    --dataplane-file=web.yaml --dataplane-var address=10.0.0.7 --dataplane-token-file=token`,
	}
	register(cmd.Flags(), list)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		log, err := out.open(stderr)
		if err != nil {
			return err
		}
		warnings, err := fromEnv(list, cmd.Flags().Changed, env)
		if err != nil {
			return err
		}
		for _, w := range warnings {
			log.Warn(w)
		}
		if env("GOMEMLIMIT") == "" {
			// What lives is a few megabytes; this keeps garbage from piling up.
			debug.SetMemoryLimit(softMemory)
		}
		cfg.Log, cfg.Stdin, cfg.LogLevel, cfg.Path = log, stdin, out.level, env("PATH")
		cfg.Home = env("HOME")
		if dir, err := os.UserCacheDir(); err == nil {
			cfg.CacheDir = dir
		}
		pod := ""
		if name := env("POD_NAME"); name != "" {
			cfg.ReadinessAddress = ""
			if ns := env("POD_NAMESPACE"); ns != "" {
				pod = name + "." + ns
			}
		}
		// A request to stop must not get lost while another is acted upon.
		signals := make(chan os.Signal, 8)
		signal.Notify(signals, syscall.SIGTERM, os.Interrupt, syscall.SIGUSR2)
		defer signal.Stop(signals)
		cfg.Signals = signals
		return Run(cmd.Context(), cfg, build(), pod)
	}
	return cmd
}

// softMemory is where the garbage collector begins to work harder, in bytes.
const softMemory = 20 << 20

// build says which build this is, as the control plane wants to hear it.
func build() Build {
	b := conf.Build()
	return Build{Version: b.Version, GitCommit: b.GitCommit, BuildDate: b.BuildDate}
}

func versionCommand(stdout io.Writer) *cobra.Command {
	var detailed bool
	cmd := &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
		b := conf.Build()
		if !detailed {
			fmt.Fprintln(stdout, b.Product+":", b.Version)
			return nil
		}
		fmt.Fprintf(stdout, "Product:    %s\nVersion:    %s\nGit Commit: %s\nBuild Date: %s\n", b.Product, b.Version, b.GitCommit, b.BuildDate)
		return nil
	}}
	cmd.Flags().BoolVarP(&detailed, "detailed", "a", false, "print where it was built from too")
	return cmd
}

// ownReadiness is where this kuma-dp answers. The contract's port is that of
// Envoy's admin interface, which is open on a network only for proxies without a
// link.
const ownReadiness = "http://localhost:9902/ready"

// waitCommand waits for a proxy to be ready.
func waitCommand() *cobra.Command {
	var at, socket string
	var every, one, all time.Duration
	cmd := &cobra.Command{Use: "wait", Short: "Wait until a proxy is ready", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		u, err := url.Parse(at)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return errs.Fields(errs.Field{Path: "--url", Message: fmt.Sprintf("%q is not a URL such as http://localhost:9902/ready", at)})
		}
		if socket == "" && !loopback(u.Hostname()) {
			return errs.Fields(errs.Field{Path: "--url", Message: fmt.Sprintf("%q must be on this machine: its host must be localhost or a loopback address", at)})
		}
		if every <= 0 || one <= 0 || all <= 0 {
			return errs.Fields(errs.Field{Path: "--check-frequency", Message: "must be positive, as must --request-timeout and --timeout"})
		}
		client := &http.Client{Timeout: one, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		if socket != "" {
			client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			}}
		}
		urls := []string{at}
		if socket == "" && !cmd.Flags().Changed("url") {
			urls = append(urls, ownReadiness)
		}
		return wait(cmd.Context(), client, urls, every, all)
	}}
	f := cmd.Flags()
	f.StringVar(&at, "url", "http://localhost:9901/ready", "URL to ask, on this machine; without this flag also "+ownReadiness+", where nothing listens on the former")
	f.StringVar(&socket, "unix-socket", "", "Unix socket to ask instead of the URL's host")
	f.DurationVar(&every, "check-frequency", time.Second, "pause between questions")
	f.DurationVar(&one, "request-timeout", 500*time.Millisecond, "how long one question may take")
	f.DurationVar(&all, "timeout", 3*time.Minute, "how long to wait in all")
	return cmd
}

func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// wait asks until the answer is 200 or the time is over: the first URL, and
// the next where nothing listens there.
func wait(ctx context.Context, client *http.Client, urls []string, every, all time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, all)
	defer cancel()
	last := "it was not asked"
	for {
		for _, at := range urls {
			status, body, err := ask(ctx, client, at)
			switch {
			case err == nil && status == http.StatusOK:
				return nil
			case err == nil:
				last = fmt.Sprintf("status %d: %s", status, body)
			case ctx.Err() == nil:
				last = err.Error()
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				break
			}
		}
		if !sleep(ctx, every) {
			return errs.New(errs.Unavailable, "the proxy was not ready within %s: %s", all, last)
		}
	}
}

// ask asks once, and reads the beginning of the answer.
func ask(ctx context.Context, client *http.Client, at string) (status int, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, _ = io.ReadAll(io.LimitReader(resp.Body, 512))
	return resp.StatusCode, body, nil
}
