package runner_test

import (
	"context"
	"log"
	"os/signal"
	"syscall"

	"drafter/runner"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// A package runs until the program is told to end, and is suspended into itself.
func Example() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	r, err := runner.New(runner.Config{
		Host: vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: "out/vms", Netns: "ark0"},
		Devices: []runner.Device{
			{Name: vmm.Kernel, Path: "out/package/vmlinux"}, {Name: vmm.Disk, Path: "out/package/rootfs.ext4"},
			{Name: vmm.State, Path: "out/package/state.bin"}, {Name: vmm.Memory, Path: "out/package/memory.bin"},
			{Name: vmm.Config, Path: "out/package/config.json"},
		},
	})
	if err != nil {
		return err
	}
	defer r.Close()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := r.Resume(ctx); err != nil {
		return err
	}
	select {
	case <-r.Done():
		err = r.Wait()
	case <-ctx.Done():
		err = r.Suspend(context.Background())
	}
	return err
}
