package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"drafter/internal/logging"
)

// handshakeTimeout bounds how long a peer may take to show its certificate.
const handshakeTimeout = 5 * time.Second

// Listener accepts connections of peers that are trusted. Others do not delay them. Its methods are
// safe for concurrent use.
type Listener struct {
	inner net.Listener
	trust *Trust

	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
	start    sync.Once
	wg       sync.WaitGroup // the one who accepts, and handshakes
	admitted chan net.Conn
	waiting  Waiting
	refusals logging.Limited
}

func newListener(inner net.Listener, t *Trust) *Listener {
	l := &Listener{inner: inner, trust: t, admitted: make(chan net.Conn), refusals: logging.Limited{Logger: t.Logger}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// Addr is where it listens.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Close ends the listener, and every connection that Accept has not returned. It is idempotent.
func (l *Listener) Close() error {
	l.cancel()
	err := l.inner.Close()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Accept returns the next connection whose peer is trusted, or an error once ctx has ended. The end
// of ctx closes the listener, so nobody waits for an answer.
func (l *Listener) Accept(ctx context.Context) (io.ReadWriteCloser, error) {
	l.start.Do(func() { l.wg.Go(l.run) })
	select {
	case conn := <-l.admitted:
		return conn, nil
	case <-ctx.Done():
		return nil, errors.Join(context.Cause(ctx), l.Close())
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *Listener) run() {
	for {
		conn, err := l.inner.Accept()
		if l.ctx.Err() != nil {
			if err == nil {
				_ = conn.Close() // of no use any more
			}
			return
		}
		if err != nil {
			l.refusals.Warn("Accept connection", "error", err)
			select {
			case <-time.After(100 * time.Millisecond): // out of descriptors, say
			case <-l.ctx.Done():
			}
			continue
		}
		ctx, cancel := context.WithCancelCause(l.ctx)
		place := l.waiting.Enter(Host(conn), func() { cancel(errCrowded) })
		l.wg.Go(func() {
			defer cancel(nil)
			defer place.Leave()
			if err := l.admit(ctx, conn); err != nil {
				_ = conn.Close() // it gets nothing
				if l.ctx.Err() == nil {
					l.refusals.Warn("Refused a connection", "from", Peer(conn), "error", err)
				}
			}
		})
	}
}

var errSlow = fmt.Errorf("no handshake within %s", handshakeTimeout)

var errCrowded = errors.New("too many connections wait, and this one has waited longest")

// Bound returns a listener of l's connections with at most most of them open. For servers that keep
// connections: one more ends the oldest of the host that has most.
func Bound(l net.Listener, most int) net.Listener {
	return &bounded{Listener: l, waiting: Waiting{Most: most}}
}

type bounded struct {
	net.Listener
	waiting Waiting
}

func (b *bounded) Accept() (net.Conn, error) {
	conn, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	place := b.waiting.Enter(Host(conn), func() { _ = conn.Close() }) // what its reader sees
	return &placed{conn, place}, nil
}

type placed struct {
	net.Conn
	place *Place
}

func (p *placed) Close() error {
	p.place.Leave()
	return p.Conn.Close()
}

// admit passes a connection to Accept, once its peer is known and trusted.
func (l *Listener) admit(ctx context.Context, conn net.Conn) error {
	switch {
	case l.trust.TLS != nil:
		secured := tls.Server(conn, l.trust.TLS.config(l.trust.Logger))
		tctx, cancel := context.WithTimeoutCause(ctx, handshakeTimeout, errSlow)
		defer cancel()
		if err := secured.HandshakeContext(tctx); err != nil {
			if tctx.Err() != nil {
				err = context.Cause(tctx)
			}
			return err
		}
		conn = secured
	case l.trust.local():
		if err := checkPeer(conn); err != nil {
			return err
		}
	}
	select {
	case l.admitted <- conn:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
