package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/instance"
	"drafter/internal/memory"
	"drafter/internal/sparse"
	"drafter/network"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// moveOwn moves the guest as QEMU does by itself, as its users have it: memory is QEMU's own, and
// both sides have the same disks, which they must see to.
func (b *bench) moveOwn(ctx context.Context, w *watcher, c contest, l link, o opponent) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("the move is not over after %s", patience))
	defer cancel()
	g, err := b.ownGuest(ctx, c.load, c.gib)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	saved, err := b.savedOwn(ctx, g)
	if err != nil {
		return err
	}
	source, err := g.start(ctx, qemu.Driver{Own: true, Dir: g.dir}, 0, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.close()) }()
	if err := source.load(ctx, saved); err != nil {
		return err
	}
	sourcePID, err := vmmIn(source.dir.Path())
	if err != nil {
		return err
	}
	cpu := settleMeasured(sourcePID)
	defer cpu.end()
	began := time.Now()
	there := g
	if o.own.Disks {
		if there, err = g.withoutDisks(); err != nil {
			return err
		}
	}
	target, err := there.start(ctx, qemu.Driver{Own: true, Dir: g.dir}, 1, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.close()) }()
	targetPID, err := vmmIn(target.dir.Path())
	if err != nil {
		return err
	}
	cpu.add(targetPID)
	incoming, outgoing := filepath.Join(g.dir, "incoming"), filepath.Join(g.dir, "outgoing")
	if err := target.ReceiveOwn(ctx, incoming, *o.own); err != nil {
		return err
	}
	p, err := l.through(ctx, "unix", outgoing, incoming)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	starts := time.Now() // the target waits
	var disks int64
	endDisks := func() error { return nil }
	if o.own.Disks {
		if endDisks, err = mirrorDisks(ctx, l, source, target, &disks); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, endDisks()) }()
	}
	mirrored := time.Since(starts)
	rctx, stop := context.WithCancel(ctx)
	defer stop()
	runs := make(chan error, 1)
	go func() { runs <- target.RunOwn(rctx) }()
	result, err := source.SendOwn(ctx, outgoing, *o.own)
	if err != nil {
		stop()
		return errors.Join(err, <-runs)
	}
	whole := time.Since(began)
	if err := <-runs; err != nil {
		return err
	}
	time.Sleep(agentAfter)
	if err := target.talk(ctx); err != nil {
		return err
	}
	_, _ = w.first(time.Now(), longestSilence) // as with ours
	time.Sleep(500 * time.Millisecond)
	b.add(c.key(o.name, "cpu_s"), cpu.seconds())
	b.add(c.key(o.name, "downtime_ms"), ms(result.Downtime))
	if err := endDisks(); err != nil {
		return err
	}
	if o.own.Disks {
		if data, err := g.diskData(); err != nil || disks < data*9/10 {
			return errors.Join(fmt.Errorf("QEMU has sent %d bytes of disks that hold %d", disks, data), err)
		}
		b.add(c.key(o.name, "disks_ms"), ms(mirrored))
	}
	b.add(c.key(o.name, "total_ms"), ms(mirrored+result.Total))
	b.add(c.key(o.name, "whole_ms"), ms(whole))
	b.add(c.key(o.name, "mb"), float64(result.Bytes+disks)/1e6)
	b.add(c.key(o.name, "memory_mb"), float64(result.Bytes)/1e6)
	return b.addGaps(c, o, w.between(began, time.Now()), g.console.between(began, time.Now()))
}

// agentAfter is when a target of ours calls its guest's agent.
const agentAfter = 150 * time.Millisecond

// mirrorDisks lets QEMU bring the disks to the target over the link, and returns once both have the
// same. end counts the bytes that it took, also what the guest has written until it was paused.
func mirrorDisks(ctx context.Context, l link, source, target *ownMachine, carried *int64) (end func() error, err error) {
	incoming, outgoing := filepath.Join(source.guest.dir, "disks-incoming"), filepath.Join(source.guest.dir, "disks-outgoing")
	if err := target.ExportOwn(ctx, incoming); err != nil {
		return nil, err
	}
	p, err := l.through(ctx, "unix", outgoing, incoming)
	if err != nil {
		return nil, err
	}
	end = sync.OnceValue(func() error {
		err := p.close()
		*carried = p.carried.Load()
		return err
	})
	if err := source.MirrorOwn(ctx, outgoing); err != nil {
		return nil, errors.Join(err, end())
	}
	return end, nil
}

// diskData is how many bytes the guest's disks hold, without holes.
func (g *ownGuest) diskData() (bytes int64, err error) {
	for _, name := range g.config.Disks() {
		var st unix.Stat_t
		if err := unix.Stat(g.paths[name], &st); err != nil {
			return 0, fmt.Errorf("stat disk %s: %w", name, err)
		}
		bytes += st.Blocks * 512 // stat(2)
	}
	return bytes, nil
}

// withoutDisks is the guest where its disks are still to come: they are empty.
func (g *ownGuest) withoutDisks() (*ownGuest, error) {
	there := *g
	there.paths = maps.Clone(g.paths)
	for _, name := range g.config.Disks() {
		info, err := os.Stat(g.paths[name])
		if err != nil {
			return nil, err
		}
		there.paths[name] = g.paths[name] + ".target"
		if err := os.WriteFile(there.paths[name], nil, 0o600); err != nil {
			return nil, err
		}
		if err := os.Truncate(there.paths[name], info.Size()); err != nil {
			return nil, err
		}
	}
	return &there, nil
}

// ownGuest is a guest under QEMU without our engine. Its disks are copies of a package's.
type ownGuest struct {
	name       string
	dir        string // on a tmpfs
	vms        string
	pkg        string
	config     *vmm.PackageConfig
	generation uuid.UUID // which it keeps where it moves to, as with ours
	console    *pulse
	paths      instance.Paths // but for memory's
	backing    string         // of memory of QEMU's own
}

func (b *bench) ownGuest(ctx context.Context, load string, gib int) (_ *ownGuest, err error) {
	g := &ownGuest{name: fmt.Sprintf("%s-%d", load, gib), vms: filepath.Join(b.dir, "vms"), console: &pulse{}, paths: instance.Paths{}}
	if g.pkg, err = b.snapshot(ctx, load, gib); err != nil {
		return nil, err
	}
	if g.config, err = vmm.ReadPackageConfig(filepath.Join(g.pkg, vmm.PackageFile(vmm.Config))); err != nil {
		return nil, err
	}
	if g.generation, err = uuid.NewRandom(); err != nil {
		return nil, err
	}
	if g.dir, err = os.MkdirTemp("/dev/shm", "drafter-bench-"); err != nil {
		return nil, err
	}
	for _, d := range g.config.Devices {
		if d.Name == vmm.Memory {
			continue
		}
		if g.paths[d.Name], err = g.copyDevice(ctx, d.Name); err != nil {
			return nil, errors.Join(err, g.close())
		}
	}
	return g, nil
}

// copyDevice copies a device of the package, and returns where to.
func (g *ownGuest) copyDevice(ctx context.Context, name string) (string, error) {
	to := filepath.Join(g.dir, vmm.PackageFile(name))
	return to, sparse.CopyFile(ctx, to, filepath.Join(g.pkg, vmm.PackageFile(name)), nil)
}

func (g *ownGuest) close() error { return os.RemoveAll(g.dir) }

// ownMachine is a QEMU of an ownGuest.
type ownMachine struct {
	*qemu.Machine
	guest *ownGuest
	dir   *vmm.Dir
	agent net.Conn // nil until talk
}

func (g *ownGuest) start(ctx context.Context, driver qemu.Driver, number int, memory *memory.Device) (*ownMachine, error) {
	d, err := vmm.CreateDir(g.vms, vmm.VMMQEMU, nil)
	if err != nil {
		return nil, err
	}
	size, _ := g.config.Device(vmm.Memory)
	launch := vmm.Launch{
		Dir: d,
		Board: vmm.Board{
			Recorded: &g.config.Hardware, CPUs: g.config.CPUs, MemorySize: size.Size, Interface: g.config.Interface, MAC: g.config.MAC,
			Ports: []uint32{g.config.AgentPort, g.config.LivenessPort}, Generation: g.generation,
		},
		Devices:     vmm.Devices{Kernel: g.paths[vmm.Kernel], Backing: g.backing},
		Confinement: vmm.Confinement{Netns: fmt.Sprintf("ark%d", number), CgroupVersion: 2},
		Output:      g.console,
	}
	if memory != nil { // a nil one would be an interface that is not nil
		launch.Memory = memory
	}
	for _, name := range g.config.Disks() {
		launch.Disks = append(launch.Disks, vmm.Block{Name: name, Path: g.paths[name]})
	}
	if err := network.GuardGuest(launch.Netns, network.Guest{MAC: launch.MAC}); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	m, err := driver.Launch(ctx, launch)
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return &ownMachine{Machine: m.(*qemu.Machine), guest: g, dir: d}, nil
}

// talk connects with the guest's agent, as ours do. An agent that nobody is connected with asks for
// that all the time, at the cost of a CPU.
func (m *ownMachine) talk(ctx context.Context) (err error) {
	m.agent, err = m.GuestConn(ctx, m.guest.config.AgentPort)
	return err
}

func (m *ownMachine) close() error {
	var err error
	if m.agent != nil {
		err = m.agent.Close()
	}
	return errors.Join(err, m.Close(), m.dir.Close())
}

// savedOwn makes, once, what QEMU sends of a guest that it moves as it is in its package, and
// returns the file. Machines with memory of their own start from that; from a package they would
// share it with a file.
func (b *bench) savedOwn(ctx context.Context, g *ownGuest) (path string, err error) {
	path = filepath.Join(b.dir, "own-"+g.name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	file, err := block.OpenFile(filepath.Join(g.pkg, vmm.PackageFile(vmm.Memory)), true)
	if err != nil {
		return "", err
	}
	device := memory.New(file)
	defer func() { err = errors.Join(err, device.Close()) }()
	m, err := g.start(ctx, qemu.Driver{Dir: g.dir}, 0, device)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	state, err := g.paths.State()
	if err != nil {
		return "", err
	}
	defer state.Close() // nothing was written
	content, err := vmm.ReadState(state, g.config.ID)
	if err != nil {
		return "", err
	}
	if err := m.Restore(ctx, bytes.NewReader(content)); err != nil {
		return "", err
	}
	l, err := net.Listen("unix", filepath.Join(g.dir, "save"))
	if err != nil {
		return "", err
	}
	written := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // which ends the copy
			err = writeAll(path+".new", conn)
			if stop() {
				err = errors.Join(err, conn.Close())
			}
		}
		written <- err
	}()
	// The guest is paused, and its disks are the package's all the time.
	_, err = m.SendOwn(ctx, l.Addr().String(), qemu.OwnMigration{})
	if err = errors.Join(err, l.Close(), <-written); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

func writeAll(path string, from io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	return errors.Join(err, f.Close())
}

// load lets the guest run that savedOwn has saved.
func (m *ownMachine) load(ctx context.Context, saved string) (err error) {
	f, err := os.Open(saved)
	if err != nil {
		return err
	}
	defer f.Close() // nothing was written
	path := filepath.Join(m.guest.dir, "load")
	if err := m.ReceiveOwn(ctx, path, qemu.OwnMigration{}); err != nil {
		return err
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // which ends the copy
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, f)
		if stop() {
			err = errors.Join(err, conn.Close())
		}
		sent <- err
	}()
	if err := errors.Join(m.RunOwn(ctx), <-sent); err != nil {
		return err
	}
	return m.talk(ctx)
}
