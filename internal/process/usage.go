package process

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Usage is what the process that owns a VM, and those that it has started, have used of their host.
type Usage struct {
	CPU            time.Duration // of all of them
	Resident       int64         // bytes of the largest, which is the VMM
	Received, Sent int64         // bytes of the guest, at the other end of the tap in the VMM's network namespace
}

// ticks is how many clock ticks a second has (USER_HZ of Linux, on all architectures of today).
const ticks = 100

// UsageOf returns the usage of a process and of its descendants.
func UsageOf(pid int) (u Usage, err error) {
	vmm := 0
	for left := []int{pid}; len(left) > 0; left = left[1:] {
		fields, err := statFields(left[0])
		if err != nil {
			if left[0] == pid {
				return u, err
			}
			continue // it has just ended
		}
		for _, i := range []int{11, 12} { // utime, stime
			n, err := strconv.ParseInt(fields[i], 10, 64)
			if err != nil {
				return u, fmt.Errorf("CPU time of process %d: %w", left[0], err)
			}
			u.CPU += time.Duration(n) * time.Second / ticks
		}
		pages, err := strconv.ParseInt(fields[21], 10, 64)
		if err != nil {
			return u, fmt.Errorf("memory of process %d: %w", left[0], err)
		}
		if size := pages * int64(os.Getpagesize()); left[0] != pid && size > u.Resident {
			u.Resident, vmm = size, left[0]
		}
		below, err := children(left[0])
		if err != nil {
			return u, err
		}
		left = append(left, below...)
	}
	if vmm == 0 || sameNetwork(pid, vmm) {
		return u, nil
	}
	u.Sent, u.Received, err = tapBytes(fmt.Sprintf("/proc/%d/net/dev", vmm))
	return u, err
}

func sameNetwork(a, b int) bool {
	var one, other unix.Stat_t
	return unix.Stat(fmt.Sprintf("/proc/%d/ns/net", a), &one) == nil &&
		unix.Stat(fmt.Sprintf("/proc/%d/ns/net", b), &other) == nil &&
		one.Ino == other.Ino
}

// children returns what the threads of a process have started.
func children(pid int) (list []int, err error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has just ended
		}
		for text := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(text); err == nil {
				list = append(list, n)
			}
		}
	}
	return list, nil
}

// tapBytes reads how much a tap has received and sent, which its guest has sent and received, from
// proc_pid_net(5)'s dev.
func tapBytes(path string) (received, sent int64, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, 0, nil // the VMM has just ended
	}
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, 1<<20))
	for lines.Scan() {
		name, rest, _ := strings.Cut(strings.TrimSpace(lines.Text()), ":")
		fields := strings.Fields(rest)
		if !strings.HasPrefix(name, "tap") || len(fields) < 16 {
			continue
		}
		r, rerr := strconv.ParseInt(fields[0], 10, 64)
		s, serr := strconv.ParseInt(fields[8], 10, 64)
		if err := errors.Join(rerr, serr); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", path, err)
		}
		received, sent = received+r, sent+s
	}
	return received, sent, lines.Err()
}
