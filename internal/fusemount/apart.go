package fusemount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Apart calls f on a thread that has no open files but this one, and returns what f returns. f calls
// what waits for the server of a FUSE mount that this process serves itself, such as fsync(2).
//
// A process that is killed in such a call would otherwise never end: the thread waits for the server,
// where no signal reaches it, and the mount stays connected as long as the thread shares the
// descriptor of /dev/fuse.
func Apart(file *os.File, f func(fd int) error) error {
	done := make(chan error, 1)
	begin(func() { done <- apart(int(file.Fd()), f) })
	err := <-done
	runtime.KeepAlive(file)
	return err
}

// begin calls f on a thread of its own, which ends with it. The first thread of a process cannot end.
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

// apart calls f without the thread's other descriptors. Those of the runtime stay: it may poll on any
// thread.
func apart(fd int, f func(fd int) error) error {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return fmt.Errorf("unshare descriptors: %w", err)
	}
	const dir = "/proc/thread-self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
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
			return fmt.Errorf("close descriptor %d: %w", n, err)
		}
	}
	// The file can be closed for good once f has returned.
	return errors.Join(f(fd), unix.Close(fd))
}
