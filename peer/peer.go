// Package peer owns an instance: a VM with overlays of its own, started from a package or received
// from another peer. A peer starts the instance, backs it up, hands it over to another peer that
// asks for it, and suspends it so that the next start goes on from there.
package peer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"drafter/agent"
	"drafter/internal/block"
	"drafter/internal/deviceset"
	"drafter/internal/expose"
	"drafter/internal/instance"
	"drafter/internal/lifecycle"
	"drafter/internal/logging"
	"drafter/internal/memory"
	"drafter/internal/migration"
	"drafter/internal/process"
	"drafter/internal/stack"
	"drafter/migrate"
	"drafter/network"
	"drafter/signature"
	"drafter/vmm"
)

// Config says which instance to run and how.
type Config struct {
	Host    vmm.Host
	Devices []Device
	// lists Devices, if there are none, once their names are known; see Receive
	Derive func(names []string) ([]Device, error)
	Expose string // "auto", "fuse" or "nbd"; "" for auto
	Limits migrate.Limits

	Verifier *signature.Verifier // accepts packages; nil accepts all

	// MapPrivate runs a VM of a package that it does not change, and that any number of others may
	// run from. Devices have no overlays of the caller's then. What the VM changes is discarded at
	// the end, also after kill -9, unless outputs are named. These are a package then: memory and
	// state under those names, all else beside the memory, under the names of the bases. A VM that
	// has moved away leaves no outputs. One that comes from another peer is refused.
	MapPrivate   bool
	MemoryOutput string // ignored without MapPrivate, as is StateOutput
	StateOutput  string

	SyncInterval time.Duration // pause between backups to S3; 0: 30 s
	// S3Credentials is a file with the credentials of devices that name none; see [s3.Place].
	S3Credentials string

	ResumeTimeout time.Duration // bounds the answer of the agent after a resume; 0: 1 min
	// receive a VM even if its guest does not get ready to be paused; data that the guest has not
	// flushed is as after a power cut
	Force bool
	// connections with the VM end when it moves from here or to here
	NoAnchor bool
	// RescueTimeout bounds the answer of the agent before a suspend. After that the VM is suspended
	// without it. 0: 10 s; below 0: the agent is not waited for.
	RescueTimeout time.Duration

	Hooks Hooks
}

// Hooks are called by a migration, which waits for them. Any of them may be nil.
type Hooks struct {
	OnPhase    func(migrate.Phase) // the migration has entered a phase
	OnProgress func(migrate.Stats) // at most ten times a second, and at the end
	// before the guest is told that it will be paused; an error cancels the migration
	OnBeforeSuspend func(context.Context) error
	// after the guest was told that it runs here; an error is logged, and the VM runs on
	OnAfterResume func(context.Context) error

	// how many bytes of a pulled device are here; called by any goroutine
	OnPull func(device string, done, total int64)
}

// Peer owns one instance. Its methods are called by one goroutine; Done, Stats and Serve by any.
type Peer struct {
	config   Config
	life     lifecycle.Life
	serving  atomic.Bool // somebody is in Serve
	log      *slog.Logger
	claim    *network.Claim
	vacated  atomic.Bool    // the VM runs elsewhere
	vacating sync.WaitGroup // until its clients here were told
	// those that can go on where the VM moves to; nil while none do
	connections atomic.Pointer[network.Departure]
	linked      atomic.Pointer[chan struct{}] // closed when that is known; nil before a migration
	departing   sync.WaitGroup                // until that is known
	user        *vmm.User
	devices     deviceset.Set
	private     *vmm.Dir        // of the private map; nil without one
	leave       func() error    // writes the outputs at the end; nil without a private map
	written     map[string]bool // devices whose outputs are written; nil until that is tried
	moves       migration.Moves
	instance    *instance.Instance
	syncer      *syncer // nil unless the instance is backed up
	endRoom     func()  // ends what watchRoom does; nil before

	refusals, failures logging.Limited // of connections, and of migrations
	// the goroutines that wait for an operator to settle an arrival, and for devices to be whole
	settled      sync.WaitGroup
	configDevice []byte // content of the config device
	// of the package; nil unless only signed ones are accepted
	statement *signature.Statement
	signature []byte // that came with the package; nil if none did

	mu     sync.Mutex // guards the following
	origin origin     // nil unless the package is pulled
	fill   *fill      // nil until the rest of it is pulled
}

// New checks a config. It touches nothing on the host.
func New(c Config) (*Peer, error) {
	if err := c.Host.Complete(); err != nil {
		return nil, err
	}
	c.ResumeTimeout, c.RescueTimeout = cmp.Or(c.ResumeTimeout, time.Minute), cmp.Or(c.RescueTimeout, 10*time.Second)
	c.Devices = slices.Clone(c.Devices)
	p := &Peer{config: c, log: c.Host.Logger}
	p.refusals.Logger, p.failures.Logger = p.log, p.log
	if len(c.Devices) > 0 || c.Derive == nil {
		if err := p.checkDevices(); err != nil {
			return nil, err
		}
	}
	if c.MapPrivate && (c.MemoryOutput == "") != (c.StateOutput == "") {
		return nil, errors.New("a memory output without a state output, or the other way round, cannot be resumed; name both or none")
	}
	way, err := expose.Choose(c.Expose)
	if err != nil {
		return nil, err
	}
	p.config.Expose = way
	return p, nil
}

// derive makes the list of devices, if there is none.
func (p *Peer) derive(names []string) (err error) {
	if len(p.config.Devices) > 0 {
		return nil
	}
	if p.config.Devices, err = p.config.Derive(names); err != nil {
		return err
	}
	return p.checkDevices()
}

func (p *Peer) checkDevices() error {
	var names []string
	var distinct stack.Distinct
	for i := range p.config.Devices {
		d := &p.config.Devices[i]
		names = append(names, d.Name)
		if err := d.checkSettings(); err != nil {
			return fmt.Errorf("device %s: %w", d.Name, err)
		}
		if err := distinct.Add(d.Name, d.files()); err != nil {
			return err
		}
	}
	if _, _, err := p.place(); err != nil {
		return err
	}
	if err := instance.CheckNames(names, vmm.Config, vmm.Memory, vmm.State); err != nil {
		return err
	}
	return p.checkPrivate()
}

// Resume starts the instance. When it returns nil, the VM runs and its agent has answered. On an
// error nothing is left but what Close removes.
func (p *Peer) Resume(ctx context.Context) error {
	if len(p.config.Devices) == 0 {
		return errors.New("resume: Devices is empty; Derive is for a VM that comes from elsewhere")
	}
	if err := p.life.Start(); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	start := time.Now()
	if err := p.verify(nil); err != nil {
		return err
	}
	if err := p.openStore(ctx); err != nil {
		return err
	}
	if err := p.occupy(); err != nil {
		return err
	}
	return p.resume(ctx, start)
}

// resume is Resume once the host is occupied.
func (p *Peer) resume(ctx context.Context, start time.Time) error {
	if err := p.checkHere(ctx); err != nil {
		return err
	}
	if err := p.openDevices(ctx); err != nil {
		return err
	}
	if _, err := vmm.CheckStart(p.devices.Get(vmm.State)); err != nil {
		return fmt.Errorf("state device %s: %w", p.statePath(), err)
	}
	config, err := p.packageConfig()
	if err != nil {
		return err
	}
	if _, err := p.config.Host.Drivers.Select(p.config.Host.VMM, config.Hardware.VMM); err != nil {
		return err
	}
	if err := p.expose(ctx, config); err != nil {
		return err
	}
	launched, err := instance.Launch(ctx, p.config.Host, config, storage{p})
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	i, err := launched.Run(ctx, start, p.config.ResumeTimeout)
	p.own(i)
	if err != nil && p.instance != nil {
		rescue, cancel := context.WithTimeout(context.WithoutCancel(ctx), instance.RescueSuspendTimeout)
		defer cancel()
		err = errors.Join(err, p.Suspend(rescue))
	}
	return err
}

// Booted returns why the instance booted from its disks when it started here; nil if it was resumed,
// or came from elsewhere.
func (p *Peer) Booted() error { return p.instance.Booted() }

// forgetMemory removes the memory of an instance that will boot. It no longer fits anything.
func (p *Peer) forgetMemory(ctx context.Context) error {
	for i := range p.config.Devices {
		if d := &p.config.Devices[i]; d.Name == vmm.Memory {
			err := d.files().Forget(ctx)
			if err == nil {
				err = d.files().ForgetMissing()
			}
			if err != nil {
				return deviceset.Named(d.Name, err)
			}
		}
	}
	return nil
}

// own makes a VM that runs the peer's. A nil VM is ignored.
func (p *Peer) own(i *instance.Instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.instance = i
}

// occupy takes what a VM needs of the host, such as its namespace.
func (p *Peer) occupy() (err error) {
	if err := vmm.ReclaimAll(p.config.Host.BaseDir, p.log); err != nil {
		return err
	}
	if p.claim, err = network.ClaimNamespace(p.config.Host.Netns); err != nil {
		return err
	}
	if p.user, err = p.config.Host.ClaimUser(); err != nil {
		return err
	}
	if !process.Protected() {
		p.log.Warn("This process serves guest memory and may be held up by the kernel; call peer.ProtectProcess before")
	}
	return nil
}

// ProtectProcess prepares this process to serve the memory of VMs: its memory is locked
// (mlockall(2), of what it touches), the kernel's out-of-memory killer spares it (an oom_score_adj
// of -900), and it leaves no core dumps, which would hold what guests have in memory. A VM that
// waits for a page waits for this process, which must not wait for memory that only the VM could
// give back. A program calls it once, before its first VM; it lasts until the process ends. What
// can be had is had, and the error says what cannot.
func ProtectProcess() error { return process.ProtectServer() }

// openDevices opens all devices.
func (p *Peer) openDevices(ctx context.Context) error {
	if err := p.mapPrivately(ctx); err != nil {
		return err
	}
	var names []string
	for _, d := range p.config.Devices {
		names = append(names, d.Name)
	}
	return p.devices.Open(ctx, names, func(ctx context.Context, name string) (*stack.Stack, error) {
		d := p.device(name)
		opened, err := p.open(ctx, d)
		if err == nil {
			err = d.provide(opened)
		}
		return opened, err
	})
}

// device returns the settings of a device that is in the list.
func (p *Peer) device(name string) *Device {
	i := slices.IndexFunc(p.config.Devices, func(d Device) bool { return d.Name == name })
	return &p.config.Devices[i]
}

// packageConfig reads the config device and checks that the others are those it lists.
func (p *Peer) packageConfig() (*vmm.PackageConfig, error) {
	b, err := vmm.ReadConfigDevice(p.devices.Get(vmm.Config))
	if err != nil {
		return nil, err
	}
	config, err := p.decodeConfig(b)
	if err != nil {
		return nil, fmt.Errorf("config device: %w", err)
	}
	sizes := map[string]int64{}
	for name, d := range p.devices.All() {
		sizes[name] = d.Size()
	}
	return config, instance.CheckSizes(config, sizes, p.bases())
}

func (p *Peer) bases() map[string]string {
	bases := map[string]string{}
	for _, d := range p.config.Devices {
		bases[d.Name] = d.Base
	}
	return bases
}

// expose gives paths to the devices that a VMM opens. They are in a directory that the next start
// cleans up if this process is killed.
func (p *Peer) expose(ctx context.Context, config *vmm.PackageConfig) error {
	host := p.config.Host
	p.endRoom = p.watchRoom(ctx)
	var devices []expose.Device
	for _, d := range p.config.Devices {
		kind := expose.Disk
		switch d.Name {
		case vmm.State, vmm.Config, vmm.Memory:
			continue
		case vmm.Kernel:
			kind = expose.File
			if s := config.Initrd; s != nil && s.Size > 0 && p.config.Expose == expose.FUSE {
				devices = append(devices, expose.Device{Name: vmm.Initrd, Kind: kind, Device: block.Section(p.devices.Get(d.Name), s.Offset, s.Size)})
			}
		}
		devices = append(devices, expose.Device{Name: d.Name, Kind: kind, Device: p.devices.Get(d.Name)})
	}
	return p.devices.Expose(ctx, deviceset.Place{Base: host.BaseDir, Owner: "peer", Way: p.config.Expose, UID: host.UID, GID: host.GID, Logger: p.log}, devices)
}

// storage is where the instance finds its devices.
type storage struct{ p *Peer }

func (s storage) Path(name string) string {
	if name == vmm.Initrd && s.p.config.Expose != expose.FUSE {
		return "" // the size of a block device is a multiple of its sectors
	}
	return s.p.devices.Path(name)
}

func (s storage) Sync(name string) error { return s.p.devices.Get(name).Sync() }

// Memory gives the memory device itself, like State.
func (s storage) Memory() (*memory.Device, func() error, error) {
	return s.p.devices.Get(vmm.Memory).Memory, func() error { return nil }, nil
}

// State gives the state device itself, and not a path to it: this is the only way in which a
// migration reads and writes it.
func (s storage) State() (instance.StateDevice, error) {
	return borrowed{s.p.devices.Get(vmm.State).Tracker, s.p.statePath()}, nil
}

// borrowed is a device for a user that does not close it.
type borrowed struct {
	*block.Tracker
	path string
}

func (borrowed) Close() error   { return nil }
func (b borrowed) Name() string { return b.path }

// statePath is the file that the state device writes to.
func (p *Peer) statePath() string {
	i := slices.IndexFunc(p.config.Devices, func(d Device) bool { return d.Name == vmm.State })
	return cmp.Or(p.config.Devices[i].Overlay, p.config.Devices[i].Base)
}

// Done is closed when the VM has ended by itself; Wait then says how. It is nil before the VM runs.
func (p *Peer) Done() <-chan struct{} { return p.instance.Done() }

// Wait blocks until the VM ends by itself. It returns nil if the guest powered itself off. The
// error includes the failures of devices.
func (p *Peer) Wait() error {
	if err := p.life.Running(); err != nil {
		return fmt.Errorf("wait: %w", err)
	}
	return errors.Join(p.instance.Wait(), p.devices.Failed())
}

// Agent is the connection with the guest's agent; nil before the VM runs, and after it was
// suspended.
func (p *Peer) Agent() *agent.Client { return p.instance.Agent() }

// Suspend stops the VM and leaves it in its devices. Pass another context than the run's, which may
// have ended: a suspend is how a run ends well. If the VM is still arriving, Suspend waits for the
// rest first. If the instance is backed up, Suspend makes a last backup. A VM that cannot be
// stored, for example for want of room (see [vmm.Unstored]), runs on, and Suspend can be tried
// again. A VM whose changes are discarded is ended only. Call Close afterwards.
func (p *Peer) Suspend(ctx context.Context) error {
	start := time.Now()
	if err := p.life.Running(); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	if p.discards() && p.syncer == nil && p.instance != nil {
		p.log.Info("Discarding what the VM has changed")
		return p.instance.Close()
	}
	if err := p.awaitArrival(ctx); err != nil {
		if errors.Is(err, migrate.ErrTakenBack) {
			err = errors.Join(err, p.instance.Mark(vmm.Moved))
		}
		return fmt.Errorf("suspend: %w", err)
	}
	if err := p.awaitBackup(ctx); err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	saved, err := p.instance.Suspend(ctx, p.config.RescueTimeout)
	if err = errors.Join(err, p.devices.Failed()); !saved {
		return err // and the VM runs on, unless it has ended
	}
	// What arrived last is durable only since the suspend, if at all before.
	err = errors.Join(err, p.forgetMissing(), p.instance.Close())
	if p.written == nil {
		p.log.Info("Suspended VM", "took", time.Since(start).Round(time.Millisecond), "paused", p.instance.SuspendPause().Round(10*time.Microsecond))
	}
	err = errors.Join(err, p.storeOutputs(ctx))
	if err == nil && p.syncer != nil {
		err = p.syncer.finish(context.WithoutCancel(ctx), p)
	}
	return err
}

// Close ends the VM without saving it, if it still runs, and removes what the run needed on the
// host. It makes durable what was written to the disks until then, and writes the outputs of a
// private map, unless the VM has moved away.
func (p *Peer) Close() error {
	p.life.Close()
	moved, err := p.moves.Close()
	errs := []error{err}
	p.settled.Wait()
	p.stopPull() // a VMM that waits for a page cannot be ended
	if p.instance != nil {
		errs = append(errs, p.instance.Close())
	}
	if p.instance != nil && !moved && p.leave != nil && p.written == nil {
		errs = append(errs, p.leave())
	}
	errs = append(errs, p.closeStore(), p.closeDevices(!moved && !p.discards()), p.endPull(), p.user.Close())
	p.user = nil
	if p.private != nil {
		errs = append(errs, p.private.Close())
		p.private = nil
	}
	p.vacating.Wait()
	p.stay()
	if p.claim != nil {
		errs = append(errs, p.claim.Close())
		p.claim = nil
	}
	return errors.Join(errs...)
}

// closeDevices removes the devices' paths and closes the devices.
func (p *Peer) closeDevices(sync bool) error {
	err := p.devices.Hide()
	if p.endRoom != nil {
		p.endRoom()
		p.endRoom = nil
	}
	return errors.Join(err, p.devices.Close(sync))
}
