package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/tour"
	"drafter/vmm"
)

const (
	inTurn      = 20 // clones that are started one after the other
	cloneWrites = 16 // MB that each writes then
)

// cloneInTurn measures clones of a package, a process each, one after the other: until all answer,
// and what one costs the host.
func (b *bench) cloneInTurn(ctx context.Context, rounds int) (err error) {
	end, err := b.network(ctx, inTurn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	pkg, err := b.snapshot(ctx, loadRedis, 1)
	if err != nil {
		return err
	}
	for range rounds {
		if err := b.cloneRound(ctx, pkg); err != nil {
			return err
		}
	}
	return nil
}

// clone is an instance of a package.
type clone struct {
	*tour.Service
	vmm      int // process
	instance string
	ours     hostMemory // what our process took once all clones had answered
	started  time.Time
}

func (b *bench) cloneRound(ctx context.Context, pkg string) (err error) {
	instances := filepath.Join(b.dir, "clones")
	var clones []*clone
	end := func() error {
		var errs []error
		for _, c := range clones {
			errs = append(errs, c.End())
		}
		return errors.Join(errs...)
	}
	defer func() { err = errors.Join(err, end(), os.RemoveAll(instances)) }()
	begin := time.Now()
	for i := range inTurn {
		c := &clone{instance: filepath.Join(instances, strconv.Itoa(i))}
		c.started = time.Now()
		if c.Service, err = b.startPeer(pkg, c.instance, fmt.Sprintf("ark%d", i)); err != nil {
			return err
		}
		clones = append(clones, c)
		if err := awaitRedis(ctx, c.Service, guestAddr(i)); err != nil {
			return err
		}
		b.add("clone_ms", ms(time.Since(c.started)))
	}
	b.add(fmt.Sprintf("clones_%d_ms", inTurn), ms(time.Since(begin)))
	config, err := vmm.ReadPackageConfig(filepath.Join(pkg, vmm.PackageFile(vmm.Config)))
	if err != nil {
		return err
	}
	size, _ := config.Device(vmm.Memory)
	for _, c := range clones {
		resumed, err := c.Await(ctx, "Resumed VM")
		if err != nil {
			return err
		}
		b.add("clone_resume_ms", ms(running(resumed).Sub(c.started)))
		if c.vmm, err = vmmOf(c.PID()); err != nil {
			return err
		}
		if c.ours, err = memoryOf(c.PID()); err != nil {
			return err
		}
	}
	for i := range clones {
		if err := fillRedis(ctx, i, cloneWrites); err != nil {
			return err
		}
	}
	beyond := make([]float64, len(clones))
	for i, c := range clones {
		if beyond[i], err = b.measureClone(c, size.Size); err != nil {
			return err
		}
	}
	if err := end(); err != nil {
		return err
	}
	for i, c := range clones {
		written, err := storedMemory(c.instance)
		if err != nil {
			return err
		}
		b.add("clone_written_mb", written)
		b.add("clone_memory_share", beyond[i]/(1.1*written+2))
	}
	clones = nil
	return nil
}

// measureClone adds what a clone takes of the host's memory, and returns that beyond the VMM's own:
// the guest's memory that is not the package's, and what our process has grown by since all guests
// answered.
func (b *bench) measureClone(c *clone, size int64) (beyond float64, err error) {
	guest, err := guestMemoryOf(c.vmm, size)
	if err != nil {
		return 0, err
	}
	all, err := memoryOf(c.vmm, c.PID())
	if err != nil {
		return 0, err
	}
	ours, err := memoryOf(c.PID())
	if err != nil {
		return 0, err
	}
	beyond = guest.copied + guest.untouched + max(0, ours.anonymous-c.ours.anonymous)
	b.add("clone_memory_mb", all.anonymous+guest.untouched)
	b.add("clone_memory_beyond_mb", beyond)
	b.add("clone_vmm_memory_mb", all.anonymous-ours.anonymous-guest.copied)
	b.add("clone_process_memory_mb", ours.anonymous)
	return beyond, nil
}

// storedMemory is how many MB of its memory a suspended instance has stored.
func storedMemory(instance string) (float64, error) {
	var st unix.Stat_t
	path := filepath.Join(instance, "overlay", vmm.PackageFile(vmm.Memory))
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	return float64(st.Blocks) * 512 / 1e6, nil // stat(2)
}

// awaitRedis waits until a Redis answers, or its VM has ended.
func awaitRedis(ctx context.Context, vm *tour.Service, addr string) error {
	for ctx.Err() == nil {
		if pingRedis(ctx, addr) == nil {
			return nil
		}
		select {
		case <-vm.Done():
			return errors.Join(errors.New("the VM has ended before its Redis answered"), vm.Wait())
		case <-time.After(time.Millisecond):
		}
	}
	return context.Cause(ctx)
}

// pingRedis pings a Redis on a connection of its own.
func pingRedis(ctx context.Context, addr string) error {
	conn, err := dialEvery(ctx, 10*time.Millisecond, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close() // what it said was read
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("PING\r\n")); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, len("+PONG\r\n")))
	return err
}
