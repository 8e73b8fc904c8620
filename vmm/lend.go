package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"drafter/internal/private"
)

// loan is a file that belongs to a VM's user while the VM runs. It is noted in the VM's directory.
type loan struct {
	Path   string `json:"path"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	UID    int    `json:"uid"` // the owner before and after
	GID    int    `json:"gid"`
	To     int    `json:"to"`   // the VM's user
	Mode   uint32 `json:"mode"` // before and after: an owner may change it

	file *os.File // nil when the loan is an orphan's
}

// Lend makes a file usable for the user that the VMM runs as: it becomes the file's owner until
// Close, or until a clean-up finds that this process was killed. A file that the user can use is
// left alone.
func (d *Dir) Lend(path string, uid, gid int, write bool) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("lend %s to user %d: %w", path, uid, err)
		}
	}()
	f, err := private.Open(path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		if !kept {
			err = errors.Join(err, f.Close())
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	bits := uint32(4)
	if write {
		bits = 6
	}
	switch {
	case uid == 0, st.Mode&bits == bits, int(st.Gid) == gid && st.Mode>>3&bits == bits:
		return nil
	case int(st.Uid) == uid:
		if st.Mode>>6&bits != bits {
			return fmt.Errorf("its mode %04o does not let its owner use it; run 'chmod u+rw %s'", st.Mode&0o7777, path)
		}
		return nil
	case DefaultUsers.has(st.Uid):
		// A VM had the file whose end was not noticed here.
		st.Uid, st.Gid = uint32(os.Geteuid()), uint32(os.Getegid())
	case !private.Trusted(st.Uid):
		return fmt.Errorf("it belongs to user %d; run 'chown root %s', or pass that user by --uid and --gid", st.Uid, path)
	case st.Mode>>6&bits != bits:
		return fmt.Errorf("its mode %04o does not let its owner use it; run 'chmod u+rw %s'", st.Mode&0o7777, path)
	}
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	d.lent = append(d.lent, loan{path, st.Dev, st.Ino, int(st.Uid), int(st.Gid), uid, st.Mode & 0o777, f})
	kept = true
	b, err := json.Marshal(d.lent)
	if err == nil {
		err = d.write(dirLent, b)
	}
	if err != nil {
		return err
	}
	if err := f.Chown(uid, gid); err != nil {
		return fmt.Errorf("%w; pass the user that may use it by --uid and --gid", err)
	}
	return nil
}

// takeBack ends all loans.
func (d *Dir) takeBack() error {
	var errs []error
	for _, l := range d.lent {
		errs = append(errs, l.end(l.file), l.file.Close())
	}
	d.lent = nil
	return errors.Join(errs...)
}

// end gives the file back, unless somebody else owns it by now.
func (l *loan) end(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("take %s back: %w", l.Path, err)
	}
	if st.Dev != l.Device || st.Ino != l.Inode || int(st.Uid) != l.To {
		return nil
	}
	err := errors.Join(f.Chown(l.UID, l.GID), unix.Fchmod(int(f.Fd()), l.Mode))
	// An access list would still name the VM's user.
	if xerr := unix.Fremovexattr(int(f.Fd()), "system.posix_acl_access"); xerr != nil && !errors.Is(xerr, unix.ENODATA) && !errors.Is(xerr, unix.EOPNOTSUPP) {
		err = errors.Join(err, xerr)
	}
	if err != nil {
		return fmt.Errorf("take %s back: %w", l.Path, err)
	}
	return nil
}

// takeBackOrphaned ends the loans of a VM whose owner was killed.
func takeBackOrphaned(record string, log *slog.Logger) error {
	b, err := os.ReadFile(record)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(b) == 0 { // empty after a power cut
		return nil
	}
	if err != nil {
		return err
	}
	var loans []loan
	if err := json.Unmarshal(b, &loans); err != nil {
		return fmt.Errorf("%s: %w", dirLent, err)
	}
	for _, l := range loans {
		f, err := private.Open(l.Path, unix.O_RDONLY)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = errors.Join(l.end(f), f.Close())
		}
		if err != nil { // which is no reason to start no other VM
			log.Warn("A file could not be taken back from a VM that was killed", "path", l.Path, "owner", l.UID, "error", err)
		}
	}
	return nil
}
