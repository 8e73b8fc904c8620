package peer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/logging"
	"drafter/internal/need"
	"drafter/internal/s3test"
	"drafter/internal/stack"
	"drafter/s3"
	"drafter/vmm"
)

// instanceFiles are the devices of an instance whose changes are on a small file system.
type instanceFiles struct {
	devices map[string]Device
	stacks  map[string]*stack.Stack
	id      string
}

// open opens the devices as a peer does. An error leaves nothing open.
func (f *instanceFiles) open(t *testing.T) error {
	t.Helper()
	f.stacks = map[string]*stack.Stack{}
	for name, d := range f.devices {
		s, err := d.files().Open(t.Context())
		if err == nil {
			f.stacks[name] = s
			err = d.provide(s)
		}
		if err == nil && name == vmm.Memory {
			err = s.Memory.Share() // where its guest writes
		}
		if err != nil {
			f.close(t)
			return err
		}
	}
	return nil
}

func (f *instanceFiles) close(t *testing.T) {
	t.Helper()
	for _, s := range f.stacks {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// suspend stores what a VM has written, as a suspend does.
func (f *instanceFiles) suspend(state []byte) error {
	for _, name := range []string{vmm.Disk, vmm.Memory} {
		if err := f.stacks[name].Sync(); err != nil {
			return fmt.Errorf("device %s: %w", name, err)
		}
	}
	return vmm.WriteState(f.stacks[vmm.State], f.id, state)
}

// An instance on a file system of every size from too small to just enough: it does not start, or
// it runs, loses nothing of memory, can be handed over in any case, and is suspended, or says that
// it is not and can be suspended once there is room. What says that it is suspended is whole.
func TestEveryFileSystem(t *testing.T) {
	need.Root(t)
	const size = 1 << 20
	dir := t.TempDir()
	small := filepath.Join(dir, "instance")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // for ever: the mount namespace ends with the test's thread
	if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
		t.Fatal(err)
	}
	mount := func(flags uintptr, room int) {
		t.Helper()
		if err := unix.Mount("tmpfs", small, "tmpfs", flags, fmt.Sprintf("size=%d,mode=700", room)); err != nil {
			t.Fatal(err)
		}
	}
	f := &instanceFiles{devices: map[string]Device{}, id: uuid.NewString()}
	for name, size := range map[string]int64{vmm.Memory: size, vmm.Disk: size, vmm.State: vmm.StateSize} {
		d := packageDevice(name, name, dir, small)
		base, err := block.CreateFile(d.Base, size)
		if err != nil {
			t.Fatal(err)
		}
		if name == vmm.State {
			err = vmm.WriteState(base, f.id, []byte("the package's"))
		}
		if err := errors.Join(err, base.Close()); err != nil {
			t.Fatal(err)
		}
		f.devices[name] = d
	}
	outcomes := map[string]int{}
	for room := 64 << 10; room <= 9<<19; room += 128 << 10 {
		mount(0, room)
		outcomes[f.life(t, room, func() { mount(unix.MS_REMOUNT, 16<<20) })]++
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(outcomes)
	for _, outcome := range []string{"not started", "not suspended", "suspended"} {
		if outcomes[outcome] == 0 {
			t.Errorf("no size ended with %q", outcome)
		}
	}
}

// life starts an instance, writes all of it, moves it away in half of the cases, and suspends it.
func (f *instanceFiles) life(t *testing.T, room int, makeRoom func()) (outcome string) {
	t.Helper()
	if err := f.open(t); err != nil {
		if !block.NoRoom(err) {
			t.Errorf("%d bytes: %v", room, err)
		}
		return "not started"
	}
	if err := vmm.MarkState(f.stacks[vmm.State], vmm.Running); err != nil {
		t.Fatalf("%d bytes: %v", room, err) // there is room set aside
	}
	memory := bytes.Repeat([]byte{0xAA}, int(f.stacks[vmm.Memory].Size()))
	if _, err := f.stacks[vmm.Memory].WriteAt(memory, 0); err != nil {
		t.Errorf("%d bytes: memory is refused: %v", room, err)
	}
	if _, err := f.stacks[vmm.Disk].WriteAt(memory, 0); err != nil && !block.NoRoom(err) {
		t.Errorf("%d bytes: %v", room, err)
	}
	got := make([]byte, len(memory))
	if _, err := f.stacks[vmm.Memory].ReadAt(got, 0); err != nil || !bytes.Equal(got, memory) {
		t.Errorf("%d bytes: memory is not as it was written: %v", room, err)
	}
	// A move needs no room here: the state leaves, and then the note that it has.
	saved := bytes.Repeat([]byte("state"), 100<<10)
	if err := vmm.WriteMigratedState(f.stacks[vmm.State], f.id, saved, uuid.New(), vmm.Leaving); err != nil {
		t.Errorf("%d bytes: leave: %v", room, err)
	}
	for _, status := range []vmm.Status{vmm.Moved, vmm.Running} {
		if err := vmm.MarkState(f.stacks[vmm.State], status); err != nil {
			t.Errorf("%d bytes: mark: %v", room, err)
		}
	}
	outcome = "suspended"
	if err := f.suspend(saved); err != nil {
		outcome = "not suspended"
		if !block.NoRoom(err) || !vmm.Unstored(err) {
			t.Errorf("%d bytes: suspend: %v", room, err)
		}
		if status, _, _, serr := vmm.StateStatus(f.stacks[vmm.State]); serr != nil || status != vmm.Running {
			t.Errorf("%d bytes: it is not suspended (%v), and says %v, %v", room, err, status, serr)
		}
		makeRoom()
		if err := f.suspend(saved); err != nil {
			t.Errorf("%d bytes: suspend with room: %v", room, err)
		}
	}
	f.close(t)
	if err := f.open(t); err != nil {
		t.Fatalf("%d bytes: start again: %v", room, err)
	}
	defer f.close(t)
	if _, err := f.stacks[vmm.Memory].ReadAt(got, 0); err != nil || !bytes.Equal(got, memory) {
		t.Errorf("%d bytes: memory is not as it was suspended: %v", room, err)
	}
	if state, err := vmm.ReadState(f.stacks[vmm.State], f.id); err != nil || !bytes.Equal(state, saved) {
		t.Errorf("%d bytes: state is not as it was saved: %v", room, err)
	}
	return outcome
}

// A storage that is away keeps no instance from starting, and is found later. One that is not fit
// is an error at once.
func TestStoreAway(t *testing.T) {
	server := s3test.Start(t)
	d := DefaultDevice(vmm.Disk)
	d.S3Sync, d.S3Bucket, d.S3Endpoint, d.S3AccessKey, d.S3SecretKey = true, server.Bucket, server.Endpoint, s3test.AccessKey, s3test.SecretKey
	newPeer := func() *Peer { return &Peer{config: Config{Devices: []Device{d}}, log: logging.Or(nil)} }
	server.Fail(s3test.Refuse("501"))
	if err := newPeer().openStore(t.Context()); !errors.Is(err, s3.ErrUnfit) {
		t.Errorf("a storage without conditional writes: %v", err)
	}
	server.Fail(s3test.All("cut"))
	p := newPeer()
	if err := p.openStore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.syncer.connect(t.Context()); !errors.Is(err, s3.ErrAway) {
		t.Errorf("it is away still: %v", err)
	}
	server.Fail(nil)
	if err := errors.Join(p.syncer.connect(t.Context()), p.closeStore()); err != nil {
		t.Error(err)
	}
}
