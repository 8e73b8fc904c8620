package inject

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// newUserfaultfd is USERFAULTFD_IOC_NEW of userfaultfd.h.
const newUserfaultfd = 0xaa00

// Userfaultfd makes a userfaultfd of the process' memory (userfaultfd(2)), with descriptor device of
// the process, which is /dev/userfaultfd. The process keeps it as well: if it were this program's
// alone, this program's death would make zeros of the pages that are missing, for whoever still
// runs. It belongs to the caller, who begins with UFFDIO_API.
func (t *Tracee) Userfaultfd(device int) (*os.File, error) {
	theirs, err := t.Call(unix.SYS_IOCTL, uintptr(device), newUserfaultfd, unix.O_CLOEXEC|unix.O_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make a userfaultfd: %w", err)
	}
	process, err := unix.PidfdOpen(t.pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process: %w", err)
	}
	defer unix.Close(process)
	ours, err := unix.PidfdGetfd(process, int(theirs), 0)
	if err != nil {
		return nil, fmt.Errorf("take a userfaultfd: %w", err)
	}
	return os.NewFile(uintptr(ours), "userfaultfd"), nil
}

// Close closes a descriptor of the process.
func (t *Tracee) Close(file int) error {
	if _, err := t.Call(unix.SYS_CLOSE, uintptr(file)); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	return nil
}

// Map puts a mapping of the process' descriptor file, from its beginning, where the process has
// another one: of length bytes at addr, to read and to write. A file that is mapped privately must
// not change as long as the mapping is there.
func (t *Tracee) Map(addr, length uintptr, file int, shared bool) error {
	how := uintptr(unix.MAP_FIXED | unix.MAP_NORESERVE | unix.MAP_PRIVATE)
	if shared {
		how = unix.MAP_FIXED | unix.MAP_SHARED
	}
	at, err := t.Call(unix.SYS_MMAP, addr, length, unix.PROT_READ|unix.PROT_WRITE, how, uintptr(file), 0)
	if err != nil {
		return fmt.Errorf("map: %w", err)
	}
	if at != addr {
		return fmt.Errorf("map: it is at %#x instead of %#x", at, addr)
	}
	return nil
}
