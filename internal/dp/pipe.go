package dp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"kuma/internal/errs"
	"kuma/proto/linkpb"
)

// logPipe is the named pipe into which Envoy writes lines for kuma-dp: access
// logs to forward over TCP (contract), and the refusals that guarded
// inbounds made.
type logPipe struct {
	file *os.File
	log  *slog.Logger
	// send passes refusals on to the control plane.
	send func(*linkpb.Denials)
	// shown limits the refusals in the log, and what the control plane gets.
	shown *rate.Limiter

	mu      sync.Mutex
	hidden  uint64
	batch   []*linkpb.Denials_Denial
	dropped uint64

	forward forwarder
}

const (
	maxPipeLine     = 64 << 10
	denialsShown    = 20 // a second
	denialsSent     = 20 // a second
	denialsInterval = time.Second
)

// openLogPipe makes the named pipe and holds it open for reading and writing,
// so that it never ends when a writer goes.
func openLogPipe(path string, log *slog.Logger, send func(*linkpb.Denials)) (*logPipe, error) {
	err := unix.Mkfifo(path, 0o600)
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, errs.New(errs.Unavailable, "make the pipe for access logs %s: %w", path, err)
	}
	return &logPipe{file: f, log: log, send: send, shown: rate.NewLimiter(denialsShown, denialsShown), forward: forwarder{log: log}}, nil
}

// run reads the pipe until the context ends.
func (p *logPipe) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = p.file.Close() })
	defer stop()
	var flushing sync.WaitGroup
	flushing.Go(func() {
		t := time.NewTicker(denialsInterval)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				p.flush()
			case <-ctx.Done():
				p.flush()
				return
			}
		}
	})
	defer flushing.Wait()
	p.forward.ctx = ctx
	b := bufio.NewReaderSize(p.file, 4<<10)
	var long []byte
	skip := false
	for {
		part, err := b.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			if !skip {
				long = append(long, part...)
			}
			if len(long) > maxPipeLine {
				long, skip = nil, true
			}
			continue
		case err != nil:
			if ctx.Err() == nil && !errors.Is(err, io.EOF) {
				p.log.Error("the pipe for access logs broke", "error", err)
			}
			return
		case skip:
			skip = false
			p.log.Warn("a line of the access log is too long and was dropped", "limit", maxPipeLine)
			continue
		}
		if len(long) > 0 {
			part = append(long, part...)
			long = nil
		}
		p.line(bytes.TrimRight(part, "\r\n"))
	}
}

// denial is a refusal, as the control plane's configuration lets Envoy write it.
type denial struct {
	Kuma      string `json:"kuma"`
	Inbound   text   `json:"inbound"`
	Caller    text   `json:"caller"`
	Method    text   `json:"method"`
	Path      text   `json:"path"`
	Reason    text   `json:"reason"`
	Peer      text   `json:"peer"`
	Start     text   `json:"start"`
	Authority text   `json:"authority"`
	Protocol  text   `json:"protocol"`

	// A line to forward.
	Address string          `json:"address"`
	Message json.RawMessage `json:"message"`
}

// text is a value of Envoy's that may be a string, a number or null. Envoy
// writes "-" for what is not there.
type text string

func (t *text) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) != nil {
		s = string(b)
	}
	if s == "-" || s == "null" {
		s = ""
	}
	*t = text(s)
	return nil
}

func (p *logPipe) line(b []byte) {
	if len(b) == 0 {
		return
	}
	if b[0] != '{' {
		// The older form, "host:port;message".
		if address, message, ok := strings.Cut(string(b), ";"); ok {
			p.forward.line(address, []byte(message))
		}
		return
	}
	var d denial
	if err := json.Unmarshal(b, &d); err != nil {
		p.log.Debug("a line of the access log can't be read", "error", err)
		return
	}
	switch {
	case d.Kuma == "denied":
		p.denied(&d)
	case d.Address != "":
		message := []byte(d.Message)
		var s string
		if json.Unmarshal(message, &s) == nil {
			message = []byte(s)
		}
		p.forward.line(d.Address, message)
	}
}

func (p *logPipe) denied(d *denial) {
	at := time.Now()
	if t, err := time.Parse(time.RFC3339Nano, string(d.Start)); err == nil {
		at = t
	}
	request := strings.TrimSpace(strings.Join([]string{string(d.Method), string(d.Authority) + string(d.Path), string(d.Protocol)}, " "))
	if d.Method == "" {
		request = string(d.Protocol)
	}
	p.mu.Lock()
	if len(p.batch) < denialsSent {
		p.batch = append(p.batch, &linkpb.Denials_Denial{
			UnixMs: at.UnixMilli(), Inbound: cut(d.Inbound), Caller: cut(d.Caller), Reason: cut(d.Reason), Request: cut(text(request)),
		})
	} else {
		p.dropped++
	}
	show := p.shown.Allow()
	if !show {
		p.hidden++
	}
	p.mu.Unlock()
	if !show {
		return
	}
	args := make([]any, 0, 18)
	for _, a := range []struct {
		key   string
		value text
	}{
		{"inbound", d.Inbound},
		{"caller", d.Caller},
		{"method", d.Method},
		{"path", d.Path},
		{"authority", d.Authority},
		{"protocol", d.Protocol},
		{"reason", d.Reason},
		{"peer", d.Peer},
		{"start", d.Start},
	} {
		if a.value != "" {
			args = append(args, a.key, cut(a.value))
		}
	}
	p.log.Warn("request denied", args...)
}

// cut bounds what a caller can make us keep of one field.
func cut(t text) string {
	const limit = 1024
	if len(t) > limit {
		t = t[:limit] + "…"
	}
	return strings.ToValidUTF8(string(t), "�")
}

// flush passes the refusals of the last second on.
func (p *logPipe) flush() {
	p.mu.Lock()
	batch, dropped, hidden := p.batch, p.dropped, p.hidden
	p.batch, p.dropped, p.hidden = nil, 0, 0
	p.mu.Unlock()
	if hidden > 0 {
		p.log.Warn("more requests were denied than are shown", "count", hidden)
	}
	if len(batch) > 0 && p.send != nil {
		p.send(&linkpb.Denials{Denials: batch, Dropped: dropped})
	}
}

// forwarder sends lines to the addresses that they name, over one TCP
// connection for each. What can't be sent is dropped.
type forwarder struct {
	log *slog.Logger
	ctx context.Context // the run's, for the connections made on its behalf
	// to is used by the reading goroutine alone.
	to map[string]chan []byte
}

const (
	maxForwardAddresses = 32
	forwardQueue        = 256
)

func (f *forwarder) line(address string, message []byte) {
	queue := f.to[address]
	if queue == nil {
		if _, _, err := net.SplitHostPort(address); err != nil || len(f.to) >= maxForwardAddresses {
			f.log.Debug("a line of the access log was dropped", "address", address)
			return
		}
		if f.to == nil {
			f.to = map[string]chan []byte{}
		}
		queue = make(chan []byte, forwardQueue)
		f.to[address] = queue
		go forwardLines(f.ctx, address, queue, f.log)
	}
	select {
	case queue <- append(bytes.Clone(message), '\n'):
	default: // the receiver is too slow
	}
}

func forwardLines(ctx context.Context, address string, lines <-chan []byte, log *slog.Logger) {
	var conn net.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close()
		}
	}()
	said := changes{log: log}
	for {
		select {
		case <-ctx.Done():
			return
		case line := <-lines:
			var err error
			if conn == nil {
				conn, err = (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", address)
			}
			if err == nil {
				_ = conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
				_, err = conn.Write(line)
			}
			if err == nil {
				said.clear()
				continue
			}
			if conn != nil {
				_ = conn.Close()
				conn = nil
			}
			said.warn("access logs can't be forwarded and are dropped", fmt.Errorf("%s: %w", address, err))
		}
	}
}
