package agent

import (
	"context"
	"errors"
	"io"
	"time"
)

// Liveness tells the host on port that the guest is up. It returns once the host knows, or after
// timeout.
func Liveness(ctx context.Context, port uint32, timeout time.Duration) error {
	l := Listen(port, timeout)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	// A bare connection is the signal; it ends when the host has seen it.
	if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return conn.Close()
}
