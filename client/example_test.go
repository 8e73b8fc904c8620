package client_test

import (
	"context"
	"fmt"
	"log"

	"drafter/api"
	"drafter/client"
)

// A VM of an image is run, and stopped again.
func Example() {
	ctx := context.Background()
	c := client.New("")
	defer c.Close()
	o, err := c.Run(ctx, api.Run{Image: "docker://valkey/valkey", Ports: []api.Port{{Host: 6379, Guest: 6379}}})
	if err == nil {
		o, err = c.Await(ctx, o, func(p api.Progress) { fmt.Println(p.Step, p.Done, "of", p.Total) })
	}
	if err != nil {
		log.Print(err)
		return
	}
	if o, err = c.Stop(ctx, o.VM); err == nil {
		_, err = c.Await(ctx, o, nil)
	}
	if err != nil {
		log.Print(err)
	}
}
