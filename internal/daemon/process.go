package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"drafter/api"
	"drafter/internal/control"
	"drafter/internal/detached"
	"drafter/internal/private"
)

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

// own makes a process the VM's, and watches it, also when its caller has gone.
func (v *vm) own(p *detached.Process) {
	owner := &process{Process: p, seat: v.seat(), noted: make(chan struct{}), leave: v.d.ctx.Done()}
	v.d.mu.Lock()
	v.process = owner
	v.d.mu.Unlock()
	v.d.work.Go(func() { v.watch(owner) })
}

// owner returns the process that owns the VM, nil for one that does not run.
func (v *vm) owner() *process {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	return v.process
}

// runs returns the VM's process.
func (v *vm) runs() (*process, error) {
	if p := v.owner(); p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("VM %s does not run: %w", v.look().Name, ErrConflict)
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
	v.own(p) //nolint:contextcheck // see own
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

// packageDir is the package that the VM runs from. That of a VM which has come from elsewhere need not
// be here: then all of the VM is in its instance.
func (v *vm) packageDir(r api.VM) string {
	if r.Foreign {
		return v.path("package")
	}
	return v.d.dir("packages", r.Package)
}

// launch starts a process for the VM in its seat after so many moves, and returns once the VM runs
// there. Further arguments begin with --raddr, which says
// where it comes from; "" for here.
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
	patience := time.Duration(0)
	if from[1] != "" {
		patience = arrivalPatience
	}
	p, err := detached.Start(ctx, detached.Command{
		Lock: s.lock(), Program: v.d.config.Program, Log: s.log(), Cgroup: group, Args: args, Patience: patience,
	})
	if err != nil {
		return nil, fmt.Errorf("start VM %s: %w: %s", r.Name, err, s.lastWords())
	}
	return p, nil
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

// errEnded says that the VM's process has ended.
var errEnded = errors.New("the VM has ended")

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
