package transport_test

import (
	"context"
	"fmt"
	"io"

	"drafter/transport"
)

// A process of root's, or of ours, talks to another one on this host.
func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var trust transport.Trust
	l, err := trust.Listen(ctx, "localhost:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept(ctx)
		if err != nil {
			return
		}
		defer conn.Close()
		fmt.Fprintln(conn, "who asks is one of us")
		_, _ = io.Copy(io.Discard, conn) // until who asks has gone
	}()
	dial, err := trust.Dialer(l.Addr().String())
	if err != nil {
		fmt.Println(err)
		return
	}
	conn, err := dial(ctx)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	answer := make([]byte, len("who asks is one of us"))
	if _, err := io.ReadFull(conn, answer); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(string(answer))
	// Output: who asks is one of us
}
