//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"kuma/test/lab"
)

// TestManuals runs what manuals print: the stories in manuals/*.txtar, each
// named after the manual. The programs, Envoy, curl and openssl are real.
//
// The files of a story hold blocks of shell commands as the manual shows them.
// Three things differ from what is printed, so that stories can run side by
// side on any machine: files go into the story's own directory instead of
// /tmp, ports are free ones instead of the usual ones, and <KUMA_CP_DNS_NAME>
// is localhost. Beside what testscript offers, a story may use:
//
//	sh FILE              run a block; "!" if it must fail
//	start NAME FILE      run a block in the background whose last command is
//	                     kuma-cp run or kuma-dp run, and wait until it is ready;
//	                     "!" if it must end with an error instead
//	end NAME             end it as Ctrl-C does
//	log NAME REGEXP      its log must match ("!": must not)
//	until REGEXP FILE    run a block until it succeeds and its output matches
func TestManuals(t *testing.T) {
	stories, err := filepath.Glob("manuals/*.txtar")
	if err != nil || len(stories) == 0 {
		t.Fatalf("there are no stories: %v", err)
	}
	for _, file := range stories {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			r := open(t)
			testscript.Run(t, testscript.Params{
				Files: []string{file}, RequireExplicitExec: true, Deadline: time.Now().Add(2 * time.Minute),
				WorkdirRoot: r.Dir,
				Setup:       func(env *testscript.Env) error { return r.manual(env) },
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"sh": shCommand, "start": startCommand, "end": endCommand, "log": logCommand, "until": untilCommand,
				},
			})
		})
	}
}

// manualPorts are the usual ports of a control plane and the settings that
// move them.
var manualPorts = []struct{ port, setting string }{
	{"5676", "KUMA_MONITORING_ASSIGNMENT_SERVER_PORT"},
	{"5678", "KUMA_DP_SERVER_PORT"},
	{"5679", "KUMA_ADMIN_SERVER_LOCAL_PORT"},
	{"5680", "KUMA_DIAGNOSTICS_SERVER_PORT"},
	{"5681", "KUMA_API_SERVER_HTTP_PORT"},
	{"5682", "KUMA_API_SERVER_HTTPS_PORT"},
}

type manualKey struct{}

// reader is someone who follows a manual.
type reader struct {
	room    *room
	real    *strings.Replacer
	ports   map[string]int
	running map[string]*lab.Process
}

// manual prepares the machine of someone who follows a manual: the programs
// and envoy on the PATH, a home and a /tmp.
func (r *room) manual(env *testscript.Env) error {
	reading := &reader{room: r, ports: map[string]int{}, running: map[string]*lab.Process{}}
	env.Values[manualKey{}] = reading
	bin, tmp := filepath.Join(env.WorkDir, "bin"), filepath.Join(env.WorkDir, "tmp")
	for _, dir := range []string{bin, tmp, filepath.Join(env.WorkDir, "home")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if err := os.Symlink(r.Envoy, filepath.Join(bin, "envoy")); err != nil {
		return err
	}
	env.Setenv("PATH", strings.Join([]string{r.Bin, bin, os.Getenv("PATH")}, ":"))
	env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
	pairs := []string{"/tmp/", tmp + "/", "<KUMA_CP_DNS_NAME>", "localhost"}
	ports, err := r.Ports(len(manualPorts) + 4)
	if err != nil {
		return err
	}
	for i, p := range manualPorts {
		pairs = append(pairs, ":"+p.port, ":"+strconv.Itoa(ports[i]))
		reading.ports[p.setting] = ports[i]
	}
	// What a Dataplane or a service of the story may listen on.
	for i, port := range ports[len(manualPorts):] {
		env.Setenv(fmt.Sprint("PORT", i+1), strconv.Itoa(port))
		pairs = append(pairs, fmt.Sprintf("$PORT%d", i+1), strconv.Itoa(port))
	}
	reading.real = strings.NewReplacer(pairs...)
	env.Defer(func() {
		for _, p := range reading.running {
			p.Stop(5 * time.Second)
		}
	})
	return nil
}

// block returns the command that runs a block of a manual, and its settings.
// The settings that move ports come first, so that the block may set them too.
func (rd *reader) block(ts *testscript.TestScript, file string) (env []string, script string) {
	for _, name := range []string{"PATH", "HOME"} {
		env = append(env, name+"="+ts.Getenv(name))
	}
	text := ts.ReadFile(file)
	for _, p := range manualPorts {
		// The port of 0.7.3's server is a setting that turns the server on.
		if p.port != "5679" || strings.Contains(text, "KUMA_ADMIN_SERVER") {
			env = append(env, fmt.Sprintf("%s=%d", p.setting, rd.ports[p.setting]))
		}
	}
	return env, "set -eu -o pipefail\n" + uncomment(rd.real.Replace(text))
}

var (
	afterBackslash = regexp.MustCompile(`\\[ \t]+#.*$`)
	prompt         = regexp.MustCompile(`^\$ `)
)

// uncomment makes what a manual shows a script: a comment after a line's last
// backslash, trailing blanks there and the prompt belong to the manual alone.
func uncomment(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		line = prompt.ReplaceAllString(afterBackslash.ReplaceAllString(line, `\`), "")
		if cut := strings.TrimRight(line, " \t"); strings.HasSuffix(cut, `\`) {
			line = cut
		}
		lines[i] = line
	}
	return strings.Join(lines, "\n")
}

// run runs a block to its end.
func (rd *reader) run(ts *testscript.TestScript, file string) (out, problem string, err error) {
	env, script := rd.block(ts, file)
	ctx, cancel := context.WithTimeout(rd.room.ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = env
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err = cmd.Run()
	return stdout.String(), stderr.String(), err
}

func shCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: sh FILE")
	}
	out, problem, err := ts.Value(manualKey{}).(*reader).run(ts, args[0])
	fmt.Fprint(ts.Stdout(), out)
	fmt.Fprint(ts.Stderr(), problem)
	if (err != nil) != neg {
		ts.Fatalf("%s: %v\n%s%s", args[0], err, out, problem)
	}
}

func untilCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: until REGEXP FILE")
	}
	rd, want := ts.Value(manualKey{}).(*reader), regexp.MustCompile(args[0])
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, problem, err := rd.run(ts, args[1])
		if err == nil && want.MatchString(out+problem) {
			fmt.Fprint(ts.Stdout(), out)
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s: %v, and never %q:\n%s%s", args[1], err, args[0], out, problem)
		}
	}
}

func startCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: start NAME FILE")
	}
	rd, name := ts.Value(manualKey{}).(*reader), args[0]
	env, script := rd.block(ts, args[1])
	what, url := "the control plane is ready", fmt.Sprintf("http://127.0.0.1:%d/ready", rd.ports["KUMA_DIAGNOSTICS_SERVER_PORT"])
	if strings.Contains(script, "kuma-dp run") {
		port := rd.room.port()
		what, url = "the proxy is ready", fmt.Sprintf("http://127.0.0.1:%d/ready", port)
		env = append(env, fmt.Sprint("KUMA_READINESS_PORT=", port), "KUMA_DATAPLANE_DRAIN_TIME=1s")
	}
	p, err := rd.room.Start(name, env, "bash", "-c", "cd "+ts.MkAbs(".")+"\n"+script)
	ts.Check(err)
	rd.running[name] = p
	err = rd.room.Await(rd.room.ctx, p, what, func() error { return status(url) })
	if (err != nil) != neg {
		ts.Fatalf("start %s: %v\n%s", name, err, p.Log())
	}
	if neg && p.ExitCode() == 0 {
		ts.Fatalf("start %s: it ended without an error:\n%s", name, p.Log())
	}
}

func endCommand(ts *testscript.TestScript, neg bool, args []string) {
	rd := ts.Value(manualKey{}).(*reader)
	if neg || len(args) != 1 || rd.running[args[0]] == nil {
		ts.Fatalf("usage: end NAME, of what was started")
	}
	p := rd.running[args[0]]
	ts.Check(syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGTERM)) // bash and what it runs, as a terminal does
	p.Stop(20 * time.Second)
	delete(rd.running, args[0])
}

func logCommand(ts *testscript.TestScript, neg bool, args []string) {
	rd := ts.Value(manualKey{}).(*reader)
	if len(args) != 2 || rd.running[args[0]] == nil {
		ts.Fatalf("usage: log NAME REGEXP, of what was started")
	}
	if p := rd.running[args[0]]; regexp.MustCompile("(?m)"+args[1]).MatchString(p.Log()) == neg {
		ts.Fatalf("log %s: match of %q, wanted %v, in:\n%s", args[0], args[1], !neg, p.Log())
	}
}

// status is nil if a GET of the URL answers 200.
func status(url string) error {
	code, body, err := lab.Get(url)
	if err == nil && code != 200 {
		err = fmt.Errorf("%d %s", code, strings.TrimSpace(body))
	}
	return err
}
