// Package migration moves a running VM, or devices without one, from a [Source] to a [Target] over
// any byte stream: first while it runs at the source (pre-copy), then by handing it over (handoff),
// then by fetching what had to be left behind (post-copy). Both sides are state machines; their
// tables are sourceTable and targetTable. docs/migration.md tells what becomes of the VM at every
// failure.
//
// The package knows devices and what it must ask of a VM, not what a VM is.
package migration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"drafter/internal/block"
	"drafter/migrate"
)

var (
	errNoDoubt = errors.New("nothing is in doubt")
	errBusy    = errors.New("the VM is being migrated already")
	errCopied  = errors.New("a copy of the VM is being made; try again when it is complete")
	errHanded  = errors.New("the VM has run at its target, which has its memory; end the peer here, and then 'drafter peer settle --here' lets it boot from its disks")
	errCrowded = errors.New("too many connections wait, and this one has waited longest")
)

// undecided is the outcome when a source ends without knowing who owns the VM.
const undecided migrate.Outcome = ""

// tuning sets a source's speed. Only tests change it; 0 is the default.
type tuning struct {
	// note is how long a source waits after a handoff before it makes its data durable, and notes
	// the status. At that moment the target needs the disks and CPUs, if it shares them. A moment
	// later most of the data is not needed any more. Default 250 ms.
	note time.Duration

	// Before a source pauses the VM, it waits until the target has stored what it was sent, for at
	// most patience, default 250 ms. It does so only if the target is near: an idle target has
	// answered within nearby, default 10 ms.
	nearby, patience time.Duration

	// readAhead is how many pages of a device have to be pending for a source to read the next
	// pages while it sends some. That pays if many pages are in a row. Default 4,096.
	readAhead int64
}

func (t tuning) withDefaults() tuning {
	return tuning{
		note: cmp.Or(t.note, 250*time.Millisecond), nearby: cmp.Or(t.nearby, 10*time.Millisecond),
		patience: cmp.Or(t.patience, 250*time.Millisecond), readAhead: cmp.Or(t.readAhead, 16*maxRun),
	}
}

// row is one phase in the table of a machine T: what is done in it, and what follows.
type row[T any] struct {
	does    func(T, context.Context) (migrate.Phase, error) // nil in a final phase
	then    []migrate.Phase                                 // what it may lead to
	failing migrate.Phase                                   // what an error leads to
	// bounds the phase, if not nil and not 0; does must then end with an error
	within func(*migrate.Limits) time.Duration
}

// advance runs a machine from phase to a final one. It returns the errors of all steps.
func advance[T any](ctx context.Context, machine T, table map[migrate.Phase]row[T], phase migrate.Phase, limits *migrate.Limits, observe func(migrate.Phase)) (migrate.Phase, error) {
	var errs []error
	for {
		observe(phase)
		r := table[phase]
		if r.does == nil {
			return phase, errors.Join(errs...)
		}
		next, err := step(ctx, machine, r, limits)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", phase, err))
			if next = r.failing; next == "" {
				return phase, errors.Join(append(errs, fmt.Errorf("there is no way out of %q", phase))...)
			}
		} else if !contains(r.then, next) {
			return phase, errors.Join(append(errs, fmt.Errorf("there is no way from %q to %q", phase, next))...)
		}
		phase = next
	}
}

func step[T any](ctx context.Context, machine T, r row[T], limits *migrate.Limits) (migrate.Phase, error) {
	if r.within != nil {
		if d := r.within(limits); d > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, d, fmt.Errorf("not done after %s", d))
			defer cancel()
		}
	}
	return r.does(machine, ctx)
}

func contains(states []migrate.Phase, s migrate.Phase) bool {
	for _, t := range states {
		if t == s {
			return true
		}
	}
	return false
}

// bytesOf is the size of pages first up to end of a device.
func bytesOf(d block.Device, first, end int64) int64 {
	return min(end*block.PageSize, d.Size()) - first*block.PageSize
}
