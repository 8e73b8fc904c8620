package network_test

import (
	"context"
	"log"

	"drafter/network"
)

// A pool of namespaces for VMs, whose first guest's port 6379 is published.
func ExampleStartNAT() {
	nat, err := network.StartNAT(context.Background(), network.DefaultNAT())
	if err != nil {
		log.Fatal(err)
	}
	defer nat.Close()
	name, claim, err := nat.Claim() // for one VM
	if err != nil {
		log.Fatal(err)
	}
	defer claim.Close()
	forwarder, err := network.StartForwarder(network.ForwarderConfig{
		HostVethCIDR: network.DefaultNAT().HostVethCIDR,
		PortForwards: []network.PortForward{{Netns: name, InternalPort: "6379", Protocol: "tcp", ExternalAddr: "127.0.0.1:3333"}},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer forwarder.Close()
}
