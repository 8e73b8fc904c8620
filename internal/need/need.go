// Package need says what a test needs of its host. Where that is missing, the test is skipped, with
// what is missing and the remedy; or it fails, where DRAFTER_REQUIRE names it: a list of root, kvm,
// fuse, nbd, firecracker, other names that a SKIPPED line gives, and any program, with commas
// between them. A skip is also a line of the file that DRAFTER_SKIPPED names, if it does.
package need

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The environment.
const (
	require = "DRAFTER_REQUIRE"
	skipped = "DRAFTER_SKIPPED"
	soak    = "DRAFTER_SOAK"
)

// packages are those of Debian that programs are in.
var packages = map[string]string{
	"bzip2":              "bzip2",
	"curl":               "curl",
	"debootstrap":        "debootstrap",
	"fio":                "fio",
	"gcc":                "gcc",
	"ip":                 "iproute2",
	"iperf3":             "iperf3",
	"jq":                 "jq",
	"mke2fs":             "e2fsprogs",
	"nbdcopy":            "libnbd-bin",
	"nbdinfo":            "libnbd-bin",
	"nft":                "nftables",
	"openssl":            "openssl",
	"pgbench":            "postgresql-15",
	"psql":               "postgresql-15",
	"qemu-img":           "qemu-utils",
	"qemu-io":            "qemu-utils",
	"qemu-system-x86_64": "qemu-system-x86",
	"redis-cli":          "redis-tools",
	"redis-server":       "redis-server",
	"ssh":                "openssh-client",
	"zstd":               "zstd",
}

// servers are programs that the repository builds.
var servers = []string{"versitygw", "registry"}

var user = os.Geteuid // tests change it

// A lack is something that a host does not have. It has several names if one rests on
// another.
type lack struct {
	names []string // as DRAFTER_REQUIRE may list them; the last is that of what was asked for
	why   string   // with the remedy
}

// find tells what a host lacks of what has a name; nil if it has it.
func find(name string) *lack {
	switch name {
	case "root":
		if user() != 0 {
			return &lack{[]string{name}, "this is not root; run the tests as root"}
		}
	case "fuse":
		if l := find("root"); l != nil {
			return &lack{append(l.names, name), l.why + ", as only root mounts"}
		}
		return device(name, "/dev/fuse", "run 'modprobe fuse' at the host")
	case "kvm":
		return device(name, "/dev/kvm", "turn virtualisation on, and run 'modprobe kvm'")
	case "nbd":
		if l := find("root"); l != nil {
			return &lack{append(l.names, name), l.why + ", as only root attaches devices"}
		}
		if _, err := os.Stat("/sys/module/nbd"); err != nil {
			return &lack{[]string{name}, "this kernel has no NBD client; run 'modprobe nbd' at the host"}
		}
	case "firecracker":
		for _, p := range []string{"firecracker", "jailer"} {
			if _, err := exec.LookPath(p); err != nil {
				return &lack{[]string{p, name}, p + " is not on PATH; docs/firecracker.md says where it is"}
			}
		}
		return find("kvm")
	default:
		_, err := exec.LookPath(name)
		switch {
		case err == nil:
		case slices.Contains(servers, name):
			return &lack{[]string{name}, name + " is not on PATH; 'make servers' builds it in .cache/tools"}
		case packages[name] != "":
			return &lack{[]string{name}, name + " is not on PATH; install the Debian package " + packages[name]}
		default:
			return &lack{[]string{name}, name + " is not on PATH"}
		}
	}
	return nil
}

// device tells whether a device is there, and can be opened.
func device(name, path, remedy string) *lack {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case err == nil:
		if err := f.Close(); err != nil {
			return &lack{[]string{name}, err.Error()}
		}
		return nil
	case errors.Is(err, os.ErrPermission):
		return &lack{[]string{name}, err.Error() + "; run the tests as a user who may open it"}
	}
	return &lack{[]string{name}, err.Error() + "; " + remedy}
}

// required tells which name of a lack must not be missing; "" if it may be.
func (l *lack) required() string {
	for name := range strings.SplitSeq(os.Getenv(require), ",") {
		if name = strings.TrimSpace(name); slices.Contains(l.names, name) {
			return name
		}
	}
	return ""
}

// settle skips a test, or ends it.
func (l *lack) settle(t testing.TB) {
	t.Helper()
	if l == nil {
		return
	}
	if name := l.required(); name != "" {
		t.Fatalf("%s requires %s: %s", require, name, l.why)
	}
	if err := l.note(t.Name()); err != nil {
		t.Log(err)
	}
	t.Skip(l.text())
}

func (l *lack) text() string {
	return fmt.Sprintf("SKIPPED (%s): %s", l.names[len(l.names)-1], l.why)
}

// note tells of a skip that only 'go test -v' shows.
func (l *lack) note(test string) (err error) {
	path := os.Getenv(skipped)
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("note a skip: %w", err)
	}
	_, err = f.WriteString(l.text() + ": " + test + "\n")
	return errors.Join(err, f.Close())
}

// Root is for tests that mount, give files away or make namespaces.
func Root(t testing.TB) {
	t.Helper()
	find("root").settle(t)
}

// FUSE is for tests that serve files to the kernel.
func FUSE(t testing.TB) {
	t.Helper()
	find("fuse").settle(t)
}

// KVM is for tests with a VM that nothing but the processor runs.
func KVM(t testing.TB) {
	t.Helper()
	find("kvm").settle(t)
}

// NBD is for tests of the kernel's client.
func NBD(t testing.TB) {
	t.Helper()
	find("nbd").settle(t)
}

// Firecracker is for tests with a real one.
func Firecracker(t testing.TB) {
	t.Helper()
	find("firecracker").settle(t)
}

// Program is for tests that run another program. It returns its path.
func Program(t testing.TB, name string) string {
	t.Helper()
	find(name).settle(t)
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Lacks is for tests that have found out themselves that their host lacks something, which they
// name. They are skipped, or fail.
func Lacks(t testing.TB, name string, why any) {
	t.Helper()
	(&lack{[]string{name}, fmt.Sprint(why)}).settle(t)
}

// Soaking tells whether tests are to take long, as they find more the longer they run.
func Soaking() bool { return os.Getenv(soak) != "" }

// Soak is for tests that only take long.
func Soak(t testing.TB) {
	t.Helper()
	if !Soaking() {
		Lacks(t, "soak", "it takes long; 'make soak' runs it")
	}
}

// Suite is for a TestMain all of whose tests need what is named as in DRAFTER_REQUIRE. If they
// cannot run, it says so and returns what to exit with.
func Suite(tests string, names ...string) (code int, can bool) {
	for _, name := range names {
		l := find(name)
		if l == nil {
			continue
		}
		if name := l.required(); name != "" {
			fmt.Printf("FAIL: %s: %s requires %s: %s\n", tests, require, name, l.why)
			return 1, false
		}
		fmt.Printf("%s: %s\n", l.text(), tests)
		if err := l.note(tests); err != nil {
			fmt.Println(err)
		}
		return 0, false
	}
	return 0, true
}

// Rounds is how often a test does what finds more the more often it is done: few times, or many
// with 'make soak'.
func Rounds(few, many int) int {
	if Soaking() {
		return many
	}
	return few
}
