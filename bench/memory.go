package bench

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// children are the processes that a process has started and that run (proc_pid_task(5)).
func children(pid int) (pids []int, err error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that has ended
		}
		for field := range strings.FieldsSeq(string(b)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", list, err)
			}
			pids = append(pids, child)
		}
	}
	return pids, nil
}

// vmmOf is the process of the VMM below a process.
func vmmOf(pid int) (int, error) {
	below, err := children(pid)
	if err != nil {
		return 0, err
	}
	for _, child := range below {
		command, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", child))
		if err == nil && bytes.HasPrefix(command, []byte("qemu-")) {
			return child, nil
		}
		if vmm, err := vmmOf(child); err == nil {
			return vmm, nil
		}
	}
	return 0, fmt.Errorf("process %d has no VMM", pid)
}

// vmmIn is the process of the VMM whose directory this is, which its command line names.
func vmmIn(dir string) (int, error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err == nil && bytes.HasPrefix(line, []byte("/")) && bytes.Contains(line, []byte("drafter:"+dir+"\x00")) {
			return strconv.Atoi(filepath.Base(filepath.Dir(path)))
		}
	}
	return 0, fmt.Errorf("no process is the VMM of %s", dir)
}

// hostMemory is what processes take of the host's memory, in MB.
type hostMemory struct {
	// their proportional share of what they map: a page that n processes map counts 1/n in each
	// (proc_pid_smaps(5): Pss)
	proportional float64
	// the same without pages of files, which the page cache has
	anonymous float64
}

func (m hostMemory) plus(n hostMemory) hostMemory {
	return hostMemory{m.proportional + n.proportional, m.anonymous + n.anonymous}
}

// memoryOf adds up /proc/PID/smaps_rollup of processes.
func memoryOf(pids ...int) (m hostMemory, err error) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return m, err
		}
		fields, err := smapsFields(b)
		if err != nil {
			return m, fmt.Errorf("smaps_rollup of process %d: %w", pid, err)
		}
		m = m.plus(hostMemory{fields["Pss"], fields["Pss_Anon"] + fields["Pss_Shmem"]})
	}
	return m, nil
}

// smapsFields are the fields of a mapping, in MB.
func smapsFields(text []byte) (map[string]float64, error) {
	fields := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		name, rest, found := strings.Cut(line, ":")
		words := strings.Fields(rest)
		if !found || len(words) != 2 || words[1] != "kB" {
			continue // the line with the mapping's addresses, or its flags
		}
		kib, err := strconv.ParseFloat(words[0], 64)
		if err != nil {
			return nil, err
		}
		fields[name] += kib * 1024 / 1e6
	}
	if len(fields) == 0 {
		return nil, errors.New("there are no fields")
	}
	return fields, nil
}

// guestMemory is what a VMM has of its guest's memory, in MB.
type guestMemory struct {
	touched float64 // pages that the VMM maps: Rss of the mapping
	copied  float64 // of touched: pages that are nobody else's, nor a file's
	// pages of a file in memory that nobody has touched, such as those copied from a package
	untouched float64
}

// guestMemoryOf looks at the mapping of a guest's memory in its VMM.
func guestMemoryOf(pid int, size int64) (g guestMemory, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return g, err
	}
	for _, text := range splitMappings(string(b)) {
		head, rest, _ := strings.Cut(text, "\n")
		span := strings.Fields(head)[0]
		if length, err := spanLength(span); err != nil || length != size {
			continue
		}
		fields, err := smapsFields([]byte(rest))
		if err != nil {
			return g, fmt.Errorf("guest memory of process %d: %w", pid, err)
		}
		g.touched, g.copied = fields["Rss"], fields["Anonymous"]
		if !strings.Contains(head, "/memfd:") {
			return g, nil
		}
		g.copied = fields["Rss"]
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/map_files/%s", pid, span), &st); err != nil {
			return g, fmt.Errorf("stat guest memory of process %d: %w", pid, err)
		}
		g.untouched = max(0, float64(st.Blocks)*512/1e6-g.touched)
		return g, nil
	}
	return g, fmt.Errorf("process %d has no memory of %d bytes", pid, size)
}

// splitMappings splits the content of /proc/PID/smaps.
func splitMappings(text string) (mappings []string) {
	begin, at := 0, 0
	for line := range strings.Lines(text) {
		if span, _, _ := strings.Cut(line, " "); at > begin && strings.Contains(span, "-") {
			mappings, begin = append(mappings, text[begin:at]), at
		}
		at += len(line)
	}
	return append(mappings, text[begin:])
}

// spanLength is the length of what /proc/PID/maps writes as START-END.
func spanLength(span string) (int64, error) {
	from, to, _ := strings.Cut(span, "-")
	start, err := strconv.ParseInt(from, 16, 64)
	if err != nil {
		return 0, err
	}
	end, err := strconv.ParseInt(to, 16, 64)
	return end - start, err
}

// diskWrites is how many MB processes have had written to a disk so far (proc_pid_io(5):
// write_bytes). What they write to memory, such as a memfd, does not count.
func diskWrites(pids ...int) (mb float64, err error) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
		if err != nil {
			return 0, err
		}
		_, after, _ := strings.Cut(string(b), "\nwrite_bytes: ")
		text, _, _ := strings.Cut(after, "\n")
		written, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return 0, fmt.Errorf("io of process %d: %w", pid, err)
		}
		mb += written / 1e6
	}
	return mb, nil
}
