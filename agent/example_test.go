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
	if err := run(context.Background()); err != nil {
		log.Fatal(err)
	}
	// Output: hello
}

func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "agent.sock"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error)
	go func() {
		guest := agent.Server{BeforeSuspendCmd: "sync"}
		served <- guest.Serve(ctx, l)
	}()

	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return err
	}
	client := agent.NewClient(conn)
	answer, err := client.Exec(ctx, []byte("hello"), "cat")
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", answer.Stdout)
	_ = client.Close()
	cancel()
	<-served
	return nil
}

// A guest with an init of its own says that it is up, and serves an agent of its own.
func ExampleListen() {
	if err := serve(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func serve(ctx context.Context) error {
	l := agent.Listen(26, time.Minute) // vmm.DefaultAgentPort
	defer l.Close()
	guest := agent.Server{BeforeSuspendCmd: "redis-cli save", AfterResumeCmd: "systemctl restart chronyd"}
	go func() {
		if err := agent.Liveness(ctx, 25, time.Minute); err != nil { // vmm.DefaultLivenessPort
			log.Print(err)
		}
	}()
	return guest.Serve(ctx, l)
}
