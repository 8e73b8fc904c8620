package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// smallDisk is a file system of the test's.
type smallDisk struct{ dir string }

func newSmallDisk(t *testing.T, dir, size string) *smallDisk {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	command(t, ".", "mount", "-t", "tmpfs", "-o", "mode=700,size="+size, "tmpfs", dir)
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return &smallDisk{dir}
}

func (d *smallDisk) resize(t *testing.T, size string) {
	t.Helper()
	command(t, ".", "mount", "-o", "remount,size="+size, d.dir)
}

// fill leaves no room, but for some pages.
func (d *smallDisk) fill(t *testing.T) { d.leave(t, 16<<10) }

// leave leaves room for some bytes.
func (d *smallDisk) leave(t *testing.T, room int64) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		var st syscall.Statfs_t
		if err := syscall.Statfs(d.dir, &st); err != nil {
			t.Fatal(err)
		}
		err := syscall.Mount("tmpfs", d.dir, "tmpfs", syscall.MS_REMOUNT, fmt.Sprint("size=", int64(st.Blocks-st.Bfree)*st.Bsize+room))
		if err == nil {
			return
		}
		if err != syscall.EINVAL || time.Now().After(deadline) { // EINVAL: more is in use by now
			t.Fatal(err)
		}
	}
}

// free is how many bytes there is room for.
func (d *smallDisk) free(t *testing.T) int64 {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}

// numbered are random values that a guest is made to keep, by their numbers.
type numbered struct{ sums [][32]byte }

// add writes so many MiB.
func (n *numbered) add(t *testing.T, c *redis.Client, mebibytes int) {
	t.Helper()
	rng := rand.NewChaCha8([32]byte{byte(len(n.sums))})
	for range mebibytes {
		p := make([]byte, 1<<20)
		_, _ = rng.Read(p)
		if err := c.Set(t.Context(), fmt.Sprint("value ", len(n.sums)), p, 0).Err(); err != nil {
			t.Fatal(err)
		}
		n.sums = append(n.sums, sha256.Sum256(p))
	}
}

func (n *numbered) checkSums(t *testing.T, c *redis.Client, where string) {
	t.Helper()
	for i, want := range n.sums {
		got, err := c.Get(t.Context(), fmt.Sprint("value ", i)).Bytes()
		if err != nil || sha256.Sum256(got) != want {
			t.Fatalf("%s: value %d is not what was written: %v", where, i, err)
		}
	}
}

// save makes a Redis write to its disk, unless it does so already, or stands still for its disk.
func save(t *testing.T, c *redis.Client) {
	t.Helper()
	err := c.BgSave(t.Context()).Err()
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !strings.Contains(err.Error(), "already in progress") && !strings.Contains(err.Error(), "child process is active") {
		t.Fatal(err)
	}
}

// A host's file systems have no room, first that of the memory, then that of a disk. Nothing is
// lost: a copy that is made meanwhile is whole; the VM waits for its disk, and moves off the host
// all the same. At its target it goes on by itself once there is room for the disk, and is suspended
// once there is some for memory.
func TestFullHost(t *testing.T) {
	s := emptySite(t)
	place := func(instance, memory, disk string) (m, d *smallDisk, flags []string) {
		m = newSmallDisk(t, filepath.Join(s.dir, instance, "memory"), memory)
		d = newSmallDisk(t, filepath.Join(s.dir, instance, "disk"), disk)
		return m, d, []string{
			"--device", fmt.Sprintf("name=memory,overlay=%s/o,state=%s/s", m.dir, m.dir),
			"--device", fmt.Sprintf("name=oci,overlay=%s/o,state=%s/s", d.dir, d.dir),
		}
	}
	_, disk, flags := place("instance-0", "40m", "100m")
	memory1, disk1, flags1 := place("instance-1", "900m", "400m")
	zero, one := s.redisIn(t, "ark0", "127.0.0.1:3333"), s.redisIn(t, "ark1", "127.0.0.1:4444")
	source := s.peer(t, "instance-0", append(flags, "--netns", "ark0", "--laddr", "localhost:1337")...)
	var values numbered
	values.add(t, zero, 60)
	copied := filepath.Join(s.dir, "copied")
	for range 2 { // what the first has copied is not forgotten by the second
		if err := s.Run(t.Context(), os.Stderr, "checkpoint", "--raddr", "localhost:1337", "--output", copied); err != nil {
			t.Fatal(err)
		}
	}
	values.checkSums(t, zero, "source")
	vm := s.resumes(t, copied, "ark1")
	values.checkSums(t, one, "copy")
	end(t, vm)

	disk.fill(t)
	save(t, zero)
	await(t, source, "The VM stands still, as a disk cannot be used; it is tried again each second")
	target := s.peer(t, "instance-1", append(flags1, "--netns", "ark1", "--raddr", "localhost:1337")...)
	if err := source.Wait(); err != nil {
		t.Errorf("the source, whose VM has moved: %v", err)
	}
	said := func(c string) bool {
		return strings.Contains(c, "There is no room for what the VM writes; it waits until there is")
	}
	if !slices.ContainsFunc(source.Complaints(), said) {
		t.Error("the source did not say that a disk has no room")
	}
	values.checkSums(t, one, "target")

	disk1.fill(t)
	save(t, one)
	await(t, target, "The VM stands still, as a disk cannot be used; it is tried again each second")
	disk1.resize(t, "900m")
	await(t, target, "The VM goes on")
	values.checkSums(t, one, "target, after its disk was full")

	const tooLittle = 10 << 20
	memory1.leave(t, tooLittle)
	values.add(t, one, 20)
	if err := target.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	await(t, target, "The VM cannot be suspended for want of room, and runs on; make room")
	if free := memory1.free(t); free < tooLittle/2 {
		t.Errorf("%d bytes are left to others", free)
	}
	values.checkSums(t, one, "target, which could not be suspended")
	memory1.resize(t, "900m")
	await(t, target, "Suspended VM")
	if err := target.Wait(); err != nil {
		t.Error(err)
	}
	again := s.peer(t, "instance-1", append(flags1, "--netns", "ark1")...)
	values.checkSums(t, one, "suspended")
	disk1.fill(t)
	save(t, one)
	await(t, again, "The VM stands still, as a disk cannot be used; it is tried again each second")
	end(t, again) // it is suspended as it stands
}

// A package that is run or made on a file system that cannot hold its memory is refused before its
// VM starts: it could not be suspended.
func TestNoRoomForMemory(t *testing.T) {
	s := emptySite(t)
	small := newSmallDisk(t, filepath.Join(s.dir, "small"), "1g")
	s.pkg = filepath.Join(small.dir, "package")
	s.copyPackage(t, filepath.Join(work, "out/package"), s.pkg)
	small.fill(t)
	before := stored(t, s.pkg)
	devices, err := json.Marshal(devicesWith("out/package/oci.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	devices = bytes.ReplaceAll(devices, []byte(`"input":"out/package`), []byte(`"input":"small/package`))
	devices = bytes.ReplaceAll(devices, []byte(`"output":"out/package`), []byte(`"output":"small`))
	run := s.refused(t)
	small.resize(t, "1g")
	snapshot := s.fails(t, "snapshotter", "--chroot-base-dir", "vms", "--memory-size", "4096", "--devices", string(devices))
	for name, line := range map[string]string{"runner": run, "snapshotter": snapshot} {
		if !strings.Contains(line, "set room aside for device memory: ") || !strings.Contains(line, small.dir) || !strings.Contains(line, "make room there") {
			t.Errorf("%s: %s", name, line)
		}
	}
	if after := stored(t, s.pkg); after != before {
		t.Errorf("the package takes %d bytes, %d before", after, before)
	}
}

// stored is how many bytes of their file system the files of a directory take.
func stored(t *testing.T, dir string) (bytes int64) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		var st syscall.Stat_t
		if err := syscall.Stat(file, &st); err != nil {
			t.Fatal(err)
		}
		bytes += st.Blocks * 512
	}
	return bytes
}
