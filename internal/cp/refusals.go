package cp

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// refusalsEvery is how often, at most, one port's failed handshakes are told.
const refusalsEvery = time.Minute

// refusals tells of TLS handshakes that failed: a client that trusts another
// authority, shows no certificate or a wrong one, or speaks too old a TLS. Each
// is counted; one a minute and port is logged, with how many went before it
// unsaid. Who just goes away is no refusal.
type refusals struct {
	log   *slog.Logger
	count *prometheus.CounterVec

	mu   sync.Mutex
	said map[string]time.Time
	more map[string]int
}

func newRefusals(log *slog.Logger) *refusals {
	return &refusals{
		log: log, said: map[string]time.Time{}, more: map[string]int{},
		count: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kuma_tls_handshake_errors_total", Help: "TLS handshakes that failed, by port.",
		}, []string{"server"}),
	}
}

// handshake notes a handshake that failed.
func (r *refusals) handshake(server, from string, err error) {
	if r == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return
	}
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
		return
	}
	r.tell(server, from, err.Error())
}

func (r *refusals) tell(server, from, why string) {
	r.count.WithLabelValues(server).Inc()
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if last, ok := r.said[server]; ok && now.Sub(last) < refusalsEvery {
		r.more[server]++
		return
	}
	r.log.Warn("a client's TLS handshake failed", "server", server, "from", from, "error", why, "unsaid", r.more[server])
	r.said[server], r.more[server] = now, 0
}

// errorLog is what an http.Server says of one port: failed handshakes are told
// as all are, everything else is debugging.
type errorLog struct {
	server   string
	refusals *refusals
	log      *slog.Logger
}

// Write takes one line of the standard library's.
func (e errorLog) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	rest, handshake := strings.CutPrefix(text, "http: TLS handshake error from ")
	from, why, ok := strings.Cut(rest, ": ")
	switch gone := strings.HasSuffix(why, "EOF") || strings.Contains(why, "connection reset") || strings.Contains(why, "broken pipe") || strings.Contains(why, "i/o timeout"); {
	case handshake && ok && !gone:
		e.refusals.tell(e.server, from, why)
	default:
		e.log.Debug("http server", "text", text)
	}
	return len(line), nil
}
