package memory

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/block"
	"drafter/internal/need"
)

// The tests serve the memory of a real process: this program again, which gives its userfaultfd
// away as Firecracker does, and then uses the memory.
func TestMain(m *testing.M) {
	if env := os.Getenv("UFFD_TEST_CHILD"); env != "" {
		if err := child(env); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const page = 4096

// use is what the child does with its memory.
type use struct {
	Socket    string
	Pages     int
	Threads   int
	Seed      uint64
	Remove    bool     // gives pages back now and then
	RemoveAll bool     // gives all back at first, when it reads a byte
	Touch     []uint32 // reads just these, in order
	Measure   bool     // prints how long it waits for pages, and that is all
	Unmap     bool     // writes most pages, unmaps all, and says so
	Shared    bool     // maps a file, and gives a new userfaultfd away
	Private   bool     // the same, of a private mapping
}

// initial is what the device holds of a page at first: its first word and its last.
func initial(p int) uint64 {
	if p%7 == 3 {
		return 0
	}
	return uint64(p)*0x9e3779b97f4a7c15 | 1
}

// child runs until its stdin ends: it uses memory until it reads a byte, then checks all, and
// prints what each page's words are.
func child(env string) error {
	debug.SetGCPercent(-1) // a thread that waits for a page cannot be stopped
	var u use
	if err := json.Unmarshal([]byte(env), &u); err != nil {
		return err
	}
	memory, err := give(u)
	if err != nil {
		return err
	}
	if u.Measure {
		if err := json.NewEncoder(os.Stdout).Encode(measure(memory)); err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, os.Stdin)
		return nil
	}
	if u.Touch != nil {
		for _, p := range u.Touch {
			if got := word(memory, int(p), 0); got != initial(int(p)) {
				return fmt.Errorf("page %d is %x", p, got)
			}
		}
	}
	expected := make([]uint64, u.Pages)
	for p := range expected {
		expected[p] = initial(p)
	}
	if u.RemoveAll {
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
			return err
		}
		if err := unix.Madvise(memory, unix.MADV_DONTNEED); err != nil {
			return err
		}
		clear(expected)
		u.Threads = 0 // nobody else uses it
	}
	if u.Unmap {
		for p := range expected {
			if p > len(expected)/2 && p%2 == 0 {
				continue // so that some page tables have protected pages, and others none
			}
			expected[p] = uint64(p) | 1<<62
			for _, i := range []int{0, 511} {
				atomic.StoreUint64((*uint64)(unsafe.Pointer(&memory[p*page+i*8])), expected[p])
			}
		}
		if err := unix.Madvise(memory, unix.MADV_DONTNEED); err != nil {
			return err
		}
		fmt.Println("unmapped")
		u.Threads = 0
	}
	var stop atomic.Bool
	errs := make(chan error, u.Threads)
	for t := range u.Threads {
		go func() {
			err := work(u, t, memory, expected, &stop)
			if err != nil { // nobody asks before the test has had its faults
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			errs <- nil
		}()
	}
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return err
	}
	stop.Store(true)
	for range u.Threads {
		if err := <-errs; err != nil {
			return err
		}
	}
	for p := range expected {
		if err := compare(memory, p, expected[p]); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(expected); err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// give makes memory, registers it and sends its userfaultfd.
func give(u use) ([]byte, error) {
	file, how := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	switch {
	case u.Shared:
		file, how = 3, unix.MAP_SHARED
	case u.Private:
		file, how = 3, unix.MAP_PRIVATE
	}
	memory, err := unix.Mmap(file, 0, u.Pages*page, unix.PROT_READ|unix.PROT_WRITE, how)
	if err != nil {
		return nil, err
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	const eventRemoveFeature = 1 << 3
	base := uint64(uintptr(unsafe.Pointer(&memory[0])))
	if !u.Shared && !u.Private {
		if err := descriptor(fd).api(eventRemoveFeature); err != nil {
			return nil, err
		}
		if err := descriptor(fd).register(base, uint64(len(memory)), registerMissing); err != nil {
			return nil, err
		}
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: u.Socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	half := uint64(u.Pages/2) * page // two regions, as of a VM of more than 3 GiB
	b, err := json.Marshal([]region{{base, half, 0, page, page}, {base + half, uint64(len(memory)) - half, half, page, page}})
	if err != nil {
		return nil, err
	}
	if _, _, err = conn.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil); err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, conn) // until it is served
	return memory, err
}

func word(memory []byte, p, i int) uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(&memory[p*page+i*8])))
}

func compare(memory []byte, p int, want uint64) error {
	if a, b := word(memory, p, 0), word(memory, p, 511); a != want || b != want {
		return fmt.Errorf("page %d is %x … %x instead of %x", p, a, b, want)
	}
	return nil
}

// work uses every Threads-th page.
func work(u use, thread int, memory []byte, expected []uint64, stop *atomic.Bool) error {
	rng := rand.New(rand.NewPCG(u.Seed, uint64(thread)))
	for version := uint64(1); !stop.Load(); version++ {
		p := rng.IntN(u.Pages/u.Threads)*u.Threads + thread
		if err := compare(memory, p, expected[p]); err != nil {
			return err
		}
		switch rng.IntN(16) {
		case 0:
			if u.Remove {
				if err := unix.Madvise(memory[p*page:(p+1)*page], unix.MADV_DONTNEED); err != nil {
					return err
				}
				expected[p] = 0
			}
		case 1, 2:
		default:
			v := version<<8 | uint64(thread) | 1<<63
			expected[p] = v
			atomic.StoreUint64((*uint64)(unsafe.Pointer(&memory[p*page])), v)
			atomic.StoreUint64((*uint64)(unsafe.Pointer(&memory[p*page+511*8])), v)
		}
	}
	return nil
}

// device is memory to serve.
type device struct {
	mu    sync.RWMutex
	data  []byte
	delay time.Duration // of each read, which is of another host then
	hold  chan struct{} // if not nil, what has been read is returned when it is closed
	lost  atomic.Bool
	reads atomic.Int64
}

func newDevice(pages int) *device {
	d := &device{data: make([]byte, pages*page)}
	for p := range pages {
		binary.NativeEndian.PutUint64(d.data[p*page:], initial(p))
		binary.NativeEndian.PutUint64(d.data[p*page+511*8:], initial(p))
	}
	return d
}

func (d *device) Size() int64 { return int64(len(d.data)) }
func (d *device) Sync() error { return nil }

func (d *device) Close() error { return nil }

func (d *device) Local(int64, int64) bool { return d.delay == 0 && !d.lost.Load() }

func (d *device) ReadAt(b []byte, off int64) (int, error) {
	d.reads.Add(1)
	if d.lost.Load() {
		return 0, errors.New("the source is gone")
	}
	if d.delay > 0 {
		time.Sleep(rand.N(2 * d.delay))
	}
	d.mu.RLock()
	n := copy(b, d.data[off:])
	d.mu.RUnlock()
	if d.hold != nil {
		<-d.hold
	}
	return n, nil
}

// ReadNow is not always able to.
func (d *device) ReadNow(b []byte, off int64) bool {
	if !d.Local(off, int64(len(b))) || rand.IntN(8) == 0 {
		return false
	}
	_, err := d.ReadAt(b, off)
	return err == nil
}

func (d *device) WriteAt(b []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:], b), nil
}

// process is a child whose memory is served.
type process struct {
	memory  *Device
	tracker *block.Tracker
	copied  []byte // of the memory: what was written was copied after it became known
	t       testing.TB
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	stdout  *bufio.Reader
	stderr  strings.Builder
	handler *Handler
}

func start(t testing.TB, u use, d block.Device, track Tracking) *process {
	t.Helper()
	if fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0); errno != 0 {
		need.Lacks(t, "userfaultfd", fmt.Sprintf("a process cannot give its own away here: %v; run the tests as root, or set vm.unprivileged_userfaultfd to 1", errno))
	} else if err := unix.Close(int(fd)); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "uffd-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	u.Socket = filepath.Join(dir, "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: u.Socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if u.Threads == 0 {
		u.Threads = 2
	}
	env, err := json.Marshal(u)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command("/proc/self/exe"), memory: New(d)}
	p.tracker = block.NewTracker(p.memory, 64<<10)
	p.memory.Under(p.tracker)
	if u.Private {
		base := d.(*block.File)
		p.memory.Over(base, nil)
		file, err := base.Reopen()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		p.cmd.ExtraFiles = []*os.File{file}
	}
	if u.Shared {
		if err := p.memory.Share(); err != nil {
			t.Fatal(err)
		}
		file, err := p.memory.File()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		p.cmd.ExtraFiles = []*os.File{file}
	}
	p.cmd.Env = append(os.Environ(), "UFFD_TEST_CHILD="+string(env))
	p.cmd.Stderr = &p.stderr
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdout = bufio.NewReader(stdout)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Kill() }) // of a test that has failed
	if err := l.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		_ = p.cmd.Process.Kill() // so that all that it says is there
		_ = p.cmd.Wait()
		t.Fatalf("the process does not give its userfaultfd away: %v %s", err, p.stderr.String())
	}
	defer conn.Close()
	config := Config{Device: p.memory, Track: track, Private: u.Private}
	if u.Shared || u.Private {
		var fd descriptor
		var regions []region
		if fd, regions, err = receive(conn); err == nil {
			m := Mapping{Start: regions[0].Base, Size: uint64(u.Pages) * page, PageSize: page}
			p.handler, err = ServeMapping(os.NewFile(uintptr(fd), "userfaultfd"), p.cmd.Process.Pid, m, config)
		}
	} else {
		p.handler, err = Serve(conn, p.cmd.Process.Pid, config)
	}
	if errors.Is(err, ErrTracking) {
		need.Lacks(t, "userfaultfd", err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	if track != TrackNone && p.handler.Tracking() == TrackNone {
		need.Lacks(t, "userfaultfd", "this kernel does not write-protect memory by it")
	}
	p.handler.Enter()
	return p
}

// copy copies the pages that were written, as a migration does: first they are taken, and then read.
func (p *process) copy() {
	p.t.Helper()
	if err := p.handler.Collect(p.t.Context()); err != nil {
		p.t.Fatal(err, p.handler.Err(), p.stderr.String())
	}
	for i := range p.tracker.Take().All() {
		if _, err := p.memory.ReadAt(p.copied[i*page:(i+1)*page], i*page); err != nil {
			p.t.Fatal(err)
		}
	}
}

// finish lets the child check all of its memory, and returns what it is.
func (p *process) finish() []uint64 {
	p.t.Helper()
	if _, err := p.stdin.Write([]byte{1}); err != nil {
		p.t.Fatal(err, p.stderr.String(), p.handler.Err())
	}
	line, err := p.stdout.ReadBytes('\n')
	if err != nil {
		p.t.Fatal(err, p.stderr.String(), p.handler.Err())
	}
	var expected []uint64
	if err := json.Unmarshal(line, &expected); err != nil {
		p.t.Fatal(err)
	}
	return expected
}

func (p *process) close() {
	p.t.Helper()
	if err := p.stdin.Close(); err != nil {
		p.t.Error(err)
	}
	if err := p.cmd.Wait(); err != nil {
		p.t.Error(err, p.stderr.String())
	}
	if err := p.handler.Close(); err != nil {
		p.t.Error(err)
	}
	if err := p.handler.Err(); err != nil {
		p.t.Error(err)
	}
	if err := p.handler.Collect(context.Background()); err == nil {
		p.t.Error("a closed handler collects")
	}
}

// run collects while the child uses its memory, until so many faults were served, and compares what
// was collected in the end.
func (p *process) run(d block.Device, faults int64, pause time.Duration) {
	p.t.Helper()
	p.copied = content(p.t, d)
	deadline, written := time.Now().Add(10*time.Minute), int64(0)
	for round := 0; ; round++ {
		missing, writes := p.handler.Faults()
		if p.handler.Tracking() == TrackScan {
			writes = written
		}
		if missing+writes >= faults {
			p.t.Logf("%d faults on missing pages, %d first writes, %d rounds", missing, writes, round)
			break
		}
		if p.handler.Err() != nil || time.Now().After(deadline) {
			p.t.Fatal(missing, writes, p.handler.Err(), p.stderr.String())
		}
		p.copy()
		if round%4 == 3 { // what is stored meanwhile is not forgotten
			n, err := p.memory.Store(p.t.Context())
			if err != nil {
				p.t.Fatal(err)
			}
			written += n / page
		}
		time.Sleep(pause)
	}
	expected := p.finish()
	p.copy()
	if err := p.memory.Sync(); err != nil {
		p.t.Fatal(err)
	}
	for name, data := range map[string][]byte{"copied": p.copied, "stored": content(p.t, d)} {
		for i, want := range expected {
			b := data[i*page:]
			if a, z := binary.NativeEndian.Uint64(b), binary.NativeEndian.Uint64(b[511*8:]); a != want || z != want {
				p.t.Fatalf("page %d was %s as %x … %x instead of %x", i, name, a, z, want)
			}
		}
	}
	p.close()
}

// content reads a device.
func content(t testing.TB, d block.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// faults is how many a test serves.
func faults() int64 { return int64(need.Rounds(50_000, 1_000_000)) }

func TestFaults(t *testing.T) {
	const pages = 4096
	d := newDevice(pages)
	start(t, use{Pages: pages, Threads: 3, Seed: uint64(time.Now().UnixNano())}, d, TrackFaults).run(d, faults(), 0)
}

// Written pages of shared memory are known, whichever way.
func TestShared(t *testing.T) {
	const pages = 4096
	for _, track := range []Tracking{TrackScan, TrackFaults} {
		t.Run(string(track), func(t *testing.T) {
			d := newDevice(pages)
			start(t, use{Pages: pages, Threads: 3, Seed: uint64(time.Now().UnixNano()), Shared: true}, d, track).run(d, faults(), 0)
		})
	}
}

// What a process writes to a private mapping is known, copied and stored in the file that it maps,
// while it goes on.
func TestPrivate(t *testing.T) {
	const pages = 4096
	path := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, newDevice(pages).data, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := block.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	start(t, use{Pages: pages, Threads: 3, Seed: uint64(time.Now().UnixNano()), Private: true}, d, TrackScan).run(d, faults(), 0)
}

// Pages that were written count as written once they are unmapped, as when the kernel reclaims them.
func TestUnmapped(t *testing.T) {
	const pages = 4096
	for _, track := range []Tracking{TrackScan, TrackFaults} {
		t.Run(string(track), func(t *testing.T) {
			d := newDevice(pages)
			p := start(t, use{Pages: pages, Unmap: true, Shared: true}, d, track)
			p.copied = bytes.Clone(d.data)
			if line, err := p.stdout.ReadString('\n'); line != "unmapped\n" {
				t.Fatal(line, err, p.stderr.String())
			}
			p.copy()
			for i, want := range p.finish() { // which maps them
				if got := binary.NativeEndian.Uint64(p.copied[i*page:]); got != want {
					t.Fatalf("page %d was copied as %x instead of %x", i, got, want)
				}
			}
			p.close()
		})
	}
}

// While the file may be another process' nothing is filled. What the process needs is.
func TestRetain(t *testing.T) {
	const pages = 4096
	d := newDevice(pages)
	p := start(t, use{Pages: pages, Seed: 1, Shared: true}, d, TrackFaults)
	p.handler.device.Retain()
	p.handler.Fill(nil, true)
	time.Sleep(50 * time.Millisecond)
	if n := p.handler.present.Count(); n > pages/2 {
		t.Errorf("%d of %d pages are filled", n, pages)
	}
	p.handler.device.hold(false)
	await.None(t, "all pages are filled", func() string {
		if n := p.handler.present.Count(); n < pages {
			return fmt.Sprintf("%d of %d are", n, pages)
		}
		return ""
	})
	p.run(d, faults()/20, time.Millisecond)
}

func TestFill(t *testing.T) {
	const pages = 4096
	d := newDevice(pages)
	p := start(t, use{Pages: pages, Seed: 1}, d, TrackFaults)
	p.handler.Fill(nil, true)
	await.None(t, "all pages are filled", func() string {
		if n := p.handler.present.Count(); n < pages {
			return fmt.Sprintf("%d of %d are", n, pages)
		}
		return ""
	})
	p.run(d, faults()/20, time.Millisecond)
}

// Pages that are given back read as zeros, and are collected as such.
func TestRemove(t *testing.T) {
	const pages = 1024
	for round := range 4 {
		d := newDevice(pages)
		p := start(t, use{Pages: pages, Threads: 3, Seed: uint64(round), Remove: true}, d, TrackFaults)
		p.handler.Fill(nil, round%2 == 1)
		p.run(d, faults()/20, time.Millisecond)
	}
}

// A page that is removed while it is read stays removed, even if that has been collected before the
// read ends.
func TestRemoveWhileRead(t *testing.T) {
	const pages = 256
	d := newDevice(pages)
	d.hold = make(chan struct{})
	p := start(t, use{Pages: pages, RemoveAll: true}, d, TrackFaults)
	p.handler.Fill(nil, true)
	await.True(t, "something is read", func() bool { return d.reads.Load() > 0 })
	if _, err := p.stdin.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	await.True(t, "the handler learns of the removal", func() bool { return p.handler.removed.Count() == pages })
	if err := p.handler.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(d.hold)
	for i, want := range p.finish() {
		if want != 0 {
			t.Fatalf("page %d is %x", i, want)
		}
	}
	p.close()
}

// Pages that come from elsewhere, in their own time, hold up who needs them and nobody else.
func TestSlowMemory(t *testing.T) {
	const pages = 512
	d := newDevice(pages)
	d.delay = 2 * time.Millisecond
	p := start(t, use{Pages: pages, Threads: 4, Seed: 5}, d, TrackFaults)
	p.handler.Fill(nil, true)
	p.run(d, 5_000, time.Millisecond)
}

// When memory is lost the handler says so. Nothing can be done for the process but to end it.
func TestLostSource(t *testing.T) {
	const pages = 512
	d := newDevice(pages)
	p := start(t, use{Pages: pages, Seed: 6}, d, TrackFaults)
	d.lost.Store(true)
	select {
	case <-p.handler.Failed():
	case <-time.After(time.Minute):
		t.Fatal("the handler does not say that memory is lost")
	}
	if err := p.handler.Err(); err == nil || !strings.Contains(err.Error(), "the source is gone") {
		t.Error(err)
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.cmd.Wait() // killed
	if err := p.handler.Close(); err != nil {
		t.Error(err)
	}
}

// What a process touches first is known, and brought before it asks the next time.
func TestTouched(t *testing.T) {
	const pages = 4096
	touch := []uint32{1000, 20, 3000, 4000}
	d := newDevice(pages)
	p := start(t, use{Pages: pages, Touch: touch}, d, TrackNone)
	await.True(t, "what is near a page is brought along", func() bool { return p.handler.present.Has(21) && p.handler.present.Has(4005) })
	p.finish()
	if got := p.handler.Touched(); len(got) < 4 || !slices.Equal(got[:4], touch) {
		t.Errorf("touched %v first, want %v", got[:min(4, len(got))], touch)
	}
	p.close()
	d = newDevice(pages)
	p = start(t, use{Pages: pages, Touch: []uint32{}}, d, TrackNone)
	p.handler.Fill(touch, false)
	await.True(t, "what was touched first is fetched", func() bool { return d.reads.Load() >= 4 })
	p.finish()
	p.close()
}

func TestHandshake(t *testing.T) {
	for name, tt := range map[string]struct {
		message string
		fds     int
		want    string
	}{
		"no descriptor":    {`[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]`, 0, "0 descriptors"},
		"two descriptors":  {`[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]`, 2, "2 descriptors"},
		"no JSON":          {`hello`, 1, "malformed"},
		"no region":        {`[]`, 1, "no regions"},
		"odd page size":    {`[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":1234}]`, 1, "pages of 1234 bytes"},
		"odd size":         {`[{"base_host_virt_addr":4096,"size":4097,"offset":0,"page_size":4096}]`, 1, "region of 4097 bytes"},
		"overlap":          {`[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096},{"base_host_virt_addr":8192,"size":4096,"offset":8192,"page_size":4096}]`, 1, "overlap"},
		"wraps":            {`[{"base_host_virt_addr":18446744073709547520,"size":8192,"offset":0,"page_size":4096}]`, 1, "region of 8192 bytes"},
		"more than device": {`[{"base_host_virt_addr":4096,"size":1048576,"offset":0,"page_size":4096}]`, 1, "the memory device"},
	} {
		t.Run(name, func(t *testing.T) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			ours := os.NewFile(uintptr(pair[0]), "ours")
			conn, err := net.FileConn(ours)
			if err != nil {
				t.Fatal(err)
			}
			ours.Close()
			defer conn.Close()
			var fds []int
			for range tt.fds {
				fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
				if err != nil {
					t.Fatal(err)
				}
				fds = append(fds, fd)
			}
			if err := unix.Sendmsg(pair[1], []byte(tt.message), unix.UnixRights(fds...), nil, 0); err != nil {
				t.Fatal(err)
			}
			for _, fd := range append(fds, pair[1]) {
				if err := unix.Close(fd); err != nil {
					t.Fatal(err)
				}
			}
			_, err = Serve(conn.(*net.UnixConn), os.Getpid(), Config{Device: New(newDevice(16))})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v; want one with %q", err, tt.want)
			}
		})
	}
}

var (
	_ block.Localizer = (*device)(nil)
	_ block.NowReader = (*device)(nil)
)
