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
	ctx := context.Background()
	devices, err := peer.PackageDevices("out/package", "out/instance-0")
	if err != nil {
		log.Fatal(err)
	}
	p, err := peer.New(peer.Config{
		Host:    vmm.Host{Drivers: vmm.Drivers{qemu.Driver{}}, BaseDir: "out/vms", Netns: "ark0"},
		Devices: devices,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer p.Close()
	var status *vmm.StatusError
	switch err := p.Resume(ctx); {
	case errors.As(err, &status) && status.Status == vmm.Moved:
		log.Fatal("the VM runs on another host by now")
	case errors.Is(err, vmm.ErrInUse):
		log.Fatal("the VM runs here already")
	case err != nil:
		log.Fatal(err)
	}
	var trust transport.Trust
	l, err := trust.Listen(ctx, "localhost:1337")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	moved, err := p.Serve(ctx, l.Accept)
	if errors.Is(err, migrate.ErrInDoubt) {
		log.Fatal("look at the target, and settle it")
	}
	log.Print("moved: ", moved, err)
}
