package e2e

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	until "drafter/internal/await"
	"drafter/internal/tour"
)

// flushRules is what a firewall does that is loaded anew. A guest is reached afterwards as before.
func (s *site) flushRules(t *testing.T) {
	t.Helper()
	f, err := s.Start("forwarder", "--port-forwards", tour.Forward("ark0", "6379", redisAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, f)
	if _, err := f.Await(t.Context(), "Forwarding"); err != nil {
		t.Fatal(err)
	}
	command(t, s.dir, "nft", "flush", "ruleset")
	if _, err := f.Await(t.Context(), "Put back what somebody has removed or changed"); err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(&redis.Options{Addr: redisAddr, MaxRetries: 5})
	defer c.Close()
	if err := c.Ping(t.Context()).Err(); err != nil {
		t.Errorf("after the rules were put back: %v", err)
	}
	until.TrueWithin(t, tour.StepTimeout, "the NAT's table is back", func() bool {
		return strings.Contains(command(t, s.dir, "nft", "list", "tables"), "drafter-nat-ark")
	})
}

// A guest asks the name servers of the host that it is on, as they are at each start: behind a stub
// those that the stub asks.
func TestNameServers(t *testing.T) {
	s := newSite(t)
	etc := filepath.Join(s.dir, "resolv.conf")
	const behind = "/run/systemd/resolve/resolv.conf"
	if err := os.MkdirAll(filepath.Dir(behind), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll("/run/systemd") })
	write(t, etc, "nameserver 127.0.0.53\n")
	if err := unix.Mount(etc, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	for _, tt := range []struct {
		behind, want string
		flags        []string
	}{
		{"nameserver 198.51.100.53\nsearch a.test\n", "nameserver 198.51.100.53\nsearch a.test\n", nil},
		{"nameserver 203.0.113.53\n", "nameserver 203.0.113.53\n", nil},
		{"nameserver 203.0.113.53\n", "nameserver 192.0.2.53\nnameserver 192.0.2.54\n", []string{"--dns", "192.0.2.53,192.0.2.54"}},
	} {
		write(t, behind, tt.behind)
		vm := s.run(t, append([]string{"--enable-input"}, tt.flags...)...)
		if tt.flags == nil {
			s.flushRules(t)
		}
		io.WriteString(vm.Input, "\n")
		s.waitOutput(t, vm, "drafter# ")
		// What the container has, too.
		io.WriteString(vm.Input, "echo 'be''gin'; cat /etc/resolv.conf /proc/$(pidof redis-server)/root/etc/resolv.conf; echo 'e''nd'\n")
		out := s.waitOutput(t, vm, "\nend\n")
		out = regexp.MustCompile(`(?m)^\[ *\d+\.\d+\] .*\n`).ReplaceAllString(out, "") // the kernel says something now and then
		if want := "\nbegin\n" + tt.want + tt.want + "end\n"; !strings.Contains(out, want) {
			t.Errorf("with %q behind the stub and %v the console shows\n%s\nwant %q", tt.behind, tt.flags, out, want)
		}
		end(t, vm)
	}
}
