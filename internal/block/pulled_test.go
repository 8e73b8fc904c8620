package block

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// origin serves a device's bytes from memory, and fails as it is told.
type origin struct {
	mu      sync.Mutex
	data    []byte
	fetched map[int64]int // blocks, and how often
	fails   int           // how many requests fail first
	failing error
	gate    chan struct{} // if not nil, requests in the background wait for it
}

func (o *origin) Fetch(ctx context.Context, first int64, p []byte, urgent bool) error {
	if o.gate != nil && !urgent {
		select {
		case <-o.gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fails > 0 {
		o.fails--
		return o.failing
	}
	for b := first; b*ContentBlockSize < first*ContentBlockSize+int64(len(p)); b++ {
		o.fetched[b]++
	}
	copy(p, o.data[first*ContentBlockSize:])
	return nil
}

// newOrigin makes a device of some blocks: every third is zeros, the last is short.
func newOrigin(t *testing.T, blocks int) (*origin, Remote) {
	t.Helper()
	data := make([]byte, blocks*ContentBlockSize-PageSize)
	rng := rand.NewChaCha8([32]byte{byte(blocks)})
	for b := range blocks {
		if b%3 != 1 {
			_, _ = rng.Read(data[b*ContentBlockSize : min((b+1)*ContentBlockSize, len(data))])
		}
	}
	path := filepath.Join(t.TempDir(), "origin")
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := FileContents(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	o := &origin{data: data, fetched: map[int64]int{}}
	return o, Remote{Contents: c, Fetcher: o}
}

func openPulled(t *testing.T, path string, r Remote) *Pulled {
	t.Helper()
	d, err := OpenPulled(t.Context(), path, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// What is read is fetched, once; the rest comes behind, and then the file is there for the next.
func TestPulled(t *testing.T) {
	o, remote := newOrigin(t, 40)
	path := filepath.Join(t.TempDir(), "package", "disk")
	d := openPulled(t, path, remote)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 0))
			for range 50 {
				off := rng.Int64N(d.Size())
				p := make([]byte, 1+rng.Int64N(min(200_000, d.Size()-off)))
				if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, o.data[off:off+int64(len(p))]) {
					t.Errorf("read at %d: %v, or other bytes", off, err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := d.Fill(t.Context(), nil); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	for b, n := range o.fetched {
		if n != 1 || b%3 == 1 {
			t.Errorf("block %d was fetched %d times", b, n)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, o.data) {
		t.Errorf("the complete file: %v, or other bytes", err)
	}
	if _, err := os.Stat(partialPath(path)); err == nil {
		t.Error("the partial file is there still")
	}
	c, err := FileContents(t.Context(), path)
	if err != nil || c.Device != remote.Contents.Device {
		t.Errorf("contents of the complete file: %v, or others", err)
	}
}

// A second start goes on where the first was killed, and trusts nothing of what it finds.
func TestPulledTakesUp(t *testing.T) {
	o, remote := newOrigin(t, 40)
	path := filepath.Join(t.TempDir(), "disk")
	d := openPulled(t, path, remote)
	if _, err := d.ReadAt(make([]byte, 20*ContentBlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 1), 30*ContentBlockSize); err == nil {
		t.Error("a closed device is read")
	}
	f, err := os.OpenFile(partialPath(path), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []int64{3, 4} { // one that is data, one that is zeros
		if _, err := f.WriteAt([]byte("torn"), b*ContentBlockSize+100); err != nil {
			t.Fatal(err)
		}
	}
	f.Close()
	d = openPulled(t, path, remote)
	if err := d.Fill(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for b, n := range o.fetched {
		if want := map[bool]int{true: 2, false: 1}[b == 3]; n != want {
			t.Errorf("block %d was fetched %d times instead of %d", b, n, want)
		}
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, o.data) {
		t.Errorf("the complete file: %v, or other bytes", err)
	}
}

// What fails is tried again, unless the content is another one now: then nobody ever reads a mix.
func TestPulledFaults(t *testing.T) {
	t.Run("passing", func(t *testing.T) {
		o, remote := newOrigin(t, 5)
		o.fails, o.failing = 3, errors.New("connection reset")
		d := openPulled(t, filepath.Join(t.TempDir(), "disk"), remote)
		if err := d.Fill(t.Context(), nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("replaced", func(t *testing.T) {
		o, remote := newOrigin(t, 5)
		path := filepath.Join(t.TempDir(), "disk")
		d := openPulled(t, path, remote)
		p := make([]byte, 10)
		if _, err := d.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		o.data[3*ContentBlockSize]++
		if err := d.Fill(t.Context(), nil); !errors.Is(err, ErrReplaced) {
			t.Errorf("fill: %v", err)
		}
		if _, err := d.ReadAt(p, 3*ContentBlockSize); !errors.Is(err, ErrReplaced) {
			t.Errorf("read: %v", err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("there is a complete file")
		}
	})
	t.Run("other contents", func(t *testing.T) {
		_, remote := newOrigin(t, 5)
		remote.Contents.Blocks[0][0]++
		if _, err := OpenPulled(t.Context(), filepath.Join(t.TempDir(), "disk"), remote); err == nil {
			t.Error("contents that contradict themselves were taken")
		}
	})
	t.Run("unreachable", func(t *testing.T) {
		o, remote := newOrigin(t, 5)
		o.gate = make(chan struct{})
		d := openPulled(t, filepath.Join(t.TempDir(), "disk"), remote)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := d.Fill(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("fill: %v", err)
		}
	})
}

// Two processes that pull one file do not disturb each other.
func TestPulledTwice(t *testing.T) {
	o, remote := newOrigin(t, 20)
	path := filepath.Join(t.TempDir(), "disk")
	first, second := openPulled(t, path, remote), openPulled(t, path, remote)
	for _, d := range []*Pulled{second, first} {
		if err := d.Fill(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, d.Size())
		if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, o.data) {
			t.Errorf("read: %v, or other bytes", err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 2 {
		t.Errorf("%d files are left, %v; want the device and its contents", len(entries), err)
	}
}

// A file that is being pulled is this user's alone: links that lie in wait for it, and files that
// another could change behind our back, are refused.
func TestPulledIsClosed(t *testing.T) {
	_, remote := newOrigin(t, 4)
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	closed := func() string { // a directory that others cannot write to, in spite of the umask
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, lie := range map[string]func(partial string) error{
		"link":      func(p string) error { return os.Symlink(victim, p) },
		"hard link": func(p string) error { return os.Link(victim, p) },
		"fifo":      func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"writable":  func(p string) error { return os.WriteFile(p, nil, 0o666) },
		"another's": func(p string) error {
			if os.Geteuid() != 0 {
				return os.Symlink(victim, p)
			}
			return errors.Join(os.WriteFile(p, nil, 0o600), os.Chown(p, 65534, 65534))
		},
	} {
		path := filepath.Join(closed(), "disk")
		if err := lie(partialPath(path)); err != nil {
			t.Fatal(err)
		}
		if d, err := OpenPulled(t.Context(), path, remote); err == nil {
			t.Errorf("%s: it was opened", name)
			_ = d.Close()
		}
		if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
			t.Errorf("%s: a file was overwritten, or %v", name, err)
		}
	}
	path := filepath.Join(closed(), "made", "disk")
	d := openPulled(t, path, remote)
	if err := d.Fill(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): os.ModeDir | 0o700} {
		if info, err := os.Stat(p); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v", p, info.Mode(), err)
		}
	}
}

// Content ids that another has laid beside a base are not believed, nor waited for.
func TestForgedContents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, bytes.Repeat([]byte("data"), ContentBlockSize), 0o600); err != nil {
		t.Fatal(err)
	}
	genuine, err := FileContents(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := OpenFile(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	stamp, err := d.stamp()
	if err != nil {
		t.Fatal(err)
	}
	forged := NewContents(genuine.Size, make([]ID, len(genuine.Blocks)))
	if err := forged.keep(contentsPath(path), stamp); err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(t.TempDir(), "forged")
	for name, lie := range map[string]func() error{
		"link":     func() error { return os.Symlink(elsewhere, contentsPath(path)) },
		"fifo":     func() error { return syscall.Mkfifo(contentsPath(path), 0o600) },
		"writable": func() error { return errors.Join(os.Link(elsewhere, contentsPath(path)), os.Chmod(elsewhere, 0o666)) },
	} {
		if err := errors.Join(forged.keep(elsewhere, stamp), os.Remove(contentsPath(path)), lie()); err != nil {
			t.Fatal(err)
		}
		if c := readContents(contentsPath(path), stamp, d.Size()); c != nil {
			t.Errorf("%s: it was believed", name)
		}
		got, err := FileContents(t.Context(), path)
		switch {
		case name == "fifo" && (err == nil || !strings.Contains(err.Error(), contentsPath(path)+" is there and no regular file")):
			t.Errorf("%s: %v; want that it is named", name, err)
		case name != "fifo" && (err != nil || got.Device != genuine.Device):
			t.Errorf("%s: the true ids: %v", name, err)
		}
	}
}

func TestCheckSizes(t *testing.T) {
	for _, c := range []struct {
		sizes []int64
		fits  bool
	}{{nil, true}, {[]int64{0, 1, 1 << 30}, true}, {[]int64{1 << 62}, false}, {[]int64{1<<63 - 1}, false}, {[]int64{-1}, false}, {[]int64{1 << 46, 1 << 46, 1 << 46, 1 << 46}, false}} {
		if err := CheckSizes(0, c.sizes...); (err == nil) != c.fits {
			t.Errorf("%v: %v", c.sizes, err)
		}
	}
}
