package block

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// SyncAndVerify makes a file durable, and then reads it back from the storage, because a lost
// write-back shows only there. It fails unless the file reads as before. Nobody else may write to
// the file.
func SyncAndVerify(ctx context.Context, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	d := &File{f: f, size: info.Size()}
	before, err := Hash(ctx, d)
	if err != nil {
		return fmt.Errorf("verify %s: %w", f.Name(), err)
	}
	if err := d.Sync(); err != nil {
		return err
	}
	// What is clean leaves the page cache; on a file system in memory, nothing does.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return &os.PathError{Op: "verify", Path: f.Name(), Err: err}
	}
	after, err := Hash(ctx, d)
	if err != nil {
		return fmt.Errorf("verify %s: %w", f.Name(), err)
	}
	if before.Device != after.Device {
		return fmt.Errorf("verify %s: it does not read back as it was written; its storage has lost a write", f.Name())
	}
	return nil
}

// SyncAndVerify is [SyncAndVerify] for a device.
func (d *File) SyncAndVerify(ctx context.Context) error {
	if err := d.failed.Load(); err != nil {
		return *err
	}
	return SyncAndVerify(ctx, d.f)
}

// VerifyFile is [SyncAndVerify] for the file at path.
func VerifyFile(ctx context.Context, path string) error {
	d, err := OpenFile(path, false)
	if err != nil {
		return err
	}
	return errors.Join(d.SyncAndVerify(ctx), d.Close())
}
