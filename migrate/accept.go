package migrate

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Accept returns the next connection with a target, or an error once ctx has ended.
type Accept func(ctx context.Context) (io.ReadWriteCloser, error)

// AcceptAll gives each connection to handle, which owns it, in a goroutine of its own; one more than limit at a time is closed. It returns once ctx has ended,
// and every handle with it.
func AcceptAll(ctx context.Context, accept Accept, limit int, handle func(context.Context, io.ReadWriteCloser)) {
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, limit)
	for {
		stream, err := accept(ctx)
		if ctx.Err() != nil {
			if err == nil {
				_ = stream.Close() // of no use any more
			}
			return
		}
		if err != nil {
			slog.Warn("Accept connection", "error", err)
			select {
			case <-time.After(100 * time.Millisecond): // out of descriptors, say
			case <-ctx.Done():
			}
			continue
		}
		select {
		case free <- struct{}{}:
		default:
			slog.Warn("Too many connections; closed one", "limit", limit)
			_ = stream.Close() // it gets nothing
			continue
		}
		wg.Go(func() {
			defer func() { <-free }()
			handle(ctx, stream)
		})
	}
}
