//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"kuma/test/lab"
	"kuma/test/postgres"
)

// TestManuals runs what manuals print: the stories in manuals/*.txtar, each
// named after the manual. The programs, Envoy, curl and openssl are real.
//
// The files of a story hold blocks of shell commands as the manual shows them.
// Five things differ from what is printed, so that stories can run side by
// side on any machine: files go into the story's own directory instead of /tmp
// and /etc/postgresql, ports are free ones instead of the usual ones,
// <KUMA_CP_DNS_NAME> is localhost, and PostgreSQL runs as who it can where
// there is no user postgres. And a control plane that was started a moment ago
// waits two seconds, not a minute, for its proxies to come back. Beside what
// testscript offers, a story may use:
//
//	sh FILE              run a block; "!" if it must fail
//	start NAME FILE      run a block in the background whose last command is
//	                     kuma-cp run or kuma-dp run, and wait until it is ready;
//	                     "!" if it must end with an error instead
//	end NAME             end it as Ctrl-C does
//	log NAME REGEXP      its log must match ("!": must not)
//	until REGEXP FILE    run a block until it succeeds and its output matches
//	follow PAGE          do what a page of docs/ says: see followCommand
//	postgres CERT KEY CLIENTS HBA
//	                     give the story's PostgreSQL these files; a story whose
//	                     name has "postgres" in it has one
//	sql FILE             have it run statements
func TestManuals(t *testing.T) {
	stories, err := filepath.Glob("manuals/*.txtar")
	if err != nil || len(stories) == 0 {
		t.Fatalf("there are no stories: %v", err)
	}
	for _, file := range stories {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			r := open(t)
			var db *postgres.Server
			if strings.Contains(file, "postgres") {
				db = r.postgres()
			}
			testscript.Run(t, testscript.Params{
				Files: []string{file}, RequireExplicitExec: true, Deadline: time.Now().Add(10 * time.Minute),
				WorkdirRoot: r.Dir,
				Setup:       func(env *testscript.Env) error { return r.manual(env, db) },
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"sh": shCommand, "start": startCommand, "end": endCommand, "log": logCommand, "until": untilCommand,
					"follow": followCommand, "postgres": postgresCommand, "sql": sqlCommand,
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
	room *room
	// real turns what a manual prints into what is there; shown the reverse.
	real, shown *strings.Replacer
	ports       map[string]int
	running     map[string]*lab.Process
	// db is nil where the story has none. Owner is who owns what a page gives to
	// PostgreSQL.
	db    *postgres.Server
	owner int
}

// postgres starts a PostgreSQL server that lets in who has a password, over TLS.
func (r *room) postgres() *postgres.Server {
	r.Helper()
	cert, key := r.pairOf("server", "postgres", "--hostname=localhost")
	clients, _ := r.pairOf("client", "nobody")
	return postgres.Start(r.T, postgres.Options{CertFile: cert, KeyFile: key, CAFile: clients, HBA: []string{"hostssl all all 0.0.0.0/0 scram-sha-256"}})
}

// account is a user on this machine as which PostgreSQL may run, by its name and
// the numbers of its group and itself: whoever runs the test, if that isn't root.
func account() (name, group string, uid int, err error) {
	u, err := user.Current()
	if os.Geteuid() == 0 {
		if u, err = user.Lookup("postgres"); err != nil {
			u, err = user.Lookup("nobody")
		}
	}
	if err != nil {
		return "", "", 0, err
	}
	uid, err = strconv.Atoi(u.Uid)
	return u.Username, u.Gid, uid, err
}

// readableTo tells whether PostgreSQL, run by that user, would take a key: the
// story's gets a copy, since it can't enter the story's directory.
func readableTo(key string, uid int) error {
	st, err := os.Stat(key)
	if err != nil {
		return err
	}
	if owner := int(st.Sys().(*syscall.Stat_t).Uid); owner != uid || st.Mode().Perm() != 0o600 {
		return fmt.Errorf("%s has mode %o and is %d's: PostgreSQL, which is %d, could not read it", key, st.Mode().Perm(), owner, uid)
	}
	return nil
}

// reload gives the database copies of other files, and waits until they count.
func (rd *reader) reload(ts *testscript.TestScript, cert, key, clients, hba string) {
	lines, err := os.ReadFile(hba)
	ts.Check(err)
	const when = "pg_conf_load_time()"
	before := rd.db.Query("postgres", when)
	rd.db.Certify(cert, key, clients)
	rd.db.Reload(strings.Split(strings.TrimSpace(string(lines)), "\n")...)
	ts.Check(rd.room.Await(rd.room.ctx, nil, "PostgreSQL has read its files", func() error {
		if rd.db.Query("postgres", when) == before {
			return errors.New("it has not")
		}
		return nil
	}))
}

// sql has the database run statements, each on lines of its own.
func (rd *reader) sql(text string) {
	for statement := range strings.SplitSeq(strings.TrimSuffix(strings.TrimSpace(text), ";"), ";\n") {
		rd.db.Exec("postgres", statement)
	}
}

func sqlCommand(ts *testscript.TestScript, neg bool, args []string) {
	rd := ts.Value(manualKey{}).(*reader)
	if neg || len(args) != 1 || rd.db == nil {
		ts.Fatalf("usage: sql FILE, in a story with a database")
	}
	rd.sql(ts.ReadFile(args[0]))
}

func postgresCommand(ts *testscript.TestScript, neg bool, args []string) {
	rd := ts.Value(manualKey{}).(*reader)
	if neg || len(args) != 4 || rd.db == nil {
		ts.Fatalf("usage: postgres CERT KEY CLIENTS HBA, in a story with a database")
	}
	for i, name := range args {
		args[i] = ts.MkAbs(rd.real.Replace(name))
	}
	rd.reload(ts, args[0], args[1], args[2], args[3])
}

// manual prepares the machine of someone who follows a manual: the programs
// and envoy on the PATH, a home and a /tmp.
func (r *room) manual(env *testscript.Env, db *postgres.Server) error {
	reading := &reader{room: r, ports: map[string]int{}, running: map[string]*lab.Process{}, db: db}
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
	pairs := []string{"/tmp/", tmp + "/", "<KUMA_CP_DNS_NAME>", "localhost", "<CROSS_ZONE_KUMA_CP_DNS_NAME>", "localhost"}
	ports, err := r.Ports(len(manualPorts) + 5)
	if err != nil {
		return err
	}
	for i, p := range manualPorts {
		pairs = append(pairs, ":"+p.port, ":"+strconv.Itoa(ports[i]))
		reading.ports[p.setting] = ports[i]
	}
	if db != nil {
		name, group, uid, err := account()
		if err != nil {
			return err
		}
		reading.owner = uid
		pairs = append(pairs, "-o postgres -g postgres ", fmt.Sprintf("-o %s -g %s ", name, group), "/etc/postgresql/", filepath.Join(env.WorkDir, "etc")+"/")
		pairs = append(pairs, "<POSTGRES_DNS_NAME>", "localhost", ":5432", fmt.Sprint(":", db.Port), "_PORT=5432", fmt.Sprint("_PORT=", db.Port))
	}
	// What a Dataplane or a service of the story may listen on.
	for i, port := range ports[len(manualPorts):] {
		env.Setenv(fmt.Sprint("PORT", i+1), strconv.Itoa(port))
		pairs = append(pairs, fmt.Sprintf("$PORT%d", i+1), strconv.Itoa(port))
		pairs = append(pairs, []string{"16379", "6379", "18080", "8080", "5670"}[i], strconv.Itoa(port)) // on pages
	}
	// kumactl without configuration, but for this control plane.
	config := fmt.Sprintf("contexts: [{name: local, controlPlane: local}]\ncontrolPlanes: [{name: local, coordinates: {apiServer: {url: 'http://localhost:%d'}}}]\ncurrentContext: local\n",
		reading.ports["KUMA_API_SERVER_HTTP_PORT"])
	if err := os.MkdirAll(filepath.Join(env.WorkDir, "home", ".kumactl"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(env.WorkDir, "home", ".kumactl", "config"), []byte(config), 0o600); err != nil {
		return err
	}
	reading.real = strings.NewReplacer(pairs...)
	var back []string
	for i := 0; i < len(pairs); i += 2 {
		if !strings.HasPrefix(pairs[i], "<") && !strings.HasPrefix(pairs[i], "$") && !strings.HasPrefix(pairs[i], "-") {
			back = append(back, pairs[i+1], pairs[i])
		}
	}
	reading.shown = strings.NewReplacer(append(back, filepath.Join(env.WorkDir, "home"), "/home/me")...)
	env.Defer(func() {
		for _, p := range reading.running {
			p.Stop(5 * time.Second)
		}
	})
	return nil
}

// block returns the command that runs a block of a manual, and its settings.
// The settings that move ports come first, so that the block may set them too.
func (rd *reader) block(ts *testscript.TestScript, text string) (env []string, script string) {
	for _, name := range []string{"PATH", "HOME"} {
		env = append(env, name+"="+ts.Getenv(name))
	}
	env = append(env, "KUMA_XDS_SERVER_RETURN_DELAY=2s")
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
func (rd *reader) run(ts *testscript.TestScript, text string) (out, problem string, err error) {
	env, script := rd.block(ts, text)
	ctx, cancel := context.WithTimeout(rd.room.ctx, patience)
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
	out, problem, err := ts.Value(manualKey{}).(*reader).run(ts, ts.ReadFile(args[0]))
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
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		out, problem, err := rd.run(ts, ts.ReadFile(args[1]))
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
	err := rd.start(ts, name, ts.ReadFile(args[1]))
	p := rd.running[name]
	if (err != nil) != neg {
		ts.Fatalf("start %s: %v\n%s", name, err, p.Log())
	}
	if neg && p.ExitCode() == 0 {
		ts.Fatalf("start %s: it ended without an error:\n%s", name, p.Log())
	}
}

// start runs a block in the background and waits until it is ready.
func (rd *reader) start(ts *testscript.TestScript, name, text string) error {
	env, script := rd.block(ts, text)
	what := "the control plane is ready"
	readiness := 0
	if strings.Contains(script, "kuma-dp run") {
		what, readiness = "the proxy is ready", rd.room.port()
		env = append(env, fmt.Sprint("KUMA_READINESS_PORT=", readiness), "KUMA_DATAPLANE_DRAIN_TIME=1s")
	}
	const ready = " msg=ready "
	before := 0
	if log, err := os.ReadFile(filepath.Join(rd.room.Dir, name+".log")); err == nil {
		before = strings.Count(string(log), ready) // of an earlier start
	}
	p, err := rd.room.Start(name, env, "bash", "-c", "cd "+ts.MkAbs(".")+"\n"+script)
	ts.Check(err)
	rd.running[name] = p
	return rd.room.Await(rd.room.ctx, p, what, func() error {
		if readiness != 0 {
			return status(fmt.Sprintf("http://127.0.0.1:%d/ready", readiness))
		}
		if strings.Count(p.Log(), ready) == before {
			return errors.New("it has not said so")
		}
		return nil
	})
}

func endCommand(ts *testscript.TestScript, neg bool, args []string) {
	rd := ts.Value(manualKey{}).(*reader)
	if neg || len(args) != 1 || rd.running[args[0]] == nil {
		ts.Fatalf("usage: end NAME, of what was started")
	}
	ts.Check(rd.end(args[0]))
}

// end ends what was started: bash and what it runs, as a terminal does.
func (rd *reader) end(name string) error {
	p := rd.running[name]
	delete(rd.running, name)
	if err := syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGTERM); err != nil {
		return err
	}
	p.Stop(20 * time.Second)
	return nil
}

func logCommand(ts *testscript.TestScript, neg bool, args []string) {
	rd := ts.Value(manualKey{}).(*reader)
	if len(args) != 2 || rd.running[args[0]] == nil {
		ts.Fatalf("usage: log NAME REGEXP, of what was started")
	}
	p, is := rd.running[args[0]], regexp.MustCompile("(?m)"+args[1]).MatchString
	if !neg {
		ts.Check(rd.room.said(p, fmt.Sprintf("the log of %s matches %q", args[0], args[1]), is))
	} else if is(p.Log()) {
		ts.Fatalf("log %s matches %q:\n%s", args[0], args[1], p.Log())
	}
}

// said waits until a process's log is as it should be. One that has ended says
// no more.
func (r *room) said(p *lab.Process, what string, is func(log string) bool) error {
	ctx, cancel := context.WithTimeout(r.ctx, patience)
	defer cancel()
	return r.Await(ctx, p, what, func() error {
		if !is(p.Log()) {
			return errors.New("it has not said so")
		}
		return nil
	})
}

// followCommand does what a page of docs/ says, block by block: it writes the
// files ("yaml file=NAME", "conf file=NAME"), has the database run what is "sql",
// and runs the commands of console blocks and
// compares what they print. A line with "…" matches whatever stands there, a
// line of "…" alone any lines. A command that ends in kuma-cp run or kuma-dp
// run goes on in the background, and ends the one before it that had the same
// files; what the page prints under it must be in its log. A command under
// which the page prints an error must fail.
func followCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: follow PAGE")
	}
	page, err := filepath.Abs("../../docs")
	ts.Check(err)
	text, err := os.ReadFile(filepath.Join(page, args[0]))
	ts.Check(err)
	rd, commands := ts.Value(manualKey{}).(*reader), 0
	parts := strings.Split("\n"+string(text), "\n```")
	for i := 1; i+1 < len(parts); i += 2 {
		kind, block, _ := strings.Cut(parts[i], "\n")
		form, name, isFile := strings.Cut(kind, " file=")
		if isFile && (form == "yaml" || form == "conf") {
			ts.Check(os.WriteFile(ts.MkAbs(name), []byte(rd.real.Replace(block)+"\n"), 0o600))
		}
		if kind == "sql" {
			rd.sql(block)
		}
		if kind != "console" {
			continue
		}
		for example := range strings.SplitSeq(strings.TrimPrefix(block, "$ "), "\n$ ") {
			command, want := cutCommand(example)
			ts.Logf("$ %s", command)
			rd.follow(ts, command, want)
			commands++
		}
	}
	if commands == 0 {
		ts.Fatalf("%s shows no command", args[0])
	}
}

// cutCommand parts a command, with the lines that its backslashes join, from
// what it prints.
func cutCommand(example string) (command, want string) {
	lines := strings.Split(example, "\n")
	n := 1
	for n < len(lines) && strings.HasSuffix(lines[n-1], `\`) {
		n++
	}
	return strings.Join(lines[:n], "\n"), strings.Join(lines[n:], "\n")
}

var (
	inBackground = regexp.MustCompile(`kuma-(cp|dp) run`)
	asksAgain    = regexp.MustCompile(`^(kumactl inspect|kumactl tls|kumactl ca .*--status|curl|openssl) `)
)

// follow does what one command of a page says.
func (rd *reader) follow(ts *testscript.TestScript, command, want string) {
	if command == "systemctl reload postgresql" { // that of the story, with the files that the page tells
		settings := ts.ReadFile("postgresql.conf")
		file := func(name string) string {
			m := regexp.MustCompile(`(?m)^` + name + ` = '(.+)'$`).FindStringSubmatch(settings)
			if m == nil {
				ts.Fatalf("postgresql.conf has no %s:\n%s", name, settings)
			}
			return m[1]
		}
		key := file("ssl_key_file")
		ts.Check(readableTo(key, rd.owner))
		rd.reload(ts, file("ssl_cert_file"), key, file("ssl_ca_file"), ts.MkAbs("pg_hba.conf"))
		return
	}
	fails := strings.Contains("\n"+want, "\nError") || strings.Contains("\n"+want, "\ncurl: (") || strings.Contains(want, "\nverify error:") || strings.Contains(want, "level=ERROR")
	if m := inBackground.FindStringSubmatch(command); m != nil {
		name := m[1]
		if rd.running[name] != nil {
			ts.Check(rd.end(name))
		}
		if err := rd.start(ts, name, command); (err != nil) != fails {
			ts.Fatalf("%s: %v\n%s", command, err, rd.running[name].Log())
		}
		for line := range strings.SplitSeq(want, "\n") {
			p, want := rd.running[name], regexp.MustCompile(pattern(line))
			ts.Check(rd.room.said(p, fmt.Sprintf("the log of %s has a line %q", command, line), func(log string) bool { return want.MatchString(rd.shown.Replace(log)) }))
		}
		if fails {
			delete(rd.running, name)
		}
		return
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		out, problem, err := rd.run(ts, command)
		got := strings.TrimSuffix(rd.shown.Replace(out+problem), "\n")
		if (err != nil) == fails && shows(want, got) {
			return
		}
		if !asksAgain.MatchString(command) || time.Now().After(deadline) {
			ts.Fatalf("%s: %v\n--- the page\n%s\n--- here\n%s", command, err, want, got)
		}
	}
}

// shows reports whether text is what a page prints.
func shows(want, text string) bool {
	quoted := strings.ReplaceAll("\n"+pattern(want), "\n.*\n", "\n(?s:.*\n)?") + "$"
	quoted = strings.ReplaceAll(quoted, "\n.*$", "(?s:\n.*)?$")
	return regexp.MustCompile("^" + quoted).MatchString("\n" + text)
}

var blanks = regexp.MustCompile(` {2,}`)

// pattern is a regular expression of what a page prints. A table's columns are
// as wide as they are.
func pattern(want string) string {
	return blanks.ReplaceAllString(strings.ReplaceAll(regexp.QuoteMeta(want), "…", ".*"), " +")
}

// status is nil if a GET of the URL answers 200.
func status(url string) error {
	code, body, err := lab.Get(url)
	if err == nil && code != 200 {
		err = fmt.Errorf("%d %s", code, strings.TrimSpace(body))
	}
	return err
}

// TestShows: what a page may leave out, and what not.
func TestShows(t *testing.T) {
	for _, c := range []struct {
		want, text string
		shown      bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "a", true},
		{"a", "a\nb", false},
		{"a\n…", "a\nb\nc", true},
		{"a\n…", "a", true},
		{"…\nc", "a\nb\nc", true},
		{"…\nb\n…", "a\nb\nc", true},
		{"…\nb\n…", "a\nc", false},
		{"a…d  e", "abcd     e", true},
		{"a.c", "abc", false},
	} {
		if shows(c.want, c.text) != c.shown {
			t.Errorf("%q shows %q: want %v", c.want, c.text, c.shown)
		}
	}
}
