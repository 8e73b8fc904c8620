package snapshotter

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"drafter/internal/guest"
	"drafter/network"
	"drafter/vmm"
)

// guestArgs appends the guest's settings to args: its network configuration (ip=, see nfsroot.rst
// of Linux, and its like for IPv6) unless the user gave one, its ports, the ports of its service, and whether it keeps its
// own time. The guest's address is that behind the interface in the namespace.
func guestArgs(args, netns, iface string, agentPort, livenessPort uint32, readyPorts string, keepClock bool) (string, error) {
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
		words = append(words, fmt.Sprintf("ip=%s::%s:%s::eth0:off", address.IP, gateway, net.IP(address.Mask)))
		gateway, address, err = network.GuestAddress6(netns)
		if err != nil {
			return "", err
		}
		if address != nil && !has(guest.IPv6Argument) {
			words = append(words, fmt.Sprintf("%s=%s,%s", guest.IPv6Argument, address, gateway))
		}
	}
	if agentPort != 0 && agentPort != vmm.DefaultAgentPort && !has(guest.AgentPortArgument) {
		words = append(words, fmt.Sprintf("%s=%d", guest.AgentPortArgument, agentPort))
	}
	if livenessPort != 0 && livenessPort != vmm.DefaultLivenessPort && !has(guest.LivenessPortArgument) {
		words = append(words, fmt.Sprintf("%s=%d", guest.LivenessPortArgument, livenessPort))
	}
	if readyPorts != "" && !has(guest.ReadyPortsArgument) {
		words = append(words, guest.ReadyPortsArgument+"="+strings.ReplaceAll(readyPorts, " ", ""))
	}
	if keepClock && !slices.Contains(words, guest.KeepClockArgument) {
		words = append(words, guest.KeepClockArgument)
	}
	return strings.Join(words, " "), nil
}
