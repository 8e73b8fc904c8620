package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"

	"drafter/api"
	"drafter/internal/detached"
	"drafter/internal/newfile"
	"drafter/internal/private"
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

// The files in a VM's directory.
const (
	recordFile   = "vm.json"
	forwardsLock = "ports.lock"
	portsLog     = "ports.log"
)

const (
	mostRecord  = 256 << 10 // bytes of a new record
	mostError   = 4 << 10   // bytes of what is noted of a failure
	endPatience = time.Minute
	// A VM that has come from elsewhere may have to be suspended here, with all that it has.
	arrivalPatience = 10 * time.Minute
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
