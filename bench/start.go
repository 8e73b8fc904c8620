package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/instance"
	"drafter/internal/tour"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// clones is how many instances of a package are started at once.
const clones = 4

// start measures what a user of the commands waits for.
func (b *bench) start(ctx context.Context, rounds int) (err error) {
	end, err := b.network(ctx, clones)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	pkg, err := b.snapshot(ctx, loadRedis, 1)
	if err != nil {
		return err
	}
	for range rounds {
		for _, step := range []func(context.Context, string) error{b.boot, b.runner, b.peer, b.clones, b.pack} {
			if err := step(ctx, pkg); err != nil {
				return err
			}
		}
	}
	return nil
}

// boot measures a boot of the Redis guest, until its port is open and its agent answers, and the
// suspend after it.
func (b *bench) boot(ctx context.Context, _ string) error {
	blueprint, err := b.blueprint(ctx, loadRedis)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	err = b.drafter.Run(ctx, &out, "snapshotter", "--report", "--enable-output=false", "--chroot-base-dir", b.vms(),
		"--devices", tour.SnapshotterDevices(blueprint, filepath.Join(b.dir, "booted")))
	if err != nil {
		return err
	}
	var report struct {
		Boot    float64 `json:"boot_ms"`
		Suspend float64 `json:"suspend_ms"`
	}
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		return err
	}
	b.add("boot_ms", report.Boot)
	b.add("snapshot_suspend_ms", report.Suspend)
	return nil
}

// runner measures from the start of the command to the guest running, to the agent's answer, and
// the suspend at the end.
func (b *bench) runner(ctx context.Context, pkg string) error {
	copied := filepath.Join(b.dir, "runner")
	if err := copyPackage(ctx, pkg, copied); err != nil {
		return err
	}
	begin := time.Now()
	vm, err := b.drafter.Start("runner", "--enable-output=false", "--chroot-base-dir", b.vms(), "--devices", tour.PackageDevices(copied))
	if err != nil {
		return err
	}
	resumed, err := vm.Await(ctx, "Resumed VM")
	if err != nil {
		return errors.Join(err, vm.End())
	}
	b.add("runner_resume_ms", ms(running(resumed).Sub(begin)))
	b.add("runner_agent_ms", ms(resumed.Time.Sub(begin)))
	if err := vm.End(); err != nil {
		return err
	}
	suspended, err := vm.Await(ctx, "Suspended VM")
	b.add("runner_suspend_ms", ms(suspended.Took))
	return err
}

// running is since when a guest has run, of the line that says so: it is written after the agent's
// answer.
func running(resumed tour.Line) time.Time { return resumed.Time.Add(resumed.Took - resumed.AgentAfter) }

// peer measures what the device engine adds to a resume, beside the runner.
func (b *bench) peer(ctx context.Context, pkg string) error {
	instance := filepath.Join(b.dir, "instance")
	for _, start := range []string{"first", "second"} {
		begin := time.Now()
		vm, err := b.startPeer(pkg, instance, "ark0")
		if err != nil {
			return err
		}
		resumed, err := vm.Await(ctx, "Resumed VM")
		if err != nil {
			return errors.Join(err, vm.End())
		}
		b.add("peer_"+start+"_resume_ms", ms(running(resumed).Sub(begin)))
		memory, err := privateMemory(vm.PID())
		if err != nil {
			return errors.Join(err, vm.End())
		}
		b.add("peer_memory_mb", memory)
		if err := vm.End(); err != nil {
			return err
		}
		suspended, err := vm.Await(ctx, "Suspended VM")
		if err != nil {
			return err
		}
		b.add("peer_suspend_ms", ms(suspended.Took))
	}
	return os.RemoveAll(instance)
}

func (b *bench) startPeer(pkg, instance, netns string) (*tour.Service, error) {
	return b.drafter.Start("peer", "--raddr", "", "--laddr", "", "--enable-output=false", "--chroot-base-dir", b.vms(), "--netns", netns, "--package", pkg, "--instance", instance)
}

// clones measures the start of several instances of one package at once, all commands together:
// until the last guest runs, and what our processes have used.
func (b *bench) clones(ctx context.Context, pkg string) (err error) {
	instances := filepath.Join(b.dir, "clones")
	var peers []*tour.Service
	defer func() {
		for _, p := range peers {
			err = errors.Join(err, p.End())
		}
		err = errors.Join(err, os.RemoveAll(instances))
	}()
	begin := time.Now()
	for i := range clones {
		p, err := b.startPeer(pkg, filepath.Join(instances, strconv.Itoa(i)), fmt.Sprintf("ark%d", i))
		if err != nil {
			return err
		}
		peers = append(peers, p)
	}
	var last time.Time
	var cpu, memory float64
	for _, p := range peers {
		resumed, err := p.Await(ctx, "Resumed VM")
		if err != nil {
			return err
		}
		if at := running(resumed); at.After(last) {
			last = at
		}
		seconds, err := cpuSeconds(p.PID())
		if err != nil {
			return err
		}
		private, err := privateMemory(p.PID())
		if err != nil {
			return err
		}
		cpu, memory = cpu+seconds, memory+private
	}
	name := fmt.Sprintf("clones_%d_", clones)
	b.add(name+"resume_ms", ms(last.Sub(begin)))
	b.add(name+"cpu_s", cpu)
	b.add(name+"memory_mb", memory)
	return nil
}

// resume measures a resume in a VMM that has been started: from the call until the guest runs.
func (b *bench) resume(ctx context.Context, rounds int) (err error) {
	end, err := b.network(ctx, 2)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if b.quick { // those of the moves as well
		if err := b.snapshots(ctx, quick); err != nil {
			return err
		}
	}
	pkg, err := b.snapshot(ctx, "random", 1)
	if err != nil {
		return err
	}
	for range rounds {
		if err := b.resumeOnce(ctx, pkg); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) resumeOnce(ctx context.Context, pkg string) error {
	copied := filepath.Join(b.dir, "resume")
	if err := copyPackage(ctx, pkg, copied); err != nil {
		return err
	}
	unix.Sync() // a package that has just been copied is not what anybody resumes
	config, err := vmm.ReadPackageConfig(filepath.Join(copied, vmm.PackageFile(vmm.Config)))
	if err != nil {
		return err
	}
	paths := instance.Paths{vmm.Config: filepath.Join(copied, vmm.PackageFile(vmm.Config))}
	for _, d := range config.Devices {
		paths[d.Name] = filepath.Join(copied, vmm.PackageFile(d.Name))
	}
	launched, err := instance.Launch(ctx, vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: b.vms(), Netns: "ark0", CgroupVersion: 2}, config, paths)
	if err != nil {
		return err
	}
	begin := time.Now()
	i, err := launched.Resume(ctx)
	if err != nil {
		return err
	}
	b.add("resume_ms", ms(time.Since(begin)))
	return i.Close()
}

// pack measures the packager in MB (10⁶ bytes) per second: of data, holes not counted, and of
// devices as the guest sees them. Both end durable on disk.
func (b *bench) pack(ctx context.Context, pkg string) error {
	extracted, archive := filepath.Join(b.dir, "extracted"), filepath.Join(b.dir, "package.tar.zst")
	var data, devices float64
	for _, f := range tour.Files {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(pkg, f.File), &st); err != nil {
			return fmt.Errorf("stat %s: %w", f.File, err)
		}
		data += float64(st.Blocks) * 512 / 1e6 // stat(2)
		devices += float64(st.Size) / 1e6
	}
	begin := time.Now()
	if err := b.drafter.Run(ctx, nil, "packager", "--package-path", archive, "--devices", tour.PackageDevices(pkg)); err != nil {
		return err
	}
	took := time.Since(begin).Seconds()
	b.add("package_create_data_mb_per_s", data/took)
	b.add("package_create_device_mb_per_s", devices/took)
	begin = time.Now()
	err := b.drafter.Run(ctx, nil, "packager", "--extract", "--package-path", archive, "--devices", strings.ReplaceAll(tour.PackageDevices(pkg), pkg, extracted))
	if err != nil {
		return err
	}
	took = time.Since(begin).Seconds()
	b.add("package_extract_data_mb_per_s", data/took)
	b.add("package_extract_device_mb_per_s", devices/took)
	info, err := os.Stat(archive)
	if err != nil {
		return err
	}
	b.add("package_data_mb", data)
	b.add("package_device_mb", devices)
	b.add("package_archive_mb", float64(info.Size())/1e6)
	return os.RemoveAll(extracted)
}
