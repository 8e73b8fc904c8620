// The benchmarks measure what a user waits for: boot, suspend and resume of a VM, without and with the device engine, packing and unpacking its package;
// and the engine beside a plain file. They print every round, medians, and a JSON object.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/redisimage"
	"drafter/internal/tour"
)

func main() {
	if os.Getenv("BENCH_MAPPING") != "" {
		m, err := measureMapping(os.Args[1], os.Args[2])
		if err == nil {
			err = json.NewEncoder(os.Stdout).Encode(m)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "Error:", err)
			os.Exit(1)
		}
		return
	}
	rounds := flag.Int("rounds", 5, "How often each is measured")
	engineOnly := flag.Bool("engine", false, "Whether to measure the device engine only, without VMs")
	registryOnly := flag.Bool("registry", false, "Whether to measure starts from a registry only")
	compareQuick := flag.Bool("compare-quick", false, "Whether to compare with QEMU's own live migration only, in less than three minutes")
	compareWhole := flag.Bool("compare", false, "Whether to compare with QEMU's own live migration only")
	output := flag.String("output", "bench/results/latest.json", "File for what comparisons find")
	reportOnly := flag.Bool("report", false, "Whether to make tables and charts of --output only")
	firecrackerOnly := flag.Bool("firecracker", false, "Whether to measure Firecracker only, which needs it, its jailer and KVM")
	migrationOnly := flag.Bool("migration", false, "Whether to measure live migrations only")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	var err error
	switch {
	case *reportOnly:
		err = report(*output)
	case *compareQuick:
		err = runComparison(ctx, quick, *output)
	case *compareWhole:
		err = runComparison(ctx, whole, *output)
	default:
		err = run(ctx, *rounds, *engineOnly, *migrationOnly, *registryOnly, *firecrackerOnly)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

const dir = "out/bench"

// bench collects measurements by name.
type bench struct {
	drafter tour.Drafter
	names   []string
	values  map[string][]float64

	timeline []moment // of one migration
}

func (b *bench) add(name string, value float64) {
	if b.values[name] == nil {
		b.names = append(b.names, name)
	}
	b.values[name] = append(b.values[name], value)
	fmt.Fprintf(os.Stderr, "%s: %.0f\n", name, value)
}

func run(ctx context.Context, rounds int, engineOnly, migrationOnly, registryOnly, firecrackerOnly bool) (err error) {
	if rounds < 1 {
		return errors.New("--rounds must be at least 1")
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	b := &bench{drafter: tour.Drafter{Bin: "bin/drafter", Logs: dir}, values: map[string][]float64{}}
	if !migrationOnly && !registryOnly && !engineOnly {
		if err := b.firecracker(ctx, rounds); err != nil {
			return fmt.Errorf("firecracker: %w", err)
		}
	}
	if firecrackerOnly {
		return b.report()
	}
	if !migrationOnly && !registryOnly {
		if err := b.engine(ctx, rounds); err != nil {
			return err
		}
	}
	if engineOnly {
		return b.report()
	}
	if err := b.makeBlueprint(ctx); err != nil {
		return err
	}
	if !registryOnly {
		if err := b.migration(ctx, rounds); err != nil {
			return err
		}
	}
	if migrationOnly {
		return b.report()
	}
	nat, err := b.drafter.Start("nat", "--namespace-count", "1")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nat.End()) }()
	if _, err := nat.Await(ctx, "NAT is up"); err != nil {
		return err
	}
	for range rounds {
		if err := b.snapshot(ctx); err != nil {
			return err
		}
	}
	if err := b.registry(ctx, rounds); err != nil {
		return err
	}
	if registryOnly {
		return b.report()
	}
	for range rounds {
		if err := b.resume(ctx); err != nil {
			return err
		}
	}
	for round := range rounds {
		if err := b.peer(ctx, round); err != nil {
			return err
		}
	}
	for range rounds {
		if err := b.pack(ctx); err != nil {
			return err
		}
	}
	return b.report()
}

// runComparison compares our migrations with QEMU's own, and leaves the result in a file.
func runComparison(ctx context.Context, contests []contest, output string) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	b := &bench{drafter: tour.Drafter{Bin: "bin/drafter", Logs: dir}, values: map[string][]float64{}}
	if err := b.alone(ctx, 3); err != nil {
		return fmt.Errorf("engine alone: %w", err)
	}
	if err := b.makeBlueprint(ctx); err != nil {
		return err
	}
	if err := b.compare(ctx, contests); err != nil {
		return err
	}
	return errors.Join(b.results().write(output), report(output), b.report())
}

func (b *bench) makeBlueprint(ctx context.Context) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	cache = filepath.Join(cache, "drafter", "debian")
	image, err := redisimage.Build(ctx, cache, dir)
	if err != nil {
		return err
	}
	layout := filepath.Join(dir, "image")
	if err := redisimage.WriteLayout(image, layout); err != nil {
		return err
	}
	blueprint := filepath.Join(dir, "blueprint")
	if err := b.drafter.Run(ctx, os.Stderr, "blueprint", "os", "--output", blueprint, "--cache", cache); err != nil {
		return err
	}
	return b.drafter.Run(ctx, os.Stderr, "blueprint", "oci", "oci:"+layout, "--output", filepath.Join(blueprint, "oci.ext4"))
}

// snapshot measures a boot of the Redis guest, until its port is open and its agent answers, and the suspend after it.
func (b *bench) snapshot(ctx context.Context) error {
	var out bytes.Buffer
	err := b.drafter.Run(ctx, &out, "snapshotter", "--report", "--enable-output=false", "--chroot-base-dir", filepath.Join(dir, "vms"),
		"--devices", tour.SnapshotterDevices(filepath.Join(dir, "blueprint"), filepath.Join(dir, "package")))
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

// resume measures from the start of the command to the guest running, to the agent's answer, and the suspend at the end.
func (b *bench) resume(ctx context.Context) error {
	begin := time.Now()
	vm, err := b.drafter.Start("runner", "--enable-output=false", "--chroot-base-dir", filepath.Join(dir, "vms"), "--devices", tour.PackageDevices(filepath.Join(dir, "package")))
	if err != nil {
		return err
	}
	resumed, err := vm.Await(ctx, "Resumed VM")
	if err != nil {
		return errors.Join(err, vm.End())
	}
	// The line is written after the agent's answer; the guest runs since "took" after the command's work began.
	b.add("resume_ms", ms(resumed.Time.Sub(begin)-(resumed.AgentAfter-resumed.Took)))
	b.add("resume_agent_ms", ms(resumed.Time.Sub(begin)))
	if err := vm.End(); err != nil {
		return err
	}
	suspended, err := vm.Await(ctx, "Suspended VM")
	b.add("suspend_ms", ms(suspended.Took))
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// pack measures the packager in MB (10⁶ bytes) per second: of data, holes not counted, and of devices as the guest sees them. Both end durable on disk.
func (b *bench) pack(ctx context.Context) error {
	pkg, extracted, archive := filepath.Join(dir, "package"), filepath.Join(dir, "extracted"), filepath.Join(dir, "package.tar.zst")
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
	if len(b.values["package_data_mb"]) == 0 {
		info, err := os.Stat(archive)
		if err != nil {
			return err
		}
		b.add("package_data_mb", data)
		b.add("package_device_mb", devices)
		b.add("package_archive_mb", float64(info.Size())/1e6)
	}
	return os.RemoveAll(extracted)
}

func (b *bench) report() error {
	table := tabwriter.NewWriter(os.Stderr, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "\tmedian\tmin\tmax\trounds\t")
	medians := map[string]float64{}
	for _, name := range b.names {
		v := slices.Sorted(slices.Values(b.values[name]))
		medians[name] = v[len(v)/2]
		fmt.Fprintf(table, "%s\t%.0f\t%.0f\t%.0f\t%d\t\n", name, v[len(v)/2], v[0], v[len(v)-1], len(v))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	out, err := json.Marshal(map[string]any{"medians": medians, "rounds": b.values})
	if err != nil {
		return err
	}
	fmt.Println(string(out))
	return nil
}
