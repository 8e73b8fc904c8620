package bench

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
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

// cpuMeter adds up the CPU time of processes and of those below them, also of those that end
// meanwhile.
type cpuMeter struct {
	ended chan struct{}
	once  sync.Once
	wg    sync.WaitGroup

	mu          sync.Mutex // guards the following
	roots       []int
	known       []int
	before, now map[int]float64 // by process, in seconds
}

// meterCPU starts a meter of processes that run.
func meterCPU(roots ...int) *cpuMeter {
	m := &cpuMeter{ended: make(chan struct{}), roots: roots}
	m.find()
	m.restart()
	m.wg.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for n := 1; ; n++ {
			select {
			case <-tick.C:
			case <-m.ended:
				return
			}
			if n%10 == 0 { // which costs more than to look
				m.find()
			}
			m.look()
		}
	})
	return m
}

// add adds a process that was started after the meter: all of its time counts.
func (m *cpuMeter) add(root int) {
	m.mu.Lock()
	m.roots = append(m.roots, root)
	m.mu.Unlock()
	m.find()
}

// find looks for processes below the roots.
func (m *cpuMeter) find() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.known = m.known[:0]
	for at := m.roots; len(at) > 0; {
		m.known = append(m.known, at...)
		var below []int
		for _, pid := range at {
			pids, _ := children(pid) // a process that has ended has none
			below = append(below, pids...)
		}
		at = below
	}
}

func (m *cpuMeter) look() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, pid := range m.known {
		if seconds, err := cpuSeconds(pid); err == nil { // else what was seen last counts
			m.now[pid] = seconds
		}
	}
}

// used is the time since the start or the last call of restart, in seconds.
func (m *cpuMeter) used() (seconds float64) {
	m.look()
	m.mu.Lock()
	defer m.mu.Unlock()
	for pid, now := range m.now {
		seconds += now - m.before[pid]
	}
	return seconds
}

func (m *cpuMeter) restart() {
	m.mu.Lock()
	m.now = map[int]float64{}
	m.mu.Unlock()
	m.look()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before = maps.Clone(m.now)
}

// end returns what was used, and stops the meter.
func (m *cpuMeter) end() (seconds float64) {
	seconds = m.used()
	m.once.Do(func() { close(m.ended) })
	m.wg.Wait()
	return seconds
}
