package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"drafter/api"
)

// operation is work that goes on when its caller has gone.
type operation struct {
	cancel context.CancelCauseFunc
	done   chan struct{}

	mu     sync.Mutex
	state  api.Operation
	caller string // host that has asked for it; "" for a client of this one
	moves  int    // of an arrival: how often the VM has moved with it
}

// Operations that have ended are remembered for operationAge, and the last keptOperations for longer.
const (
	keptOperations = 100
	operationAge   = 10 * time.Minute
)

var errCancelled = errors.New("it was cancelled")

// begin starts an operation.
func (d *Daemon) begin(kind, vmID string, f func(context.Context, *operation) error) api.Operation {
	ctx, cancel := context.WithCancelCause(d.ctx)
	o := &operation{cancel: cancel, done: make(chan struct{})}
	o.state = api.Operation{ID: uuid.NewString(), Kind: kind, VM: vmID, State: api.Working, Began: time.Now().UTC()}
	d.mu.Lock()
	d.operations[o.state.ID] = o
	d.forgetOperations()
	d.mu.Unlock()
	d.work.Go(func() {
		defer cancel(nil)
		err := f(ctx, o)
		now := time.Now().UTC()
		o.mu.Lock()
		defer o.mu.Unlock()
		o.state.Ended = &now
		switch {
		case err == nil:
			o.state.State = api.Done
		case errors.Is(context.Cause(ctx), errCancelled):
			o.state.State, o.state.Error = api.Cancelled, err.Error()
		default:
			o.state.State, o.state.Error = api.Broken, err.Error()
		}
		close(o.done)
	})
	return o.look()
}

// forgetOperations forgets the oldest ones that have ended, with d.mu held.
func (d *Daemon) forgetOperations() {
	var ended []api.Operation
	for _, o := range d.operations {
		if s := o.look(); s.Ended != nil {
			ended = append(ended, s)
		}
	}
	slices.SortFunc(ended, func(a, b api.Operation) int { return a.Ended.Compare(*b.Ended) })
	for _, o := range ended[:max(0, len(ended)-keptOperations)] {
		if time.Since(*o.Ended) > operationAge {
			delete(d.operations, o.ID)
		}
	}
}

func (o *operation) look() api.Operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	state := o.state
	state.Progress = slices.Clone(state.Progress)
	return state
}

// progress notes how far a step is.
func (o *operation) progress(step string, done, total int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.IndexFunc(o.state.Progress, func(p api.Progress) bool { return p.Step == step })
	if i < 0 {
		o.state.Progress = append(o.state.Progress, api.Progress{Step: step})
		i = len(o.state.Progress) - 1
	}
	o.state.Progress[i].Done, o.state.Progress[i].Total = done, total
}

// made notes which package the operation has made, or found.
func (o *operation) made(key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.state.Package = key
}

// Operation returns an operation once it has ended, or after wait.
func (d *Daemon) Operation(ctx context.Context, id string, wait time.Duration) (api.Operation, error) {
	d.mu.Lock()
	o := d.operations[id]
	d.mu.Unlock()
	if o == nil {
		return api.Operation{}, fmt.Errorf("operation %q: %w", id, ErrNotFound)
	}
	select {
	case <-o.done:
	case <-time.After(wait):
	case <-ctx.Done():
	}
	return o.look(), nil
}

// isFor notes which host has asked for the operation.
func (o *operation) isFor(host string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.caller = host
}

// arrives notes which arrival of a VM the operation is.
func (o *operation) arrives(moves int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.moves = moves
}

// isArrival tells whether the operation is an arrival of a VM that had moved so often before.
func (o *operation) isArrival(id string, moves int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.state.Kind == "arrive" && o.state.VM == id && o.moves > moves
}

// asked refuses an operation that another host has not asked for.
func (d *Daemon) asked(id, host string) error {
	d.mu.Lock()
	o := d.operations[id]
	d.mu.Unlock()
	if o != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.caller == host {
			return nil
		}
	}
	return fmt.Errorf("operation %q: %w", id, ErrNotFound)
}

// Cancel lets an operation end early. What it has made is removed.
func (d *Daemon) Cancel(id string) error {
	d.mu.Lock()
	o := d.operations[id]
	d.mu.Unlock()
	if o == nil {
		return fmt.Errorf("operation %q: %w", id, ErrNotFound)
	}
	o.cancel(errCancelled)
	return nil
}
