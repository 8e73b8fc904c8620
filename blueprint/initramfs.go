package blueprint

import (
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"

	"drafter/internal/guest"
)

// modules are what a VM needs before its root file system is mounted, and what makes its agent
// reachable. ext4 is built in.
var modules = []string{"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "vmw_vsock_virtio_transport"}

// buildInitramfs writes a cpio archive with drafter-guest as its init and the kernel modules below
// dir, in the order to load them. It is not compressed: unpacking costs an emulated CPU more than
// reading.
func buildInitramfs(dir, guestBinary, output string) error {
	binary, err := readStatic(guestBinary)
	if err != nil {
		return err
	}
	files, err := resolveModules(dir, modules)
	if err != nil {
		return err
	}
	var list strings.Builder
	records := []cpio.Record{
		cpio.Directory("dev", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1), // the kernel opens it before init runs
		cpio.Directory("etc", 0o755),
		cpio.Directory("proc", 0o755),
		cpio.Directory("sys", 0o755),
		cpio.Directory("root", 0o755),
		cpio.Directory("modules", 0o755),
		cpio.StaticFile("init", string(binary), 0o755),
	}
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("read module: %w", err)
		}
		name := "modules/" + filepath.Base(f)
		records = append(records, cpio.StaticFile(name, string(content), 0o644))
		fmt.Fprintf(&list, "/%s\n", name)
	}
	records = append(records, cpio.StaticFile(strings.TrimPrefix(guest.ModuleList, "/"), list.String(), 0o644))
	cpio.MakeAllReproducible(records)
	return writeFile(output, func(w io.Writer) error {
		archive := cpio.Newc.Writer(w)
		if err := cpio.WriteRecords(archive, records); err != nil {
			return err
		}
		return cpio.WriteTrailer(archive)
	})
}

// readStatic reads a program, and refuses one that needs a dynamic linker, because the initramfs
// has none.
func readStatic(path string) ([]byte, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read drafter-guest: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is dynamically linked; build it with CGO_ENABLED=0", path)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read drafter-guest: %w", err)
	}
	return b, nil
}

// resolveModules returns the files of the named kernel modules and of all they depend on,
// dependencies first.
func resolveModules(dir string, names []string) ([]string, error) {
	byName := map[string]string{}
	err := filepath.WalkDir(filepath.Join(dir, "lib/modules"), func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := strings.CutSuffix(d.Name(), ".ko"); ok && d.Type().IsRegular() {
			byName[moduleName(name)] = path
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find kernel modules: %w", err)
	}
	var ordered []string
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		name = moduleName(name)
		if seen[name] {
			return nil
		}
		seen[name] = true
		path, ok := byName[name]
		if !ok {
			return fmt.Errorf("kernel module %s is not in the kernel package", name)
		}
		depends, err := moduleDepends(path)
		if err != nil {
			return err
		}
		for _, d := range depends {
			if err := visit(d); err != nil {
				return err
			}
		}
		ordered = append(ordered, path)
		return nil
	}
	for _, n := range names {
		if err := visit(n); err != nil {
			return nil, err
		}
	}
	return ordered, nil
}

// moduleName folds the two spellings of a module's name.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// moduleDepends reads the depends= entry of a module's .modinfo section, from which depmod makes
// modules.dep.
func moduleDepends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("module %s has no .modinfo section", path)
	}
	info, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	for _, entry := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
