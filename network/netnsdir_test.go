package network

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"drafter/internal/need"
	"drafter/internal/rundir"
)

// runFirst is a NAT process on a host that had no network namespace, where somebody then makes one.
func runFirst() error {
	before, err := mounts()
	if err != nil {
		return err
	}
	for _, other := range []bool{true, false} {
		n, err := StartNAT(context.Background(), testConfig())
		if err != nil {
			return err
		}
		if other {
			err = exec.Command("ip", "netns", "add", "other").Run()
		}
		if err := errors.Join(err, n.Close()); err != nil {
			return err
		}
		if other {
			if err := exec.Command("ip", "netns", "exec", "other", "true").Run(); err != nil {
				return fmt.Errorf("somebody's namespace: %w", err)
			}
			if err := exec.Command("ip", "netns", "del", "other").Run(); err != nil {
				return err
			}
		}
	}
	after, err := mounts()
	if err != nil {
		return err
	}
	if after != before {
		return fmt.Errorf("%d mounts are left behind", after-before)
	}
	if _, err := os.Stat(rundir.Path); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the directory of records is left: %w", cmp.Or(err, os.ErrExist))
	}
	return nil
}

func mounts() (int, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	return bytes.Count(b, []byte("\n")), err
}

// The first 'ip netns add' of a host, while a NAT runs, keeps it from nothing.
func TestFirstNamespace(t *testing.T) {
	need.Root(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-ec", `mount -t tmpfs tmpfs /run; exec "$0"`, self)
	cmd.Env = append(os.Environ(), "NETWORK_TEST=first")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "<nil>\n" {
		t.Errorf("%s%v", out, err)
	}
}
