package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"drafter/vmm"
	"drafter/vmm/qemu"
)

const (
	runTime    = 10 * time.Second // for which a guest is measured
	runClients = 4                // of Redis
)

// runLoads are the loads of guests whose run is measured, with how each counts its operations.
var runLoads = []struct {
	name  string
	count func(context.Context, time.Duration) (perSecond float64, err error)
}{
	{loadRedis, countSets},
	{loadBound, countWrites},
}

// run measures a guest that only runs: what it does in a second, and what it costs the host. It
// runs under Drafter and under a plain QEMU whose memory is a memfd, in turn.
func (b *bench) run(ctx context.Context, rounds int) (err error) {
	end, err := b.network(ctx, 2)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	for range rounds {
		for _, load := range runLoads {
			c := contest{gib: 1, load: load.name}
			for _, run := range []func(context.Context, contest, func(*runner) error) error{b.runOurs, b.runMemfd} {
				if err := b.calm(ctx, c); err != nil {
					return err
				}
				err := run(ctx, c, func(r *runner) error {
					time.Sleep(settle)
					return b.measureRun(ctx, r, load.name, load.count)
				})
				if err != nil {
					return fmt.Errorf("load %s: %w", load.name, err)
				}
			}
		}
	}
	return nil
}

// runner is a guest that runs, in the first network namespace.
type runner struct {
	name string // of who runs it
	vmm  int    // process
	ours int    // process; 0 for none
	size int64  // of its memory
	// of ours: where memory would be stored, and how much of it was when the guest began to run, in MB
	instance string
	stored   float64
}

func (r *runner) pids() []int {
	if r.ours == 0 {
		return []int{r.vmm}
	}
	return []int{r.vmm, r.ours}
}

// runOurs calls measure with a guest that a peer has started.
func (b *bench) runOurs(ctx context.Context, c contest, measure func(*runner) error) (err error) {
	r := &runner{name: "drafter", size: int64(c.gib) << 30, instance: filepath.Join(b.dir, "instances", "run")}
	pkg, err := b.snapshot(ctx, c.load, c.gib)
	if err != nil {
		return err
	}
	d := *b
	d.drafter.Console = &pulse{}
	vm, err := d.startPeer(pkg, r.instance, "ark0")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.End()) }()
	if _, err := vm.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	if r.stored, err = storedMemory(r.instance); err != nil {
		return err
	}
	r.ours = vm.PID()
	if r.vmm, err = vmmOf(r.ours); err != nil {
		return err
	}
	return measure(r)
}

// runMemfd calls measure with the same guest under a QEMU that Drafter does not serve.
func (b *bench) runMemfd(ctx context.Context, c contest, measure func(*runner) error) (err error) {
	g, err := b.ownGuest(ctx, c.load, c.gib)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	saved, err := b.savedOwn(ctx, g)
	if err != nil {
		return err
	}
	g.backing = vmm.BackingShared
	m, err := g.start(ctx, qemu.Driver{Own: true, Dir: g.dir}, 0, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	if err := m.load(ctx, saved); err != nil {
		return err
	}
	r := &runner{name: "memfd", size: int64(c.gib) << 30}
	if r.vmm, err = vmmIn(m.dir.Path()); err != nil {
		return err
	}
	return measure(r)
}

func (b *bench) measureRun(ctx context.Context, r *runner, load string, count func(context.Context, time.Duration) (float64, error)) error {
	written, err := diskWrites(r.pids()...)
	if err != nil {
		return err
	}
	var cpu float64
	if r.ours != 0 {
		if cpu, err = cpuSeconds(r.ours); err != nil {
			return err
		}
	}
	begin := time.Now()
	perSecond, err := count(ctx, runTime)
	if err != nil {
		return err
	}
	took := time.Since(begin).Seconds()
	name := "run_" + load + "_" + r.name + "_"
	b.add(name+"ops_per_s", perSecond)
	now, err := diskWrites(r.pids()...)
	if err != nil {
		return err
	}
	b.add(name+"disk_mb", now-written)
	all, err := memoryOf(r.pids()...)
	if err != nil {
		return err
	}
	guest, err := guestMemoryOf(r.vmm, r.size)
	if err != nil {
		return err
	}
	beyond := all.proportional + guest.untouched - guest.touched
	b.add(name+"touched_mb", guest.touched)
	b.add(name+"beyond_mb", beyond)
	b.add(name+"memory_share", beyond/(0.05*guest.touched+40))
	if r.ours == 0 {
		return nil
	}
	used, err := cpuSeconds(r.ours)
	if err != nil {
		return err
	}
	ours, err := memoryOf(r.ours)
	if err != nil {
		return err
	}
	stored, err := storedMemory(r.instance)
	if err != nil {
		return err
	}
	b.add(name+"process_cpu_percent", (used-cpu)/took*100)
	b.add(name+"process_memory_mb", ours.proportional)
	b.add("run_memory_disk_mb", stored-r.stored)
	return nil
}

// countSets is how many sets a second the guest's Redis acknowledges to clients each of which waits
// for the answer to the last one.
func countSets(ctx context.Context, span time.Duration) (perSecond float64, err error) {
	c, err := redisInMemory(ctx, 0)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	var sets atomic.Int64
	clients, ctx := errgroup.WithContext(ctx)
	begin := time.Now()
	for client := range runClients {
		clients.Go(func() error {
			value := make([]byte, redisValue)
			_, _ = rand.NewChaCha8([32]byte{byte(client)}).Read(value) // which never fails
			for n := client; time.Since(begin) < span; n += runClients {
				if err := c.Set(ctx, fmt.Sprint("key-", n%redisKeys), value, 0).Err(); err != nil {
					return fmt.Errorf("set a key of Redis: %w", err)
				}
				sets.Add(1)
			}
			return nil
		})
	}
	if err := clients.Wait(); err != nil {
		return 0, err
	}
	return float64(sets.Load()) / time.Since(begin).Seconds(), nil
}

// countWrites is how many writes to a page a second a guest's memory-bound program does, as it
// tells.
func countWrites(_ context.Context, span time.Duration) (perSecond float64, err error) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{Port: tickPort})
	if err != nil {
		return 0, err
	}
	defer conn.Close() // nothing was written
	if err := conn.SetReadDeadline(time.Now().Add(span)); err != nil {
		return 0, err
	}
	var first, last uint64
	var from, to time.Time
	for {
		var told [8]byte
		_, _, err := conn.ReadFromUDP(told[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return 0, err
		}
		last, to = binary.LittleEndian.Uint64(told[:]), time.Now()
		if from.IsZero() {
			first, from = last, to
		}
	}
	if !to.After(from) {
		return 0, errors.New("the guest does not tell how much it has written")
	}
	return float64(last-first) / to.Sub(from).Seconds(), nil
}
