// Package migrate is the face of a migration: its limits, its phases, its figures, and the errors
// that it ends with.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"drafter/internal/kind"
)

// Strategy is what happens when the time for pre-copy is over.
type Strategy string

// The strategies.
const (
	// hand over at once; what has not been sent is fetched afterwards
	PostCopy Strategy = "postcopy"
	Cancel   Strategy = "cancel" // give up; the VM runs on at the source
)

// Limits bound a migration. A zero field is the default that its comment names, or no limit. No
// field may be negative.
type Limits struct {
	// bytes per second that are sent; pages that somebody waits for are exempt
	Bandwidth int64
	// the handoff begins when the rest can be sent in half of this time; default 300 ms
	Downtime   time.Duration
	Timeout    time.Duration // of pre-copy; AtTimeout says what happens then
	AtTimeout  Strategy      // default PostCopy, or Cancel with NoPostCopy
	NoPostCopy bool          // send everything before the handoff, however long the VM has to pause
	// for the guest to get ready to be paused, then again for the target to note that it may take
	// the VM over; default 5 s
	Prepare time.Duration
	// from the pause of the VM until the authority has been sent; default 1 min
	Handoff   time.Duration
	Silence   time.Duration // a connection that is silent for so long is lost; default 10 s
	Reconnect time.Duration // pause between attempts to reconnect; default 200 ms
	// how long a target may read the memory's base before it is ready; default 3 s
	Warm time.Duration
	// how long the source waits in preflight for a target with the bases to start its VMM, and for
	// Warm; default 1 s
	HeadStart time.Duration
	// most bytes that all devices of a source may have together; default 128 times this host's
	// memory
	MaxSize int64
	// how long a target that refused tries to tell the source; shortened to Silence when
	// connections are refused; default 1 min
	Settle time.Duration
}

// Check refuses limits that contradict each other.
func (l Limits) Check() error {
	_, err := l.WithDefaults()
	return err
}

// WithDefaults fills in the defaults, and refuses limits that contradict each other.
func (l Limits) WithDefaults() (Limits, error) {
	for _, d := range []struct {
		value    *time.Duration
		fallback time.Duration
	}{
		{&l.Downtime, 300 * time.Millisecond}, {&l.Prepare, 5 * time.Second}, {&l.Handoff, time.Minute}, {&l.Silence, 10 * time.Second},
		{&l.Reconnect, 200 * time.Millisecond}, {&l.Settle, time.Minute}, {&l.Warm, 3 * time.Second}, {&l.HeadStart, time.Second},
	} {
		if *d.value == 0 {
			*d.value = d.fallback
		}
		if *d.value < 0 {
			return l, fmt.Errorf("a limit of %s is not valid", *d.value)
		}
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

// Phase is what a source or a target is doing, or how it has ended.
type Phase string

// The phases of a source and a target.
const (
	// Source: the other side is being checked; nothing has happened to the VM. Target: the same,
	// from the other end.
	Preflight Phase = "preflight"

	PreCopying Phase = "pre-copy"    // source: pages are sent while the VM runs
	Preparing  Phase = "preparing"   // source: the guest gets ready to be paused
	HandingOff Phase = "handing off" // source: the VM is paused, the rest is sent
	InDoubt    Phase = "in doubt"    // source: the authority was sent, the answer is not there
	Serving    Phase = "post-copy"   // source: the target runs the VM, and fetches what it lacks
	Rescuing   Phase = "rescuing"    // source: the VM goes on here

	Snapshotting Phase = "snapshotting" // source of a copy: the VM is paused, the rest is kept
	Delivering   Phase = "delivering"   // source of a copy: the VM goes on, the rest is sent

	Receiving   Phase = "receiving"    // target: pages arrive, the VMM is started
	TakingOver  Phase = "taking over"  // target: the authority is here, the VM is restored
	HandingBack Phase = "handing back" // target: it tells the source that the VM will not run here
	Fetching    Phase = "fetching"     // target: the VM runs, missing pages are fetched
	Confirming  Phase = "confirming"   // target: all is here; the source must know
	Storing     Phase = "storing"      // target of a copy: all is here, and is made durable

	Kept         Phase = "kept"              // source: the VM runs here, as before
	Moved        Phase = "moved"             // both: the target has all of the VM, which is its own
	Lost         Phase = "lost"              // source: the VM could not go on
	LeftInDoubt  Phase = "left in doubt"     // source: it ended before it knew who owns the VM
	LeftServing  Phase = "left in post-copy" // source: it ended before the target had all
	Copied       Phase = "copied"            // target: the copy is complete
	NotTaken     Phase = "not taken"         // target: nothing was taken over
	LeftFetching Phase = "left fetching"     // target: it ended while pages were missing
)

// Phases are all of them.
var Phases = []Phase{
	Preflight, PreCopying, Preparing, HandingOff, InDoubt, Serving, Rescuing, Snapshotting, Delivering, Receiving, TakingOver, HandingBack, Fetching, Confirming, Storing,
	Kept, Moved, Lost, LeftInDoubt, LeftServing, Copied, NotTaken, LeftFetching,
}

// Outcome is an operator's answer to who owns a VM that is in doubt.
type Outcome string

// The answers.
const (
	// the VM did not run at the target and never will: it goes on at the source
	Here Outcome = "here"
	Away Outcome = "away" // the VM runs, or ran, at the target
)

// Stats are the figures of a migration so far.
type Stats struct {
	Phase     Phase
	Cycle     int
	Preflight time.Duration // of Total: before anything was done to the VM; 0 until then
	Total     time.Duration // since its beginning
	// downtime: from the pause until the VM is known to run again; 0 until then
	Paused  time.Duration
	Wire    int64 // bytes sent and received, with all overhead
	Devices []DeviceStats
}

// DeviceStats are the figures of a device in a migration. All numbers are bytes of the device.
type DeviceStats struct {
	Name     string
	Size     int64
	Sent     int64 // at the source: sent; at the target: received
	Saved    int64 // not sent although it had been written: unchanged, zeros, or the base's
	Pending  int64 // still to be sent, or missing
	PostCopy int64 // of Sent: after the handoff
	Wanted   int64 // of PostCopy: because somebody waited
	Wire     int64 // at the source: bytes on the wire of its pages, compressed and with their frames
	Backup   int64 // at the target: fetched from a backup, and not from the source
}

// Bytes are the sums over all devices.
func (s *Stats) Bytes() (sent, saved, pending int64) {
	for _, d := range s.Devices {
		sent, saved, pending = sent+d.Sent, saved+d.Saved, pending+d.Pending
	}
	return sent, saved, pending
}

// Dial opens a connection with a source. Each call opens another one; an error on the second call
// of a migration means that there is only one.
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
	// ErrMayHaveRun says that a VM could not be resumed, but that it may have run.
	ErrMayHaveRun = errors.New("the VM may have run")
	// ErrPackage says that there is no VM to receive, but a package to pull.
	ErrPackage = errors.New("a package is offered here, not a VM that runs")
	// ErrBusy says that the source migrates its VM already, or is not ready to.
	ErrBusy = errors.New("the source is busy")
	// ErrIncompatible says that the migration cannot work, whatever is tried.
	ErrIncompatible = kind.ErrIncompatible
	// ErrRefused says that a connection was not one of a migration.
	ErrRefused = errors.New("connection refused")
)
