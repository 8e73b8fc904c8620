package network_test

import (
	"context"
	"log"

	"drafter/network"
)

// A pool of namespaces for VMs, whose first guest's port 6379 is published.
func ExampleStartNAT() {
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	nat, err := network.StartNAT(ctx, network.DefaultNAT())
	if err != nil {
		return err
	}
	defer nat.Close()
	name, claim, err := nat.Claim() // for one VM
	if err != nil {
		return err
	}
	defer claim.Close()
	forwarder, err := network.StartForwarder(network.ForwarderConfig{
		HostVethCIDR: network.DefaultNAT().HostVethCIDR,
		PortForwards: []network.PortForward{{Netns: name, InternalPort: "6379", Protocol: "tcp", ExternalAddr: "127.0.0.1:3333"}},
	})
	if err != nil {
		return err
	}
	defer forwarder.Close()
	return nil
}
