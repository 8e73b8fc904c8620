// Package fuse exposes devices as the files of a FUSE file system: one mount per VM, one file per
// device. It needs no kernel module beyond FUSE itself.
//
// The process that serves a mount must never read or write its files through a mapping of its own:
// it would wait for itself.
package fuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/fusemount"
	"drafter/internal/logging"
	"drafter/internal/private"
)

// Config says where and for whom to expose.
type Config struct {
	Dir      string // made, and removed by Close
	UID, GID int    // owner of the files

	Logger *slog.Logger // nil: slog.Default()
}

// Mount is a mounted set of devices. It implements [expose.Exposure].
type Mount struct {
	dir    string
	device uint64 // that the kernel gave the mount; it stays when the directory gets another name
	server *fuse.Server
	failed atomic.Pointer[error]
	log    *slog.Logger
}

var _ expose.Exposure = (*Mount)(nil)

const (
	// maxTransfer is the size of the largest request in bytes. FUSE's limit is 1 MiB, and with the
	// header a reply must fit a pipe of that size; whole blocks of 64 KiB are written without
	// reading what is around them.
	maxTransfer = 15 * 64 << 10
	// maxBackground is how many requests the kernel sends ahead. Writes to one file wait for each
	// other anyway.
	maxBackground = 16
	// forever is how long the kernel may keep attributes and names, which never change.
	forever = 365 * 24 * time.Hour
)

// New mounts devices. It first removes a mount that a killed process left at the place.
func New(c Config, devices []expose.Device) (*Mount, error) {
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("expose devices: %w", err)
	}
	if err := fusemount.AbortBelow(dir); err != nil {
		return nil, fmt.Errorf("expose devices: %w", err)
	}
	if err := private.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("expose devices: %w", err)
	}
	m := &Mount{dir: dir, log: logging.Or(c.Logger)}
	ttl := forever
	// A VMM that inherits the connection would keep it open when this process dies, and then wait
	// for ever for an answer. It could also answer requests itself.
	syscall.ForkLock.RLock()
	m.server, err = fs.Mount(dir, &directory{mount: m, config: c, devices: devices}, &fs.Options{
		AttrTimeout: &ttl, EntryTimeout: &ttl, NegativeTimeout: &ttl,
		MountOptions: fuse.MountOptions{
			FsName: "drafter", Name: "drafter", DirectMountStrict: true, DisableXAttrs: true,
			// The VMM is another user, so others may use the mount; the kernel checks owner and
			// mode.
			AllowOther: true, Options: []string{"default_permissions"},
			MaxWrite: maxTransfer, MaxReadAhead: maxTransfer, MaxBackground: maxBackground,
			Logger: log.New(io.Discard, "", 0), // our devices report their errors themselves
		},
	})
	cerr := closeConnectionsOnExec()
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, err), os.Remove(dir))
	}
	if cerr != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", dir, cerr), m.Close())
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, errors.Join(fmt.Errorf("stat %s: %w", dir, err), m.Close())
	}
	m.device = st.Dev
	return m, nil
}

// closeConnectionsOnExec marks this process' descriptors of /dev/fuse, which go-fuse opens to be
// inherited.
func closeConnectionsOnExec() error {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || target != "/dev/fuse" {
			continue // the descriptor of the listing itself is gone
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return err
		}
		unix.CloseOnExec(fd)
	}
	return nil
}

// Path implements [expose.Exposure].
func (m *Mount) Path(name string) string { return filepath.Join(m.dir, name) }

// Failed implements [expose.Exposure].
func (m *Mount) Failed() error {
	if err := m.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// closePatience bounds how long the kernel may take to end the connection once the mount is gone
// from this process' mount namespace.
const closePatience = 2 * time.Second

// Close implements [expose.Exposure]. It aborts a mount that is still in use, and returns an error.
// A copy of the mount in another mount namespace keeps the connection alive. Close aborts the
// connection if it outlives the mount by [closePatience]; that is no error.
func (m *Mount) Close() error {
	mounts, err := fusemount.Of(unix.Minor(m.device))
	if err != nil {
		return err
	}
	unmounted := make(chan error, 1)
	go func() { unmounted <- m.server.Unmount() }()
	patience := time.NewTimer(closePatience)
	defer patience.Stop()
	var errs []error
	select {
	case err = <-unmounted:
	case <-patience.C:
		for _, mount := range mounts {
			if err := mount.Abort(); err != nil {
				errs = append(errs, fmt.Errorf("abort FUSE connection of %s: %w", mount.Path, err))
			}
		}
		err = <-unmounted
	}
	if err != nil { // it is in use, or its directory has another name by now
		// what others have bound elsewhere is theirs
		errs = append(errs, fmt.Errorf("unmount %s: %w; its users have been cut off", m.dir, err), fusemount.AbortAll(mounts[:min(1, len(mounts))]))
		m.server.Wait()
	}
	if err := os.Remove(m.dir); !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// directory is the root of the file system.
type directory struct {
	fs.Inode
	mount   *Mount
	config  Config
	devices []expose.Device
}

var (
	_ fs.NodeOnAdder   = (*directory)(nil)
	_ fs.NodeGetattrer = (*directory)(nil)
)

// Getattr implements [fs.NodeGetattrer]. The directory is this process' user's alone.
func (d *directory) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = fuse.S_IFDIR | 0o700
	out.Owner = *fuse.CurrentOwner()
	return 0
}

// OnAdd makes the files.
func (d *directory) OnAdd(ctx context.Context) {
	for _, device := range d.devices {
		f := &file{mount: d.mount, config: d.config, device: device}
		d.AddChild(device.Name, d.NewPersistentInode(ctx, f, fs.StableAttr{Mode: fuse.S_IFREG}), false)
	}
}

// file is an exposed device.
type file struct {
	fs.Inode
	mount  *Mount
	config Config
	device expose.Device
}

var (
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeSetattrer = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
	_ fs.NodeFsyncer   = (*file)(nil)
	_ fs.NodeAllocater = (*file)(nil)
	_ fs.NodeLseeker   = (*file)(nil)
)

// fopenNoFlush (FOPEN_NOFLUSH of include/uapi/linux/fuse.h, since Linux 5.17) keeps close(2) from
// asking the server and from writing dirty pages back. The kernel closes the files of a process
// that is killed, and must not wait then for a server that is killed with it.
const fopenNoFlush = 1 << 5

// Open implements [fs.NodeOpener]. The guest caches its disks itself, and a second cache of them
// costs more than it brings.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if f.device.Kind == expose.Disk {
		return nil, fuse.FOPEN_DIRECT_IO | fopenNoFlush, 0
	}
	return nil, fuse.FOPEN_KEEP_CACHE | fopenNoFlush, 0
}

// Getattr implements [fs.NodeGetattrer].
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = fuse.S_IFREG | 0o600
	out.Size = uint64(f.device.Device.Size())
	out.Blocks = (out.Size + 511) / 512
	out.Blksize = 4096
	out.Owner = fuse.Owner{Uid: uint32(f.config.UID), Gid: uint32(f.config.GID)}
	return 0
}

// Setattr implements [fs.NodeSetattrer]. A device keeps its size, owner and mode; times do not
// matter.
func (f *file) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(f.device.Device.Size()) {
		return syscall.EPERM
	}
	return f.Getattr(ctx, h, out)
}

// fail turns a device's error into an errno, and keeps it for the owner.
func (f *file) fail(operation string, err error) syscall.Errno {
	if errors.Is(err, block.ErrRange) {
		return syscall.EINVAL
	}
	if errors.Is(err, block.ErrReadOnly) {
		return syscall.EROFS
	}
	if block.NoRoom(err) {
		// the writer tries again, and the device's owner says where there is no room
		return syscall.ENOSPC
	}
	err = fmt.Errorf("%s device %s: %w", operation, f.device.Name, err)
	if f.mount.failed.CompareAndSwap(nil, &err) {
		f.mount.log.Error("Device failed", "error", err)
	}
	return syscall.EIO
}

// Read implements [fs.NodeReader].
func (f *file) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	size := f.device.Device.Size()
	if off >= size {
		return fuse.ReadResultData(nil), 0
	}
	dest = dest[:min(int64(len(dest)), size-off)]
	if n, err := f.device.Device.ReadAt(dest, off); n < len(dest) {
		return nil, f.fail("read", err)
	}
	return fuse.ReadResultData(dest), 0
}

// Write implements [fs.NodeWriter].
func (f *file) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	size := f.device.Device.Size()
	if off >= size {
		return 0, syscall.ENOSPC
	}
	// Write-back of the last page goes beyond the end of a device that is not a multiple of it.
	n := min(int64(len(data)), size-off)
	if _, err := f.device.Device.WriteAt(data[:n], off); err != nil {
		return 0, f.fail("write", err)
	}
	return uint32(n), 0
}

// Fsync implements [fs.NodeFsyncer]. When it is called, the kernel has sent all dirty pages.
func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	if err := f.device.Device.Sync(); err != nil {
		return f.fail("sync", err)
	}
	return 0
}

// Allocate implements [fs.NodeAllocater]: fallocate(2). Only what frees space does something.
func (f *file) Allocate(_ context.Context, _ fs.FileHandle, off, length uint64, mode uint32) syscall.Errno {
	switch mode &^ unix.FALLOC_FL_KEEP_SIZE {
	case unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE:
		if err := block.Trim(f.device.Device, int64(off), int64(length)); err != nil {
			return f.fail("trim", err)
		}
		return 0
	case 0:
		if off+length > uint64(f.device.Device.Size()) || off+length < off {
			return syscall.ENOSPC
		}
		return 0
	}
	return syscall.EOPNOTSUPP
}

// Lseek implements [fs.NodeLseeker]: where data and holes are.
func (f *file) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := uint64(f.device.Device.Size())
	if off >= size {
		return 0, syscall.ENXIO
	}
	at := int64(off)
	start, end, err := block.NextData(f.device.Device, at)
	if err != nil {
		return 0, f.fail("map", err)
	}
	if whence == unix.SEEK_DATA {
		if start == int64(size) {
			return 0, syscall.ENXIO
		}
		return uint64(start), 0
	}
	// Ranges of data may follow each other without a hole between.
	for start == at && at < int64(size) {
		at = end
		if start, end, err = block.NextData(f.device.Device, at); err != nil {
			return 0, f.fail("map", err)
		}
	}
	return uint64(at), 0
}
