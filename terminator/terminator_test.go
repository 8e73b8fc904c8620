package terminator

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/internal/migration"
	"drafter/internal/vmmtest"
	"drafter/migrate"
	"drafter/s3"
	"drafter/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBroken = errors.New("broken")

// peer is a VM that runs, and who gives it away. It implements [migration.SourceVM].
type peer struct {
	t       *testing.T
	source  *migration.Source
	config  *vmm.PackageConfig
	devices map[string]*block.Tracker
	id      string // of the package that its state is of

	at func(call string) error // called at the beginning of each call; nil: none fails

	mu    sync.Mutex
	conns []net.Conn
	gone  bool
	wg    sync.WaitGroup
	calls []string
}

// newPeer has a VM with the devices of a package. change, if not nil, changes what it says about
// them.
func newPeer(t *testing.T, change func(*migration.SourceConfig)) *peer {
	t.Helper()
	p := &peer{t: t, devices: map[string]*block.Tracker{}}
	paths, config := vmmtest.WritePackage(t, t.TempDir())
	p.config, p.id = config, config.ID
	c := migration.SourceConfig{VM: p}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.Memory, vmm.State, vmm.Config} {
		f, err := block.OpenFile(paths[name], false)
		if err != nil {
			t.Fatal(err)
		}
		p.devices[name] = block.NewTracker(f, block.ContentBlockSize)
		c.Devices = append(c.Devices, migration.SourceDevice{Name: name, Device: p.devices[name], MaxDirtyBlocks: 200, MinCycles: 1, MaxCycles: 1})
		if name == vmm.State {
			if err := vmm.MarkState(p.state(), vmm.Running); err != nil {
				t.Fatal(err)
			}
		}
	}
	var err error
	if c.Config, err = config.Encode(); err != nil {
		t.Fatal(err)
	}
	c.Limits = limits()
	if change != nil {
		change(&c)
	}
	if p.source, err = migration.NewSource(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.vanish()
		if err := p.source.Close(); err != nil && !errors.Is(err, migrate.ErrHandedOver) {
			t.Error(err)
		}
		p.wg.Wait()
		for _, f := range p.devices {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return p
}

func limits() migrate.Limits {
	return migrate.Limits{Silence: 5 * time.Second, Reconnect: time.Millisecond, Settle: 20 * time.Millisecond, Prepare: 20 * time.Second}
}

func (p *peer) state() vmm.StateDevice { return p.devices[vmm.State] }

// dial connects with the peer.
func (p *peer) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return nil, errors.New("nobody is there")
	}
	ours, theirs := net.Pipe()
	p.conns = append(p.conns, theirs)
	p.wg.Go(func() { _ = p.source.Handle(context.WithoutCancel(ctx), theirs) })
	return ours, nil
}

// vanish cuts all connections; there are no others.
func (p *peer) vanish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	for _, c := range p.conns {
		_ = c.Close()
	}
}

func (p *peer) call(name string) error {
	p.mu.Lock()
	p.calls = append(p.calls, name)
	p.mu.Unlock()
	if p.at == nil {
		return nil
	}
	return p.at(name)
}

func (p *peer) called(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.calls, name)
}

func (p *peer) WriteBack(context.Context) error        { return p.call("write back") }
func (p *peer) Flush(context.Context) error            { return p.call("flush") }
func (p *peer) Prepare(context.Context) error          { return p.call("prepare") }
func (p *peer) Leave(context.Context, uuid.UUID) error { return p.call("leave") }
func (p *peer) Rescue(context.Context) error           { return p.call("rescue") }
func (p *peer) Rescued(context.Context)                { _ = p.call("rescued") }

func (p *peer) Pause(context.Context) (time.Time, error) { return time.Now(), p.call("pause") }

func (p *peer) Save(_ context.Context, id uuid.UUID, _ func(int64, bool)) error {
	if err := p.call("save"); err != nil {
		return err
	}
	status := vmm.Leaving
	if !p.called("leave") {
		status = vmm.Copying
	}
	return vmm.WriteMigratedState(p.state(), p.id, []byte("saved"), id, status)
}

func (p *peer) Mark(_ context.Context, s migrate.Phase, _ uuid.UUID) error {
	return p.call("mark " + string(s))
}

// kept awaits that the VM goes on at its peer, as if nothing had been.
func (p *peer) kept(t *testing.T) {
	t.Helper()
	p.mu.Lock()
	p.gone = true
	p.mu.Unlock()
	p.wg.Wait() // for its connections
	if err := p.source.Close(); err != nil {
		t.Errorf("the peer ends with %v", err)
	}
	if s := p.source.Phase(); s != migrate.Kept && s != "" {
		t.Errorf("the peer is %q", s)
	}
	if p.called("pause") && !p.called("rescue") {
		t.Error("the VM stands still")
	}
}

// take runs a terminator.
func (p *peer) take(ctx context.Context, t *testing.T, c Config) error {
	t.Helper()
	c.Limits = limits()
	terminator, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	_, err = terminator.Run(ctx, p.dial)
	return err
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// A VM that is taken is a package that can be resumed; a copy is one, too, and the VM goes on.
func TestTake(t *testing.T) {
	for _, isCopy := range []bool{false, true} {
		p := newPeer(t, nil)
		dir := filepath.Join(t.TempDir(), "package")
		if err := p.take(t.Context(), t, Config{Dir: dir, Copy: isCopy}); err != nil {
			t.Fatal(err)
		}
		if p.called("rescue") != isCopy {
			t.Errorf("a copy: %t; the peer was asked to %q", isCopy, p.calls)
		}
		if names, _, err := vmm.PackageFiles(dir); err != nil || len(names) != len(p.devices) {
			t.Errorf("a package of %q, %v", names, err)
		}
		f, err := os.Open(filepath.Join(dir, vmm.PackageFile(vmm.State)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if state, err := vmm.ReadState(f, p.config.ID); err != nil || string(state) != "saved" {
			t.Errorf("its state is %q, %v", state, err)
		}
		for name, d := range p.devices {
			if name == vmm.State {
				continue
			}
			want := make([]byte, d.Size())
			if _, err := d.ReadAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, vmm.PackageFile(name))); err != nil || !bytes.Equal(got, want) {
				t.Errorf("device %s has %d bytes, %v", name, len(got), err)
			}
		}
	}
}

// Only what is named is written.
func TestSomeDevices(t *testing.T) {
	p := newPeer(t, nil)
	dir := t.TempDir()
	if err := p.take(t.Context(), t, Config{Devices: []Device{{vmm.Disk, filepath.Join(dir, "d")}, {vmm.Config, filepath.Join(dir, "c")}}}); err != nil {
		t.Fatal(err)
	}
	if names := files(t, dir); !slices.Equal(names, []string{"c", "d"}) {
		t.Errorf("there are %q", names)
	}
}

// Whatever fails before the VM is handed over, it goes on at its peer, and files are as they were
// before.
func TestFails(t *testing.T) {
	at := func(call string, do func(p *peer) error) func(*testing.T, *peer, context.CancelCauseFunc) {
		return func(_ *testing.T, p *peer, _ context.CancelCauseFunc) {
			p.at = func(c string) error {
				if c == call {
					return do(p)
				}
				return nil
			}
		}
	}
	broken := func(*peer) error { return errBroken }
	for _, tt := range []struct {
		name   string
		source func(*migration.SourceConfig)
		cause  func(t *testing.T, p *peer, cancel context.CancelCauseFunc)
		config func(c *Config, dir string)
		want   string
	}{
		{name: "prepare", cause: at("prepare", broken), want: "broken"},
		{name: "leave", cause: at("leave", broken), want: "broken"},
		{name: "pause", cause: at("pause", broken), want: "broken"},
		{name: "flush", cause: at("flush", broken), want: "broken"},
		{name: "save", cause: at("save", broken), want: "broken"},
		{name: "a peer that vanishes", cause: at("write back", func(p *peer) error { p.vanish(); return nil }), want: "receive VM: "},
		{name: "a peer that vanishes with its VM paused", cause: at("save", func(p *peer) error { p.vanish(); return nil }), want: "receive VM: "},
		{name: "nobody", cause: func(_ *testing.T, p *peer, _ context.CancelCauseFunc) { p.vanish() }, want: "nobody is there"},
		{name: "the user", cause: func(_ *testing.T, p *peer, cancel context.CancelCauseFunc) {
			p.at = func(c string) error {
				if c == "prepare" {
					cancel(errors.New("the user has had enough"))
				}
				return nil
			}
		}, want: "the user has had enough"},
		{name: "a state of another package", cause: func(_ *testing.T, p *peer, _ context.CancelCauseFunc) { p.id = uuid.NewString() }, want: "belong to different packages"},
		{name: "a state that was not saved", cause: at("mark "+string(migrate.InDoubt), func(*peer) error { return nil }),
			source: func(c *migration.SourceConfig) { c.VM = unsaved{c.VM} }, want: "does not hold the state of migration"},
		{name: "a config that is none", source: func(c *migration.SourceConfig) { c.Config = []byte("{}") }, want: "the peer's config device: "},
		{name: "a name that is a path", source: func(c *migration.SourceConfig) { c.Devices[1].Name = "../../disk" }, want: "../../disk"},
		{name: "a device that does not come", config: func(c *Config, dir string) {
			*c = Config{Devices: []Device{{vmm.Disk, filepath.Join(dir, "rootfs.ext4")}, {"more", filepath.Join(dir, "more")}}}
		}, want: "device more does not come with the VM"},
		{name: "an output that is a FIFO", cause: func(t *testing.T, _ *peer, _ context.CancelCauseFunc) {
			if err := unix.Mkfifo(filepath.Join(t.TempDir(), "../fifo"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, config: func(c *Config, dir string) {
			*c = Config{Devices: []Device{{vmm.Disk, filepath.Join(dir, "../../fifo")}}}
		}, want: "fifo exists"},
		{name: "an output below a file", config: func(c *Config, dir string) {
			*c = Config{Devices: []Device{{vmm.Disk, filepath.Join(dir, "config.json", "disk")}}}
		}, want: "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPeer(t, tt.source)
			dir := filepath.Join(t.TempDir(), "package")
			before := map[string]string{"config.json": "of before", "rootfs.ext4": "disk of before"}
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			for name, content := range before {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if tt.cause != nil {
				tt.cause(t, p, cancel)
			}
			c := Config{Dir: dir}
			if tt.config != nil {
				tt.config(&c, dir)
			}
			if err := p.take(ctx, t, c); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			p.kept(t)
			if names := files(t, dir); len(names) != len(before) {
				t.Errorf("there are %q", names)
			}
			if names := files(t, filepath.Dir(dir)); !slices.Equal(names, []string{"package"}) {
				t.Errorf("beside it there are %q", names)
			}
			for name, content := range before {
				if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != content {
					t.Errorf("%s holds %q, %v", name, b, err)
				}
			}
		})
	}
}

// What comes in the way once the VM has been handed over is told, and nothing else is left of it.
func TestInTheWay(t *testing.T) {
	p := newPeer(t, nil)
	dir := filepath.Join(t.TempDir(), "package")
	p.at = func(call string) error {
		if call == "save" {
			return os.WriteFile(dir, []byte("somebody's"), 0o600)
		}
		return nil
	}
	if err := p.take(t.Context(), t, Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("error %v", err)
	}
	if names := files(t, filepath.Dir(dir)); !slices.Equal(names, []string{"package"}) {
		t.Errorf("there are %q", names)
	}
	if b, err := os.ReadFile(dir); err != nil || string(b) != "somebody's" {
		t.Errorf("in the way is %q, %v", b, err)
	}
}

// unsaved is a VM whose state is not saved, whatever it says.
type unsaved struct{ migration.SourceVM }

func (unsaved) Save(context.Context, uuid.UUID, func(int64, bool)) error { return nil }

// What cannot be written is refused before anything is touched.
func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config Config
		want   string
	}{
		{"nothing", Config{}, "must be given"},
		{"devices and a directory", Config{Devices: []Device{{vmm.Disk, "d"}}, Dir: "dir"}, "must be given"},
		{"a directory and a storage", Config{Dir: "dir", Place: s3.Place{Bucket: "b"}}, "must be given"},
		{"a device twice", Config{Devices: []Device{{vmm.Disk, "d"}, {vmm.Disk, "e"}}}, "listed twice"},
		{"an output twice", Config{Devices: []Device{{vmm.Disk, "d"}, {vmm.Memory, "d"}}}, "listed twice (disk)"},
		{"no output", Config{Devices: []Device{{vmm.Disk, ""}}}, "device disk has no output"},
		{"a name that is a path", Config{Devices: []Device{{"../disk", "d"}}}, "not valid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := New(tt.config); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
		})
	}
}

// A storage that cannot be used is told before the peer is asked for the VM.
func TestUnusableStorage(t *testing.T) {
	p := newPeer(t, nil)
	err := p.take(t.Context(), t, Config{Place: s3.Place{Bucket: "vms", Endpoint: "http://storage"}})
	if err == nil || !strings.Contains(err.Error(), "must be HOST or HOST:PORT") {
		t.Errorf("error %v", err)
	}
	if len(p.calls) > 0 || len(p.conns) > 0 {
		t.Errorf("the peer was asked to %q", p.calls)
	}
}
