package instance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"

	"drafter/vmm"
)

// Preflight checks that a VM that runs elsewhere could run here, without starting anything.
func Preflight(ctx context.Context, h vmm.Host, config *vmm.PackageConfig) error {
	driver, err := h.Drivers.Select(h.VMM, config.Hardware.VMM)
	if err != nil {
		return err
	}
	if c, ok := driver.(vmm.Checker); ok {
		return c.Check(ctx, vmm.Launch{Board: vmm.Board{Accel: h.Accel, Recorded: &config.Hardware}})
	}
	return nil
}

// bootable checks, if the VM is told to boot, that its VMM can start here: a suspended state is
// given up for it.
func bootable(ctx context.Context, h vmm.Host, config *vmm.PackageConfig) error {
	if !h.Boot {
		return nil
	}
	return Preflight(ctx, h, config)
}

// stalled tells whether the guest stands still for a disk that it cannot use. Such a guest hears no
// call.
func (i *Instance) stalled() bool {
	s, ok := i.machine.(vmm.Staller)
	return ok && s.Stalled()
}

// Prepare tells the guest's agent that the VM is about to be paused. The guest runs on.
// [Instance.Rescue] and [Instance.RescueAgent] undo it. A guest that stands still is not told.
func (i *Instance) Prepare(ctx context.Context) error {
	i.forgetAgent()
	if i.stalled() {
		i.log.Warn("The guest is not told that it will be paused, as it stands still")
		return i.dropAgent()
	}
	if i.agent.Load() == nil { // it did not answer when the VM was resumed
		if err := i.connectAgent(ctx); err != nil {
			return err
		}
	}
	if i.agent.Load() == nil {
		return nil // there is none
	}
	err := i.agent.Load().BeforeSuspend(ctx)
	if err != nil {
		err = fmt.Errorf("the guest's agent: %w", err)
	}
	return errors.Join(err, i.dropAgent())
}

// dropAgent ends the agent's connection, as before every snapshot. The next resume makes a new one.
func (i *Instance) dropAgent() error {
	c := i.agent.Swap(nil)
	if c == nil {
		return nil
	}
	return c.Close()
}

// WriteBack flushes memory, if the VMM can do that without a pause.
func (i *Instance) WriteBack(ctx context.Context) error {
	if p, ok := i.machine.(vmm.FlushPauser); ok && p.FlushPauses() {
		return nil
	}
	return i.Flush(ctx)
}

// Flush makes every guest memory write up to now visible in the memory device.
func (i *Instance) Flush(ctx context.Context) error { return i.prefer(i.machine.Flush(ctx)) }

// Pause stops the vCPUs.
func (i *Instance) Pause(ctx context.Context) error {
	i.paused = time.Now() // even if it fails
	return i.prefer(i.machine.Pause(ctx))
}

// PauseToSave is Pause before SaveLeaving, and returns when the guest stopped. A VMM may begin to
// save meanwhile. If a disk does not answer, Rescue waits for it.
func (i *Instance) PauseToSave(ctx context.Context) (stopped time.Time, err error) {
	p, ok := i.machine.(vmm.SavePauser)
	if !ok {
		err = i.Pause(ctx)
		return i.paused, err
	}
	i.paused = time.Now() // even if it fails
	if stopped, err = p.PauseToSave(ctx); err != nil {
		return stopped, i.prefer(err)
	}
	i.paused = stopped
	return stopped, i.prefer(nil)
}

// NoteLeaving notes durably that the running VM may soon run at the target of a migration.
// [Instance.Rescue] takes the note back.
func (i *Instance) NoteLeaving(migration uuid.UUID) error {
	i.status = leaving
	return i.withState(func(dev StateDevice) error { return vmm.MarkLeaving(dev, migration) })
}

// SaveLeaving writes the paused VM's state to its device, for the target of a migration, or for a
// copy unless NoteLeaving was called before. Nothing is made durable. Flush may be called beside
// it, and again afterwards. While the VMM makes the state, final is called with the byte up to which
// the device has its final content. What is early can be loaded at once, and what is not, when memory
// is as Flush then finds it. final may be nil.
func (i *Instance) SaveLeaving(ctx context.Context, migration uuid.UUID, final func(end int64, early bool)) error {
	status := vmm.Leaving
	if i.status != leaving {
		i.status, status = copying, vmm.Copying
	}
	if _, settled := i.machine.(vmm.SavePauser); !settled || final == nil {
		final = func(int64, bool) {}
	}
	return i.withState(func(dev StateDevice) error {
		w := vmm.NewStateWriter(dev)
		if err := i.machine.Save(ctx, writes{w, func(early bool) { final(w.Final(), early) }}); err != nil {
			return i.prefer(err)
		}
		return w.End(i.config.ID, migration, status)
	})
}

// writes is a writer that says when it was written to.
type writes struct {
	io.Writer
	wrote func(early bool)
}

// Write implements io.Writer.
func (w writes) Write(p []byte) (int, error) { return w.write(p, false) }

// WriteEarly implements [vmm.EarlyWriter].
func (w writes) WriteEarly(p []byte) (int, error) { return w.write(p, true) }

func (w writes) write(p []byte, early bool) (int, error) {
	n, err := w.Writer.Write(p)
	if err == nil {
		w.wrote(early)
	}
	return n, err
}

// Mark notes durably the status of a VM that was handed over.
func (i *Instance) Mark(status vmm.Status) error {
	if i == nil {
		return ErrNotStarted
	}
	i.status = frozen
	return i.withState(func(dev StateDevice) error { return vmm.MarkState(dev, status) })
}

// LeaveMemory is Mark for a VM whose memory has changed hands with it: the note of NoteLeaving says
// the right thing, that the VM can go on here from its disks alone.
func (i *Instance) LeaveMemory() error {
	if i == nil {
		return ErrNotStarted
	}
	i.status = frozen
	return nil
}

// Rescue undoes Prepare, Pause and SaveLeaving, whichever of them were done. When it returns nil,
// the guest runs.
func (i *Instance) Rescue(ctx context.Context) error {
	settleable := i.status == frozen
	if err := i.prefer(nil); err != nil && settleable {
		return err // the VMM is gone, but the devices hold what an operator can settle on
	}
	i.stood = 0
	if i.status != running {
		i.status = copying // until the device says that the VM is here, which may fail
		err := i.withState(func(dev StateDevice) error {
			if settleable {
				// An operator must no longer be able to settle on the state once the guest changes
				// memory and disks.
				return vmm.MarkState(dev, vmm.Running)
			}
			return vmm.NoteState(dev, vmm.Running)
		})
		if err != nil {
			return err
		}
		i.status = running
	}
	if !i.paused.IsZero() {
		if err := i.machine.Resume(ctx); err != nil {
			return i.prefer(err)
		}
		i.stood, i.paused = time.Since(i.paused), time.Time{}
	}
	return i.prefer(nil)
}

// sameTime is how far a guest's clock may be from this host's, beside the pause, and still count as
// the same time.
const sameTime = time.Second

// RescueAgent tells the guest's agent after a Rescue that the guest runs on, for at most timeout.
// The agent advances a clock that is behind by the pause. A clock that keeps another time than this
// host's stays.
func (i *Instance) RescueAgent(ctx context.Context, timeout time.Duration) error {
	if i.agent.Load() != nil {
		return nil
	}
	return i.tellAgent(ctx, timeout, i.stood+sameTime)
}

// Receive gets the VMM ready for a state that Load loads as it comes. The error of a VMM that cannot
// do so is an [errors.ErrUnsupported].
func (l *Launched) Receive(ctx context.Context) error {
	r, ok := l.i.machine.(vmm.Receiver)
	if !ok {
		return fmt.Errorf("receive state in parts: %w", errors.ErrUnsupported)
	}
	return r.Receive(ctx)
}

// Load loads the state up to byte end of its device, ahead of Restore.
func (l *Launched) Load(ctx context.Context, end int64) error {
	return l.i.withState(func(dev StateDevice) error {
		part, err := l.state.Next(dev, end)
		if err != nil {
			return err
		}
		return l.i.machine.(vmm.Receiver).Load(ctx, part)
	})
}

// Restore loads the state that a migration has brought, and notes that the VM runs here. The note
// is durable once the device is synced. The VM does not run yet; see [Launched.Go].
func (l *Launched) Restore(ctx context.Context, migration uuid.UUID) error {
	i := l.i
	return i.withState(func(dev StateDevice) error {
		rest, err := l.state.Rest(dev, i.config.ID, migration)
		if err != nil {
			return err
		}
		if err := i.machine.Restore(ctx, bytes.NewReader(rest)); err != nil {
			return err
		}
		return vmm.NoteTakenOver(dev)
	})
}

// Go lets the guest run after Restore. After an error, Ended tells whether it may have run.
func (l *Launched) Go(ctx context.Context) (*Instance, error) {
	return l.i, l.i.machine.Resume(ctx)
}

// Done is closed when the VMM is gone; Wait then tells how.
func (l *Launched) Done() <-chan struct{} { return l.i.machine.Done() }

// Wait blocks until the VMM is gone, and returns how it ended.
func (l *Launched) Wait() error { return l.i.machine.Wait() }

// Ended tells whether the VMM is gone.
func (l *Launched) Ended() bool {
	select {
	case <-l.Done():
		return true
	default:
		return false
	}
}
