package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"drafter/internal/block"
)

const (
	engineSize  = 512 << 20
	engineBlock = 64 << 10
)

// device measures the device stack of an instance beside a plain file.
func (b *bench) device(ctx context.Context, rounds int) error {
	base := filepath.Join(b.dir, "engine")
	if err := randomFile(base); err != nil {
		return err
	}
	for range rounds {
		if err := b.overlay(ctx, base); err != nil {
			return err
		}
	}
	return nil
}

func randomFile(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Sync(), f.Close()) }()
	p := make([]byte, 1<<20)
	rng := rand.NewChaCha8([32]byte{1})
	for range engineSize / len(p) {
		if _, err := rng.Read(p); err != nil {
			return err
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// stack opens an instance's device over base, with its files in dir.
func stack(ctx context.Context, base, dir, name string) (*block.Tracker, error) {
	contents, err := block.FileContents(ctx, base)
	if err != nil {
		return nil, err
	}
	file, err := block.OpenFile(base, true)
	if err != nil {
		return nil, err
	}
	paths := block.OverlayPaths{Base: base, Overlay: filepath.Join(dir, name+".overlay"), State: filepath.Join(dir, name+".state")}
	if err := errors.Join(ignoreMissing(os.Remove(paths.Overlay)), ignoreMissing(os.Remove(paths.State))); err != nil {
		return nil, err
	}
	o, err := block.OpenOverlay(file, contents.Device, paths, engineBlock)
	if err != nil {
		return nil, err
	}
	return block.NewTracker(o, engineBlock), nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// overlay measures reads and writes, without syncs, of a plain file, of blocks that the overlay
// holds, and of blocks that it does not.
func (b *bench) overlay(ctx context.Context, base string) (err error) {
	copied := base + ".copy"
	if out, err := exec.CommandContext(ctx, "cp", base, copied).CombinedOutput(); err != nil {
		return fmt.Errorf("copy: %w: %s", err, out)
	}
	file, err := block.OpenFile(copied, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close(), os.Remove(copied)) }()
	fresh, err := stack(ctx, base, b.dir, "fresh")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fresh.Close()) }()
	for _, request := range []int{4 << 10, 1 << 20} {
		kind := strconv.Itoa(request>>10) + "k_mb_per_s"
		p := make([]byte, request)
		for _, d := range []struct {
			name   string
			device block.Device
		}{{"plain", file}, {"overlay", fresh}} {
			speed, err := sweep(p, d.device.ReadAt)
			if err != nil {
				return err
			}
			b.add(d.name+"_read_"+kind, speed)
			// The first sweep of writes fills the overlay; what counts is the second.
			for i := range 2 {
				if speed, err = sweep(p, d.device.WriteAt); err != nil {
					return err
				}
				if i == 0 && d.name == "overlay" && request == 1<<20 {
					continue
				}
			}
			b.add(d.name+"_write_"+kind, speed)
		}
	}
	return nil
}

// sweep goes over a device once and returns MB/s.
func sweep(p []byte, do func([]byte, int64) (int, error)) (float64, error) {
	begin := time.Now()
	for off := int64(0); off < engineSize; off += int64(len(p)) {
		if _, err := do(p, off); err != nil {
			return 0, err
		}
	}
	return engineSize / 1e6 / time.Since(begin).Seconds(), nil
}
