package xds

import (
	"context"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestReceiveTellsOfTheEnd: a stream that ends while its loop has not yet taken
// the last message is over for the loop as well; otherwise the proxy would be
// taken as there until the loop's next timer, which may be an hour.
func TestReceiveTellsOfTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		messages, failed := receive(ctx, func() (int, error) { return 1, nil })
		synctest.Wait() // it holds a message that nobody takes
		cancel()
		synctest.Wait()
		select {
		case err := <-failed:
			if status.Code(err) != codes.Canceled {
				t.Errorf("the end is %v", err)
			}
		case <-messages:
			t.Error("it goes on")
		default:
			t.Error("nobody is told that the stream has ended")
		}
	})
}
