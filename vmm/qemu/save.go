package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"drafter/vmm"
)

// outgoingName is a file's name within QEMU, of which each is used once.
const outgoingName = "save"

// prepareSave does what a save needs before the VM is paused.
func (m *Machine) prepareSave(ctx context.Context) error {
	m.saving.Lock()
	defer m.saving.Unlock()
	if m.outgoing != nil {
		return nil
	}
	r, w, err := statePipe()
	if err != nil {
		return fmt.Errorf("prepare to save state: %w", err)
	}
	if err := errors.Join(m.command(ctx, "getfd", map[string]any{"fdname": outgoingName}, w), w.Close()); err != nil {
		return errors.Join(fmt.Errorf("prepare to save state: %w", err), r.Close())
	}
	m.outgoing = r
	return nil
}

// save is a state that QEMU writes.
type save struct {
	r      *os.File
	state  bytes.Buffer
	copied chan error // of r to state
}

// beginSave tells QEMU to write its state. It stops a VM that runs once it is ready to.
func (m *Machine) beginSave(ctx context.Context) (*save, error) {
	if err := m.prepareSave(ctx); err != nil {
		return nil, err
	}
	m.saving.Lock()
	s := &save{r: m.outgoing, copied: make(chan error, 1)}
	m.outgoing = nil
	m.saving.Unlock()
	for len(m.migration) > 0 {
		<-m.migration // left over from an earlier one
	}
	go func() {
		_, err := io.Copy(&s.state, s.r)
		s.copied <- errors.Join(err, s.r.Close()) // closed early, QEMU fails with EPIPE and reports it
	}()
	if err := m.command(ctx, "migrate", map[string]any{"uri": "fd:" + outgoingName}); err != nil {
		return nil, errors.Join(err, s.abandon())
	}
	return s, nil
}

// abandon ends the copying. QEMU may hold its end open after a failure.
func (s *save) abandon() error {
	s.r.SetReadDeadline(time.Unix(1, 0))
	if err := <-s.copied; !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// PauseToSave implements [vmm.SavePauser]. QEMU prepares the save while the guest runs, and goes on
// with it without being told.
func (m *Machine) PauseToSave(ctx context.Context) error {
	m.running.Lock()
	defer m.running.Unlock()
	select {
	case <-m.stops: // an earlier one
	default:
	}
	s, err := m.beginSave(ctx)
	if err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	m.saving.Lock()
	m.begun = s
	m.saving.Unlock()
	for {
		select {
		case <-m.stops:
			m.paused.Store(true)
			return nil
		case status := <-m.migration:
			if status == "failed" || status == "cancelled" {
				m.migration <- status // for giveUpSave; there is room
				return fmt.Errorf("pause: QEMU: migration %s", status)
			}
			if status == "completed" { // a VM that a disk had stopped already
				m.migration <- status
				m.paused.Store(true)
				return nil
			}
		case <-m.ended:
			return m.orExit(errors.New("QEMU has ended"))
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

var _ vmm.SavePauser = (*Machine)(nil)

// Save implements [vmm.Machine].
func (m *Machine) Save(ctx context.Context, state io.Writer) (err error) {
	m.saving.Lock()
	s := m.begun
	m.begun = nil
	m.saving.Unlock()
	if s == nil {
		s, err = m.beginSave(ctx)
	}
	if err == nil {
		err = s.end(m.migrated(ctx))
	}
	if err == nil {
		_, err = state.Write(s.state.Bytes())
	}
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return nil
}

// end waits for the rest of the state of a save that has ended with err.
func (s *save) end(err error) error {
	if err != nil {
		return errors.Join(err, s.abandon())
	}
	return <-s.copied
}

// giveUpSave waits for the end of a save that PauseToSave has begun. Otherwise QEMU would stop the VM
// again later. The save is not cancelled: QEMU (7.2) would let a VM run whose disks it has given up,
// and end at the next write to one.
func (m *Machine) giveUpSave(ctx context.Context) error {
	m.saving.Lock()
	s := m.begun
	m.begun = nil
	m.saving.Unlock()
	if s == nil {
		return nil
	}
	_ = m.migrated(ctx) // a save that has failed is over, too
	return errors.Join(s.abandon(), ctx.Err())
}

// statePipe makes a pipe that holds a whole state, so that QEMU and this process need not wait for
// one another. The default of 64 KiB costs 10 ms of waiting.
func statePipe() (r, w *os.File, err error) {
	const size = 1 << 20 // what a user other than root may have, too; see pipe(7)
	if r, w, err = os.Pipe(); err != nil {
		return nil, nil, err
	}
	var ferr error
	conn, err := w.SyscallConn()
	if err == nil {
		err = conn.Control(func(fd uintptr) { _, ferr = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, size) })
	}
	if err != nil {
		return nil, nil, errors.Join(err, r.Close(), w.Close())
	}
	if ferr != nil && !errors.Is(ferr, unix.EPERM) { // with too many pipes already, it stays small
		return nil, nil, errors.Join(fmt.Errorf("resize pipe: %w", ferr), r.Close(), w.Close())
	}
	return r, w, nil
}

// migrated waits until QEMU reports the end of a migration.
func (m *Machine) migrated(ctx context.Context) error {
	for {
		select {
		case status := <-m.migration:
			switch status {
			case "completed":
				return nil
			case "failed", "cancelled":
				var info struct {
					Error string `json:"error-desc"`
				}
				if err := m.qmp.execute(ctx, "query-migrate", nil, &info); err == nil && info.Error != "" {
					return fmt.Errorf("QEMU: %s", words(info.Error))
				}
				return m.orExit(fmt.Errorf("QEMU: migration %s", status))
			}
		case <-m.ended:
			return m.orExit(errors.New("QEMU has ended"))
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
