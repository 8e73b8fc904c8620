package guest

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseIPArgument(t *testing.T) {
	c, err := parseIPArgument("172.16.0.2::172.16.0.1:255.255.255.252::eth0:none:1.1.1.1:9.9.9.9")
	if err != nil {
		t.Fatal(err)
	}
	if c.address.String() != "172.16.0.2/30" || c.gateway.String() != "172.16.0.1" || c.device != "eth0" || len(c.dns) != 2 || c.dns[0].String() != "1.1.1.1" {
		t.Errorf("%+v", c)
	}
	if c, err = parseIPArgument("172.16.0.2:::255.255.255.252"); err != nil || c.gateway != nil || c.device != "eth0" {
		t.Errorf("short: %+v, %v", c, err)
	}
	for _, bad := range []string{"", "dhcp", "172.16.0.2", "::1:::::", "172.16.0.2::x:255.255.255.0", strings.Repeat(":", 20)} {
		if c, err := parseIPArgument(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestMountOptions(t *testing.T) {
	for options, want := range map[string]struct {
		flags uintptr
		data  string
	}{
		"":                      {0, ""},
		"rw":                    {0, ""},
		"ro,noatime":            {unix.MS_RDONLY | unix.MS_NOATIME, ""},
		"data=ordered,ro,dax=x": {unix.MS_RDONLY, "data=ordered,dax=x"},
	} {
		if flags, data := mountOptions(options); flags != want.flags || data != want.data {
			t.Errorf("%q: %#x, %q", options, flags, data)
		}
	}
}

func TestCmdline(t *testing.T) {
	c := cmdline{"quiet", "root=/dev/vda", "root=/dev/vdb", "init=", "rw"}
	if got := c.get("root", "x"); got != "/dev/vdb" {
		t.Errorf("the last one counts in the kernel: %q", got)
	}
	if got := c.get("console", "ttyS0"); got != "ttyS0" {
		t.Errorf("default: %q", got)
	}
	if !c.has("rw") || c.has("ro") {
		t.Error("flags")
	}
}
