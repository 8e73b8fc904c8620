package memory

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// region is a part of guest memory as Firecracker describes it: a JSON array of them comes with the
// descriptor, see docs/snapshotting/handling-page-faults-on-snapshot-resume.md of Firecracker.
type region struct {
	Base     uint64 `json:"base_host_virt_addr"`
	Size     uint64 `json:"size"`      // bytes
	Offset   uint64 `json:"offset"`    // in the memory device
	PageSize uint64 `json:"page_size"` // bytes
	// What releases before 1.14 call the page size. They are not supported, but send both.
	PageSizeKiB uint64 `json:"page_size_kib"`
}

// maxHandshake bounds the description of memory in bytes.
const maxHandshake = 64 << 10

// receive reads the handshake.
func receive(conn *net.UnixConn) (_ descriptor, regions []region, err error) {
	b, control := make([]byte, maxHandshake), make([]byte, unix.CmsgSpace(4*4))
	n, controlled, _, _, err := conn.ReadMsgUnix(b, control)
	if err != nil {
		return -1, nil, fmt.Errorf("receive userfaultfd: %w", err)
	}
	fds, err := descriptors(control[:controlled])
	if err != nil {
		return -1, nil, fmt.Errorf("receive userfaultfd: %w", err)
	}
	defer func() {
		if err != nil {
			for _, fd := range fds {
				err = errors.Join(err, unix.Close(fd))
			}
		}
	}()
	if len(fds) != 1 {
		return -1, nil, fmt.Errorf("receive userfaultfd: %d descriptors came instead of one", len(fds))
	}
	if err := json.Unmarshal(b[:n], &regions); err != nil {
		return -1, nil, fmt.Errorf("receive userfaultfd: the description of memory is malformed: %w", err)
	}
	if err := checkRegions(regions); err != nil {
		return -1, nil, fmt.Errorf("receive userfaultfd: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return -1, nil, fmt.Errorf("configure userfaultfd: %w", err)
	}
	unix.CloseOnExec(fds[0])
	return descriptor(fds[0]), regions, nil
}

func descriptors(control []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		if messages[i].Header.Type == unix.SCM_RIGHTS {
			some, err := unix.ParseUnixRights(&messages[i])
			if err != nil {
				return nil, err
			}
			fds = append(fds, some...)
		}
	}
	return fds, nil
}

// checkRegions refuses what could not be served, and settles the page size.
func checkRegions(regions []region) error {
	if len(regions) == 0 {
		return errors.New("memory has no regions")
	}
	for i := range regions {
		r := &regions[i]
		if r.PageSize == 0 {
			r.PageSize = r.PageSizeKiB
		}
		switch {
		case r.PageSize != uint64(os.Getpagesize()) && r.PageSize != hugePage || r.PageSize != regions[0].PageSize:
			return fmt.Errorf("memory has pages of %d bytes", r.PageSize)
		case r.Size == 0 || r.Base%r.PageSize != 0 || r.Size%r.PageSize != 0 || r.Offset%r.PageSize != 0 || r.Base+r.Size < r.Base || r.Offset+r.Size < r.Offset:
			return fmt.Errorf("memory has a region of %d bytes at %#x, %#x of the device", r.Size, r.Base, r.Offset)
		}
		for _, o := range regions[:i] {
			if r.Base < o.Base+o.Size && o.Base < r.Base+r.Size || r.Offset < o.Offset+o.Size && o.Offset < r.Offset+r.Size {
				return fmt.Errorf("regions of memory overlap: %#x, %#x", o.Base, r.Base)
			}
		}
	}
	return nil
}

// hugePage is the size of a huge page in bytes.
const hugePage = 2 << 20

// Mapping is where a process has mapped its guest's memory.
type Mapping struct {
	Start, Size, PageSize uint64 // bytes
}

// take makes a userfaultfd this package's.
func take(userfaultfd *os.File) (descriptor, error) {
	own, err := unix.FcntlInt(userfaultfd.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, userfaultfd.Close()); err != nil {
		return -1, fmt.Errorf("take userfaultfd: %w", err)
	}
	if err := unix.SetNonblock(own, true); err != nil {
		return -1, errors.Join(fmt.Errorf("take userfaultfd: %w", err), unix.Close(own))
	}
	return descriptor(own), nil
}

// ErrTracking says that this kernel lacks a way to know written pages.
var ErrTracking = errors.New("this kernel does not tell which pages are written")

// prepare settles what a new userfaultfd of shared memory does, and how written pages become known.
func (d descriptor) prepare(want Tracking) (Tracking, error) {
	// its missing pages, and write protection, of huge pages too
	const shared = featureWP | featureMissingHuge | featureMissingShared | featureWPShared
	if want != TrackFaults {
		err := d.api(shared | featureWPUnpopulated | featureWPAsync)
		if err == nil {
			return TrackScan, nil
		}
		if want == TrackScan || !errors.Is(err, unix.EINVAL) {
			return "", fmt.Errorf("%w (PAGEMAP_SCAN): %w; Linux does from 6.7 on", ErrTracking, err)
		}
	}
	if err := d.api(shared); err != nil {
		return "", fmt.Errorf("%w (write protection of shared memory by userfaultfd): %w; Linux does from 5.19 on", ErrTracking, err)
	}
	return TrackFaults, nil
}
