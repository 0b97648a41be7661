package cp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"kuma/internal/conf"
)

// Main is the command kuma-cp. Env is the environment, as os.Environ gives it.
// It returns the exit code: 0, or 1 after it has written "Error: …" to stderr.
func Main(ctx context.Context, args, env []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{Use: "kuma-cp", Short: "The control plane of a service mesh", SilenceUsage: true, SilenceErrors: true}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	var out logOutput
	p := root.PersistentFlags()
	p.StringVar(&out.level, "log-level", "info", "what is logged: off, info or debug")
	p.StringVar(&out.path, "log-output-path", "", "file to log into (default: standard error)")
	p.IntVar(&out.maxSize, "log-max-size", 100, "size in megabytes at which a log file is rotated")
	p.IntVar(&out.maxAge, "log-max-age", 30, "days that rotated log files are kept")
	p.IntVar(&out.maxFiles, "log-max-retained-files", 1000, "number of rotated log files that are kept")
	root.AddCommand(runCommand(&out, env), migrateCommand(&out, env), versionCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(stderr, "Error:", err)
		return 1
	}
	return 0
}

func runCommand(out *logOutput, env []string) *cobra.Command {
	var file string
	c := &cobra.Command{
		Use: "run", Short: "Run the control plane until SIGTERM or SIGINT", Args: cobra.NoArgs,
		Example: "  kuma-cp run\n  KUMA_STORE_TYPE=memory kuma-cp run\n  kuma-cp run --config-file kuma-cp.yaml",
		RunE: func(c *cobra.Command, _ []string) error {
			log, err := out.open(c.ErrOrStderr())
			if err != nil {
				return err
			}
			return run(c.Context(), file, env, log)
		},
	}
	c.Flags().StringVarP(&file, "config-file", "c", "", "configuration, YAML; KUMA_* variables win over it")
	return c
}

// load reads the configuration and tells its warnings.
func load(file string, env []string, log *slog.Logger) (Config, error) {
	cfg, warnings, err := Load(file, env)
	for _, w := range warnings {
		log.Warn("setting without effect", "warning", w)
	}
	if err != nil {
		return cfg, fmt.Errorf("configuration: %w", err)
	}
	return cfg, nil
}

func run(ctx context.Context, file string, env []string, log *slog.Logger) error {
	cfg, err := load(file, env, log)
	if err != nil {
		return err
	}
	c, err := New(ctx, cfg, log)
	if stopped(ctx, err) {
		log.Info("stopped before it served", "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	return c.Run(ctx)
}

// stopped tells whether a control plane that could not be made was told to end.
func stopped(ctx context.Context, err error) bool {
	return err != nil && errors.Is(ctx.Err(), context.Canceled)
}

func migrateCommand(out *logOutput, env []string) *cobra.Command {
	parent := &cobra.Command{Use: "migrate", Short: "Prepare the store's database for this version", Args: cobra.NoArgs}
	var file string
	c := &cobra.Command{
		Use: "up", Short: "Make the tables in the store's database, or bring them up to date", Args: cobra.NoArgs,
		Example: "  KUMA_STORE_TYPE=postgres kuma-cp migrate up",
		RunE: func(c *cobra.Command, _ []string) error {
			log, err := out.open(c.ErrOrStderr())
			if err != nil {
				return err
			}
			cfg, err := load(file, env, log)
			if err != nil {
				return err
			}
			changed, err := migrate(c.Context(), cfg, log)
			if err != nil {
				return err
			}
			done := "DB has already been migrated"
			if changed {
				done = "DB has been migrated"
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), done, "for Kuma", conf.Build().Version)
			return err
		},
	}
	c.Flags().StringVarP(&file, "config-file", "c", "", "configuration, YAML; KUMA_* variables win over it")
	parent.AddCommand(c)
	return parent
}

func versionCommand() *cobra.Command {
	var detailed bool
	c := &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(c *cobra.Command, _ []string) {
			b := conf.Build()
			if !detailed {
				fmt.Fprintln(c.OutOrStdout(), b.Product+":", b.Version)
				return
			}
			fmt.Fprintf(c.OutOrStdout(), "Product:    %s\nVersion:    %s\nGit Commit: %s\nBuild Date: %s\n", b.Product, b.Version, b.GitCommit, b.BuildDate)
		},
	}
	c.Flags().BoolVarP(&detailed, "detailed", "a", false, "print commit and date too")
	return c
}
