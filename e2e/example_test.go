package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/peer"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// The library alone: a VM with Redis in it moves from one peer to another over pipes in memory.
func Example() {
	if err := move(context.Background()); err != nil {
		fmt.Println(err)
	}
	// Output:
	// written before the move
	// moved: true
	// written before the move
}

func move(ctx context.Context) error {
	source, err := newPeer("ark0", filepath.Join(work, "example/source"))
	if err != nil {
		return err
	}
	defer source.Close()
	if err := source.Resume(ctx); err != nil {
		return err
	}
	zero := redis.NewClient(&redis.Options{Addr: "10.0.15.1:6379"}) // the VM's address while it is in ark0
	defer zero.Close()
	if err := zero.Set(ctx, "key", "written before the move", 0).Err(); err != nil {
		return err
	}
	fmt.Println(zero.Get(ctx, "key").Val())

	// What the source accepts, the target has dialed. Any pair of such functions will do: over TCP, TLS, SSH, a relay…
	streams := make(chan io.ReadWriteCloser)
	accept := func(ctx context.Context) (io.ReadWriteCloser, error) {
		select {
		case s := <-streams:
			return s, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	dial := func(ctx context.Context) (io.ReadWriteCloser, error) {
		here, there := net.Pipe()
		select {
		case streams <- there:
			return here, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}

	type end struct {
		moved bool
		err   error
	}
	served := make(chan end, 1)
	sctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		moved, err := source.Serve(sctx, accept) // until the VM has moved, or sctx has ended
		served <- end{moved, err}
	}()

	target, err := newPeer("ark1", filepath.Join(work, "example/target"))
	if err != nil {
		return err
	}
	defer target.Close()
	if err := target.Receive(ctx, dial); err != nil {
		return err
	}
	one := redis.NewClient(&redis.Options{Addr: "10.0.15.2:6379"})
	defer one.Close()
	e := <-served
	if e.err != nil {
		return e.err
	}
	fmt.Println("moved:", e.moved)
	fmt.Println(one.Get(ctx, "key").Val())
	return target.Suspend(ctx)
}

// newPeer is a peer for an instance of the package, in a network namespace that 'drafter nat' made. The instance is kept in dir.
func newPeer(netns, dir string, options ...func(*peer.Config)) (*peer.Peer, error) {
	devices, err := peer.PackageDevices(filepath.Join(work, "out/package"), dir)
	if err != nil {
		return nil, err
	}
	config := peer.Config{
		Host:          vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, VMM: vmm.VMMAuto, Accel: vmm.AccelAuto, BaseDir: filepath.Join(work, "vms"), Netns: netns, CgroupVersion: 2},
		Devices:       devices,
		ResumeTimeout: time.Minute,
		RescueTimeout: 5 * time.Second,
	}
	for _, option := range options {
		option(&config)
	}
	return peer.New(config)
}
