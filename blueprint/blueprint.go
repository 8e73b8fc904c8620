// Package blueprint makes what a VM boots from: a kernel, an initramfs and a root file system from
// Debian packages, and disks that hold an OCI runtime bundle made from an OCI image.
package blueprint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"
)

// Progress is told how far a long step is. total is 0 while unknown, and done equals total at the
// end of a step. It is called by one goroutine at a time and must not block. A nil Progress is not
// called.
type Progress func(step string, done, total int64)

func (p Progress) report(step string, done, total int64) {
	if p != nil {
		p(step, done, total)
	}
}

// toolPackages names the Debian package of each program that we run.
var toolPackages = map[string]string{"mke2fs": "e2fsprogs", "dpkg-deb": "dpkg", "apt-get": "apt"}

// runTool runs a program of the host's and returns its output. The error ends with the program's
// last words.
func runTool(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if path, err := exec.LookPath(name); err == nil {
		cmd.Path, cmd.Err = path, nil
	} else if path, serr := exec.LookPath("/usr/sbin/" + name); serr == nil {
		cmd.Path, cmd.Err = path, nil
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%s is not installed; install the package %s", name, toolPackages[name])
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("%s: %w: %s", name, err, lastLines(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// lastLines returns the last three lines of what a program said, on one line.
func lastLines(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], " | ")
}

// How to mend a full directory.
const (
	tempRemedy   = "set TMPDIR to a directory with more room"
	outputRemedy = "name another --output"
)

// noRoom adds to an error about a full file system which one it is, how large it is, and how to
// mend it. Programs that we run report such an error in words.
func noRoom(err error, dir, remedy string) error {
	if err == nil || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) && !strings.Contains(err.Error(), unix.ENOSPC.Error()) &&
		!strings.Contains(err.Error(), "No space left on device") {
		return err
	}
	var st unix.Statfs_t
	if serr := unix.Statfs(dir, &st); serr != nil {
		return errors.Join(err, serr)
	}
	size := func(blocks uint64) string { return humanize.IBytes(blocks * uint64(st.Bsize)) }
	return fmt.Errorf("%w; there is no more room in %s (%s, %s of it free): %s", err, dir, size(st.Blocks), size(st.Bavail), remedy)
}
