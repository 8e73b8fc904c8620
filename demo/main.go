// The demo does what the README's first tour does, with the commands a user would type: it builds blueprints, boots and snapshots a VM with
// Redis from an OCI image in a registry, resumes it, writes keys through a forwarded port, suspends, resumes again, and reads all keys back.
// Its last line on stdout is a JSON object with what was measured.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"drafter/internal/redisimage"
)

const (
	keys         = 1000
	externalAddr = "127.0.0.1:3333"
	stepTimeout  = 5 * time.Minute
)

// result is the demo's last line.
type result struct {
	Demo        string `json:"demo"`
	BootMS      int64  `json:"boot_ms"`    // VMM start to the agent's answer
	SuspendMS   int64  `json:"suspend_ms"` // SIGTERM's effect to the package being durable
	ResumeMS    int64  `json:"resume_ms"`  // command to running guest
	KeysWritten int    `json:"keys_written"`
	KeysLost    int    `json:"keys_lost"`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "== "+format+"\n", args...)
}

func run(ctx context.Context) (err error) {
	d := &demo{dir: "out/demo", drafter: "bin/drafter"}
	if err := os.RemoveAll(d.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	d.cache = filepath.Join(cache, "drafter", "debian")

	say("Making an OCI image of Redis from Debian's packages, and serving it from a registry")
	image, err := redisimage.Build(ctx, d.cache, d.dir)
	if err != nil {
		return fmt.Errorf("make Redis image: %w", err)
	}
	ref, stopRegistry, err := redisimage.Serve(image)
	if err != nil {
		return err
	}
	defer stopRegistry()

	say("Making the blueprint")
	if err := d.command(ctx, nil, "blueprint", "os", "--output", d.path("blueprint"), "--cache", d.cache); err != nil {
		return err
	}
	if err := d.command(ctx, nil, "blueprint", "oci", "docker://"+ref, "--output", d.path("blueprint/oci.ext4")); err != nil {
		return err
	}

	say("Starting the NAT")
	nat, err := d.start("nat", "nat")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nat.end()) }()
	if _, err := nat.await(ctx, "NAT is up"); err != nil {
		return err
	}

	r := result{Demo: "redis", KeysWritten: keys}
	say("Booting and snapshotting the VM")
	if err := d.snapshot(ctx, &r); err != nil {
		return err
	}
	if err := d.useVM(ctx, &r); err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Println(string(b))
	if r.KeysLost > 0 {
		return fmt.Errorf("%d keys were lost", r.KeysLost)
	}
	return nil
}

type demo struct{ dir, cache, drafter string }

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

// files maps devices to file names.
var files = []struct{ device, file string }{
	{"state", "state.bin"}, {"memory", "memory.bin"}, {"kernel", "vmlinux"}, {"disk", "rootfs.ext4"}, {"config", "config.json"}, {"oci", "oci.ext4"},
}

func (d *demo) snapshot(ctx context.Context, r *result) error {
	var devices []map[string]string
	for _, f := range files {
		device := map[string]string{"name": f.device, "output": d.path("package/" + f.file)}
		if input := d.path("blueprint/" + f.file); exists(input) {
			device["input"] = input
		}
		devices = append(devices, device)
	}
	var report bytes.Buffer
	err := d.command(ctx, &report, "snapshotter", "--report", "--enable-output=false", "--chroot-base-dir", d.path("vms"), "--devices", encode(devices))
	if err != nil {
		return err
	}
	return json.Unmarshal(report.Bytes(), r)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings
	}
	return string(b)
}

// useVM writes in one run of the VM and reads in the next.
func (d *demo) useVM(ctx context.Context, r *result) error {
	var devices []map[string]string
	for _, f := range files {
		devices = append(devices, map[string]string{"name": f.device, "path": d.path("package/" + f.file)})
	}
	runner := []string{"runner", "--chroot-base-dir", d.path("vms"), "--devices", encode(devices)}
	var runID string
	err := d.withVM(ctx, runner, r, func(client *redis.Client) error {
		say("Writing %d keys through %s", keys, externalAddr)
		for i := range keys {
			if err := client.Set(ctx, fmt.Sprintf("key:%d", i), value(i), 0).Err(); err != nil {
				return fmt.Errorf("write key %d: %w", i, err)
			}
		}
		var err error
		runID, err = redisRunID(ctx, client)
		return err
	})
	if err != nil {
		return err
	}
	return d.withVM(ctx, runner, r, func(client *redis.Client) error {
		say("Reading the keys back")
		for i := range keys {
			got, err := client.Get(ctx, fmt.Sprintf("key:%d", i)).Result()
			if err != nil && !errors.Is(err, redis.Nil) {
				return fmt.Errorf("read key %d: %w", i, err)
			}
			if got != value(i) {
				r.KeysLost++
			}
		}
		now, err := redisRunID(ctx, client)
		if err == nil && now != runID {
			err = fmt.Errorf("this is another Redis process (run id %s, not %s): the VM was not resumed", now, runID)
		}
		return err
	})
}

func value(i int) string { return fmt.Sprintf("value %d of the demo", i*i) }

func redisRunID(ctx context.Context, client *redis.Client) (string, error) {
	info, err := client.Info(ctx, "server").Result()
	if err != nil {
		return "", fmt.Errorf("ask Redis for its run id: %w", err)
	}
	_, after, _ := strings.Cut(info, "run_id:")
	id, _, _ := strings.Cut(after, "\r\n")
	return id, nil
}

// withVM resumes the VM, forwards its port, lets use talk to Redis, and suspends the VM.
func (d *demo) withVM(ctx context.Context, runner []string, r *result, use func(*redis.Client) error) (err error) {
	say("Resuming the VM")
	begin := time.Now()
	vm, err := d.start("runner", runner...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, vm.end()) }()
	resumed, err := vm.await(ctx, "Resumed VM")
	if err != nil {
		return err
	}
	// The line comes after the agent's answer; the guest ran before.
	r.ResumeMS = (resumed.Time.Sub(begin) - time.Duration(resumed.AgentAfter-resumed.Took)).Milliseconds()
	forwarder, err := d.start("forwarder", "forwarder", "--port-forwards", encode([]map[string]string{
		{"netns": "ark0", "internalPort": "6379", "protocol": "tcp", "externalAddr": externalAddr},
	}))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, forwarder.end()) }()
	if _, err := forwarder.await(ctx, "Forwarding"); err != nil {
		return err
	}
	client := redis.NewClient(&redis.Options{Addr: externalAddr, MaxRetries: 10})
	err = use(client)
	if err = errors.Join(err, client.Close()); err != nil {
		return err
	}
	if err := forwarder.end(); err != nil {
		return err
	}
	say("Suspending the VM")
	if err := vm.end(); err != nil {
		return err
	}
	suspended, err := vm.await(ctx, "Suspended VM")
	r.SuspendMS = time.Duration(suspended.Took).Milliseconds()
	return err
}

// command runs drafter to its end, showing what it says.
func (d *demo) command(ctx context.Context, stdout io.Writer, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.drafter, args...)
	cmd.Stdout, cmd.Stderr = stdout, os.Stderr
	if stdout == nil {
		cmd.Stdout = os.Stderr
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("drafter %s: %w", args[0], err)
	}
	return nil
}

// service is a drafter command that runs in the background. Its log is read line by line; its output goes to a file.
type service struct {
	name  string
	cmd   *exec.Cmd
	lines chan logLine // closed when the command has ended
	done  chan error
	ended bool
}

type logLine struct {
	Time       time.Time `json:"time"`
	Message    string    `json:"msg"`
	Took       int64     `json:"took"`       // nanoseconds
	AgentAfter int64     `json:"agentAfter"` // nanoseconds
	raw        string
}

func (d *demo) start(name string, args ...string) (*service, error) {
	output, err := os.OpenFile(d.path(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer output.Close()
	s := &service{name: name, cmd: exec.Command(d.drafter, append(args, "--log-format", "json")...), lines: make(chan logLine, 1000), done: make(chan error, 1)}
	s.cmd.Stdout = output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the demo, which ends its services in order
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start drafter %s: %w; run 'make build'", name, err)
	}
	go func() {
		var last string
		scanner := bufio.NewScanner(stderr)
		for scanner.Scan() {
			line := logLine{raw: scanner.Text()}
			if json.Unmarshal(scanner.Bytes(), &line) != nil {
				last = line.raw // an error message
			}
			s.lines <- line
		}
		close(s.lines)
		err := s.cmd.Wait()
		if err != nil {
			err = fmt.Errorf("drafter %s: %w: %s", name, err, last)
		}
		s.done <- err
	}()
	return s, nil
}

// await returns the next log line with a message.
func (s *service) await(ctx context.Context, message string) (logLine, error) {
	timeout := time.NewTimer(stepTimeout)
	defer timeout.Stop()
	for {
		select {
		case line, ok := <-s.lines:
			if !ok {
				return line, errors.Join(fmt.Errorf("drafter %s ended before %q", s.name, message), s.end())
			}
			if line.Message == message {
				return line, nil
			}
		case <-ctx.Done():
			return logLine{}, ctx.Err()
		case <-timeout.C:
			return logLine{}, fmt.Errorf("drafter %s did not get to %q in %s", s.name, message, stepTimeout)
		}
	}
}

// end terminates the command, if it still runs, and returns its error.
func (s *service) end() error {
	if s.ended {
		return nil
	}
	s.ended = true
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return <-s.done
}
