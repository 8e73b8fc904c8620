package inject

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const sysinfoEHDR = 33 // AT_SYSINFO_EHDR of getauxval(3): where the vDSO is

// systemCall returns the address of an instruction in a process that makes a system call.
func systemCall(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	if err != nil {
		return 0, err
	}
	var vdso uint64
	for ; len(b) >= 16; b = b[16:] {
		if binary.NativeEndian.Uint64(b) == sysinfoEHDR {
			vdso = binary.NativeEndian.Uint64(b[8:])
		}
	}
	if vdso == 0 {
		return 0, errors.New("it has no vDSO (the kernel's parameter vdso=0 takes it away)")
	}
	code := make([]byte, 2*os.Getpagesize())
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &code[0], Len: uint64(len(code))}}, remotePages(vdso, len(code)), 0)
	if err != nil {
		return 0, fmt.Errorf("read its vDSO: %w", err)
	}
	for at := 0; ; at++ {
		next := bytes.Index(code[at:n], instruction)
		if next < 0 {
			return 0, errors.New("its vDSO has no system call")
		}
		if at += next; at%instructionAlign == 0 {
			return vdso + uint64(at), nil
		}
	}
}

// remotePages lists the pages of a range, so that those are read which are there.
func remotePages(start uint64, length int) (list []unix.RemoteIovec) {
	page := os.Getpagesize()
	for off := 0; off < length; off += page {
		list = append(list, unix.RemoteIovec{Base: uintptr(start) + uintptr(off), Len: page})
	}
	return list
}
