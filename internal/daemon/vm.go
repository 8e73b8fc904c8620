package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/detached"
	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/peer"
)

// vm is a VM of this host.
type vm struct {
	d     *Daemon
	dir   string
	busy  *semaphore.Weighted // of 1: the operation that changes it
	ports ports
	again again

	// guarded by d.mu
	record  api.VM
	process *process                // that owns it, until it is noted how that has ended
	cancel  context.CancelCauseFunc // ends the operation that changes it; nil if there is none
}

// process is a VM's process.
type process struct {
	*detached.Process

	seat  seat
	ran   time.Time     // when it was known to run; guarded by d.mu
	noted chan struct{} // closed once it is noted how it has ended
	end   *control.End  // then; nil if it was killed
	last  api.VM        // the record then

	leave     <-chan struct{} // closed when the daemon ends
	successor bool            // guarded by d.mu: another process has the VM now
}

// The files in a VM's directory.
const (
	recordFile   = "vm.json"
	forwardsLock = "ports.lock"
	portsLog     = "ports.log"
)

// seat is a directory of a VM for one process that owns it. A VM that moves has another one after.
type seat string

func (s seat) control() string  { return filepath.Join(string(s), "control") }
func (s seat) instance() string { return filepath.Join(string(s), "instance") }
func (s seat) log() string      { return filepath.Join(string(s), "process.log") }
func (s seat) lock() string     { return control.LockFile(s.control()) }

// seat is the one that the VM has.
func (v *vm) seat() seat { return v.seatAfter(v.look().Moves) }

// seatAfter is the one that the VM has after so many moves.
func (v *vm) seatAfter(moves int) seat { return seat(v.path(strconv.Itoa(moves))) }

const (
	mostRecord  = 256 << 10 // bytes of a new record
	mostError   = 4 << 10   // bytes of what is noted of a failure
	endPatience = time.Minute
)

func (d *Daemon) newVM(dir string) *vm {
	return &vm{d: d, dir: d.dir("vms", dir), busy: semaphore.NewWeighted(1)}
}

func (v *vm) path(name string) string { return filepath.Join(v.dir, name) }

// read reads the record. A VM without one is no error.
func (v *vm) read() (there bool, err error) {
	b, err := private.ReadFile(v.path(recordFile), 4*mostRecord)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &v.record)
	}
	if err == nil && v.record.ID != filepath.Base(v.dir) {
		err = errors.New("it is that of another VM")
	}
	if err != nil {
		return false, fmt.Errorf("read record: %w", err)
	}
	return true, nil
}

// write makes a record durable.
func (v *vm) write(r api.VM) error {
	b, err := json.Marshal(r)
	if err == nil {
		err = newfile.WriteBytes(v.path(recordFile), b)
	}
	if err != nil {
		return fmt.Errorf("record VM %s: %w", r.Name, err)
	}
	return nil
}

// look returns the record.
func (v *vm) look() api.VM {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.record
}

// change changes the record, if that can be made durable, and tells of the new state.
func (v *vm) change(f func(*api.VM)) error {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.changeLocked(f)
}

func (v *vm) changeLocked(f func(*api.VM)) error {
	after := v.record
	f(&after)
	if err := v.write(after); err != nil {
		return err
	}
	v.becomeLocked(after)
	return nil
}

// becomeLocked sets the record and tells of the new state.
func (v *vm) becomeLocked(after api.VM) {
	before := v.record.State
	v.record = after
	if before != after.State {
		v.d.events.add("vm."+after.State, after)
	}
}

// acquire waits until nobody else changes the VM. cancel ends what the caller does, for those who end
// the VM at once. Call release.
func (v *vm) acquire(ctx context.Context, cancel context.CancelCauseFunc) error {
	if err := v.busy.Acquire(ctx, 1); err != nil {
		return context.Cause(ctx)
	}
	v.d.mu.Lock()
	v.cancel = cancel
	v.d.mu.Unlock()
	return nil
}

func (v *vm) release() {
	v.d.mu.Lock()
	v.cancel = nil
	v.d.mu.Unlock()
	v.busy.Release(1)
}

var errEndedAtOnce = errors.New("the VM was ended meanwhile")

// interrupt ends the VM's process at once, and whoever changes the VM.
func (v *vm) interrupt() error {
	v.d.mu.Lock()
	cancel, p := v.cancel, v.process
	v.d.mu.Unlock()
	if cancel != nil {
		cancel(errEndedAtOnce)
	}
	if p != nil {
		return p.Signal(syscall.SIGKILL)
	}
	starting, err := detached.Find(v.seat().lock())
	if starting == nil || err != nil {
		return err
	}
	return errors.Join(starting.Signal(syscall.SIGKILL), starting.Close())
}

// recover finds the VM's process, if it lives, and else how it has ended.
func (v *vm) recover() error {
	found, err := detached.Find(v.seat().lock())
	if err != nil {
		return err
	}
	r := v.look()
	if r.Moves > 0 { // it may have left that seat when the last daemon was killed
		if err := v.leaveSeat(r.Moves - 1); err != nil {
			v.d.log.Error("What a VM has left behind as it moved stays", "vm", r.Name, "error", err)
		}
	}
	switch {
	case r.State == api.Moving && r.Next != "":
		return v.recoverUpgrade(found)
	case r.State == api.Moving && found != nil:
		v.own(found)
		v.resumeMove()
		return nil
	case r.State == api.Arriving && found == nil:
		return v.hasNotArrived(v.d.ctx)
	}
	if found == nil {
		return v.recoverEnded()
	}
	v.own(found)
	// The last daemon may have been killed as it started or stopped the VM. It goes on.
	v.d.work.Go(func() {
		ctx, cancel := context.WithCancelCause(v.d.ctx)
		defer cancel(nil)
		err := v.acquire(ctx, cancel)
		if err == nil {
			defer v.release()
			if err = v.d.startNAT(ctx); err == nil {
				err = v.awaitRunning(ctx)
			}
			if err == nil && v.look().State == api.Running { // it may have been giving a copy
				_, err = withdraw(ctx, v.seat())
			}
		}
		if err != nil && ctx.Err() == nil {
			v.d.log.Error("A VM that the last daemon has started does not answer", "vm", r.Name, "error", err)
		}
	})
	return nil
}

// recoverEnded finds out how the VM has ended, which no process has.
func (v *vm) recoverEnded() (err error) {
	r := v.look()
	ended := []string{api.Stopped, api.Exited, api.Failed, api.Moved}
	if !slices.Contains(ended, r.State) {
		err = v.hasEnded(v.d.ctx)
		r = v.look()
	}
	switch {
	case r.State == api.Moved:
		if perr := v.publish(v.d.ctx); !errors.Is(perr, errEnded) {
			err = errors.Join(err, perr)
		}
		v.keepMoved()
	case r.Remove:
		if uerr := v.unsettled(); uerr != nil {
			return errors.Join(err, fmt.Errorf("it is kept: %w", uerr))
		}
		err = errors.Join(err, v.destroy(v.d.ctx))
	}
	return err
}

// own makes a process the VM's, and watches it.
func (v *vm) own(p *detached.Process) {
	owner := &process{Process: p, seat: v.seat(), noted: make(chan struct{}), leave: v.d.ctx.Done()}
	v.d.mu.Lock()
	v.process = owner
	v.d.mu.Unlock()
	v.d.work.Go(func() { v.watch(owner) })
}

// start starts the VM, which is acquired. Its process gets further arguments.
func (v *vm) start(ctx context.Context, more ...string) error {
	if err := v.d.startNAT(ctx); err != nil {
		return err
	}
	if err := v.isStarting(); err != nil {
		return err
	}
	p, err := v.startProcesses(ctx, more)
	if v.d.ctx.Err() != nil { // the VM goes on, and the next daemon finds it
		if p != nil {
			err = errors.Join(err, p.Close())
		}
		return errors.Join(err, detached.ErrLeave)
	}
	if err != nil {
		return errors.Join(err, v.hasEnded(context.WithoutCancel(ctx)), v.change(func(r *api.VM) {
			if r.State == api.Failed {
				r.Error = bounded(err.Error())
			}
		}))
	}
	v.own(p) //nolint:contextcheck // the process is watched when its caller has gone, too
	if err := v.awaitRunning(ctx); err != nil {
		if v.d.ctx.Err() != nil {
			return err
		}
		return errors.Join(err, v.end(context.WithoutCancel(ctx)))
	}
	return nil
}

// isStarting notes that the VM starts, and in which namespace.
func (v *vm) isStarting() error {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	switch r := v.record; {
	case v.d.drained():
		return errDrained
	case r.State == api.Moved:
		return fmt.Errorf("VM %s runs on host %s: %w", r.Name, r.Host, ErrConflict)
	case v.process != nil || r.State == api.Arriving:
		return fmt.Errorf("VM %s is %s already: %w", r.Name, r.State, ErrConflict)
	}
	ns, err := v.d.namespace()
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	return v.changeLocked(func(r *api.VM) {
		r.State, r.Namespace, r.Error, r.Started, r.ExitStatus, r.UserStopped = api.Starting, ns, "", &now, nil, false
		r.Host, r.Cgroup = "", v.d.groupPath(r.ID, r.Moves)
	})
}

// startProcesses starts the VM's process, and beside it the one that publishes its ports, because each
// takes its time. It returns once the VM runs.
func (v *vm) startProcesses(ctx context.Context, more []string) (*detached.Process, error) {
	published := make(chan error, 1)
	go func() { published <- v.publishEarly(ctx) }()
	r := v.look()
	p, err := v.launch(ctx, r.Moves, r.Namespace, append([]string{"--raddr", ""}, more...)...)
	if perr := <-published; perr != nil { // awaitRunning tries again
		v.d.log.Debug("The ports of a VM are not published before it runs", "vm", r.Name, "error", perr)
	}
	return p, err
}

// launch starts a process for the VM in its seat after so many moves, and returns once the VM runs
// there. Further arguments say where it comes from.
func (v *vm) launch(ctx context.Context, moves int, ns string, from ...string) (*detached.Process, error) {
	r, s := v.look(), v.seatAfter(moves)
	dir := s.control()
	if err := private.MkdirAll(dir); err != nil {
		return nil, err
	}
	if p, err := detached.Find(s.lock()); p != nil || err != nil { // nobody knows how it came to be
		if p != nil {
			err = errors.Join(fmt.Errorf("VM %s is run by process %d: %w", r.Name, p.PID, ErrConflict), p.Close())
		}
		return nil, err
	}
	// How it ended last is not how it ends now. It may be cut off before it has got so far itself.
	if err := control.Forget(dir); err != nil {
		return nil, err
	}
	group, err := v.enterGroup(moves)
	if err != nil {
		return nil, err
	}
	defer group.Close()
	args := append([]string{
		"peer", "--laddr", "", "--netns", ns, "--chroot-base-dir", v.d.dir("vmm"),
		"--enable-output=false", "--package", v.packageDir(r),
		"--instance", s.instance(), "--control", dir,
	}, from...)
	if len(r.Egress) > 0 {
		args = append(args, "--egress", strings.Join(r.Egress, ","))
	}
	p, err := detached.Start(ctx, detached.Command{
		Lock: s.lock(), Program: v.d.config.Program, Log: s.log(), Cgroup: group, Args: args,
	})
	if err != nil {
		return nil, fmt.Errorf("start VM %s: %w: %s", r.Name, err, s.lastWords())
	}
	return p, nil
}

// lastWords is why the seat's process says that it has ended.
func (s seat) lastWords() string {
	end, err := control.LastEnd(s.control())
	switch {
	case err != nil:
		return err.Error()
	case end == nil:
		return "see " + s.log()
	}
	return end.Error
}

// awaitRunning waits until the VM's process says that it runs, and publishes its ports.
func (v *vm) awaitRunning(ctx context.Context) error {
	status, err := awaitState(ctx, v.owner(), v.seat())
	if errors.Is(err, errEnds) {
		return nil // watch hears of the end
	}
	if err != nil {
		return err
	}
	if err := v.publish(ctx); err != nil {
		if v.look().State != api.Arriving || errors.Is(err, errEnded) || v.d.ctx.Err() != nil {
			return err
		}
		v.insistPublish() // it runs here, and cannot go back
	}
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	if v.process == nil {
		return errEnded // and that is noted
	}
	v.process.ran = time.Now()
	return v.changeLocked(func(r *api.VM) {
		r.State, r.Booted, r.PID, r.Error = api.Running, status.GetBooted(), int(status.GetPid()), ""
		r.Host = ""
	})
}

// errEnds says that a VM's process ends.
var errEnds = errors.New("the VM ends")

// awaitState waits until a seat's VM runs, which a process has or gets.
func awaitState(ctx context.Context, p *process, s seat) (status *control.StatusResponse, err error) {
	c, err := dial(ctx, p, s)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	for status.GetState() != control.Running {
		status, err = c.Status(ctx, &control.StatusRequest{State: status.GetState()})
		if err != nil {
			return nil, errors.Join(context.Cause(ctx), err)
		}
		if status.GetState() == control.Ending {
			return nil, errEnds
		}
	}
	return status, nil
}

// listenPause is how often a process is called that has just been started, and does not listen yet.
const listenPause = 10 * time.Millisecond

// dial calls a seat's process. It may be one that the last daemon was killed over as it started it.
func dial(ctx context.Context, p *process, s seat) (*control.Client, error) {
	for {
		c, err := control.Dial(ctx, s.control())
		if err == nil || !errors.Is(err, control.ErrNone) || p == nil {
			return c, err
		}
		select {
		case <-p.Done():
			return nil, errEnded
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(listenPause):
		}
	}
}

// watch waits until the VM's process has ended, or the daemon does.
func (v *vm) watch(p *process) {
	select {
	case <-v.d.ctx.Done():
		return
	case <-p.Done():
	}
	var err error
	if p.end, err = control.LastEnd(p.seat.control()); err != nil {
		v.d.log.Error("How a VM's process has ended is not known", "error", err)
	}
	if v.hasSuccessor(p) {
		close(p.noted)
		if err := p.Close(); err != nil {
			v.d.log.Error("Forget a process", "error", err)
		}
		return
	}
	if r := v.look(); r.State == api.Arriving {
		v.d.mu.Lock()
		v.process = nil
		v.d.mu.Unlock()
		close(p.noted)
		if err := errors.Join(p.Close(), v.removeArrival()); err != nil && v.d.ctx.Err() == nil {
			v.d.log.Error("What has come of a VM stays", "vm", r.Name, "error", err)
		}
		return
	}
	err = errors.Join(v.hasEnded(v.d.ctx), p.Close())
	close(p.noted)
	r := v.look()
	switch {
	case r.State == api.Moved:
		v.keepMoved()
	case r.Remove && r.State != api.Removing:
		err = errors.Join(err, v.removeEnded())
	}
	v.keepRunning(p)
	if err != nil && v.d.ctx.Err() == nil {
		v.d.log.Error("What a VM has left is not put in order", "vm", r.Name, "error", err)
	}
}

// removeEnded removes a VM that was to be removed at its end, unless it was started again, or removed.
func (v *vm) removeEnded() error {
	if err := v.unsettled(); err != nil {
		return fmt.Errorf("VM %s is kept: %w", v.look().Name, err)
	}
	return v.removeIf(func(api.VM) bool { return true })
}

// unsettled returns nil unless an operator must settle whose a VM is that has ended.
func (v *vm) unsettled() error {
	devices, err := peer.PackageDevices(v.packageDir(v.look()), v.seat().instance())
	if errors.Is(err, os.ErrNotExist) { // nothing has come yet
		devices, err = v.seat().state(), nil
	}
	if err != nil {
		return err
	}
	return peer.Unsettled(devices)
}

// removeIf removes the VM once nobody changes it, if it does not run then and f says so.
func (v *vm) removeIf(f func(api.VM) bool) error {
	if err := v.acquire(v.d.ctx, nil); err != nil {
		return err
	}
	defer v.release()
	v.d.mu.Lock()
	ended := v.process == nil && v.d.vms[v.record.ID] == v && f(v.record)
	v.d.mu.Unlock()
	if !ended {
		return nil
	}
	return v.destroy(v.d.ctx)
}

// hasEnded notes how the VM has ended, and gives back what it had of the host. It is noted here, too,
// if that cannot be made durable: the next daemon finds out by itself.
func (v *vm) hasEnded(ctx context.Context) error {
	end, err := control.LastEnd(v.seat().control())
	if end == nil {
		err = errors.Join(err, v.d.reclaim())
		end = &control.End{Outcome: control.Failed, Error: "its process was killed", At: time.Now().UTC()}
	}
	if end.Outcome == control.Moved && v.look().Host == "" { // within this host, where it has ended, too
		v.takeNext()
		return errors.Join(err, v.hasEnded(ctx))
	}
	if end.Outcome != control.Moved {
		err = errors.Join(err, v.unpublish(ctx))
	}
	short, gerr := leaveGroup(v.look().Cgroup)
	err = errors.Join(err, gerr)
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	owner := v.process
	v.process = nil
	r := v.record
	if owner != nil {
		defer func() { owner.last = r }()
	}
	if r.State == api.Removing {
		return err
	}
	r.Error = ""
	if gerr == nil {
		r.Cgroup = ""
	}
	switch end.Outcome {
	case control.Suspended:
		r.State = api.Stopped
	case control.PoweredOff:
		r.State = api.Exited
	case control.Moved:
		r.State, r.PID = api.Moved, 0
		v.becomeLocked(r)
		return errors.Join(err, v.write(r))
	default:
		if short {
			end.Error = outOfMemory(r) + ": " + end.Error
		}
		r.State, r.Error = api.Failed, bounded(end.Error)
	}
	r.Namespace, r.Anchor, r.Next, r.Host = "", "", "", ""
	r.PID, r.Ended, r.ExitStatus = 0, &end.At, end.ExitStatus
	v.becomeLocked(r)
	return errors.Join(err, v.write(r))
}

func bounded(text string) string { return text[:min(len(text), mostError)] }

// errEnded says that the VM's process has ended.
var errEnded = errors.New("the VM has ended")

// runs returns the VM's process.
func (v *vm) runs() (*process, error) {
	if p := v.owner(); p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("VM %s does not run: %w", v.look().Name, ErrConflict)
}

// owner returns the process that owns the VM, nil for one that does not run.
func (v *vm) owner() *process {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.process
}

// stop suspends the VM, which is acquired, for a user or for the host's shutdown.
func (v *vm) stop(ctx context.Context, user bool) error {
	p, err := v.runs()
	if err != nil {
		return err
	}
	if err := v.change(func(r *api.VM) { r.State, r.UserStopped = api.Stopping, user }); err != nil {
		return err
	}
	if err := errors.Join(p.Signal(syscall.SIGTERM), p.awaitEnd(ctx)); err != nil {
		return err
	}
	name := v.look().Name
	switch end, err := control.LastEnd(v.seat().control()); {
	case err != nil:
		return err
	case end == nil:
		return fmt.Errorf("suspend VM %s: its process was killed before it was; what its memory held is lost", name)
	case end.Error != "":
		return fmt.Errorf("suspend VM %s: %s", name, end.Error)
	}
	return nil
}

// kill waits for the end of a VM that was interrupted, and is acquired.
func (v *vm) kill(ctx context.Context) error {
	p := v.owner()
	if p == nil {
		return nil // that is noted
	}
	return errors.Join(p.Signal(syscall.SIGKILL), p.awaitEnd(ctx))
}

// end ends a VM that does not start as it should.
func (v *vm) end(ctx context.Context) error {
	p := v.owner()
	if p == nil {
		return nil // it has ended by itself
	}
	return errors.Join(p.End(endPatience), p.awaitEnd(ctx))
}

// awaitEnd waits until a process of the VM has ended and that is noted.
func (p *process) awaitEnd(ctx context.Context) error {
	if p == nil {
		return nil
	}
	select {
	case <-p.noted:
		return nil
	case <-p.leave:
		return detached.ErrLeave
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// destroy removes the VM, which may run, and all that is left of it.
func (v *vm) destroy(ctx context.Context) error {
	r := v.look() // zero for one without a record
	if r.ID != "" {
		if err := v.isRemoved(); err != nil {
			return err
		}
	}
	if err := v.endAtOnce(ctx); err != nil {
		return err
	}
	if err := errors.Join(v.unpublish(ctx), v.endAnchors(r)); err != nil {
		return err
	}
	for moves := range r.Moves + 2 {
		if err := v.leaveSeat(moves); err != nil {
			return err
		}
	}
	// The record goes last, so that the next daemon goes on.
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != recordFile {
			if err := os.RemoveAll(v.path(e.Name())); err != nil {
				return err
			}
		}
	}
	if err := errors.Join(newfile.Remove(v.path(recordFile)), os.Remove(v.dir)); err != nil {
		return err
	}
	v.d.mu.Lock()
	delete(v.d.vms, r.ID)
	v.d.mu.Unlock()
	if r.ID != "" {
		v.d.events.add(removedEvent, r)
	}
	return nil
}

// isRemoved notes that the VM is removed. On a full disk that is noted by the lack of a record.
func (v *vm) isRemoved() error {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	r := v.record
	r.State = api.Removing
	v.becomeLocked(r)
	if err := v.write(r); err != nil {
		return newfile.Remove(v.path(recordFile))
	}
	return nil
}

// packageDir is the package that the VM runs from. That of a VM which has come from elsewhere need not
// be here: then all of the VM is in its instance.
func (v *vm) packageDir(r api.VM) string {
	if r.Foreign {
		return v.path("package")
	}
	return v.d.dir("packages", r.Package)
}

// endAtOnce kills the VM's processes, if there are any, also those of the last daemon.
func (v *vm) endAtOnce(ctx context.Context) (err error) {
	if p := v.owner(); p != nil {
		err = errors.Join(p.Signal(syscall.SIGKILL), p.awaitEnd(ctx))
	}
	for moves := range v.look().Moves + 2 {
		err = errors.Join(err, v.d.endSeat(ctx, v.seatAfter(moves)))
	}
	return err
}

// endSeat kills the process that a seat has, if there is one.
func (d *Daemon) endSeat(ctx context.Context, s seat) error {
	p, err := detached.Find(s.lock())
	if p == nil || err != nil {
		return err
	}
	if err = p.Signal(syscall.SIGKILL); err == nil {
		select {
		case <-p.Done():
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return errors.Join(err, p.Close(), d.reclaim())
}

// forget lets the VM's processes go on without the daemon.
func (v *vm) forget() error {
	var errs []error
	if v.process != nil {
		errs = append(errs, v.process.Close())
	}
	if v.ports.forwarder != nil {
		errs = append(errs, v.ports.forwarder.Close())
	}
	return errors.Join(errs...)
}
