package vmm

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"drafter/internal/private"
)

// CheckKernel refuses a file that no VMM here can boot: it must be an ELF kernel for this
// architecture or, on amd64, a bzImage.
func CheckKernel(path string) (err error) {
	f, err := private.Open(path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	image, err := elf.NewFile(f)
	if err != nil {
		if runtime.GOARCH == "amd64" && isBzImage(f) {
			return nil
		}
		return fmt.Errorf("%s is no kernel: it is neither an ELF file nor a bzImage; make one with 'drafter blueprint os'", path)
	}
	want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	if image.Machine != want {
		return fmt.Errorf("%s is a kernel for another architecture: %s instead of %s", path, image.Machine, want)
	}
	return nil
}

// isBzImage looks for the header of the x86 boot protocol (Documentation/arch/x86/boot.rst of
// Linux: "HdrS" at 0x202).
func isBzImage(f io.ReaderAt) bool {
	magic := make([]byte, 4)
	_, err := f.ReadAt(magic, 0x202)
	return err == nil && string(magic) == "HdrS"
}
