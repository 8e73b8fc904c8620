package vmm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"drafter/internal/lockfile"
	"drafter/internal/rundir"
)

// UserRange is a range of user ids. Each VM gets one of them, and the group of the same number. The
// zero value stands for [DefaultUsers].
type UserRange struct {
	First uint32 // 0 with a count of 1: VMs run as root
	Count uint32
}

// DefaultUsers lies between the ids that systemd knows of
// (https://systemd.io/UIDS-GIDS: above those of containers, below the foreign ones).
var DefaultUsers = UserRange{First: 1900000000, Count: 1 << 16}

// String is FIRST-LAST.
func (r UserRange) String() string {
	if r.Count == 0 {
		r = DefaultUsers
	}
	return fmt.Sprintf("%d-%d", r.First, r.First+r.Count-1)
}

// Set parses what String gives.
func (r *UserRange) Set(s string) error {
	low, high, _ := strings.Cut(s, "-")
	first, err := strconv.ParseUint(low, 10, 32)
	last, lerr := strconv.ParseUint(high, 10, 32)
	if err != nil || lerr != nil || last < first || last >= 1<<32-1 || first == 0 && last > 0 {
		return errors.New("it is no range of user ids; write it as 1900000000-1900065535, or 0-0 to run VMs as root")
	}
	*r = UserRange{uint32(first), uint32(last - first + 1)}
	return nil
}

// Type is what --help calls it.
func (r *UserRange) Type() string { return "range" }

// has tells whether a user is one of the range.
func (r UserRange) has(uid uint32) bool { return uid >= r.First && uid-r.First < r.Count }

// User is a user id that a VM has for itself, until Close or the end of this process.
type User struct {
	ID   int // also of its group
	lock *lockfile.Lock
}

// ClaimUser takes a user of the range that no other VM of this host has. It returns nil for root.
func ClaimUser(r UserRange) (*User, error) {
	if r.Count == 0 {
		r = DefaultUsers
	}
	if r.First == 0 {
		return nil, nil
	}
	if err := rundir.Sweep("users"); err != nil {
		return nil, fmt.Errorf("claim a user for the VM: %w", err)
	}
	// The search begins at a random place, so that a user is not soon another VM's.
	start := rand.Uint32N(r.Count)
	for i := range r.Count {
		id := r.First + (start+i)%r.Count
		lock, err := rundir.Lock(fmt.Sprintf("users/%d", id))
		var held *lockfile.HeldError
		if errors.As(err, &held) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("claim a user for the VM: %w", err)
		}
		return &User{int(id), lock}, nil
	}
	return nil, fmt.Errorf("all %d users of VMs are in use; pass a larger --uid-range", r.Count)
}

// Close gives the user back. The VMM must have ended. Close of nil does nothing.
func (u *User) Close() error {
	if u == nil || u.lock == nil {
		return nil
	}
	err := errors.Join(u.lock.Release(), rundir.Remove())
	u.lock = nil
	return err
}
