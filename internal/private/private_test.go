package private

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

// stranger is a user who is not trusted.
const stranger = 65534

// strangers makes a directory that belongs to a stranger, beside a secret of root's.
func strangers(t *testing.T) (dir, secret string) {
	t.Helper()
	need.Root(t)
	dir = filepath.Join(t.TempDir(), "strangers")
	secret = filepath.Join(t.TempDir(), "secret")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(secret, []byte("secret"), 0o600), os.Chown(dir, stranger, stranger)); err != nil {
		t.Fatal(err)
	}
	return dir, secret
}

// link makes a symbolic link that belongs to a user.
func link(t *testing.T, uid int, target, path string) {
	t.Helper()
	if err := errors.Join(os.Symlink(target, path), os.Lchown(path, uid, uid)); err != nil {
		t.Fatal(err)
	}
}

func TestStrangersLinks(t *testing.T) {
	dir, secret := strangers(t)
	link(t, stranger, secret, filepath.Join(dir, "file"))
	link(t, stranger, filepath.Dir(secret), filepath.Join(dir, "sub"))
	link(t, stranger, filepath.Join(filepath.Dir(secret), "new"), filepath.Join(dir, "dangling"))
	uses := map[string]func(string) error{
		"open":   func(p string) error { return closed(Open(p, unix.O_RDONLY)) },
		"write":  func(p string) error { return closed(Open(p, unix.O_RDWR)) },
		"create": func(p string) error { return closed(Create(p)) },
		"lock":   func(p string) error { return closed(CreateOrOpen(p)) },
		"mkdir":  MkdirAll,
	}
	for name, use := range uses {
		for _, path := range []string{"file", "dangling", "sub/secret", "sub/new", "sub/a/b"} {
			if err := use(filepath.Join(dir, path)); err == nil {
				t.Errorf("%s %s: %v", name, path, err)
			}
		}
	}
	if err := closed(CreateTemp(filepath.Join(dir, "sub/x"))); err == nil {
		t.Error("a temporary file was made behind a stranger's link")
	}
	entries, err := os.ReadDir(filepath.Dir(secret))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the secret: %v, %v", entries, err)
	}
	if b, err := os.ReadFile(secret); err != nil || string(b) != "secret" {
		t.Errorf("the secret is %q, %v", b, err)
	}
	// The same links, made by root, lead where they lead.
	link(t, 0, secret, filepath.Join(dir, "roots"))
	link(t, 0, filepath.Dir(secret)+"/../"+filepath.Base(filepath.Dir(secret)), filepath.Join(dir, "rootsub"))
	for _, path := range []string{"roots", "rootsub/secret"} {
		f, err := Open(filepath.Join(dir, path), unix.O_RDONLY)
		if err != nil {
			t.Errorf("root's link %s: %v", path, err)
			continue
		}
		f.Close()
	}
	link(t, 0, "loop", filepath.Join(dir, "loop"))
	if err := closed(Open(filepath.Join(dir, "loop"), unix.O_RDONLY)); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link to itself: %v", err)
	}
}

func closed(f *os.File, err error) error {
	if err == nil {
		err = f.Close()
	}
	return err
}

func TestModes(t *testing.T) {
	umasks := []int{0, 0o022}
	if os.Geteuid() == 0 {
		umasks = append(umasks, 0o777) // which closes a directory to its owner, and not to root
	}
	for _, umask := range umasks {
		base := filepath.Join(t.TempDir(), fmt.Sprintf("%03o", umask))
		old := unix.Umask(umask)
		err := errors.Join(
			closed(Create(filepath.Join(base, "a/b/created"))),
			closed(CreateOrOpen(filepath.Join(base, "a/lock"))),
			closed(CreateTemp(filepath.Join(base, "c/temporary"))),
			MkdirAll(filepath.Join(base, "d/e")))
		unix.Umask(old)
		if err != nil {
			t.Fatal(err)
		}
		files := 0
		err = filepath.Walk(base, func(path string, info os.FileInfo, err error) error {
			want := os.FileMode(0o600)
			if info.IsDir() {
				want = 0o700
			} else {
				files++
			}
			if info.Mode().Perm() != want {
				t.Errorf("umask %03o: %s has mode %s", umask, path, info.Mode())
			}
			return err
		})
		if err != nil || files != 3 {
			t.Errorf("%d files, %v", files, err)
		}
	}
}

// A file that is opened for writing is neither somebody else's, nor another name of something.
func TestCreateOrOpen(t *testing.T) {
	_, secret := strangers(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "lock")
	for round := range 2 {
		if err := closed(CreateOrOpen(path)); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
	}
	if err := os.Chown(path, stranger, stranger); err != nil {
		t.Fatal(err)
	}
	if err := closed(CreateOrOpen(path)); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
		t.Errorf("a stranger's file: %v", err)
	}
	second := filepath.Join(filepath.Dir(secret), "second")
	if err := os.Link(secret, second); err != nil {
		t.Fatal(err)
	}
	if err := closed(CreateOrOpen(second)); err == nil {
		t.Error("a file with two names was opened")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func(string) (*os.File, error){
		"CreateOrOpen": CreateOrOpen,
		"Open":         func(p string) (*os.File, error) { return Open(p, unix.O_RDONLY) },
	} {
		if err := closed(open(fifo)); err == nil {
			t.Errorf("%s opened a FIFO", name)
		}
	}
}

// In a stranger's directory nothing is made, and nothing opened to be written, as its owner can put
// something else in its place; what is there can be read.
func TestStrangersDirectory(t *testing.T) {
	dir, _ := strangers(t)
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, use := range map[string]func() error{
		"write":  func() error { return closed(Open(path, unix.O_RDWR)) },
		"create": func() error { return closed(Create(filepath.Join(dir, "new"))) },
		"below":  func() error { return closed(Create(filepath.Join(dir, "sub/new"))) },
		"lock":   func() error { return closed(CreateOrOpen(path)) },
		"mkdir":  func() error { return MkdirAll(filepath.Join(dir, "sub")) },
		"there":  func() error { return MkdirAll(dir) },
	} {
		if err := use(); err == nil || !strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if b, err := ReadFile(path, 7); err != nil || string(b) != "content" {
		t.Errorf("read: %q, %v", b, err)
	}
	if _, err := ReadFile(path, 6); err == nil {
		t.Error("more was read than is allowed")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	if err := closed(Create(filepath.Join(open, "new"))); err == nil {
		t.Error("a file was made where everybody can write")
	}
	if err := errors.Join(os.Chmod(open, 0o777|os.ModeSticky), closed(Create(filepath.Join(open, "new")))); err != nil {
		t.Errorf("a sticky directory: %v", err)
	}
}

func TestCheckDir(t *testing.T) {
	dir, _ := strangers(t)
	safe := filepath.Join(t.TempDir(), "safe")
	if err := MkdirAll(safe); err != nil {
		t.Fatal(err)
	}
	if err := CheckDir(safe); err != nil {
		t.Errorf("%s: %v", safe, err)
	}
	below := filepath.Join(dir, "below")
	if err := os.Mkdir(below, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, below} {
		if err := CheckDir(d); err == nil || !strings.Contains(err.Error(), "user 65534 owns") {
			t.Errorf("%s: %v", d, err)
		}
	}
	for _, mode := range []os.FileMode{0o777, 0o777 | os.ModeSticky, 0o702} {
		if err := os.Chmod(safe, mode); err != nil {
			t.Fatal(err)
		}
		if err := CheckDir(safe); err == nil || !strings.Contains(err.Error(), "can write") {
			t.Errorf("mode %s: %v", mode, err)
		}
	}
	t.Setenv("SUDO_UID", "65534")
	if err := CheckDir(below); err != nil {
		t.Errorf("a directory of the user who called sudo: %v", err)
	}
}

// Where others could put something else, a path is refused.
func TestPlace(t *testing.T) {
	need.Root(t)
	t.Setenv("SUDO_UID", "1001")
	for what, tt := range map[string]struct {
		prepare func(dir string) error
		want    string // "" if it is in order
	}{
		"root's":                       {func(string) error { return nil }, ""},
		"another user's file":          {func(dir string) error { return os.Chown(dir+"/p/q/file", 1000, 0) }, "user 1000 owns"},
		"a file of the owner":          {func(dir string) error { return os.Chown(dir+"/p/q/file", 1002, 0) }, ""},
		"a file of the caller of sudo": {func(dir string) error { return os.Chown(dir+"/p/q/file", 1001, 0) }, ""},
		"another user's directory":     {func(dir string) error { return os.Chown(dir+"/p", 1000, 0) }, "user 1000 owns"},
		"a directory of the owner":     {func(dir string) error { return os.Chown(dir+"/p/q", 1002, 0) }, "user 1002 owns"},
		"a file for all":               {func(dir string) error { return os.Chmod(dir+"/p/q/file", 0o666) }, "others than its owner"},
		"a file for a group": {func(dir string) error {
			return errors.Join(os.Chown(dir+"/p/q/file", 0, 1003), os.Chmod(dir+"/p/q/file", 0o660))
		}, "others than its owner"},
		"a directory for one's private group": {func(dir string) error {
			return errors.Join(os.Chown(dir+"/p", 1001, 1001), os.Chmod(dir+"/p", 0o775))
		}, ""},
		"a directory for all":  {func(dir string) error { return os.Chmod(dir+"/p", 0o777) }, "others than its owner"},
		"a sticky one for all": {func(dir string) error { return os.Chmod(dir+"/p", 0o777|os.ModeSticky) }, ""},
		"a link to another's": {func(dir string) error {
			if err := os.Rename(dir+"/p/q", dir+"/p/r"); err != nil {
				return err
			}
			if err := os.Mkdir(dir+"/s", 0o700); err != nil {
				return err
			}
			if err := os.Chmod(dir+"/s", 0o777); err != nil {
				return err
			}
			return os.Symlink("../s/../p/r", dir+"/p/q")
		}, "others than its owner"},
		"a link": {func(dir string) error {
			if err := os.Rename(dir+"/p/q", dir+"/p/r"); err != nil {
				return err
			}
			return os.Symlink("r", dir+"/p/q")
		}, ""},
		"a link to itself": {func(dir string) error {
			if err := os.RemoveAll(dir + "/p/q"); err != nil {
				return err
			}
			return os.Symlink("q", dir+"/p/q")
		}, "too many levels"},
		"nothing yet": {func(dir string) error { return os.RemoveAll(dir + "/p/q") }, ""},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.MkdirAll(dir+"/p/q", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dir+"/p/q/file", []byte("content"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := tt.prepare(dir); err != nil {
				t.Fatal(err)
			}
			err := CheckPlace(dir+"/p/q/file", 1002)
			if tt.want == "" && err != nil {
				t.Error(err)
			} else if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error is %v; want one with %q", err, tt.want)
				}
			}
		})
	}
}

// An access list gives a place to others although its group is the owner's own.
func TestAccessLists(t *testing.T) {
	need.Root(t)
	// Of acl(5), version 2: user:: rwx, user:65534: rwx, group:: r-x, mask:: rwx, other:: ---.
	list := []byte{2, 0, 0, 0}
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, ^uint32(0)}, {2, 7, stranger}, {4, 5, ^uint32(0)}, {16, 7, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		list = binary.LittleEndian.AppendUint16(list, e.tag)
		list = binary.LittleEndian.AppendUint16(list, e.perm)
		list = binary.LittleEndian.AppendUint32(list, e.id)
	}
	dir := filepath.Join(t.TempDir(), "dir")
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.Mkdir(dir, 0o770), os.WriteFile(file, nil, 0o660), os.Chown(dir, 0, 0), os.Chmod(dir, 0o770)); err != nil {
		t.Fatal(err)
	}
	uses := map[string]func() error{
		"create": func() error { return closed(Create(filepath.Join(dir, "new"))) },
		"write":  func() error { return closed(Open(file, unix.O_RDWR)) },
		"mkdir":  func() error { return MkdirAll(filepath.Join(dir, "sub")) },
		"dir":    func() error { return CheckDir(dir) },
		"place":  func() error { return CheckPlace(file, 0) },
	}
	for name, use := range uses {
		if err := use(); err != nil {
			t.Errorf("%s, before there is a list: %v", name, err)
		}
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "new")), os.Remove(filepath.Join(dir, "sub"))); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(dir, "system.posix_acl_access", list, 0); err != nil {
		need.Lacks(t, "access-lists", err)
	}
	for name, use := range uses {
		if err := use(); err == nil || !strings.Contains(err.Error(), "others than its owner can write") {
			t.Errorf("%s where another user may write by an access list: %v", name, err)
		}
	}
	if err := errors.Join(unix.Removexattr(dir, "system.posix_acl_access"), os.Chmod(dir, 0o700), unix.Setxattr(file, "system.posix_acl_access", list, 0)); err != nil {
		t.Fatal(err)
	}
	if err := CheckPlace(file, 0); err == nil {
		t.Error("a file that another user may write by an access list is in order")
	}
}
