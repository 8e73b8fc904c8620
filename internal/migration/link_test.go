package migration

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"
)

// A link whose context ends is closed, however the two race: whoever reads from it, or waits for
// its end, would hang otherwise.
func TestLinkEnds(t *testing.T) {
	for range 20_000 {
		near, far := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		l := newLink(ctx, near, time.Minute)
		read := make(chan error, 1)
		go func() {
			_, err := l.Read()
			read <- err
		}()
		cancel()
		select {
		case err := <-read:
			if err == nil {
				t.Fatal("read something that nobody has sent")
			}
		case <-time.After(10 * time.Second):
			l.close(errors.New("hangs"))
			t.Fatal("a read goes on after its link has ended")
		}
		l.close(errEnded)
		if err := far.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
