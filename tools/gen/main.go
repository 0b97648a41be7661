// Command gen makes everything in this repository that is generated. Run it as
// "make generate" or "go run ./tools/gen" from the root of the module; it needs
// nothing but Go.
//
// It has one step for each kind of output, in the order of the steps list.
// Output is deterministic: running it twice changes nothing, and CI fails when
// running it once does.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
)

// A step makes one kind of output below the module's root.
type step struct {
	name string
	what string
	run  func(ctx context.Context, root string) error
}

// steps lists all that is generated.
func steps() []step {
	return []step{
		{"proto", "the Go code of proto/**/*.proto", generateProto},
		{"kinds", "internal/ctl/kinds.json, kumactl's index of kinds", generateKinds},
		{"reference", "docs/reference/*.md, a page for each kind", generateReference},
		{"settings", "docs/reference/kuma-cp-settings.md, the settings of kuma-cp", generateSettings},
		{"openapi", "docs/reference/openapi.yaml, the HTTP interface", generateOpenAPI},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// run executes the steps that args name, or all of them.
func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("gen", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: go run ./tools/gen [STEP...]\n\nsteps, all of them unless some are named:")
		for _, s := range steps() {
			fmt.Fprintf(flags.Output(), "  %-10s %s\n", s.name, s.what)
		}
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	for _, name := range flags.Args() {
		wanted[name] = true
	}
	for _, s := range steps() {
		if len(flags.Args()) > 0 && !wanted[s.name] {
			continue
		}
		delete(wanted, s.name)
		if err := s.run(ctx, root); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	for name := range wanted {
		return fmt.Errorf("there is no step %q; -h lists them", name)
	}
	return nil
}

// moduleRoot finds the directory with this module's go.mod, upwards from the
// working directory.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		data, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module kuma\n") {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod of module kuma in this directory or above it")
		}
		dir = parent
	}
}

// writeFile writes data to path unless it holds exactly that already, so that
// an unchanged output keeps its time and does not trigger a rebuild.
func writeFile(path string, data []byte) error {
	old, err := os.ReadFile(path)
	if err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}
