package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"drafter/internal/block"
	"drafter/internal/migration"
	"drafter/internal/signaturetest"
	"drafter/internal/wire"
	"drafter/migrate"
	"drafter/registry"
	"drafter/signature"
	"drafter/vmm"
)

// accepted is in the error of a package that was accepted: its state device is none, which is found
// out only after that.
const accepted = "state device"

func verifierOf(t *testing.T, p *signaturetest.Package) *signature.Verifier {
	t.Helper()
	v, err := signature.NewVerifier([]string{p.Pub}, "")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// noVMM is the driver of a host without a VMM.
type noVMM struct{}

func (noVMM) Name() string { return "none" }

func (noVMM) Launch(context.Context, vmm.Launch) (vmm.Machine, error) {
	return nil, errors.New("this host has no VMM")
}

// newPeer makes a peer whose start fails at the latest at the state device, before any VMM.
func newPeer(t *testing.T, c Config) *Peer {
	t.Helper()
	c.Host = vmm.Host{Drivers: vmm.Drivers{noVMM{}}, BaseDir: filepath.Join(t.TempDir(), "vms"), Users: vmm.UserRange{Count: 1}}
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func resume(t *testing.T, p *signaturetest.Package, instanceDir string, v *signature.Verifier) error {
	t.Helper()
	devices, err := PackageDevices(p.Dir, instanceDir)
	if err != nil {
		return err
	}
	started := newPeer(t, Config{Devices: devices, Verifier: v})
	return errors.Join(started.Resume(t.Context()), started.Close())
}

// Only the package that was signed is started, whatever of it differs; without keys, every package
// is.
func TestVerifiedStart(t *testing.T) {
	for what, tt := range map[string]struct {
		attack func(t *testing.T, p *signaturetest.Package)
		want   string
	}{
		"as signed": {func(*testing.T, *signaturetest.Package) {}, accepted},
		"memory":    {func(t *testing.T, p *signaturetest.Package) { p.Change(t, vmm.Memory) }, "device memory is not what was signed"},
		"state":     {func(t *testing.T, p *signaturetest.Package) { p.Change(t, vmm.State) }, "device state is not what was signed"},
		"kernel":    {func(t *testing.T, p *signaturetest.Package) { p.Change(t, vmm.Kernel) }, "device kernel is not what was signed"},
		"disk":      {func(t *testing.T, p *signaturetest.Package) { p.Change(t, vmm.Disk) }, "device disk is not what was signed"},
		"the machine": {func(t *testing.T, p *signaturetest.Package) {
			b, err := os.ReadFile(p.Path(vmm.Config))
			if err != nil {
				t.Fatal(err)
			}
			p.Write(t, vmm.Config, []byte(strings.Replace(string(b), "pc-q35-7.2", "pc-q35-7.1", 1)))
		}, "device config is not what was signed"},
		"devices exchanged": {func(t *testing.T, p *signaturetest.Package) {
			if err := errors.Join(os.Rename(p.Path(vmm.Disk), p.Dir+"/x"), os.Rename(p.Path(vmm.Kernel), p.Path(vmm.Disk)), os.Rename(p.Dir+"/x", p.Path(vmm.Kernel))); err != nil {
				t.Fatal(err)
			}
		}, "is not what was signed"},
		"cut": {func(t *testing.T, p *signaturetest.Package) {
			if err := os.Truncate(p.Path(vmm.Memory), 1<<19); err != nil {
				t.Fatal(err)
			}
		}, "device memory is not what was signed"},
		"a disk more": {func(t *testing.T, p *signaturetest.Package) {
			b, err := os.ReadFile(p.Path(vmm.Config))
			if err != nil {
				t.Fatal(err)
			}
			p.Write(t, vmm.Config, []byte(strings.Replace(string(b), `"devices": [`, `"devices": [ {"name": "extra", "size": 5},`, 1)))
			p.Write(t, "extra", []byte("extra"))
		}, "device extra is not part"},
		"unsigned": {func(t *testing.T, p *signaturetest.Package) {
			if err := os.Remove(filepath.Join(p.Dir, signature.File)); err != nil {
				t.Fatal(err)
			}
		}, "has no signature"},
		"a stranger's": {func(t *testing.T, p *signaturetest.Package) {
			p.Change(t, vmm.Memory)
			stranger, _ := signaturetest.NewKey(t)
			p.Sign(t, stranger)
		}, "none of the keys"},
		"another package's": {func(t *testing.T, p *signaturetest.Package) {
			other := signaturetest.New(t)
			other.Sign(t, p.Key)
			if err := os.Rename(filepath.Join(other.Dir, signature.File), filepath.Join(p.Dir, signature.File)); err != nil {
				t.Fatal(err)
			}
		}, "is not what was signed"},
		"forged content ids": {func(t *testing.T, p *signaturetest.Package) { p.ForgeContents(t, vmm.Memory) }, "device memory is not what was signed"},
		"a file of others": {func(t *testing.T, p *signaturetest.Package) {
			if err := os.Chmod(p.Path(vmm.Disk), 0o666); err != nil {
				t.Fatal(err)
			}
		}, "others than its owner can write"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel() // it waits for disks
			p := signaturetest.New(t)
			tt.attack(t, p)
			for _, dir := range []string{filepath.Join(t.TempDir(), "instance"), ""} {
				if err := resume(t, p, dir, verifierOf(t, p)); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("instance %q: %v, want %q", dir, err, tt.want)
				}
			}
			if err := resume(t, p, filepath.Join(t.TempDir(), "instance"), nil); err == nil || !strings.Contains(err.Error(), accepted) {
				t.Errorf("without keys: %v", err)
			}
		})
	}
}

// All devices of the package have to be there, under their names.
func TestVerifiedList(t *testing.T) {
	p := signaturetest.New(t)
	list, err := PackageDevices(p.Dir, filepath.Join(t.TempDir(), "instance"))
	if err != nil {
		t.Fatal(err)
	}
	for what, tt := range map[string]struct {
		change func(d Device) (Device, bool)
		want   string
	}{
		"a disk less":            {func(d Device) (Device, bool) { return d, d.Name != vmm.Disk }, "device disk of the package that was signed is missing"},
		"a disk by another name": {func(d Device) (Device, bool) { d.Name = strings.Replace(d.Name, vmm.Disk, "data", 1); return d, true }, "device data is not part of the package"},
	} {
		var devices []Device
		for _, d := range list {
			if d, ok := tt.change(d); ok {
				devices = append(devices, d)
			}
		}
		if err := newPeer(t, Config{Devices: devices, Verifier: verifierOf(t, p)}).Resume(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", what, err, tt.want)
		}
	}
}

// serve serves a package and returns what connects with it.
func serve(t *testing.T, p *signaturetest.Package) migrate.Dial {
	t.Helper()
	devices, err := registry.PackageDevices(p.Dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := registry.Open(t.Context(), registry.Config{Devices: devices, Connections: 8})
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan net.Conn)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		r.Serve(ctx, func(ctx context.Context) (io.ReadWriteCloser, error) {
			select {
			case c := <-conns:
				return c, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		ours, theirs := net.Pipe()
		select {
		case conns <- theirs:
			return ours, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// A package that is pulled from a registry is the signed one before anything of it is used, and its
// signature is kept for the next start.
func TestVerifiedPull(t *testing.T) {
	for what, tt := range map[string]struct {
		attack func(t *testing.T, p *signaturetest.Package)
		want   string
	}{
		"as signed":          {func(*testing.T, *signaturetest.Package) {}, accepted},
		"changed":            {func(t *testing.T, p *signaturetest.Package) { p.Change(t, vmm.State) }, "device state is not what was signed"},
		"forged content ids": {func(t *testing.T, p *signaturetest.Package) { p.ForgeContents(t, vmm.State) }, "block 0 is not what the package says"},
		"unsigned": {func(t *testing.T, p *signaturetest.Package) {
			if err := os.Remove(filepath.Join(p.Dir, signature.File)); err != nil {
				t.Fatal(err)
			}
		}, "has no signature"},
		"a stranger's": {func(t *testing.T, p *signaturetest.Package) {
			stranger, _ := signaturetest.NewKey(t)
			p.Sign(t, stranger)
		}, "none of the keys"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel() // it waits for disks
			p := signaturetest.New(t)
			tt.attack(t, p)
			pkg, dir := filepath.Join(t.TempDir(), "pulled"), filepath.Join(t.TempDir(), "instance")
			origin, err := migration.OpenPackage(t.Context(), serve(t, p), migrate.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			pulling := newPeer(t, Config{Derive: func(names []string) ([]Device, error) { return NewPackageDevices(names, pkg, dir), nil }, Verifier: verifierOf(t, p)})
			err = pulling.Pull(t.Context(), &Origin{origin})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
			_, err = os.Stat(filepath.Join(pkg, signature.File))
			if kept := err == nil; kept == (what == "unsigned" || what == "a stranger's") {
				t.Errorf("the signature is kept: %v", kept)
			}
		})
	}
}

// A VM that arrives has the config, the kernel and the bases that were signed.
func TestVerifiedArrival(t *testing.T) {
	for what, tt := range map[string]struct {
		attack func(t *testing.T, p *signaturetest.Package, m *wire.Manifest)
		base   bool // whether the package is here
		want   string
	}{
		"as signed, with its bases":    {nil, true, ""},
		"as signed, without its bases": {nil, false, ""},
		"another config": {func(_ *testing.T, _ *signaturetest.Package, m *wire.Manifest) {
			m.Config = []byte(strings.Replace(string(m.Config), "pc-q35-7.2", "pc-q35-7.2,initrd=/etc/shadow", 1))
		}, true, "device config is not what was signed"},
		"no config": {func(_ *testing.T, _ *signaturetest.Package, m *wire.Manifest) { m.Config = nil }, true, "device config is not what was signed"},
		"a base that is another": {func(t *testing.T, p *signaturetest.Package, m *wire.Manifest) {
			p.Change(t, vmm.Disk)
			for i := range m.Devices {
				if m.Devices[i].Name == vmm.Disk {
					m.Devices[i].Base = p.Contents(t)[vmm.Disk].Device
				}
			}
		}, true, "device disk is not what was signed"},
		"a base with forged content ids":  {func(t *testing.T, p *signaturetest.Package, _ *wire.Manifest) { p.ForgeContents(t, vmm.Disk) }, true, "device disk is not what was signed"},
		"unsigned":                        {func(t *testing.T, _ *signaturetest.Package, m *wire.Manifest) { m.Signature = nil }, false, "has no signature"},
		"unsigned, with the package here": {func(t *testing.T, _ *signaturetest.Package, m *wire.Manifest) { m.Signature = nil }, true, ""},
		"a stranger's": {func(t *testing.T, p *signaturetest.Package, m *wire.Manifest) {
			stranger, _ := signaturetest.NewKey(t)
			p.Sign(t, stranger)
			m.Signature, _ = signature.Beside(p.Path(vmm.Config))
		}, false, "none of the keys"},
		"another kernel": {func(t *testing.T, _ *signaturetest.Package, m *wire.Manifest) { m.Processor = []byte("another kernel") }, false, "device kernel is not what was signed"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel() // it waits for disks
			p := signaturetest.New(t)
			m := wire.Manifest{}
			var err error
			if m.Config, err = os.ReadFile(p.Path(vmm.Config)); err != nil {
				t.Fatal(err)
			}
			if m.Signature, err = signature.Beside(p.Path(vmm.Config)); err != nil {
				t.Fatal(err)
			}
			kernel, err := os.ReadFile(p.Path(vmm.Kernel))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory} {
				c := p.Contents(t)[name]
				m.Devices = append(m.Devices, wire.Device{Name: name, Size: c.Size, BlockSize: block.ContentBlockSize, Base: c.Device})
			}
			if tt.attack != nil {
				tt.attack(t, p, &m)
			}
			if string(m.Processor) == "another kernel" {
				copy(kernel, m.Processor)
			}
			pkg := p.Dir
			if !tt.base {
				pkg = filepath.Join(t.TempDir(), "nowhere")
			}
			a := &arrival{p: newPeer(t, Config{Verifier: verifierOf(t, p), Devices: NewPackageDevices([]string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory}, pkg, filepath.Join(t.TempDir(), "instance"))})}
			err = func() error {
				if err := a.verify(m); err != nil {
					return err
				}
				if err := a.p.checkPlaces(); err != nil {
					return err
				}
				if _, err := a.open(t.Context(), m, uuid.New()); err != nil {
					return err
				}
				if in := a.p.devices.Get(vmm.Kernel).Incoming; !tt.base {
					missing := block.NewBitmap(int64(len(kernel)) / block.PageSize)
					missing.SetRange(0, missing.Len())
					in.Open(missing, func(int64, int64) {}, nil)
					if _, err := in.Arrive(kernel, 0); err != nil {
						return err
					}
				}
				return a.verifyKernel(t.Context())
			}()
			if tt.want == "" {
				in := a.p.devices.Get(vmm.Kernel).Incoming
				if _, err := in.Device.WriteAt([]byte("another kernel"), 0); err == nil {
					t.Error("the source could change the kernel after it was verified")
				}
				if err := block.Trim(in.Device, 0, block.PageSize); err == nil {
					t.Error("the source could clear the kernel after it was verified")
				}
			}
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}
