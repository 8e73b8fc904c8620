package peer_test

import (
	"context"
	"errors"
	"log"

	"drafter/migrate"
	"drafter/peer"
	"drafter/transport"
	"drafter/vmm"
	"drafter/vmm/qemu"
)

// An instance runs here until another peer asks for it.
func Example() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	devices, err := peer.PackageDevices("out/package", "out/instance-0")
	if err != nil {
		return err
	}
	p, err := peer.New(peer.Config{
		Host:    vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: "out/vms", Netns: "ark0"},
		Devices: devices,
	})
	if err != nil {
		return err
	}
	defer p.Close()
	var status *vmm.StatusError
	switch err := p.Resume(ctx); {
	case errors.As(err, &status) && status.Status == vmm.Moved:
		return errors.New("the VM runs on another host by now")
	case errors.Is(err, vmm.ErrInUse):
		return errors.New("the VM runs here already")
	case err != nil:
		return err
	}
	var trust transport.Trust
	l, err := trust.Listen(ctx, "localhost:1337")
	if err != nil {
		return err
	}
	defer l.Close()
	moved, err := p.Serve(ctx, l.Accept)
	if errors.Is(err, migrate.ErrInDoubt) {
		return errors.New("look at the target, and settle it")
	}
	log.Print("moved: ", moved, err)
	return nil
}
