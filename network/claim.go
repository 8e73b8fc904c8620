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
)

// runDir holds locks and records of what lives on this host. A lock is held with flock(2), so it ends with its process.
const runDir = "/run/drafter"

// netnsDir is where named network namespaces are (ip-netns(8)).
const netnsDir = "/run/netns"

// Claim is the exclusive use of a network namespace by one VM. It ends with Close, or with the process.
type Claim struct{ lock *os.File }

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
	lock, holder, err := tryLock(claimPath(name))
	if err != nil {
		return nil, fmt.Errorf("claim network namespace %q: %w", name, err)
	}
	if lock == nil {
		return nil, fmt.Errorf("network namespace %q is in use by %s; choose another --netns, or end that process", name, holder)
	}
	return &Claim{lock}, nil
}

func claimPath(name string) string { return filepath.Join(runDir, "netns", name+".lock") }

// Close gives the namespace back. The lock file stays: removing it would let two processes lock different files of one name.
func (c *Claim) Close() error {
	if c.lock == nil {
		return nil
	}
	return c.lock.Close()
}

// checkNamespaceName keeps names inside netnsDir.
func checkNamespaceName(name string) error {
	if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." || len(name) > 64 {
		return fmt.Errorf("network namespace name %q is not valid", name)
	}
	return nil
}

// tryLock locks path for this process and writes its name there. When another process holds the lock, the file is nil and holder says who.
func tryLock(path string) (lock *os.File, holder string, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, "", err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, "", err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, "", errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		b := make([]byte, 256)
		n, _ := f.ReadAt(b, 0) // a short read is what we expect
		if holder = strings.TrimSpace(string(b[:n])); holder == "" {
			holder = "another process"
		}
		return nil, holder, f.Close()
	}
	who := fmt.Sprintf("process %d (%s)\n", os.Getpid(), filepath.Base(os.Args[0]))
	if _, err := f.WriteAt([]byte(who), 0); err != nil {
		return nil, "", errors.Join(err, f.Close())
	}
	if err := f.Truncate(int64(len(who))); err != nil {
		return nil, "", errors.Join(err, f.Close())
	}
	return f, "", nil
}
