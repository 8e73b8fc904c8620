// Package network connects VMs: a NAT with a pool of network namespaces, claims on those, and a port forwarder. It uses tables of its own in
// nftables and leaves all others alone. IPv4 only, so far.
package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/lockfile"
)

// runDir holds locks and records of what lives on this host. A lock is held with flock(2), so it ends with its process.
const runDir = "/run/drafter"

// netnsDir is where named network namespaces are (ip-netns(8)).
const netnsDir = "/run/netns"

// Claim is the exclusive use of a network namespace by one VM. It ends with Close, or with the process.
type Claim struct{ lock *lockfile.Lock }

// ClaimNamespace claims the namespace called name for this process. The name "" stands for no namespace and is always free.
func ClaimNamespace(name string) (*Claim, error) {
	if name == "" {
		return &Claim{}, nil
	}
	if err := checkNamespaceName(name); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(netnsDir, name)); err != nil {
		return nil, fmt.Errorf("network namespace %q does not exist; start drafter nat, or create it with 'ip netns add %s'", name, name)
	}
	lock, err := lockName("netns/" + name)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil, fmt.Errorf("network namespace %q is in use by %s; choose another --netns, or end that process", name, held.Holder)
	}
	if err != nil {
		return nil, fmt.Errorf("claim network namespace %q: %w", name, err)
	}
	return &Claim{lock}, nil
}

// lockName takes the lock called name in runDir.
func lockName(name string) (*lockfile.Lock, error) {
	path := filepath.Join(runDir, name+".lock")
	for {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		lock, err := lockfile.Try(path)
		if !errors.Is(err, os.ErrNotExist) {
			return lock, err
		}
		// Another process has just removed the empty directory.
	}
}

// removeRunDir removes runDir once nothing is left in it. It may still hold what others use, or be used again this moment: neither is an error.
func removeRunDir() error {
	for _, dir := range []string{"netns", "forwarders", ""} {
		err := unix.Rmdir(filepath.Join(runDir, dir))
		if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove %s: %w", filepath.Join(runDir, dir), err)
		}
	}
	return nil
}

// Close gives the namespace back.
func (c *Claim) Close() error {
	if c.lock == nil {
		return nil
	}
	return errors.Join(c.lock.Release(), removeRunDir())
}

// checkNamespaceName keeps names inside netnsDir.
func checkNamespaceName(name string) error {
	if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." || len(name) > 64 {
		return fmt.Errorf("network namespace name %q is not valid", name)
	}
	return nil
}
