package memory

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/userfaultfd.h; see ioctl_userfaultfd(2).
const (
	ioctlAPI          = 0xc018aa3f
	ioctlRegister     = 0xc020aa00
	ioctlWake         = 0x8010aa02
	ioctlCopy         = 0xc028aa03
	ioctlZeroPage     = 0xc020aa04
	ioctlWriteProtect = 0xc018aa06

	featureWP            = 1 << 0
	featureMissingHuge   = 1 << 4
	featureMissingShared = 1 << 5
	featureWPShared      = 1 << 12
	featureWPUnpopulated = 1 << 13
	featureWPAsync       = 1 << 15

	registerMissing = 1
	registerWP      = 2

	copyDontWake = 1
	copyWP       = 2

	writeProtectOn = 1

	eventPageFault = 0x12
	eventRemove    = 0x15

	faultWrite = 1
	faultWP    = 2

	messageSize = 32
)

// descriptor is a userfaultfd of another process' memory.
type descriptor int

func (d descriptor) ioctl(request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// api settles what the descriptor does.
func (d descriptor) api(features uint64) error {
	a := struct{ api, features, ioctls uint64 }{0xaa, features, 0}
	return d.ioctl(ioctlAPI, unsafe.Pointer(&a))
}

// register requests the faults of a range.
func (d descriptor) register(start, length, mode uint64) error {
	r := struct{ start, length, mode, ioctls uint64 }{start, length, mode, 0}
	return d.ioctl(ioctlRegister, unsafe.Pointer(&r))
}

// copy fills missing pages with the bytes at src, which the garbage collector must not know. It
// wakes threads that wait for them, unless told not to. It returns how many bytes it has filled
// before an error: EEXIST at a page that is present, EAGAIN while the memory's layout changes.
func (d descriptor) copy(dst uint64, src unsafe.Pointer, length, mode uint64) (int64, error) {
	c := struct {
		dst, src, length, mode uint64
		copied                 int64
	}{dst, uint64(uintptr(src)), length, mode, 0}
	err := d.ioctl(ioctlCopy, unsafe.Pointer(&c))
	if err == nil {
		return c.copied, nil
	}
	return max(0, c.copied), err
}

// zero fills one missing page with zeros.
func (d descriptor) zero(dst, length uint64) error {
	z := struct {
		start, length, mode uint64
		zeroed              int64
	}{dst, length, 0, 0}
	return d.ioctl(ioctlZeroPage, unsafe.Pointer(&z))
}

// writeProtect makes the next write to each present page a fault, or ends that and wakes the
// threads that wait.
func (d descriptor) writeProtect(start, length uint64, on bool) error {
	w := struct{ start, length, mode uint64 }{start, length, 0}
	if on {
		w.mode = writeProtectOn
	}
	return d.ioctl(ioctlWriteProtect, unsafe.Pointer(&w))
}

func (d descriptor) wake(start, length uint64) error {
	r := struct{ start, length uint64 }{start, length}
	return d.ioctl(ioctlWake, unsafe.Pointer(&r))
}

// buffer is memory outside of Go's heap: the kernel gets its address as a number.
type buffer []byte

func newBuffer(size int64) (buffer, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("allocate buffer: %w", err)
	}
	return b, nil
}

func (b buffer) free() error { return unix.Munmap(b) }

func (b buffer) pointer(off int64) unsafe.Pointer { return unsafe.Pointer(&b[off]) }

// gone tells whether an error says that the process whose memory it is has ended.
func gone(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) }

// CanScan tells whether this kernel says which pages were written ([TrackScan]).
func CanScan() bool { return offers(featureWPAsync) }

// CanTrack tells whether this kernel can write-protect memory (UFFD_FEATURE_PAGEFAULT_FLAG_WP of
// userfaultfd(2)).
func CanTrack() bool { return offers(featureWP) }

// offers tells whether this kernel's userfaultfd has a feature.
func offers(feature uint64) bool {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return false
	}
	defer unix.Close(int(fd))
	a := struct{ api, features, ioctls uint64 }{0xaa, 0, 0}
	return descriptor(fd).ioctl(ioctlAPI, unsafe.Pointer(&a)) == nil && a.features&feature != 0
}
