// Package network connects VMs: a NAT with a pool of network namespaces, claims on those, and a
// port forwarder, for IPv4 and IPv6. It has nftables tables of its own, and never changes others.
package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"drafter/internal/kind"
	"drafter/internal/lockfile"
	"drafter/internal/rundir"
)

// Claim is the exclusive use of a network namespace by one VM. It ends with Close, or with the
// process.
type Claim struct {
	namespace string
	lock      *lockfile.Lock
}

// ErrInUse says that another process has a network namespace.
var ErrInUse = kind.ErrInUse

// ClaimNamespace claims the namespace called name for this process. The name "" stands for no
// namespace and is always free.
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
	for _, locks := range []string{anchorRecords, landingRecords, noticeRecords} {
		if err := rundir.Sweep(locks); err != nil {
			return nil, fmt.Errorf("claim network namespace %q: %w", name, err)
		}
	}
	if err := sweepExpected(); err != nil {
		return nil, fmt.Errorf("claim network namespace %q: %w", name, err)
	}
	lock, err := claimNamespace(name)
	var held *lockfile.HeldError
	if errors.As(err, &held) {
		return nil, kind.Of(ErrInUse, fmt.Errorf("network namespace %q is in use by %s; choose another --netns, or end that process", name, held.Holder))
	}
	if err != nil {
		return nil, fmt.Errorf("claim network namespace %q: %w", name, err)
	}
	if err := expectNobody(name); err != nil {
		return nil, errors.Join(err, lock.Release())
	}
	return &Claim{name, lock}, nil
}

// claimLocks is the directory of claims' locks.
const claimLocks = "netns"

func claimNamespace(name string) (*lockfile.Lock, error) { return rundir.Lock(claimLocks + "/" + name) }

// Close gives the namespace back. It ends the connections of the VM, which must have ended here. If
// it has left an anchor here, the connections go on where it is. Close is idempotent.
func (c *Claim) Close() error {
	if c.lock == nil {
		return nil
	}
	anchor, err := anchorOf(c.namespace)
	err = errors.Join(err, expectNobody(c.namespace))
	if anchor == nil {
		err = errors.Join(err, endAnchorsTo(c.namespace), c.Vacate())
	}
	err = errors.Join(err, c.atTap("renew the tap", func(config *NATConfig, l *layout) error { return config.renewTap(l) }))
	if anchor == nil {
		err = errors.Join(err, forgetTenant(c.namespace), c.endEgress())
	}
	err = errors.Join(err, c.lock.Release(), rundir.Remove())
	c.lock = nil
	return err
}

// checkNamespaceName keeps names inside netnsDir.
func checkNamespaceName(name string) error {
	if strings.ContainsFunc(name, func(r rune) bool { return r == '/' || !unicode.IsPrint(r) }) || name == "." || name == ".." || len(name) > 64 {
		return fmt.Errorf("network namespace name %q is not valid", name)
	}
	return nil
}
