package registry

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
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/internal/await"
	"drafter/internal/block"
	"drafter/internal/lockfile"
	"drafter/internal/migration"
	"drafter/internal/vmmtest"
	"drafter/migrate"
	"drafter/signature"
	"drafter/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newPackage makes a package, and the config of its registry.
func newPackage(t *testing.T) (dir string, c Config) {
	t.Helper()
	dir = t.TempDir()
	vmmtest.WritePackage(t, dir)
	devices, err := PackageDevices(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir, Config{Devices: devices, Connections: 2, Limits: migrate.Limits{Silence: 5 * time.Second}}
}

func open(t *testing.T, c Config) *Registry {
	t.Helper()
	r, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// serve serves until end. Connections come by dial; accept fails as often as fails says first.
func serve(t *testing.T, r *Registry, fails int) (dial migrate.Dial, end func()) {
	t.Helper()
	streams := make(chan net.Conn)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		r.Serve(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			if fails--; fails >= 0 {
				return nil, errors.New("too many open files")
			}
			select {
			case s := <-streams:
				return s, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
	}()
	end = func() {
		cancel()
		<-served
	}
	t.Cleanup(end)
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		select {
		case streams <- theirs:
			return ours, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, end
}

// pull gets a device and tells whether it is that of the file.
func pull(t *testing.T, p *migration.Package, name, path string) error {
	t.Helper()
	remote, ok := p.Remote(name)
	if !ok {
		t.Fatalf("there is no device %s", name)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, min(len(want), block.ContentBlockSize))
	if err := remote.Fetcher.Fetch(t.Context(), 0, got, true); err != nil {
		return err
	}
	if !bytes.Equal(got, want[:len(got)]) {
		t.Errorf("device %s is not that of %s", name, path)
	}
	return nil
}

// A target gets what the files hold, also after connections could not be accepted for a while; a
// second one beside it is refused in one line if there is no place for it.
func TestServes(t *testing.T) {
	dir, c := newPackage(t) // with two connections, which a target needs
	r := open(t, c)
	dial, _ := serve(t, r, 1)
	p, err := migration.OpenPackage(t.Context(), dial, c.Limits)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range c.Devices {
		if err := pull(t, p, d.Name, d.Input); err != nil {
			t.Errorf("device %s: %v", d.Name, err)
		}
	}
	if _, err := migration.OpenPackage(t.Context(), dial, c.Limits); err == nil || !strings.Contains(err.Error(), "too many connections") {
		t.Errorf("a second target: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	var names []string
	for _, d := range r.Devices() {
		info, err := os.Stat(filepath.Join(dir, vmm.PackageFile(d.Name)))
		if err != nil || info.Size() != d.Size || d.Content == "" {
			t.Errorf("it serves %+v, %v", d, err)
		}
		names = append(names, d.Name)
	}
	if want := []string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.Memory, vmm.State}; !slices.Equal(names, want) {
		t.Errorf("it serves %q; want %q", names, want)
	}
}

// A file that is shortened while it is served ends the connection of who asks for the rest, and is
// named; the registry serves on.
func TestShortRead(t *testing.T) {
	dir, c := newPackage(t)
	r := open(t, c)
	dial, _ := serve(t, r, 0)
	p, err := migration.OpenPackage(t.Context(), dial, c.Limits)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, vmm.PackageFile(vmm.Disk))
	if err := os.Truncate(disk, 100); err != nil {
		t.Fatal(err)
	}
	remote, _ := p.Remote(vmm.Disk)
	if err := remote.Fetcher.Fetch(t.Context(), 0, make([]byte, vmmtest.Size), true); err == nil || !strings.Contains(err.Error(), "device disk") {
		t.Errorf("what is not there any more: %v", err)
	}
	// The registry may still hold the place of the connection that has failed.
	await.None(t, "another device", func() string {
		if err := pull(t, p, vmm.Kernel, filepath.Join(dir, vmm.PackageFile(vmm.Kernel))); err != nil {
			return err.Error()
		}
		return ""
	})
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// A target that vanishes, in the middle of its greeting or of an answer, leaves its place to
// others.
func TestTargetVanishes(t *testing.T) {
	_, c := newPackage(t)
	c.Connections = 1
	dial, end := serve(t, open(t, c), 0)
	for range 5 {
		conn, err := dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte{0}); err != nil {
			t.Error(err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	for range 5 {
		var conn io.ReadWriteCloser
		watched := func(ctx context.Context) (_ io.ReadWriteCloser, err error) {
			conn, err = dial(ctx)
			return conn, err
		}
		p, err := migration.OpenPackage(t.Context(), watched, c.Limits)
		for deadline := time.Now().Add(time.Minute); err != nil && time.Now().Before(deadline); {
			p, err = migration.OpenPackage(t.Context(), watched, c.Limits) // the one before is about to be noticed
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(conn.Close(), p.Close()); err != nil {
			t.Error(err)
		}
	}
	end() // also with nobody there
}

// Serving ends with its context, whoever is connected.
func TestEnds(t *testing.T) {
	_, c := newPackage(t)
	dial, end := serve(t, open(t, c), 0)
	p, err := migration.OpenPackage(t.Context(), dial, c.Limits)
	if err != nil {
		t.Fatal(err)
	}
	silent, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	end()
	if err := errors.Join(p.Close(), silent.Close()); err != nil {
		t.Error(err)
	}
}

// What cannot be served is refused, and nothing is held afterwards: the files can be locked.
func TestRefused(t *testing.T) {
	device := func(c *Config, name string) *Device {
		return &c.Devices[slices.IndexFunc(c.Devices, func(d Device) bool { return d.Name == name })]
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, dir string, c *Config)
		want   string
	}{
		{"no connections", func(_ *testing.T, _ string, c *Config) { c.Connections = -1 }, "-1 connections at once"},
		{"no devices", func(_ *testing.T, _ string, c *Config) { c.Devices = nil }, "no devices"},
		{"a device twice", func(_ *testing.T, _ string, c *Config) { c.Devices = append(c.Devices, c.Devices[1]) }, "device kernel is listed twice"},
		{"a name that is a path", func(_ *testing.T, _ string, c *Config) { c.Devices[0].Name = "../config" }, "not valid"},
		{"blocks of an odd size", func(_ *testing.T, _ string, c *Config) { device(c, vmm.Disk).BlockSize = 1000 }, "device disk: "},
		{"a missing file", func(_ *testing.T, dir string, c *Config) { device(c, vmm.Disk).Input = filepath.Join(dir, "none") }, "device disk: "},
		{"a directory", func(_ *testing.T, dir string, c *Config) { device(c, vmm.Disk).Input = dir }, "device disk: "},
		{"a truncated device", func(t *testing.T, dir string, _ *Config) {
			if err := os.Truncate(filepath.Join(dir, vmm.PackageFile(vmm.Memory)), block.PageSize); err != nil {
				t.Fatal(err)
			}
		}, "device memory has 4096 bytes, but its package says 65536"},
		{"a config that is none", func(t *testing.T, dir string, _ *Config) {
			if err := os.WriteFile(filepath.Join(dir, vmm.PackageFile(vmm.Config)), []byte("[]"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "config device: "},
		{"an endless signature", func(t *testing.T, dir string, _ *Config) {
			if err := os.WriteFile(filepath.Join(dir, signature.File), make([]byte, signature.MaxSize+1), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "longer than"},
		{"limits that contradict each other", func(_ *testing.T, _ string, c *Config) { c.Limits.Silence = -1 }, "limit of -1ns"},
		{"a package that an instance writes to", func(t *testing.T, dir string, _ *Config) {
			f, err := os.Open(filepath.Join(dir, vmm.PackageFile(vmm.Memory)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			if err := lockfile.Exclusive(f); err != nil {
				t.Fatal(err)
			}
		}, "serve a package that no instance writes to"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, c := newPackage(t)
			tt.change(t, dir, &c)
			r, err := Open(t.Context(), c)
			if err == nil {
				err = r.Close()
				t.Errorf("it was opened, and closed with %v", err)
			} else if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			f, err := os.Open(filepath.Join(dir, vmm.PackageFile(vmm.Disk)))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := lockfile.Exclusive(f); err != nil {
				t.Errorf("a file is held: %v", err)
			}
		})
	}
	t.Run("in the end", func(t *testing.T) {
		_, c := newPackage(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("the user has had enough"))
		if r, err := Open(ctx, c); err == nil {
			t.Errorf("it was opened although its context has ended, and closed with %v", r.Close())
		}
	})
}

// A directory that holds no package, or not all of one, is refused by the name of what is missing.
func TestPackageDevices(t *testing.T) {
	if _, err := PackageDevices(t.TempDir()); err == nil || !strings.Contains(err.Error(), "config.json") {
		t.Errorf("an empty directory: %v", err)
	}
	dir, _ := newPackage(t)
	if err := os.Remove(filepath.Join(dir, vmm.PackageFile(vmm.Disk))); err != nil {
		t.Fatal(err)
	}
	if _, err := PackageDevices(dir); err == nil || !strings.Contains(err.Error(), "rootfs.ext4 for device disk") {
		t.Errorf("without a disk: %v", err)
	}
}

// A target of a registry that was closed gets an error, and nobody else does.
func TestClosed(t *testing.T) {
	dir, c := newPackage(t)
	r := open(t, c)
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	dial, _ := serve(t, r, 0)
	p, err := migration.OpenPackage(t.Context(), dial, c.Limits)
	if err != nil {
		return
	}
	if err := pull(t, p, vmm.Disk, filepath.Join(dir, vmm.PackageFile(vmm.Disk))); err == nil {
		t.Error("a device is served that is closed")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
