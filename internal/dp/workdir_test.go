package dp

import (
	"log/slog"
	"sync"
	"testing"
)

// TestNobodySweepsTheLiving: kuma-dp of one name that start at the same moment
// (in tests, on one machine) don't take each other's new directories for ones
// that were left behind.
func TestNobodySweepsTheLiving(t *testing.T) {
	cfg := &Config{TempDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				w, err := openWorkdir(cfg, dataplane{mesh: "default", name: "backend"})
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := w.write(bootstrapFile, []byte("x")); err != nil {
					t.Error(err)
				}
				w.close()
			}
		})
	}
	all.Wait()
}
