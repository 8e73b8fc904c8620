package migrate

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Limits that are not given get their defaults, and only those.
func TestDefaults(t *testing.T) {
	got, err := Limits{}.WithDefaults()
	want := Limits{
		Downtime: 300 * time.Millisecond, AtTimeout: PostCopy, Prepare: 5 * time.Second, Handoff: time.Minute, Silence: 10 * time.Second,
		Reconnect: 200 * time.Millisecond, Warm: 3 * time.Second, HeadStart: time.Second, Settle: time.Minute,
	}
	if err != nil || got != want {
		t.Errorf("of nothing: %+v, %v; want %+v", got, err, want)
	}
	given := Limits{
		Bandwidth: 1, Downtime: 2, Timeout: 3, AtTimeout: Cancel, NoPostCopy: true, Prepare: 4, Handoff: 5, Silence: 6, Reconnect: 7, Warm: 8,
		HeadStart: 9, MaxSize: 10, Settle: 11,
	}
	if got, err := given.WithDefaults(); err != nil || got != given {
		t.Errorf("of everything: %+v, %v", got, err)
	}
	if got, err := (Limits{NoPostCopy: true}).WithDefaults(); err != nil || got.AtTimeout != Cancel {
		t.Errorf("without post-copy: %+v, %v", got, err)
	}
}

// Limits that cannot be meant are refused.
func TestContradictions(t *testing.T) {
	for _, tt := range []struct {
		limits Limits
		want   string
	}{
		{Limits{Downtime: -time.Second}, "a limit of -1s is not valid"},
		{Limits{Prepare: -1}, "is not valid"},
		{Limits{Handoff: -1}, "is not valid"},
		{Limits{Silence: -1}, "is not valid"},
		{Limits{Reconnect: -1}, "is not valid"},
		{Limits{Settle: -1}, "is not valid"},
		{Limits{Warm: -1}, "is not valid"},
		{Limits{HeadStart: -1}, "is not valid"},
		{Limits{Bandwidth: -1}, "must not be negative"},
		{Limits{Timeout: -1}, "must not be negative"},
		{Limits{MaxSize: -1}, "must not be negative"},
		{Limits{AtTimeout: "never"}, `strategy "never" is unknown`},
		{Limits{AtTimeout: PostCopy, NoPostCopy: true}, "post-copy is disabled"},
	} {
		if err := tt.limits.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v; want an error with %q", tt.limits, err, tt.want)
		}
	}
}

// Sums are of all devices.
func TestBytes(t *testing.T) {
	s := Stats{Devices: []DeviceStats{{Sent: 1, Saved: 20, Pending: 300}, {Sent: 4, Saved: 50, Pending: 600}}}
	if sent, saved, pending := s.Bytes(); sent != 5 || saved != 70 || pending != 900 {
		t.Errorf("sent %d, saved %d, pending %d", sent, saved, pending)
	}
}

// Every connection is handled, also after one that could not be accepted. When the context ends,
// one that comes at that moment is closed, and nothing is left that handles another.
func TestAcceptAll(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	late, theirs := net.Pipe()
	var accepted, ended atomic.Int64
	handling := make(chan struct{}, 3)
	AcceptAll(ctx, nil, func(context.Context) (io.ReadWriteCloser, error) {
		switch n := accepted.Add(1); n {
		case 1:
			return nil, errors.New("too many open files")
		case 2:
			return nil, nil // neither a connection nor an error
		case 3, 4, 5:
			return theirs, nil
		}
		for range 3 {
			<-handling
		}
		cancel()
		return late, nil
	}, func(ctx context.Context, _ io.ReadWriteCloser) {
		handling <- struct{}{}
		<-ctx.Done()
		ended.Add(1)
	})
	if n := ended.Load(); n != 3 {
		t.Errorf("it returns when %d of 3 handlers have ended", n)
	}
	if _, err := theirs.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("a connection that came at the end: %v", err)
	}
}

// Who waits after an error hears the end of the context.
func TestAcceptEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	AcceptAll(ctx, nil, func(context.Context) (io.ReadWriteCloser, error) {
		time.AfterFunc(0, cancel)
		return nil, errors.New("too many open files")
	}, func(context.Context, io.ReadWriteCloser) { t.Error("nothing is there to be handled") })
}
