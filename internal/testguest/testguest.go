// Package testguest is a guest that needs no operating system, for tests and measurements: it
// changes memory at a set rate, checks all of it again and again, and ticks on its console. Its
// source is testdata/guest.c.
package testguest

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed testdata/guest.c
var source []byte

// Build compiles the guest, an ELF kernel, to path. It needs gcc.
func Build(path string) error { return build(path) }

// BuildForQEMU is [Build] for QEMU, which starts kernels in another way.
func BuildForQEMU(path string) error { return build(path, "-DPVH") }

func build(path string, flags ...string) error {
	gcc := exec.Command("gcc", append(flags, "-x", "c", "-O2", "-ffreestanding", "-fno-pic", "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none",
		"-nostdlib", "-static", "-no-pie", "-Wl,-Ttext-segment=0x200000,-e,entry,--build-id=none,-z,noexecstack", "-o", path, "-")...)
	gcc.Stdin = bytes.NewReader(source)
	if out, err := gcc.CombinedOutput(); err != nil {
		return fmt.Errorf("build test guest: %w: %s", err, out)
	}
	return nil
}

// Options say what the guest does.
type Options struct {
	ResidentMiB int  // memory that it fills, from 16 MiB on; at most 900
	Rate        int  // pages it changes in a second
	Hot         int  // permille of the pages that are changed at all; 0: all
	Sequence    bool // changes them in sequence, not at random
	Words       int  // of each page that hold the pattern, a power of two up to 512; 0: all
}

// Affordable is a value for Words: all, but the given number where KVM emulates a guest's
// instructions, as PVM does with those of a guest that does not know it.
func Affordable(words int) int {
	if _, err := os.Stat("/sys/module/kvm_pvm"); err == nil {
		return words
	}
	return 0
}

// Arguments is the guest's kernel command line.
func (o Options) Arguments() (string, error) {
	khz, err := cyclesPerMillisecond()
	if err != nil {
		return "", err
	}
	order := 0
	if o.Sequence {
		order = 1
	}
	if o.Hot == 0 {
		o.Hot = 1000
	}
	if o.Words == 0 {
		o.Words = 512
	}
	return fmt.Sprintf("tsc_khz=%d resident=%d rate=%d hot=%d order=%d words=%d", khz, o.ResidentMiB, o.Rate, o.Hot, order, o.Words), nil
}

// cyclesPerMillisecond measures the time stamp counter's frequency, as guests see it.
func cyclesPerMillisecond() (int64, error) {
	var begin, end unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &begin); err != nil {
		return 0, err
	}
	from := cycles()
	time.Sleep(50 * time.Millisecond)
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &end); err != nil {
		return 0, err
	}
	return int64(float64(cycles()-from) * 1e6 / float64(end.Nano()-begin.Nano())), nil
}

// Ready is what the guest's console shows once memory is filled.
const Ready = "r\n"

// Console is what a guest has said.
type Console struct {
	First, Last int64 // ticks; none: 0, -1
	Passes      int64 // checks of all memory since the first tick here
	Stalls      [16]int64
	Repeated    int // characters that came twice, see [Parse]
}

// Parse reads a console's output. It fails when the guest has found a page that is not as it should
// be, when a tick is missing or came twice, and when there is anything else. A character that comes
// twice in a row is one: Firecracker, when it is paused while a vCPU is in the middle of an output,
// repeats it after a restore. The first line may be cut, of a guest that was resumed in the middle
// of it, and so may the last.
func Parse(output []byte) (c Console, err error) {
	c.Last = -1
	text := string(output)
	if i := strings.LastIndexByte(text, '\n'); i >= 0 {
		text = text[:i]
	} else {
		return c, errors.New("the guest said nothing")
	}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSuffix(line, "\r")
		if line == "" || line == "r" {
			continue
		}
		words, ok := fields(line)
		if !ok {
			if words, ok = c.repeated(line); ok {
				c.Repeated++
			} else if i == 0 {
				continue
			} else {
				return c, fmt.Errorf("the guest said %q", line)
			}
		}
		switch line[0] {
		case 'b':
			return c, fmt.Errorf("page %d is damaged: it begins with %08x", words[0], words[1])
		case 't':
			if c.Last < 0 {
				c.First, c.Last = words[0], words[0]-1
			}
			if words[0] != c.Last+1 {
				return c, fmt.Errorf("tick %d came after tick %d", words[0], c.Last)
			}
			c.Last = words[0]
		case 'p':
			c.Passes++
			copy(c.Stalls[:], words[2:])
		}
	}
	return c, nil
}

// repeated reads a line in which one character came twice. Which one cannot be seen, but for the
// number that is due.
func (c *Console) repeated(line string) (words []int64, ok bool) {
	for j := 1; j < len(line); j++ {
		if line[j] != line[j-1] {
			continue
		}
		words, ok = fields(line[:j] + line[j+1:])
		if ok && (line[0] != 't' || c.Last < 0 || words[0] == c.Last+1) {
			return words, true
		}
	}
	return nil, false
}

// fields reads a whole line.
func fields(line string) (words []int64, ok bool) {
	n, known := map[byte]int{'t': 1, 'p': 18, 'b': 2}[line[0]]
	if !known || len(line) != 1+9*n {
		return nil, false
	}
	for i := range n {
		if line[1+9*i] != ' ' {
			return nil, false
		}
		v, err := strconv.ParseUint(line[2+9*i:10+9*i], 16, 32)
		if err != nil {
			return nil, false
		}
		words = append(words, int64(v))
	}
	return words, true
}

// WriteDisk makes an empty disk, which every package has, at path.
func WriteDisk(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(1<<20), f.Close())
}
