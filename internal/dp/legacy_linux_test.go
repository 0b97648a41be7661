package dp

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kuma/internal/socket"
)

// foreign accepts connections as another user does.
type foreign struct{ net.Listener }

func (f foreign) Accept() (net.Conn, error) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	if err := unix.Setfsuid(12345); err != nil {
		return nil, err
	}
	return f.Listener.Accept()
}

// The kernel itself says that another user listens.
func TestSignpostByKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"url":"https://localhost:5678","caCert":"PEM"}`)
	}))
	s.Listener = foreign{s.Listener}
	s.Start()
	t.Cleanup(s.Close)
	cfg := Default()
	cfg.Log, cfg.ControlPlane.URL = slog.New(slog.DiscardHandler), s.URL
	if err := cfg.signpost(t.Context(), socket.Owner); err == nil || !strings.Contains(err.Error(), "user 12345") {
		t.Errorf("it was believed: %v", err)
	}
}
