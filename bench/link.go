package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// link is a way between two hosts: whatever is sent over a connection through it takes its time.
// All opponents use it alike.
type link struct {
	name  string
	rate  int64         // bytes per second in each direction, all connections together; 0: no limit
	delay time.Duration // in each direction
}

var links = []link{
	{"loopback", 0, 0},
	{"1gbit", 125_000_000, 0},
	{"1gbit_rtt100", 125_000_000, 50 * time.Millisecond},
}

const (
	linkChunk = 64 << 10
	// bytes under way in a direction of a connection: more than what the fastest link holds in its
	// delay
	linkWindow = 16 << 20
)

// proxy carries connections to an address.
type proxy struct {
	link     link
	network  string
	to       string
	listener net.Listener
	limits   [2]*rate.Limiter
	carried  atomic.Int64 // bytes, known when the proxy is closed
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

// through listens at network and address for connections to another address of the same network.
func (l link) through(ctx context.Context, network, address, to string) (*proxy, error) {
	p := &proxy{link: l, network: network, to: to}
	var err error
	if p.listener, err = net.Listen(network, address); err != nil {
		return nil, err
	}
	if l.rate > 0 {
		for i := range p.limits {
			p.limits[i] = rate.NewLimiter(rate.Limit(l.rate), 4*linkChunk)
		}
	}
	ctx, p.cancel = context.WithCancel(ctx)
	p.wg.Go(func() {
		for {
			conn, err := p.listener.Accept()
			if err != nil {
				return // closed
			}
			// In order: QEMU 7.2 takes the first connection for its main one, whichever that is.
			far, err := net.Dial(p.network, p.to)
			if err != nil {
				_ = conn.Close() // which says it
				continue
			}
			p.wg.Go(func() { p.carry(ctx, conn, far) })
		}
	})
	return p, nil
}

func (p *proxy) close() error {
	err := p.listener.Close()
	p.cancel()
	p.wg.Wait()
	return err
}

func (p *proxy) carry(ctx context.Context, near, far net.Conn) {
	stop := context.AfterFunc(ctx, func() { _, _ = near.Close(), far.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { p.pass(ctx, far, near, p.limits[0]) })
	wg.Go(func() { p.pass(ctx, near, far, p.limits[1]) })
	wg.Wait()
	_, _ = near.Close(), far.Close()
}

// pass carries one direction.
func (p *proxy) pass(ctx context.Context, to, from net.Conn, limit *rate.Limiter) {
	defer func() {
		if c, ok := to.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite() // the other side sees the end
		}
	}()
	if p.link.rate == 0 && p.link.delay == 0 {
		n, _ := io.Copy(to, from)
		p.carried.Add(n)
		return
	}
	type piece struct {
		data []byte
		due  time.Time
	}
	under := make(chan piece, linkWindow/linkChunk)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for q := range under {
			if d := time.Until(q.due); d > 0 {
				time.Sleep(d)
			}
			if _, err := to.Write(q.data); err != nil {
				_ = from.Close()
			}
		}
	})
	defer close(under)
	for {
		b := make([]byte, linkChunk)
		n, err := from.Read(b)
		if n > 0 {
			p.carried.Add(int64(n))
			if limit != nil && limit.WaitN(ctx, n) != nil {
				return
			}
			select {
			case under <- piece{b[:n], time.Now().Add(p.link.delay)}:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = from.Close()
			}
			return
		}
	}
}

func findLink(name string) (link, error) {
	for _, l := range links {
		if l.name == name {
			return l, nil
		}
	}
	return link{}, fmt.Errorf("link %q is unknown", name)
}
