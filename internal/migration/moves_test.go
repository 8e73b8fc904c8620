package migration

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"drafter/migrate"
)

// What one owner has knows of the migration that brought it, and of those that take it away.
func TestMoves(t *testing.T) {
	var there, here Moves
	if s, ok := there.Stats(); ok || there.Arrived() != nil || there.ArrivalError() != nil || there.Source() != nil || len(s.Devices) > 0 {
		t.Errorf("before any migration: %v, %v", s, ok)
	}
	broken := errors.New("broken")
	if s, err := here.Offer(func() (*Source, error) { return nil, broken }); s != nil || !errors.Is(err, broken) {
		t.Errorf("a source that cannot be made: %v, %v", s, err)
	}
	p := newPair(t, 1, quick(), nil)
	for range 2 {
		s, err := here.Offer(func() (*Source, error) { return p.source, nil })
		if err != nil || s != p.source {
			t.Fatalf("offered %v, %v", s, err)
		}
	}
	target, err := Receive(t.Context(), p.config(quick(), nil))
	if err != nil {
		t.Fatal(err)
	}
	there.Arrive(target)
	<-there.Arrived()
	if err := there.ArrivalError(); err != nil {
		t.Error(err)
	}
	p.network.wg.Wait()
	p.guest.halt()
	p.target.halt()
	for name, m := range map[string]*Moves{"source": &here, "target": &there} {
		if s, ok := m.Stats(); !ok || s.Phase != migrate.Moved {
			t.Errorf("%s: %v, %v", name, s.Phase, ok)
		}
	}
	if moved, err := here.Close(); !moved || err != nil {
		t.Errorf("the source: moved %t, %v", moved, err)
	}
	if moved, err := there.Close(); moved || err != nil {
		t.Errorf("the target: moved %t, %v", moved, err)
	}
}

// A source that is withdrawn before anybody has come keeps its VM, and complains of those who come
// to it for nothing.
func TestWithdraw(t *testing.T) {
	p := newPair(t, 1, quick(), nil)
	connections := make(chan io.ReadWriteCloser, 1)
	complaints := make(chan error, 1)
	stop := p.source.Accept(t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case c := <-connections:
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, func(_ io.ReadWriteCloser, err error) { complaints <- err })
	here, there := net.Pipe()
	connections <- there
	if err := here.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-complaints; !errors.Is(err, migrate.ErrRefused) {
		t.Errorf("of who hangs up: %v", err)
	}
	stop()
	waited := false
	if err := p.source.Withdraw(time.Minute, func() { waited = true }); err != nil || waited || p.source.Phase() != migrate.Kept {
		t.Errorf("withdrawn: %v, waited %t, %s", err, waited, p.source.Phase())
	}
	p.guest.halt()
	if err := p.source.Close(); err != nil {
		t.Error(err)
	}
}
