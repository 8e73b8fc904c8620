package need

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// told is a test that is skipped or fails.
type told struct {
	testing.TB
	skipped, failed string
}

func (t *told) Helper()      {}
func (t *told) Name() string { return "TestTold" }

func (t *told) Skip(args ...any) { t.skipped = fmt.Sprint(args...); panic(t) }

func (t *told) Fatalf(format string, args ...any) { t.failed = fmt.Sprintf(format, args...); panic(t) }

func (t *told) Fatal(args ...any) { t.failed = fmt.Sprint(args...); panic(t) }

// tell runs what asks a host for something.
func tell(t *testing.T, ask func(testing.TB)) (s *told) {
	s = &told{TB: t}
	defer func() {
		if r := recover(); r != nil && r != any(s) {
			panic(r)
		}
	}()
	ask(s)
	return s
}

// What is missing skips a test, with the remedy, unless it is required.
func TestMissing(t *testing.T) {
	program := func(name string) func(testing.TB) {
		return func(t testing.TB) { Program(t, name) }
	}
	for _, tt := range []struct {
		name, require   string
		ask             func(testing.TB)
		skipped, failed string
	}{
		{"a program of Debian's", "", program("nbdinfo"), "SKIPPED (nbdinfo): nbdinfo is not on PATH; install the Debian package libnbd-bin", ""},
		{"a program of ours", "", program("versitygw"), "'make servers' builds it", ""},
		{"an unknown program", "root,kvm", program("unknown"), "SKIPPED (unknown): unknown is not on PATH", ""},
		{"a required program", "kvm, nbdinfo", program("nbdinfo"), "", "DRAFTER_REQUIRE requires nbdinfo: nbdinfo is not on PATH"},
		{"a required VMM", "firecracker", Firecracker, "", "DRAFTER_REQUIRE requires firecracker: firecracker is not on PATH"},
		{"the VMM's program", "jailer,firecracker", Firecracker, "", "firecracker is not on PATH"},
		{"what a test finds out", "user", func(t testing.TB) { Lacks(t, "users", os.ErrPermission) }, "SKIPPED (users): permission denied", ""},
		{"what a test finds out and is required", "users", func(t testing.TB) { Lacks(t, "users", "why") }, "", "requires users: why"},
		{"time", "", Soak, "'make soak' runs it", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "skipped")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", t.TempDir())
			t.Setenv(soak, "")
			t.Setenv(require, tt.require)
			t.Setenv(skipped, file)
			got := tell(t, tt.ask)
			if !strings.Contains(got.skipped, tt.skipped) || (got.skipped == "") != (tt.skipped == "") ||
				!strings.Contains(got.failed, tt.failed) || (got.failed == "") != (tt.failed == "") {
				t.Errorf("skipped: %q, failed: %q; want %q, %q", got.skipped, got.failed, tt.skipped, tt.failed)
			}
			noted, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			want := ""
			if got.skipped != "" {
				want = got.skipped + ": TestTold\n"
			}
			if string(noted) != want {
				t.Errorf("noted: %q; want %q", noted, want)
			}
		})
	}
}

// What is there is nothing to talk about.
func TestThere(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"nbdinfo", "some"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	t.Setenv(soak, "1")
	t.Setenv(require, "nbdinfo,some,soak")
	if got := Program(t, "nbdinfo"); got != filepath.Join(dir, "nbdinfo") {
		t.Errorf("the program is %s", got)
	}
	Soak(t)
	if code, can := Suite("tests", "nbdinfo", "some"); code != 0 || !can {
		t.Errorf("a suite ends with %d, %t", code, can)
	}
}

// All tests of a binary are skipped at once, unless what is missing is required.
func TestSuite(t *testing.T) {
	file := filepath.Join(t.TempDir(), "skipped")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir())
	t.Setenv(skipped, file)
	t.Setenv(require, "fio")
	if code, can := Suite("these tests", "nbdinfo", "fio"); code != 0 || can {
		t.Errorf("where nothing of it is required: %d, %t", code, can)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "SKIPPED (nbdinfo): nbdinfo is not on PATH; install the Debian package libnbd-bin: these tests\n" {
		t.Errorf("noted: %q, %v", b, err)
	}
	if code, can := Suite("these tests", "fio"); code != 1 || can {
		t.Errorf("where it is required: %d, %t", code, can)
	}
}

// Nobody but root mounts: who requires root gets no skip of what FUSE lacks.
func TestNobody(t *testing.T) {
	old := user
	defer func() { user = old }()
	user = func() int { return 65534 }
	t.Setenv(skipped, "")
	for name, ask := range map[string]func(testing.TB){"root": Root, "fuse": FUSE, "nbd": NBD} {
		for _, required := range []string{"root", name} {
			t.Setenv(require, required)
			if got := tell(t, ask); !strings.Contains(got.failed, "requires "+required+": this is not root") {
				t.Errorf("%s, with %s required: %q, %q", name, required, got.skipped, got.failed)
			}
		}
		t.Setenv(require, "kvm")
		if got := tell(t, ask); !strings.Contains(got.skipped, "SKIPPED ("+name+"): this is not root") {
			t.Errorf("%s: %q, %q", name, got.skipped, got.failed)
		}
	}
}
