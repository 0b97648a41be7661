package dp

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"kuma/internal/errs"
	"kuma/proto/linkpb"
)

// state is what decides whether this proxy is able to serve.
type state struct {
	log *slog.Logger

	mu          sync.Mutex
	admin       *admin
	terminating bool
	// linked says that the control plane tells over the link when the
	// configuration is complete; without it Envoy's own answer counts.
	linked     bool
	complete   bool
	rejections []string
	// leftOut is what the control plane could not put into the configuration.
	leftOut []string
	// refusal is why the control plane doesn't serve this proxy, if so.
	refusal string
	// changed is closed and replaced when any of this changes.
	changed chan struct{}
}

func newState(log *slog.Logger) *state { return &state{log: log, changed: make(chan struct{})} }

func (s *state) set(f func(*state)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
	close(s.changed)
	s.changed = make(chan struct{})
}

// accepted reports whether a complete configuration was ever in place.
func (s *state) accepted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.complete
}

// configured takes over what Envoy accepted and refused. Once a configuration
// was complete, a later refusal does not take that back: the last good one
// serves.
func (s *state) configured(c *linkpb.ConfigStatus) {
	var list []string
	for _, r := range c.GetRejections() {
		if len(list) == 20 {
			break
		}
		kind := r.GetTypeUrl()
		kind = kind[strings.LastIndexByte(kind, '.')+1:]
		list = append(list, fmt.Sprintf("%s %s: %s", kind, r.GetResource(), strings.TrimSpace(r.GetMessage())))
	}
	leftOut := c.GetLeftOut()[:min(len(c.GetLeftOut()), 20)]
	var before, leftBefore []string
	first := false
	s.set(func(s *state) {
		before, leftBefore = s.rejections, s.leftOut
		s.leftOut = leftOut
		first = c.GetComplete() && !s.complete
		s.complete = s.complete || c.GetComplete()
		s.rejections = list
		s.refusal = ""
	})
	if first {
		s.log.Info("envoy has its complete configuration")
	}
	for _, what := range leftOut {
		if !slices.Contains(leftBefore, what) {
			s.log.Warn("the control plane leaves something out of this proxy's configuration", "reason", what)
		}
	}
	if len(leftOut) == 0 && len(leftBefore) > 0 {
		s.log.Info("nothing is left out of this proxy's configuration any more")
	}
	if now := strings.Join(list, "\n"); now != "" && now != strings.Join(before, "\n") {
		message := "envoy refused a part of its configuration; the last good one serves"
		if !s.accepted() {
			message = "envoy refused a part of its first configuration; the proxy is not ready"
		}
		for _, r := range list {
			s.log.Error(message, "reason", r)
		}
	} else if now == "" && len(before) > 0 {
		s.log.Info("envoy takes its configuration again")
	}
}

// verdict is whether the proxy can serve, and the answer to GET /ready.
type verdict struct {
	ready bool
	page  page
}

// judge decides whether the proxy can serve (contract).
func (s *state) judge(ctx context.Context) verdict {
	s.mu.Lock()
	a, ending, linked, complete := s.admin, s.terminating, s.linked, s.complete
	rejections, refusal := s.rejections, s.refusal
	s.mu.Unlock()
	if ending {
		return own(terminating)
	}
	if !complete && refusal != "" {
		return own("refused by the control plane: " + refusal)
	}
	if a == nil {
		return own("envoy not ready")
	}
	p, err := a.ready(ctx)
	if err != nil {
		return own("envoy not ready")
	}
	if linked && !complete && len(rejections) > 0 {
		return own("envoy refused its configuration:\n" + strings.Join(rejections, "\n"))
	}
	if p.status != http.StatusOK {
		return verdict{page: p}
	}
	if linked && !complete {
		return own("envoy has not received its complete configuration yet")
	}
	return verdict{ready: true, page: p}
}

// terminating is what /ready answers after a request to stop.
const terminating = "TERMINATING"

// own is an answer that kuma-dp makes itself.
func own(body string) verdict {
	return verdict{page: page{http.StatusServiceUnavailable, http.Header{
		"X-Powered-By": {"kuma-dp"}, "Content-Type": {"text/plain; charset=utf-8"},
	}, []byte(body)}}
}

// listenReadiness opens the port before anything else runs, so that one in use
// is told at once.
func listenReadiness(cfg *Config) (net.Listener, error) {
	at := net.JoinHostPort(cfg.ReadinessAddress, strconv.Itoa(int(cfg.ReadinessPort)))
	l, err := net.Listen("tcp", at)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%w; the readiness port %d (KUMA_READINESS_PORT) can't be opened: set another one for each proxy on a machine", err, cfg.ReadinessPort)
	}
	return l, nil
}

// serveReadiness answers /ready until the context ends.
func serveReadiness(ctx context.Context, l net.Listener, s *state) {
	mux := http.NewServeMux()
	mux.HandleFunc("/ready", func(w http.ResponseWriter, r *http.Request) {
		p := s.judge(r.Context()).page
		for k, v := range p.header {
			if k != "Date" && k != "Transfer-Encoding" && k != "Content-Length" {
				w.Header()[k] = v
			}
		}
		w.WriteHeader(p.status)
		_, _ = w.Write(p.body)
	})
	srv := &http.Server{
		Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second, IdleTimeout: 30 * time.Second,
		MaxHeaderBytes: 8 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	_ = srv.Serve(l)
}

// watch tells whenever the proxy becomes able to serve or ceases to be. Envoy
// announces nothing by itself, so it is asked: often until it is ready for the
// first time, then every few seconds, and at each change that kuma-dp sees.
func (s *state) watch(ctx context.Context, tell func(ready bool, reason string)) {
	const eager, calm = 50 * time.Millisecond, 5 * time.Second
	began, wasReady, told := time.Now(), false, ""
	pause := eager
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		v := s.judge(ctx)
		if ctx.Err() != nil {
			return
		}
		reason := strings.TrimSpace(string(v.page.body))
		if now := fmt.Sprint(v.ready, reason); now != told {
			told = now
			tell(v.ready, reason)
			if v.ready != wasReady {
				wasReady = v.ready
				switch {
				case v.ready:
					s.log.Info("the proxy is ready", "after", time.Since(began).Round(time.Millisecond))
				case reason != terminating:
					s.log.Warn("the proxy is not ready any more", "reason", reason)
				}
			}
		}
		switch {
		case v.ready:
			pause = calm
		case time.Since(began) > 30*time.Second:
			pause = time.Second
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-t.C:
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}
