package tour

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Pulse pings a Redis on one connection, and never makes another. It notes how long the Redis is
// silent.
type Pulse struct {
	conn net.Conn
	stop context.CancelFunc
	done chan struct{}
	err  error // why the connection broke; valid once done is closed

	mu   sync.Mutex // guards the following
	last time.Time
	gap  time.Duration
}

// StartPulse connects, and begins. End it.
func StartPulse(ctx context.Context, addr string) (*Pulse, error) {
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("ping: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	p := &Pulse{conn: conn, stop: stop, done: make(chan struct{}), last: time.Now()}
	go func() {
		defer close(p.done)
		r := bufio.NewReader(conn)
		for ctx.Err() == nil && p.err == nil {
			if p.err = p.ping(r); p.err == nil {
				p.note()
				time.Sleep(2 * time.Millisecond)
			}
		}
	}()
	return p, nil
}

func (p *Pulse) ping(r *bufio.Reader) error {
	if err := p.conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	if _, err := p.conn.Write([]byte("PING\r\n")); err != nil {
		return err
	}
	line, err := r.ReadString('\n')
	if err == nil && line != "+PONG\r\n" {
		err = fmt.Errorf("the answer is %q", line)
	}
	return err
}

func (p *Pulse) note() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.gap = max(p.gap, now.Sub(p.last))
	p.last = now
}

// Reset forgets the gaps so far.
func (p *Pulse) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gap = 0
}

// End ends the pings and returns the longest silence, and whether the connection broke. It is
// idempotent.
func (p *Pulse) End() (gap time.Duration, err error) {
	p.stop()
	<-p.done
	if err := p.conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return 0, fmt.Errorf("ping: %w", err)
	}
	if p.err != nil {
		return 0, fmt.Errorf("the connection with Redis broke: %w", p.err)
	}
	return p.gap, nil
}
