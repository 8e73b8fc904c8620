// This program writes an OCI image of Redis, made from Debian's packages, to an OCI layout:
// something to try Drafter with where no registry can be reached.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"drafter/internal/redisimage"
)

func main() {
	output := flag.String("output", "out/redis-image", "Directory to write the OCI layout to")
	cache := flag.String("cache", ".cache/debian", "Directory to keep downloaded packages in")
	flag.Parse()
	if err := run(*output, *cache); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
	fmt.Printf("oci:%s:%s\n", *output, redisimage.Tag)
}

func run(output, cache string) error {
	work, err := os.MkdirTemp("", "drafter-redis-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	image, err := redisimage.Build(context.Background(), cache, work)
	if err != nil {
		return err
	}
	// An earlier layout is replaced, and nothing else.
	if entries, err := os.ReadDir(output); err == nil && len(entries) > 0 {
		if _, err := os.Stat(filepath.Join(output, "oci-layout")); err != nil {
			return fmt.Errorf("%s has files and is no OCI layout; choose another directory, or empty it", output)
		}
	}
	if err := os.RemoveAll(output); err != nil {
		return err
	}
	return redisimage.WriteLayout(image, output)
}
