package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
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
	r        *os.File
	stage    stage
	settles  bool          // QEMU waits once it is settled
	early    atomic.Bool   // it has not been told to go on then: there is nothing of devices yet
	settled  chan struct{} // closed when memory is, or never will be
	once     sync.Once     // closes settled
	finished chan struct{} // closed when nothing is read any more

	mu    sync.Mutex // guards the following
	more  *sync.Cond
	state []byte // that was read and not taken
	whole bool   // all has been read
	err   error  // why there is no more
}

// stage is how far QEMU has come with a save.
type stage int

const (
	saving  stage = iota // it prepares to save, while the VM may run
	settled              // the VM has stopped, its disk writes are done, and QEMU waits
	last                 // it writes the state of devices
	over
)

// beginSave tells QEMU to write its state. It stops a VM that runs once it is ready to. If the save
// settles, QEMU then waits: before it writes the state of devices, somebody wants to look at memory.
func (m *Machine) beginSave(ctx context.Context, settles bool) (*save, error) {
	if err := m.prepareSave(ctx); err != nil {
		return nil, err
	}
	m.saving.Lock()
	defer m.saving.Unlock()
	s := &save{r: m.outgoing, settles: settles, settled: make(chan struct{}), finished: make(chan struct{})}
	s.more = sync.NewCond(&s.mu)
	s.early.Store(settles)
	m.outgoing = nil
	for len(m.migration) > 0 {
		<-m.migration // left over from an earlier one
	}
	go s.read()
	if err := m.setCapabilities(ctx, capability{"pause-before-switchover", settles}); err != nil {
		return nil, errors.Join(err, s.close())
	}
	m.begun = s
	err := m.command(ctx, "migrate", map[string]any{"uri": "fd:" + outgoingName})
	if refused := (*qmpError)(nil); errors.As(err, &refused) {
		m.begun = nil
		return nil, errors.Join(err, s.close())
	}
	return s, err // QEMU may do what nobody waits for any more
}

// read reads the state as QEMU makes it.
func (s *save) read() {
	defer close(s.finished)
	b := make([]byte, 64<<10)
	for {
		n, err := s.r.Read(b)
		s.mu.Lock()
		s.state = append(s.state, b[:n]...)
		s.whole = errors.Is(err, io.EOF)
		s.mu.Unlock()
		if err != nil && !s.whole {
			s.fail(err)
		}
		s.more.Broadcast()
		if err != nil {
			return
		}
	}
}

// fail ends the taking of what is read.
func (s *save) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.more.Broadcast()
}

// take waits for the next part of the state. There is none at the end.
func (s *save) take() (part []byte, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.state) == 0 && !s.whole && s.err == nil {
		s.more.Wait()
	}
	part, s.state = s.state, nil
	return part, s.err
}

// close ends the reading. QEMU may hold its end open after a failure.
func (s *save) close() error {
	s.r.SetReadDeadline(time.Unix(1, 0))
	<-s.finished
	return s.r.Close() // closed early, QEMU fails with EPIPE and reports it
}

// PauseToSave implements [vmm.SavePauser]. QEMU prepares the save while the guest runs, and stops the
// guest. If another process has the memory, too, QEMU goes on to save: what it writes to memory
// needs no copy. Else it first waits once its disk writes are done.
func (m *Machine) PauseToSave(ctx context.Context) (stopped time.Time, err error) {
	m.running.Lock()
	defer m.running.Unlock()
	select {
	case <-m.stops: // an earlier one
	default:
	}
	s, err := m.beginSave(ctx, m.device == nil || !m.device.Offered())
	if err == nil {
		stopped, err = m.awaitStop(ctx, s)
	}
	if err != nil {
		return stopped, fmt.Errorf("pause: %w", err)
	}
	m.paused.Store(true)
	return stopped, nil
}

// awaitStop waits until a save has stopped the guest. One that a disk had stopped before does not
// stop again.
func (m *Machine) awaitStop(ctx context.Context, s *save) (stopped time.Time, err error) {
	to := over
	if s.settles {
		to = settled
	}
	advanced := make(chan error, 1)
	actx, cancel := context.WithCancel(ctx)
	go func() { advanced <- m.advance(actx, s, to) }()
	select {
	case stopped = <-m.stops:
		cancel()
		if err = <-advanced; errors.Is(err, context.Canceled) {
			err = nil
		}
		return stopped, err
	case err = <-advanced:
		cancel()
	}
	select {
	case stopped = <-m.stops:
	default:
		stopped = time.Now()
	}
	return stopped, err
}

var _ vmm.SavePauser = (*Machine)(nil)

// advance lets QEMU go on with a save, and waits until it has come to a stage.
func (m *Machine) advance(ctx context.Context, s *save, to stage) (err error) {
	for s.stage < to && err == nil {
		switch s.stage {
		case saving:
			if s.settles {
				err = m.awaitMigration(ctx, "pre-switchover")
			}
		case settled:
			if s.settles {
				s.early.Store(false)
				err = m.command(ctx, "migrate-continue", map[string]any{"state": "pre-switchover"})
			}
		case last:
			err = m.awaitMigration(ctx, "completed")
		}
		switch {
		case err == nil, s.stage == settled && ctx.Err() != nil: // QEMU may have been told
			s.stage++
		case errors.Is(err, errFailed):
			s.stage = over
		}
		if s.settles && s.stage >= settled || s.stage == over {
			s.settle()
		}
	}
	return err
}

// settle notes that memory is settled, or that nobody need wait for that any more.
func (s *save) settle() { s.once.Do(func() { close(s.settled) }) }

// awaitSettled waits until a save that has paused the VM has settled its memory. Nothing is waited
// for without one.
func (m *Machine) awaitSettled(ctx context.Context) error {
	s := m.begunSave()
	if s == nil {
		return nil
	}
	select {
	case <-s.settled:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Save implements [vmm.Machine].
func (m *Machine) Save(ctx context.Context, state io.Writer) error {
	s := m.begunSave()
	var err error
	if s == nil {
		s, err = m.beginSave(ctx, false)
	}
	if err == nil {
		err = m.writeState(ctx, s, state)
	}
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return m.endSave()
}

// begunSave is the save that has not ended, if there is one.
func (m *Machine) begunSave() *save {
	m.saving.Lock()
	defer m.saving.Unlock()
	return m.begun
}

// endSave frees what a save needed that is over.
func (m *Machine) endSave() error {
	m.saving.Lock()
	s := m.begun
	m.begun = nil
	m.saving.Unlock()
	if s == nil {
		return nil
	}
	m.saved.Store(true)
	return s.close()
}

// writeState writes the state while QEMU makes it.
func (m *Machine) writeState(ctx context.Context, s *save, state io.Writer) error {
	defer s.settle()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error // valid once advanced is closed
	advanced := make(chan struct{})
	go func() {
		defer close(advanced)
		if failed = m.advance(ctx, s, over); failed != nil {
			s.fail(failed)
		}
	}()
	for {
		part, err := s.take()
		if err == nil && len(part) == 0 {
			<-advanced
			return failed
		}
		if err == nil {
			err = s.pass(part, state)
		}
		if err != nil {
			cancel()
			<-advanced
			return err
		}
	}
}

// pass passes a part of the state on.
func (s *save) pass(part []byte, to io.Writer) (err error) {
	if w, ok := to.(vmm.EarlyWriter); ok && s.early.Load() {
		_, err = w.WriteEarly(part)
	} else {
		_, err = to.Write(part)
	}
	return err
}

// giveUpSave waits for the end of a save that has begun. Otherwise QEMU would stop the VM again
// later. The save is not cancelled: QEMU (7.2) would let a VM run whose disks it has given up, and
// end at the next write to one.
func (m *Machine) giveUpSave(ctx context.Context) error {
	s := m.begunSave()
	if s == nil {
		return nil
	}
	if err := m.advance(ctx, s, over); err != nil && s.stage != over {
		return fmt.Errorf("give up saving: %w", err)
	}
	return m.endSave()
}

// awaitSaved waits until QEMU has done with a save that is over: it says a moment before that it is,
// and lets no VM run until then.
func (m *Machine) awaitSaved(ctx context.Context) error {
	if !m.saved.Load() {
		return nil
	}
	err := m.poll(ctx, func() (bool, error) {
		var vm struct {
			Status string `json:"status"`
		}
		err := m.qmp.execute(ctx, "query-status", nil, &vm)
		return vm.Status != "finish-migrate", err // see RunState in qapi/run-state.json of QEMU
	})
	m.saved.Store(err != nil)
	return err
}

// poll waits until something is done.
func (m *Machine) poll(ctx context.Context, done func() (bool, error)) error {
	for {
		if ok, err := done(); err != nil {
			return m.orExit(err)
		} else if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-m.ended:
			return m.orExit(errors.New("QEMU has ended"))
		case <-time.After(time.Millisecond):
		}
	}
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

// errFailed says that QEMU has given up a migration.
var errFailed = errors.New("QEMU: the migration failed")

// awaitMigration waits until QEMU reports that a migration has come to one of some statuses, or that
// it failed.
func (m *Machine) awaitMigration(ctx context.Context, want ...string) error {
	for {
		select {
		case status := <-m.migration:
			switch {
			case slices.Contains(want, status):
				return nil
			case status == "failed" || status == "cancelled":
				var info struct {
					Error string `json:"error-desc"`
				}
				if err := m.qmp.execute(ctx, "query-migrate", nil, &info); err == nil && info.Error != "" {
					return fmt.Errorf("%w: %s", errFailed, words(info.Error))
				}
				return m.orExit(errFailed)
			}
		case <-m.ended:
			return m.orExit(errors.New("QEMU has ended"))
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
