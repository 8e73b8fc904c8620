package registry_test

import (
	"context"
	"log"

	"drafter/registry"
	"drafter/transport"
)

// Peers of this host start instances of a package from a registry.
func Example() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	devices, err := registry.PackageDevices("out/package")
	if err != nil {
		return err
	}
	r, err := registry.Open(ctx, registry.Config{Devices: devices})
	if err != nil {
		return err
	}
	defer r.Close()
	var trust transport.Trust
	l, err := trust.Listen(ctx, "localhost:1600")
	if err != nil {
		return err
	}
	defer l.Close()
	r.Serve(ctx, l.Accept) // until ctx ends
	return nil
}
