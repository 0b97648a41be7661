// Package scripts_test tells stories: a control plane, kumactl, HTTP requests
// and proxies' ADS streams. Each .txtar file here is one.
//
// Beside what testscript offers, a story may use:
//
//	plane start [KEY=VALUE…]  start the story's control plane on free ports, its
//	                       work directory in $WORK/cp, and put its ports into
//	                       the environment: $URL, $URLS, $DIAGNOSTICS
//	plane stop                end it as SIGTERM does
//	plane log REGEXP          its log, since its last start, must match
//	kumactl …, kuma-cp …   the programs (with exec: exec kumactl …)
//	curl [-H HEADER]… METHOD URL [BODY-FILE]
//	                       the answer's body to stdout, status and headers to
//	                       stderr; a leading ! demands a status of 400 or more
//	bearer NAME FILE       put a file's content into the environment
//	base64 FILE TO         write a file's content as base64 into another's KEY
//	fill FILE              write $TOKEN over the word TOKEN in a file
//	admin NAME             put the administrator's token into the environment
//	revoke FILE [KIND MESH NAME]
//	                       revoke the token in a file: a user's, or one whose
//	                       list is in that secret
//	proxy NAME FILE [TOKEN-FILE]
//	                       open an ADS stream as kuma-dp's Envoy does for the
//	                       Dataplane in FILE
//	proxy end NAME         close it
//	waitfor NAME WHAT REGEXP
//	                       until the proxy has a cluster, listener, endpoint or
//	                       route that matches; "! waitfor" until it has none;
//	                       WHAT "error" is how the stream ended
//	until REGEXP METHOD URL
//	                       until the answer (status and body) matches
//	manual FILE            run the commands that a manual shows ($DOCS is the
//	                       folder of manuals), and compare what they print
package scripts_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"

	"kuma/internal/cp"
	"kuma/internal/cp/cptest"
	"kuma/internal/ctl"
	"kuma/internal/envoy"
	"kuma/test/lab"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"kumactl": func() { os.Exit(ctl.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv)) },
		"kuma-cp": func() {
			os.Exit(cp.Main(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
		},
	})
}

// patience is how long a story waits for what must happen. It is spent only
// where a story fails.
const patience = 30 * time.Second

func TestStories(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: ".", RequireUniqueNames: true, ContinueOnError: true, UpdateScripts: os.Getenv("UPDATE") != "",
		Setup: func(env *testscript.Env) error {
			s := &story{env: env, proxies: map[string]*cptest.ADS{}}
			env.Values[storyKey{}] = s
			env.Setenv("HOME", env.WorkDir)
			docs, err := filepath.Abs("../../docs")
			if err != nil {
				return err
			}
			env.Setenv("DOCS", docs)
			env.Defer(s.end)
			return s.ports()
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"bearer": bearerCommand, "admin": adminCommand, "revoke": revokeCommand, "base64": base64Command, "fill": fillCommand,
			"plane": planeCommand, "curl": curlCommand, "proxy": proxyCommand, "waitfor": waitforCommand, "until": untilCommand,
			"manual": manualCommand,
		},
	})
}

type storyKey struct{}

// story is what one script has running.
type story struct {
	env     *testscript.Env
	log     *journal
	stop    context.CancelFunc
	done    chan error
	proxies map[string]*cptest.ADS
	conn    *grpc.ClientConn
}

func of(ts *testscript.TestScript) *story { return ts.Value(storyKey{}).(*story) }

// ports gives the story ports that nobody listens on.
func (s *story) ports() error {
	names := []string{"KUMA_API_SERVER_HTTP_PORT", "KUMA_API_SERVER_HTTPS_PORT", "KUMA_DP_SERVER_PORT", "KUMA_DIAGNOSTICS_SERVER_PORT", "KUMA_MONITORING_ASSIGNMENT_SERVER_PORT", "ADMIN_PORT"}
	l := lab.New(s.env.WorkDir, "", "")
	s.env.Defer(l.Close)
	ports, err := l.Ports(len(names))
	if err != nil {
		return err
	}
	for i, name := range names {
		s.env.Setenv(name, strconv.Itoa(ports[i]))
	}
	dir := filepath.Join(s.env.WorkDir, "cp")
	s.env.Setenv("KUMA_GENERAL_WORK_DIR", dir)
	s.env.Setenv("CA", filepath.Join(dir, "kuma-cp.crt"))
	s.env.Setenv("URL", "http://localhost:"+s.env.Getenv("KUMA_API_SERVER_HTTP_PORT"))
	s.env.Setenv("URLS", "https://localhost:"+s.env.Getenv("KUMA_API_SERVER_HTTPS_PORT"))
	s.env.Setenv("DIAGNOSTICS", "http://localhost:"+s.env.Getenv("KUMA_DIAGNOSTICS_SERVER_PORT"))
	// kumactl without configuration, but for this control plane.
	config := "contexts: [{name: local, controlPlane: local}]\ncontrolPlanes: [{name: local, coordinates: {apiServer: {url: '" + s.env.Getenv("URL") + "'}}}]\ncurrentContext: local\n"
	if err := os.MkdirAll(filepath.Join(s.env.WorkDir, ".kumactl"), 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.env.WorkDir, ".kumactl", "config"), []byte(config), 0o600)
}

// end stops what the story left running.
func (s *story) end() {
	for _, p := range s.proxies {
		p.Close()
	}
	clear(s.proxies)
	if s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
	if s.stop != nil {
		s.stop()
		<-s.done
		s.stop = nil
	}
}

// journal is a control plane's log. It tells when a message was logged.
type journal struct {
	mu      sync.Mutex
	b       bytes.Buffer
	message string
	seen    chan struct{}
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.message != "" && bytes.Contains(p, []byte(j.message)) {
		close(j.seen)
		j.message = ""
	}
	return j.b.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.String()
}

// start runs a control plane with the story's environment and these settings.
func (s *story) start(ts *testscript.TestScript, settings []string) error {
	again := s.log != nil
	if s.stop != nil {
		return errors.New("the control plane runs already")
	}
	for _, kv := range settings {
		if !strings.HasPrefix(kv, "KUMA_") || !strings.Contains(kv, "=") {
			return fmt.Errorf("%q is not a setting", kv)
		}
	}
	var env []string
	for _, kv := range s.env.Vars {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "KUMA_") {
			env = append(env, name+"="+ts.Getenv(name)) // the story may have changed it
		}
	}
	env = append(env, settings...)
	s.log = &journal{message: "msg=ready ", seen: make(chan struct{})}
	log, err := cp.Logger(s.log, "debug")
	if err != nil {
		return err
	}
	cfg, warnings, err := cp.Load("", env)
	for _, w := range warnings {
		log.LogAttrs(context.Background(), slog.LevelWarn, w)
	}
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	c, err := cp.New(ctx, cfg, log)
	// A program that another story starts at this moment holds copies of our
	// listeners until it is executed, also of those that were closed since.
	for deadline := time.Now().Add(patience); again && err != nil && strings.Contains(err.Error(), "another program does") && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond) // nothing tells when that is over
		c, err = cp.New(ctx, cfg, log)
	}
	if err != nil {
		stop()
		return err
	}
	s.stop, s.done = stop, make(chan error, 1)
	go func() { s.done <- c.Run(ctx) }()
	select {
	case <-s.log.seen:
		return nil
	case err := <-s.done:
		s.stop = nil
		return fmt.Errorf("the control plane ended: %w\n%s", err, s.log)
	case <-time.After(patience):
		return fmt.Errorf("the control plane is not ready\n%s", s.log)
	}
}

func planeCommand(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	if len(args) == 0 {
		ts.Fatalf("usage: plane start|stop|log")
	}
	switch args[0] {
	case "start":
		err := s.start(ts, args[1:])
		if err != nil {
			fmt.Fprintln(ts.Stderr(), err)
		}
		if (err != nil) != neg {
			ts.Fatalf("plane start: %v", err)
		}
	case "stop":
		if s.stop == nil {
			ts.Fatalf("plane stop: it does not run")
		}
		s.stop()
		s.stop = nil
		if err := <-s.done; err != nil {
			ts.Fatalf("plane stop: %v", err)
		}
		if s.conn != nil {
			_ = s.conn.Close()
			s.conn = nil
		}
	case "log":
		is := regexp.MustCompile("(?m)" + args[1])
		for deadline := time.Now().Add(patience); !neg && !is.MatchString(s.log.String()) && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond) // what it does and what it logs of that are not one moment
		}
		if is.MatchString(s.log.String()) == neg {
			ts.Fatalf("plane log: match of %q, wanted %v, in:\n%s", args[1], !neg, s.log)
		}
	default:
		ts.Fatalf("plane %s: unknown", args[0])
	}
}

// client is an HTTP client that knows the control plane's authority.
func client(ts *testscript.TestScript) *http.Client {
	pool := x509.NewCertPool()
	if raw, err := os.ReadFile(ts.Getenv("CA")); err == nil {
		pool.AppendCertsFromPEM(raw)
	}
	return &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}}
}

// request sends a request and returns status line with headers, and body.
func request(ts *testscript.TestScript, args []string) (status int, head, body string, err error) {
	var headers []string
	for len(args) > 1 && args[0] == "-H" {
		headers, args = append(headers, args[1]), args[2:]
	}
	if len(args) < 2 || len(args) > 3 {
		return 0, "", "", errors.New("usage: curl [-H HEADER]… METHOD URL [BODY-FILE]")
	}
	var in io.Reader
	if len(args) == 3 {
		in = strings.NewReader(ts.ReadFile(args[2]))
	}
	url := args[1]
	if strings.HasPrefix(url, "/") {
		url = ts.Getenv("URL") + url
	}
	r, err := http.NewRequest(args[0], url, in)
	if err != nil {
		return 0, "", "", err
	}
	if in != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ":")
		if strings.EqualFold(name, "Host") {
			r.Host = strings.TrimSpace(value)
			continue
		}
		r.Header.Set(name, strings.TrimSpace(value))
	}
	a, err := client(ts).Do(r)
	if err != nil {
		return 0, "", "", err
	}
	defer func() { _ = a.Body.Close() }()
	raw, err := io.ReadAll(a.Body)
	var h bytes.Buffer
	fmt.Fprintf(&h, "%s\n", a.Status)
	_ = a.Header.Write(&h)
	return a.StatusCode, strings.ReplaceAll(h.String(), "\r", ""), string(raw), err
}

func curlCommand(ts *testscript.TestScript, neg bool, args []string) {
	status, head, body, err := request(ts, args)
	if err != nil {
		ts.Fatalf("curl: %v", err)
	}
	_, _ = io.WriteString(ts.Stdout(), body)
	_, _ = io.WriteString(ts.Stderr(), head)
	if status >= 400 != neg {
		ts.Fatalf("curl: status %d\n%s", status, body)
	}
}

func untilCommand(ts *testscript.TestScript, neg bool, args []string) {
	want := regexp.MustCompile("(?m)" + args[0])
	deadline := time.Now().Add(patience)
	for {
		_, head, body, err := request(ts, args[1:])
		if err == nil && want.MatchString(head+body) != neg {
			_, _ = io.WriteString(ts.Stdout(), body)
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("until: %q never held: %v\n%s%s", args[0], err, head, body)
		}
		time.Sleep(10 * time.Millisecond) // there is no event to wait for: an HTTP API is asked
	}
}

// dial connects to the proxies' port as kuma-dp does.
func (s *story) dial(ts *testscript.TestScript) *grpc.ClientConn {
	if s.conn != nil {
		return s.conn
	}
	creds, err := credentials.NewClientTLSFromFile(ts.Getenv("CA"), "localhost")
	if err == nil {
		s.conn, err = grpc.NewClient("localhost:"+ts.Getenv("KUMA_DP_SERVER_PORT"), grpc.WithTransportCredentials(creds))
	}
	ts.Check(err)
	return s.conn
}

func proxyCommand(ts *testscript.TestScript, neg bool, args []string) {
	s := of(ts)
	if neg || len(args) < 2 {
		ts.Fatalf("usage: proxy NAME FILE [TOKEN-FILE] | proxy end NAME")
	}
	if args[0] == "end" {
		s.proxies[args[1]].Close()
		delete(s.proxies, args[1])
		return
	}
	doc, err := yaml.YAMLToJSON([]byte(ts.ReadFile(args[1])))
	ts.Check(err)
	var header struct{ Mesh, Name string }
	ts.Check(json.Unmarshal(doc, &header))
	token := ""
	if len(args) > 2 {
		token = strings.TrimSpace(ts.ReadFile(args[2]))
	}
	p := cptest.NewADS(cptest.ADSConfig{
		Conn: s.dial(ts), Mesh: header.Mesh, Name: header.Name, Token: token, Metadata: cptest.Metadata("story-"+header.Name, string(doc)),
	})
	ts.Check(p.Connect(context.Background()))
	if old := s.proxies[args[0]]; old != nil {
		old.Close()
	}
	s.proxies[args[0]] = p
}

func waitforCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("usage: waitfor NAME WHAT REGEXP")
	}
	p := of(ts).proxies[args[0]]
	if p == nil {
		ts.Fatalf("there is no proxy %q", args[0])
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	want := regexp.MustCompile(args[2])
	if args[1] == "error" {
		err := p.WaitEnd(ctx)
		if err == nil || !want.MatchString(err.Error()) {
			ts.Fatalf("the stream ended with %v", err)
		}
		return
	}
	url := map[string]string{
		"cluster": envoy.ClusterType, "listener": envoy.ListenerType, "endpoint": envoy.EndpointType, "secret": envoy.SecretType, "filter": envoy.ExtensionType,
	}[args[1]]
	if url == "" {
		ts.Fatalf("waitfor %s: unknown", args[1])
	}
	v, err := p.Wait(ctx, func(v cptest.View) bool {
		if !v.Complete {
			return false
		}
		found := false
		for _, name := range v.Names(url) {
			body, err := protojson.Marshal(v.Resources[url][name])
			found = found || want.MatchString(name) || err == nil && want.Match(body)
		}
		return found != neg
	})
	if err != nil {
		ts.Fatalf("%v; it has %q", err, v.Names(url))
	}
}

func bearerCommand(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv(args[0], ts.ReadFile(args[1]))
}

func base64Command(ts *testscript.TestScript, _ bool, args []string) {
	text := base64.StdEncoding.EncodeToString([]byte(ts.ReadFile(args[0])))
	to := ts.MkAbs(args[1])
	ts.Check(os.WriteFile(to, []byte(strings.ReplaceAll(ts.ReadFile(to), "KEY", text)), 0o600))
}

func fillCommand(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(strings.ReplaceAll(ts.ReadFile(args[0]), "TOKEN", ts.Getenv("TOKEN"))), 0o600))
}

func adminCommand(ts *testscript.TestScript, _ bool, args []string) {
	_, _, body, err := request(ts, []string{"GET", "/global-secrets/admin-user-token"})
	ts.Check(err)
	var secret struct{ Data []byte }
	ts.Check(json.Unmarshal([]byte(body), &secret))
	ts.Setenv(args[0], string(secret.Data))
}

func revokeCommand(ts *testscript.TestScript, _ bool, args []string) {
	claims, err := base64.RawURLEncoding.DecodeString(strings.Split(ts.ReadFile(args[0]), ".")[1])
	ts.Check(err)
	var id struct{ JTI string }
	ts.Check(json.Unmarshal(claims, &id))
	secret := map[string]any{"type": "GlobalSecret", "name": "user-token-revocations", "data": []byte("other-id, " + id.JTI + "\n")}
	path := "/global-secrets/user-token-revocations"
	if len(args) == 4 {
		secret["type"], secret["name"], path = args[1], args[3], "/global-secrets/"+args[3]
		if args[2] != "" {
			secret["mesh"], path = args[2], "/meshes/"+args[2]+"/secrets/"+args[3]
		}
	}
	doc, err := json.Marshal(secret)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("revocations.json"), doc, 0o600))
	status, _, body, err := request(ts, []string{"PUT", path, "revocations.json"})
	if err != nil || status >= 300 {
		ts.Fatalf("revoke: %d %s %v", status, body, err)
	}
}
