package firecracker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/internal/await"
	"drafter/internal/block"
	"drafter/internal/memory"
	"drafter/internal/need"
	"drafter/vmm"
)

func TestMain(m *testing.M) {
	if os.Getenv(standInEnv) != "" {
		if err := runStandIn(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// programs writes a Firecracker that knows its version, and a jailer that starts the stand-in,
// which refuses a call.
func programs(t *testing.T, version, refuse string) Driver {
	t.Helper()
	need.Root(t)
	need.KVM(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d := Driver{Bin: filepath.Join(dir, "firecracker-release"), Jailer: filepath.Join(dir, "jailer")}
	for path, script := range map[string]string{
		d.Bin:    "#!/bin/sh\necho Firecracker v" + version + "\n",
		d.Jailer: "#!/bin/sh\n" + standInEnv + "='" + refuse + "' exec " + self + " \"$@\"\n",
	} {
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// launch describes a VM in a directory of its own.
func launch(t *testing.T, output *output) vmm.Launch {
	t.Helper()
	base, err := os.MkdirTemp("", "fc-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	dir, err := vmm.CreateDir(base, vmm.VMMFirecracker, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dir.Close(); err != nil {
			t.Error(err)
		}
	})
	l := vmm.Launch{
		Dir: dir, Board: vmm.Board{CPUs: 1, MemorySize: 8 << 20, Ports: []uint32{26}}, Devices: vmm.Devices{MemoryFile: filepath.Join(base, "memory")}, Output: output,
	}
	for _, path := range []string{l.MemoryFile, filepath.Join(base, "disk"), filepath.Join(base, "kernel")} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, l.MemorySize); err != nil {
			t.Fatal(err)
		}
	}
	l.Kernel = filepath.Join(base, "kernel")
	l.Disks = []vmm.Block{{Name: "disk", Path: filepath.Join(base, "disk")}, {Name: "my-data.1", Path: filepath.Join(base, "disk")}}
	return l
}

// output is a console's.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) await(t *testing.T, text string) {
	t.Helper()
	await.None(t, fmt.Sprintf("%q on the console", text), func() string {
		o.mu.Lock()
		seen := o.b.String()
		o.mu.Unlock()
		if !strings.Contains(seen, text) {
			return fmt.Sprintf("it shows %q", seen)
		}
		return ""
	})
}

func noErrors(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// called waits for the call of a run.
func called(t *testing.T, m vmm.Machine, run int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := m.GuestConn(ctx, 26)
	noErrors(t, err)
	defer conn.Close()
	if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != fmt.Sprintf("call of run %d\n", run) {
		t.Fatalf("the guest says %q, %v; want the call of run %d", line, err, run)
	}
}

// pages checks what the memory device holds of the runs until now.
func pages(t *testing.T, memory block.Device, runs int) {
	t.Helper()
	b := make([]byte, 8)
	for p := 1; p <= runs+1; p++ {
		_, err := memory.ReadAt(b, int64(p)*4096)
		noErrors(t, err)
		want := uint64(p)
		if p > runs {
			want = 0
		}
		if got := binary.NativeEndian.Uint64(b); got != want {
			t.Fatalf("after run %d page %d holds %d", runs, p, got)
		}
	}
}

// A machine is booted and saved, and then restored and saved time and again.
func TestLifeCycle(t *testing.T) {
	for name, untracked := range map[string]bool{"tracked": false, "untracked": true} {
		t.Run(name, func(t *testing.T) {
			d := programs(t, "1.14.2", "none")
			d.untracked = untracked
			ctx, out := t.Context(), &output{}
			l := launch(t, out)
			boot := l
			boot.Boot = &vmm.Boot{Kernel: l.Kernel, Args: "console=ttyS0"}
			m, err := d.Launch(ctx, boot)
			noErrors(t, err)
			out.await(t, "run 1\n")
			called(t, m, 1)
			state := &bytes.Buffer{}
			noErrors(t, m.Pause(ctx), m.Flush(ctx), m.Save(ctx, state), m.Flush(ctx))
			hw := m.Hardware()
			noErrors(t, m.Close(), m.Close(), m.Wait())
			file, err := block.OpenFile(l.MemoryFile, false)
			noErrors(t, err)
			pages(t, file, 1)
			device := memory.New(file)
			defer device.Close()
			for run := 2; run < 6; run++ {
				l := launch(t, out)
				l.Recorded, l.Memory, l.MemoryFile, l.FillMemory = &hw, device, "", run%2 == 1
				m, err := d.Launch(ctx, l)
				noErrors(t, err)
				noErrors(t, m.Restore(ctx, bytes.NewReader(state.Bytes())), m.Resume(ctx))
				called(t, m, run)
				noErrors(t, m.Flush(ctx)) // while it runs
				if !untracked {
					pages(t, device, run)
				}
				noErrors(t, m.Pause(ctx))
				state.Reset()
				noErrors(t, m.Save(ctx, state), m.Flush(ctx))
				if untracked { // each pause for a delta made another run
					*state = *bytes.NewBuffer(rewind(t, state.Bytes(), run))
				} else {
					pages(t, device, run)
				}
				noErrors(t, device.Sync(), m.Close(), m.Wait())
			}
		})
	}
}

// rewind makes the state that of a run, of those that a flush has begun.
func rewind(t *testing.T, state []byte, run int) []byte {
	t.Helper()
	_, snapshot, err := readState(bytes.NewReader(state))
	noErrors(t, err)
	if got := binary.LittleEndian.Uint64(snapshot[22:]); got != uint64(run)+1 {
		t.Fatalf("the state is of run %d; want %d, as the flush has resumed the guest", got, run+1)
	}
	s := &standIn{state: "Paused", runs: run, dirty: map[int]bool{}, memory: make([]byte, 4096)}
	path := filepath.Join(t.TempDir(), "state")
	noErrors(t, s.snapshot(map[string]any{"snapshot_path": path, "mem_file_path": path + ".memory"}))
	snapshot, err = os.ReadFile(path)
	noErrors(t, err)
	var b bytes.Buffer
	noErrors(t, writeState(&b, nil, snapshot))
	return b.Bytes()
}

// What Firecracker refuses is said in its words, and nothing is left.
func TestRefused(t *testing.T) {
	for _, call := range []string{"PUT /machine-config", "PUT /drives", "PUT /actions", "PUT /metrics"} {
		l := launch(t, &output{})
		l.Boot = &vmm.Boot{Kernel: l.Kernel}
		_, err := programs(t, "1.14.2", call).Launch(t.Context(), l)
		if err == nil || !strings.Contains(err.Error(), "firecracker refused "+call) || !strings.Contains(err.Error(), "the stand-in was told to refuse this") {
			t.Errorf("%s: %v", call, err)
		}
	}
	for version, want := range map[string]string{"1.14.0": "too old", "1.13.9": "too old", "1.16.0": "loses vsock", "1.16.1": "", "2.0.0": ""} {
		l := launch(t, &output{})
		l.Boot = &vmm.Boot{Kernel: l.Kernel}
		m, err := programs(t, version, "none").Launch(t.Context(), l)
		if want == "" {
			noErrors(t, err, m.Close())
		} else if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("version %s: %v; want %q", version, err, want)
		}
	}
	d := programs(t, "1.14.2", "none")
	for name, tt := range map[string]struct {
		hw   vmm.Hardware
		want string
	}{
		"newer":      {vmm.Hardware{VMM: vmm.VMMFirecracker, Version: "1.15.0", Machine: machine, CPU: "None"}, "older"},
		"another":    {vmm.Hardware{VMM: vmm.VMMQEMU, Version: "7.2.0"}, "made with qemu"},
		"unreadable": {vmm.Hardware{VMM: vmm.VMMFirecracker, Version: "new", Machine: machine, CPU: "None"}, "malformed"},
	} {
		if err := d.Check(t.Context(), vmm.Launch{Board: vmm.Board{Recorded: &tt.hw}}); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", name, err, tt.want)
		}
	}
	if err := d.Check(t.Context(), vmm.Launch{Board: vmm.Board{Accel: vmm.AccelTCG}}); err == nil || !strings.Contains(err.Error(), "--vmm qemu") {
		t.Error(err)
	}
	if err := (Driver{Bin: "no-such-firecracker"}).Check(t.Context(), vmm.Launch{}); err == nil || !strings.Contains(err.Error(), "--firecracker-bin") {
		t.Error(err)
	}
}

// A VM whose memory cannot be served any more does not stand still: it ends, and says why.
func TestLostMemory(t *testing.T) {
	d := programs(t, "1.14.2", "none")
	l := launch(t, &output{})
	file, err := block.OpenFile(l.MemoryFile, false)
	noErrors(t, err)
	hw := vmm.Hardware{VMM: vmm.VMMFirecracker, Version: "1.14.2", Machine: machine, CPU: "None"}
	device := &losing{Device: file}
	l.Recorded, l.Memory, l.MemoryFile = &hw, memory.New(device), ""
	defer l.Memory.Close()
	m, err := d.Launch(t.Context(), l)
	noErrors(t, err)
	s := &standIn{state: "Paused", dirty: map[int]bool{}, memory: make([]byte, 4096)}
	path := filepath.Join(t.TempDir(), "state")
	noErrors(t, s.snapshot(map[string]any{"snapshot_path": path, "mem_file_path": path + ".memory"}))
	snapshot, err := os.ReadFile(path)
	noErrors(t, err)
	var state bytes.Buffer
	noErrors(t, writeState(&state, nil, snapshot))
	noErrors(t, m.Restore(t.Context(), &state))
	device.lost.Store(true)
	if err := m.Resume(t.Context()); err == nil || !strings.Contains(err.Error(), "its memory was lost") {
		t.Errorf("resume: %v", err)
	}
	if err := m.Wait(); err == nil || !strings.Contains(err.Error(), "the source is gone") {
		t.Errorf("it ended with %v", err)
	}
	noErrors(t, m.Close())
}

// losing is a device that is lost.
type losing struct {
	block.Device
	lost atomic.Bool
}

func (d *losing) ReadAt(p []byte, off int64) (int, error) {
	if d.lost.Load() {
		return 0, errors.New("the source is gone")
	}
	return d.Device.ReadAt(p, off)
}

func TestState(t *testing.T) {
	snapshot := []byte("snapshot")
	snapshot = binary.LittleEndian.AppendUint64(snapshot, 0xccdb04c88a26bfaf)
	// The checksum of the polynomial's definition (crc64 of Redis).
	if known := append([]byte("123456789"), binary.LittleEndian.AppendUint64(nil, 0xe9c6d914c4b8d9ca)...); checkSnapshot(known) != nil {
		t.Error(checkSnapshot(known))
	}
	if err := checkSnapshot(snapshot); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Error(err)
	}
	whole := append([]byte("123456789"), binary.LittleEndian.AppendUint64(nil, 0xe9c6d914c4b8d9ca)...)
	var b bytes.Buffer
	noErrors(t, writeState(&b, []uint32{7, 1 << 20, 3}, whole))
	first, got, err := readState(bytes.NewReader(b.Bytes()))
	if err != nil || len(first) != 3 || first[1] != 1<<20 || !bytes.Equal(got, whole) {
		t.Errorf("%v, %q, %v", first, got, err)
	}
	for cut := range b.Len() {
		if _, _, err := readState(bytes.NewReader(b.Bytes()[:cut])); err == nil {
			t.Fatalf("a state of %d of its %d bytes was accepted", cut, b.Len())
		}
	}
}
