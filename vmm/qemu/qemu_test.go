package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/memory"
	"drafter/internal/need"
	"drafter/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCompatible(t *testing.T) {
	for _, tt := range []struct {
		machine, made string
		here          vmm.Version
		refusal       string
	}{
		{"pc-q35-7.2", "7.2.22", vmm.Version{Major: 7, Minor: 2, Micro: 22}, ""},
		{"pc-q35-7.2", "7.2.22", vmm.Version{Major: 7, Minor: 2, Micro: 1}, ""},
		{"pc-q35-7.2", "7.2.22", vmm.Version{Major: 8, Minor: 0, Micro: 1}, ""},
		{"pc-q35-7.2", "7.2.22", vmm.Version{Major: 10, Minor: 1, Micro: 0}, ""},
		{"pc-q35-7.2", "7.2.22", vmm.Version{Major: 8, Minor: 0, Micro: 0}, "8.0.1"},
		{"pc-q35-8.2", "8.2.0", vmm.Version{Major: 7, Minor: 2, Micro: 22}, "older"},
		{"pc-q35-8.2", "8.2.0", vmm.Version{Major: 8, Minor: 1, Micro: 9}, "older"},
		{"microvm", "7.2.22", vmm.Version{Major: 7, Minor: 2, Micro: 22}, ""},
		{"microvm", "7.2.22", vmm.Version{Major: 7, Minor: 2, Micro: 23}, "only there"},
		{"microvm", "seven", vmm.Version{Major: 7, Minor: 2, Micro: 23}, "malformed"},
	} {
		err := compatible(vmm.Hardware{VMM: vmm.VMMQEMU, Machine: tt.machine, Version: tt.made}, tt.here)
		if (err == nil) != (tt.refusal == "") || err != nil && !strings.Contains(err.Error(), tt.refusal) {
			t.Errorf("%s of %s on %s: %v; want %q", tt.machine, tt.made, tt.here, err, tt.refusal)
		}
	}
	if err := compatible(vmm.Hardware{VMM: vmm.VMMFirecracker}, vmm.Version{Major: 7, Minor: 2, Micro: 0}); err == nil {
		t.Error("a package of Firecracker was accepted")
	}
}

func testLaunch(t *testing.T, disks int) *vmm.Launch {
	t.Helper()
	dir, err := vmm.CreateDir(t.TempDir(), "qemu", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dir.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &vmm.Launch{
		Dir: dir, Board: vmm.Board{CPUs: 2, MemorySize: 64 << 20, Interface: "tap0", MAC: "02:00:00:00:00:01", Ports: []uint32{26, 25}},
		Devices: vmm.Devices{Memory: memory.New(block.NewZeros(64 << 20)), Kernel: "/k"},
	}
	for i := range disks {
		l.Disks = append(l.Disks, vmm.Block{Name: fmt.Sprintf("disk-with-a-long-name-%d", i), Path: fmt.Sprintf("/a,b/%d", i)})
	}
	return l
}

// QEMU is found where it is, whatever leads to it: its root directory has no such links.
func TestBinary(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := filepath.Join(dir, "opt", "qemu")
	if err := errors.Join(
		os.Mkdir(filepath.Dir(want), 0o755), os.WriteFile(want, nil, 0o755), os.Symlink("opt/qemu", filepath.Join(dir, "link")),
	); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for _, bin := range []string{want, "./opt/qemu", "./link", filepath.Join(dir, "link")} {
		if got, err := binary(bin); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", bin, got, err, want)
		}
	}
}

func TestArguments(t *testing.T) {
	q35 := vmm.Hardware{VMM: vmm.VMMQEMU, Machine: "pc-q35-7.2", CPU: "Nehalem-v1", Accel: vmm.AccelTCG}
	micro := vmm.Hardware{VMM: vmm.VMMQEMU, Machine: machineMicroVM, CPU: cpuKVM, Accel: vmm.AccelKVM}
	l := testLaunch(t, 2)
	args, err := arguments(l, q35)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(args, " ")
	for _, want := range []string{
		"-machine pc-q35-7.2,", "-cpu Nehalem-v1,vmx=off,svm=off ", "-incoming defer -S", "filename=/disk-disk-with-a-long-name-1", "serial=disk-with-a-long-nam ", "-sandbox on,",
		"virtio-blk-pci,bus=pcie.0,addr=0x8,drive=disk0,werror=stop,rerror=stop,", "virtio-blk-pci,bus=pcie.0,addr=0x9,drive=disk1,werror=stop,rerror=stop,", "memory-backend-memfd,id=memory,share=on,size=67108864",
	} {
		if !strings.Contains(line+" ", want) {
			t.Errorf("%q is not in: %s", want, line)
		}
	}
	if !strings.Contains(line, "-no-reboot") {
		t.Errorf("a guest that has nothing to boot from may reboot: %s", line)
	}
	boot := &vmm.Boot{Kernel: "/k", Initrd: "/i", Args: "console=ttyS0 pci=off quiet"}
	l.Reboot = boot
	if args, err = arguments(l, q35); err != nil {
		t.Fatal(err)
	}
	if line = strings.Join(args, " "); !strings.Contains(line, "-initrd /initrd -append console=ttyS0 quiet -incoming defer -S") || strings.Contains(line, "-no-reboot") {
		t.Errorf("restored, and may reboot: %s", line)
	}
	l.Boot, l.Reboot = boot, nil
	if args, err = arguments(l, q35); err != nil {
		t.Fatal(err)
	}
	if line = strings.Join(args, " "); !strings.Contains(line, "-initrd /initrd -append console=ttyS0 quiet") || strings.Contains(line, "-incoming") {
		t.Errorf("boot on a q35: %s", line)
	}
	if args, err = arguments(l, micro); err != nil {
		t.Fatal(err)
	}
	if line = strings.Join(args, " "); !strings.Contains(line, "pci=off") || !strings.Contains(line, "virtio-net-device,netdev=net,mac=") || strings.Contains(line, "-pci") {
		t.Errorf("boot on a microvm: %s", line)
	}
	own := *l
	own.Memory = nil
	if args, err = arguments(&own, q35); err != nil {
		t.Fatal(err)
	}
	if line = strings.Join(args, " "); !strings.Contains(line, "-object memory-backend-ram,id=memory,size=67108864 ") || strings.Contains(line, "mem-path") {
		t.Errorf("memory of its own: %s", line)
	}
	for _, tt := range []struct {
		hw    vmm.Hardware
		disks int
		ok    bool
	}{{micro, 5, true}, {micro, 6, false}, {q35, 6, true}, {q35, 23, true}, {q35, 24, false}} {
		if _, err := arguments(testLaunch(t, tt.disks), tt.hw); (err == nil) != tt.ok {
			t.Errorf("%s with %d disks: %v", tt.hw.Machine, tt.disks, err)
		}
	}
	if got := chooseMachine(vmm.AccelKVM, vmm.Version{Major: 7, Minor: 2, Micro: 0}, 6); got != "pc-q35-7.2" {
		t.Errorf("six disks with KVM go on a %s", got)
	}
}

// What a package or a migration's source records goes no further than a machine type, a CPU model
// and features may.
func TestRecordedHardware(t *testing.T) {
	good := vmm.Hardware{VMM: vmm.VMMQEMU, Version: "7.2.22", Machine: "pc-q35-7.2", CPU: "Nehalem-v1", Accel: vmm.AccelTCG}
	for _, tt := range []struct{ machine, cpu, refusal string }{
		{"pc-q35-7.2", "Nehalem-v1", ""},
		{"pc-q35-10.0", "Skylake-Server-v4,+avx512f,-hle,rtm=off", ""},
		{"microvm", "qemu64", ""},
		{"pc-q35-7.2,initrd=/etc/shadow", "qemu64", "machine"},
		{"pc-q35-7.2,,", "qemu64", "machine"},
		{"none", "qemu64", "machine"},
		{"pc-i440fx-7.2", "qemu64", "machine"},
		{"pc-q35-7.2\n", "qemu64", "machine"},
		{"pc-q35-7.2", "", "CPU model"},
		{"pc-q35-7.2", "-drive", "CPU model"},
		{"pc-q35-7.2", "qemu64,model-id=/etc/shadow", "CPU feature"},
		{"pc-q35-7.2", "qemu64,,avx2=on", "CPU feature"},
		{"pc-q35-7.2", "qemu64,+svm", "CPU feature"},
		{"pc-q35-7.2", "qemu64,vmx=on", "CPU feature"},
		{"pc-q35-7.2", "qemu64,hv-passthrough=on", "CPU feature"},
		{"pc-q35-7.2", "qemu64,realized=on", "CPU feature"},
		{"pc-q35-7.2", "qemu64,x-force-features=on", "CPU feature"},
		{"pc-q35-7.2", "qemu64,sgx=on", "CPU feature"},
		{"pc-q35-7.2", "qemu64,", "CPU feature"},
		{"pc-q35-7.2", "EPYC-Milan-v2", ""},
		{"pc-q35-7.2", "Haswell-noTSX-IBRS", ""},
		{"pc-q35-7.2", "x86-64-v2-AES", ""},
		{"pc-q35-7.2", "host", "CPU model"},
		{"pc-q35-7.2", "max", "CPU model"},
		{"pc-q35-7.2", "help", "CPU model"},
	} {
		hw := good
		hw.Machine, hw.CPU = tt.machine, tt.cpu
		_, err := hardware(t.Context(), "/does/not/exist", &vmm.Launch{Board: vmm.Board{Recorded: &hw}})
		if (err == nil) != (tt.refusal == "") || err != nil && !strings.Contains(err.Error(), tt.refusal) {
			t.Errorf("%q, %q: %v; want %q", tt.machine, tt.cpu, err, tt.refusal)
		}
	}
}

// fakeQEMU speaks QMP's greeting and then answers each command with what reply returns, if
// anything.
func fakeQEMU(t *testing.T, conn net.Conn, reply func(command string, id uint64) string) {
	t.Helper()
	done := make(chan struct{})
	t.Cleanup(func() { conn.Close(); <-done })
	go func() {
		defer close(done)
		fmt.Fprint(conn, `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}`+"\r\n")
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			var c struct {
				Execute string `json:"execute"`
				ID      uint64 `json:"id"`
			}
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				t.Errorf("malformed command %q", lines.Text())
				return
			}
			answer := fmt.Sprintf(`{"return": {}, "id": %d}`, c.ID)
			if c.Execute != "qmp_capabilities" {
				answer = reply(c.Execute, c.ID)
			}
			if answer == "hang up" {
				conn.Close()
				return
			}
			if answer != "" {
				fmt.Fprint(conn, answer+"\r\n")
			}
		}
	}()
}

func TestQMP(t *testing.T) {
	ours, file, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	file.Close()
	fakeQEMU(t, theirs, func(command string, id uint64) string {
		switch command {
		case "status":
			// An event and somebody else's reply come first, and all in pieces.
			return fmt.Sprintf("{\"event\": \"STOP\", \"data\": {}}\r\n{\"return\": 1, \"id\": 9999}\r\n"+`{"return": {"running": true}, "id": %d}`, id)
		case "fail":
			return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "not today"}, "id": %d}`, id)
		case "die":
			return "hang up"
		}
		return ""
	})
	q, version, err := newQMP(t.Context(), ours)
	if err != nil {
		t.Fatal(err)
	}
	if version.String() != "7.2.22" {
		t.Errorf("version %s", version)
	}
	events := make(chan string, 10)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for e := range q.events {
			events <- e.Name
		}
	}()
	var status struct{ Running bool }
	if err := q.execute(t.Context(), "status", nil, &status); err != nil || !status.Running {
		t.Errorf("status: %+v, %v", status, err)
	}
	if e := <-events; e != "STOP" {
		t.Errorf("event %s", e)
	}
	var refused *qmpError
	if err := q.execute(t.Context(), "fail", nil, nil); !errors.As(err, &refused) || err.Error() != "QMP fail: not today" {
		t.Errorf("fail: %v", err)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, errors.New("too slow"))
	defer cancel()
	if err := q.execute(ctx, "silent", nil, nil); err == nil || err.Error() != "QMP silent: too slow" {
		t.Errorf("silent: %v", err)
	}
	// A connection that ends fails the command that waits, and all after it.
	for range 2 {
		if err := q.execute(t.Context(), "die", nil, nil); err == nil || !strings.Contains(err.Error(), "connection lost") {
			t.Errorf("die: %v", err)
		}
	}
	if err := q.close(); !errors.Is(err, io.EOF) {
		t.Errorf("close: %v", err)
	}
	<-drained
}

// Descriptors travel with their command.
func TestQMPFiles(t *testing.T) {
	ours, file, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	q := &qmp{conn: ours, waiting: map[uint64]chan qmpReply{}}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := q.send("getfd", map[string]string{"fdname": "x"}, []*os.File{w}, nil); err != nil {
		t.Fatal(err)
	}
	buf, oob := make([]byte, 1000), make([]byte, 100)
	n, oobn, _, _, err := unix.Recvmsg(int(file.Fd()), buf, oob, 0)
	if err != nil || !strings.Contains(string(buf[:n]), `"fdname":"x"`) {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		t.Fatal(messages, err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		t.Fatal(fds, err)
	}
	if err := unix.Close(fds[0]); err != nil {
		t.Error(err)
	}
	ours.Close()
}

// A VMM that a guest has broken out into cannot make its owner keep what it sends without end.
func TestEndlessMessage(t *testing.T) {
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	qemu, err := net.FileConn(theirs)
	if err := errors.Join(err, theirs.Close()); err != nil {
		t.Fatal(err)
	}
	sent := make(chan int64, 1)
	go func() {
		defer qemu.Close()
		n, _ := io.WriteString(qemu, `{"QMP": {"version": {"qemu": {"micro": "`)
		total := int64(n)
		piece := make([]byte, 64<<10)
		for i := range piece {
			piece[i] = 'a'
		}
		for total < 64*maxMessage {
			n, err := qemu.Write(piece)
			if total += int64(n); err != nil {
				break // it was cut off
			}
		}
		sent <- total
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, _, err := newQMP(ctx, ours); err == nil || !errors.Is(err, bufio.ErrTooLong) {
		t.Errorf("error is %v", err)
	}
	if n := <-sent; n > 4*maxMessage {
		t.Errorf("%d bytes were taken", n)
	}
	long := &qmpError{Desc: "\x1b[2J" + strings.Repeat("a", 1<<20)}
	if text := long.Error(); len(text) > 2*maxWords || strings.Contains(text, "\x1b") {
		t.Errorf("an error of %d bytes: %.40q", len(text), text)
	}
}

// TestDefaultCPU asks QEMU whether it knows the models that a new VM gets.
func TestDefaultCPU(t *testing.T) {
	program := need.Program(t, "qemu-system-x86_64")
	out, err := exec.CommandContext(t.Context(), program, "-cpu", "help").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, model := range []string{cpuTCG, cpuKVM} {
		if err := checkCPU(model); err != nil {
			t.Error(err)
		}
		if !slices.Contains(strings.Fields(string(out)), model) {
			t.Errorf("QEMU has no CPU model %s", model)
		}
	}
}

// A limit that QEMU could exceed, which would end it, is refused before it starts.
func TestTooFewThreads(t *testing.T) {
	for pids, refused := range map[int]bool{-1: false, 0: false, 8: true, 81: true, 82: false, 1024: false} {
		err := checkThreads(&vmm.Launch{Board: vmm.Board{CPUs: 2}, Confinement: vmm.Confinement{Limits: vmm.Limits{PIDs: pids}}})
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), "--pids-max") {
			t.Errorf("%d: %v", pids, err)
		}
	}
}
