package inject

import "golang.org/x/sys/unix"

// instruction is SYSCALL; it may begin at any byte.
var instruction = []byte{0x0f, 0x05}

const instructionAlign = 1

// registers are those of a stopped thread.
type registers unix.PtraceRegs

func (r *registers) get(pid int) error { return unix.PtraceGetRegs(pid, (*unix.PtraceRegs)(r)) }
func (r *registers) set(pid int) error { return unix.PtraceSetRegs(pid, (*unix.PtraceRegs)(r)) }

// call makes them those before a system call (syscall(2)). The thread is in none, so the kernel
// restarts none.
func (r *registers) call(entry, number uint64, args [6]uint64) {
	r.Rip, r.Rax, r.Orig_rax = entry, number, ^uint64(0)
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = args[0], args[1], args[2], args[3], args[4], args[5]
}

func (r *registers) result() uint64 { return r.Rax }
