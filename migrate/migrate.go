// Package migrate moves a running VM, or devices without one, from a [Source] to a [Target] over any byte stream: first while it runs at the source
// (pre-copy), then by handing it over (handoff), then by fetching what had to be left behind (post-copy). Both sides are state machines; their tables are
// sourceTable and targetTable. docs/migration.md tells what becomes of the VM at every failure.
//
// The package knows devices and what it must ask of a VM, not what a VM is.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"drafter/internal/block"
)

// Strategy is what happens when the time for pre-copy is over.
type Strategy string

// The strategies.
const (
	PostCopy Strategy = "postcopy" // hand over at once; what has not been sent is fetched afterwards
	Cancel   Strategy = "cancel"   // give up; the VM runs on at the source
)

// Limits bound a migration. The zero value of each means that there is no such limit, or the default that is named.
type Limits struct {
	Bandwidth  int64         // bytes per second; what somebody waits for is exempt
	Downtime   time.Duration // the handoff begins when the rest can be sent in this time; default 300 ms
	Timeout    time.Duration // of pre-copy
	AtTimeout  Strategy      // default PostCopy, or Cancel with NoPostCopy
	NoPostCopy bool          // send everything before the handoff, however long the VM has to pause
	Prepare    time.Duration // for the guest to get ready to be paused, and for the target to be prepared for the VM; default 5 s
	Handoff    time.Duration // from pausing the VM to having sent its authority; default 1 min
	Silence    time.Duration // a connection that is silent for so long is lost; default 10 s
	Reconnect  time.Duration // pause between attempts to reconnect; default 200 ms
	Warm       time.Duration // how long a target may keep the VM waiting for what it has to be in the page cache; default 3 s
	HeadStart  time.Duration // how long a target that has the bases may keep the source waiting for its VMM to start, and for Warm; default 1 s
	MaxSize    int64         // bytes that the devices of a source may have in all; see [block.CheckSizes] for the default
	Settle     time.Duration // how long a target that refused tries to tell the source, or Silence if nobody listens there; default 1 min

	// How long a source waits after a handoff before it makes durable what it still has, and notes how things stand: at that moment the target needs the
	// disks and CPUs, if it shares them, and a moment later most of it is not needed any more. Default 250 ms.
	note time.Duration

	// A source waits before it pauses the VM until the target has stored what it was sent, for at most patience, default 250 ms, if the target is near: it has
	// answered within nearby, default 10 ms, when it had nothing to do.
	nearby, patience time.Duration

	// How many pages of a device have to be pending for the next ones to be read while some are sent. It pays where there are many in a row. Default 4,096.
	readAhead int64
}

// Check refuses limits that contradict each other.
func (l Limits) Check() error {
	_, err := l.complete()
	return err
}

// complete fills in the defaults.
func (l Limits) complete() (Limits, error) {
	for _, d := range []struct {
		value    *time.Duration
		fallback time.Duration
	}{
		{&l.Downtime, 300 * time.Millisecond}, {&l.Prepare, 5 * time.Second}, {&l.Handoff, time.Minute}, {&l.Silence, 10 * time.Second},
		{&l.Reconnect, 200 * time.Millisecond}, {&l.Settle, time.Minute}, {&l.Warm, 3 * time.Second}, {&l.HeadStart, time.Second}, {&l.note, 250 * time.Millisecond},
		{&l.nearby, 10 * time.Millisecond}, {&l.patience, 250 * time.Millisecond},
	} {
		if *d.value == 0 {
			*d.value = d.fallback
		}
		if *d.value < 0 {
			return l, fmt.Errorf("a limit of %s is not valid", *d.value)
		}
	}
	if l.readAhead == 0 {
		l.readAhead = 16 * maxRun
	}
	if l.Bandwidth < 0 || l.Timeout < 0 || l.MaxSize < 0 {
		return l, errors.New("bandwidth, timeout and size must not be negative")
	}
	switch {
	case l.AtTimeout == "" && l.NoPostCopy:
		l.AtTimeout = Cancel
	case l.AtTimeout == "":
		l.AtTimeout = PostCopy
	case l.AtTimeout != PostCopy && l.AtTimeout != Cancel:
		return l, fmt.Errorf("strategy %q is unknown; choose postcopy or cancel", l.AtTimeout)
	case l.AtTimeout == PostCopy && l.NoPostCopy:
		return l, errors.New("post-copy is disabled, so it cannot be what happens at the timeout; choose cancel")
	}
	return l, nil
}

// State is where a source or a target stands.
type State string

// The states of a source and a target.
const (
	// Source: the other side is being checked; nothing has happened to the VM. Target: the same, from the other end.
	Preflight State = "preflight"

	PreCopying State = "pre-copy"    // source: pages are sent while the VM runs
	Preparing  State = "preparing"   // source: the guest gets ready to be paused
	HandingOff State = "handing off" // source: the VM is paused, the rest is sent
	InDoubt    State = "in doubt"    // source: the authority was sent, the answer is not there
	Serving    State = "post-copy"   // source: the VM runs at the target, which fetches what it lacks
	Rescuing   State = "rescuing"    // source: the VM goes on here

	Snapshotting State = "snapshotting" // source of a copy: the VM is paused, the rest of the copy is kept
	Delivering   State = "delivering"   // source of a copy: the VM goes on, the rest of the copy is sent

	Receiving   State = "receiving"    // target: pages arrive, the VMM is started
	TakingOver  State = "taking over"  // target: the authority is here, the VM is restored
	HandingBack State = "handing back" // target: the VM will not run here, which the source must know
	Fetching    State = "fetching"     // target: the VM runs, missing pages are fetched
	Confirming  State = "confirming"   // target: all is here; the source must know
	Storing     State = "storing"      // target of a copy: all is here, and is made durable

	Kept         State = "kept"              // source: the VM runs here, as before
	Moved        State = "moved"             // source: the VM is the target's. Target: it is ours, and complete
	Lost         State = "lost"              // source: the VM could not go on
	LeftInDoubt  State = "left in doubt"     // source: it ended before it knew who owns the VM
	LeftServing  State = "left in post-copy" // source: it ended before the target had all
	Copied       State = "copied"            // target: the copy is complete; the VM goes on at its source
	NotTaken     State = "not taken"         // target: nothing was taken over
	LeftFetching State = "left fetching"     // target: it ended while pages were missing
)

// States are all of them.
var States = []State{
	Preflight, PreCopying, Preparing, HandingOff, InDoubt, Serving, Rescuing, Snapshotting, Delivering, Receiving, TakingOver, HandingBack, Fetching, Confirming, Storing,
	Kept, Moved, Lost, LeftInDoubt, LeftServing, Copied, NotTaken, LeftFetching,
}

// Outcome is an operator's answer to who owns a VM that is in doubt.
type Outcome string

// The answers.
const (
	Here Outcome = "here" // the VM did not run at the target and never will: it goes on at the source
	Away Outcome = "away" // the VM runs, or ran, at the target

	undecided Outcome = "" // the source ends without knowing
)

// Stats says what a migration did so far.
type Stats struct {
	State     State
	Cycle     int
	Preflight time.Duration // of Total: before anything was done to the VM; 0 until then
	Total     time.Duration // since its beginning
	Paused    time.Duration // downtime: from the pause until the VM is known to run again; 0 until then
	Wire      int64         // bytes sent and received, with all overhead
	Devices   []DeviceStats
}

// DeviceStats says what a migration did with a device. All numbers are bytes of the device.
type DeviceStats struct {
	Name     string
	Size     int64
	Sent     int64 // at the source: sent; at the target: received
	Saved    int64 // not sent although it had been written: unchanged, zeros, or the base's
	Pending  int64 // still to be sent, or missing
	PostCopy int64 // of Sent: after the handoff
	Wanted   int64 // of PostCopy: because somebody waited
	Backup   int64 // at the target: fetched from a backup, and not from the source
}

// Bytes is what was sent or received of all devices.
func (s *Stats) Bytes() (sent, saved, pending int64) {
	for _, d := range s.Devices {
		sent, saved, pending = sent+d.Sent, saved+d.Saved, pending+d.Pending
	}
	return sent, saved, pending
}

// Dial opens a connection with a source. Each call opens another one; an error on the second call of a migration means that there is only one.
type Dial func(ctx context.Context) (io.ReadWriteCloser, error)

var (
	// ErrHandedOver says that the VM belongs to the other side already.
	ErrHandedOver = errors.New("the VM has been handed over")
	// ErrInDoubt says that it is not known which side owns the VM.
	ErrInDoubt = errors.New("it is in doubt who owns the VM")
	// ErrNotReady says that the guest did not get ready to be paused.
	ErrNotReady = errors.New("the guest did not get ready")
	// ErrTakenBack says that an operator has settled that a VM that runs at the target goes on at
	// the source.
	ErrTakenBack = errors.New("the VM was taken back by its source")
	// ErrConnected says that an operator need not decide who owns a VM: its target is there.
	ErrConnected = errors.New("the VM's target is connected; let it have what it lacks, or end it first")
	// ErrRefused says that a connection was not one of a migration.
	ErrRefused = errors.New("connection refused")
	errNoDoubt = errors.New("nothing is in doubt")
	errBusy    = errors.New("the VM is being migrated already")
	errCrowded = errors.New("too many connections wait, and this one has waited longest")
)

// row is one state in the table of a machine T: what is done in it, and what follows.
type row[T any] struct {
	does    func(T, context.Context) (State, error) // nil in a final state
	then    []State                                 // what it may lead to
	failing State                                   // what an error leads to
	within  func(*Limits) time.Duration             // bounds it, if not nil and not 0; what it does must then end with an error
}

// advance runs a machine from state to one of its final states. It returns the errors of all steps.
func advance[T any](ctx context.Context, machine T, table map[State]row[T], state State, limits *Limits, observe func(State)) (State, error) {
	var errs []error
	for {
		observe(state)
		r := table[state]
		if r.does == nil {
			return state, errors.Join(errs...)
		}
		next, err := step(ctx, machine, r, limits)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", state, err))
			if next = r.failing; next == "" {
				return state, errors.Join(append(errs, fmt.Errorf("there is no way out of %q", state))...)
			}
		} else if !contains(r.then, next) {
			return state, errors.Join(append(errs, fmt.Errorf("there is no way from %q to %q", state, next))...)
		}
		state = next
	}
}

func step[T any](ctx context.Context, machine T, r row[T], limits *Limits) (State, error) {
	if r.within != nil {
		if d := r.within(limits); d > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, d, fmt.Errorf("not done after %s", d))
			defer cancel()
		}
	}
	return r.does(machine, ctx)
}

func contains(states []State, s State) bool {
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
