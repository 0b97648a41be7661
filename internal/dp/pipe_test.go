package dp

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/time/rate"

	"kuma/proto/linkpb"
)

// HRD-09, HRD-25: callers choose what stands in a line (paths, host names). Each
// line makes at most one line in the log, of bounded length, and valid text for
// the control plane.
func FuzzPipeLine(f *testing.F) {
	for _, s := range []string{
		`{"kuma":"denied","inbound":"i","caller":"spiffe://default/web","method":"GET","path":"/","reason":"r","start":"2026-11-21T15:00:00.123Z","protocol":"HTTP/2"}`,
		`{"kuma":"denied","path":5,"caller":null,"start":"x"}`, `{"kuma":"denied","path":"\n\u0000\ud800"}`,
		`{"address":"","message":1}`, `{"address":"nowhere","message":{}}`, `;`, `a;b`, `{`, `[]`, "{\"kuma\":\"denied\",\"path\":\"\xff\"}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var out bytes.Buffer
		log := slog.New(slog.NewTextHandler(&out, nil))
		var sent *linkpb.Denials
		p := &logPipe{log: log, shown: rate.NewLimiter(1, 1), send: func(d *linkpb.Denials) { sent = d }, forward: forwarder{log: log, ctx: t.Context()}}
		if !bytes.Contains(line, []byte("kuma")) {
			t.Skip("it may name an address to connect to")
		}
		p.line(line)
		p.flush()
		if n := strings.Count(out.String(), "\n"); n > 1 {
			t.Errorf("%d lines in the log: %s", n, &out)
		}
		if out.Len() > 64<<10 {
			t.Errorf("a line of %d bytes", out.Len())
		}
		for _, d := range sent.GetDenials() {
			if s := d.String(); len(s) > 32<<10 || strings.ToValidUTF8(d.GetRequest(), "") != d.GetRequest() {
				t.Errorf("refusal %q", s)
			}
		}
	})
}
