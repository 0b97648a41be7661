// Package mads tells Prometheus where to scrape: monitoring assignment
// discovery, version 1, over HTTP.
//
// The protocol is the contract's (kuma_sd_configs of Prometheus). A request waits
// until its client's targets are others than those that it has, or until its
// time is up.
package mads

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"kuma/internal/mesh"
	"kuma/internal/policy/meshmetric"
	"kuma/internal/state"
)

// Path is where the assignments are served.
const Path = "/v3/discovery:monitoringassignments"

// assignmentType names what is served, in the contract's protobuf terms.
const assignmentType = "type.googleapis.com/kuma.observability.v1.MonitoringAssignment"

// Config is what a Server needs.
type Config struct {
	// Tracker has the picture. It must be ready before anyone is served: a picture
	// without targets would have Prometheus forget its own.
	Tracker *state.Tracker
	// Timeout is how long a request waits that does not say how long; the default
	// is 30 s.
	Timeout time.Duration
	// Every is the shortest time between two renewals while proxies come and go;
	// the default is 1 s. Without a change nothing is renewed.
	Every time.Duration
	// MaxWaiting bounds how many requests wait at once; the default is 1000.
	// Whoever comes then is answered at once, with what there is.
	MaxWaiting int
	Log        *slog.Logger
}

const (
	// maxTimeout bounds how long any request waits.
	maxTimeout = 10 * time.Minute
	// readTimeout bounds how long a request's body may take, and writeTimeout an
	// answer.
	readTimeout  = 10 * time.Second
	writeTimeout = time.Minute
	// maxRequest bounds a request's body, in bytes.
	maxRequest = 1 << 20
)

// Server answers requests for assignments.
type Server struct {
	cfg     Config
	waiting chan struct{}
	closed  chan struct{}
	once    sync.Once

	mu sync.Mutex
	// pages are what each client gets in the picture.
	pic     *state.Picture
	pages   map[string]*page
	renewed time.Time
}

// page is what one client gets.
type page struct {
	// version follows from the content, and is the same on every control plane.
	version string
	body    []byte
}

// New makes a server.
func New(cfg Config) *Server {
	if cfg.Timeout == 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.Every == 0 {
		cfg.Every = time.Second
	}
	if cfg.MaxWaiting == 0 {
		cfg.MaxWaiting = 1000
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{cfg: cfg, waiting: make(chan struct{}, cfg.MaxWaiting), closed: make(chan struct{})}
}

// Close answers all requests that wait. It is for http.Server.RegisterOnShutdown.
func (s *Server) Close() { s.once.Do(func() { close(s.closed) }) }

// request is what a client says, in protobuf's JSON form, which has two names
// for a field.
type request struct {
	Node struct {
		ID string `json:"id"`
	} `json:"node"`
	VersionInfo  string `json:"version_info"`
	VersionInfo2 string `json:"versionInfo"`
}

// ServeHTTP answers one request. Whatever else stands in its path than Path is
// not found.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// Of a connection that is used again, the deadline of the last answer.
	deadlines := http.NewResponseController(w)
	_ = deadlines.SetWriteDeadline(time.Now().Add(writeTimeout))
	// The contract sends JSON as text; a browser is not to look for more in it.
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.URL.Path != Path {
		plain(w, http.StatusNotFound, "404: Page Not Found")
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		plain(w, http.StatusMethodNotAllowed, "405: Method Not Allowed")
		return
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		plain(w, http.StatusUnsupportedMediaType, "415: Unsupported Media Type")
		return
	}
	// No deadline of the server's own may be in the way of a request that waits.
	_ = deadlines.SetReadDeadline(time.Now().Add(readTimeout))
	timeout := s.cfg.Timeout
	if t := r.URL.Query().Get("fetch-timeout"); t != "" {
		var err error
		if timeout, err = time.ParseDuration(t); err == nil && timeout < 0 {
			err = errors.New("it must not be negative")
		}
		if err != nil {
			problem(w, "Could not parse fetch-timeout", err)
			return
		}
	}
	var q request
	raw, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	_ = deadlines.SetReadDeadline(time.Time{})
	if err == nil {
		err = json.Unmarshal(raw, &q)
	}
	if err != nil {
		problem(w, "Could not parse request body", err)
		return
	}
	has := q.VersionInfo
	if has == "" {
		has = q.VersionInfo2
	}
	timeout = min(timeout, maxTimeout)
	_ = deadlines.SetWriteDeadline(time.Now().Add(timeout + writeTimeout))
	p := s.wait(r, q.Node.ID, has, timeout)
	if p == nil {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	// The contract's type, though it is JSON.
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write(p.body)
}

// wait returns the client's page as soon as it is another than it has, or nil
// when its time is up.
func (s *Server) wait(r *http.Request, client, has string, timeout time.Duration) *page {
	// The subscription comes first: what changes after the look is told.
	changed, stop := s.cfg.Tracker.Subscribe()
	defer stop()
	p, due := s.page(client)
	if p.version != has {
		return p
	}
	if timeout == 0 {
		return nil
	}
	select {
	case s.waiting <- struct{}{}:
		defer func() { <-s.waiting }()
	default:
		s.cfg.Log.Warn("too many requests for monitoring assignments wait; this one is answered at once", "remote", r.RemoteAddr, "limit", s.cfg.MaxWaiting)
		return nil
	}
	up := time.NewTimer(timeout)
	defer up.Stop()
	for {
		var again <-chan time.Time
		if due > 0 {
			again = time.After(due)
		}
		select {
		case <-changed:
		case <-again:
		case <-up.C:
			return nil
		case <-s.closed:
			return nil
		case <-r.Context().Done():
			return nil
		}
		if p, due = s.page(client); p.version != has {
			return p
		}
	}
}

// page returns what the client gets now. A client that no backend names gets
// what is for all of them. Where something has changed since, but it is too early
// to renew, due is when it is not.
func (s *Server) page(client string) (p *page, due time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pic := s.cfg.Tracker.Now(); pic != s.pic {
		changes, ok := pic.Since(s.pic)
		switch early := s.cfg.Every - time.Since(s.renewed); {
		case ok && !slices.ContainsFunc(changes, matters):
			s.pic = pic
		case s.pages != nil && early > 0:
			due = early
		default:
			s.pages, s.pic, s.renewed = render(pic), pic, time.Now()
		}
	}
	if p := s.pages[client]; p != nil {
		return p, due
	}
	return s.pages[""], due
}

// matters reports whether a change may concern any target.
func matters(c state.Change) bool {
	switch c.Key.Kind {
	case mesh.Meshes.Name, mesh.Dataplanes.Name, meshmetric.Policy.Kind().Name:
		return true
	}
	return false
}

// namespace makes versions out of contents.
var namespace = uuid.MustParse("4f5a9dd6-8c1b-5b0e-9d0f-3b2f7f0c6a11")

// render makes the pages of all clients that some backend names, and that of the
// others.
func render(pic *state.Picture) map[string]*page {
	all := map[string][]byte{"": nil}
	add := func(client string, more []byte) {
		have := all[client]
		if len(have) > 0 && len(more) > 0 {
			have = append(have, ',')
		}
		all[client] = append(have, more...)
	}
	names := pic.Meshes()
	for _, name := range names {
		if m := pic.Mesh(name); m != nil {
			for client := range encoded(m).clients {
				all[client] = nil
			}
		}
	}
	for _, name := range names {
		m := pic.Mesh(name)
		if m == nil {
			continue
		}
		e := encoded(m)
		for client := range all {
			add(client, e.clients[client])
			add(client, e.everyone)
		}
	}
	out := make(map[string]*page, len(all))
	for client, resources := range all {
		version := uuid.NewSHA1(namespace, resources).String()
		var b bytes.Buffer
		b.Grow(len(resources) + 200)
		b.WriteString(`{"version_info":"` + version + `",`)
		if len(resources) > 0 {
			b.WriteString(`"resources":[`)
			b.Write(resources)
			b.WriteString(`],`)
		}
		b.WriteString(`"type_url":"` + assignmentType + `"}`)
		out[client] = &page{version, b.Bytes()}
	}
	return out
}

// encodings are a mesh's assignments as JSON, between commas.
type encodings struct {
	clients  map[string][]byte
	everyone []byte
}

// encoded returns a mesh's assignments, which are made once for as long as
// nothing in the mesh changes.
func encoded(m *state.Mesh) *encodings {
	type key struct{}
	return state.Shared(m, key{}, func() *encodings {
		a := assign(m)
		out := &encodings{clients: map[string][]byte{}, everyone: join(a.everyone)}
		for client, list := range a.clients {
			out.clients[client] = join(list)
		}
		return out
	})
}

func join(list []Assignment) []byte {
	var b bytes.Buffer
	for i := range list {
		if i > 0 {
			b.WriteByte(',')
		}
		raw, err := json.Marshal(&list[i])
		if err != nil {
			// Strings alone can't fail.
			panic(err)
		}
		b.Write(raw)
	}
	return b.Bytes()
}

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text)
}

// problem is the contract's form of an error.
func problem(w http.ResponseWriter, title string, err error) {
	raw, marshalErr := json.Marshal(struct {
		Type    string `json:"type"`
		Status  int    `json:"status"`
		Title   string `json:"title"`
		Detail  string `json:"detail"`
		Details string `json:"details"`
	}{"", 0, title, err.Error(), err.Error()})
	if marshalErr != nil {
		raw = nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	_, _ = w.Write(raw)
}
