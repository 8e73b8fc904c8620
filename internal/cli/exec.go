package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"drafter/api"
	"drafter/client"
)

var errNoTerminal = &usageError{errors.New("--tty (-t) with --interactive (-i) needs a terminal as stdin; leave out -t")}

func newExec() *cobra.Command {
	var e everyday
	var program api.Exec
	var interactive bool
	cmd := &cobra.Command{
		Use:   "exec [flags] VM PROGRAM [ARG…]",
		Short: "Run a program in a VM",
		Long: `Runs a program in the container of a VM's image, beside its service, and ends with its exit
status: 126 or 127 if it could not be started, 128 and the signal's number if a signal ended it.
` + exitCodeHelp,
		Example: `  drafter exec -it cache sh
  drafter exec cache redis-cli ping
  echo 'set key value' | drafter exec -i cache redis-cli`,
		Args: cobra.MinimumNArgs(2), ValidArgsFunction: first(e.names),
		RunE: func(cmd *cobra.Command, args []string) error {
			program.Args = args[1:]
			if program.TTY && interactive && !term.IsTerminal(0) {
				return errNoTerminal
			}
			return execIn(cmd, e.socket, args[0], program, interactive)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&interactive, "interactive", "i", false, "Pass stdin to the program")
	f.BoolVarP(&program.TTY, "tty", "t", false, "Give the program a terminal")
	f.StringArrayVarP(&program.Env, "env", "e", nil, "Environment variable, as NAME=value, or NAME for its value here (repeatable)")
	f.StringVarP(&program.User, "user", "u", "", "User, as NAME, UID, NAME:GROUP or UID:GID (default: the image's)")
	f.StringVarP(&program.Dir, "workdir", "w", "", "Working directory (default: the image's)")
	f.BoolVar(&program.System, "system", false, "Run it in the VM's own system, outside the image's container")
	return e.add(cmd)
}

// execIn runs a program and passes on what this process reads, and the signals that it gets.
func execIn(cmd *cobra.Command, socket, vm string, program api.Exec, interactive bool) error {
	program.Env = environment(program.Env)
	c := client.New(socket)
	defer c.Close()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGWINCH)
	defer signal.Stop(signals)
	toProgram, sizes := make(chan syscall.Signal, 8), make(chan api.WindowSize, 1)
	std := client.Streams{Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(), Signals: toProgram, Sizes: sizes}
	if interactive {
		input, restore, err := openInput(program.TTY)
		if err != nil {
			return err
		}
		defer restore()
		defer input.Close()
		std.Stdin = input
	}
	if program.TTY {
		program.Rows, program.Columns = windowSize()
	}
	// The program's end is this one's: a signal is the program's, not a reason to cut it off.
	ctx, cancel := context.WithCancel(context.WithoutCancel(cmd.Context()))
	defer cancel()
	done := make(chan struct{})
	defer func() { <-done }()
	defer cancel()
	go func() {
		defer close(done)
		for {
			select {
			case s := <-signals:
				if s == syscall.SIGWINCH {
					rows, columns := windowSize()
					select {
					case sizes <- api.WindowSize{Rows: rows, Columns: columns}:
					case <-ctx.Done():
					}
				} else if number, ok := s.(syscall.Signal); ok {
					select {
					case toProgram <- number:
					case <-ctx.Done():
					}
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	status, err := c.Exec(ctx, vm, program, std)
	if err != nil && status != 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "Error:", err)
		err = nil
	}
	if err == nil && status != 0 {
		err = exitStatus(status)
	}
	return err
}

// environment fills in the values of variables that have none.
func environment(env []string) (all []string) {
	for _, e := range env {
		if !strings.Contains(e, "=") {
			value, ok := os.LookupEnv(e)
			if !ok {
				continue // as docker does
			}
			e += "=" + value
		}
		all = append(all, e)
	}
	return all
}

// environmentWith is the environment that flags and files give; flags come last, and so prevail.
func environmentWith(env, files []string) (all []string, err error) {
	for _, path := range files {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, &usageError{fmt.Errorf("--env-file: %w", err)}
		}
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				all = append(all, line)
			}
		}
	}
	return environment(append(all, env...)), nil
}

// windowSize is that of the terminal; 0 if there is none.
func windowSize() (rows, columns uint16) {
	w, h, err := term.GetSize(0)
	if err != nil {
		return 0, 0
	}
	return uint16(h), uint16(w)
}
