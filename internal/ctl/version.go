package ctl

import (
	"cmp"
	"context"

	"github.com/spf13/cobra"

	"kuma/internal/conf"
)

func (a *app) versionCommand() *cobra.Command {
	var detailed bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Show the versions of kumactl and of the control plane",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return a.version(c.Context(), detailed)
		},
	}
	c.Flags().BoolVarP(&detailed, "detailed", "a", false, "show how they were built too")
	return c
}

func (a *app) version(ctx context.Context, detailed bool) error {
	b := conf.Build()
	if detailed {
		err := a.print("Client:\n  Product:    %s\n  Version:    %s\n  Git Commit: %s\n  Build Date: %s\n",
			b.Product, b.Version, cmp.Or(b.GitCommit, "unknown"), cmp.Or(b.BuildDate, "unknown"))
		if err != nil {
			return err
		}
	} else if err := a.print("Client: %s %s\n", b.Product, b.Version); err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		a.warn("unable to connect to a control plane: %s", firstLine(err.Error()))
		return nil
	}
	i, err := c.index(ctx)
	if err != nil {
		a.warn("unable to connect to the control plane: %s", firstLine(err.Error()))
		return nil
	}
	c.fits(i)
	based := ""
	if i.BasedOn != "" {
		based = " (based on Kuma " + i.BasedOn + ")"
	}
	if detailed {
		return a.print("Server:\n  Product:    %s\n  Version:    %s%s\n  Instance:   %s\n  Cluster:    %s\n", i.Product, i.Version, based, i.InstanceID, i.ClusterID)
	}
	return a.print("Server: %s %s%s\n", i.Product, i.Version, based)
}

func clientVersion() string { return conf.Build().Version }
