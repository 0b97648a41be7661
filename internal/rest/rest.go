// Package rest is the HTTP API: the same handlers for every kind, and a few
// routes beside them: the contract's (docs/contract.md), and ours
// (docs/rest-api.md).
//
// Every route has an access rule, given where it is declared: a handler runs
// only for a caller whom its rule lets pass.
package rest

import (
	"context"
	"encoding/json"
	"io/fs"
	"log/slog"
	"net/http"
	"path"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"

	"kuma/internal/admit"
	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/resource"
	"kuma/internal/store"
)

// Index is what GET / tells everyone.
type Index struct {
	// Product is "Kuma": the contract's clients look at it.
	Product string
	// Version is the control plane's own.
	Version string
	// InstanceID names this process, ClusterID all that share its store.
	InstanceID, ClusterID string
	// Hostname is the machine's.
	Hostname string
	// BasedOnKuma is the contract's version that this one offers; may be empty.
	BasedOnKuma string
	// HTTPSPort is where this API is served with TLS, AdminPort where 0.7's admin
	// server is for other machines: kumactl goes there with a client certificate.
	// 0 means that there is none.
	HTTPSPort, AdminPort uint32
}

// Inspection is a question to a running proxy.
type Inspection struct {
	// What is "config_dump", "stats" or "clusters".
	What string
	// JSON asks for JSON where text is the default.
	JSON bool
	// UsedOnly leaves out statistics that were never touched.
	UsedOnly bool
	// IncludeEDS adds the endpoints to a config dump.
	IncludeEDS bool
}

// Inspector asks a running proxy. Errors: NotFound, Unavailable where the
// proxy can't be reached now.
type Inspector interface {
	Inspect(ctx context.Context, mesh, name string, q Inspection) ([]byte, error)
}

// Attachment is a place in a proxy to which policies apply.
type Attachment struct {
	// Type is "dataplane", "inbound", "outbound" or "service".
	Type string
	// Name is "<address>:<port>:<workload port>" of an inbound,
	// "<address>:<port>" of an outbound; empty for the whole proxy.
	Name string
	// Service is the kuma.io/service there; empty for the whole proxy.
	Service string
	// Policies apply there.
	Policies []*resource.Resource
}

// RuleSet is what one kind of policy comes to for a proxy, in the contract's
// form; each part is written as JSON as it is, nil as an empty list.
type RuleSet struct {
	// Type is the policy's kind.
	Type string `json:"type"`
	// ToRules and ToResourceRules are for destinations.
	ToRules         []any `json:"toRules"`
	ToResourceRules []any `json:"toResourceRules"`
	// FromRules and InboundRules are for callers.
	FromRules    []any `json:"fromRules"`
	InboundRules []any `json:"inboundRules"`
	// ProxyRule is for the proxy as a whole; may be nil.
	ProxyRule any `json:"proxyRule,omitempty"`
	// Warnings are for people.
	Warnings []string `json:"warnings"`
}

// Explainer tells what the control plane makes of its resources. Errors are
// NotFound for a proxy that is not there.
type Explainer interface {
	// Config is the proxy's configuration as it was computed, by type of
	// resource; shadow adds policies that are only tried out. It holds no
	// private keys.
	Config(ctx context.Context, mesh, name string, shadow bool) (json.RawMessage, error)
	// Attachments are the policies that apply, by place.
	Attachments(ctx context.Context, mesh, name string) ([]Attachment, error)
	// Rules are the policies that apply, merged, by kind.
	Rules(ctx context.Context, mesh, name string) ([]RuleSet, error)
	// Selected are the Dataplanes to which a policy applies.
	Selected(ctx context.Context, policy *resource.Resource) ([]*resource.Resource, error)
}

// Config is what a Server needs.
type Config struct {
	// Kinds are the kinds that the API offers.
	Kinds []*resource.Kind
	// Store is read from; writes go through Gate.
	Store store.Store
	// Gate takes all writes.
	Gate *admit.Gate
	// Access says who may do what.
	Access *auth.Access
	// Authn says who calls.
	Authn *auth.Authenticator
	// Issuer makes tokens; nil means that there are no routes for that.
	Issuer *auth.Issuer
	// Index is what GET / tells.
	Index Index
	// Settings is the control plane's configuration, for GET /config. Secrets
	// are masked here as well.
	Settings func() ([]byte, error)
	// Inspector and Explainer may be nil: their routes then answer 503.
	Inspector Inspector
	Explainer Explainer
	// Bootstrap answers GET /bootstrap, which tells programs on this machine that
	// know the port of Kuma 0.7 where proxies go; Elsewhere says it to others, and
	// to who asks for a bootstrap itself. Nil means that there is no such route.
	Bootstrap http.Handler
	Elsewhere func(*http.Request) string
	// Catalog is what GET /catalog answers to kumactl of Kuma 0.7; nil means
	// that there is no such route.
	Catalog json.RawMessage
	// Rotator may be nil: its routes then answer 503.
	Rotator Rotator
	// TLSReporter may be nil: its route then answers 503.
	TLSReporter TLSReporter
	// Called is told of each caller who was authenticated, before the request is
	// handled; may be nil.
	Called func(*http.Request, auth.Caller)
	// GUI holds the GUI's static files; nil means there is none.
	GUI fs.FS
	// Lenient drops unknown fields of specifications, as the original does.
	Lenient bool
	// ReadOnly is shown of every kind; the gate is what refuses.
	ReadOnly bool
	// BasePath is put before all paths; empty means "/".
	BasePath string
	// CORSAllowedDomains are origins, or regular expressions that match a whole
	// origin, whose pages may call the API. None by default.
	CORSAllowedDomains []string
	// MaxBody bounds a request's body, in bytes; 0 means 4 MiB.
	MaxBody int64
	// Log may be nil.
	Log *slog.Logger
}

// Server is the HTTP API.
type Server struct {
	cfg    Config
	mux    *http.ServeMux
	routes []*route
	cors   []*regexp.Regexp
}

// Route is a route, for a list of them all.
type Route struct {
	Method, Path string
	// Access says who may use it.
	Access string
}

// request is a request whose caller passed the route's rule.
type request struct {
	*http.Request
	caller auth.Caller
}

// handler answers a request. An error is answered by the problem that fits.
type handler func(w http.ResponseWriter, r *request) error

// route is a method of a path.
type route struct {
	method, path string
	access       rule
	handle       handler
}

// rule says who may use a route. Only the functions below make one.
type rule struct {
	name string
	// open routes are not even authenticated.
	open  bool
	check func(a *auth.Access, c auth.Caller, r *http.Request) error
}

// open lets everyone in.
func open() rule {
	return rule{name: "everyone", open: true, check: func(*auth.Access, auth.Caller, *http.Request) error { return nil }}
}

// reads lets in who may read the kind.
func reads(k *resource.Kind) rule {
	return rule{name: "read " + k.Name, check: func(a *auth.Access, c auth.Caller, _ *http.Request) error { return a.Read(c, k) }}
}

// writes lets in who may write the kind.
func writes(k *resource.Kind) rule {
	return rule{name: "write " + k.Name, check: func(a *auth.Access, c auth.Caller, _ *http.Request) error { return a.Write(c, k) }}
}

// does lets in who may do this.
func does(action auth.Action, name string) rule {
	return rule{name: name, check: func(a *auth.Access, c auth.Caller, _ *http.Request) error { return a.Do(c, action) }}
}

// New makes a Server. Errors are Invalid: a CORS pattern that can't be read.
func New(c Config) (*Server, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.MaxBody == 0 {
		c.MaxBody = resource.MaxSize
	}
	if c.BasePath == "/" {
		c.BasePath = ""
	}
	c.BasePath = strings.TrimSuffix(c.BasePath, "/")
	c.Kinds = slices.SortedFunc(slices.Values(c.Kinds), func(a, b *resource.Kind) int { return strings.Compare(a.Name, b.Name) })
	s := &Server{cfg: c}
	for _, d := range c.CORSAllowedDomains {
		re, err := regexp.Compile("^(?:" + d + ")$")
		if err != nil {
			return nil, errs.New(errs.Invalid, "apiServer.corsAllowedDomains: %q is not a regular expression: %w", d, err)
		}
		s.cors = append(s.cors, re)
	}
	s.crud()
	s.overviews()
	s.about()
	s.tokens()
	s.legacy()
	s.inspect()
	s.tlsReport()
	s.ca()
	s.gui()
	s.mount()
	return s, nil
}

// add declares a route.
func (s *Server) add(method, path string, access rule, handle handler) {
	s.routes = append(s.routes, &route{method, path, access, handle})
}

// mount puts the routes into the router: one entry for each path, so that a
// wrong method is told from a wrong path.
func (s *Server) mount() {
	s.mux = http.NewServeMux()
	byPath := map[string]map[string]*route{}
	for _, r := range s.routes {
		if r.access.check == nil {
			panic("route without an access rule: " + r.method + " " + r.path)
		}
		if byPath[r.path] == nil {
			byPath[r.path] = map[string]*route{}
		}
		if byPath[r.path][r.method] != nil {
			panic("route declared twice: " + r.method + " " + r.path)
		}
		byPath[r.path][r.method] = r
	}
	for p, methods := range byPath {
		pattern := p
		if p == "/" {
			pattern = "/{$}"
		}
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.dispatch(w, r, methods) })
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { plain(w, http.StatusNotFound, "404: Page Not Found") })
}

// Routes lists all routes.
func (s *Server) Routes() []Route {
	var out []Route
	for _, r := range s.routes {
		out = append(out, Route{r.method, r.path, r.access.name})
	}
	return out
}

// dispatch finds the method's route and passes the request through its rule.
func (s *Server) dispatch(w http.ResponseWriter, r *http.Request, methods map[string]*route) {
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	rt := methods[method]
	if rt == nil {
		allow := []string{}
		for m := range methods {
			allow = append(allow, m)
		}
		slices.Sort(allow)
		w.Header().Set("Allow", strings.Join(allow, ", "))
		plain(w, http.StatusMethodNotAllowed, "405: Method Not Allowed")
		return
	}
	if (method == http.MethodPut || method == http.MethodPost) && !isJSON(r.Header.Get("Content-Type")) {
		plain(w, http.StatusUnsupportedMediaType, "415: Unsupported Media Type")
		return
	}
	req := &request{Request: r}
	if !rt.access.open {
		caller, err := s.cfg.Authn.HTTP(r)
		if err == nil {
			req.caller = caller
			if s.cfg.Called != nil {
				s.cfg.Called(r, caller)
			}
			err = rt.access.check(s.cfg.Access, caller, r)
		}
		if err != nil {
			s.problem(w, r, "", err)
			return
		}
	}
	if err := rt.handle(w, req); err != nil {
		s.problem(w, r, "", err)
	}
}

// Handler is the whole API.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler {
				panic(p)
			}
			s.cfg.Log.ErrorContext(r.Context(), "request handler panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			s.problem(w, r, "", errs.New(errs.Internal, "panic"))
		}()
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Cache-Control", "no-store")
		if s.crossOrigin(w, r) {
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, s.cfg.MaxBody)
		if r = s.relative(r); r == nil {
			plain(w, http.StatusNotFound, "404: Page Not Found")
			return
		}
		s.mux.ServeHTTP(w, r)
	})
}

// crossOrigin answers for pages of other origins, where any are allowed. It
// reports whether the answer is complete.
func (s *Server) crossOrigin(w http.ResponseWriter, r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if len(s.cors) == 0 || origin == "" {
		return false
	}
	w.Header().Add("Vary", "Origin")
	// An origin has a scheme, a host and a port: "?" or "/" would let a pattern
	// such as "https://.*\.example" match what only looks like it.
	if _, host, ok := strings.Cut(origin, "://"); !ok || strings.ContainsAny(host, "/?#@\\") {
		return false
	}
	if !slices.ContainsFunc(s.cors, func(re *regexp.Regexp) bool { return re.MatchString(origin) }) {
		return false
	}
	w.Header().Set("Access-Control-Allow-Origin", origin)
	w.Header().Set("Access-Control-Expose-Headers", "Access-Control-Allow-Origin, ETag")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	w.Header().Set("Access-Control-Allow-Methods", "GET, PUT, POST, DELETE")
	w.Header().Set("Access-Control-Allow-Headers", "Authorization, Content-Type, If-Match, If-None-Match")
	w.WriteHeader(http.StatusOK)
	return true
}

// relative takes the base path and a slash at the end off the path. It returns
// nil for a path outside of the base path.
func (s *Server) relative(r *http.Request) *http.Request {
	p, raw := r.URL.Path, r.URL.RawPath
	if s.cfg.BasePath != "" {
		rest, ok := strings.CutPrefix(p, s.cfg.BasePath)
		if !ok || rest != "" && rest[0] != '/' {
			return nil
		}
		p, raw = rest, strings.TrimPrefix(raw, s.cfg.BasePath)
	}
	if p = strings.TrimSuffix(p, "/"); p == "" {
		p = "/"
	}
	raw = strings.TrimSuffix(raw, "/")
	if path.Clean(p) != p {
		return nil
	}
	if p == r.URL.Path {
		return r
	}
	c := r.Clone(r.Context())
	c.URL.Path, c.URL.RawPath = p, raw
	return c
}

// isJSON reports whether a content type is JSON.
func isJSON(contentType string) bool {
	t, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(t), "application/json")
}
