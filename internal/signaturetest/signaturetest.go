// Package signaturetest makes small packages that are signed, and attacks on them, for tests.
package signaturetest

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"drafter/internal/block"
	"drafter/signature"
	"drafter/vmm"
)

// Package is a package that a key has signed. It can be opened, but not started: its state device
// is none.
type Package struct {
	Dir      string
	Key, Pub string // files with the private and the public key
}

// New makes a package in a directory of its own, and its signature with a key of its own.
func New(t *testing.T) *Package {
	t.Helper()
	p := &Package{Dir: filepath.Join(t.TempDir(), "package")}
	p.Key, p.Pub = NewKey(t)
	config := vmm.PackageConfig{
		Version: vmm.PackageVersion, ID: uuid.NewString(), Created: time.Now().UTC(), Architecture: runtime.GOARCH, CPUs: 1,
		Hardware: vmm.Hardware{VMM: "qemu", Version: "7.2.22", Machine: "pc-q35-7.2", CPU: "qemu64", Accel: vmm.AccelTCG},
	}
	if err := os.Mkdir(p.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory} {
		content := make([]byte, 1<<20)
		copy(content, name)
		config.Devices = append(config.Devices, vmm.PackageDevice{Name: name, Size: int64(len(content))})
		p.Write(t, name, content)
	}
	b, err := config.Encode()
	if err != nil {
		t.Fatal(err)
	}
	p.Write(t, vmm.Config, b)
	p.Sign(t, p.Key)
	return p
}

// NewKey makes a pair of Ed25519 keys and returns their files.
func NewKey(t *testing.T) (private, public string) {
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

// Path is the file of a device.
func (p *Package) Path(name string) string {
	return filepath.Join(p.Dir, vmm.PackageFile(name))
}

// Write replaces a device.
func (p *Package) Write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(p.Path(name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Change changes a byte of a device.
func (p *Package) Change(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(p.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	b[100] ^= 1
	p.Write(t, name, b)
}

// Contents are those of the devices.
func (p *Package) Contents(t *testing.T) map[string]*block.Contents {
	t.Helper()
	contents := map[string]*block.Contents{}
	for _, name := range []string{vmm.Kernel, vmm.Disk, vmm.State, vmm.Memory, vmm.Config} {
		var err error
		if contents[name], err = block.HashFile(t.Context(), p.Path(name)); err != nil {
			t.Fatal(err)
		}
	}
	return contents
}

// Sign signs the package as it is.
func (p *Package) Sign(t *testing.T, keyFile string) {
	t.Helper()
	key, err := signature.ReadPrivateKey(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	var devices []signature.Device
	for name, c := range p.Contents(t) {
		devices = append(devices, signature.Device{Name: name, Size: c.Size, Content: c.Device.String()})
	}
	envelope, err := signature.Sign(signature.NewStatement(devices), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(p.Dir, signature.File), envelope, 0o600); err != nil {
		t.Fatal(err)
	}
}

// ForgeContents changes a device, and puts a file beside it that says, for just that file at just
// that time, that it is as it was: see [block.FileContents].
func (p *Package) ForgeContents(t *testing.T, name string) {
	t.Helper()
	before := p.Contents(t)[name]
	p.Change(t, name)
	var st unix.Stat_t
	if err := unix.Stat(p.Path(name), &st); err != nil {
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
	if err := os.WriteFile(filepath.Join(p.Dir, "."+vmm.PackageFile(name)+".contents"), append(b, sum[:]...), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := block.FileContents(t.Context(), p.Path(name)); err != nil || c.Device != before.Device {
		t.Fatalf("the forgery is none: %v", err)
	}
}
