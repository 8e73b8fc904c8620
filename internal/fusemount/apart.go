package fusemount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Apart is a thread with only one open file, for calls that wait for the server of a FUSE mount
// which this process serves itself, such as fsync(2).
//
// Otherwise a process that is killed in such a call would never end: the thread waits for the
// server, where no signal reaches it, and the mount stays connected as long as the thread shares
// the descriptor of /dev/fuse.
type Apart struct {
	mu      sync.Mutex              // held for a call
	calls   chan func(fd int) error // nil once it is closed
	results chan error
}

// NewApart starts the thread. It has a descriptor of its own for the file. Close it.
func NewApart(file *os.File) (*Apart, error) {
	calls := make(chan func(fd int) error)
	a := &Apart{calls: calls, results: make(chan error)}
	fd := int(file.Fd())
	begin(func() {
		err := closeOthers(fd)
		a.results <- err
		if err != nil {
			return
		}
		for f := range calls {
			a.results <- f(fd)
		}
		a.results <- unix.Close(fd)
	})
	err := <-a.results
	runtime.KeepAlive(file)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Do calls f on the thread, one call after the other, and returns its error. After Close it returns
// [os.ErrClosed].
func (a *Apart) Do(f func(fd int) error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.calls == nil {
		return os.ErrClosed
	}
	a.calls <- f
	return <-a.results
}

// Close waits for a call that is under way, and ends the thread, which has no open file any more
// then.
func (a *Apart) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.calls == nil {
		return nil
	}
	close(a.calls)
	a.calls = nil
	return <-a.results
}

// begin calls f on a thread of its own, which ends with f. The first thread of a process cannot
// end.
func begin(f func()) {
	begun := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			close(begun)
			f()
			return // and the thread ends, as it is not unlocked
		}
		defer runtime.UnlockOSThread()
		begin(f)
		close(begun)
	}()
	<-begun
}

// closeOthers gives the calling thread its own table of descriptors, and closes all but one file in
// it. Descriptors of the runtime stay, because it may poll on any thread.
func closeOthers(fd int) error {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return fmt.Errorf("unshare descriptors: %w", err)
	}
	const dir = "/proc/thread-self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || n == fd {
			continue
		}
		link, _ := os.Readlink(filepath.Join(dir, e.Name()))
		if link == "" || strings.HasPrefix(link, "anon_inode:") { // "": it was that of dir
			continue
		}
		if err := unix.Close(n); err != nil {
			errs = append(errs, fmt.Errorf("close descriptor %d: %w", n, err))
		}
	}
	return errors.Join(errs...)
}
