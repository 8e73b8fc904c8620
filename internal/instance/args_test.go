package instance

import (
	"errors"
	"log/slog"
	"net"
	"testing"

	"drafter/network"
)

// TestNameServerArguments gives a guest that boots the name servers of its host, of both protocols.
func TestNameServerArguments(t *testing.T) {
	const ip4, ip6 = "ip=172.16.0.2::172.16.0.1:255.255.255.252::eth0:off", "drafter.ip6=fd00:1::2/126,fd00:1::1"
	both := []string{"192.0.2.53", "2001:db8::53", "192.0.2.54"}
	for _, tt := range []struct {
		args, want string
		servers    []string
	}{
		{"quiet " + ip4 + " " + ip6, "quiet " + ip4 + ":192.0.2.53:192.0.2.54 " + ip6 + ",2001:db8::53", both},
		{ip4, ip4 + ":192.0.2.53:192.0.2.54", both},
		{ip6 + " " + ip4, ip6 + ",2001:db8::53 " + ip4, both[1:2]},
		{ip4 + ":9.9.9.9 " + ip6 + ",2620:fe::fe", ip4 + ":9.9.9.9 " + ip6 + ",2620:fe::fe", both}, // the user's
		{ip4 + " " + ip6, ip4 + " " + ip6, nil},
	} {
		asked := 0
		i := &Instance{log: slog.New(slog.DiscardHandler), resolver: func() (r network.Resolver, err error) {
			asked++
			for _, s := range tt.servers {
				r.NameServers = append(r.NameServers, net.ParseIP(s))
			}
			if tt.servers == nil {
				err = errors.New("there is none")
			}
			return r, err
		}}
		if got := i.withNameServers(tt.args); got != tt.want {
			t.Errorf("%q becomes %q; want %q", tt.args, got, tt.want)
		}
		if asked > 1 { // each time the log would say what is wrong
			t.Errorf("%q: the host was asked %d times", tt.args, asked)
		}
	}
}
