package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"drafter/instance"
	"drafter/internal/redisimage"
	"drafter/internal/sparse"
	"drafter/internal/tour"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// opponent is a way to move a VM.
type opponent struct {
	name  string
	own   *qemu.OwnMigration // QEMU's own live migration; nil: ours
	where string             // ours: whether the package is present at the target, or absent
	flags []string           // ours: of the source
}

var opponents = []opponent{
	{name: "precopy300", own: &qemu.OwnMigration{DowntimeLimit: 300 * time.Millisecond}},
	{name: "present", where: "present"},
	{name: "precopy30", own: &qemu.OwnMigration{DowntimeLimit: 30 * time.Millisecond}},
	{name: "absent", where: "absent"},
	{name: "postcopy", own: &qemu.OwnMigration{DowntimeLimit: 300 * time.Millisecond, PostCopy: true}},
	{name: "present_nopostcopy", where: "present", flags: []string{"--disable-postcopy-migration"}},
	{name: "multifd", own: &qemu.OwnMigration{DowntimeLimit: 300 * time.Millisecond, Channels: 2}},
}

// contest is a set of moves of the same guest over the same link.
type contest struct {
	link      string
	gib       int // size of the guest's memory
	opponents []string
	rounds    int
}

// quick is done in less than three minutes; whole has everything.
var (
	quick = []contest{
		{"loopback", 1, []string{"precopy300", "present", "precopy30", "absent"}, 3},
		{"1gbit_rtt100", 1, []string{"present"}, 3},
		{"loopback", 8, []string{"present"}, 3},
	}
	whole = []contest{
		{"loopback", 1, names(), 5},
		{"1gbit", 1, names(), 3},
		{"1gbit_rtt100", 1, names(), 3},
		{"loopback", 2, []string{"precopy300", "present"}, 3},
		{"loopback", 4, []string{"precopy300", "present"}, 3},
		{"loopback", 8, []string{"precopy300", "present"}, 3},
	}
)

func names() (all []string) {
	for _, o := range opponents {
		all = append(all, o.name)
	}
	return all
}

func findOpponent(name string) opponent {
	return opponents[slices.IndexFunc(opponents, func(o opponent) bool { return o.name == name })]
}

// key names a figure of a contest.
func (c contest) key(opponent, figure string) string {
	return fmt.Sprintf("%s/%dGiB/%s/%s", c.link, c.gib, opponent, figure)
}

// compare lets opponents move the same guest under the same load, one after the other, in rounds.
func (b *bench) compare(ctx context.Context, contests []contest) (err error) {
	nat, err := b.drafter.Start("nat", "--namespace-count", "2")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nat.End()) }()
	if _, err := nat.Await(ctx, "NAT is up"); err != nil {
		return err
	}
	t, err := listenTicks()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	made := map[int]bool{}
	for _, c := range contests {
		if !made[c.gib] {
			if err := b.sizedPackage(ctx, c.gib, len(made) == 0); err != nil {
				return err
			}
			made[c.gib] = true
		}
	}
	for range 3 {
		if err := b.resumeAlone(ctx, contests[0].gib); err != nil {
			return err
		}
		if err := b.copyOverTCP(ctx); err != nil {
			return err
		}
	}
	for _, c := range contests {
		l, err := findLink(c.link)
		if err != nil {
			return err
		}
		for range c.rounds {
			for _, name := range c.opponents {
				o := findOpponent(name)
				move := b.moveOurs
				if o.own != nil {
					move = b.moveOwn
				}
				if err := move(ctx, t, c, l, o); err != nil {
					return fmt.Errorf("%s over %s, %d GiB: %w", name, c.link, c.gib, err)
				}
			}
		}
	}
	return nil
}

func sizedDir(gib int) string { return filepath.Join(dir, fmt.Sprintf("package-%d", gib)) }

// sizedPackage makes a package of a guest of this size, with the load running.
func (b *bench) sizedPackage(ctx context.Context, gib int, first bool) error {
	blueprint := filepath.Join(dir, "load-blueprint")
	if first {
		image, err := loadImage(ctx, dir, loadRate)
		if err != nil {
			return err
		}
		layout := filepath.Join(dir, "load-image")
		if err := redisimage.WriteLayout(image, layout); err != nil {
			return err
		}
		if out, err := exec.CommandContext(ctx, "cp", "-a", "--sparse=always", filepath.Join(dir, "blueprint"), blueprint).CombinedOutput(); err != nil {
			return fmt.Errorf("copy blueprint: %w: %s", err, out)
		}
		if err := b.drafter.Run(ctx, os.Stderr, "blueprint", "oci", "oci:"+layout, "--output", filepath.Join(blueprint, "oci.ext4")); err != nil {
			return err
		}
	}
	return b.drafter.Run(ctx, os.Stderr, "snapshotter", "--enable-output=false", "--memory-size", strconv.Itoa(gib<<10), "--chroot-base-dir", filepath.Join(dir, "vms"),
		"--devices", tour.SnapshotterDevices(blueprint, sizedDir(gib)))
}

// settle is how long a guest runs before it is moved: its load has spread.
const settle = 2 * time.Second

// moveOurs moves the guest from peer to peer.
func (b *bench) moveOurs(ctx context.Context, t *ticks, c contest, l link, o opponent) (err error) {
	instances := filepath.Join(dir, "instances")
	if err := os.RemoveAll(instances); err != nil {
		return err
	}
	p, err := l.through(ctx, "tcp", "127.0.0.1:1338", "127.0.0.1:1337")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	args := func(number int, raddr, laddr string) []string {
		return []string{"peer", "--enable-output=false", "--chroot-base-dir", filepath.Join(dir, "vms"), "--netns", fmt.Sprintf("ark%d", number), "--raddr", raddr, "--laddr", laddr,
			"--package", sizedDir(c.gib), "--instance", filepath.Join(instances, strconv.Itoa(number))}
	}
	const metrics = "localhost:1339"
	source, err := b.drafter.Start(append(append(args(0, "", "localhost:1337"), "--metrics", metrics), o.flags...)...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.End()) }()
	if _, err := source.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	time.Sleep(settle)
	used := follow(source)
	to := args(1, "localhost:1338", "")
	if o.where == "absent" {
		for _, f := range tour.Files {
			to = append(to, "--device", "name="+f.Device+",base="+filepath.Join(instances, "none", f.File))
		}
	}
	wctx, stop := context.WithCancel(ctx)
	watched := make(chan []moment, 1)
	if o.where == "absent" && b.timeline == nil {
		go func() { watched <- watch(wctx, metrics) }()
	} else {
		close(watched)
	}
	defer func() {
		stop()
		if moments := <-watched; moments != nil {
			b.timeline = moments
		}
	}()
	began := time.Now()
	target, err := b.drafter.Start(to...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.End()) }()
	if _, err := target.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	done, err := source.Await(ctx, "Completed migration")
	if err != nil {
		return err
	}
	cpuTarget, err := cpuSeconds(target.PID())
	if err != nil {
		return err
	}
	time.Sleep(500 * time.Millisecond)
	rss, err := peakRSS(target.PID())
	if err != nil {
		return err
	}
	b.add(c.key(o.name, "downtime_ms"), ms(done.Downtime))
	b.add(c.key(o.name, "total_ms"), ms(done.Took))
	b.add(c.key(o.name, "mb"), float64(done.Bytes)/1e6)
	b.add(c.key(o.name, "target_peak_rss_mb"), rss)
	if err := source.Wait(); err != nil {
		return err
	}
	cpuSource, peak := used()
	b.add(c.key(o.name, "source_peak_rss_mb"), peak)
	b.add(c.key(o.name, "cpu_s_per_gb"), (cpuSource+cpuTarget)/(float64(done.Bytes)/1e9))
	return b.addGaps(c, o, t.between(began, time.Now()))
}

func (b *bench) addGaps(c contest, o opponent, silences []time.Duration) error {
	if len(silences) == 0 {
		return errors.New("the guest does not tick")
	}
	b.add(c.key(o.name, "gap_ms"), ms(silences[len(silences)-1]))
	b.add(c.key(o.name, "p99_ms"), ms(silences[len(silences)*99/100]))
	b.add(c.key(o.name, "p50_ms"), ms(silences[len(silences)/2]))
	return nil
}

// moveOwn moves the guest as QEMU does by itself: both have the same disks, as its users must see to, and memory on a tmpfs.
func (b *bench) moveOwn(ctx context.Context, t *ticks, c contest, l link, o opponent) (err error) {
	shm, err := os.MkdirTemp("/dev/shm", "drafter-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(shm)) }()
	pkg := sizedDir(c.gib)
	config, err := vmm.ReadPackageConfig(filepath.Join(pkg, vmm.PackageFile(vmm.Config)))
	if err != nil {
		return err
	}
	paths := instance.Paths{}
	for _, d := range config.Devices {
		paths[d.Name] = filepath.Join(shm, vmm.PackageFile(d.Name))
		if err := sparse.CopyFile(ctx, paths[d.Name], filepath.Join(pkg, vmm.PackageFile(d.Name)), nil); err != nil {
			return err
		}
	}
	start := func(number int, memory string) (*qemu.Machine, *vmm.Dir, error) {
		d, err := vmm.CreateDir(filepath.Join(dir, "vms"), vmm.VMMQEMU)
		if err != nil {
			return nil, nil, err
		}
		size, _ := config.Device(vmm.Memory)
		launch := vmm.Launch{
			Dir: d, Recorded: &config.Hardware, CPUs: config.CPUs, MemorySize: size.Size, Memory: memory, Kernel: paths[vmm.Kernel], Netns: fmt.Sprintf("ark%d", number),
			Interface: config.Interface, MAC: config.MAC, Ports: []uint32{config.AgentPort, config.LivenessPort}, CgroupVersion: 2,
		}
		for _, name := range config.Disks() {
			launch.Disks = append(launch.Disks, vmm.Block{Name: name, Path: paths[name]})
		}
		m, err := qemu.Driver{}.Launch(ctx, launch)
		if err != nil {
			return nil, nil, errors.Join(err, d.Close())
		}
		return m.(*qemu.Machine), d, nil
	}
	source, sourceDir, err := start(0, paths[vmm.Memory])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.Close(), sourceDir.Close()) }()
	if err := restore(ctx, source, config, paths); err != nil {
		return err
	}
	time.Sleep(settle)
	began := time.Now()
	size, _ := config.Device(vmm.Memory)
	memory := filepath.Join(shm, "arriving")
	if err := errors.Join(os.WriteFile(memory, nil, 0o600), os.Truncate(memory, size.Size)); err != nil {
		return err
	}
	target, targetDir, err := start(1, memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.Close(), targetDir.Close()) }()
	incoming := filepath.Join(shm, "incoming")
	if err := target.ReceiveOwn(ctx, incoming, *o.own); err != nil {
		return err
	}
	p, err := l.through(ctx, "unix", filepath.Join(shm, "link"), incoming)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	result, err := source.SendOwn(ctx, filepath.Join(shm, "link"), *o.own)
	if err != nil {
		return err
	}
	time.Sleep(500 * time.Millisecond)
	b.add(c.key(o.name, "downtime_ms"), ms(result.Downtime))
	b.add(c.key(o.name, "total_ms"), ms(result.Total))
	b.add(c.key(o.name, "mb"), float64(result.Bytes)/1e6)
	return b.addGaps(c, o, t.between(began, time.Now()))
}

// restore resumes a package in a machine.
func restore(ctx context.Context, m vmm.Machine, config *vmm.PackageConfig, paths instance.Paths) error {
	state, err := paths.State()
	if err != nil {
		return err
	}
	defer state.Close() // nothing was written
	saved, err := vmm.ReadState(state, config.ID)
	if err != nil {
		return err
	}
	return errors.Join(m.Restore(ctx, strings.NewReader(string(saved))), m.Resume(ctx))
}

// cpuSeconds is the time that a process has used so far, without its children (proc_pid_stat(5)).
func cpuSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	user, err := strconv.ParseFloat(fields[11], 64)
	system, serr := strconv.ParseFloat(fields[12], 64)
	const ticksPerSecond = 100 // USER_HZ
	return (user + system) / ticksPerSecond, errors.Join(err, serr)
}

// follow looks at a process every few milliseconds until it has ended, and then tells how much CPU time it has used since, in seconds, and its largest
// resident set in MB. What a parent learns of a child that has ended includes that one's children, which are VMMs here.
func follow(s *tour.Service) (used func() (cpu, peak float64)) {
	done := make(chan struct{})
	before, _ := cpuSeconds(s.PID()) // a process that has ended has used nothing
	var cpu, peak float64
	go func() {
		defer close(done)
		for {
			now, err := cpuSeconds(s.PID())
			rss, rerr := peakRSS(s.PID())
			if err == nil && rerr == nil {
				cpu, peak = now-before, rss
			}
			select {
			case <-s.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	return func() (float64, float64) { <-done; return cpu, peak }
}

// resumeAlone measures a resume in a VMM that has been started: from the call until the guest runs.
func (b *bench) resumeAlone(ctx context.Context, gib int) (err error) {
	copied := filepath.Join(dir, "resume")
	if err := copyPackage(ctx, sizedDir(gib), copied); err != nil {
		return err
	}
	config, err := vmm.ReadPackageConfig(filepath.Join(copied, vmm.PackageFile(vmm.Config)))
	if err != nil {
		return err
	}
	paths := instance.Paths{vmm.Config: filepath.Join(copied, vmm.PackageFile(vmm.Config))}
	for _, d := range config.Devices {
		paths[d.Name] = filepath.Join(copied, vmm.PackageFile(d.Name))
	}
	launched, err := instance.Launch(ctx, instance.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: filepath.Join(dir, "vms"), Netns: "ark0", CgroupVersion: 2}, config, paths)
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

// copyOverTCP measures what it costs to copy a file to another over a loopback connection, as rsync or nc would: speed, and CPU seconds of both ends.
func (b *bench) copyOverTCP(ctx context.Context) error {
	const size = 1 << 30
	from, to := filepath.Join(dir, "copy-from"), filepath.Join(dir, "copy-to")
	if _, err := os.Stat(from); err != nil {
		if out, err := exec.CommandContext(ctx, "dd", "if=/dev/urandom", "of="+from, "bs=1M", "count=1024", "status=none").CombinedOutput(); err != nil {
			return fmt.Errorf("make file: %w: %s", err, out)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		return err
	}
	begin := time.Now()
	received := make(chan error, 1)
	go func() {
		received <- func() error {
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			f, err := os.Create(to)
			if err != nil {
				return errors.Join(err, conn.Close())
			}
			_, err = io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{conn}, make([]byte, 1<<20))
			return errors.Join(err, f.Close(), conn.Close())
		}()
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return err
	}
	f, err := os.Open(from)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	if err = errors.Join(err, f.Close(), conn.Close(), <-received); err != nil {
		return err
	}
	took := time.Since(begin)
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		return err
	}
	seconds := func(r unix.Rusage) float64 {
		return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
	}
	b.add("copy_tcp_mb_per_s", size/1e6/took.Seconds())
	b.add("copy_tcp_cpu_s_per_gb", (seconds(after)-seconds(before))/(size/1e9))
	return os.Remove(to)
}

// result is what a run leaves in a file.
type result struct {
	Time     time.Time             `json:"time"`
	Machine  map[string]string     `json:"machine"`
	Rounds   map[string][]float64  `json:"rounds"`
	Medians  map[string]float64    `json:"medians"`
	Spread   map[string][2]float64 `json:"spread"` // least and most
	Ratios   map[string]float64    `json:"ratios"`
	Timeline []moment              `json:"timeline"` // of the first move over loopback with the package absent
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

// results puts together what was measured.
func (b *bench) results() result {
	r := result{Time: time.Now().UTC().Truncate(time.Second), Machine: machine(), Rounds: b.values, Medians: map[string]float64{}, Spread: map[string][2]float64{}, Ratios: map[string]float64{}, Timeline: b.timeline}
	for name, v := range b.values {
		r.Medians[name] = median(v)
		r.Spread[name] = [2]float64{slices.Min(v), slices.Max(v)}
	}
	at := func(link string, gib int, opponent, figure string) float64 {
		return r.Medians[contest{link: link, gib: gib}.key(opponent, figure)]
	}
	ratio := func(key string, a, b float64) {
		if a > 0 && b > 0 {
			r.Ratios[key] = a / b
		}
	}
	for opponent, suffix := range map[string]string{"present": "", "absent": "_absent"} {
		ratio("gap_vs_precopy300"+suffix, at("loopback", 1, opponent, "gap_ms"), at("loopback", 1, "precopy300", "gap_ms"))
		ratio("gap_vs_precopy30"+suffix, at("loopback", 1, opponent, "gap_ms"), at("loopback", 1, "precopy30", "gap_ms"))
		ratio("total_vs_precopy300"+suffix, at("loopback", 1, opponent, "total_ms"), at("loopback", 1, "precopy300", "total_ms"))
		ratio("bytes_vs_precopy300"+suffix, at("loopback", 1, opponent, "mb"), at("loopback", 1, "precopy300", "mb"))
	}
	ratio("gap_rtt100_ms", at("1gbit_rtt100", 1, "present", "gap_ms"), 1)
	ratio("gap_8g_over_1g", at("loopback", 8, "present", "gap_ms"), at("loopback", 1, "present", "gap_ms"))
	ratio("engine_vs_tcp", r.Medians["engine_mb_per_s"], r.Medians["raw_tcp_mb_per_s"])
	ratio("resume_ms", r.Medians["resume_ms"], 1)
	ratio("peak_rss_mb", max(at("loopback", 1, "present", "source_peak_rss_mb"), at("loopback", 1, "present", "target_peak_rss_mb"),
		at("loopback", 1, "absent", "source_peak_rss_mb"), at("loopback", 1, "absent", "target_peak_rss_mb")), 1)
	ratio("cpu_vs_copy", at("loopback", 1, "absent", "cpu_s_per_gb"), r.Medians["copy_tcp_cpu_s_per_gb"])
	return r
}

// machine says what it was measured on.
func machine() map[string]string {
	m := map[string]string{"cpus": strconv.Itoa(runtime.NumCPU()), "go": runtime.Version()}
	if p, err := vmm.HostProcessor(); err == nil {
		m["cpu"] = p.Model
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	accel, why, _ := vmm.Accelerator(vmm.AccelAuto)
	m["accelerator"] = accel + ": " + why
	if out, err := exec.Command("qemu-system-x86_64", "--version").Output(); err == nil {
		m["qemu"], _, _ = strings.Cut(string(out), "\n")
	}
	return m
}

func (r result) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
