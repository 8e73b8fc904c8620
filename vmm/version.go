package vmm

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"
)

// Version is the version of a VMM's release.
type Version struct{ Major, Minor, Micro int }

var versionPattern = regexp.MustCompile(`\bv?(\d{1,9})\.(\d{1,9})\.(\d{1,9})`)

// ParseVersion finds the first version in text, such as "7.2.22" or "Firecracker v1.14.2".
func ParseVersion(text string) (v Version, err error) {
	m := versionPattern.FindStringSubmatch(text)
	if m == nil {
		return v, fmt.Errorf("version %.80q is malformed", text)
	}
	for i, to := range []*int{&v.Major, &v.Minor, &v.Micro} {
		if *to, err = strconv.Atoi(m[i+1]); err != nil {
			return v, fmt.Errorf("version %.80q is malformed: %w", text, err)
		}
	}
	return v, nil
}

// String is MAJOR.MINOR.MICRO.
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// Before tells whether v is older than w.
func (v Version) Before(w Version) bool {
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Micro, w.Micro)) < 0
}

// ReleasedBefore tells whether v is of an older release than w. Releases that differ only in Micro
// have the same features.
func (v Version) ReleasedBefore(w Version) bool {
	v.Micro, w.Micro = 0, 0
	return v.Before(w)
}
