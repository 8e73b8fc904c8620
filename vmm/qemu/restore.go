package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"drafter/vmm"
)

// incoming is a state that QEMU loads.
type incoming struct {
	w    atomic.Pointer[os.File] // where QEMU reads it; nil before await, and once all is written
	last []byte                  // the last byte of a state that comes in parts, once it is known

	parts atomic.Bool // the state comes in parts, and QEMU runs at its end
	let   atomic.Bool // it may
	ran   atomic.Bool // it has
}

// await lets QEMU wait for the state that Restore writes, so that this is not done while the VM is
// paused.
func (m *Machine) await(ctx context.Context) error {
	r, w, err := statePipe()
	if err != nil {
		return fmt.Errorf("wait for state: %w", err)
	}
	m.incoming.w.Store(w)
	const name = "restore"
	err = m.command(ctx, "getfd", map[string]any{"fdname": name}, r)
	if err = errors.Join(err, r.Close()); err == nil {
		err = m.command(ctx, "migrate-incoming", map[string]any{"uri": "fd:" + name})
	}
	if err != nil {
		return fmt.Errorf("wait for state: %w", err)
	}
	return nil
}

// Restore implements [vmm.Machine]. The last byte of a state that comes in parts is left to Resume.
func (m *Machine) Restore(ctx context.Context, state io.Reader) error {
	in := &m.incoming
	if in.w.Load() == nil {
		return errors.New("restore state: QEMU does not wait for it")
	}
	m.memory.Enter()
	var err error
	if in.parts.Load() {
		err = m.loadRest(ctx, state)
	} else {
		err = m.load(ctx, state)
	}
	if err != nil {
		return fmt.Errorf("restore state: %w%s", err, m.stderr.Quote("QEMU says"))
	}
	return nil
}

// load loads a whole state.
func (m *Machine) load(ctx context.Context, state io.Reader) error {
	w := m.incoming.w.Swap(nil)
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, state)
		if errors.Is(err, unix.EPIPE) {
			// QEMU does not read the JSON description at the end of an older release's state
			err = nil
		}
		copied <- errors.Join(err, w.Close())
	}()
	err := m.awaitMigration(ctx, "completed")
	if err != nil {
		w.SetWriteDeadline(time.Unix(1, 0))
	}
	if cerr := <-copied; cerr != nil && err == nil {
		err = cerr
	}
	return err
}

// Receive implements [vmm.Receiver]. It tells QEMU, which waits, to go on: a VM that ran when it was
// saved then runs as soon as its state is loaded.
func (m *Machine) Receive(ctx context.Context) error {
	if m.incoming.w.Load() == nil || m.device == nil || m.launch.HugePages || m.private {
		return fmt.Errorf("receive state in parts: %w", errors.ErrUnsupported)
	}
	if err := m.command(ctx, "cont", nil); err != nil {
		return fmt.Errorf("receive state in parts: %w", err)
	}
	m.incoming.parts.Store(true)
	return nil
}

var _ vmm.Receiver = (*Machine)(nil)

// Load implements [vmm.Receiver].
func (m *Machine) Load(ctx context.Context, part []byte) error {
	in := &m.incoming
	if !in.parts.Load() || in.last != nil {
		return errors.New("load state: QEMU does not wait for a part of it")
	}
	if err := in.write(ctx, part); err != nil {
		return fmt.Errorf("load state: %w", m.orExit(err))
	}
	return nil
}

// write writes a part to QEMU. A part larger than the pipe waits for QEMU.
func (in *incoming) write(ctx context.Context, part []byte) error {
	w := in.w.Load()
	if w == nil {
		return os.ErrClosed
	}
	stop := context.AfterFunc(ctx, func() { w.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := w.Write(part)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// loadRest loads what is left of a state, but for its last byte, with which QEMU lets the VM run.
func (m *Machine) loadRest(ctx context.Context, state io.Reader) error {
	in := &m.incoming
	rest, err := io.ReadAll(state)
	if err == nil && len(rest) == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	if err := in.write(ctx, rest[:len(rest)-1]); err != nil {
		return m.orExit(err)
	}
	in.last = rest[len(rest)-1:]
	return nil
}

// endState lets QEMU have the last byte of a state that came in parts, and tells whether the VM runs
// then. A VM that did not run when it was saved does not.
func (m *Machine) endState(ctx context.Context) (running bool, err error) {
	in := &m.incoming
	if in.last == nil {
		return false, nil
	}
	last := in.last
	in.last = nil
	in.let.Store(true)
	if err = in.write(ctx, last); err == nil {
		err = m.awaitMigration(ctx, runs, "completed")
	}
	if w := in.w.Swap(nil); w != nil {
		_ = w.Close() // of a pipe, which loses nothing
	}
	ran := in.ran.Load()
	if ran && ctx.Err() != nil {
		err = nil // nobody waits any more, but the VM runs
	}
	if err == nil {
		return ran, nil
	}
	err = fmt.Errorf("restore state: %w%s", err, m.stderr.Quote("QEMU says"))
	_ = m.process.Kill() // it shall not run later; this fails only when it has ended
	<-m.ended
	if !in.ran.Load() { // QEMU says so before a vCPU runs, and all that it has said is read
		err = fmt.Errorf("%w: %w", vmm.ErrNotRun, err)
	}
	return false, err
}

// runs stands among the statuses of a migration for the event that the vCPUs run, which comes before
// the last status.
const runs = "runs"

// resumed notes that the vCPUs run. A VM that nobody has let go is ended: it may be another's.
func (in *incoming) resumed(m *Machine) {
	if in.parts.Load() && !in.let.Load() {
		_ = m.process.Kill() // fails only when it has ended
		return
	}
	in.ran.Store(true)
	m.noteMigration(runs)
}
