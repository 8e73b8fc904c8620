package packager_test

import (
	"context"
	"log"

	"drafter/packager"
	"drafter/signature"
)

// A package is signed and pushed. Another host accepts it only if it is signed so.
func Example() {
	ctx := context.Background()
	key, err := signature.ReadPrivateKey("key.pem")
	if err != nil {
		log.Fatal(err)
	}
	if err := packager.Sign(ctx, "out/package", key, ""); err != nil {
		log.Fatal(err)
	}
	artifact := packager.Artifact{Reference: "registry.example.com/vms/redis:1"}
	if _, err := artifact.Push(ctx, "out/package", nil); err != nil {
		log.Fatal(err)
	}

	verifier, err := signature.NewVerifier([]string{"key.pub"}, "")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := artifact.Pull(ctx, "pulled", verifier, nil); err != nil {
		log.Fatal(err)
	}
}

// Devices are stored in one file, and taken out of it.
func ExampleCreate() {
	ctx := context.Background()
	devices := []packager.Device{{Name: "disk", Path: "out/package/rootfs.ext4"}, {Name: "config", Path: "out/package/config.json"}}
	if err := packager.Create(ctx, "out/app.tar.zst", devices, nil); err != nil {
		log.Fatal(err)
	}
	taken := []packager.Device{{Name: "disk", Path: "elsewhere/rootfs.ext4"}}
	if err := packager.Extract(ctx, "out/app.tar.zst", taken, nil, nil); err != nil {
		log.Fatal(err)
	}
}
