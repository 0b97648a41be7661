//go:build e2e

// Package e2e runs the real programs with a real Envoy. BIN is the directory of
// kuma-cp, kuma-dp and kumactl, ENVOY the path of an Envoy; make e2e sets both.
package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kuma/test/lab"
	"kuma/test/story"
)

// TestMain lets the test binary be the story's services as well.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "service" {
		if err := story.Service(context.Background(), os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const (
	// patience is how long a test waits for what takes a second at most on a
	// machine with nothing else to do; attempt is how long it gives each of the
	// attempts that it makes meanwhile.
	patience = time.Minute
	attempt  = 20 * time.Second
)

// room is a lab that a test has for itself.
type room struct {
	*testing.T
	*lab.Lab
	ctx  context.Context
	self []string
}

func open(t *testing.T) *room {
	t.Helper()
	t.Parallel()
	bin, envoy := os.Getenv("BIN"), os.Getenv("ENVOY")
	if bin == "" || envoy == "" {
		t.Fatal("BIN and ENVOY must be set: run make e2e")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: its paths are too long for Unix sockets.
	dir, err := os.MkdirTemp("", "kuma-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	r := &room{T: t, Lab: lab.New(dir, bin, envoy), self: []string{self}}
	var cancel context.CancelFunc
	r.ctx, cancel = context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(func() {
		cancel()
		r.Close()
		if t.Failed() {
			r.keepLogs()
		}
		_ = os.RemoveAll(dir)
	})
	return r
}

// keepLogs shows the ends of all logs of a test that failed.
func (r *room) keepLogs() {
	logs, _ := filepath.Glob(filepath.Join(r.Dir, "*.log"))
	for _, f := range logs {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		r.Logf("--- %s\n%s", filepath.Base(f), strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
}

// must ends the test on an error.
func (r *room) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// controlPlane starts a control plane.
func (r *room) controlPlane(env ...string) *lab.ControlPlane {
	r.Helper()
	cp, err := r.ControlPlane(r.ctx, env...)
	r.must(err)
	return cp
}

// port returns a free port.
func (r *room) port() int {
	r.Helper()
	p, err := r.Ports(1)
	r.must(err)
	return p[0]
}

// teller tells a story into a test's log.
type teller struct{ *testing.T }

func (t teller) Step(title, expected string) { t.Log("step: ", title, "; expected: ", expected) }
func (t teller) Command(line string)         { t.Log("$ ", line) }
func (t teller) Seen(seen string, ok bool)   { t.Log("seen: ", ok, seen) }
