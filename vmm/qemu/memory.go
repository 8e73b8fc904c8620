package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/inject"
	"drafter/internal/memory"
	"drafter/vmm"
)

// memfdName is what QEMU calls the file that it makes for memory-backend-memfd
// (backends/hostmem-memfd.c of QEMU), as the kernel shows it.
const memfdName = "/memfd:memory-backend-memfd"

// memoryFiles is how many descriptors QEMU gets for its memory: that of /dev/userfaultfd, and that of
// the memory device.
func memoryFiles(l *vmm.Launch) int {
	switch {
	case l.Memory == nil:
		return 0
	case l.HugePages:
		return 1
	}
	return 2
}

// private tells whether QEMU is to map privately what memory is stored in. Memory that is still to
// come, in whole or in part, is shared.
func private(l *vmm.Launch, device *memory.Device) (bool, error) {
	if l.Boot != nil || l.Backing == vmm.BackingShared {
		return false, nil
	}
	can := !l.HugePages && l.Tracking != vmm.TrackFaults && memory.CanScan()
	if l.Backing == vmm.BackingPrivate && !can {
		return false, errors.New("--memory-backing private needs Linux 6.7, and goes neither with --huge-pages nor with --track-writes faults; choose auto")
	}
	return can && device.Mappable(), nil
}

// openMemory opens these descriptors. Whoever opens /dev/userfaultfd may serve any memory; QEMU's
// user need not be allowed to.
func (m *Machine) openMemory() ([]*os.File, error) {
	l := &m.launch
	var err error
	if m.private, err = private(l, m.device); err != nil {
		return nil, err
	}
	f, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0)
	if errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w; a kernel has it from Linux 6.1 on", err)
	}
	if err != nil {
		return nil, err
	}
	files := []*os.File{f}
	if l.HugePages {
		return files, nil
	}
	var file *os.File
	if m.private {
		file, err = m.device.Base()
	} else if err = m.device.Share(); err == nil {
		file, err = m.device.File()
	}
	if err != nil {
		return files, err
	}
	return append(files, file), nil
}

// serveMemory takes guest memory into this process' hands: a page that is missed comes from the
// memory device, and one that is written is known. QEMU has not let its guest run yet. It has made
// memory that nobody else knows; with a mapping of the memory device's file in its place, both
// processes have the same, or with a private one of the file that memory is stored in, QEMU has that.
// Memory of huge pages stays QEMU's.
func (m *Machine) serveMemory() error {
	l := &m.launch
	pid := m.process.PID()
	mapping, err := findMemory(pid, l.MemorySize)
	if err != nil {
		return fmt.Errorf("find memory in process %d: %w", pid, err)
	}
	if l.HugePages {
		mapping.PageSize = 2 << 20
	}
	device := fdPorts + len(l.Ports) // of /dev/userfaultfd, in QEMU
	var fd *os.File
	err = inject.Into(pid, func(t *inject.Tracee) (err error) {
		if !l.HugePages {
			if l.Boot != nil { // what its firmware has loaded
				if err := moveMemory(m.device, pid); err != nil {
					return err
				}
			}
			err := t.Map(uintptr(mapping.Start), uintptr(mapping.Size), device+1, !m.private)
			if err = errors.Join(err, t.Close(device+1)); err != nil {
				return err
			}
		}
		fd, err = t.Userfaultfd(device)
		return errors.Join(err, t.Close(device)) // what can make others
	})
	if err != nil && fd != nil {
		err = errors.Join(err, fd.Close())
	}
	if err != nil {
		return err
	}
	if m.memory, err = memory.ServeMapping(fd, pid, mapping, memory.Config{Device: m.device, Track: memory.Tracking(l.Tracking), Private: m.private}); err != nil {
		return err
	}
	m.workers.Go(m.watchMemory)
	l.Logger.Debug("Serving guest memory", "backing", m.backing(), "tracking", m.memory.Tracking())
	return nil
}

// backing says how QEMU has its memory.
func (m *Machine) backing() string {
	switch {
	case m.private:
		return "private"
	case m.launch.HugePages:
		return "huge pages"
	}
	return "shared"
}

// watchMemory ends a VM whose memory cannot be served any more. Otherwise it would stand still for
// ever.
func (m *Machine) watchMemory() {
	select {
	case <-m.memory.Failed():
		m.mu.Lock()
		m.lost = m.memory.Err()
		m.mu.Unlock()
		_ = m.process.Kill() // fails only when it has ended
	case <-m.process.Done():
	}
}

// findMemory finds where a process has mapped its guest's memory.
func findMemory(pid int, size int64) (memory.Mapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return memory.Mapping{}, err
	}
	defer f.Close() // nothing was written
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if !strings.Contains(lines.Text(), memfdName) {
			continue
		}
		from, to, _ := strings.Cut(strings.Fields(lines.Text())[0], "-")
		start, err := strconv.ParseUint(from, 16, 64)
		if err != nil {
			return memory.Mapping{}, err
		}
		if end, err := strconv.ParseUint(to, 16, 64); err != nil || int64(end-start) != size {
			return memory.Mapping{}, fmt.Errorf("it has %#x-%#x instead of %d bytes", start, end, size)
		}
		return memory.Mapping{Start: start, Size: uint64(size), PageSize: uint64(os.Getpagesize())}, nil
	}
	return memory.Mapping{}, errors.Join(errors.New("nothing there is memory"), lines.Err())
}

// moveMemory moves what a process has in the memory that it has made itself.
func moveMemory(to *memory.Device, pid int) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := dir + "/" + e.Name()
		if link, err := os.Readlink(path); err != nil || !strings.HasPrefix(link, memfdName) {
			continue // it is closed by now, or another file
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		if err = to.Copy(f); err == nil { // and what was copied is not needed twice
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, to.Size())
		}
		return errors.Join(err, f.Close())
	}
	return fmt.Errorf("process %d has no file of its memory", pid)
}
