package bench

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"drafter/internal/tour"
)

// timed tells how long something takes, and how much CPU time of this process, both in seconds.
func timed(do func() error) (took, cpu float64, err error) {
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	err = do()
	took = time.Since(begin).Seconds()
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		return 0, 0, err
	}
	seconds := func(r unix.Rusage) float64 { return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9 }
	return took, seconds(after) - seconds(before), err
}

// cpuSeconds is the time that a process has used so far, without its children (proc_pid_stat(5)).
func cpuSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b)[strings.LastIndexByte(string(b), ')')+1:])
	user, err := strconv.ParseFloat(fields[11], 64)
	system, serr := strconv.ParseFloat(fields[12], 64)
	const ticksPerSecond = 100 // USER_HZ
	return (user + system) / ticksPerSecond, errors.Join(err, serr)
}

// follow looks at a process every few milliseconds until it has ended, and then tells how much CPU
// time it has used since, in seconds, and its largest resident set in MB. What a parent learns of a
// child that has ended includes that one's children, which are VMMs here.
func follow(s *tour.Service) (used func() (cpu, peak float64)) {
	done := make(chan struct{})
	before, _ := cpuSeconds(s.PID()) // a process that has ended has used nothing
	var cpu, peak float64
	go func() {
		defer close(done)
		for {
			now, err := cpuSeconds(s.PID())
			rss, rerr := peakRSS(s.PID())
			if err == nil && rerr == nil {
				cpu, peak = now-before, rss
			}
			select {
			case <-s.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	return func() (float64, float64) { <-done; return cpu, peak }
}

// peakRSS is the largest resident set of a process in MB, see proc(5).
func peakRSS(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, found := strings.Cut(string(b), "VmHWM:")
	if !found { // of a process that is ending
		return 0, fmt.Errorf("process %d has no memory", pid)
	}
	kb, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	return kb * 1024 / 1e6, err
}

// privateMemory is what a process takes beside the files that it maps, in MB (proc_pid_status(5):
// RssAnon).
func privateMemory(pid int) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(status), "RssAnon:")
	fields := strings.Fields(after)
	if len(fields) == 0 {
		return 0, errors.New("process status has no RssAnon")
	}
	kib, err := strconv.ParseFloat(fields[0], 64)
	return kib * 1024 / 1e6, err
}
