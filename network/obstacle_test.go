package network

import (
	"strings"
	"testing"

	"drafter/internal/need"
)

// What is in a NAT's way is found before there is one, and while one runs.
func TestObstacles(t *testing.T) {
	need.Root(t)
	c := DefaultNAT()
	c.NamespaceCount, c.HostInterface = 1, "eth0"
	check := func(when, firewall, subnets string) {
		t.Helper()
		list, err := Firewalls(c)
		if err != nil {
			t.Fatal(when, err)
		}
		if firewall == "" && len(list) > 0 ||
			firewall != "" &&
				(len(list) != 1 || !strings.Contains(list[0].Text+list[0].Remedy, firewall)) {
			t.Errorf("%s: firewalls %v, want %q", when, list, firewall)
		}
		err = CheckSubnets(c)
		if subnets == "" && err != nil ||
			subnets != "" && (err == nil || !strings.Contains(err.Error(), subnets)) {
			t.Errorf("%s: subnets %v, want %q", when, err, subnets)
		}
	}
	if err := CheckNftables(); err != nil {
		t.Error(err)
	}
	check("on an empty host", "", "")
	shell(
		t,
		"nft 'table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }'",
	)
	check("with a firewall", "iptables -I FORWARD", "")
	shell(t, "nft delete table ip filter")
	n, err := StartNAT(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	check("beside itself", "", "")
	c.NamespacePrefix = "other"
	check("beside another NAT", "", "overlaps with 10.0.8.0/22 of the NAT for namespaces ark")
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	shell(t, "ip address add 10.0.8.1/24 dev eth0")
	check("with an address of the host's", "", "address 10.0.8.1 of interface eth0")
	shell(t, "ip address del 10.0.8.1/24 dev eth0")
	shell(t, "ip route add 10.0.9.0/24 dev eth0")
	check("with a route", "", "routed elsewhere")
	shell(t, "ip route del 10.0.9.0/24 dev eth0")
}
