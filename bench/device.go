package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/expose/fuse"
)

const (
	engineSize  = 512 << 20
	engineBlock = 64 << 10
	pageBytes   = 4096
)

// mapped is what a process measures on a file that it has mapped.
type mapped struct {
	FaultIn    float64 `json:"fault_in_gb_per_s"`    // reading every page once, in order
	WriteFault float64 `json:"write_fault_gb_per_s"` // then writing every page
	Flush      float64 `json:"flush_gb_per_s"`       // then fsync(2)
	// median of single reads all over a file that is not cached
	Random float64 `json:"random_fault_us"`
	Sum    byte    `json:"sum"` // of what was read, so that it is read
}

// Mapping measures a file that it maps, and one whose pages are cold, and writes what it finds to
// w. It is to run in a process of its own, as a VMM does: 'drafter-bench mapping' is that.
func Mapping(w io.Writer, path, cold string) error {
	m, err := measureMapping(path, cold)
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(m)
}

func measureMapping(path, cold string) (m mapped, err error) {
	f, memory, err := mapFile(path)
	if err != nil {
		return m, err
	}
	gigabytes := float64(len(memory)) / 1e9
	begin := time.Now()
	var sum byte
	for i := 0; i < len(memory); i += pageBytes {
		sum += memory[i]
	}
	m.FaultIn = gigabytes / time.Since(begin).Seconds()
	begin = time.Now()
	for i := 0; i < len(memory); i += pageBytes {
		memory[i] += sum | 1
	}
	m.WriteFault = gigabytes / time.Since(begin).Seconds()
	begin = time.Now()
	if err := f.Sync(); err != nil {
		return m, err
	}
	m.Flush = gigabytes / time.Since(begin).Seconds()
	_, memory, err = mapFile(cold)
	if err != nil {
		return m, err
	}
	// no read-ahead, as between pages that do not follow each other
	if err := unix.Madvise(memory, unix.MADV_RANDOM); err != nil {
		return m, err
	}
	var took []time.Duration
	for range 2000 {
		i := rand.IntN(len(memory)/pageBytes) * pageBytes
		begin := time.Now()
		sum += memory[i]
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	m.Random = float64(took[len(took)/2].Nanoseconds()) / 1000
	m.Sum = sum
	return m, nil
}

func mapFile(path string) (*os.File, []byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return f, memory, err
}

// mapping runs [Mapping] in another process.
func (b *bench) mapping(path, cold string) (m mapped, err error) {
	cmd := exec.Command(b.self, "mapping", path, cold)
	cmd.Stderr = b.progress
	out, err := cmd.Output()
	if err != nil {
		return m, fmt.Errorf("measure mapping of %s: %w", path, err)
	}
	return m, json.Unmarshal(out, &m)
}

// device measures the device stack of an instance beside a plain file: mapped through FUSE as guest
// memory, and read and written directly.
func (b *bench) device(ctx context.Context, rounds int) error {
	base := filepath.Join(b.dir, "engine")
	if err := randomFile(base); err != nil {
		return err
	}
	for range rounds {
		if err := b.memory(ctx, base); err != nil {
			return err
		}
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

// memory measures, on files in memory, a plain one, one that is exposed by FUSE without anything in
// between, and the device of an instance; and the latter on disk, where its overlay grows in the
// page cache that the disk empties.
func (b *bench) memory(ctx context.Context, base string) (err error) {
	shm, err := os.MkdirTemp("/dev/shm", "drafter-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(shm)) }()
	path := filepath.Join(shm, "file")
	if out, err := exec.CommandContext(ctx, "cp", base, path).CombinedOutput(); err != nil {
		return fmt.Errorf("copy: %w: %s", err, out)
	}
	if err := b.instance(ctx, "instance", path, shm); err != nil {
		return err
	}
	if err := b.instance(ctx, "instance_on_disk", base, b.dir); err != nil {
		return err
	}
	bare, err := block.OpenFile(path, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bare.Close()) }()
	if err := b.exposed("bare_fuse", shm, bare, bare); err != nil {
		return err
	}
	m, err := b.mapping(path, path)
	if err != nil {
		return err
	}
	b.addMapped("plain", m)
	return nil
}

// instance measures an instance's device over base.
func (b *bench) instance(ctx context.Context, name, base, dir string) (err error) {
	warm, err := stack(ctx, base, dir, "warm")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, warm.Close()) }()
	cold, err := stack(ctx, base, dir, "cold")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cold.Close()) }()
	return b.exposed(name, dir, warm, cold)
}

// exposed measures devices that are exposed by FUSE below dir.
func (b *bench) exposed(name, dir string, warm, cold block.Device) error {
	mount, err := fuse.New(fuse.Config{Dir: filepath.Join(dir, "mount")}, []expose.Device{
		{Name: "warm", Kind: expose.Memory, Device: warm}, {Name: "cold", Kind: expose.Memory, Device: cold},
	})
	if err != nil {
		return err
	}
	m, err := b.mapping(mount.Path("warm"), mount.Path("cold"))
	if err = errors.Join(err, mount.Failed(), mount.Close()); err != nil {
		return err
	}
	b.addMapped(name, m)
	return nil
}

func (b *bench) addMapped(name string, m mapped) {
	b.add(name+"_fault_in_mb_per_s", m.FaultIn*1000)
	b.add(name+"_write_fault_mb_per_s", m.WriteFault*1000)
	b.add(name+"_flush_mb_per_s", m.Flush*1000)
	b.add(name+"_random_fault_us", m.Random)
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
