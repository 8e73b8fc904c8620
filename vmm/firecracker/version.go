package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"

	"drafter/vmm"
)

type version struct{ major, minor, micro int }

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v.major, v.minor, v.micro) }

func (v version) before(w version) bool {
	if v.major != w.major {
		return v.major < w.major
	}
	if v.minor != w.minor {
		return v.minor < w.minor
	}
	return v.micro < w.micro
}

// oldest is the first release whose diff snapshots and handshake are as this driver needs them.
var oldest = version{1, 14, 1}

var templateForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,63}$`)

var versionPattern = regexp.MustCompile(`\bv?(\d+)\.(\d+)\.(\d+)`)

func parseVersion(s string) (v version, err error) {
	m := versionPattern.FindStringSubmatch(s)
	if m == nil {
		return v, fmt.Errorf("version %q is malformed", s)
	}
	for i, to := range []*int{&v.major, &v.minor, &v.micro} {
		if *to, err = strconv.Atoi(m[i+1]); err != nil {
			return v, fmt.Errorf("version %q is malformed: %w", s, err)
		}
	}
	return v, nil
}

// installedVersion asks a binary for its version, and refuses those that do not work.
func installedVersion(ctx context.Context, path string) (version, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return version{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	v, err := parseVersion(string(out))
	if err != nil {
		return v, fmt.Errorf("ask %s for its version: it does not look like Firecracker: %w", path, err)
	}
	return v, supported(v)
}

func supported(v version) error {
	switch {
	case v.before(oldest):
		return fmt.Errorf("firecracker %s is too old: snapshots of more than 3 GiB are corrupt before %s; install a newer one, or name it with --firecracker-bin", v, oldest)
	case v == version{1, 16, 0}:
		return errors.New("firecracker 1.16.0 loses vsock when a snapshot is restored; install 1.16.1 or later, or name another one with --firecracker-bin")
	}
	return nil
}

// compatible refuses state that this Firecracker would refuse, or misread: a state is read by the release that wrote it and by newer ones.
func compatible(recorded vmm.Hardware, have version) error {
	if recorded.VMM != vmm.VMMFirecracker {
		return fmt.Errorf("the package was made with %s, it cannot be resumed with Firecracker", recorded.VMM)
	}
	if recorded.Machine != machine && recorded.Machine != machineHuge {
		return fmt.Errorf("machine %.80q is not one that this program makes", recorded.Machine)
	}
	if !templateForm.MatchString(recorded.CPU) {
		return fmt.Errorf("CPU template %.80q is not a name", recorded.CPU)
	}
	want, err := parseVersion(recorded.Version)
	if err != nil {
		return err
	}
	if have.major < want.major || have.major == want.major && have.minor < want.minor {
		return fmt.Errorf("the package was made with Firecracker %s, this host has the older %s; upgrade it here, or make the package with the older one", want, have)
	}
	return nil
}
