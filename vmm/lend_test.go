package vmm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// TestLend lends files of different owners and modes, and takes them back: by Close, and after the
// owner of the VM's directory was killed.
func TestLend(t *testing.T) {
	need.Root(t)
	base, path := t.TempDir(), filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	set := func(uid, gid int, mode os.FileMode) {
		t.Helper()
		if err := errors.Join(os.Chown(path, uid, gid), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	owner := func() uint32 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Uid
	}
	const uid, gid = 1234, 1235
	for _, tt := range []struct {
		uid, gid int
		mode     os.FileMode
		refusal  string
		lent     uint32 // the owner meanwhile
	}{
		{0, 0, 0o600, "", uid},
		{0, 0, 0o400, "mode 0400", 0},
		{0, 0, 0o666, "", 0},
		{uid, 0, 0o600, "", uid},
		{uid, 0, 0o400, "mode 0400", uid},
		{0, gid, 0o660, "", 0},
		{0, gid, 0o640, "", uid},
		{4321, 4321, 0o600, "belongs to user 4321", 4321},
		{int(DefaultUsers.First), 0, 0o600, "", uid},
	} {
		set(tt.uid, tt.gid, tt.mode)
		d, err := CreateDir(base, "test", nil)
		if err != nil {
			t.Fatal(err)
		}
		err = d.Lend(path, uid, gid, true)
		if (err == nil) != (tt.refusal == "") || err != nil && !strings.Contains(err.Error(), tt.refusal) {
			t.Errorf("%d:%d %04o: %v; want %q", tt.uid, tt.gid, tt.mode, err, tt.refusal)
		}
		if got := owner(); got != tt.lent {
			t.Errorf("%d:%d %04o: lent, it belongs to %d; want %d", tt.uid, tt.gid, tt.mode, got, tt.lent)
		}
		if err == nil && owner() == uid {
			// What its user may do to it meanwhile does not outlast the VM.
			if err := os.Chmod(path, 0o777|os.ModeSetuid); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if info, err := os.Stat(path); err != nil || tt.uid != uid && info.Mode() != tt.mode {
			t.Errorf("%d:%d %04o: taken back, its mode is %s, %v", tt.uid, tt.gid, tt.mode, info.Mode(), err)
		}
		want := uint32(tt.uid)
		if DefaultUsers.has(want) {
			want = 0
		}
		if got := owner(); got != want {
			t.Errorf("%d:%d %04o: taken back, it belongs to %d; want %d", tt.uid, tt.gid, tt.mode, got, want)
		}
	}

	set(0, 0, 0o600)
	d, err := CreateDir(base, "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Lend(path, uid, gid, true), d.lock.Abandon()); err != nil {
		t.Fatal(err)
	}
	if err := ReclaimAll(base, nil); err != nil {
		t.Fatal(err)
	}
	if got := owner(); got != 0 {
		t.Errorf("after a kill it belongs to %d", got)
	}
}
