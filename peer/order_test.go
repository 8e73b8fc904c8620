package peer

import (
	"context"
	"errors"
	"io"
	"testing"

	"drafter/internal/await"
	"drafter/migrate"
	"drafter/vmm"
)

// A call out of order is refused, and the VM goes on as if it had not been made.
func TestOrder(t *testing.T) {
	ctx := t.Context()
	refused := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: %v; want %v", what, err, want)
		}
	}
	nobody := func(context.Context) (io.ReadWriteCloser, error) { return nil, errBroken }
	wait := func(ctx context.Context) (io.ReadWriteCloser, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	h := newHost(t, newPackage(t))
	p := h.open(t)
	_, err := p.Serve(ctx, wait)
	refused("served before it runs", err, vmm.ErrNotStarted)
	refused("suspended before it runs", p.Suspend(ctx), vmm.ErrNotStarted)
	refused("waited for before it runs", p.Wait(), vmm.ErrNotStarted)
	refused("given up before it runs", p.GiveUp(), vmm.ErrNotStarted)
	if err := p.Pull(ctx, nil); err == nil {
		t.Error("it is pulled from nowhere")
	}

	refused("resumed", p.Resume(ctx), nil)
	if err := h.write(0); err != nil {
		t.Fatal(err)
	}
	refused("resumed again", p.Resume(ctx), vmm.ErrStarted)
	refused("received while it runs", p.Receive(ctx, nobody), vmm.ErrStarted)
	if err := p.GiveUp(); err == nil {
		t.Error("a VM that runs here is given up")
	}
	sctx, end := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() {
		_, err := p.Serve(sctx, wait)
		served <- err
	}()
	await.True(t, "the first is there", p.serving.Load)
	_, err = p.Serve(ctx, wait)
	refused("served twice at once", err, vmm.ErrInUse)
	end()
	refused("served", <-served, nil)
	refused("suspended", p.Suspend(ctx), nil)
	refused("closed", p.Close(), nil)
	refused("closed again", p.Close(), nil)

	_, err = p.Serve(ctx, wait)
	refused("served after its end", err, vmm.ErrClosed)
	refused("suspended after its end", p.Suspend(ctx), vmm.ErrClosed)
	refused("waited for after its end", p.Wait(), vmm.ErrClosed)
	refused("backed up after its end", p.Sync(ctx), vmm.ErrClosed)
	refused("given up after its end", p.GiveUp(), vmm.ErrClosed)
	refused("resumed after its end", p.Resume(ctx), vmm.ErrClosed)
	refused("it starts again", h.starts(t, 0), nil)
}

// Whoever answers with neither a connection nor an error is told, and so is who misspells where a
// VM is to be.
func TestWrongWords(t *testing.T) {
	h := newHost(t, newPackage(t))
	p := h.open(t)
	if err := p.Receive(t.Context(), func(context.Context) (io.ReadWriteCloser, error) { return nil, nil }); err == nil {
		t.Error("it is received over nothing")
	}
	p = h.open(t)
	if err := p.Receive(t.Context(), nil); err == nil {
		t.Error("it is received without a dialer")
	}
	for _, outcome := range []migrate.Outcome{"", "Here", "gone"} {
		if err := Settle(t.Context(), h.config.Devices, outcome); err == nil {
			t.Errorf("the outcome %q is taken for one", outcome)
		}
	}
}
