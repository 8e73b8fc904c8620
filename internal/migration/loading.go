package migration

import (
	"context"
	"sync/atomic"
)

// loading is the loading of a VM's state while its source still makes it.
type loading struct {
	task
	final atomic.Int64  // up to where the state's device has its final content
	news  chan struct{} // holds a token when that has changed
	end   *signal       // the rest is left to Restore
}

func newLoading() *loading {
	return &loading{task: task{done: make(chan struct{})}, news: make(chan struct{}, 1), end: newSignal()}
}

// load lets the VMM load its state up to byte final of its device. It does not wait for that. While
// something else is missing here, or the VM is not expected yet, it does nothing.
func (t *Target) load(ctx context.Context, final int64) {
	vm, ok := t.config.VM.(StateLoader)
	if !ok {
		return
	}
	select {
	case <-t.expect.done:
	default:
		return
	}
	for _, d := range t.devices {
		if d.left != nil && d.left.Count() > 0 {
			return
		}
	}
	for _, d := range t.devices {
		if d.Device != nil {
			d.Device.Unguard()
		}
	}
	k := t.loading
	k.final.Store(final)
	select {
	case k.news <- struct{}{}:
	default:
	}
	k.begin(&t.wg, func() error {
		for {
			select {
			case <-k.news:
			case <-k.end.fired():
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := vm.Load(ctx, k.final.Load()); err != nil {
				return err
			}
		}
	})
}
