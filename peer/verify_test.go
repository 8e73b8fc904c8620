package peer

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"drafter/block"
	"drafter/instance"
	"drafter/migrate"
	"drafter/registry"
	"drafter/signature"
	"drafter/vmm"
	"drafter/wire"
)

// accepted is in the error of a package that was accepted: its state device is none, which is found out only after that.
const accepted = "state device"

// signedPackage is a package that a key has signed.
type signedPackage struct {
	dir      string
	key, pub string // files
}

func newSignedPackage(t *testing.T) *signedPackage {
	t.Helper()
	p := &signedPackage{dir: filepath.Join(t.TempDir(), "package")}
	p.key, p.pub = newSigningKey(t)
	config := vmm.PackageConfig{
		Version: vmm.PackageVersion, ID: uuid.NewString(), Created: time.Now().UTC(), Architecture: runtime.GOARCH, CPUs: 1,
		Hardware: vmm.Hardware{VMM: "qemu", Version: "7.2.22", Machine: "pc-q35-7.2", CPU: "qemu64", Accel: vmm.AccelTCG},
	}
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory} {
		content := make([]byte, 1<<20)
		copy(content, name)
		config.Devices = append(config.Devices, vmm.PackageDevice{Name: name, Size: int64(len(content))})
		p.write(t, name, content)
	}
	b, err := config.Encode()
	if err != nil {
		t.Fatal(err)
	}
	p.write(t, vmm.Config, b)
	p.sign(t, p.key)
	return p
}

func newSigningKey(t *testing.T) (private, public string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	encode := func(name, kind string, der []byte, err error) string {
		path := filepath.Join(dir, name)
		if err = errors.Join(err, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	private = encode("key.pem", "PRIVATE KEY", der, err)
	der, err = x509.MarshalPKIXPublicKey(pub)
	return private, encode("key.pub", "PUBLIC KEY", der, err)
}

func (p *signedPackage) path(name string) string {
	return filepath.Join(p.dir, vmm.PackageFile(name))
}

func (p *signedPackage) write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(p.path(name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// change changes a byte of a device.
func (p *signedPackage) change(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(p.path(name))
	if err != nil {
		t.Fatal(err)
	}
	b[100] ^= 1
	p.write(t, name, b)
}

func (p *signedPackage) contents(t *testing.T) map[string]*block.Contents {
	t.Helper()
	contents := map[string]*block.Contents{}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		var err error
		if contents[name], err = signature.HashFile(t.Context(), p.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	return contents
}

func (p *signedPackage) sign(t *testing.T, keyFile string) {
	t.Helper()
	key, err := signature.ReadPrivateKey(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	envelope, err := signature.Sign(signature.NewStatement(p.contents(t)), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.dir, signature.File), envelope, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *signedPackage) verifier(t *testing.T) *signature.Verifier {
	t.Helper()
	v, err := signature.NewVerifier([]string{p.pub}, "")
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// newPeer makes a peer whose start fails at the latest at the state device, before any VMM.
func newPeer(t *testing.T, c Config) *Peer {
	t.Helper()
	c.Host = instance.Host{BaseDir: filepath.Join(t.TempDir(), "vms")}
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

func (p *signedPackage) resume(t *testing.T, instanceDir string, v *signature.Verifier) error {
	t.Helper()
	devices, err := PackageDevices(p.dir, instanceDir)
	if err != nil {
		return err
	}
	started := newPeer(t, Config{Devices: devices, Verifier: v})
	return errors.Join(started.Resume(t.Context()), started.Close())
}

// Only the package that was signed is started, whatever of it differs; without keys, every package is.
func TestVerifiedStart(t *testing.T) {
	for what, tt := range map[string]struct {
		attack func(t *testing.T, p *signedPackage)
		want   string
	}{
		"as signed": {func(*testing.T, *signedPackage) {}, accepted},
		"memory":    {func(t *testing.T, p *signedPackage) { p.change(t, vmm.Memory) }, "device memory is not what was signed"},
		"state":     {func(t *testing.T, p *signedPackage) { p.change(t, vmm.State) }, "device state is not what was signed"},
		"kernel":    {func(t *testing.T, p *signedPackage) { p.change(t, vmm.Kernel) }, "device kernel is not what was signed"},
		"disk":      {func(t *testing.T, p *signedPackage) { p.change(t, vmm.Disk) }, "device disk is not what was signed"},
		"the machine": {func(t *testing.T, p *signedPackage) {
			b, err := os.ReadFile(p.path(vmm.Config))
			if err != nil {
				t.Fatal(err)
			}
			p.write(t, vmm.Config, []byte(strings.Replace(string(b), "pc-q35-7.2", "pc-q35-7.1", 1)))
		}, "device config is not what was signed"},
		"devices exchanged": {func(t *testing.T, p *signedPackage) {
			if err := errors.Join(os.Rename(p.path(vmm.Disk), p.dir+"/x"), os.Rename(p.path(vmm.Kernel), p.path(vmm.Disk)), os.Rename(p.dir+"/x", p.path(vmm.Kernel))); err != nil {
				t.Fatal(err)
			}
		}, "is not what was signed"},
		"cut": {func(t *testing.T, p *signedPackage) {
			if err := os.Truncate(p.path(vmm.Memory), 1<<19); err != nil {
				t.Fatal(err)
			}
		}, "device memory is not what was signed"},
		"a disk more": {func(t *testing.T, p *signedPackage) {
			b, err := os.ReadFile(p.path(vmm.Config))
			if err != nil {
				t.Fatal(err)
			}
			p.write(t, vmm.Config, []byte(strings.Replace(string(b), `"devices": [`, `"devices": [ {"name": "extra", "size": 5},`, 1)))
			p.write(t, "extra", []byte("extra"))
		}, "device extra is not part"},
		"unsigned": {func(t *testing.T, p *signedPackage) {
			if err := os.Remove(filepath.Join(p.dir, signature.File)); err != nil {
				t.Fatal(err)
			}
		}, "has no signature"},
		"a stranger's": {func(t *testing.T, p *signedPackage) {
			p.change(t, vmm.Memory)
			stranger, _ := newSigningKey(t)
			p.sign(t, stranger)
		}, "none of the keys"},
		"another package's": {func(t *testing.T, p *signedPackage) {
			other := newSignedPackage(t)
			other.sign(t, p.key)
			if err := os.Rename(filepath.Join(other.dir, signature.File), filepath.Join(p.dir, signature.File)); err != nil {
				t.Fatal(err)
			}
		}, "is not what was signed"},
		"forged content ids": {func(t *testing.T, p *signedPackage) { p.forgeContents(t, vmm.Memory) }, "device memory is not what was signed"},
		"a file of others": {func(t *testing.T, p *signedPackage) {
			if err := os.Chmod(p.path(vmm.Disk), 0o666); err != nil {
				t.Fatal(err)
			}
		}, "others than its owner can write"},
	} {
		t.Run(what, func(t *testing.T) {
			p := newSignedPackage(t)
			tt.attack(t, p)
			for _, dir := range []string{filepath.Join(t.TempDir(), "instance"), ""} {
				if err := p.resume(t, dir, p.verifier(t)); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("instance %q: %v, want %q", dir, err, tt.want)
				}
			}
			if err := p.resume(t, filepath.Join(t.TempDir(), "instance"), nil); err == nil || !strings.Contains(err.Error(), accepted) {
				t.Errorf("without keys: %v", err)
			}
		})
	}
}

// forgeContents changes a device, and puts a file beside it that says, for just that file at just that time, that it is as it was: see [block.FileContents].
func (p *signedPackage) forgeContents(t *testing.T, name string) {
	t.Helper()
	before := p.contents(t)[name]
	p.change(t, name)
	var st unix.Stat_t
	if err := unix.Stat(p.path(name), &st); err != nil {
		t.Fatal(err)
	}
	b := append([]byte("DrafterC"), 1, 0, 0, 0, 0, 0, 0, 0)
	for _, n := range []uint64{uint64(st.Size), uint64(st.Mtim.Nano()), uint64(st.Ctim.Nano()), st.Ino} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	for _, id := range before.Blocks {
		b = append(b, id[:]...)
	}
	sum := blake3.Sum256(b)
	if err := os.WriteFile(filepath.Join(p.dir, "."+vmm.PackageFile(name)+".contents"), append(b, sum[:]...), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := block.FileContents(t.Context(), p.path(name)); err != nil || c.Device != before.Device {
		t.Fatalf("the forgery is none: %v", err)
	}
}

// serve serves a package and returns what connects with it.
func (p *signedPackage) serve(t *testing.T) migrate.Dial {
	t.Helper()
	devices, err := registry.PackageDevices(p.dir)
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

// A package that is pulled from a registry is the signed one before anything of it is used, and its signature is kept for the next start.
func TestVerifiedPull(t *testing.T) {
	for what, tt := range map[string]struct {
		attack func(t *testing.T, p *signedPackage)
		want   string
	}{
		"as signed":          {func(*testing.T, *signedPackage) {}, accepted},
		"changed":            {func(t *testing.T, p *signedPackage) { p.change(t, vmm.State) }, "device state is not what was signed"},
		"forged content ids": {func(t *testing.T, p *signedPackage) { p.forgeContents(t, vmm.State) }, "block 0 is not what the package says"},
		"unsigned": {func(t *testing.T, p *signedPackage) {
			if err := os.Remove(filepath.Join(p.dir, signature.File)); err != nil {
				t.Fatal(err)
			}
		}, "has no signature"},
		"a stranger's": {func(t *testing.T, p *signedPackage) {
			stranger, _ := newSigningKey(t)
			p.sign(t, stranger)
		}, "none of the keys"},
	} {
		t.Run(what, func(t *testing.T) {
			p := newSignedPackage(t)
			tt.attack(t, p)
			pkg, dir := filepath.Join(t.TempDir(), "pulled"), filepath.Join(t.TempDir(), "instance")
			origin, err := migrate.OpenPackage(t.Context(), p.serve(t), migrate.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			pulling := newPeer(t, Config{Derive: func(names []string) ([]Device, error) { return NewPackageDevices(names, pkg, dir), nil }, Verifier: p.verifier(t)})
			err = pulling.Pull(t.Context(), origin)
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
		attack func(t *testing.T, p *signedPackage, m *wire.Manifest)
		base   bool // whether the package is here
		want   string
	}{
		"as signed, with its bases":    {nil, true, ""},
		"as signed, without its bases": {nil, false, ""},
		"another config": {func(_ *testing.T, _ *signedPackage, m *wire.Manifest) {
			m.Config = []byte(strings.Replace(string(m.Config), "pc-q35-7.2", "pc-q35-7.2,initrd=/etc/shadow", 1))
		}, true, "device config is not what was signed"},
		"no config": {func(_ *testing.T, _ *signedPackage, m *wire.Manifest) { m.Config = nil }, true, "device config is not what was signed"},
		"a base that is another": {func(t *testing.T, p *signedPackage, m *wire.Manifest) {
			p.change(t, vmm.Disk)
			for i := range m.Devices {
				if m.Devices[i].Name == vmm.Disk {
					m.Devices[i].Base = p.contents(t)[vmm.Disk].Device
				}
			}
		}, true, "device disk is not what was signed"},
		"a base with forged content ids":  {func(t *testing.T, p *signedPackage, _ *wire.Manifest) { p.forgeContents(t, vmm.Disk) }, true, "device disk is not what was signed"},
		"unsigned":                        {func(t *testing.T, _ *signedPackage, m *wire.Manifest) { m.Signature = nil }, false, "has no signature"},
		"unsigned, with the package here": {func(t *testing.T, _ *signedPackage, m *wire.Manifest) { m.Signature = nil }, true, ""},
		"a stranger's": {func(t *testing.T, p *signedPackage, m *wire.Manifest) {
			stranger, _ := newSigningKey(t)
			p.sign(t, stranger)
			m.Signature, _ = signature.Beside(p.path(vmm.Config))
		}, false, "none of the keys"},
		"another kernel": {func(t *testing.T, _ *signedPackage, m *wire.Manifest) { m.Processor = []byte("another kernel") }, false, "device kernel is not what was signed"},
	} {
		t.Run(what, func(t *testing.T) {
			p := newSignedPackage(t)
			m := wire.Manifest{}
			var err error
			if m.Config, err = os.ReadFile(p.path(vmm.Config)); err != nil {
				t.Fatal(err)
			}
			if m.Signature, err = signature.Beside(p.path(vmm.Config)); err != nil {
				t.Fatal(err)
			}
			kernel, err := os.ReadFile(p.path(vmm.Kernel))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory} {
				c := p.contents(t)[name]
				m.Devices = append(m.Devices, wire.Device{Name: name, Size: c.Size, BlockSize: block.ContentBlockSize, Base: c.Device})
			}
			if tt.attack != nil {
				tt.attack(t, p, &m)
			}
			if string(m.Processor) == "another kernel" {
				copy(kernel, m.Processor)
			}
			pkg := p.dir
			if !tt.base {
				pkg = filepath.Join(t.TempDir(), "nowhere")
			}
			a := &arrival{p: newPeer(t, Config{Verifier: p.verifier(t), Devices: NewPackageDevices([]string{vmm.Config, vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory}, pkg, filepath.Join(t.TempDir(), "instance"))})}
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
				if in := a.p.devices[vmm.Kernel].Incoming; !tt.base {
					missing := block.NewBitmap(int64(len(kernel)) / block.PageSize)
					missing.SetRange(0, missing.Len())
					in.Open(missing, func(int64, int64) {}, nil)
					if _, err := in.Arrive(kernel, 0); err != nil {
						return err
					}
				}
				return a.verifyKernel(t.Context())
			}()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}
