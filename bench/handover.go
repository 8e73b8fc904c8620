package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// handOver measures moves of a guest that writes its memory at random, within this host over a UNIX
// socket: first out of a private mapping of its package, then with memory that changes hands.
func (b *bench) handOver(ctx context.Context, rounds int) (err error) {
	end, err := b.network(ctx, 2)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	pkg, err := b.snapshot(ctx, "random", 1)
	if err != nil {
		return err
	}
	for range rounds {
		if err := b.handOvers(ctx, pkg, "private", "shared", "shared"); err != nil {
			return err
		}
	}
	return nil
}

// handOvers moves a VM that is started for it, as often as there are names for its memory before
// each move.
func (b *bench) handOvers(ctx context.Context, pkg string, memory ...string) (err error) {
	dir := filepath.Join(b.dir, "handover")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	socket := func(hop int) string { return "unix:" + filepath.Join(dir, fmt.Sprint("socket-", hop)) }
	args := func(hop int, raddr string) []string {
		return []string{"peer", "--raddr", raddr, "--laddr", socket(hop), "--enable-output=false", "--chroot-base-dir", b.vms(), "--netns", fmt.Sprint("ark", hop%2), "--package", pkg, "--instance", filepath.Join(dir, fmt.Sprint("instance-", hop))}
	}
	vm, err := b.drafter.Start(args(0, "")...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.End()) }()
	if _, err := vm.Await(ctx, "Resumed VM"); err != nil {
		return err
	}
	for i, before := range memory {
		time.Sleep(2 * time.Second) // the last one's end is over, and the guest has written
		next, err := b.drafter.Start(args(i+1, socket(i))...)
		if err != nil {
			return err
		}
		moved, err := vm.Await(ctx, "Completed migration")
		if err == nil {
			err = vm.Wait()
		}
		vm = next
		if err != nil {
			return err
		}
		b.add("handover_"+before+"_ms", ms(moved.Downtime))
		b.add("handover_"+before+"_memory_mb", float64(moved.MemoryBytes)/1e6)
	}
	return nil
}
