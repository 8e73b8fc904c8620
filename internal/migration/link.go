package migration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"drafter/internal/wire"
	"drafter/migrate"
)

// link is a connection that is watched: it ends when its context does, when it is silent for too
// long, or when it breaks.
type link struct {
	*wire.Conn
	ctx    context.Context // ends with the link; its cause says why
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	remote net.Addr // nil if it is not known
}

// alive tells whether the link is there and has not ended. It may be nil.
func (l *link) alive() bool { return l != nil && l.ctx.Err() == nil }

// newLink watches a connection until close.
func newLink(ctx context.Context, stream io.ReadWriteCloser, silence time.Duration) *link {
	l := &link{Conn: wire.NewConn(stream)}
	if conn, ok := stream.(interface{ RemoteAddr() net.Addr }); ok {
		l.remote = conn.RemoteAddr()
	}
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	l.wg.Go(func() { l.watch(silence) })
	return l
}

// watch sends pings, ends a link that is silent, and closes one that has ended. It does so even if
// a ping cannot be sent.
func (l *link) watch(silence time.Duration) {
	pings := make(chan struct{}, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(pings)
	defer func() {
		_ = l.Close() // which ends every read and send; what ended the link is its cause
	}()
	wg.Go(func() {
		for range pings {
			if err := l.Send(wire.TypePing); err != nil {
				l.sendFailed(err)
			}
		}
	})
	tick := time.NewTicker(max(silence/5, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-tick.C:
		}
		if s := l.Silence(); s > silence {
			l.cancel(fmt.Errorf("the other side has been silent for %s", s.Round(time.Millisecond)))
			return
		}
		select {
		case pings <- struct{}{}:
		default:
		}
	}
}

// close ends the link and waits for what it started.
func (l *link) close(err error) {
	l.cancel(err)
	_ = l.Close() // idempotent
	l.wg.Wait()
}

// linger closes the link, but gives the other side a moment to read what was sent and to close it
// first.
func (l *link) linger(d time.Duration) {
	select {
	case <-l.ctx.Done():
	case <-time.After(d):
	}
	l.close(errors.New("the connection is not needed any more"))
}

// reasonWait is how long the reader of a link may take to find out why nothing can be sent.
const reasonWait = 200 * time.Millisecond

// sendLost is sendFailed for a caller that gives up. It returns why the link has ended.
func (l *link) sendLost(err error) error {
	l.sendFailed(err)
	return l.lost(err)
}

// sendFailed ends a link on which a send has failed while it has a reader. The last message of the
// other side, before it closed the connection, is the better reason, and the reader may be about to
// read it.
func (l *link) sendFailed(err error) {
	select {
	case <-l.ctx.Done():
	case <-time.After(reasonWait):
		l.cancel(err)
	}
}

// lost returns why the link has ended, if it has; err is a consequence of that.
func (l *link) lost(err error) error {
	if l.ctx.Err() == nil {
		return err
	}
	if cause := context.Cause(l.ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// receive reads and decodes the next message that is no ping and no extent. A [wire.Error] is
// returned as an error.
func (l *link) receive(sizes []int64) (any, error) {
	for {
		f, err := l.Read()
		if err != nil {
			return nil, l.lost(err)
		}
		if f.Type == wire.TypePing {
			continue
		}
		m, err := wire.Decode(f, sizes)
		if err != nil {
			return nil, err
		}
		if e, ok := m.(wire.Error); ok {
			return nil, &RemoteError{Code: e.Code, Text: e.Text}
		}
		return m, nil
	}
}

// RemoteError is an error that the other side reported.
type RemoteError struct {
	Code wire.Code
	Text string
}

func (e *RemoteError) Error() string { return e.Text }

// Is tells which kind the error is of.
func (e *RemoteError) Is(target error) bool {
	switch e.Code {
	case wire.CodeIncompatible:
		return target == migrate.ErrIncompatible
	case wire.CodeBusy:
		return target == migrate.ErrBusy
	}
	return false
}

// refuse tells the other side why the connection ends, if it still listens.
func (l *link) refuse(code wire.Code, err error) {
	if l.ctx.Err() == nil {
		_ = l.Send(wire.Error{Code: code, Text: err.Error()}) // it is ending anyway
	}
}

// codeOf classifies an error for the other side.
func codeOf(err error) wire.Code {
	var remote *RemoteError
	switch {
	case errors.As(err, &remote):
		return remote.Code
	case errors.Is(err, wire.ErrProtocol):
		return wire.CodeProtocol
	case errors.Is(err, context.Canceled):
		return wire.CodeCancelled
	}
	return wire.CodeInternal
}
