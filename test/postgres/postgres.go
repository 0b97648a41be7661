// Package postgres runs a real, private PostgreSQL on this machine, for tests.
package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"kuma/test/lab"
)

// Options say how the server is set up. The zero value is one that takes
// passwords, without TLS.
type Options struct {
	// HBA are the lines of pg_hba.conf for connections over TCP; none means that
	// everybody signs in with a password, with TLS or without.
	HBA []string
	// CertFile and KeyFile, where set, make the server speak TLS 1.2 and 1.3
	// with them; CAFile is what it verifies clients' certificates by. They are
	// copied.
	CertFile, KeyFile, CAFile string
	// Settings are further settings, as in postgresql.conf.
	Settings map[string]string
	// Fsync makes what is committed survive a power failure, which no test
	// makes; without it the server is faster.
	Fsync bool
}

// User is the server's first user, who may do everything; Password is the
// user's, and nobody else's.
const (
	User     = "admin"
	Password = "correct-horse-battery"
)

// patience is how long a start, a stop or a statement may take.
const patience = 2 * time.Minute

// Server is a server that runs until the test ends.
type Server struct {
	// Host and Port are where it listens, without a break over restarts.
	Host string
	Port int

	t         testing.TB
	bin       string
	dir       string
	account   *syscall.Credential
	databases atomic.Int32
	process   *os.Process
	ended     chan struct{}
}

// Start starts a server. Without PostgreSQL on this machine the test is
// skipped, or fails where NEED_POSTGRES is set.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := newServer(t)
	if err != nil {
		if os.Getenv("NEED_POSTGRES") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	s.must(s.watch())
	s.must(s.initialise(o))
	s.Launch()
	return s
}

// newServer is one that has not been set up.
func newServer(t testing.TB) (*Server, error) {
	s, err := found()
	if err == nil {
		s.Host, s.Port, s.t = "127.0.0.1", lab.FreePort(t), t
	}
	return s, err
}

// found has what a server needs on this machine.
func found() (*Server, error) {
	bin, err := programs()
	if err != nil {
		return nil, err
	}
	s := &Server{bin: bin}
	if os.Geteuid() == 0 {
		// It refuses to run as root.
		if s.account, err = account(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// programs is the directory of the server's programs.
func programs() (string, error) {
	if p, err := exec.LookPath("initdb"); err == nil {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			return filepath.Dir(real), nil
		}
	}
	all, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(all) == 0 {
		return "", errors.New("there is no PostgreSQL here: initdb is neither in PATH nor in /usr/lib/postgresql/*/bin (Debian: apt-get install postgresql)")
	}
	version := func(p string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(p))))
		return n
	}
	return filepath.Dir(slices.MaxFunc(all, func(a, b string) int { return version(a) - version(b) })), nil
}

// account is one that isn't root.
func account() (*syscall.Credential, error) {
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return nil, err
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.New("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")
}

// watch makes the server's directory, and starts a shell that ends the server
// and removes the directory when the test ends, however it does: the shell's
// input ends then.
func (s *Server) watch() error {
	// Not the test's own directory: another user must be able to enter it.
	dir, err := os.MkdirTemp("", "pg")
	if err != nil {
		return err
	}
	if err := s.own(dir); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	s.dir = dir
	cmd := exec.Command("sh", "-c", `cat; "$0/pg_ctl" -D "$1/data" -m immediate -w stop >&2; rm -rf "$1"`, s.bin, dir)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.account, Setpgid: true}
	input, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.t.Cleanup(func() {
		if s.process != nil {
			s.Kill()
		}
		if err := errors.Join(input.Close(), cmd.Wait()); err != nil {
			s.t.Error(err)
		}
		if _, err := os.Stat(dir); err == nil {
			s.t.Errorf("the server left %s behind", dir)
		}
	})
	return nil
}

// model is a data directory that each server gets a copy of, since making one
// takes seconds where the machine is busy. The first server of a process makes it.
type model struct {
	data string
	// input keeps the shell from removing the directory.
	input io.Closer
}

var modelled = sync.OnceValues(newModel)

func newModel() (*model, error) {
	s, err := found()
	if err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "pgmodel"); err != nil {
		return nil, err
	}
	if err := s.own(s.dir); err != nil {
		return nil, errors.Join(err, os.Remove(s.dir))
	}
	// Its input ends with this process, however that ends.
	remove := exec.Command("sh", "-c", `cat; rm -rf "$0"`, s.dir)
	remove.Dir = "/"
	remove.SysProcAttr = &syscall.SysProcAttr{Credential: s.account, Setpgid: true}
	input, err := remove.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, os.Remove(s.dir))
	}
	if err := remove.Start(); err != nil {
		return nil, errors.Join(err, os.Remove(s.dir))
	}
	password := filepath.Join(s.dir, "password")
	err = errors.Join(os.WriteFile(password, []byte(Password), 0o600), s.own(password))
	if err == nil {
		err = s.run("initdb", "-D", s.data(), "-U", User, "--pwfile", password, "-A", "scram-sha-256", "-E", "UTF8", "--locale", "C", "--no-sync")
	}
	if err != nil {
		return nil, errors.Join(err, input.Close(), remove.Wait())
	}
	return &model{s.data(), input}, nil
}

func (s *Server) initialise(o Options) error {
	m, err := modelled()
	if err != nil {
		return err
	}
	if err := s.run("cp", "-Rp", m.data, s.data()); err != nil {
		return err
	}
	settings := map[string]string{
		"listen_addresses": s.Host, "port": strconv.Itoa(s.Port), "unix_socket_directories": s.dir,
		"fsync": strconv.FormatBool(o.Fsync), "max_connections": "50", "shared_buffers": "16MB",
		"ssl": strconv.FormatBool(o.CertFile != ""),
	}
	for name, file := range map[string]string{"ssl_cert_file": o.CertFile, "ssl_key_file": o.KeyFile, "ssl_ca_file": o.CAFile} {
		if file == "" {
			continue
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		settings[name] = filepath.Join(s.dir, name)
		if err := errors.Join(os.WriteFile(settings[name], content, 0o600), s.own(settings[name])); err != nil {
			return err
		}
	}
	for name, value := range o.Settings {
		settings[name] = value
	}
	if err := s.configure(settings); err != nil {
		return err
	}
	return s.writeHBA(o.HBA)
}

// configure adds to the server's settings; what is said last counts.
func (s *Server) configure(settings map[string]string) error {
	var config strings.Builder
	for name, value := range settings {
		fmt.Fprintf(&config, "%s = '%s'\n", name, value)
	}
	file, err := os.OpenFile(filepath.Join(s.data(), "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(config.String())
	return errors.Join(err, file.Close())
}

// run runs a program to its end, as command does.
func (s *Server) run(program string, args ...string) error {
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	if out, err := s.command(ctx, program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", program, err, bytes.TrimSpace(out))
	}
	return nil
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

// own gives a file to the server's user.
func (s *Server) own(path string) error {
	if s.account == nil {
		return nil
	}
	return os.Chown(path, int(s.account.Uid), int(s.account.Gid))
}

// writeHBA writes who may sign in, and how. Over the socket in its own
// directory, everybody may: that is how the test asks the server.
func (s *Server) writeHBA(lines []string) error {
	if len(lines) == 0 {
		lines = []string{"host all all 127.0.0.1/32 scram-sha-256"}
	}
	content := "local all all trust\nlocal replication all trust\n" + strings.Join(lines, "\n") + "\n"
	return os.WriteFile(filepath.Join(s.data(), "pg_hba.conf"), []byte(content), 0o600)
}

// command is a program, one of the server's where it has it, as the server's user.
func (s *Server) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	if own := filepath.Join(s.bin, program); exists(own) {
		program = own
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = s.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.account, Setpgid: true}
	return cmd
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

// Log is what the server has written to its log.
func (s *Server) Log() string {
	b, _ := os.ReadFile(s.logFile())
	return string(b)
}

func (s *Server) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("%v\n%s", err, s.Log())
	}
}

// Launch starts the server again after a Stop or Kill, and waits until it takes
// connections.
func (s *Server) Launch() {
	s.t.Helper()
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	s.must(err)
	defer log.Close()
	cmd := s.command(context.Background(), "postgres", "-D", s.data())
	cmd.Stdout, cmd.Stderr = log, log
	s.must(cmd.Start())
	s.process, s.ended = cmd.Process, make(chan struct{})
	go func() {
		defer close(s.ended)
		_ = cmd.Wait()
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); ; {
		err := s.with("postgres", func(ctx context.Context, c *pgx.Conn) error { return c.Ping(ctx) })
		if err == nil {
			return
		}
		select {
		case <-s.ended:
			s.must(fmt.Errorf("PostgreSQL ended: %w", err))
		case <-tick.C:
		}
		if time.Now().After(end) {
			s.must(fmt.Errorf("PostgreSQL does not start: %w", err))
		}
	}
}

// finish sends the server a signal and waits for its end.
func (s *Server) finish(signal syscall.Signal) {
	s.t.Helper()
	_ = s.process.Signal(signal)
	select {
	case <-s.ended:
	case <-time.After(patience):
		s.must(errors.New("PostgreSQL does not end"))
	}
}

// Stop ends the server in order: connections are cut, and what is committed is
// written down.
func (s *Server) Stop() {
	s.t.Helper()
	s.finish(syscall.SIGINT)
}

// Kill ends the server at once, as a crash does: it recovers when it is
// launched again.
func (s *Server) Kill() {
	s.t.Helper()
	s.finish(syscall.SIGQUIT)
}

// Restart is Kill, then Launch.
func (s *Server) Restart() {
	s.t.Helper()
	s.Kill()
	s.Launch()
}

// Reload replaces the lines of pg_hba.conf for connections over TCP, and makes
// the server read its settings and TLS files anew.
func (s *Server) Reload(hba ...string) {
	s.t.Helper()
	s.must(s.writeHBA(hba))
	s.must(s.process.Signal(syscall.SIGHUP))
}

// Certify replaces the server's pair, and what it verifies clients' certificates
// by, where there was one of each at the start. It counts from the next Reload.
func (s *Server) Certify(certFile, keyFile, caFile string) {
	s.t.Helper()
	for name, file := range map[string]string{"ssl_cert_file": certFile, "ssl_key_file": keyFile, "ssl_ca_file": caFile} {
		content, err := os.ReadFile(file)
		s.must(err)
		s.must(os.WriteFile(filepath.Join(s.dir, name), content, 0o600))
	}
}

// Replica starts another server that follows this one, and can be read.
func (s *Server) Replica() *Server {
	s.t.Helper()
	r, err := newServer(s.t)
	s.must(err)
	s.must(r.watch())
	s.must(r.run("pg_basebackup", "-D", r.data(), "-h", s.dir, "-p", strconv.Itoa(s.Port), "-U", User, "-R", "-X", "stream", "-c", "fast", "--no-sync"))
	s.must(r.configure(map[string]string{"port": strconv.Itoa(r.Port), "unix_socket_directories": r.dir}))
	r.Launch()
	return r
}

// Promote makes a replica a server of its own, which can be written.
func (s *Server) Promote() {
	s.t.Helper()
	s.Exec("postgres", "select pg_promote()")
}

// Exec runs statements in a database, as its first user.
func (s *Server) Exec(database, sql string, args ...any) {
	s.t.Helper()
	s.must(s.with(database, func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, sql, args...)
		return err
	}))
}

// Hold runs statements in a transaction, which it keeps open, with all locks it
// has, until the caller lets it go.
func (s *Server) Hold(database, sql string) (letGo func()) {
	s.t.Helper()
	held, end, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- s.with(database, func(ctx context.Context, c *pgx.Conn) error {
			if _, err := c.Exec(ctx, "begin; "+sql); err != nil {
				return err
			}
			close(held)
			<-end
			_, err := c.Exec(ctx, "rollback")
			return err
		})
	}()
	letGo = sync.OnceFunc(func() {
		close(end)
		if err := <-ended; err != nil {
			s.t.Errorf("hold %s: %v", database, err)
		}
	})
	s.t.Cleanup(letGo)
	select {
	case <-held:
	case err := <-ended:
		ended <- err
		s.must(err)
	}
	return letGo
}

// Query runs a query that has one value as its result, in words.
func (s *Server) Query(database, sql string, args ...any) string {
	s.t.Helper()
	var out *string
	s.must(s.with(database, func(ctx context.Context, c *pgx.Conn) error {
		return c.QueryRow(ctx, "select ("+sql+")::text", args...).Scan(&out)
	}))
	if out == nil {
		return ""
	}
	return *out
}

// with connects over the server's socket.
func (s *Server) with(database string, f func(context.Context, *pgx.Conn) error) error {
	ctx, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	c, err := pgx.Connect(ctx, fmt.Sprintf("host=%s port=%d user=%s database=%s sslmode=disable application_name=test", s.dir, s.Port, User, database))
	if err != nil {
		return err
	}
	return errors.Join(f(ctx, c), c.Close(ctx))
}

// Database makes an empty database and returns its name.
func (s *Server) Database() string {
	s.t.Helper()
	name := fmt.Sprint("db", s.databases.Add(1))
	s.Exec("postgres", "create database "+name)
	return name
}

// Copy makes a database that has all that another one has, to which nobody may
// be connected, and returns its name.
func (s *Server) Copy(template string) string {
	s.t.Helper()
	name := fmt.Sprint("db", s.databases.Add(1))
	s.Exec("postgres", "create database "+name+" template "+template)
	return name
}
