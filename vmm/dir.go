package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"drafter/internal/fusemount"
	"drafter/internal/lockfile"
	"drafter/internal/private"
	"drafter/internal/process"
)

// Dir is the directory a VM lives in: <base>/<driver>/<id>/, for the owner alone, with the VMM's
// sockets in root/. Its owner holds a lock on it; a directory whose lock is free is an orphan, which
// ReclaimOrphans removes together with the VMM that may still run in it.
type Dir struct {
	ID   string
	path string
	lock *lockfile.Lock
	lent []loan
}

const (
	dirLock    = "lock"
	dirProcess = "process.json"
	dirLent    = "lent.json"
)

// CreateDir makes a new directory under base. Orphans of killed owners are removed first.
func CreateDir(base, driver string) (*Dir, error) {
	base, err := filepath.Abs(base)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", base, err)
	}
	parent := filepath.Join(base, driver)
	if err := private.MkdirAll(parent); err != nil {
		return nil, fmt.Errorf("create VM directory: %w", err)
	}
	if err := checkBase(parent); err != nil {
		return nil, err
	}
	if err := ReclaimOrphans(parent); err != nil {
		return nil, err
	}
	// UNIX socket paths end at 107 bytes, so the id is short.
	id := strings.ReplaceAll(uuid.NewString(), "-", "")[:16]
	d := &Dir{ID: id, path: filepath.Join(parent, id)}
	if n := len(d.Socket("vsock.sock_4294967295")); n > 107 {
		return nil, fmt.Errorf("VM directory %s is too long for UNIX sockets by %d bytes; pass a shorter --chroot-base-dir", parent, n-107)
	}
	// The lock exists and is held before the directory has its final name, so that no reclaim can see it unlocked.
	tmp := d.path + ".new"
	if err := private.MkdirAll(tmp); err != nil {
		return nil, fmt.Errorf("create VM directory: %w", err)
	}
	if d.lock, err = lockfile.Try(filepath.Join(tmp, dirLock)); err != nil {
		return nil, errors.Join(err, os.RemoveAll(tmp))
	}
	if err := errors.Join(private.MkdirAll(filepath.Join(tmp, "root")), os.Rename(tmp, d.path)); err != nil {
		return nil, errors.Join(fmt.Errorf("create VM directory: %w", err), d.lock.Release(), os.RemoveAll(tmp))
	}
	return d, nil
}

// checkBase refuses a directory of VMs in which others could make one: what is noted there says which
// processes a clean-up ends.
func checkBase(dir string) error {
	if err := private.CheckDir(dir); err != nil {
		return fmt.Errorf("--chroot-base-dir: %w", err)
	}
	return nil
}

// Path is the directory itself.
func (d *Dir) Path() string { return d.path }

// Root is where the VMM's sockets and files are.
func (d *Dir) Root() string { return filepath.Join(d.path, "root") }

// Devices is where the VM's devices may be exposed. Whoever mounts something there unmounts it before Close; of a killed owner's,
// [ReclaimOrphans] aborts it.
func (d *Dir) Devices() string { return filepath.Join(d.path, "devices") }

// Socket is the path of the socket called name.
func (d *Dir) Socket(name string) string { return filepath.Join(d.Root(), name) }

// Record notes the VMM's process, so that a later run can end it should this process be killed.
func (d *Dir) Record(id process.Identity) error {
	b, err := json.Marshal(id)
	if err != nil {
		return fmt.Errorf("encode process identity: %w", err)
	}
	if err := d.write(dirProcess, b); err != nil {
		return fmt.Errorf("record VMM process: %w", err)
	}
	return nil
}

// write replaces a file of the directory in one step.
func (d *Dir) write(name string, b []byte) error {
	path := filepath.Join(d.path, name)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Close removes the directory. The VMM must have ended.
func (d *Dir) Close() error {
	return errors.Join(d.takeBack(), os.RemoveAll(d.path), d.lock.Release())
}

// ReclaimAll is [ReclaimOrphans] for all that lived below base, in the order of their names: a peer's devices are taken away before the
// VMM that waits for them.
func ReclaimAll(base string) error {
	base, err := filepath.Abs(base)
	if err != nil {
		return fmt.Errorf("resolve %s: %w", base, err)
	}
	drivers, err := os.ReadDir(base)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for orphaned VMs: %w", err)
	}
	if err := checkBase(base); err != nil {
		return err
	}
	for _, d := range drivers {
		if !d.IsDir() {
			continue
		}
		if err := ReclaimOrphans(filepath.Join(base, d.Name())); err != nil {
			return err
		}
	}
	return nil
}

// ReclaimOrphans removes every VM directory below parent, an absolute path, whose owner is gone, ending its VMM first.
func ReclaimOrphans(parent string) error {
	entries, err := os.ReadDir(parent)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for orphaned VMs: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(parent, e.Name())
		if !e.IsDir() || !ours(e) || (strings.HasSuffix(e.Name(), ".new") && young(e)) {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, dirLock)); err != nil && !strings.HasSuffix(e.Name(), ".new") {
			continue // not a VM directory, or one that vanished just now
		}
		lock, err := lockDead(dir)
		var held *lockfile.HeldError
		if errors.As(err, &held) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look for orphaned VMs: %w", err)
		}
		err = reclaim(dir, e.Name())
		if err := errors.Join(err, lock.Release()); err != nil {
			return fmt.Errorf("remove orphaned VM %s: %w", dir, err)
		}
		slog.Info("Removed what a killed process left behind", "vm", dir)
	}
	return nil
}

// dyingPatience bounds how long a killed owner may take to end once nothing holds it up any more.
const dyingPatience = 10 * time.Second

// lockDead takes the lock of a directory whose owner is gone. An owner that was killed while it waited for its own devices waits for ever, and holds the lock:
// it ends when their connection is aborted.
func lockDead(dir string) (*lockfile.Lock, error) {
	for deadline := time.Now().Add(dyingPatience); ; time.Sleep(10 * time.Millisecond) {
		lock, err := lockfile.Try(filepath.Join(dir, dirLock))
		var held *lockfile.HeldError
		if !errors.As(err, &held) || held.PID == 0 || time.Now().After(deadline) || !process.Dying(held.PID) {
			return lock, err
		}
		if err := fusemount.AbortBelow(dir); err != nil {
			return nil, err
		}
	}
}

// young tells whether a directory may still be under construction by a live process.
func young(e os.DirEntry) bool {
	info, err := e.Info()
	return err != nil || time.Since(info.ModTime()) < time.Minute
}

// ours tells whether a directory has the owner and the mode that CreateDir gives.
func ours(e os.DirEntry) bool {
	info, err := e.Info()
	if err != nil {
		return false // it vanished just now
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Uid == uint32(os.Geteuid()) && info.Mode().Perm() == 0o700
}

func reclaim(dir, id string) error {
	// A VMM that waits for a FUSE file whose server was killed cannot be killed itself until the connection is aborted.
	if err := fusemount.AbortBelow(dir); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, dirProcess))
	if err == nil {
		var p process.Identity
		if err := json.Unmarshal(b, &p); err != nil {
			return fmt.Errorf("%s: %w", dirProcess, err)
		}
		if err := p.Reclaim(id); err != nil {
			return err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := takeBackOrphaned(filepath.Join(dir, dirLent)); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
