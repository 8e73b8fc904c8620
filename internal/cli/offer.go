package cli

import (
	"context"
	"errors"

	"drafter/internal/control"
	"drafter/migrate"
	"drafter/transport"
)

// offer asks who runs a VM to let a target have it, or to take that back.
type offer struct {
	listener *transport.Listener // nil: take it back
	answer   chan<- offered      // has room for it
}

type offered struct {
	moved bool
	err   error
}

var errEnds = errors.New("the VM ends")

// ask hands an offer to who runs the VM, and waits for the answer.
func (c *controlled) ask(ctx context.Context, l *transport.Listener) (bool, error) {
	answer := make(chan offered, 1)
	select {
	case c.offers <- offer{l, answer}:
	case <-c.ended:
		return c.outcome == control.Moved, errEnds
	case <-ctx.Done():
		return false, ctx.Err()
	}
	select {
	case a := <-answer:
		return a.moved, a.err
	case <-c.ended:
		return c.outcome == control.Moved, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// Offer implements [control.Mover].
func (c *controlled) Offer(ctx context.Context, r *control.OfferRequest) (string, error) {
	flags := transportFlags{cert: r.GetCertificate(), key: r.GetKey(), ca: r.GetAuthority()}
	// It listens until the offer is taken back, and not only while somebody waits for the answer.
	l, err := flags.listen(context.WithoutCancel(ctx), r.GetAddress())
	if err != nil {
		return "", err
	}
	if _, err := c.ask(ctx, l); err != nil {
		return "", errors.Join(err, l.Close())
	}
	return l.Addr().String(), nil
}

// Withdraw implements [control.Mover].
func (c *controlled) Withdraw(ctx context.Context) (moved bool, err error) {
	moved, err = c.ask(ctx, nil)
	if errors.Is(err, errEnds) {
		err = nil
	}
	return moved, err
}

// Stats implements [control.Mover].
func (c *controlled) Stats() (migrate.Stats, bool) {
	if vm := c.vm.Load(); vm != nil {
		return vm.Stats()
	}
	return migrate.Stats{}, false
}
