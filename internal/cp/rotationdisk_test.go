package cp_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kuma/internal/pki"
)

// A step that can't be kept is not taken, and the administrator who asks for it
// is told what is in its way.
func TestRotationThatCantBeKept(t *testing.T) {
	cfg := config(t)
	run(t, cfg)
	meshed(t, cfg)
	inTheWay := filepath.Join(cfg.General.WorkDir, pki.RotationFile)
	if err := os.MkdirAll(filepath.Join(inTheWay, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	status, body := call(t, cfg, "POST", "/ca/control-plane/rotation", `{"step":"prepare"}`)
	if status != http.StatusServiceUnavailable || !strings.Contains(string(body), inTheWay) || !strings.Contains(string(body), "--status") {
		t.Errorf("%d %s", status, body)
	}
	if err := os.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
	if status, body := call(t, cfg, "POST", "/ca/control-plane/rotation", `{"step":"prepare"}`); status != http.StatusOK {
		t.Errorf("once it was mended: %d %s", status, body)
	}
}
