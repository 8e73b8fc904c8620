package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/fusemount"
	"drafter/internal/lockfile"
	"drafter/internal/logging"
	"drafter/internal/mark"
	"drafter/internal/private"
	"drafter/internal/process"
)

// Dir is the directory of a VM: <base>/<driver>/<id>/, for the owner alone, with the VMM's sockets
// in root/. The id is random. Two files together say that the directory is ours: its mark, and its
// record, <base>/.drafter/<driver>.<id>.lock, whose lock the owner holds. A directory with both
// whose lock is free is an orphan: [ReclaimAll] removes it and ends the VMM that may still run in
// it.
type Dir struct {
	ID   string
	path string
	lock *lockfile.Lock // of the record
	lent []loan
}

const (
	dirMark    = "drafter.json"
	dirProcess = "process.json"
	dirLent    = "lent.json"
	dirRecords = ".drafter"

	markFormat = "drafter-vm"
)

// CreateDir makes a new directory under base. Orphans of killed owners are removed first.
// For log, see [ReclaimAll].
func CreateDir(base, driver string, log *slog.Logger) (_ *Dir, err error) {
	if strings.ContainsAny(driver, "/\x00") || driver == "" || driver[0] == '.' {
		return nil, fmt.Errorf("create VM directory: %q is no name of a driver", driver)
	}
	if err := ReclaimAll(base, log); err != nil {
		return nil, err
	}
	if base, err = filepath.Abs(base); err != nil {
		return nil, fmt.Errorf("resolve %s: %w", base, err)
	}
	parent, records := filepath.Join(base, driver), filepath.Join(base, dirRecords)
	for _, dir := range []string{parent, records} {
		if err := private.MkdirAll(dir); err != nil {
			return nil, fmt.Errorf("create VM directory: %w", err)
		}
		if err := checkPlace(dir); err != nil {
			return nil, err
		}
	}
	d := &Dir{}
	for d.lock == nil {
		// UNIX socket paths end at 107 bytes, so the id is short.
		d.ID = strings.ReplaceAll(uuid.NewString(), "-", "")[:16]
		d.path = filepath.Join(parent, d.ID)
		if n := len(d.Socket("vsock.sock_4294967295")); n > 107 {
			return nil, fmt.Errorf("VM directory %s is too long for UNIX sockets by %d bytes; pass a shorter --chroot-base-dir", parent, n-107)
		}
		// The record comes first, so that whatever is made later is found again. A process that
		// looks for orphans may hold its lock for a moment.
		var held *lockfile.HeldError
		if d.lock, err = lockfile.Try(filepath.Join(records, driver+"."+d.ID+recordSuffix)); err != nil && !errors.As(err, &held) {
			return nil, fmt.Errorf("record VM directory: %w", err)
		}
	}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		return nil, errors.Join(fmt.Errorf("create VM directory: %w", err), d.lock.Release())
	}
	if err := d.fill(); err != nil {
		return nil, errors.Join(fmt.Errorf("create VM directory: %w", err), d.Close())
	}
	return d, nil
}

// fill makes the content of a new directory, its mark first.
func (d *Dir) fill() error {
	dir, err := os.Open(d.path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Chmod(0o700); err != nil { // whatever the umask
		return err
	}
	m, err := mark.Of(dir, markFormat, d.ID)
	if err != nil {
		return err
	}
	f, err := private.Create(filepath.Join(d.path, dirMark))
	if err != nil {
		return err
	}
	return errors.Join(m.Write(f), f.Close(), private.MkdirAll(d.Root()))
}

// CheckBaseDir refuses a --chroot-base-dir that is empty or "/".
func CheckBaseDir(base string) error {
	if base == "" {
		return errors.New("--chroot-base-dir is empty; name a directory for VMs, such as out/vms")
	}
	root, err := os.Stat("/")
	if err != nil {
		return err
	}
	if info, err := os.Stat(base); err == nil && os.SameFile(info, root) {
		return fmt.Errorf("--chroot-base-dir %s is the root directory; name a directory for VMs, such as /var/lib/drafter/vms", base)
	}
	return nil
}

// checkPlace refuses a base directory in which other users could make a VM's directory: the notes
// there say which processes a clean-up ends.
func checkPlace(dir string) error {
	if err := private.CheckDir(dir); err != nil {
		return fmt.Errorf("--chroot-base-dir: %w", err)
	}
	return nil
}

// Path is the directory itself.
func (d *Dir) Path() string { return d.path }

// Root is the directory of the VMM's sockets and files.
func (d *Dir) Root() string { return filepath.Join(d.path, "root") }

// Devices is the directory for the VM's exposed devices. Whoever mounts something there unmounts it
// before Close. [ReclaimAll] aborts the mounts of a killed owner.
func (d *Dir) Devices() string { return filepath.Join(d.path, "devices") }

// Socket is the path of the socket called name.
func (d *Dir) Socket(name string) string { return filepath.Join(d.Root(), name) }

// Process identifies a VMM's process even after its id was used again.
type Process struct {
	PID        int
	StartTime  string   // in clock ticks since boot, from /proc/PID/stat
	Executable string   // DEVICE:INODE of /proc/PID/exe
	Cgroups    []string // directories of its own
}

// Record notes the VMM's process, so that a later run can end it if this process is killed.
func (d *Dir) Record(p Process) error {
	b, err := json.Marshal(process.Identity(p))
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
	if err := errors.Join(d.takeBack(), removeDir(d.path)); err != nil {
		return errors.Join(fmt.Errorf("remove VM directory %s: %w", d.path, err), d.lock.Abandon())
	}
	return d.lock.Release()
}

// removeDir removes a directory that is ours, or empty. A missing directory is no error.
func removeDir(path string) error {
	dir, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := errors.Join(mark.Empty(dir, dirMark), dir.Close()); err != nil {
		return err
	}
	return os.Remove(path)
}

// recordSuffix ends the name of a record, which is <driver>.<id>.lock.
const recordSuffix = ".lock"

// ReclaimAll removes every VM directory below base whose owner was killed, ending its VMM first, in
// the order of their names: a peer's devices are removed before the VMM that waits for them. It
// reads only the records, so nothing else below base is looked at.
// log hears what is removed, and what is left; nil: slog.Default().
func ReclaimAll(base string, log *slog.Logger) error {
	log = logging.Or(log)
	if err := CheckBaseDir(base); err != nil {
		return err
	}
	base, err := filepath.Abs(base)
	if err != nil {
		return fmt.Errorf("resolve %s: %w", base, err)
	}
	if err := private.CheckPlace(base, 0); err != nil {
		return fmt.Errorf("--chroot-base-dir: %w", err)
	}
	sayUnmarked(base, log)
	records := filepath.Join(base, dirRecords)
	entries, err := os.ReadDir(records)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for orphaned VMs: %w", err)
	}
	if err := checkPlace(records); err != nil {
		return err
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		driver, id, found := strings.Cut(name, ".")
		if !ok || !found || !vmID.MatchString(id) || !e.Type().IsRegular() {
			continue // no record
		}
		if err := reclaimRecorded(filepath.Join(records, e.Name()), filepath.Join(base, driver), id, log); err != nil {
			return err
		}
	}
	return nil
}

// reclaimRecorded removes the directory that a record names, if its owner is gone.
func reclaimRecorded(record, parent, id string, log *slog.Logger) error {
	dir := filepath.Join(parent, id)
	lock, err := lockDead(record, dir)
	var held *lockfile.HeldError
	if errors.As(err, &held) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for orphaned VMs: %w", err)
	}
	ours, err := marked(dir, id)
	switch {
	case err != nil:
	case ours:
		if err = checkPlace(parent); err == nil {
			err = reclaim(dir, id, log)
		}
	default:
		// Its owner was killed before it marked the directory, which is empty then.
		if uerr := unix.Rmdir(dir); uerr != nil && !errors.Is(uerr, unix.ENOENT) {
			log.Warn("A directory lacks the mark of the VM that it is recorded for, and stays; remove it by hand if it is of no use", "directory", dir)
		}
	}
	if err != nil {
		return errors.Join(fmt.Errorf("remove orphaned VM %s: %w", dir, err), lock.Abandon())
	}
	if ours {
		log.Info("Removed what a killed process left behind", "vm", dir)
	}
	return lock.Release()
}

// marked tells whether a directory is this user's and has the mark of a VM.
func marked(path, id string) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, nil // nothing, or no directory
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return false, nil
	}
	m, err := mark.Of(dir, markFormat, id)
	if err != nil {
		return false, err
	}
	f, err := private.Open(filepath.Join(path, dirMark), unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	return m.In(f), nil
}

// vmID is the name of a VM's directory.
var vmID = regexp.MustCompile("^[0-9a-f]{16}$")

// sayUnmarked names directories that a release without marks may have left. They stay, because
// nothing proves that they are ours.
func sayUnmarked(base string, log *slog.Logger) {
	for _, driver := range []string{VMMQEMU, VMMFirecracker, "peer", "mounter"} {
		entries, err := os.ReadDir(filepath.Join(base, driver))
		if err != nil {
			continue // there is none
		}
		for _, e := range entries {
			if !vmID.MatchString(e.Name()) {
				continue
			}
			dir := filepath.Join(base, driver, e.Name())
			f, err := private.Open(filepath.Join(dir, "lock"), unix.O_RDONLY)
			if err != nil {
				continue
			}
			if lockfile.Exclusive(f) == nil { // else its owner lives
				log.Warn("A killed process of an older release may have left this directory, which stays as nothing proves that; if it is of no use, unmount what is mounted below it, and remove it", "directory", dir)
			}
			f.Close()
		}
	}
}

// dyingPatience bounds how long a killed owner may take to end once nothing delays it.
const dyingPatience = 10 * time.Second

// lockDead takes the lock of a directory whose owner was killed. If the owner was killed while it
// waited for its own devices, it holds the lock and waits until their connection is aborted.
func lockDead(record, dir string) (*lockfile.Lock, error) {
	for deadline := time.Now().Add(dyingPatience); ; time.Sleep(10 * time.Millisecond) {
		lock, err := lockfile.Try(record)
		var held *lockfile.HeldError
		if !errors.As(err, &held) || held.PID == 0 || time.Now().After(deadline) || !process.Dying(held.PID) {
			return lock, err
		}
		if err := fusemount.AbortBelow(dir); err != nil {
			return nil, err
		}
	}
}

func reclaim(dir, id string, log *slog.Logger) error {
	// A VMM that waits for a FUSE file whose server was killed cannot be killed itself until the
	// connection is aborted.
	if err := fusemount.AbortBelow(dir); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, dirProcess))
	if err == nil && len(b) > 0 { // empty after a power cut, which also ended the process
		var p process.Identity
		if err := json.Unmarshal(b, &p); err != nil {
			return fmt.Errorf("%s: %w", dirProcess, err)
		}
		if err := p.Reclaim(id); err != nil {
			return err
		}
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := takeBackOrphaned(filepath.Join(dir, dirLent), log); err != nil {
		return err
	}
	return removeDir(dir)
}
