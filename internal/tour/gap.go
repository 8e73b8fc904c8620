package tour

import (
	"bufio"
	"context"
	"net"
	"strings"
	"sync"
	"time"
)

// Pulse pings a Redis at several addresses, one of which answers at a time, and notes when.
type Pulse struct {
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu   sync.Mutex // guards the following
	last time.Time
	gap  time.Duration
}

// StartPulse begins. A ping is sent every few milliseconds, on a new connection wherever the old
// one does not answer.
func StartPulse(ctx context.Context, addrs ...string) *Pulse {
	p := &Pulse{}
	ctx, p.stop = context.WithCancel(ctx)
	for _, addr := range addrs {
		p.wg.Go(func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			busy := make(chan struct{}, 20) // connections at once
			for ctx.Err() == nil {
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
				select {
				case busy <- struct{}{}:
				default:
					continue
				}
				p.wg.Go(func() {
					defer func() { <-busy }()
					p.ping(ctx, addr)
				})
			}
		})
	}
	return p
}

// ping pings on one connection for as long as it is answered quickly.
func (p *Pulse) ping(ctx context.Context, addr string) {
	const patience = 200 * time.Millisecond
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return // nobody is there now
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	for ctx.Err() == nil {
		conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Write([]byte("PING\r\n")); err != nil {
			return
		}
		if line, err := r.ReadString('\n'); err != nil || !strings.HasPrefix(line, "+PONG") {
			return
		}
		p.note()
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *Pulse) note() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !p.last.IsZero() {
		p.gap = max(p.gap, now.Sub(p.last))
	}
	p.last = now
}

// Reset forgets the gaps so far. What has not answered yet is silent from here on.
func (p *Pulse) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap = 0
	if p.last.IsZero() {
		p.last = time.Now()
	}
}

// End ends the pings and returns the longest time without an answer, which may have lasted until
// now.
func (p *Pulse) End() time.Duration {
	now := time.Now()
	p.stop()
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.last.IsZero() {
		p.gap = max(p.gap, now.Sub(p.last))
	}
	return p.gap
}
