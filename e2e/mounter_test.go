package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/need"
	"drafter/internal/tour"
)

// mount starts a mounter with one device, of which all files are below dir.
func (s *site) mount(t *testing.T, dir string, overlay bool, flags ...string) *tour.Service {
	t.Helper()
	m, err := s.Start(s.mountArgs(dir, overlay, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-m.Done():
		default:
			end(t, m)
		}
	})
	await(t, m, "Exposed device")
	return m
}

func (s *site) mountArgs(dir string, overlay bool, flags ...string) []string {
	device := map[string]any{"name": "data", "base": filepath.Join(dir, "data.img"), "blockSize": 65536, "makeMigratable": true, "maxCycles": 20, "minCycles": 5, "maxDirtyBlocks": 200}
	if overlay {
		device["overlay"], device["state"] = filepath.Join(dir, "data.overlay"), filepath.Join(dir, "data.state")
	}
	b, err := json.Marshal([]any{device})
	if err != nil {
		panic(err) // it is a constant of ours
	}
	return append([]string{"mounter", "--raddr", "", "--laddr", "", "--chroot-base-dir", "vms", "--links", dir + "/mounts", "--devices", string(b)}, flags...)
}

// fio is a run of fio that verifies what it reads.
type fio struct {
	cmd    *exec.Cmd
	output strings.Builder
	errors strings.Builder
}

func startFio(t *testing.T, path string, seconds int) *fio {
	t.Helper()
	f := &fio{cmd: exec.Command("fio", "--name=verify", "--filename="+path, "--rw=randrw", "--bs=4k", "--size=48m", "--ioengine=libaio", "--iodepth=8", "--direct=1", "--verify=crc32c",
		"--verify_fatal=1", "--verify_backlog=512", "--fsync=64", "--time_based", fmt.Sprintf("--runtime=%d", seconds), "--rate_iops=1500", "--output-format=json")}
	f.cmd.Dir = t.TempDir() // where fio leaves what it verified
	f.cmd.Stdout, f.cmd.Stderr = &f.output, &f.errors
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := f.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return f
}

// end waits for the run, which must be without error, and says how long the longest operation took.
func (f *fio) end(t *testing.T) {
	t.Helper()
	if err := f.cmd.Wait(); err != nil {
		t.Fatalf("fio: %v: %s%s", err, f.errors.String(), f.output.String())
	}
	type side struct {
		IOs     int64 `json:"total_ios"`
		Latency struct {
			Max int64 `json:"max"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write side
		} `json:"jobs"`
	}
	_, out, _ := strings.Cut(f.output.String(), "{") // notes may come before it
	if err := json.Unmarshal([]byte("{"+out), &report); err != nil || len(report.Jobs) != 1 {
		t.Fatalf("fio: %v: %s", err, out)
	}
	j := report.Jobs[0]
	if j.Error != 0 || j.Read.IOs == 0 || j.Write.IOs == 0 {
		t.Errorf("fio: error %d, %d reads, %d writes", j.Error, j.Read.IOs, j.Write.IOs)
	}
	longest := time.Duration(max(j.Read.Latency.Max, j.Write.Latency.Max))
	t.Logf("fio: %d reads, %d writes, the longest took %s", j.Read.IOs, j.Write.IOs, longest.Round(time.Millisecond))
}

// A device moves twice, over 1 Gbit/s, while a program reads and writes it at the path where it was
// at first, and verifies what it reads. Afterwards it is where it went, and nowhere else.
func TestMounter(t *testing.T) {
	for _, overlay := range []bool{false, true} {
		t.Run(fmt.Sprintf("overlay %t", overlay), func(t *testing.T) { testMounter(t, overlay) })
	}
}

func testMounter(t *testing.T, overlay bool) {
	need.Program(t, "fio")
	s := emptySite(t)
	for _, dir := range []string{"a", "b", "c"} {
		if err := os.MkdirAll(filepath.Join(s.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if dir != "a" && !overlay {
			continue
		}
		if out, err := exec.Command("truncate", "-s", "64M", filepath.Join(s.dir, dir, "data.img")).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	a := s.mount(t, "a", overlay, "--laddr", "localhost:1337")
	f := startFio(t, filepath.Join(s.dir, "a/mounts/data"), 8)
	time.Sleep(time.Second) // fio is in the midst of its work
	b := s.mount(t, "b", overlay, "--raddr", "localhost:1337", "--laddr", "localhost:1338")
	line := await(t, a, "Completed migration")
	t.Logf("first move: %s", line.Downtime)
	time.Sleep(time.Second) // and goes on with it at the target
	c := s.mount(t, "c", overlay, "--raddr", "localhost:1338", "--laddr", "localhost:1339")
	line = await(t, b, "Completed migration")
	t.Logf("second move: %s", line.Downtime)
	f.end(t)

	// What was written at the first path is what is read at the last one.
	same(t, filepath.Join(s.dir, "a/mounts/data"), filepath.Join(s.dir, "c/mounts/data"))
	end(t, a)
	end(t, b)
	end(t, c)
	for _, dir := range []string{"a", "b"} {
		if line := s.fails(t, s.mountArgs(dir, overlay)...); !strings.Contains(line, "has moved away") {
			t.Errorf("%s: %s", dir, line)
		}
	}
	c = s.mount(t, "c", overlay, "--laddr", "localhost:1339")
	// And back to where it was.
	a = s.mount(t, "a", overlay, "--raddr", "localhost:1339")
	await(t, c, "Completed migration")
	g := startFio(t, filepath.Join(s.dir, "a/mounts/data"), 2)
	g.end(t)
	end(t, a)
	end(t, c)
}

// A device that a VM shares and a mounter mounts moves while the VM stays, and the VM after it.
func TestSharedDevice(t *testing.T) {
	s := emptySite(t)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	moved1 := s.redisIn(t, "ark1", "127.0.0.1:4444")
	for _, dir := range []string{"a", "b"} {
		if err := os.MkdirAll(filepath.Join(s.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", filepath.Join(work, "out/package/oci.ext4"), filepath.Join(s.dir, "a/data.img")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	shared := func(dir string) []string {
		return []string{"--device", "name=oci,overlay=,state=,shared=true,base=" + filepath.Join(s.dir, dir, "mounts/data")}
	}
	a := s.mount(t, "a", false, "--laddr", "localhost:1337")
	vm := s.peer(t, "instance-0", append(shared("a"), "--netns", "ark0", "--laddr", "localhost:1340")...)
	l := startLoad(t.Context(), "127.0.0.1:3333", "127.0.0.1:4444")
	save := func(r interface {
		Save(context.Context) *redis.StatusCmd
	}) {
		t.Helper()
		if err := r.Save(t.Context()).Err(); err != nil {
			t.Error(err)
		}
	}
	save(c)
	b := s.mount(t, "b", false, "--raddr", "localhost:1337")
	t.Logf("the device moved: %s", await(t, a, "Completed migration").Downtime)
	save(c)
	next := s.peer(t, "instance-1", append(shared("b"), "--netns", "ark1", "--raddr", "localhost:1340")...)
	moved(t, vm)
	save(moved1)
	l.end(t, moved1)
	end(t, a)
	save(moved1)
	end(t, next)
	end(t, b)
	scratch := filepath.Join(s.dir, "b")
	if err := os.Rename(filepath.Join(scratch, "data.img"), filepath.Join(scratch, "data.ext4")); err != nil {
		t.Fatal(err)
	}
	cleanDisks(t, scratch)
}

// What a mounter is told that cannot work is refused before anything is touched; a mounter that is
// killed loses nothing that was synced.
func TestMounterRefused(t *testing.T) {
	s := emptySite(t)
	if err := os.WriteFile(filepath.Join(s.dir, "data.img"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{s.mountArgs(".", false, "--raddr", "localhost:1337", "--laddr", "localhost:1337"), "are both localhost:1337"},
		{s.mountArgs("nowhere", false), "no such file"},
		{s.mountArgs(".", false, "--raddr", "localhost:1"), "connection refused"},
		{s.mountArgs(".", false, "--devices", "[]"), "there are no devices"},
		{s.mountArgs(".", false, "--links", "data.img"), "not a directory"},
	} {
		if line := s.fails(t, c.args...); !strings.Contains(line, c.want) {
			t.Errorf("want %q: %s", c.want, line)
		}
	}
	a := s.mount(t, ".", false, "--laddr", "localhost:1337")
	if line := s.fails(t, s.mountArgs(".", false, "--raddr", "localhost:1337", "--links", "other")...); !strings.Contains(line, "exists, and the device would overwrite it") {
		t.Error(line)
	}
	if out, err := exec.Command("dd", "if=/dev/urandom", "of="+filepath.Join(s.dir, "mounts/data"), "bs=4k", "count=10", "conv=notrunc,fsync").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want, err := os.ReadFile(filepath.Join(s.dir, "mounts/data"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, a)
	a = s.mount(t, ".", false)
	if got, err := os.ReadFile(filepath.Join(s.dir, "mounts/data")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after a kill other bytes are there, or %v", err)
	}
	end(t, a)
	if _, err := os.Lstat(filepath.Join(s.dir, "mounts/data")); err == nil {
		t.Error("the link is still there")
	}
}
