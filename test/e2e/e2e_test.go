//go:build e2e

// Package e2e runs the real programs with a real Envoy. BIN is the directory of
// kuma-cp, kuma-dp and kumactl, ENVOY the path of an Envoy; make e2e sets both.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
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

// room is a lab that a test has for itself.
type room struct {
	*testing.T
	*lab.Lab
	ctx  context.Context
	self []string
}

func open(t *testing.T) *room {
	t.Helper()
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
	r.ctx, cancel = context.WithTimeout(t.Context(), 2*time.Minute)
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

// service starts a service on a port and returns the port; calls is the URL
// that its /ask calls, if any.
func (r *room) service(name, calls string) int {
	r.Helper()
	port := r.port()
	args := []string{"service", "-name", name, "-listen", fmt.Sprintf("127.0.0.1:%d", port)}
	if calls != "" {
		args = append(args, "-calls", calls)
	}
	p, err := r.Start("service-"+name, nil, r.self[0], args...)
	r.must(err)
	r.must(r.Await(r.ctx, p, name+" answers", func() error {
		code, _, err := lab.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%d", code)
		}
		return err
	}))
	return port
}

// mtls is a mesh with mutual TLS.
func mtls(mode string) string {
	return "type: Mesh\nname: default\nmtls:\n  enabledBackend: ca-1\n  backends:\n  - name: ca-1\n    type: builtin\n    mode: " + mode + "\n"
}

// inbound describes a proxy with one inbound, and outbounds to services.
func inbound(name, protocol string, port, service int, outbounds map[int]string) string {
	y := fmt.Sprintf(`type: Dataplane
mesh: default
name: %s
labels: {app: %s}
networking:
  address: 127.0.0.1
  inbound:
  - port: %d
    servicePort: %d
    serviceAddress: 127.0.0.1
    tags: {kuma.io/service: %s, kuma.io/protocol: %s}
`, name, name, port, service, name, protocol)
	if len(outbounds) > 0 {
		y += "  outbound:\n"
		for p, s := range outbounds {
			y += fmt.Sprintf("  - port: %d\n    tags: {kuma.io/service: %s}\n", p, s)
		}
	}
	return y
}

// ask has a service call the one behind its outbound.
func ask(port int) (story.Asked, error) {
	var a story.Asked
	err := lab.GetJSON(fmt.Sprintf("http://127.0.0.1:%d/ask", port), &a)
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return a, err
}

// awaitStatus waits until a service's calls are answered with the status.
func (r *room) awaitStatus(port, status int) story.Asked {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, 20*time.Second)
	defer cancel()
	var a story.Asked
	r.must(r.Await(ctx, nil, fmt.Sprintf("the answer is %d", status), func() error {
		var err error
		if a, err = ask(port); err == nil && a.Status != status {
			err = fmt.Errorf("%d %s", a.Status, a.Body)
		}
		return err
	}))
	return a
}

// teller tells a story into a test's log.
type teller struct{ *testing.T }

func (t teller) Step(title, expected string) { t.Log("step: ", title, "; expected: ", expected) }
func (t teller) Command(line string)         { t.Log("$ ", line) }
func (t teller) Seen(seen string, ok bool)   { t.Log("seen: ", ok, seen) }
