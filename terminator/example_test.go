package terminator_test

import (
	"context"
	"log"

	"drafter/terminator"
	"drafter/transport"
)

// A running VM is copied into a package, and goes on.
func Example() {
	t, err := terminator.New(terminator.Config{Dir: "out/checkpoint", Copy: true})
	if err != nil {
		log.Fatal(err)
	}
	var trust transport.Trust
	dial, err := trust.Dialer("localhost:1337") // a peer's --laddr
	if err != nil {
		log.Fatal(err)
	}
	stats, err := t.Run(context.Background(), dial)
	if err != nil {
		log.Fatal(err)
	}
	log.Print("the VM was paused for ", stats.Paused)
}
