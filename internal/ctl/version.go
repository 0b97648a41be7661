package ctl

import (
	"context"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
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
	b := build()
	if detailed {
		err := a.print("Client:\n  Product:    %s\n  Version:    %s\n  Git Tag:    %s\n  Git Commit: %s\n  Build Date: %s\n",
			product, b.Version, b.GitTag, b.GitCommit, b.BuildDate)
		if err != nil {
			return err
		}
	} else if err := a.print("Client: %s %s\n", product, b.Version); err != nil {
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

// compatible reports whether two versions may work together: the same major,
// and minors at most two apart. A preview or a version of another form is
// taken as compatible.
func compatible(a, b string) bool {
	aMajor, aMinor, ok := release(a)
	if !ok {
		return true
	}
	bMajor, bMinor, ok := release(b)
	if !ok {
		return true
	}
	return aMajor == bMajor && max(aMinor, bMinor)-min(aMinor, bMinor) <= 2
}

// release reads the major and minor number of a released version.
func release(v string) (major, minor int, ok bool) {
	v = strings.TrimPrefix(v, "v")
	if strings.Contains(v, "-") {
		return 0, 0, false
	}
	parts := strings.SplitN(v, ".", 3)
	if len(parts) < 3 {
		return 0, 0, false
	}
	major, err := strconv.Atoi(parts[0])
	if err != nil {
		return 0, 0, false
	}
	minor, err = strconv.Atoi(parts[1])
	return major, minor, err == nil
}

// buildInfo says how this program was built.
type buildInfo struct{ Version, GitTag, GitCommit, BuildDate string }

// build reads what the Go tool wrote into this program.
func build() buildInfo {
	b := buildInfo{Version: "0.0.0-preview", GitTag: "unknown", GitCommit: "unknown", BuildDate: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.GitCommit = s.Value
		case "vcs.time":
			b.BuildDate = s.Value
		}
	}
	return b
}

func clientVersion() string { return build().Version }
