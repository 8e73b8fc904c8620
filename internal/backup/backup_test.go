package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/internal/backup"
	"drafter/internal/block"
	"drafter/internal/s3test"
	"drafter/s3"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// image is a device in memory.
type image struct{ data []byte }

func (d *image) Size() int64  { return int64(len(d.data)) }
func (d *image) Sync() error  { return nil }
func (d *image) Close() error { return nil }
func (d *image) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, d.data[off:]), nil
}
func (d *image) WriteAt(p []byte, off int64) (int, error) { return copy(d.data[off:], p), nil }

// newImage makes a device of some blocks, the last of them short: noise, text and zeros.
func newImage(seed byte, blocks int) *image {
	d := &image{make([]byte, blocks*block.ContentBlockSize-5000)}
	rng := rand.NewChaCha8([32]byte{seed})
	for b := range blocks {
		p := d.data[b*block.ContentBlockSize : min((b+1)*block.ContentBlockSize, len(d.data))]
		switch b % 3 {
		case 0:
			_, _ = rng.Read(p)
		case 1:
			copy(p, bytes.Repeat([]byte(fmt.Sprint("text ", seed, b, " ")), len(p)/8))
		}
	}
	return d
}

// change writes noise into some blocks, and returns which.
func (d *image) change(rng *rand.Rand, n int) *block.Bitmap {
	blocks := (d.Size() + block.ContentBlockSize - 1) / block.ContentBlockSize
	changed := block.NewBitmap(blocks)
	for range n {
		b := rng.Int64N(blocks)
		d.data[b*block.ContentBlockSize+rng.Int64N(1000)]++
		changed.Set(b)
	}
	return changed
}

func open(t *testing.T, place s3.Place) *backup.Store {
	t.Helper()
	s, err := backup.Open(t.Context(), place)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func newWriter(t *testing.T, place s3.Place) *backup.Writer {
	t.Helper()
	w, err := open(t, place).NewWriter(t.Context(), slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// compare pulls what a place holds and compares it.
func compare(t *testing.T, place s3.Place, want map[string][]byte) {
	t.Helper()
	backup, err := open(t, place).Latest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer backup.Close()
	if len(backup.Names()) != len(want) {
		t.Errorf("devices: %v", backup.Names())
	}
	for name, data := range want {
		remote, ok := backup.Remote(name)
		if !ok {
			t.Fatalf("device %s is missing", name)
		}
		path := filepath.Join(t.TempDir(), name)
		d, err := block.OpenPulled(t.Context(), path, remote)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.Fill(t.Context(), nil), d.Close()); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
			t.Errorf("device %s differs (%v)", name, err)
		}
	}
}

func contents(devices map[string]*image) map[string][]byte {
	c := map[string][]byte{}
	for name, d := range devices {
		c[name] = bytes.Clone(d.data)
	}
	return c
}

// objects lists the files of a place.
func objects(t *testing.T, server *s3test.Server, prefix string) (names []string, size int64) {
	t.Helper()
	root := filepath.Join(server.Dir, prefix)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		names = append(names, name)
		size += info.Size()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names, size
}

// What changes is written, and nothing else; what a place holds is always one moment's.
func TestWrite(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	place := server.Place("one/vm")
	rng := rand.New(rand.NewPCG(1, 1))
	devices := map[string]*image{"disk": newImage(1, 60), "memory": newImage(2, 90), "config": newImage(3, 1)}
	if _, err := open(t, place).Latest(t.Context()); !errors.Is(err, s3.ErrNone) {
		t.Errorf("an empty place: %v", err)
	}
	w := newWriter(t, place)
	write := func(changed map[string]*block.Bitmap) backup.Written {
		t.Helper()
		var list []backup.Device
		for name, d := range devices {
			list = append(list, backup.Device{Name: name, Device: d, Changed: changed[name]})
		}
		done, err := w.Write(t.Context(), time.Now(), list)
		if err != nil {
			t.Fatal(err)
		}
		w.Collect(t.Context())
		return done
	}
	first := write(nil)
	compare(t, place, contents(devices))
	// What the writer itself knows of it can be fetched, too.
	remote, _ := w.Remote("disk")
	got := make([]byte, 10*block.ContentBlockSize)
	if err := remote.Fetcher.Fetch(t.Context(), 0, got, true); err != nil || !bytes.Equal(got, devices["disk"].data[:len(got)]) {
		t.Errorf("fetched from the first backup of a place: %v", err)
	}
	none := block.NewBitmap(90)
	if done := write(map[string]*block.Bitmap{"disk": none, "memory": none, "config": none}); done.Uploaded != 0 || done.Changed != 0 {
		t.Errorf("without a change: %+v", done)
	}
	if done := write(nil); done.Uploaded != 0 || done.Changed != 0 {
		t.Errorf("all again without a change: %+v", done)
	}
	for range 5 {
		disk, memory := devices["disk"].change(rng, 4), devices["memory"].change(rng, 8)
		done := write(map[string]*block.Bitmap{"disk": disk, "memory": memory, "config": none})
		if limit := (disk.Count() + memory.Count()) * block.ContentBlockSize; done.Changed > limit || done.Uploaded > limit || done.Uploaded == 0 {
			t.Errorf("of %d bytes that changed: %+v", limit, done)
		}
		compare(t, place, contents(devices))
	}
	// The next writer finds what is there.
	w = newWriter(t, place)
	if done := write(nil); done.Uploaded != 0 {
		t.Errorf("another writer: %+v", done)
	}
	devices["disk"].data = bytes.Clone(newImage(9, 60).data)
	write(nil)
	compare(t, place, contents(devices))
	names, size := objects(t, server, place.Prefix)
	if len(names) > 20 || size > first.Uploaded*3 {
		t.Errorf("%d objects of %d bytes are left; the first were %d", len(names), size, first.Uploaded)
	}
}

// Whatever fails, a place holds what was complete before, or what is new; and the next write is
// complete.
func TestFaults(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	var faults sync.Map // by the prefix of their place
	server.Fail(func(r *http.Request) string {
		_, path, _ := strings.Cut(r.URL.Path, "/"+server.Bucket+"/")
		prefix, _, _ := strings.Cut(path, "/")
		if fault, ok := faults.Load(prefix); ok {
			return fault.(s3test.Fault)(r)
		}
		return ""
	})
	for _, kind := range []string{"cut", "lost", "slow", "429", "503", "500"} {
		for _, of := range []string{"PUT packs/", "PUT index/", "PUT manifest.json", "GET manifest.json"} {
			t.Run(kind+" "+of, func(t *testing.T) {
				t.Parallel()
				rng := rand.New(rand.NewPCG(2, 2))
				method, object, _ := strings.Cut(of, " ")
				place := server.Place(strings.NewReplacer(" ", "-", "/", "", ".", "").Replace(kind + of))
				disk := newImage(1, 24)
				devices := []backup.Device{{Name: "disk", Device: disk}}
				w := newWriter(t, place)
				if _, err := w.Write(t.Context(), time.Now(), devices); err != nil {
					t.Fatal(err)
				}
				disk.change(rng, 8)
				var left atomic.Int64
				left.Store(2)
				faults.Store(place.Prefix, s3test.Fault(func(r *http.Request) string {
					if r.Method == method && strings.Contains(r.URL.Path, place.Prefix+"/"+object) && left.Add(-1) >= 0 {
						return kind
					}
					return ""
				}))
				if _, err := w.Write(t.Context(), time.Now(), devices); err != nil {
					t.Error(err)
				}
				if left.Load() == 2 && method == "PUT" {
					t.Errorf("the fault was not met")
				}
				compare(t, place, map[string][]byte{"disk": disk.data})
			})
		}
	}
}

// A storage that is gone in the middle of a write leaves the backup before; when it is back, only
// what is missing is uploaded.
func TestOutage(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	place := server.Place("vm")
	rng := rand.New(rand.NewPCG(3, 3))
	disk := newImage(1, 420) // two packs
	devices := []backup.Device{{Name: "disk", Device: disk}}
	w := newWriter(t, place)
	if _, err := w.Write(t.Context(), time.Now(), devices); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(disk.data)
	disk.change(rng, 2100)
	for _, gone := range []string{"packs/", "index/", "manifest.json"} {
		ctx, cancel := context.WithCancel(t.Context())
		passes := int64(0)
		if gone == "packs/" {
			passes = 1
		}
		var met atomic.Int64
		server.Fail(func(r *http.Request) string {
			if r.Method != http.MethodPut || !strings.Contains(r.URL.Path, gone) {
				return ""
			}
			switch n := met.Add(1); {
			case n <= passes:
				return ""
			case n > passes+2: // it has been tried again
				cancel()
			}
			return "cut"
		})
		_, err := w.Write(ctx, time.Now(), devices)
		cancel()
		server.Fail(nil)
		if err == nil {
			t.Fatalf("without %s it succeeded", gone)
		}
		compare(t, place, map[string][]byte{"disk": before})
	}
	server.Requests()
	done, err := w.Write(t.Context(), time.Now(), devices)
	if err != nil {
		t.Fatal(err)
	}
	if done.Uploaded != 0 {
		t.Errorf("%d bytes were uploaded again", done.Uploaded)
	}
	compare(t, place, map[string][]byte{"disk": disk.data})
	w.Collect(t.Context())
	if names, _ := objects(t, server, place.Prefix); len(names) > 12 {
		t.Errorf("left: %v", names)
	}
	compare(t, place, map[string][]byte{"disk": disk.data})
}

// A storage that accepts all and answers nothing does not hold up who is in a hurry.
func TestHurry(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	w := newWriter(t, server.Place("vm"))
	server.Fail(func(*http.Request) string { return "hanging" })
	w.Hurry(100 * time.Millisecond)
	_, err := w.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: newImage(1, 600)}})
	if err == nil || !strings.Contains(err.Error(), "it has not answered for 100ms") {
		t.Errorf("%v", err)
	}
	server.Fail(nil)
}

// A VM that comes from another host is backed up on, whatever that host still writes and collects
// until the first backup here. From then on that host is the one that is overtaken.
func TestInherited(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	place := server.Place("vm")
	disk := newImage(1, 20)
	write := func(w *backup.Writer, changed *block.Bitmap) error {
		_, err := w.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: disk, Changed: changed}})
		return err
	}
	source, target := newWriter(t, place), newWriter(t, place)
	if err := write(source, nil); err != nil {
		t.Fatal(err)
	}
	if err := target.Inherit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range disk.data { // the packs of before are garbage
		disk.data[i]++
	}
	if err := write(source, nil); err != nil {
		t.Fatal(err)
	}
	source.Collect(t.Context())
	disk.data[0]++
	only := block.NewBitmap(20)
	only.Set(0)
	if err := write(target, only); err != nil { // what it knows as changed is since a backup that is none any more
		t.Fatalf("after the source has written once more: %v", err)
	}
	target.Collect(t.Context())
	compare(t, place, map[string][]byte{"disk": disk.data})
	if err := write(source, nil); !errors.Is(err, s3.ErrSuperseded) {
		t.Errorf("the source: %v", err)
	}

	third := newWriter(t, place)
	if err := third.Inherit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := write(newWriter(t, place), nil); err != nil {
		t.Fatal(err)
	}
	if err := write(third, nil); !errors.Is(err, s3.ErrSuperseded) {
		t.Errorf("over a stranger's: %v", err)
	}
}

// A writer that another one has overtaken stops, and leaves what that one wrote.
func TestSuperseded(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	place := server.Place("vm")
	disk, other := newImage(1, 20), newImage(2, 20)
	first, second := newWriter(t, place), newWriter(t, place)
	if _, err := first.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: disk}}); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: other}}); !errors.Is(err, s3.ErrSuperseded) {
		t.Errorf("a writer that knows nothing of what is there: %v", err)
	}
	third := newWriter(t, place)
	if _, err := third.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: other}}); err != nil {
		t.Fatal(err)
	}
	third.Collect(t.Context())
	disk.data[0]++
	if _, err := first.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: disk}}); !errors.Is(err, s3.ErrSuperseded) {
		t.Errorf("a writer that was overtaken: %v", err)
	}
	compare(t, place, map[string][]byte{"disk": other.data})
}

// What is damaged is refused; nobody sees other bytes than those that were written.
func TestDamaged(t *testing.T) {
	t.Parallel()
	server := s3test.Start(t)
	disk := newImage(1, 20)
	for _, kind := range []string{"packs", "index", "manifest.json"} {
		place := server.Place("damaged-" + kind)
		w := newWriter(t, place)
		if _, err := w.Write(t.Context(), time.Now(), []backup.Device{{Name: "disk", Device: disk}}); err != nil {
			t.Fatal(err)
		}
		names, _ := objects(t, server, place.Prefix)
		for _, name := range names {
			if !strings.HasPrefix(name, kind) {
				continue
			}
			path := filepath.Join(server.Dir, place.Prefix, name)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(path, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		backup, err := open(t, place).Latest(t.Context())
		if err != nil {
			t.Logf("%s: %v", kind, err)
			continue
		}
		remote, _ := backup.Remote("disk")
		d, err := block.OpenPulled(t.Context(), filepath.Join(t.TempDir(), "disk"), remote)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err = d.Fill(ctx, nil)
		cancel()
		if err == nil {
			t.Errorf("damaged %s went unnoticed", kind)
		}
		t.Logf("%s: %v", kind, err)
		if err := errors.Join(d.Close(), backup.Close()); err != nil {
			t.Error(err)
		}
	}
}

// What cannot work is one clear line, at once, without the keys in it.
func TestRefused(t *testing.T) {
	server := s3test.Start(t)
	t.Setenv("HOME", t.TempDir())
	for _, c := range []struct {
		change func(p *s3.Place)
		want   string
	}{
		{func(p *s3.Place) { p.Bucket = "" }, "s3bucket is missing"},
		{func(p *s3.Place) { p.Endpoint = "" }, "s3endpoint is missing"},
		{func(p *s3.Place) { p.Endpoint = "http://" + p.Endpoint }, "must be HOST or HOST:PORT"},
		{func(p *s3.Place) { p.Bucket = "nowhere" }, "bucket nowhere does not exist"},
		{func(p *s3.Place) { p.SecretKey = "wrong-secret" }, "refuses the credentials"},
		{func(p *s3.Place) { p.AccessKey = "wrong-key" }, "refuses the credentials"},
		{func(p *s3.Place) { p.AccessKey = "" }, "belong together"},
		{func(p *s3.Place) { p.AccessKey, p.SecretKey = "", "" }, "there are no credentials"},
		{func(p *s3.Place) { p.Endpoint = "127.0.0.1:1" }, "connection refused"},
		{func(p *s3.Place) { p.Secure = true }, "HTTP response to HTTPS client"},
	} {
		place := server.Place("vm")
		c.change(&place)
		start := time.Now()
		_, err := backup.Open(t.Context(), place)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("want %q, got: %v", c.want, err)
		} else if strings.Contains(err.Error(), place.SecretKey) && place.SecretKey != "" {
			t.Errorf("it tells the key: %v", err)
		}
		t.Logf("%s: %v", time.Since(start).Round(time.Millisecond), err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", s3test.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s3test.SecretKey)
	place := server.Place("vm")
	place.AccessKey, place.SecretKey = "", ""
	open(t, place)
}
