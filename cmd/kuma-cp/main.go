// Command kuma-cp is the control plane of a service mesh.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"kuma/internal/conf"
	"kuma/internal/cp"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var level, file string
	root := &cobra.Command{Use: "kuma-cp", Short: "The control plane of a service mesh", SilenceUsage: true, SilenceErrors: true}
	root.PersistentFlags().StringVar(&level, "log-level", "info", "what is logged: off, info or debug")
	run := &cobra.Command{
		Use: "run", Short: "Run the control plane until SIGTERM or SIGINT", Args: cobra.NoArgs,
		Example: "  kuma-cp run\n  KUMA_STORE_TYPE=memory kuma-cp run\n  kuma-cp run --config-file kuma-cp.yaml",
		RunE: func(c *cobra.Command, _ []string) error {
			log, err := cp.Logger(c.ErrOrStderr(), level)
			if err != nil {
				return err
			}
			return run(c.Context(), file, log)
		},
	}
	run.Flags().StringVarP(&file, "config-file", "c", "", "configuration, YAML; KUMA_* variables win over it")
	var detailed bool
	version := &cobra.Command{
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
	version.Flags().BoolVarP(&detailed, "detailed", "a", false, "print commit and date too")
	root.AddCommand(run, version)
	return root
}

func run(ctx context.Context, file string, log *slog.Logger) error {
	cfg, warnings, err := cp.Load(file, os.Environ())
	for _, w := range warnings {
		log.Warn("setting without effect", "warning", w)
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	c, err := cp.New(ctx, cfg, log)
	if err != nil {
		return err
	}
	return c.Run(ctx)
}
