package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
	// as its users have it that bring the disks, too; as ours when the package is absent
	{name: "precopy300_disks", own: &qemu.OwnMigration{DowntimeLimit: 300 * time.Millisecond, Disks: true}},
	{name: "postcopy", own: &qemu.OwnMigration{DowntimeLimit: 300 * time.Millisecond, PostCopy: true}},
	{name: "present_nopostcopy", where: "present", flags: []string{"--disable-postcopy-migration"}},
	{name: "multifd", own: &qemu.OwnMigration{DowntimeLimit: 300 * time.Millisecond, Channels: 2}},
}

// contest is a set of moves of the same guest over the same link.
type contest struct {
	link      string
	gib       int // size of the guest's memory
	load      string
	opponents []string
	rounds    int
	copies    bool // whether a plain copy over TCP is measured in each round, too
}

// quick has what ratios are of, whole everything.
var (
	quick = []contest{
		{"loopback", 1, "random", []string{"precopy300", "present", "precopy30", "absent", "precopy300_disks"}, 3, true},
		{"1gbit_rtt100", 1, "random", []string{"present"}, 2, false},
		{"loopback", 8, "random", []string{"present"}, 2, false},
	}
	everybody, _ = Opponents()
	whole        = []contest{
		{"loopback", 1, "random", everybody, 5, true},
		{"1gbit", 1, "random", everybody, 3, false},
		{"1gbit_rtt100", 1, "random", everybody, 3, false},
		{"loopback", 2, "random", []string{"precopy300", "present"}, 3, false},
		{"loopback", 4, "random", []string{"precopy300", "present"}, 3, false},
		{"loopback", 8, "random", []string{"precopy300", "present"}, 5, false},
		{"loopback", 1, "hot", []string{"precopy300", "present", "absent", "precopy300_disks"}, 3, false},
		{"loopback", 1, "sequential", []string{"precopy300", "present", "absent", "precopy300_disks"}, 3, false},
		{"loopback", 1, loadRedis, []string{"precopy300", "present", "absent", "precopy300_disks"}, 3, false},
	}
)

// Opponents are the names of the ways to move a VM, in order, and whether each is QEMU's own.
func Opponents() (all []string, own map[string]bool) {
	own = map[string]bool{}
	for _, o := range opponents {
		all = append(all, o.name)
		own[o.name] = o.own != nil
	}
	return all, own
}

func findOpponent(name string) opponent {
	return opponents[slices.IndexFunc(opponents, func(o opponent) bool { return o.name == name })]
}

// key names a figure of a contest.
func (c contest) key(opponent, figure string) string {
	return Key(c.link, c.gib, c.load, opponent, figure)
}

// move is live migration.
func (b *bench) move(ctx context.Context, rounds int) error {
	contests := slices.Clone(whole)
	if b.quick {
		contests = slices.Clone(quick)
	}
	for i := range contests {
		if rounds > 0 {
			contests[i].rounds = rounds
		}
	}
	return b.moves(ctx, contests)
}

// moves lets opponents move the same guest under the same load, one after the other, in rounds.
func (b *bench) moves(ctx context.Context, contests []contest) (err error) {
	end, err := b.network(ctx, 2)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if err := b.snapshots(ctx, contests); err != nil {
		return err
	}
	if b.quick {
		// With as few rounds, the first one must not pay for what the host has to get ready, such
		// as memory that was given back to its own host.
		first := contests[0]
		first.rounds = 1
		if err := b.uncounted(func() error { return b.contest(ctx, first) }); err != nil {
			return fmt.Errorf("a first round: %w", err)
		}
	}
	for _, c := range contests {
		if err := b.contest(ctx, c); err != nil {
			return fmt.Errorf("a guest of %d GiB over %s, load %s: %w", c.gib, c.link, c.load, err)
		}
	}
	return nil
}

func (b *bench) contest(ctx context.Context, c contest) (err error) {
	l, err := findLink(c.link)
	if err != nil {
		return err
	}
	w, err := b.watch(ctx, c.load)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	for range c.rounds {
		for _, name := range c.opponents {
			o := findOpponent(name)
			if o.own != nil && o.own.PostCopy && !canFault() {
				fmt.Fprintf(b.progress, "SKIPPED: %s: QEMU, which has no privileges, may not use userfaultfd; set vm.unprivileged_userfaultfd to 1\n", name)
				continue
			}
			move := b.moveOurs
			if o.own != nil {
				move = b.moveOwn
			}
			if err := b.calm(ctx, c); err != nil {
				return err
			}
			if err := move(ctx, w, c, l, o); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if c.copies {
			if err := b.plainCopy(); err != nil {
				return err
			}
		}
	}
	return nil
}

// canFault tells whether a process without privileges may answer faults of the kernel in its own
// memory, as QEMU does for post-copy.
func canFault() bool {
	b, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	return err != nil || strings.TrimSpace(string(b)) != "0"
}

// calm lets be written what the move before has left, and read what the next one starts from, so
// that none pays for another: the package is on the host as on one that runs its instances.
func (b *bench) calm(ctx context.Context, c contest) error {
	if err := os.RemoveAll(filepath.Join(b.dir, "instances")); err != nil {
		return err
	}
	pkg, err := b.snapshot(ctx, c.load, c.gib)
	if err != nil {
		return err
	}
	unix.Sync()
	f, err := os.Open(filepath.Join(pkg, vmm.PackageFile(vmm.Memory)))
	if err != nil {
		return err
	}
	defer f.Close() // nothing was written
	extents, err := sparse.Extents(f, int64(c.gib)<<30)
	if err != nil {
		return err
	}
	for _, e := range extents {
		if _, err := io.Copy(io.Discard, io.NewSectionReader(f, e.Offset, e.Length)); err != nil {
			return err
		}
	}
	return nil
}

// watch sees a guest with this load, in either of two network namespaces.
func (b *bench) watch(ctx context.Context, load string) (*watcher, error) {
	if load != loadRedis {
		return watchTicks()
	}
	addrs := []string{"127.0.0.1:3333", "127.0.0.1:3334"}
	forwards := "[" + strings.Trim(tour.Forward("ark0", "6379", addrs[0]), "[]") + "," + strings.Trim(tour.Forward("ark1", "6379", addrs[1]), "[]") + "]"
	forwarder, err := b.drafter.Start("forwarder", "--port-forwards", forwards)
	if err != nil {
		return nil, err
	}
	if _, err := forwarder.Await(ctx, "Forwarding"); err != nil {
		return nil, errors.Join(err, forwarder.End())
	}
	w := watchRedis(ctx, addrs...)
	stop := w.stop
	w.stop = func() error { return errors.Join(stop(), forwarder.End()) }
	return w, nil
}

// settle is how long a guest runs before it is moved: its load has spread. In the last ownWork of it
// the guest's own work is measured.
const (
	settle  = 2 * time.Second
	ownWork = 1500 * time.Millisecond
)

// moveCPU is the CPU time that a move takes in all of its processes.
type moveCPU struct {
	*cpuMeter
	rate  float64 // of the guest's own work, in CPU seconds per second
	began time.Time
}

// settleMeasured waits for settle, and starts to measure a move of the guest of these processes.
func settleMeasured(source int) *moveCPU {
	time.Sleep(settle - ownWork)
	m := &moveCPU{cpuMeter: meterCPU(source)}
	begin := time.Now()
	time.Sleep(ownWork)
	m.rate = m.used() / time.Since(begin).Seconds()
	m.restart()
	m.began = time.Now()
	return m
}

// seconds is what the move has used so far, without what the guest would have used.
func (m *moveCPU) seconds() float64 { return m.used() - m.rate*time.Since(m.began).Seconds() }

// longestSilence is how long a guest is waited for after a move.
const longestSilence = 10 * time.Second

// patience is how long a move may take.
const patience = 5 * time.Minute

// moveOurs moves the guest from peer to peer.
func (b *bench) moveOurs(ctx context.Context, w *watcher, c contest, l link, o opponent) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("the move is not over after %s", patience))
	defer cancel()
	instances := filepath.Join(b.dir, "instances")
	p, err := l.through(ctx, "tcp", "127.0.0.1:1338", "127.0.0.1:1337")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	pkg, err := b.snapshot(ctx, c.load, c.gib)
	if err != nil {
		return err
	}
	d, console := b.drafter, &pulse{}
	d.Console = console
	args := func(number int, raddr, laddr string) []string {
		return []string{"peer", "--chroot-base-dir", filepath.Join(b.dir, "vms"), "--netns", fmt.Sprintf("ark%d", number), "--raddr", raddr, "--laddr", laddr,
			"--package", pkg, "--instance", filepath.Join(instances, strconv.Itoa(number))}
	}
	const metrics = "localhost:1339"
	source, err := d.Start(append(append(args(0, "", "localhost:1337"), "--metrics", metrics), o.flags...)...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.End()) }()
	if _, err := source.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	cpu := settleMeasured(source.PID())
	defer cpu.end()
	used := follow(source)
	to := args(1, "localhost:1338", "")
	if o.where == "absent" {
		for _, f := range tour.Files {
			to = append(to, "--device", "name="+f.Device+",base="+filepath.Join(instances, "none", f.File))
		}
	}
	wctx, stop := context.WithCancel(ctx)
	watched := make(chan []Moment, 1)
	if o.where == "absent" && b.timeline == nil {
		go func() { watched <- followMigration(wctx, metrics) }()
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
	target, err := d.Start(to...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, target.End()) }()
	cpu.add(target.PID())
	resumed, err := target.Await(ctx, "Resumed VM")
	if err != nil {
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
	// what is not heard of by then is a figure, too
	_, _ = w.first(running(resumed), longestSilence)
	time.Sleep(500 * time.Millisecond)
	rss, err := peakRSS(target.PID())
	if err != nil {
		return err
	}
	b.add(c.key(o.name, "downtime_ms"), ms(done.Downtime))
	b.add(c.key(o.name, "total_ms"), ms(done.Took-done.Preflight))
	b.add(c.key(o.name, "whole_ms"), ms(done.Time.Sub(began)))
	b.add(c.key(o.name, "mb"), float64(done.Bytes)/1e6)
	b.add(c.key(o.name, "memory_mb"), float64(done.MemoryBytes)/1e6)
	b.add(c.key(o.name, "target_peak_rss_mb"), rss)
	if err := source.Wait(); err != nil {
		return err
	}
	b.add(c.key(o.name, "cpu_s"), cpu.seconds())
	cpuSource, peak := used()
	b.add(c.key(o.name, "source_peak_rss_mb"), peak)
	b.add(c.key(o.name, "cpu_s_per_gb"), (cpuSource+cpuTarget)/(float64(done.Bytes)/1e9))
	seen := w.between(began, time.Now())
	before, handoff, after := seen.split(running(resumed).Add(-done.Downtime), running(resumed))
	b.add(c.key(o.name, "precopy_p99_ms"), ms(before.percentile(99)))
	b.add(c.key(o.name, "precopy_max_ms"), ms(before.longest()))
	b.add(c.key(o.name, "handoff_ms"), ms(handoff.longest()))
	b.add(c.key(o.name, "postcopy_p99_ms"), ms(after.percentile(99)))
	b.add(c.key(o.name, "postcopy_max_ms"), ms(after.longest()))
	return b.addGaps(c, o, seen, console.between(began, time.Now()))
}

// addGaps adds what was seen of a guest from outside, over the network and, where it shows
// something all the time, on its console.
func (b *bench) addGaps(c contest, o opponent, network, console silences) error {
	if len(network) < 10 || c.load != loadRedis && len(console) < 10 {
		return errors.New("the guest does not tick")
	}
	b.add(c.key(o.name, "gap_ms"), ms(network.longest()))
	b.add(c.key(o.name, "p99_ms"), ms(network.percentile(99)))
	b.add(c.key(o.name, "p50_ms"), ms(network.percentile(50)))
	if c.load != loadRedis {
		b.add(c.key(o.name, "console_gap_ms"), ms(console.longest()))
	}
	return nil
}
