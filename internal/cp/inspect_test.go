package cp

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kuma/internal/envoy"
	"kuma/internal/mesh"
	"kuma/internal/session"
)

// What is left out of a proxy's configuration is logged once, and told to the
// proxy for as long as it is so.
func TestLeftOut(t *testing.T) {
	var log bytes.Buffer
	var told [][]string
	key := session.Key{Mesh: "default", Name: "web"}
	g := &generation{log: slog.New(slog.NewTextHandler(&log, nil)), tell: func(k session.Key, leftOut []string) {
		if k != key {
			t.Errorf("%v is told", k)
		}
		told = append(told, leftOut)
	}}
	issues := []envoy.Issue{{Resource: mesh.Meshes.Key("", "default"), Message: "no pair"}}
	g.report(key, issues)
	g.report(key, issues)
	g.report(key, nil)
	want := []string{`no pair (because of Mesh "default")`}
	if d := cmp.Diff([][]string{want, want, nil}, told); d != "" {
		t.Error(d)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("the log has %d warnings: %s", n, &log)
	}
}
