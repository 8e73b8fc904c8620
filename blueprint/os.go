package blueprint

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"drafter/internal/newfile"
	"drafter/internal/scratch"
)

// OSConfig says what to build an OS blueprint from.
type OSConfig struct {
	Output string // directory for vmlinux, initrd and rootfs.ext4

	// Guest is the path of a static drafter-guest binary.
	Guest string
	// Kernel is the Debian package of the kernel, such as linux-image-cloud-amd64.
	Kernel string
	// Packages are further Debian packages for the root file system, with their dependencies.
	Packages []string
	// Size of the root file system in bytes; 0: its content and 256 MiB.
	Size int64
	// Cache keeps downloaded packages; "" for a temporary directory.
	Cache string

	Progress Progress
	Logger   *slog.Logger // nil: slog.Default()
}

// DefaultKernel is Debian's kernel for virtual machines.
const DefaultKernel = "linux-image-cloud-amd64"

// rootPackages make the OS: an OCI runtime, and a shell with the usual tools.
var rootPackages = []string{"crun", "busybox-static"}

const defaultRootFree = 256 << 20

// BuildOS makes an OS blueprint. It needs root, apt and dpkg. Files get their names only once they
// are complete.
func BuildOS(ctx context.Context, c OSConfig) (err error) {
	if c.Kernel == "" {
		c.Kernel = DefaultKernel
	}
	work, err := scratch.New(os.TempDir(), "drafter-blueprint-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, work.Close()) }()
	if c.Cache == "" {
		c.Cache = work.Path("cache")
	}
	kernelDeb, err := fetchKernel(ctx, c.Cache, c.Kernel, c.Logger)
	if err != nil {
		return fmt.Errorf("download kernel: %w", err)
	}
	kernel := work.Path("kernel")
	if err := unpackPackages(ctx, kernel, []string{kernelDeb}, nil); err != nil {
		return err
	}
	if err := buildKernel(kernel, filepath.Join(c.Output, "vmlinux")); err != nil {
		return err
	}
	if err := buildInitramfs(kernel, c.Guest, filepath.Join(c.Output, "initrd")); err != nil {
		return err
	}
	root := work.Path("root")
	if err := buildRoot(ctx, root, c); err != nil {
		return err
	}
	return MakeExt4(ctx, Ext4Config{Source: root, Output: filepath.Join(c.Output, "rootfs.ext4"), Label: "drafter-os", Size: c.Size, Free: defaultRootFree, Progress: c.Progress})
}

// buildKernel extracts the one kernel below dir.
func buildKernel(dir, output string) error {
	images, err := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return fmt.Errorf("find kernel: the package holds %d kernels", len(images))
	}
	return writeFile(output, func(w io.Writer) error {
		image, err := os.ReadFile(images[0])
		if err != nil {
			return err
		}
		return ExtractKernel(w, image)
	})
}

// buildRoot lays out the root file system.
func buildRoot(ctx context.Context, root string, c OSConfig) error {
	packages := slices.Concat(rootPackages, c.Packages)
	if err := UnpackDebian(ctx, root, c.Cache, c.Progress, c.Logger, packages...); err != nil {
		return err
	}
	for _, dir := range []string{"dev", "etc", "proc", "run", "sys", "tmp", "root", "var"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, dir := range []string{"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/info"} {
		if err := os.RemoveAll(filepath.Join(root, dir)); err != nil {
			return err
		}
	}
	if err := linkApplets(ctx, root); err != nil {
		return err
	}
	if err := installGuest(root, c.Guest); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etc/hostname":   "drafter\n",
		"etc/passwd":     "root:x:0:0:root:/root:/bin/sh\n",
		"etc/group":      "root:x:0:\ntty:x:5:\n",
		"etc/os-release": "NAME=\"Drafter OS\"\nID=drafter\nID_LIKE=debian\nPRETTY_NAME=\"Drafter OS\"\n",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(
		os.Symlink("../run/resolv.conf", filepath.Join(root, "etc/resolv.conf")),
		os.Symlink("../run/hosts", filepath.Join(root, "etc/hosts")))
}

// installGuest makes drafter-guest the init, and links it under its other names.
func installGuest(root, guest string) error {
	binary, err := readStatic(guest)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, "usr/bin/drafter-guest"), binary, 0o755); err != nil {
		return err
	}
	for _, link := range []string{"usr/sbin/init", "usr/bin/drafter-agent", "usr/bin/drafter-liveness"} {
		path := filepath.Join(root, link)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Symlink("/usr/bin/drafter-guest", path); err != nil {
			return err
		}
	}
	return nil
}

// linkApplets links busybox under the names of its tools, unless a package has a program of that
// name.
func linkApplets(ctx context.Context, root string) error {
	list, err := runTool(ctx, "", filepath.Join(root, "bin/busybox"), "--list-full")
	if err != nil {
		return fmt.Errorf("list busybox tools: %w", err)
	}
	for _, applet := range strings.Fields(string(list)) {
		path := filepath.Join(root, applet)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Symlink("/bin/busybox", path); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// writeFile makes a file with the output of write. It gets its name only once it is complete and
// durable.
func writeFile(path string, write func(io.Writer) error) error {
	f, err := newfile.Create(path)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := write(f); err != nil {
		return errors.Join(noRoom(fmt.Errorf("write %s: %w", path, err), filepath.Dir(path), outputRemedy), f.Discard())
	}
	if err := f.Publish(); err != nil {
		return noRoom(fmt.Errorf("write %s: %w", path, err), filepath.Dir(path), outputRemedy)
	}
	return nil
}
