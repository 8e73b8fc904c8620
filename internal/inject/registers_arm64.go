package inject

import "golang.org/x/sys/unix"

// instruction is SVC #0.
var instruction = []byte{0x01, 0x00, 0x00, 0xd4}

const instructionAlign = 4

// prstatus is the set of the general registers (NT_PRSTATUS of elf.h).
const prstatus = 1

// registers are those of a stopped thread. Before it stops, the kernel has made them those that
// restart the system call which it is in.
type registers unix.PtraceRegsArm64

func (r *registers) get(pid int) error {
	return unix.PtraceGetRegSetArm64(pid, prstatus, (*unix.PtraceRegsArm64)(r))
}

func (r *registers) set(pid int) error {
	return unix.PtraceSetRegSetArm64(pid, prstatus, (*unix.PtraceRegsArm64)(r))
}

// call makes them those before a system call (syscall(2)).
func (r *registers) call(entry, number uint64, args [6]uint64) {
	r.Pc, r.Regs[8] = entry, number
	copy(r.Regs[:6], args[:])
}

func (r *registers) result() uint64 { return r.Regs[0] }
