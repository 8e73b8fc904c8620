package e2e

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"

	"golang.org/x/time/rate"
)

// proxy passes connections on to a server, with so many bytes per second for all of what it
// answers.
type proxy struct {
	addr    string
	server  string
	limiter *rate.Limiter
	ctx     context.Context
	wg      sync.WaitGroup
}

// newProxy listens until the test ends.
func newProxy(t *testing.T, server string, bytesPerSecond int) *proxy {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &proxy{addr: l.Addr().String(), server: server, limiter: rate.NewLimiter(rate.Limit(bytesPerSecond), 64<<10), ctx: ctx}
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.pass(c) })
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		p.wg.Wait()
	})
	return p
}

// rate sets the bytes per second.
func (p *proxy) rate(bytesPerSecond int) { p.limiter.SetLimit(rate.Limit(bytesPerSecond)) }

func (p *proxy) pass(client net.Conn) {
	defer client.Close()
	server, err := (&net.Dialer{}).DialContext(p.ctx, "tcp", p.server)
	if err != nil {
		return
	}
	defer server.Close()
	defer context.AfterFunc(p.ctx, func() { client.Close(); server.Close() })()
	p.wg.Go(func() {
		_, _ = io.Copy(server, client) // either end may go at any time
		server.Close()
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := server.Read(buf)
		if err == nil && p.limiter.WaitN(p.ctx, n) == nil {
			_, err = client.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}
