package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"

	"drafter/internal/kind"
	"drafter/vmm"
)

// oldest is the first release with the diff snapshots and the handshake that this driver needs.
var oldest = vmm.Version{Major: 1, Minor: 14, Micro: 1}

var templateForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,63}$`)

// installedVersion asks a binary for its version, and refuses versions that do not work.
func installedVersion(ctx context.Context, path string) (vmm.Version, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return vmm.Version{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	v, err := vmm.ParseVersion(string(out))
	if err != nil {
		return v, fmt.Errorf("ask %s for its version: it does not look like Firecracker: %w", path, err)
	}
	return v, supported(v)
}

// Installed implements [vmm.Installed].
func (d Driver) Installed(ctx context.Context) (vmm.Version, error) {
	bin, _, err := d.programs()
	if err != nil {
		return vmm.Version{}, err
	}
	return installedVersion(ctx, bin)
}

func supported(v vmm.Version) error {
	switch {
	case v.Before(oldest):
		return fmt.Errorf("firecracker %s is too old: snapshots of more than 3 GiB are corrupt before %s; install a newer one, or name it with --firecracker-bin", v, oldest)
	case v == vmm.Version{Major: 1, Minor: 16, Micro: 0}:
		return errors.New("firecracker 1.16.0 loses vsock when a snapshot is restored; install 1.16.1 or later, or name another one with --firecracker-bin")
	}
	return nil
}

// compatible refuses state that this Firecracker would refuse, or misread. A state is read by the
// release that wrote it, and by newer ones.
func compatible(recorded vmm.Hardware, have vmm.Version) error {
	if recorded.VMM != vmm.VMMFirecracker {
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("the package was made with %s, it cannot be resumed with Firecracker", recorded.VMM))
	}
	if recorded.Machine != machine && recorded.Machine != machineHuge {
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("machine %.80q is not one that this program makes", recorded.Machine))
	}
	if !templateForm.MatchString(recorded.CPU) {
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("CPU template %.80q is not a name", recorded.CPU))
	}
	want, err := vmm.ParseVersion(recorded.Version)
	if err != nil {
		return err
	}
	if have.ReleasedBefore(want) {
		return kind.Of(vmm.ErrIncompatible, fmt.Errorf("the package was made with Firecracker %s, this host has the older %s; upgrade it here, or make the package with the older one", want, have))
	}
	return nil
}
