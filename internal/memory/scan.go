package memory

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// scan asks the kernel which pages of a process were written (PAGEMAP_SCAN of
// Documentation/admin-guide/mm/pagemap.rst of Linux). It is used by one goroutine at a time.
type scan struct {
	pagemap *os.File
	ranges  buffer // of pageRegion
}

// From linux/fs.h.
const (
	pagemapScan = 0xc0606610

	scanProtectMatching = 1 // PM_SCAN_WP_MATCHING
	scanCheckAsync      = 2 // PM_SCAN_CHECK_WPASYNC
	pageIsWritten       = 2
)

// pageRegion is struct page_region.
type pageRegion struct{ start, end, categories uint64 }

// scanArgument is struct pm_scan_arg.
type scanArgument struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages, inverted, mask, anyOf, returned uint64
}

const maxRanges = 16384 // that one call returns

func newScan(pid int) (*scan, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, fmt.Errorf("find written pages: %w", err)
	}
	ranges, err := newBuffer(maxRanges * int64(unsafe.Sizeof(pageRegion{})))
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &scan{f, ranges}, nil
}

// written calls f for each range between start and end that was written since the last call, or
// since it was protected, and protects it again. If it fails, ranges that f was not called for are
// still known.
func (s *scan) written(start, end uint64, f func(start, end uint64)) error {
	for start < end {
		a := scanArgument{
			size: uint64(unsafe.Sizeof(scanArgument{})), flags: scanProtectMatching | scanCheckAsync, start: start, end: end,
			vec: uint64(uintptr(s.ranges.pointer(0))), vecLen: maxRanges, mask: pageIsWritten, returned: pageIsWritten,
		}
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, s.pagemap.Fd(), pagemapScan, uintptr(unsafe.Pointer(&a)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return fmt.Errorf("find written pages: %w", errno)
		}
		for _, r := range unsafe.Slice((*pageRegion)(s.ranges.pointer(0)), n) {
			f(r.start, r.end)
		}
		start = a.walkEnd
	}
	return nil
}

func (s *scan) close() error { return errors.Join(s.pagemap.Close(), s.ranges.free()) }
