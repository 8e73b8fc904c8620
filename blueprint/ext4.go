package blueprint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"syscall"
	"time"

	"drafter/internal/newfile"
)

// Ext4Config says how to make an ext4 image.
type Ext4Config struct {
	Source string // directory whose content becomes the file system's
	Output string
	Label  string // at most 16 bytes
	Size   int64  // bytes; 0: the content and Free more
	Free   int64  // bytes

	Progress Progress
	// of BuildOCI, which hears what of an image cannot be had; nil: slog.Default()
	Logger *slog.Logger
}

// minExt4 leaves room for a journal.
const minExt4 = 64 << 20

// MakeExt4 makes a sparse image of an ext4 file system that holds a directory's content with
// owners, modes, extended attributes, hard links and device nodes. It needs root to read all of
// these, and mke2fs. The output has its name only once it is complete.
func MakeExt4(ctx context.Context, c Ext4Config) error {
	used, inodes, err := usage(c.Source)
	if err != nil {
		return fmt.Errorf("measure %s: %w", c.Source, err)
	}
	// Room for the file system itself: inode tables (256 bytes each), block maps, directories and a
	// journal.
	need := used + used/32 + inodes*512 + 32<<20
	size := c.Size
	if size == 0 {
		size = max(minExt4, need+c.Free)
	}
	if size < need {
		return fmt.Errorf("make %s: the content needs %d MiB, the size given is %d MiB; pass a larger --size", c.Output, need>>20+1, size>>20)
	}
	size = (size + 1<<20 - 1) &^ (1<<20 - 1) // whole MiB
	f, err := newfile.Create(c.Output)
	if err != nil {
		return fmt.Errorf("make %s: %w", c.Output, err)
	}
	err = f.Truncate(size)
	if err == nil {
		stop := c.watch(f.Link(), used)
		// With nothing left to initialise, the guest's kernel does not write to a new disk by
		// itself.
		_, err = runTool(ctx, "", "mke2fs", "-q", "-F", "-t", "ext4", "-L", c.Label, "-m", "0", "-b", "4096", "-N", fmt.Sprint(max(inodes*5/4+1024, size>>14)),
			"-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0", "-d", c.Source, f.Link())
		stop()
	}
	if err != nil {
		return errors.Join(noRoom(fmt.Errorf("make %s: %w", c.Output, err), filepath.Dir(c.Output), outputRemedy), f.Discard())
	}
	if err := f.Publish(); err != nil {
		return noRoom(fmt.Errorf("make %s: %w", c.Output, err), filepath.Dir(c.Output), outputRemedy)
	}
	return nil
}

// usage counts the blocks and inodes of a tree, hard links once.
func usage(root string) (used, inodes int64, err error) {
	seen := map[uint64]bool{}
	err = filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		if st.Nlink > 1 && !d.IsDir() {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		inodes++
		used += max(st.Blocks*512, 4096)
		return nil
	})
	return used, inodes, err
}

// watch reports how much of a file is written until the returned function is called. mke2fs itself
// reports nothing.
func (c *Ext4Config) watch(path string, total int64) (stop func()) {
	if c.Progress == nil {
		return func() {}
	}
	step := "Writing " + filepath.Base(c.Output)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				c.Progress.report(step, total, total)
				return
			case <-tick.C:
			}
			var st syscall.Stat_t
			if syscall.Stat(path, &st) == nil {
				c.Progress.report(step, min(st.Blocks*512, total-1), total)
			}
		}
	}()
	return func() { close(done); <-ended }
}
