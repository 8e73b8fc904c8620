package migrate

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"drafter/internal/logging"
)

// Accept returns the next connection with a target, or an error once ctx has ended.
type Accept func(ctx context.Context) (io.ReadWriteCloser, error)

// AcceptAll gives each connection to handle, which owns it, in a goroutine of its own. handle has
// to bound how many there are at a time. AcceptAll returns when ctx has ended and every handle has
// returned.
// log hears why a connection cannot be accepted; nil: slog.Default().
func AcceptAll(ctx context.Context, log *slog.Logger, accept Accept, handle func(context.Context, io.ReadWriteCloser)) {
	var wg sync.WaitGroup
	defer wg.Wait()
	complaints := logging.Limited{Logger: log}
	for {
		stream, err := accept(ctx)
		if ctx.Err() != nil {
			if err == nil && stream != nil {
				_ = stream.Close() // of no use any more
			}
			return
		}
		if err == nil && stream == nil {
			err = errors.New("accept gave no connection")
		}
		if err != nil {
			complaints.Warn("Accept connection", "error", err)
			select {
			case <-time.After(100 * time.Millisecond): // out of descriptors, say
			case <-ctx.Done():
			}
			continue
		}
		wg.Go(func() { handle(ctx, stream) })
	}
}
