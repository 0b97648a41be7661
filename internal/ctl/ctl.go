// Package ctl is kumactl: commands that are generic over the kinds which a
// control plane, or the index embedded here, lists.
//
// The command line is contract: names of commands and flags, what is printed on success, the text of
// errors. Results go to standard output; warnings and errors go to standard
// error; the exit code is 0 or 1.
package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"kuma/internal/errs"
	"kuma/internal/names"
)

const (
	defaultMesh    = "default"
	defaultTimeout = time.Minute
)

// Main runs one kumactl command and returns its exit code: 0, or 1 after it
// wrote "Error: …" to stderr. The arguments are those after the program's
// name; env is os.Getenv or like it (HOME is read). An interrupt ends the
// command.
func Main(args []string, stdin io.Reader, stdout, stderr io.Writer, env func(string) string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, env: env, now: time.Now}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(stderr, "Error: "+visible(err.Error()))
		return 1
	}
	return 0
}

// app is what the commands of one run share: where they read and write, and
// the global flags.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	env            func(string) string
	now            func() time.Time

	timeout    time.Duration
	configFile string
	context    string
	logLevel   string
	noConfig   bool
	log        *slog.Logger
}

// root builds the tree of commands.
func (a *app) root() *cobra.Command {
	c := &cobra.Command{
		Use:           "kumactl",
		Short:         "Manage a service mesh",
		Long:          "kumactl manages a service mesh through its control plane's API.",
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			return a.startLog()
		},
	}
	c.CompletionOptions.DisableDefaultCmd = true
	f := c.PersistentFlags()
	f.DurationVar(&a.timeout, "api-timeout", defaultTimeout, "longest time to wait for one answer of the control plane, 0 for no limit")
	f.StringVar(&a.configFile, "config-file", "", "path to the configuration file (default ~/.kumactl/config)")
	f.StringVar(&a.context, "context", "", "name of the context to use (default: the configuration's current one)")
	f.StringVar(&a.logLevel, "log-level", "off", "log on standard error: off, info or debug")
	f.BoolVar(&a.noConfig, "no-config", false, "ignore the configuration file and talk to http://localhost:5681")
	c.AddCommand(
		a.applyCommand(),
		a.getCommand(),
		a.deleteCommand(),
		a.inspectCommand(),
		a.generateCommand(),
		a.tlsCommand(),
		a.caCommand(),
		a.configCommand(),
		a.completionCommand(),
		a.versionCommand(),
	)
	return c
}

// group is a command that only holds others: called alone it prints its help,
// called with a word that is none of them it fails.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			var known []string
			for _, s := range c.Commands() {
				known = append(known, s.Name())
			}
			return fmt.Errorf("unknown command %q for %q%s", args[0], c.CommandPath(), suggestion(args[0], known))
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(sub...)
	return c
}

// choices lets a shell complete a flag's values.
func choices(c *cobra.Command, flag string, values ...string) {
	must(c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
}

// suggestion names the nearest candidate, or lists them all.
func suggestion(word string, known []string) string {
	if n := names.Nearest(word, known); n != "" {
		return fmt.Sprintf("; did you mean %q?", n)
	}
	return "; known: " + strings.Join(known, ", ")
}

// startLog makes the log that --log-level asks for.
func (a *app) startLog() error {
	switch a.logLevel {
	case "off":
		a.log = slog.New(slog.DiscardHandler)
	case "info", "debug":
		level := slog.LevelInfo
		if a.logLevel == "debug" {
			level = slog.LevelDebug
		}
		a.log = slog.New(slog.NewTextHandler(a.stderr, &slog.HandlerOptions{Level: level}))
	default:
		return errs.New(errs.Invalid, "unknown log level %q: must be off, info or debug", a.logLevel)
	}
	if a.timeout < 0 {
		return errs.New(errs.Invalid, "--api-timeout must not be negative")
	}
	return nil
}

// warn writes one warning for people to standard error.
func (a *app) warn(format string, args ...any) {
	a.tell("Warning: "+format, args...)
}

// tell writes one line to standard error.
func (a *app) tell(format string, args ...any) {
	fmt.Fprintln(a.stderr, visible(fmt.Sprintf(format, args...)))
}

// print writes to standard output. A failure (a closed pipe, a full disk) is
// returned, so that the exit code tells it.
func (a *app) print(format string, args ...any) error {
	if _, err := fmt.Fprintf(a.stdout, format, args...); err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	return nil
}

// write puts bytes to standard output as they are.
func (a *app) write(b []byte) error {
	if _, err := a.stdout.Write(b); err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	return nil
}
