package blueprint_test

import (
	"context"
	"log"

	"drafter/blueprint"
)

// An operating system, and a disk with an OCI image, from which a package is made.
func Example() {
	ctx := context.Background()
	err := blueprint.BuildOS(ctx, blueprint.OSConfig{Output: "out/blueprint", Guest: "bin/drafter-guest", Kernel: blueprint.DefaultKernel})
	if err != nil {
		log.Fatal(err)
	}
	image, err := blueprint.OpenImage(ctx, blueprint.ImageConfig{Ref: "docker://docker.io/library/redis:7"})
	if err != nil {
		log.Fatal(err)
	}
	err = blueprint.BuildOCI(ctx, image, blueprint.Limits{}, blueprint.Ext4Config{Output: "out/blueprint/oci.ext4", Free: 256 << 20})
	if err != nil {
		log.Fatal(err)
	}
}
