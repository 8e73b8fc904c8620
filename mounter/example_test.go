package mounter_test

import (
	"context"
	"log"

	"drafter/mounter"
	"drafter/transport"
)

// A disk is exposed as a file, and handed to the mounter that asks for it.
func Example() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	m, err := mounter.New(mounter.Config{
		BaseDir: "out/vms",
		Devices: []mounter.Device{{
			Name: "disk", Base: "out/package/rootfs.ext4", Overlay: "out/overlay.ext4", State: "out/state.ext4",
			BlockSize: 64 << 10, MaxCycles: 20, MakeMigratable: true,
		}},
	})
	if err != nil {
		return err
	}
	defer m.Close()
	if err := m.Open(ctx); err != nil {
		return err
	}
	log.Print("the disk is at ", m.Path("disk"))
	var trust transport.Trust
	l, err := trust.Listen(ctx, "localhost:1337")
	if err != nil {
		return err
	}
	defer l.Close()
	return m.Serve(ctx, l.Accept, nil)
}
