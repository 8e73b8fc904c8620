// Package cli is the drafter command: one file per subcommand.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/lmittmann/tint"
	"github.com/spf13/cobra"

	"drafter/internal/detached"
	"drafter/internal/output"
)

// Exit codes, stable.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

const exitCodeHelp = `
Exit codes: 0 success, 1 failure, 2 wrong usage.`

// Main runs the command that args name and returns its exit code. args[0] is the program's name:
// "drafter-nat" means "drafter nat". args are those of the process itself (os.Args): secrets in
// them are overwritten.
//
// Nothing that happens to stdout and stderr ends or blocks it while it works: a command may hold a
// VM, or rules of the host's network.
func Main(args []string) int {
	args = hideSecrets(args)
	// SIGTERM, and SIGHUP when the terminal goes away, end a command as well as Ctrl-C does.
	// Further signals change nothing: a command that suspends its VM finishes that.
	endings := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as with nohup
		endings = append(endings, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), endings...)
	defer stop()
	// A write to a pipe without a reader then fails. SIGPIPE is not ignored, because children would
	// inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	// In the background of a terminal, output then goes on and there is no input; otherwise the
	// process would stop.
	signal.Ignore(syscall.SIGTTIN, syscall.SIGTTOU)
	stderr := output.New(detached.Stderr(), logRoom, plainNotice)
	defer stderr.Close()
	return Run(ctx, args, results{os.Stdout}, stderr)
}

// logRoom is how much of the log waits for who reads it, in bytes.
const logRoom = 1 << 20

func plainNotice(bytes int64) []byte {
	return fmt.Appendf(nil, "\nLeft out %d bytes of output\n", bytes)
}

// results is for the output that a command was asked for. It waits for its reader. When the reader
// is gone, as in 'drafter … | head', the rest is dropped.
type results struct{ *os.File }

// Write implements [io.Writer].
func (r results) Write(p []byte) (int, error) {
	n, err := r.File.Write(p)
	if errors.Is(err, syscall.EPIPE) {
		return len(p), nil
	}
	return n, err
}

// Run is Main with its streams and context given. Ending ctx ends the command cleanly.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := Root(stderr) //nolint:contextcheck // a command has its context from ExecuteContext
	root.SetOut(stdout)
	root.SetErr(stderr)
	words := args[1:]
	if name, ok := strings.CutPrefix(filepath.Base(args[0]), "drafter-"); ok {
		words = append([]string{name}, words...)
	}
	root.SetArgs(words)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	// One line, whatever it is made of.
	fmt.Fprintf(stderr, "Error: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailure
}

// exitStatus is that of a program that a command has run. Nothing is said of it.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// usageError marks errors of the command line itself.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// Root returns the whole command tree. Log lines go to stderr.
func Root(stderr io.Writer) *cobra.Command {
	var format, level string
	root := &cobra.Command{
		Use:   "drafter",
		Short: "Package, start, clone and live-migrate virtual machines",
		Long: `Drafter turns OCI images, or any Linux, into virtual machines that can be
snapshotted, packaged, cloned copy-on-write and live-migrated.

A first tour, as root:
  drafter blueprint os --output out/blueprint
  drafter blueprint oci docker://valkey/valkey:latest --output out/blueprint/oci.ext4
  drafter nat
  drafter snapshotter --netns ark0 --devices '[…]'
  drafter runner --netns ark0 --devices '[…]'
  drafter forwarder

Each command also answers to its own name: a link drafter-runner to this program is 'drafter
runner'.
` + exitCodeHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			return setUpLog(stderr, format, level)
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true // there is ours
	root.PersistentFlags().StringVar(&format, "log-format", "text", "Format of log lines on stderr: text or json")
	root.PersistentFlags().StringVar(&level, "log-level", "info", "Least severe log lines to show: debug, info, warn or error")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{fmt.Errorf("%w; see '%s --help'", err, cmd.CommandPath())}
	})
	root.AddCommand(newDaemon(), newRunVM(), newPS(), newStart(), newStop(), newKill(), newRemove(), newExec(), newCopy(), newInspect(), newLogs(), newEvents())
	root.AddCommand(newAttach(), newRestart(), newRename(), newWait(), newPort(), newStats(), newTop())
	root.AddCommand(newMove(), newUpgrade(), newDrain(), newUndrain(), newHost(), newDoctor())
	root.AddCommand(newImages(), newImage(), newPackage(), newSnapshot(), newPrune(), newCompletion())
	root.AddCommand(newNAT(), newForwarder(), newAnchor(), newBlueprint(), newSnapshotter(), newPackager(), newRunner(), newPeer(), newMounter(), newRegistry(), newPush(), newPull(), newSign(), newVerify(), newTerminator(), newCheckpoint(), newDevice(), newVersion())
	return root
}

func setUpLog(stderr io.Writer, format, level string) error {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return &usageError{fmt.Errorf("--log-level %q is unknown; choose debug, info, warn or error", level)}
	}
	var logger func(io.Writer) *slog.Logger
	switch format {
	case "json":
		logger = func(w io.Writer) *slog.Logger {
			return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: l}))
		}
	case "text":
		colour := output.Terminal(stderr) != nil && os.Getenv("NO_COLOR") == ""
		logger = func(w io.Writer) *slog.Logger {
			return slog.New(tint.NewTextHandler(w, &tint.Options{Level: l, TimeFormat: time.TimeOnly, NoColor: !colour}))
		}
	default:
		return &usageError{fmt.Errorf("--log-format %q is unknown; choose text or json", format)}
	}
	if w, ok := stderr.(*output.Writer); ok {
		w.Notice(func(bytes int64) []byte {
			var line strings.Builder
			logger(&line).Warn("Left out log lines that could not be written", "bytes", bytes)
			return []byte(line.String())
		})
	}
	slog.SetDefault(logger(stderr))
	return nil
}

// noArgs refuses arguments that are no flags.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return &usageError{fmt.Errorf("unexpected argument %q; see '%s --help'", args[0], cmd.CommandPath())}
	}
	return nil
}
