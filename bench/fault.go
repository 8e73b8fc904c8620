package bench

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"drafter/internal/block"
	"drafter/internal/memory"
)

//go:embed load/fault.c
var faultSource []byte

// faults measures how long a thread of a VMM waits for a page of memory that is in the page cache,
// and for its first write to one: when we serve that memory, and when it maps the file, as
// Firecracker does by itself.
func (b *bench) faults(ctx context.Context, rounds int) error {
	if !memory.CanTrack() {
		fmt.Fprintln(b.progress, "SKIPPED: page faults: this kernel does not write-protect memory by userfaultfd")
		return nil
	}
	dir := filepath.Join(b.dir, "faults")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	program, err := compile(ctx, dir, "fault", faultSource)
	if err != nil {
		return err
	}
	memory := filepath.Join(dir, "memory")
	if err := os.WriteFile(memory, bytes.Repeat([]byte("drafter "), 128<<20/8), 0o600); err != nil {
		return err
	}
	for range rounds {
		times, err := serveFaults(ctx, program, memory)
		if err != nil {
			return err
		}
		for _, name := range []string{"served", "served_write", "mapped", "mapped_write"} {
			t := times[name]
			if len(t) == 0 {
				return fmt.Errorf("no times of %s", name)
			}
			slices.Sort(t)
			sum := int64(0)
			for _, ns := range t {
				sum += ns
			}
			// the kernel maps several pages of a file at once, so that most cost nothing
			b.add("fault_"+name+"_mean_us", float64(sum)/float64(len(t))/1e3)
			b.add("fault_"+name+"_p50_us", float64(t[len(t)/2])/1e3)
			b.add("fault_"+name+"_p99_us", float64(t[len(t)*99/100])/1e3)
		}
	}
	return nil
}

// serveFaults runs the program once, and returns what it has measured, in nanoseconds.
func serveFaults(ctx context.Context, program, path string) (times map[string][]int64, err error) {
	device, err := block.OpenFile(path, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, device.Close()) }()
	dir, err := os.MkdirTemp("", "faults-") // a socket's path is short
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	socket := filepath.Join(dir, "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := l.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	var out, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, program, path, socket)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	h, err := func() (*memory.Handler, error) {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		return memory.Serve(conn, cmd.Process.Pid, memory.Config{Device: memory.New(device), Track: memory.TrackFaults})
	}()
	if err != nil {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		return nil, fmt.Errorf("%w: %s", err, complaint.Bytes())
	}
	err = errors.Join(cmd.Wait(), h.Close(), h.Err())
	if err != nil {
		return nil, fmt.Errorf("measure faults: %w: %s", err, complaint.Bytes())
	}
	times = map[string][]int64{}
	for lines := bufio.NewScanner(&out); lines.Scan(); {
		var name string
		var ns int64
		if _, err := fmt.Sscan(lines.Text(), &name, &ns); err != nil {
			return nil, fmt.Errorf("measure faults: %q: %w", lines.Text(), err)
		}
		times[name] = append(times[name], ns)
	}
	return times, nil
}
