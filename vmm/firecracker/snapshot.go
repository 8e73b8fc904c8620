package firecracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/memory"
	"drafter/internal/sparse"
	"drafter/vmm"
)

// Restore implements [vmm.Machine]. Memory comes from the memory device, page by page, from here
// on.
func (m *Machine) Restore(ctx context.Context, state io.Reader) (err error) {
	first, snapshot, err := readState(state)
	if err != nil {
		return fmt.Errorf("restore state: %w", err)
	}
	pid := m.process.PID()
	if err := writeSnapshot(pid, "state", snapshot, m.launch.UID, m.launch.GID); err != nil {
		return m.orExit(fmt.Errorf("restore state: %w", err))
	}
	served := make(chan error, 1)
	go func() { served <- m.serveMemory(first) }()
	load := snapshotLoad{
		SnapshotPath: "/" + jailSnapshot + "/state", MemBackend: memoryBackend{"Uffd", "/" + uffdSocket}, TrackDirtyPages: m.logsDirty,
	}
	if m.launch.Interface != "" {
		load.NetworkOverrides = []networkOverride{{networkID, m.launch.Interface}}
	}
	err = m.api.put(ctx, "/snapshot/load", load)
	if err != nil { // it may not have come to the handshake
		err = errors.Join(err, m.uffd.Close())
	}
	if serr := <-served; err == nil || serr != nil && !errors.Is(serr, net.ErrClosed) {
		err = errors.Join(err, serr)
	}
	if err != nil {
		return m.orExit(fmt.Errorf("restore state: %w", err))
	}
	m.mu.Lock()
	m.paused = true
	m.mu.Unlock()
	if err := removeSnapshot(pid, "state"); err != nil {
		return m.orExit(fmt.Errorf("restore state: %w", err))
	}
	return nil
}

// serveMemory takes the one connection that brings the userfaultfd.
func (m *Machine) serveMemory(first []uint32) error {
	conn, err := m.uffd.AcceptUnix()
	if err != nil {
		return err
	}
	// for the handshake, which is all that comes
	if err := conn.SetDeadline(time.Now().Add(startTimeout)); err != nil {
		return errors.Join(err, conn.Close())
	}
	c := memory.Config{Device: m.device, Track: memory.TrackAuto}
	if m.logsDirty {
		c.Track = memory.TrackNone
	}
	h, err := memory.Serve(conn, m.process.PID(), c)
	if err = errors.Join(err, conn.Close()); err != nil {
		return err
	}
	h.Enter()
	h.Fill(first, m.launch.FillMemory)
	m.mu.Lock()
	m.memory = h
	m.mu.Unlock()
	m.workers.Go(func() { m.watchMemory(h) })
	if !m.logsDirty && h.Tracking() == memory.TrackNone {
		return errors.New("this kernel says that it can write-protect memory, but refuses it (userfaultfd); upgrade it")
	}
	return nil
}

// watchMemory ends a VM whose memory cannot be served any more. Otherwise it would stand still for
// ever.
func (m *Machine) watchMemory(h *memory.Handler) {
	select {
	case <-h.Failed():
		m.mu.Lock()
		m.lost = h.Err()
		m.mu.Unlock()
		_ = m.process.Kill() // fails only when it has ended
	case <-m.process.Done():
	}
}

// Flush implements [vmm.Machine]. If written pages are known, it does not pause the guest. If not,
// only Firecracker knows them, and answers only while the VM is paused. Flush then pauses a running
// VM for that. It does nothing if the guest has written nearly as much again since the last such
// flush; the next flush is then that of the paused VM.
func (m *Machine) Flush(ctx context.Context) error {
	m.mu.Lock()
	h, paused, vain := m.memory, m.paused, m.vain
	m.mu.Unlock()
	if h != nil && h.Tracking() != memory.TrackNone {
		if err := h.Collect(ctx); err != nil {
			return m.orExit(err)
		}
		return nil
	}
	if !paused && vain {
		return nil
	}
	if !paused {
		if err := m.Pause(ctx); err != nil {
			return err
		}
	}
	written, err := m.delta(ctx)
	if !paused {
		m.mu.Lock()
		m.vain = m.written > 0 && written > m.written/8*7
		m.written = written
		m.mu.Unlock()
		err = errors.Join(err, m.Resume(context.WithoutCancel(ctx)))
	}
	return err
}

var _ vmm.FlushPauser = (*Machine)(nil)

// FlushPauses implements [vmm.FlushPauser].
func (m *Machine) FlushPauses() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.memory == nil || m.memory.Tracking() == memory.TrackNone
}

// delta tells the memory device what a paused VM has written since the last time, by a snapshot, and
// returns how many bytes that was.
func (m *Machine) delta(ctx context.Context) (written int64, err error) {
	s := snapshotCreate{SnapshotType: "Diff", SnapshotPath: "/" + jailSnapshot + "/state"}
	if m.launch.Boot != nil {
		if m.huge {
			s.SnapshotType = "Full"
		}
		s.MemFilePath = "/" + jailMemory
		return 0, m.command(m.api.put(ctx, "/snapshot/create", s))
	}
	const name = "delta"
	s.MemFilePath = "/" + jailSnapshot + "/" + name
	if err := m.command(m.api.put(ctx, "/snapshot/create", s)); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, removeSnapshot(m.process.PID(), name)) }()
	f, err := openSnapshot(m.process.PID(), name, unix.O_RDONLY)
	if err != nil {
		return 0, fmt.Errorf("read memory's changes: %w", err)
	}
	defer f.Close() // nothing was written
	extents, err := sparse.Extents(f, m.launch.MemorySize)
	if err != nil {
		return 0, fmt.Errorf("read memory's changes: %w", err)
	}
	for _, e := range extents {
		m.device.Written(e.Offset, e.Length)
		written += e.Length
	}
	return written, nil
}

// Save implements [vmm.Machine].
//
// Firecracker writes the state of a snapshot first, then memory. The memory device has the memory
// already, so Save names a path for it that cannot exist. Firecracker refuses the snapshot, but the
// state is there, and its checksum says whether it is whole.
func (m *Machine) Save(ctx context.Context, state io.Writer) error {
	// a snapshot that is refused below must not be the only one that knew of a written page
	if err := m.Flush(ctx); err != nil {
		return err
	}
	if err := removeSnapshot(m.process.PID(), "state"); err != nil {
		return m.orExit(fmt.Errorf("save state: %w", err))
	}
	err := m.api.put(ctx, "/snapshot/create", snapshotCreate{
		SnapshotType: "Diff", SnapshotPath: "/" + jailSnapshot + "/state", MemFilePath: "/" + jailSnapshot + "/none/memory",
	})
	var refused *refusedError
	if err != nil && !errors.As(err, &refused) {
		return m.orExit(fmt.Errorf("save state: %w", err))
	}
	snapshot, rerr := readSnapshot(m.process.PID(), "state")
	if rerr == nil {
		rerr = checkSnapshot(snapshot)
	}
	if rerr != nil {
		return m.orExit(fmt.Errorf("save state: %w", errors.Join(err, rerr)))
	}
	m.mu.Lock()
	h := m.memory
	m.mu.Unlock()
	var first []uint32
	if h != nil {
		first = h.Touched()
	}
	var b bytes.Buffer
	if err := errors.Join(writeState(&b, first, snapshot), m.ports.drain()); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	if _, err := state.Write(b.Bytes()); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return nil
}
