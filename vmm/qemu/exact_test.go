package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"drafter/internal/await"
	"drafter/internal/block"
	"drafter/internal/inject"
	"drafter/internal/memory"
	"drafter/internal/need"
	"drafter/internal/testguest"
	"drafter/vmm"
)

// The guest of these tests writes at random, as fast as emulation allows.
const (
	exactSize     = 40 << 20
	exactResident = 20 // MiB that it uses
	exactWords    = 4  // of a page that it writes
	exactRate     = 40_000
	exactRunning  = 6 * time.Millisecond // at most, between two looks
	pageSize      = block.PageSize
)

// exactWay is a way to have memory and to know what was written of it.
type exactWay struct {
	name     string
	backing  memory.Backing
	tracking memory.Tracking
	late     bool // half of the pages arrive while the guest runs
	huge     bool
}

// What memory says of itself is true of each page, whatever the guest, QEMU and the kernel do to
// them. The memory device has what the guest has, and what has changed is among what was told.
func TestExactMemory(t *testing.T) {
	kernel := exactKernel(t)
	swapped := int64(0)
	for _, way := range []exactWay{
		{name: "private", backing: memory.BackingPrivate, tracking: memory.TrackScan},
		{name: "scan", backing: memory.BackingShared, tracking: memory.TrackScan},
		{name: "faults", backing: memory.BackingShared, tracking: memory.TrackFaults},
		{name: "scan, post-copy", backing: memory.BackingShared, tracking: memory.TrackScan, late: true},
		{name: "faults, post-copy", backing: memory.BackingShared, tracking: memory.TrackFaults, late: true},
		{name: "scan, huge pages", tracking: memory.TrackScan, huge: true},
		{name: "faults, huge pages", tracking: memory.TrackFaults, huge: true},
	} {
		t.Run(way.name, func(t *testing.T) {
			if way.huge {
				setHugePages(t, exactSize)
			}
			booted := bootExact(t, kernel, way)
			booted.rounds(need.Rounds(6, 100))
			booted.end()
			resumed := booted.resumed(kernel, way)
			resumed.rounds(need.Rounds(16, 400))
			if way.late {
				<-resumed.incoming.Complete()
				resumed.rounds(need.Rounds(8, 100))
			}
			resumed.end()
			swapped = max(swapped, booted.swapped, resumed.swapped)
		})
	}
	t.Run("swapped out", func(t *testing.T) {
		if b, err := os.ReadFile("/proc/swaps"); err != nil || bytes.Count(b, []byte("\n")) < 2 {
			need.Lacks(t, "swap", "this host has no swap, so what was reclaimed was unmapped only; add a swap file")
		}
		if swapped == 0 {
			t.Error("no page was swapped out")
		}
	})
}

// exactKernel is a kernel whose guest writes at random.
func exactKernel(t *testing.T) string {
	t.Helper()
	need.Root(t)
	need.Program(t, "qemu-system-x86_64")
	need.Program(t, "gcc")
	if _, err := os.Stat("/dev/userfaultfd"); err != nil {
		need.Lacks(t, "userfaultfd", err)
	}
	kernel := filepath.Join(t.TempDir(), "guest")
	if err := testguest.BuildForQEMU(kernel); err != nil {
		t.Fatal(err)
	}
	return kernel
}

// setHugePages sets as many bytes of huge pages aside as a test needs, and gives them back.
func setHugePages(t *testing.T, size int64) {
	t.Helper()
	const path, free = "/proc/sys/vm/nr_hugepages", "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
	read := func(path string) int64 {
		b, err := os.ReadFile(path)
		if err != nil {
			need.Lacks(t, "huge-pages", err)
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := read(path)
	if err := os.WriteFile(path, []byte(strconv.FormatInt(before+size>>21, 10)), 0o644); err != nil {
		need.Lacks(t, "huge-pages", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, []byte(strconv.FormatInt(before, 10)), 0o644); err != nil {
			t.Error(err)
		}
	})
	if n := read(free); n<<21 < size {
		need.Lacks(t, "huge-pages", fmt.Sprintf("the host gives %d instead of %d", n, size>>21))
	}
}

// exactGeneration is of all of them. QEMU writes it to memory when it loads a state.
var exactGeneration = uuid.MustParse("6f2b1c52-3e55-4a4b-9c5e-2f0a7d3c1b10")

// exact is a VM with what is known of its memory.
type exact struct {
	t        *testing.T
	way      exactWay
	m        *Machine
	launch   vmm.Launch
	file     *block.File // that memory is stored in
	memory   *memory.Device
	adopts   *os.File        // another VM's memory, if that changes hands
	incoming *block.Incoming // nil if nothing is still to come
	tracker  *block.Tracker
	mapping  memory.Mapping
	console  lockedBuffer

	image  []byte // what a page has that the guest has not got yet
	last   []byte // what memory was when it was looked at last
	copied []byte // what memory is, by what the tracker has told since the beginning
	told   *block.Bitmap
	state  bytes.Buffer

	reclaimed, swapped int64 // bytes
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) bytes() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.b.Bytes())
}

// start launches the VM.
func (e *exact) start(file *block.File, kernel string, boot *vmm.Boot, hw *vmm.Hardware) {
	t := e.t
	t.Helper()
	dir, err := vmm.CreateDir(t.TempDir(), vmm.VMMQEMU, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dir.Close(); err != nil {
			t.Error(err)
		}
	})
	if e.way.backing == memory.BackingPrivate && file.InMemory() {
		need.Lacks(t, "private-mapping", errors.New("temporary files are on a tmpfs"))
	}
	e.file, e.memory = file, memory.New(file)
	t.Cleanup(func() {
		if err := e.memory.Close(); err != nil {
			t.Error(err)
		}
	})
	var top block.Device = e.memory
	if e.way.late && boot == nil {
		e.incoming = block.NewIncoming(e.memory, true)
		top = e.incoming
	} else {
		e.memory.Over(file, nil)
	}
	if e.adopts != nil {
		if err := e.memory.Adopt(e.adopts); err != nil {
			t.Fatal(err)
		}
	}
	e.tracker = block.NewTracker(top, block.ContentBlockSize)
	e.memory.Under(e.tracker)
	backing := e.way.backing
	if boot != nil {
		e.memory.Blank()
		backing = memory.BackingShared
	}
	e.launch = vmm.Launch{
		Dir: dir, Board: vmm.Board{Accel: vmm.AccelTCG, CPUs: 1, MemorySize: exactSize, HugePages: e.way.huge, Recorded: hw, Generation: exactGeneration},
		Devices: vmm.Devices{Memory: e.memory, Kernel: kernel, Tracking: string(e.way.tracking), Backing: string(backing)}, Output: &e.console, Boot: boot,
	}
	m, err := Driver{}.Launch(t.Context(), e.launch)
	if errors.Is(err, memory.ErrTracking) {
		need.Lacks(t, "userfaultfd", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	e.m = m.(*Machine)
	t.Cleanup(func() { _ = e.m.Close() }) // of a test that has failed
	if e.m.memory.Tracking() != e.way.tracking || e.m.private != (backing == memory.BackingPrivate) {
		t.Fatalf("it is %s, private: %t", e.m.memory.Tracking(), e.m.private)
	}
	e.told = block.NewBitmap(exactSize / pageSize)
}

// bootExact starts the guest.
func bootExact(t *testing.T, kernel string, way exactWay) *exact {
	t.Helper()
	file, err := block.CreateFile(filepath.Join(t.TempDir(), "memory"), exactSize)
	if err != nil {
		t.Fatal(err)
	}
	arguments, err := testguest.Options{ResidentMiB: exactResident, Rate: exactRate, Words: exactWords}.Arguments()
	if err != nil {
		t.Fatal(err)
	}
	e := &exact{t: t, way: way}
	e.start(file, kernel, &vmm.Boot{Kernel: kernel, Args: arguments}, nil)
	await.None(t, "the guest starts", func() string {
		if out := e.console.bytes(); !bytes.Contains(out, []byte(testguest.Ready)) {
			return fmt.Sprintf("it said %q", out)
		}
		return ""
	})
	e.pause()
	if err := e.m.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.tracker.Take()
	e.last = e.truth()
	e.copied = bytes.Clone(e.last)
	return e
}

// resumed starts the guest again from what was saved.
func (e *exact) resumed(kernel string, way exactWay) *exact {
	t := e.t
	t.Helper()
	r := e.waiting(kernel, way)
	switch err := r.m.Receive(t.Context()); {
	case err == nil && !way.late: // all of memory is here
		if err := r.m.Load(t.Context(), e.state.Next(rand.IntN(e.state.Len()))); err != nil {
			t.Fatal(err)
		}
	case err != nil && (!errors.Is(err, errors.ErrUnsupported) || way.backing == memory.BackingShared):
		t.Fatal(err)
	}
	if err := r.m.Restore(t.Context(), &e.state); err != nil {
		t.Fatal(err)
	}
	return r
}

// waiting starts a VM that waits for what was saved.
func (e *exact) waiting(kernel string, way exactWay) *exact {
	t := e.t
	t.Helper()
	path := filepath.Join(t.TempDir(), "resumed")
	file, err := block.CreateFile(path, exactSize)
	if err != nil {
		t.Fatal(err)
	}
	if !way.late {
		_, err := file.WriteAt(e.last, 0)
		if err = errors.Join(err, file.Sync()); err != nil { // the kernel does not reclaim dirty pages
			t.Fatal(err)
		}
	}
	hw := e.m.Hardware()
	r := &exact{t: t, way: way, image: e.last, last: bytes.Clone(e.last), copied: bytes.Clone(e.last)}
	r.start(file, kernel, nil, &hw)
	if way.late {
		r.arrive()
	}
	return r
}

// arrive brings memory from elsewhere. Half of it comes once the guest runs.
func (e *exact) arrive() {
	t := e.t
	t.Helper()
	if _, err := e.incoming.Arrive(e.image, 0); err != nil {
		t.Fatal(err)
	}
	missing := block.NewBitmap(exactSize / pageSize)
	for first := int64(0); first < missing.Len(); {
		end := min(first+1+rand.Int64N(64), missing.Len())
		if rand.IntN(2) == 0 {
			missing.SetRange(first, end)
			if err := e.memory.Evict(first, end); err != nil {
				t.Fatal(err)
			}
		}
		first = end
	}
	var order []int64
	for page := range missing.All() {
		order = append(order, page)
	}
	rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	wanted := make(chan int64, len(order)+1024)
	e.incoming.Open(missing, func(first, end int64) {
		for page := first; page < end; page++ {
			select {
			case wanted <- page:
			default: // it comes in its turn
			}
		}
	}, nil)
	bring := func(page int64) {
		if _, err := e.incoming.Arrive(e.image[page*pageSize:(page+1)*pageSize], page*pageSize); err != nil {
			t.Error(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var sender sync.WaitGroup
	sender.Go(func() {
		for i, page := range order {
			for waits := true; waits; {
				select {
				case p := <-wanted:
					bring(p)
				default:
					waits = false
				}
			}
			bring(page)
			if i%8 == 0 && ctx.Err() == nil {
				time.Sleep(200 * time.Microsecond)
			}
		}
	})
	t.Cleanup(func() { cancel(); e.incoming.Abandon(); sender.Wait() })
}

func (e *exact) pause() {
	e.t.Helper()
	if err := e.m.Pause(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
}

// look flushes, takes what was written, and copies it, in this order. It returns how many pages that
// were.
func (e *exact) look() int64 {
	e.t.Helper()
	if err := e.m.Flush(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
	pages := e.tracker.Take()
	e.told.Add(pages)
	for first := pages.Next(0); first < pages.Len(); {
		_, end := pages.Run(first, pages.Len())
		if _, err := e.tracker.ReadAt(e.copied[first*pageSize:end*pageSize], first*pageSize); err != nil {
			e.t.Fatal(err)
		}
		first = pages.Next(end)
	}
	return pages.Count()
}

// truth reads memory where the guest has it, without the memory device.
func (e *exact) truth() []byte {
	e.t.Helper()
	now := make([]byte, exactSize)
	if e.m.private || e.way.huge {
		for done := 0; done < len(now); {
			local := []unix.Iovec{{Base: &now[done], Len: uint64(len(now) - done)}}
			n, err := unix.ProcessVMReadv(e.m.process.PID(), local, []unix.RemoteIovec{{Base: uintptr(e.mapped().Start) + uintptr(done), Len: len(now) - done}}, 0)
			if err != nil || n == 0 {
				e.t.Fatal(n, err)
			}
			done += n
		}
		return now
	}
	copy(now, e.image)
	f, err := e.memory.File()
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close() // nothing was written
	for off := int64(0); off < exactSize; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		end, eerr := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err := errors.Join(err, eerr); err != nil {
			e.t.Fatal(err)
		}
		off = end
		if end = min(end, exactSize); start >= end { // a page behind memory says whose it is
			break
		}
		if _, err := f.ReadAt(now[start:end], start); err != nil {
			e.t.Fatal(err)
		}
	}
	return now
}

// mapped is where QEMU has the memory.
func (e *exact) mapped() memory.Mapping {
	e.t.Helper()
	if e.mapping.Start != 0 {
		return e.mapping
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", e.m.process.PID()))
	if err != nil {
		e.t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var start, end uint64
		if n, _ := fmt.Sscanf(line, "%x-%x", &start, &end); n != 2 || end-start != exactSize || !strings.Contains(line, "rw-") {
			continue
		}
		if e.way.huge || e.m.private == strings.Contains(line, "rw-p") {
			e.mapping = memory.Mapping{Start: start, Size: exactSize, PageSize: pageSize}
			return e.mapping
		}
	}
	e.t.Fatalf("memory is not in\n%s", maps)
	return e.mapping
}

// compare checks each page of the paused guest.
func (e *exact) compare(when string) {
	t := e.t
	t.Helper()
	pages := int64(exactSize / pageSize)
	missing := block.NewBitmap(pages)
	if e.incoming != nil {
		missing = e.incoming.MissingPages()
	}
	now, device := e.truth(), make([]byte, exactSize)
	for first := int64(0); first < pages; {
		has, end := missing.Run(first, pages)
		if !has {
			if _, err := e.tracker.ReadAt(device[first*pageSize:end*pageSize], first*pageSize); err != nil {
				t.Fatal(err)
			}
		}
		first = end
	}
	untold, wrong, stale := 0, 0, 0
	for p := range pages {
		if missing.Has(p) {
			continue
		}
		at := func(b []byte) []byte { return b[p*pageSize : (p+1)*pageSize] }
		if !bytes.Equal(at(now), at(e.last)) && !e.told.Has(p) {
			untold++
		}
		if !bytes.Equal(at(now), at(device)) {
			wrong++
		}
		if !bytes.Equal(at(now), at(e.copied)) {
			stale++
		}
	}
	if untold > 0 || wrong > 0 || stale > 0 {
		t.Fatalf("%s: %d pages have changed and nobody told, %d are others in the memory device, %d in the copy", when, untold, wrong, stale)
	}
	e.last, e.told = now, block.NewBitmap(pages)
}

// rounds lets the guest run, again and again, and compares each time. What is stored meanwhile, and
// what the kernel takes out of page tables, is not to be seen.
func (e *exact) rounds(n int) {
	t := e.t
	t.Helper()
	var told int64
	for round := range n {
		if err := e.m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		var storing sync.WaitGroup
		storing.Go(func() {
			for again := true; again; {
				if _, err := e.memory.Store(t.Context()); err != nil {
					t.Error(err)
				}
				select {
				case <-done:
					again = false
				case <-time.After(rand.N(time.Millisecond)):
				}
			}
		})
		for range 4 {
			time.Sleep(rand.N(exactRunning))
			if round%4 == 0 {
				e.reclaim()
			}
			told += e.look()
		}
		e.pause()
		switch round % 4 {
		case 1:
			e.reclaim()
		case 2:
			e.unmap()
		}
		told += e.look()
		close(done)
		storing.Wait()
		e.compare(fmt.Sprintf("round %d of %d", round, n))
		if again := e.look(); again > 0 {
			t.Errorf("%d pages were written while the VM was paused", again)
		}
	}
	t.Logf("told of %d pages in %d rounds; %d MiB were reclaimed", told, n, e.reclaimed>>20)
	if e.reclaimed == 0 && !e.way.huge {
		t.Error("no page was reclaimed")
	}
}

// reclaim lets the kernel take pages away from QEMU as if it had none left.
func (e *exact) reclaim() {
	e.t.Helper()
	if e.way.huge {
		return // which cannot be swapped out
	}
	before, _ := e.resident()
	process, err := unix.PidfdOpen(e.m.process.PID(), 0)
	if err != nil {
		e.t.Fatal(err)
	}
	defer unix.Close(process)
	iov := unix.RemoteIovec{Base: uintptr(e.mapped().Start), Len: exactSize}
	if _, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(process), uintptr(unsafe.Pointer(&iov)), 1, unix.MADV_PAGEOUT, 0, 0); errno != 0 {
		e.t.Fatal("reclaim memory:", errno)
	}
	after, swapped := e.resident()
	e.reclaimed += max(0, before-after)
	e.swapped = max(e.swapped, swapped)
}

// unmap drops the page tables of shared memory, as QEMU may do.
func (e *exact) unmap() {
	e.t.Helper()
	if e.m.private || e.way.huge {
		return // there it would drop pages
	}
	err := inject.Into(e.m.process.PID(), func(p *inject.Tracee) error {
		_, err := p.Call(unix.SYS_MADVISE, uintptr(e.mapped().Start), exactSize, unix.MADV_DONTNEED)
		return err
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

// resident tells how many bytes of the memory QEMU has at hand, and how many are swapped out.
func (e *exact) resident() (resident, swapped int64) {
	e.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", e.m.process.PID()))
	if err != nil {
		e.t.Fatal(err)
	}
	_, own, found := strings.Cut(string(b), fmt.Sprintf("%x-", e.mapped().Start))
	if !found {
		e.t.Fatal("QEMU has no memory")
	}
	for line := range strings.Lines(own) {
		var kib int64
		switch {
		case strings.HasPrefix(line, "VmFlags:"):
			return resident, swapped
		case strings.HasPrefix(line, "Rss:"):
			_, err = fmt.Sscanf(line, "Rss: %d kB", &kib)
			resident = kib << 10
		case strings.HasPrefix(line, "Swap:"):
			_, err = fmt.Sscanf(line, "Swap: %d kB", &kib)
			swapped = kib << 10
		}
		if err != nil {
			e.t.Fatal(err)
		}
	}
	return resident, swapped
}

// saveWriter is where a state is saved to. It writes to guest memory, as devices do when they are
// saved.
type saveWriter struct {
	io.Writer
	e *exact
}

func (w saveWriter) Write(p []byte) (int, error) {
	page := rand.IntN(exactSize / pageSize)
	b := []byte("saved")
	local := []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}
	remote := []unix.RemoteIovec{{Base: uintptr(w.e.mapped().Start) + uintptr(page*pageSize), Len: len(b)}}
	if _, err := unix.ProcessVMWritev(w.e.m.process.PID(), local, remote, 0); err != nil {
		return 0, err
	}
	return w.Writer.Write(p)
}

// end saves the VM as a migration and a suspend do, and ends it.
func (e *exact) end() {
	t := e.t
	t.Helper()
	if e.incoming != nil {
		<-e.incoming.Complete()
	}
	if err := e.m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(exactRunning)
	e.look()
	if _, err := e.m.PauseToSave(t.Context()); err != nil {
		t.Fatal(err)
	}
	var state io.Writer = &e.state
	if e.image != nil { // its guest does not go on
		state = saveWriter{&e.state, e}
	}
	if err := e.m.Save(t.Context(), state); err != nil {
		t.Fatal(err)
	}
	e.look()
	e.compare("once it is saved")
	if err := e.memory.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := e.m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.memory.Forget(); err != nil {
		t.Fatal(err)
	}
	stored := make([]byte, exactSize)
	if _, err := e.file.ReadAt(stored, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(stored, e.last) {
		t.Fatal("what is stored is not what the guest had")
	}
	// QEMU's firmware says something first, and its serial port loses characters now and then.
	if out := e.console.bytes(); bytes.Contains(out, []byte("\nb ")) {
		t.Errorf("the guest has found damaged pages: %q", out[max(0, len(out)-1000):])
	}
}
