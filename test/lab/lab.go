// Package lab runs the real programs on this machine: a control plane, proxies
// with their Envoys, services. The demo and the end-to-end tests are made of it.
package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Lab is a directory with everything that one run makes, and the processes in
// it.
type Lab struct {
	// Dir holds all files of the run.
	Dir string
	// Bin is where kuma-cp, kuma-dp and kumactl are; Envoy is a real Envoy.
	Bin, Envoy string

	mu    sync.Mutex
	procs []*Process
	// blocks hold the blocks of ports; the next port to give out is in the last
	// one, which ends before endPort.
	blocks            []net.Listener
	nextPort, endPort int
}

// New makes a lab in a directory.
func New(dir, bin, envoy string) *Lab {
	return &Lab{Dir: dir, Bin: bin, Envoy: envoy}
}

// A lab's ports come in blocks, below those that the kernel gives to outgoing
// connections. Who listens on the first port of a block owns the block.
const (
	firstPort, lastPort = 10240, 32768
	blockSize           = 32
)

// Ports returns n ports that nobody listens on, none of which this lab, or
// another on this machine, gave out before.
func (l *Lab) Ports(n int) ([]int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []int
	for len(out) < n {
		if l.nextPort == l.endPort {
			if err := l.claim(); err != nil {
				return nil, err
			}
		}
		p := l.nextPort
		l.nextPort++
		if !free(p) {
			continue // a stranger's
		}
		out = append(out, p)
	}
	return out, nil
}

// free reports whether nobody listens on a port. No program is started
// meanwhile: until it is executed it would hold a copy of what listens here, and
// who is given the port could not listen.
func free(port int) bool {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	h, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	return err == nil && h.Close() == nil
}

// claim takes a block of ports that nobody owns.
func (l *Lab) claim() error {
	for _, i := range rand.Perm((lastPort - firstPort) / blockSize) {
		p := firstPort + i*blockSize
		if h, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", p)); err == nil {
			l.blocks = append(l.blocks, h)
			l.nextPort, l.endPort = p+1, p+blockSize
			return nil
		}
	}
	return errors.New("all ports for labs are in use")
}

// FreePort is a port that nobody listens on, and that nobody else is given
// until the test ends. A port that the kernel picked and that was closed again
// is none: the kernel gives it to the next who asks.
func FreePort(t testing.TB) int {
	t.Helper()
	l := New(t.TempDir(), "", "")
	t.Cleanup(l.Close)
	ports, err := l.Ports(1)
	if err != nil {
		t.Fatal(err)
	}
	return ports[0]
}

// File writes a file of the lab and returns its path.
func (l *Lab) File(name, content string) (string, error) {
	p := filepath.Join(l.Dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return "", err
	}
	return p, os.WriteFile(p, []byte(content), 0o600)
}

// Process is a program that runs in the background.
type Process struct {
	Name string
	// LogFile has what it wrote to stdout and stderr, over all its starts.
	LogFile string
	Cmd     *exec.Cmd

	done chan struct{}
	err  error
}

// Start starts a program; its output goes to <name>.log.
func (l *Lab) Start(name string, env []string, path string, args ...string) (*Process, error) {
	p := &Process{Name: name, LogFile: filepath.Join(l.Dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.Cmd = exec.Command(path, args...)
	p.Cmd.Dir = l.Dir
	p.Cmd.Env = append(l.baseEnv(), env...)
	p.Cmd.Stdout, p.Cmd.Stderr = log, log
	p.Cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.Cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.Cmd.Wait()
		close(p.done)
	}()
	l.mu.Lock()
	l.procs = append(l.procs, p)
	l.mu.Unlock()
	return p, nil
}

// baseEnv is the machine's environment without settings of the product, and
// with the lab as home.
func (l *Lab) baseEnv() []string {
	out := []string{"HOME=" + l.Dir}
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "KUMA_") && !strings.HasPrefix(kv, "HOME=") {
			out = append(out, kv)
		}
	}
	return out
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitCode waits for the end and returns the exit code; -1 for a signal.
func (p *Process) ExitCode() int {
	<-p.done
	return p.Cmd.ProcessState.ExitCode()
}

// Log returns what the process has written so far.
func (p *Process) Log() string {
	b, _ := os.ReadFile(p.LogFile)
	return string(b)
}

// Signal sends a signal to the process alone.
func (p *Process) Signal(s syscall.Signal) error { return p.Cmd.Process.Signal(s) }

// Kill ends the process with SIGKILL and waits until it is gone.
func (p *Process) Kill() {
	_ = p.Cmd.Process.Kill()
	<-p.done
}

// Stop asks the process to end, and makes it end after the grace period.
func (p *Process) Stop(grace time.Duration) {
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(grace):
		p.Kill()
	}
}

// Close ends every process, the newest first, and all that they started.
func (l *Lab) Close() {
	l.mu.Lock()
	procs := l.procs
	l.procs = nil
	l.mu.Unlock()
	for i := len(procs) - 1; i >= 0; i-- {
		p := procs[i]
		// Two signals: the second cuts a drain short.
		_ = p.Signal(syscall.SIGTERM)
		_ = p.Signal(syscall.SIGINT)
	}
	for i := len(procs) - 1; i >= 0; i-- {
		p := procs[i]
		select {
		case <-p.done:
		case <-time.After(5 * time.Second):
			_ = syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGKILL)
			<-p.done
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.blocks {
		_ = b.Close()
	}
	l.blocks, l.nextPort, l.endPort = nil, 0, 0
}

// ControlPlane is a kuma-cp and how to reach it.
type ControlPlane struct {
	*Process
	HTTP, HTTPS, DP, Diagnostics, MADS int
	// WorkDir is its work directory; CA is the certificate to verify it by.
	WorkDir, CA string

	lab *Lab
	env []string
}

// ControlPlane starts a kuma-cp on ports of its own and waits until it is
// ready.
func (l *Lab) ControlPlane(ctx context.Context, env ...string) (*ControlPlane, error) {
	ports, err := l.Ports(5)
	if err != nil {
		return nil, err
	}
	c := &ControlPlane{HTTP: ports[0], HTTPS: ports[1], DP: ports[2], Diagnostics: ports[3], MADS: ports[4], WorkDir: filepath.Join(l.Dir, "cp"), lab: l}
	c.CA = filepath.Join(c.WorkDir, "kuma-cp.crt")
	c.env = append([]string{
		"KUMA_GENERAL_WORK_DIR=" + c.WorkDir,
		fmt.Sprint("KUMA_API_SERVER_HTTP_PORT=", c.HTTP), "KUMA_API_SERVER_HTTP_INTERFACE=127.0.0.1",
		fmt.Sprint("KUMA_API_SERVER_HTTPS_PORT=", c.HTTPS), "KUMA_API_SERVER_HTTPS_INTERFACE=127.0.0.1",
		fmt.Sprint("KUMA_DP_SERVER_PORT=", c.DP), fmt.Sprint("KUMA_DIAGNOSTICS_SERVER_PORT=", c.Diagnostics),
		fmt.Sprint("KUMA_MONITORING_ASSIGNMENT_SERVER_PORT=", c.MADS),
	}, env...)
	return c, c.Start(ctx)
}

// Start starts the control plane (again) and waits until it is ready.
func (c *ControlPlane) Start(ctx context.Context) error {
	p, err := c.lab.Start("kuma-cp", c.env, filepath.Join(c.lab.Bin, "kuma-cp"), "run")
	if err != nil {
		return err
	}
	c.Process = p
	return c.lab.Await(ctx, p, "the control plane is ready", func() error {
		if !slices.Contains(c.env, "KUMA_DIAGNOSTICS_TLS_ENABLED=true") {
			return status(fmt.Sprintf("http://127.0.0.1:%d/ready", c.Diagnostics))
		}
		client, err := c.Verified()
		if err != nil {
			return err
		}
		defer client.CloseIdleConnections()
		res, err := client.Get(fmt.Sprintf("https://localhost:%d/ready", c.Diagnostics))
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return errors.New(res.Status)
		}
		return nil
	})
}

// URL is the API's address without TLS, and URLS that with TLS.
func (c *ControlPlane) URL() string { return fmt.Sprintf("http://127.0.0.1:%d", c.HTTP) }

// URLS is the API's address with TLS.
func (c *ControlPlane) URLS() string { return fmt.Sprintf("https://localhost:%d", c.HTTPS) }

// Address is what kuma-dp takes as --cp-address.
func (c *ControlPlane) Address() string { return fmt.Sprintf("https://localhost:%d", c.DP) }

// Verified is an HTTP client that trusts the control plane's CA alone.
func (c *ControlPlane) Verified() (*http.Client, error) {
	pem, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", c.CA)
	}
	return &http.Client{Timeout: attempt, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}, nil
}

// Kumactl runs kumactl against the control plane and returns its stdout.
func (c *ControlPlane) Kumactl(stdin string, args ...string) (string, error) {
	config, err := c.lab.File("kumactl-config", fmt.Sprintf("contexts:\n- controlPlane: lab\n  name: lab\ncontrolPlanes:\n- coordinates:\n    apiServer:\n      url: %s\n  name: lab\ncurrentContext: lab\n", c.URL()))
	if err != nil {
		return "", err
	}
	cmd := exec.Command(filepath.Join(c.lab.Bin, "kumactl"), append([]string{"--config-file", config}, args...)...)
	cmd.Dir = c.lab.Dir
	cmd.Env = c.lab.baseEnv()
	cmd.Stdin = strings.NewReader(stdin)
	var out, problem bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problem
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kumactl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(problem.String()))
	}
	return out.String(), nil
}

// Apply applies YAML with kumactl.
func (c *ControlPlane) Apply(yaml string) error {
	_, err := c.Kumactl(yaml, "apply", "-f", "-")
	return err
}

// Proxy is a kuma-dp with its Envoy.
type Proxy struct {
	*Process
	Name      string
	Readiness int
	// TokenFile has its token.
	TokenFile string
}

// ProxyOptions say how a proxy is started.
type ProxyOptions struct {
	// Mesh is "default" where empty.
	Mesh string
	// Dataplane is its resource, as YAML.
	Dataplane string
	// Services limit the token; empty limits nothing beyond mesh and name.
	Services []string
	// Env and Args are added.
	Env, Args []string
	// Envoy overrides the lab's.
	Envoy string
	// Token overrides the one that is made.
	Token string
	// As is what its files and its log are called, where a proxy of the same
	// name has those of that name; empty means its name.
	As string
}

// Proxy starts a kuma-dp. It does not wait until it is ready.
func (c *ControlPlane) Proxy(name string, o ProxyOptions) (*Proxy, error) {
	if o.Mesh == "" {
		o.Mesh = "default"
	}
	if o.Envoy == "" {
		o.Envoy = c.lab.Envoy
	}
	if o.Token == "" {
		args := []string{"generate", "dataplane-token", "--name", name, "--mesh", o.Mesh, "--valid-for", "24h"}
		if len(o.Services) > 0 {
			args = append(args, "--tag", "kuma.io/service="+strings.Join(o.Services, ","))
		}
		token, err := c.Kumactl("", args...)
		if err != nil {
			return nil, err
		}
		o.Token = token
	}
	if o.As == "" {
		o.As = name
	}
	tokenFile, err := c.lab.File(o.As+".token", o.Token)
	if err != nil {
		return nil, err
	}
	ports, err := c.lab.Ports(1)
	if err != nil {
		return nil, err
	}
	args := []string{
		"run", "--cp-address", c.Address(), "--ca-cert-file", c.CA, "--dataplane-token-file", tokenFile,
		"--binary-path", o.Envoy, "--concurrency", "1",
	}
	if o.Dataplane != "" {
		file, err := c.lab.File(o.As+".yaml", o.Dataplane)
		if err != nil {
			return nil, err
		}
		args = append(args, "--dataplane-file", file)
	} else {
		args = append(args, "--name", name, "--mesh", o.Mesh)
	}
	p := &Proxy{Name: name, Readiness: ports[0], TokenFile: tokenFile}
	env := append([]string{fmt.Sprint("KUMA_READINESS_PORT=", p.Readiness), "KUMA_DATAPLANE_DRAIN_TIME=1s"}, o.Env...)
	p.Process, err = c.lab.Start("kuma-dp-"+o.As, env, filepath.Join(c.lab.Bin, "kuma-dp"), append(args, o.Args...)...)
	return p, err
}

// Ready waits until the proxy says that it is able to serve.
func (l *Lab) Ready(ctx context.Context, p *Proxy) error {
	return l.Await(ctx, p.Process, p.Name+" is ready", func() error { return status(fmt.Sprintf("http://127.0.0.1:%d/ready", p.Readiness)) })
}

// status is nil if a GET of the URL answers 200, or says what it answers.
func status(url string) error {
	code, body, err := Get(url)
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("%d %s", code, strings.TrimSpace(body))
	}
	return nil
}

// attempt is how long a request may take that takes milliseconds on a machine
// with nothing else to do. It is shorter than the callers' patience.
const attempt = 30 * time.Second

// Get fetches a URL over a connection of its own.
func Get(url string) (code int, body string, err error) {
	c := http.Client{Timeout: attempt, Transport: &http.Transport{DisableKeepAlives: true}}
	defer c.CloseIdleConnections()
	res, err := c.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<20))
	return res.StatusCode, string(b), err
}

// GetJSON fetches a URL and reads its JSON.
func GetJSON(url string, into any) error {
	code, body, err := Get(url)
	if err != nil {
		return err
	}
	if code != http.StatusOK {
		return fmt.Errorf("GET %s: %d %s", url, code, body)
	}
	return json.Unmarshal([]byte(body), into)
}

// Await asks again and again, until the answer is nil. It fails when ctx ends
// or the process does, with its last answer and the end of the process's log.
func (l *Lab) Await(ctx context.Context, p *Process, what string, ask func() error) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	ended := make(<-chan struct{})
	if p != nil {
		ended = p.Done()
	}
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w; last: %w%s", what, ctx.Err(), err, tail(p))
		case <-ended:
			return fmt.Errorf("waiting until %s: it ended: %w%s", what, errors.Join(p.err, err), tail(p))
		}
	}
}

// tail is the end of a process's log.
func tail(p *Process) string {
	if p == nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
	return "\n--- the end of " + p.Name + ".log\n" + strings.Join(lines[max(0, len(lines)-20):], "\n")
}
