package cp

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"
)

// A server's end comes after the answers that it owes, and does not wait for ever
// for one that never comes.
func TestServerEndsAfterItsAnswers(t *testing.T) {
	for name, answers := range map[string]bool{"it answers": true, "it never answers": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				l := memory{bufconn.Listen(64 << 10)}
				s := server{&http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					<-release
					_, _ = io.WriteString(w, "done")
				})}, l, false}
				ctx, end := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- s.run(ctx) }()
				got := make(chan string, 1)
				c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return l.DialContext(ctx) }}}
				go func() {
					resp, err := c.Get("http://x/")
					if err != nil {
						got <- err.Error()
						return
					}
					text, _ := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					got <- string(text)
				}()
				synctest.Wait()
				end()
				synctest.Wait()
				if len(ended) > 0 {
					t.Error("it has ended before it has answered")
				}
				if answers {
					time.Sleep(time.Second)
					close(release)
					if text := <-got; text != "done" {
						t.Errorf("the answer: %s", text)
					}
				}
				begun := time.Now()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				if took := time.Since(begun); took > 3*time.Second {
					t.Errorf("it took %v more", took)
				}
				if !answers {
					close(release)
					<-got
				}
			})
		})
	}
}
