package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/prometheus/procfs"

	"drafter/api"
	"drafter/network"
)

// describeStats registers what VMs use.
func describeStats(a huma.API, d *Daemon) {
	get(a, "/v1/vms/{vm}/stats", "get-stats", "Tell what a VM uses of its host",
		func(_ context.Context, in *vmInput) (api.Stats, error) {
			return d.Stats(in.VM)
		})
}

// Stats tells what a VM that runs uses of its host.
func (d *Daemon) Stats(name string) (api.Stats, error) {
	d.mu.Lock()
	v, err := d.find(name)
	var r api.VM
	pid := 0
	if err == nil {
		if r = v.record; v.process != nil {
			pid = v.process.PID
		}
	}
	d.mu.Unlock()
	if err != nil {
		return api.Stats{}, err
	}
	if pid == 0 {
		return api.Stats{}, fmt.Errorf("VM %s is %s: %w; it has to run ('drafter start %s')", name, r.State, ErrConflict, name)
	}
	s := api.Stats{ID: r.ID, Name: r.Name, Time: time.Now().UTC(), GuestMemory: r.Memory, CPUs: r.CPUs}
	proc, err := procfs.NewFS(procfs.DefaultMountPoint)
	if err != nil {
		return s, err
	}
	if err := addProcesses(&s, proc, pid); err != nil {
		return s, fmt.Errorf("stats of VM %s: %w", name, err)
	}
	if s.NetworkReceived, s.NetworkSent, err = network.GuestTraffic(r.Namespace, "tap0"); err != nil {
		return s, fmt.Errorf("stats of VM %s: %w", name, err)
	}
	return s, nil
}

// addProcesses adds what a process and all below it use. A process that ends meanwhile is left out.
func addProcesses(s *api.Stats, proc procfs.FS, pid int) error {
	p, err := proc.Proc(pid)
	if err == nil {
		err = addProcess(s, p)
	}
	if hasGone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	// Each thread has children of its own.
	lists, err := filepath.Glob(filepath.Join(procfs.DefaultMountPoint, strconv.Itoa(pid), "task/*/children"))
	if err != nil {
		return err
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil && !hasGone(err) {
			return err
		}
		for child := range strings.FieldsSeq(string(b)) {
			n, err := strconv.Atoi(child)
			if err == nil {
				err = addProcesses(s, proc, n)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func hasGone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) }

func addProcess(s *api.Stats, p procfs.Proc) error {
	stat, err := p.Stat()
	if err != nil {
		return err
	}
	memory, err := p.ProcSMapsRollup()
	if err != nil {
		return err
	}
	disk, err := p.IO()
	if err != nil {
		return err
	}
	const tick = time.Second / 100 // USER_HZ; see proc_pid_stat(5)
	ticks := int64(stat.UTime) + int64(stat.STime) + int64(stat.CUTime) + int64(stat.CSTime)
	s.CPUNanoseconds += ticks * int64(tick)
	s.Memory += int64(memory.Pss) // what two of them share counts once
	s.DiskRead += disk.ReadBytes
	s.DiskWritten += disk.WriteBytes
	s.Processes++
	return nil
}
