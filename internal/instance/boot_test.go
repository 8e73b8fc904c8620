package instance

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"drafter/vmm"
)

// served is a VMM whose restored machines are served their memory, and a machine of it.
type served struct {
	launches *[]bool // whether each booted
	done     chan struct{}
}

func (served) Name() string       { return "served" }
func (served) ServesMemory() bool { return true }

func (s served) Launch(_ context.Context, l vmm.Launch) (vmm.Machine, error) {
	*s.launches = append(*s.launches, l.Boot != nil)
	if len(*s.launches) > 2 {
		return nil, io.ErrUnexpectedEOF
	}
	return s, nil
}

func (served) Hardware() vmm.Hardware                   { return vmm.Hardware{} }
func (served) Restore(context.Context, io.Reader) error { return nil }
func (served) Resume(context.Context) error             { return nil }
func (served) Pause(context.Context) error              { return nil }
func (served) Flush(context.Context) error              { return nil }
func (served) Wait() error                              { return nil }
func (served) Close() error                             { return nil }
func (s served) Done() <-chan struct{}                  { return s.done }

func (served) Save(_ context.Context, w io.Writer) error {
	_, err := io.WriteString(w, "state")
	return err
}

func (served) GuestConn(context.Context, uint32) (net.Conn, error) { return nil, io.EOF }

// A VM that is to boot although it could be resumed boots once, also where its memory is served to
// its VMM only after that.
func TestBootsOnce(t *testing.T) {
	const size = 1 << 20
	dir := t.TempDir()
	paths := Paths{}
	for name, length := range map[string]int64{vmm.Memory: size, vmm.State: vmm.StateSize, vmm.Kernel: size} {
		paths[name] = filepath.Join(dir, name)
		if err := makeFile(paths[name], func(f *os.File) error { return f.Truncate(length) }); err != nil {
			t.Fatal(err)
		}
	}
	config := &vmm.PackageConfig{
		ID: uuid.NewString(), Initrd: &vmm.Section{},
		Devices: []vmm.PackageDevice{{Name: vmm.Memory, Size: size}, {Name: vmm.State, Size: vmm.StateSize}},
	}
	dev, err := paths.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := vmm.WriteState(dev, config.ID, []byte("suspended")); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	var launches []bool
	h := vmm.Host{Drivers: vmm.Drivers{served{&launches, make(chan struct{})}}, BaseDir: filepath.Join(dir, "vms"), Boot: true}
	l, err := Launch(t.Context(), h, config, paths)
	if err != nil {
		t.Fatal(err)
	}
	i, err := l.Run(t.Context(), time.Now(), time.Minute)
	if err != nil || len(launches) != 2 || !launches[0] || launches[1] {
		t.Fatalf("it booted, VMM by VMM: %v; %v", launches, err)
	}
	if err := i.Close(); err != nil {
		t.Error(err)
	}
}

// What a VM has in its memory after it has booted is all that its memory device holds then, zeros included.
func TestBootStorage(t *testing.T) {
	const size = 4 << 20
	dir := t.TempDir()
	device, booted := filepath.Join(dir, "device"), filepath.Join(dir, "booted")
	if err := os.WriteFile(device, bytes.Repeat([]byte("old "), size/4), 0o600); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want[1<<20:], "booted")
	copy(want[size-4096:], "at the end")
	err := makeFile(booted, func(f *os.File) error {
		for _, at := range []int64{1 << 20, size - 4096} {
			if _, err := f.WriteAt(want[at:at+4096], at); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s := bootStorage{Paths{vmm.Memory: device, vmm.Kernel: "kernel"}, booted}
	if s.Path(vmm.Memory) != booted || s.Path(vmm.Kernel) != "kernel" {
		t.Errorf("paths %s, %s", s.Path(vmm.Memory), s.Path(vmm.Kernel))
	}
	if err := s.Sync(vmm.Memory); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(device); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device does not hold the memory: %d bytes, %v", len(got), err)
	}
}
