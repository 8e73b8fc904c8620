package agent_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"time"

	"drafter/agent"
)

// A host asks the agent in a guest to run a program. Here, a UNIX socket stands for the VM's port.
func Example() {
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "agent.sock"))
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() {
		guest := agent.Server{BeforeSuspendCmd: "sync"}
		served <- guest.Serve(ctx, l)
	}()

	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	client := agent.NewClient(conn)
	answer, err := client.Exec(ctx, []byte("hello"), "cat")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", answer.Stdout)
	_ = client.Close()
	cancel()
	<-served
	// Output: hello
}

// A guest with an init of its own says that it is up, and serves an agent of its own.
func ExampleListen() {
	ctx := context.Background()
	l := agent.Listen(26, time.Minute) // vmm.DefaultAgentPort
	defer l.Close()
	guest := agent.Server{BeforeSuspendCmd: "redis-cli save", AfterResumeCmd: "systemctl restart chronyd"}
	go func() {
		if err := agent.Liveness(ctx, 25, time.Minute); err != nil { // vmm.DefaultLivenessPort
			log.Print(err)
		}
	}()
	if err := guest.Serve(ctx, l); err != nil {
		log.Fatal(err)
	}
}
