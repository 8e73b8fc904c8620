package snapshotter

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"drafter/internal/guest"
	"drafter/network"
	"drafter/vmm"
)

// guestArgs appends to args the guest's network configuration (ip=, see nfsroot.rst of Linux), unless the user gave one, its ports, and whether it keeps its own time. The
// guest's address is the one that the interface in the namespace leaves it.
func guestArgs(args, netns, iface string, agentPort, livenessPort uint32, keepClock bool) (string, error) {
	words := strings.Fields(args)
	has := func(key string) bool {
		for _, w := range words {
			if strings.HasPrefix(w, key+"=") {
				return true
			}
		}
		return false
	}
	if netns != "" && !has("ip") {
		gateway, address, err := network.GuestAddress(netns, iface)
		if err != nil {
			return "", err
		}
		arg := fmt.Sprintf("ip=%s::%s:%s::eth0:off", address.IP, gateway, net.IP(address.Mask))
		for _, s := range nameServers("/etc/resolv.conf") {
			arg += ":" + s
		}
		words = append(words, arg)
	}
	if agentPort != 0 && agentPort != vmm.DefaultAgentPort && !has(guest.AgentPortArgument) {
		words = append(words, fmt.Sprintf("%s=%d", guest.AgentPortArgument, agentPort))
	}
	if livenessPort != 0 && livenessPort != vmm.DefaultLivenessPort && !has(guest.LivenessPortArgument) {
		words = append(words, fmt.Sprintf("%s=%d", guest.LivenessPortArgument, livenessPort))
	}
	if keepClock && !slices.Contains(words, guest.KeepClockArgument) {
		words = append(words, guest.KeepClockArgument)
	}
	return strings.Join(words, " "), nil
}

// nameServers returns up to two of the host's name servers that a guest can reach: a stub on a loopback address is the host's own.
func nameServers(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var servers []string
	lines := bufio.NewScanner(f)
	for lines.Scan() && len(servers) < 2 {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if ip := net.ParseIP(fields[1]).To4(); ip != nil && !ip.IsLoopback() {
			servers = append(servers, ip.String())
		}
	}
	return servers
}
