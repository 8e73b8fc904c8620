package agent_test

import (
	"context"
	"fmt"
	"io"
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

// A host runs a program in a guest, on whose terminal somebody types.
func ExampleClient_Run() {
	program := func(ctx context.Context, guest *agent.Client) (status int, err error) {
		s, err := guest.Run(ctx, agent.Command{Args: []string{"sh"}, TTY: true, Rows: 24, Columns: 80, Stdin: true})
		if err != nil {
			return 0, err // an agent.StartError says with which status a shell would end
		}
		go func() {
			_, _ = io.Copy(s.Stdin, os.Stdin)
			_ = s.Stdin.Close()
		}()
		if _, err := io.Copy(os.Stdout, s.Stdout); err != nil {
			return 0, err
		}
		return s.Wait()
	}
	_ = program
}

// A host follows what the service of a guest prints, until that has ended.
func ExampleClient_Logs() {
	follow := func(ctx context.Context, guest *agent.Client, position int64) (status int, err error) {
		for {
			part, err := guest.Logs(ctx, position)
			if err != nil {
				return 0, err
			}
			for _, chunk := range part.Chunks {
				fmt.Printf("%s %v %q\n", chunk.Time, chunk.Stderr, chunk.Data)
			}
			if position = part.Next; part.Ended {
				return part.ExitStatus, nil
			}
		}
	}
	_ = follow
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
