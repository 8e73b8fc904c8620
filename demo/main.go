// The demo does what the README's first tour does, with the commands a user would type: it builds
// blueprints, boots and snapshots a VM with Redis from an OCI image in a registry, resumes it,
// writes keys through a forwarded port, suspends, resumes again, and reads all keys back. Then it
// starts an instance of the package and moves it live to another peer, while a client writes to it.
// Its last line on stdout is a JSON object with what was measured.
//
// With --vmm firecracker all of it runs on Firecracker. With --blueprint it uses one that is there
// already, and needs no network.
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
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/mark"
	"drafter/internal/redisimage"
	"drafter/internal/tour"
)

const (
	keys         = 1000
	externalAddr = "127.0.0.1:3333"
)

// result is the demo's last line.
type result struct {
	Demo        string `json:"demo"`
	BootMS      int64  `json:"boot_ms"`    // VMM start to the agent's answer
	SuspendMS   int64  `json:"suspend_ms"` // SIGTERM's effect to the package being durable
	ResumeMS    int64  `json:"resume_ms"`  // command to running guest
	KeysWritten int    `json:"keys_written"`
	KeysLost    int    `json:"keys_lost"`

	Migration migration `json:"migration"`
}

// migration is what was measured of the move.
type migration struct {
	DowntimeMS float64 `json:"downtime_ms"` // pause at the source to the target's word that it runs
	GapMS      float64 `json:"gap_ms"`      // longest silence a client saw
	// first connection until nothing at the source was needed
	TotalMS int64 `json:"total_ms"`
	Bytes   int64 `json:"bytes"` // sent and received
	// written before and not sent: unchanged, zeros, or the package's
	BytesSaved int64 `json:"bytes_saved"`
}

func main() {
	d := &demo{dir: "out/demo", drafter: tour.Drafter{Bin: "bin/drafter", Logs: "out/demo"}}
	flag.StringVar(&d.vmm, "vmm", "auto", "VMM to use: auto, qemu or firecracker")
	flag.StringVar(&d.blueprint, "blueprint", "", "Directory of a blueprint with Redis to use (default: a new one)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := d.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "== "+format+"\n", args...)
}

func (d *demo) run(ctx context.Context) (err error) {
	if err := mark.Renew(d.dir, ".drafter-demo", "drafter-demo"); err != nil {
		return err
	}
	if d.blueprint == "" {
		if err := d.makeBlueprint(ctx); err != nil {
			return err
		}
	}

	say("Starting the NAT")
	nat, err := d.drafter.Start("nat")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nat.End()) }()
	if _, err := nat.Await(ctx, "NAT is up"); err != nil {
		return err
	}

	r := result{Demo: "redis", KeysWritten: keys}
	say("Booting and snapshotting the VM")
	if err := d.snapshot(ctx, &r); err != nil {
		return err
	}
	if err := d.useVM(ctx, &r); err != nil {
		return err
	}
	if err := d.moveVM(ctx, &r); err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Println(string(b))
	if r.KeysLost > 0 {
		return fmt.Errorf("%d keys were lost", r.KeysLost)
	}
	return nil
}

type demo struct {
	dir            string
	vmm, blueprint string
	drafter        tour.Drafter
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// makeBlueprint makes a blueprint with Redis.
func (d *demo) makeBlueprint(ctx context.Context) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	cache = filepath.Join(cache, "drafter", "debian")
	say("Making an OCI image of Redis from Debian's packages, and serving it from a registry")
	image, err := redisimage.Build(ctx, cache, d.dir)
	if err != nil {
		return fmt.Errorf("make Redis image: %w", err)
	}
	ref, stopRegistry, err := redisimage.Serve(image)
	if err != nil {
		return err
	}
	defer stopRegistry()

	say("Making the blueprint")
	d.blueprint = d.path("blueprint")
	if err := d.drafter.Run(ctx, os.Stderr, "blueprint", "os", "--output", d.blueprint, "--cache", cache); err != nil {
		return err
	}
	return d.drafter.Run(ctx, os.Stderr, "blueprint", "oci", "docker://"+ref, "--output", filepath.Join(d.blueprint, "oci.ext4"))
}

func (d *demo) snapshot(ctx context.Context, r *result) error {
	var report bytes.Buffer
	err := d.drafter.Run(ctx, &report, "snapshotter", "--report", "--enable-output=false", "--chroot-base-dir", d.path("vms"),
		"--vmm", d.vmm, "--devices", tour.SnapshotterDevices(d.blueprint, d.path("package")))
	if err != nil {
		return err
	}
	return json.Unmarshal(report.Bytes(), r)
}

// useVM writes in one run of the VM and reads in the next.
func (d *demo) useVM(ctx context.Context, r *result) error {
	runner := []string{"runner", "--chroot-base-dir", d.path("vms"), "--devices", tour.PackageDevices(d.path("package"))}
	var runID string
	err := d.withVM(ctx, runner, r, func(client *redis.Client) error {
		say("Writing %d keys through %s", keys, externalAddr)
		for i := range keys {
			if err := client.Set(ctx, fmt.Sprintf("key:%d", i), value(i), 0).Err(); err != nil {
				return fmt.Errorf("write key %d: %w", i, err)
			}
		}
		var err error
		runID, err = redisRunID(ctx, client)
		return err
	})
	if err != nil {
		return err
	}
	return d.withVM(ctx, runner, r, func(client *redis.Client) error {
		say("Reading the keys back")
		for i := range keys {
			got, err := client.Get(ctx, fmt.Sprintf("key:%d", i)).Result()
			if err != nil && !errors.Is(err, redis.Nil) {
				return fmt.Errorf("read key %d: %w", i, err)
			}
			if got != value(i) {
				r.KeysLost++
			}
		}
		now, err := redisRunID(ctx, client)
		if err == nil && now != runID {
			err = fmt.Errorf("this is another Redis process (run id %s, not %s): the VM was not resumed", now, runID)
		}
		return err
	})
}

const secondAddr = "127.0.0.1:4444"

// moveVM runs an instance in one namespace, moves it to another, and reads there what was written
// before and meanwhile.
func (d *demo) moveVM(ctx context.Context, r *result) (err error) {
	forwarder, err := d.drafter.Start("forwarder", "--port-forwards", fmt.Sprintf(`[{"netns":"ark0","internalPort":"6379","protocol":"tcp","externalAddr":%q},{"netns":"ark1","internalPort":"6379","protocol":"tcp","externalAddr":%q}]`, externalAddr, secondAddr))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, forwarder.End()) }()
	if _, err := forwarder.Await(ctx, "Forwarding"); err != nil {
		return err
	}
	peer := func(netns, instance, raddr, laddr string) (*tour.Service, error) {
		return d.drafter.Start("peer", "--chroot-base-dir", d.path("vms"), "--netns", netns, "--package", d.path("package"), "--instance", d.path(instance), "--raddr", raddr, "--laddr", laddr)
	}
	say("Starting an instance of the package that can be moved")
	source, err := peer("ark0", "instance-0", "", "localhost:1337")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.End()) }()
	if _, err := source.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	before := redis.NewClient(&redis.Options{Addr: externalAddr, MaxRetries: 10})
	defer before.Close()
	if err := before.Set(ctx, "moved", "with the VM", 0).Err(); err != nil {
		return fmt.Errorf("write before the move: %w", err)
	}
	runID, err := redisRunID(ctx, before)
	if err != nil {
		return err
	}
	pulse, err := tour.StartPulse(ctx, externalAddr)
	if err != nil {
		return err
	}
	defer func() {
		_, perr := pulse.End()
		err = errors.Join(err, perr)
	}()
	time.Sleep(500 * time.Millisecond)
	pulse.Reset()

	say("Moving it to another peer while a client pings it on one connection")
	target, err := peer("ark1", "instance-1", "localhost:1337", "")
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
	time.Sleep(500 * time.Millisecond)
	gap, err := pulse.End()
	if err != nil {
		return err
	}
	r.Migration = migration{DowntimeMS: ms(done.Downtime), GapMS: ms(gap), TotalMS: done.Took.Milliseconds(), Bytes: done.Bytes, BytesSaved: done.BytesSaved}

	say("Reading at the new place what was written at the old one")
	after := redis.NewClient(&redis.Options{Addr: secondAddr, MaxRetries: 10})
	defer after.Close()
	got, err := after.Get(ctx, "moved").Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		return fmt.Errorf("read after the move: %w", err)
	}
	if got != "with the VM" {
		r.KeysLost++
	}
	now, err := redisRunID(ctx, after)
	if err == nil && now != runID {
		err = fmt.Errorf("this is another Redis process (run id %s, not %s): the VM did not move", now, runID)
	}
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func value(i int) string { return fmt.Sprintf("value %d of the demo", i*i) }

func redisRunID(ctx context.Context, client *redis.Client) (string, error) {
	info, err := client.Info(ctx, "server").Result()
	if err != nil {
		return "", fmt.Errorf("ask Redis for its run id: %w", err)
	}
	_, after, _ := strings.Cut(info, "run_id:")
	id, _, _ := strings.Cut(after, "\r\n")
	return id, nil
}

// withVM resumes the VM, forwards its port, lets use talk to Redis, and suspends the VM.
func (d *demo) withVM(ctx context.Context, runner []string, r *result, use func(*redis.Client) error) (err error) {
	say("Resuming the VM")
	begin := time.Now()
	vm, err := d.drafter.Start(runner...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.End()) }()
	resumed, err := vm.Await(ctx, "Resumed VM")
	if err != nil {
		return err
	}
	// The line comes after the agent's answer; the guest ran before.
	r.ResumeMS = (resumed.Time.Sub(begin) - (resumed.AgentAfter - resumed.Took)).Milliseconds()
	forwarder, err := d.drafter.Start("forwarder", "--port-forwards", tour.Forward("ark0", "6379", externalAddr))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, forwarder.End()) }()
	if _, err := forwarder.Await(ctx, "Forwarding"); err != nil {
		return err
	}
	client := redis.NewClient(&redis.Options{Addr: externalAddr, MaxRetries: 10})
	err = use(client)
	if err = errors.Join(err, client.Close()); err != nil {
		return err
	}
	if err := forwarder.End(); err != nil {
		return err
	}
	say("Suspending the VM")
	if err := vm.End(); err != nil {
		return err
	}
	suspended, err := vm.Await(ctx, "Suspended VM")
	r.SuspendMS = suspended.Took.Milliseconds()
	return err
}
