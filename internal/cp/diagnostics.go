package cp

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kuma/internal/auth"
	"kuma/internal/errs"
	"kuma/internal/mesh"
)

// maxLogging bounds the body of a request for a log level.
const maxLogging = 4096

// administrators returns what tells who may do what only administrators may: as
// on the API, who runs as this user or root on this machine, or whose user token
// lets him into what is for administrators.
func administrators(users *auth.Authenticator, access *auth.Access) func(*http.Request) error {
	return func(r *http.Request) error {
		caller, err := users.HTTP(r)
		if err != nil {
			return err
		}
		if access.Write(caller, mesh.GlobalSecrets.Kind) != nil {
			return errs.New(errs.Denied, "%q may not do this: send the user token of an administrator, or call from this machine as the user that runs the control plane", caller)
		}
		return nil
	}
}

// diagnosticsServer is the server of the diagnostics port.
func (c *ControlPlane) diagnosticsServer() *http.Server {
	s := &http.Server{
		Handler: c.diagnose(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
	}
	if c.cfg.Diagnostics.DebugEndpoints {
		s.WriteTimeout = 5 * time.Minute // a profile takes as long as it was asked for
	}
	if c.users != nil {
		s.ConnContext = c.users.ConnContext
	}
	return s
}

// diagnose is the diagnostics port: whether the control plane is alive, whether
// it serves, what it counts, how much it logs; and, where that is wanted, what
// it does inside.
func (c *ControlPlane) diagnose() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthy", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if !c.ready.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		} else if away := c.cutOff(); away > 0 {
			http.Error(w, fmt.Sprintf("the control plane has been cut off from its store for %v: writes fail, and another control plane may have taken over", away.Truncate(time.Second)), http.StatusServiceUnavailable)
		}
	})
	if c.cfg.Diagnostics.Metrics {
		mux.Handle("GET /metrics", promhttp.InstrumentMetricHandler(c.metrics.zoned, promhttp.HandlerFor(c.metrics.registry, promhttp.HandlerOpts{
			ErrorLog: quiet(c.log), ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 8, Timeout: 20 * time.Second,
		})))
	}
	mux.HandleFunc("/logging", c.logging)
	mux.HandleFunc("/logging/{component}", c.logging)
	if c.cfg.Diagnostics.DebugEndpoints {
		// What is in memory shows keys and tokens, so this is for administrators.
		for path, h := range map[string]http.HandlerFunc{
			"/": pprof.Index, "/cmdline": pprof.Cmdline, "/profile": pprof.Profile, "/symbol": pprof.Symbol, "/trace": pprof.Trace,
		} {
			mux.HandleFunc("/debug/pprof"+path, c.guarded(h))
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	})
}

// guarded lets administrators in.
func (c *ControlPlane) guarded(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var err error = errs.New(errs.Denied, "there is nobody who may do this")
		if c.administers != nil {
			err = c.administers(r)
		}
		if err != nil {
			code := http.StatusForbidden
			if errs.Is(err, errs.Unauthenticated) {
				code = http.StatusUnauthorized
			}
			http.Error(w, err.Error(), code)
			return
		}
		h(w, r)
	}
}

// logging shows and changes log levels. Everyone may look (the contract); only
// administrators may change them: who silences the log is not seen.
func (c *ControlPlane) logging(w http.ResponseWriter, r *http.Request) {
	component := r.PathValue("component")
	switch {
	case r.Method == http.MethodGet && component == "":
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(struct {
			Components map[string]string `json:"components"`
		}{c.levels.all()})
	case r.Method == http.MethodPut && component == "":
		c.guarded(c.setLevel)(w, r)
	case r.Method == http.MethodDelete:
		c.guarded(func(http.ResponseWriter, *http.Request) {
			c.levels.reset(component)
			c.log.Info("log levels were reset", "component", component)
		})(w, r)
	default:
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	}
}

func (c *ControlPlane) setLevel(w http.ResponseWriter, r *http.Request) {
	var body struct{ Component, Level string }
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxLogging)).Decode(&body); err != nil {
		// The body itself is nobody's business.
		http.Error(w, "invalid request body", http.StatusBadRequest)
		return
	}
	if err := c.levels.override(body.Component, body.Level); err != nil {
		code := http.StatusBadRequest
		if errs.Is(err, errs.Unavailable) {
			code = http.StatusTooManyRequests
		}
		if e, ok := errors.AsType[*errs.Error](err); ok {
			err = e
		}
		http.Error(w, err.Error(), code)
		return
	}
	c.log.Info("a log level was changed", "component", body.Component, "level", body.Level)
}
