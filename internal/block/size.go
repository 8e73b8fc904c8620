package block

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// MaxDevices is how many devices there may be at once.
const MaxDevices = 1000

// sizePerMemory is the default limit of devices from elsewhere, in bytes for each byte of this
// host's memory. A target keeps some 8 bits for each page of an arriving device (missing, dirty,
// wanted, cached), and 4 bytes for each block of 64 KiB. A pull keeps 32 bytes for each 64 KiB. So
// the limit bounds these to a fortieth of the memory, and to a sixteenth more for a pull.
const sizePerMemory = 128

// CheckSizes refuses devices of the given sizes in bytes if they have more than most bytes
// together. If most is 0, it is 128 times this host's memory. Call it before anything is made for
// sizes that a stranger names.
func CheckSizes(most int64, sizes ...int64) error {
	if len(sizes) > MaxDevices {
		return fmt.Errorf("%d devices are too many; there may be %d", len(sizes), MaxDevices)
	}
	if most == 0 {
		memory, err := HostMemory()
		if err != nil {
			return err
		}
		most = memory * sizePerMemory
	}
	left := most
	for _, size := range sizes {
		if size < 0 || size > left {
			const text = "the devices have more than %s in all, which is too large for this host " +
				"(--max-size allows more)"
			return fmt.Errorf(text, humanize.IBytes(uint64(most)))
		}
		left -= size
	}
	return nil
}

// HostMemory is how much memory this host has, in bytes.
func HostMemory() (int64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("read how much memory the host has: %w", err)
	}
	return int64(info.Totalram * uint64(info.Unit)), nil
}
