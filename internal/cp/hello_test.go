package cp_test

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"kuma/internal/cp/cptest"
)

// HRD-24, HRD-25: who connects and does not finish its hello is sent away, on
// every port.
func TestHelloHasAnEnd(t *testing.T) {
	ca := cptest.NewCA(t)
	cfg, _ := secured(t, ca)
	// Not even where an operator has turned the API's own timeouts off.
	cfg.APIServer.ReadHeaderTimeout, cfg.APIServer.ReadTimeout, cfg.APIServer.WriteTimeout = 0, 0, 0
	run(t, cfg)
	var all sync.WaitGroup
	for name, address := range doors(cfg) {
		all.Go(func() {
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Error(name, err)
				return
			}
			defer func() { _ = conn.Close() }()
			// A record of a client hello that never comes whole.
			if _, err := conn.Write([]byte{0x16, 3, 1, 0x20, 0, 1}); err != nil {
				t.Error(name, err)
				return
			}
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error(name, "is still connected")
			}
		})
	}
	t.Parallel() // while the others go on, it waits for ten seconds
	all.Wait()
}
