package fuse

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/fusemount"
	"drafter/internal/need"
)

// TestMain runs helpers: a server to be killed, and a process that uses its file.
func TestMain(m *testing.M) {
	switch os.Getenv("FUSE_TEST") {
	case "serve":
		d, err := block.OpenFile(os.Args[2], false)
		if err == nil {
			_, err = New(Config{Dir: os.Args[1]}, []expose.Device{{Name: "file", Kind: expose.File, Device: d}})
		}
		fmt.Println("serving:", err)
		select {}
	case "edit":
		if err := edit(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	case "map":
		mapped, err := mapFile(os.Args[1])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("mapped")
		for i := 0; ; i++ {
			mapped[i*4096%len(mapped)]++
		}
	}
	goleak.VerifyTestMain(m)
}

func mapFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// counting counts what reaches a device.
type counting struct {
	*block.File
	syncs atomic.Int64
	fail  atomic.Bool
}

var errBroken = errors.New("disk is broken")

func (c *counting) Sync() error {
	c.syncs.Add(1)
	if c.fail.Load() {
		return errBroken
	}
	return c.File.Sync()
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	if c.fail.Load() {
		return 0, errBroken
	}
	return c.File.ReadAt(p, off)
}

func newDevice(t testing.TB, size int64) *counting {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	d, err := block.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return &counting{File: d}
}

func mount(t testing.TB, devices ...expose.Device) *Mount {
	t.Helper()
	need.FUSE(t)
	m, err := New(Config{Dir: filepath.Join(t.TempDir(), "devices"), UID: 12, GID: 34}, devices)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if left, err := fusemount.Below(m.dir); err != nil || len(left) > 0 {
			t.Errorf("left mounted: %v, %v", left, err)
		}
	})
	return m
}

// A mount whose directory was given another name ends all the same, with its users.
func TestRenamedMount(t *testing.T) {
	need.FUSE(t)
	base := t.TempDir()
	m, err := New(Config{Dir: filepath.Join(base, "here", "devices")}, []expose.Device{{Name: "disk", Device: newDevice(t, 1<<20)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(base, "here"), filepath.Join(base, "there")); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { closed <- m.Close() }()
	select {
	case err := <-closed:
		if err == nil || !strings.Contains(err.Error(), "unmount") {
			t.Errorf("nobody says that it was not where it was mounted: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
	if left, err := fusemount.Below(base); err != nil || len(left) > 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}
}

// mappedContent is what a device holds, and edits are the bytes that a user of its mapping changes.
func mappedContent() (content []byte, edits []int) {
	content = make([]byte, 8<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range content[:4<<20] {
		content[i] = byte(rng.Uint32())
	}
	for range 1000 {
		edits = append(edits, rng.IntN(len(content)))
	}
	return content, edits
}

// edit compares a mapped file with mappedContent, changes it, and flushes it. It runs in a process
// of its own: a thread that waits in a page fault for a server in the same process keeps Go's
// scheduler from running that server.
func edit(path string) error {
	mapped, err := mapFile(path)
	if err != nil {
		return err
	}
	want, edits := mappedContent()
	if !bytes.Equal(mapped, want) {
		return errors.New("the mapping differs from the device")
	}
	for _, i := range edits {
		mapped[i]++
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// What is written through a mapping is in the device after an fsync, and the other way round.
func TestMapping(t *testing.T) {
	want, edits := mappedContent()
	d := newDevice(t, int64(len(want)))
	if _, err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	m := mount(t, expose.Device{Name: "file", Kind: expose.File, Device: d})
	cmd := exec.Command("/proc/self/exe", m.Path("file"))
	cmd.Env = append(os.Environ(), "FUSE_TEST=edit")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, i := range edits {
		want[i]++
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device differs from the mapping, %v", err)
	}
	// A child, such as the VMM, does not inherit the server's end.
	if out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput(); err != nil || strings.Contains(string(out), "/dev/fuse") {
		t.Errorf("a child has the connection: %s, %v", out, err)
	}
}

func TestDisk(t *testing.T) {
	const size = 1<<20 + 700
	disk, file := newDevice(t, size), newDevice(t, size)
	m := mount(t, expose.Device{Name: "disk", Kind: expose.Disk, Device: disk}, expose.Device{Name: "config", Kind: expose.File, Device: file})
	for name, d := range map[string]*counting{"disk": disk, "config": file} {
		f, err := os.OpenFile(m.Path(name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		for _, off := range []int64{0, 4096, 1<<20 + 695, 12345} {
			copy(want[off:], "hello")
			if _, err := f.WriteAt([]byte("hello"), off); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := f.Sync(); err != nil || d.syncs.Load() != 1 {
			t.Errorf("%s: fsync reached the device %d times, %v", name, d.syncs.Load(), err)
		}
		got, err := os.ReadFile(m.Path(name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s reads other bytes than were written, %v", name, err)
		}
		if _, err := f.WriteAt([]byte("x"), size); err == nil {
			t.Errorf("%s: written beyond its end", name)
		}
		if err := f.Truncate(10); !errors.Is(err, syscall.EPERM) {
			t.Errorf("%s: truncate: %v", name, err)
		}
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20); err != nil {
			t.Errorf("%s: punch hole: %v", name, err)
		}
		clear(want[:1<<20])
		if got, err := os.ReadFile(m.Path(name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s after a trim, %v", name, err)
		}
		if at, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); err != nil || at < 1<<19 {
			t.Errorf("%s: data at %d, %v", name, at, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Uid != 12 || st.Gid != 34 || st.Size != size {
			t.Errorf("%s: %+v, %v", name, st, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// What a device fails with is an I/O error for the user of the file, and the whole story for the
// owner.
func TestDeviceFails(t *testing.T) {
	d := newDevice(t, 1<<20)
	m := mount(t, expose.Device{Name: "disk", Kind: expose.Disk, Device: d})
	d.fail.Store(true)
	f, err := os.OpenFile(m.Path("disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("sync: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v", err)
	}
	if err := m.Failed(); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "sync device disk") {
		t.Errorf("the owner is told: %v", err)
	}
}

func TestFio(t *testing.T) {
	need.Program(t, "fio")
	disk, file := newDevice(t, 16<<20), newDevice(t, 16<<20)
	m := mount(t, expose.Device{Name: "disk", Kind: expose.Disk, Device: disk}, expose.Device{Name: "file", Kind: expose.File, Device: file})
	for _, tt := range []struct{ name, engine, sizes string }{{"disk", "psync", "512-128k"}, {"disk", "libaio", "512-128k"}, {"file", "mmap", "4k-128k"}} {
		fio := exec.Command("fio", "--name=verify", "--filename="+m.Path(tt.name), "--ioengine="+tt.engine, "--iodepth=8", "--rw=randrw", "--bsrange="+tt.sizes,
			"--size=16M", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=64", "--time_based=0", "--io_size=16M")
		fio.Dir = t.TempDir() // where it leaves what it verified
		out, err := fio.CombinedOutput()
		if err != nil {
			t.Errorf("%s by %s: %v: %s", tt.name, tt.engine, err, out)
		}
	}
	if err := m.Failed(); err != nil {
		t.Error(err)
	}
}

// A file system made on an exposed disk, and filled, is sound.
func TestExt4(t *testing.T) {
	d := newDevice(t, 64<<20)
	m := mount(t, expose.Device{Name: "disk", Kind: expose.Disk, Device: d})
	source := t.TempDir()
	content := make([]byte, 20<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(content) // which never fails
	copied := filepath.Join(t.TempDir(), "copied")
	if err := os.WriteFile(filepath.Join(source, "file"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"mke2fs", "-q", "-t", "ext4", "-d", source, m.Path("disk")},
		{"e2fsck", "-fn", m.Path("disk")},
		{"e2fsck", "-fn", d.Name()},
		{"debugfs", "-R", "dump /file " + copied, m.Path("disk")},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", command, err, out)
		}
	}
	if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file read back differs, %v", err)
	}
}

// helper runs this program as another process, until its first line, which is says.
func helper(t *testing.T, mode, says string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "FUSE_TEST="+mode)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != says {
		t.Fatalf("%s: %q, %v; want %q", mode, lines.Text(), lines.Err(), says)
	}
	return cmd
}

// A server is killed while another process has its file mapped. That process can be killed once the
// connection is aborted.
func TestKilledServer(t *testing.T) {
	need.FUSE(t)
	d := newDevice(t, 256<<20)
	dir := filepath.Join(t.TempDir(), "devices")
	server := helper(t, "serve", "serving: <nil>", dir, d.Name())
	user := helper(t, "map", "mapped", filepath.Join(dir, "file"))
	time.Sleep(100 * time.Millisecond) // let it be in the midst of its faults
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := fusemount.AbortBelow(filepath.Dir(dir)); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { ended <- server.Wait() }()
	if err := user.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	go func() { ended <- user.Wait() }()
	for range 2 {
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			t.Fatal("a process hangs in the kernel")
		}
	}
	if left, err := fusemount.Below(dir); err != nil || len(left) > 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}
	// The place can be used again, also when it is not cleaned up before.
	server = helper(t, "serve", "serving: <nil>", dir, d.Name())
	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = server.Wait() // killed
	m, err := New(Config{Dir: dir}, []expose.Device{{Name: "file", Kind: expose.File, Device: d}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// as runs a command as another user, with no groups.
func as(uid uint32, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
}

const nobody = 65534

// The kernel lets nobody but the owner of the files use them, whatever the directories above allow.
func TestOtherUsers(t *testing.T) {
	need.FUSE(t)
	const owner = 4711
	dir := filepath.Join(t.TempDir(), "devices")
	for d := filepath.Dir(dir); d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := newDevice(t, 1<<20)
	m, err := New(Config{Dir: dir, UID: owner, GID: owner}, []expose.Device{{Name: "disk", Kind: expose.Disk, Device: d}})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var st unix.Stat_t
	if err := unix.Stat(m.Path("disk"), &st); err != nil || st.Uid != owner || st.Mode&0o777 != 0o600 {
		t.Errorf("the file belongs to %d and has mode %o, %v", st.Uid, st.Mode, err)
	}
	if err := unix.Stat(dir, &st); err != nil || st.Uid != 0 || st.Mode&0o777 != 0o700 {
		t.Errorf("the directory belongs to %d and has mode %o, %v", st.Uid, st.Mode, err)
	}
	for _, script := range []string{"cat %s", "echo >> %s", "dd if=/dev/zero of=%s bs=1 count=1 conv=notrunc", "stat %s", "chmod 666 %s"} {
		out, err := as(nobody, "sh", "-c", fmt.Sprintf(script, m.Path("disk"))).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "ermission denied") {
			t.Errorf("%s as nobody: %s, %v", script, out, err)
		}
	}
	// A bind mount is how a VMM gets at one file of the directory. Its owner uses it there, nobody
	// else.
	place := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(place, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(place), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(m.Path("disk"), place, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(place, 0)
	if out, err := as(owner, "dd", "if=/dev/zero", "of="+place, "bs=1", "count=1", "conv=notrunc").CombinedOutput(); err != nil {
		t.Errorf("the owner cannot write: %s, %v", out, err)
	}
	if out, err := as(nobody, "cat", place).CombinedOutput(); err == nil {
		t.Errorf("nobody reads %d bytes", len(out))
	}
}

// Whoever makes a mount namespace, which every user can, has a copy of the mount in it. The server
// ends all the same.
func TestPinnedMount(t *testing.T) {
	need.FUSE(t)
	m, err := New(Config{Dir: filepath.Join(t.TempDir(), "devices")}, []expose.Device{{Name: "disk", Kind: expose.Disk, Device: newDevice(t, 1<<20)}})
	if err != nil {
		t.Fatal(err)
	}
	cmd := as(nobody, "unshare", "-Urm", "sh", "-c", "echo pinned; exec sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	b := make([]byte, 7)
	if _, err := out.Read(b); err != nil {
		need.Lacks(t, "user-namespaces", "this host lets users make no namespaces")
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", cmd.Process.Pid))
	if err != nil || !bytes.Contains(mounts, []byte(filepath.Dir(m.Path("disk")))) {
		t.Fatalf("the mount is not pinned: %v", err)
	}
	closed := make(chan error, 1)
	go func() { closed <- m.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the server waits for the other namespace")
	}
	if left, err := fusemount.Below(filepath.Dir(m.Path("disk"))); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
