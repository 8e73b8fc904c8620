package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/instance"
	"drafter/internal/testguest"
	"drafter/migrate"
	"drafter/peer"
	"drafter/snapshotter"
	"drafter/vmm"
	"drafter/vmm/firecracker"
)

// fcLoad is what the guest without an operating system does.
var fcLoad = testguest.Options{ResidentMiB: 64, Rate: 2000, Words: testguest.Affordable(2)}

const fcMemory = 256 << 20 // bytes

// firecracker measures resumes and moves of a test guest under Firecracker, beside what Firecracker
// does by itself: loading a snapshot from a file, and moving by a full snapshot. The same machine,
// guest and snapshot, one after the other.
func (b *bench) firecracker(ctx context.Context, rounds int) error {
	if err := (firecracker.Driver{}).Check(ctx, vmm.Launch{}); err != nil {
		fmt.Fprintln(b.progress, "SKIPPED: Firecracker:", err)
		return nil
	}
	f, err := newFC(ctx, b.dir)
	if err != nil {
		return err
	}
	for range rounds {
		for _, step := range []func(context.Context, *bench) error{f.resume, f.load, f.move, f.movePostCopy, f.moveByFile} {
			if err := step(ctx, b); err != nil {
				return err
			}
		}
	}
	return nil
}

// fc is a package of the test guest.
type fc struct {
	dir, bin, pkg string
}

func newFC(ctx context.Context, dir string) (*fc, error) {
	base, err := filepath.Abs(filepath.Join(dir, "fc"))
	if err != nil {
		return nil, err
	}
	f := &fc{dir: base, pkg: filepath.Join(base, "package")}
	if f.bin, err = exec.LookPath("firecracker"); err != nil {
		return nil, err
	}
	kernel, disk := filepath.Join(base, "guest"), filepath.Join(base, "disk")
	if err := errors.Join(os.MkdirAll(base, 0o755), testguest.Build(kernel), testguest.WriteDisk(disk)); err != nil {
		return nil, err
	}
	args, err := fcLoad.Arguments()
	if err != nil {
		return nil, err
	}
	c := snapshotter.Config{
		Host:    f.host(nil),
		Spec:    vmm.Spec{CPUs: 1, MemorySize: fcMemory, BootArgs: args, ReadyOutput: testguest.Ready},
		Timeout: time.Minute,
	}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		c.Devices = append(c.Devices, snapshotter.Device{Name: name, Output: filepath.Join(f.pkg, vmm.PackageFile(name))})
	}
	c.Devices[0].Input, c.Devices[1].Input = kernel, disk
	s, err := snapshotter.New(c)
	if err != nil {
		return nil, err
	}
	_, err = s.Run(ctx)
	return f, err
}

func (f *fc) host(output io.Writer) vmm.Host {
	return vmm.Host{
		Drivers: vmm.Drivers{firecracker.Driver{}}, VMM: vmm.VMMFirecracker, BaseDir: filepath.Join(f.dir, "vms"), CgroupVersion: 2, Output: output,
	}
}

func (b *bench) addSilences(prefix string, s silences) error {
	if len(s) == 0 {
		return errors.New("the guest was silent")
	}
	b.add(prefix+"gap_ms", ms(s.longest()))
	b.add(prefix+"p99_ms", ms(s.percentile(99)))
	b.add(prefix+"p50_ms", ms(s.percentile(50)))
	return nil
}

// resume measures from the moment that a waiting Firecracker gets the state until the guest runs,
// and until it is heard.
func (f *fc) resume(ctx context.Context, b *bench) (err error) {
	console := &pulse{}
	config, err := vmm.ReadPackageConfig(filepath.Join(f.pkg, vmm.PackageFile(vmm.Config)))
	if err != nil {
		return err
	}
	paths := instance.Paths{}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		paths[name] = filepath.Join(f.dir, "resume", vmm.PackageFile(name))
	}
	if err := copyPackage(ctx, f.pkg, filepath.Join(f.dir, "resume")); err != nil {
		return err
	}
	launched, err := instance.Launch(ctx, f.host(console), config, paths)
	if err != nil {
		return err
	}
	begin := time.Now()
	i, err := launched.Resume(ctx)
	if err != nil {
		return err
	}
	running := time.Now()
	defer func() { err = errors.Join(err, i.Close()) }()
	first, err := console.first(running, time.Minute)
	if err != nil {
		return err
	}
	b.add("fc_resume_ms", ms(running.Sub(begin)))
	b.add("fc_resume_heard_ms", ms(first.Sub(begin)))
	return nil
}

func copyPackage(ctx context.Context, from, to string) error {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-r", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy package: %w: %s", err, out)
	}
	return nil
}

// load measures the same of a Firecracker that maps the memory file, which a copy of the package
// has.
func (f *fc) load(ctx context.Context, b *bench) (err error) {
	dir := filepath.Join(f.dir, "load")
	if err := copyPackage(ctx, f.pkg, dir); err != nil {
		return err
	}
	console := &pulse{}
	own, err := f.start(ctx, dir, console)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, own.close()) }()
	begin := time.Now()
	if err := own.load(ctx); err != nil {
		return err
	}
	running := time.Now()
	first, err := console.first(running, time.Minute)
	if err != nil {
		return err
	}
	b.add("fc_own_load_ms", ms(running.Sub(begin)))
	b.add("fc_own_load_heard_ms", ms(first.Sub(begin)))
	return nil
}

// move measures a live migration with the defaults.
func (f *fc) move(ctx context.Context, b *bench) error {
	return f.moveLive(ctx, b, "fc_move_", migrate.Limits{})
}

// movePostCopy measures one that hands over at once, so that most of what the target's package
// lacks follows the VM, slowly but for what somebody waits for.
func (f *fc) movePostCopy(ctx context.Context, b *bench) error {
	return f.moveLive(ctx, b, "fc_postcopy_", migrate.Limits{Timeout: time.Millisecond, Bandwidth: 4e6})
}

// moveLive measures a live migration between two peers in this process.
func (f *fc) moveLive(ctx context.Context, b *bench, prefix string, limits migrate.Limits) (err error) {
	console := &pulse{}
	instances := filepath.Join(f.dir, "instances")
	if err := os.RemoveAll(instances); err != nil {
		return err
	}
	var paused, resumed atomic.Pointer[time.Time]
	note := func(state migrate.Phase) {
		now := time.Now()
		switch state {
		case migrate.HandingOff:
			paused.Store(&now)
		case migrate.Fetching:
			resumed.Store(&now)
		}
	}
	newPeer := func(name string) (*peer.Peer, error) {
		devices, err := peer.PackageDevices(f.pkg, filepath.Join(instances, name))
		if err != nil {
			return nil, err
		}
		return peer.New(peer.Config{
			Host: f.host(console), Devices: devices, Limits: limits, ResumeTimeout: time.Minute, RescueTimeout: time.Minute, Hooks: peer.Hooks{OnPhase: note},
		})
	}
	source, err := newPeer("source")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	if err := source.Resume(ctx); err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // the load has spread
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() {
		_, err := source.Serve(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			defer context.AfterFunc(ctx, func() { _ = l.Close() })() // which ends Accept
			return l.Accept()
		})
		served <- err
	}()
	target, err := newPeer("target")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close()) }()
	begin := time.Now()
	dial := migrate.Dial(func(ctx context.Context) (io.ReadWriteCloser, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	})
	if err := target.Receive(ctx, dial); err != nil {
		return err
	}
	if err := <-served; err != nil {
		return err
	}
	moved := time.Now()
	time.Sleep(500 * time.Millisecond)
	stats, _ := source.Stats()
	later := int64(0)
	for _, d := range stats.Devices {
		later += d.PostCopy
	}
	b.add(prefix+"downtime_ms", ms(stats.Paused))
	b.add(prefix+"total_ms", ms(moved.Sub(begin)))
	b.add(prefix+"mb", float64(stats.Wire)/1e6)
	b.add(prefix+"later_mb", float64(later)/1e6)
	seen := console.between(begin, time.Now())
	if p, r := paused.Load(), resumed.Load(); p != nil && r != nil {
		_, _, after := seen.split(*p, *r)
		b.add(prefix+"after_p50_ms", ms(after.percentile(50)))
		b.add(prefix+"after_p99_ms", ms(after.percentile(99)))
		b.add(prefix+"after_max_ms", ms(after.longest()))
	}
	return b.addSilences(prefix, seen)
}

// moveByFile moves a VM as Firecracker can by itself: pause, full snapshot on a tmpfs, load by
// another one that waits.
func (f *fc) moveByFile(ctx context.Context, b *bench) (err error) {
	dir := filepath.Join(f.dir, "load")
	if err := copyPackage(ctx, f.pkg, dir); err != nil {
		return err
	}
	console := &pulse{}
	source, err := f.start(ctx, dir, console)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.close()) }()
	if err := source.load(ctx); err != nil {
		return err
	}
	time.Sleep(2 * time.Second)
	target, err := f.start(ctx, dir, console)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.close()) }()
	begin := time.Now()
	if err := source.call(ctx, http.MethodPatch, "/vm", map[string]any{"state": "Paused"}); err != nil {
		return err
	}
	err = source.call(ctx, http.MethodPut, "/snapshot/create", map[string]any{"snapshot_type": "Full", "snapshot_path": "/tmpfs/state", "mem_file_path": "/tmpfs/memory"})
	if err != nil {
		return err
	}
	// the way to the target: a copy from one tmpfs to the other
	for _, name := range []string{"state", "memory"} {
		from, to := filepath.Join(source.root, "tmpfs", name), filepath.Join(target.root, "tmpfs", name)
		if out, err := exec.CommandContext(ctx, "cp", "--sparse=never", from, to).CombinedOutput(); err != nil {
			return fmt.Errorf("copy snapshot: %w: %s", err, out)
		}
	}
	err = target.call(ctx, http.MethodPut, "/snapshot/load", map[string]any{
		"snapshot_path": "/tmpfs/state", "mem_backend": map[string]any{"backend_type": "File", "backend_path": "/tmpfs/memory"}, "resume_vm": true,
	})
	if err != nil {
		return err
	}
	b.add("fc_own_move_downtime_ms", ms(time.Since(begin)))
	time.Sleep(500 * time.Millisecond)
	return b.addSilences("fc_own_move_", console.between(begin, time.Now()))
}

// own is a Firecracker without jailer, in a root of its own that has the paths which the snapshot
// names.
type own struct {
	root   string
	cmd    *exec.Cmd
	client http.Client
}

func (f *fc) start(ctx context.Context, pkg string, console io.Writer) (_ *own, err error) {
	o := &own{}
	if o.root, err = os.MkdirTemp(f.dir, "root-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	state, err := os.OpenFile(filepath.Join(pkg, vmm.PackageFile(vmm.State)), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	config, err := vmm.ReadPackageConfig(filepath.Join(pkg, vmm.PackageFile(vmm.Config)))
	if err != nil {
		return nil, err
	}
	saved, err := vmm.ReadState(state, config.ID)
	if err != nil {
		return nil, err
	}
	snapshot, err := firecracker.Snapshot(saved)
	if err != nil {
		return nil, err
	}
	dev := filepath.Join(o.root, "dev")
	err = errors.Join(os.Mkdir(dev, 0o755), os.Mkdir(filepath.Join(o.root, "tmpfs"), 0o755), os.WriteFile(filepath.Join(o.root, "state"), snapshot, 0o600),
		unix.Mknod(filepath.Join(dev, "kvm"), unix.S_IFCHR|0o600, int(unix.Mkdev(10, 232))),
		unix.Mknod(filepath.Join(dev, "urandom"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 9))),
		unix.Mount("tmpfs", filepath.Join(o.root, "tmpfs"), "tmpfs", 0, "size=100%"))
	if err != nil {
		return nil, err
	}
	for name, path := range map[string]string{
		"firecracker": f.bin, "disk-" + vmm.Disk: filepath.Join(pkg, vmm.PackageFile(vmm.Disk)), "memory": filepath.Join(pkg, vmm.PackageFile(vmm.Memory)),
	} {
		if err := os.Link(path, filepath.Join(o.root, name)); err == nil {
			continue
		}
		if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", path, filepath.Join(o.root, name)).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("copy %s: %w: %s", path, err, out)
		}
	}
	o.cmd = exec.CommandContext(ctx, "chroot", o.root, "/firecracker", "--api-sock", "/api.sock", "--level", "Error")
	o.cmd.Stdout, o.cmd.Stderr = console, os.Stderr
	if err := o.cmd.Start(); err != nil {
		return nil, err
	}
	socket := filepath.Join(o.root, "api.sock")
	o.client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			return o, conn.Close()
		}
	}
	return nil, errors.New("firecracker does not answer")
}

// load resumes the package.
func (o *own) load(ctx context.Context) error {
	return o.call(ctx, http.MethodPut, "/snapshot/load", map[string]any{
		"snapshot_path": "/state", "mem_backend": map[string]any{"backend_type": "File", "backend_path": "/memory"}, "resume_vm": true,
	})
}

func (o *own) call(ctx context.Context, method, path string, body any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://firecracker"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	res, err := o.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, res.Status, answer)
	}
	return err
}

// close ends it, as far as it has been started.
func (o *own) close() error {
	var errs []error
	if o.cmd != nil && o.cmd.Process != nil {
		errs = append(errs, o.cmd.Process.Kill())
		_ = o.cmd.Wait() // it was killed
		o.client.CloseIdleConnections()
	}
	// not mounted yet
	if err := unix.Unmount(filepath.Join(o.root, "tmpfs"), unix.MNT_DETACH); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, os.RemoveAll(o.root))...)
}
