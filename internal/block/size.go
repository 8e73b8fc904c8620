package block

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// MaxDevices is how many devices there may be at once.
const MaxDevices = 1000

// sizePerMemory is how many bytes devices from elsewhere may have for each byte of this host's
// memory, if nothing else is said. A target keeps some 8 bits for each page of a device while it
// arrives (what is missing, dirty, wanted, cached), and 4 bytes for each block of 64 KiB; who pulls
// one keeps 32 bytes for each 64 KiB. So this bounds them to a fortieth of the memory, and a
// sixteenth besides.
const sizePerMemory = 128

// CheckSizes refuses devices of so many bytes, before anything is made for them, if they have more
// than most bytes in all. If most is 0, it is 128 times this host's memory. It is for those whose
// sizes a stranger says.
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
