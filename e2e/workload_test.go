package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"drafter/agent"
	"drafter/internal/tour"
	"drafter/peer"
	"drafter/vmm"
)

// outcome runs a program in a guest to its end.
func outcome(t *testing.T, c *agent.Client, stdin string, command agent.Command) (stdout, stderr string, status int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	command.Stdin = stdin != ""
	s, err := c.Run(ctx, command)
	if err != nil {
		t.Fatalf("%v: %v", command.Args, err)
	}
	var out, errOut []byte
	var all sync.WaitGroup
	all.Go(func() { out, _ = io.ReadAll(s.Stdout) })
	all.Go(func() { errOut, _ = io.ReadAll(s.Stderr) })
	if command.Stdin {
		if _, err := io.WriteString(s.Stdin, stdin); err != nil {
			t.Errorf("%v: %v", command.Args, err)
		}
		if err := s.Stdin.Close(); err != nil {
			t.Errorf("%v: %v", command.Args, err)
		}
	}
	all.Wait()
	if status, err = s.Wait(); err != nil {
		t.Fatalf("%v: %v", command.Args, err)
	}
	return string(out), string(errOut), status
}

// Programs run in a guest's container and in its system, with input, terminal, signals and exit
// status; files are copied in and out; and a program whose output nobody reads does not keep the
// guest from being suspended.
func TestWorkload(t *testing.T) {
	s := emptySite(t)
	dir := filepath.Join(s.dir, "instance")
	p := resume(t, "ark0", dir)
	c := p.Agent()
	ctx, end := context.WithTimeout(t.Context(), 3*time.Minute)
	defer end()

	// The image has no shell. Its files are copied into it.
	if _, err := c.Run(ctx, agent.Command{Args: []string{"sh"}}); err == nil {
		t.Error("the container has a shell")
	} else if start := (*agent.StartError)(nil); !errors.As(err, &start) || start.ExitStatus != agent.NotFound {
		t.Errorf("a program that is not in the container: %v", err)
	}
	if _, err := c.Run(ctx, agent.Command{Args: []string{"/etc/passwd"}}); err == nil {
		t.Error("a file that is no program runs")
	} else if start := (*agent.StartError)(nil); !errors.As(err, &start) || start.ExitStatus != agent.CannotExecute {
		t.Errorf("a file that is no program: %v", err)
	}
	if stdout, stderr, status := outcome(t, c, "SET a b\nGET a\n", agent.Command{Args: []string{"redis-cli"}}); status != 0 || stdout != "OK\nb\n" {
		t.Errorf("redis-cli: %q, %q, %d", stdout, stderr, status)
	}
	busybox, err := c.CopyOut(ctx, agent.File{Path: "/bin/busybox", System: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CopyIn(ctx, agent.File{Path: "/usr/bin"}, busybox); err != nil {
		t.Fatal(err)
	}
	if err := busybox.Close(); err != nil {
		t.Error(err)
	}
	shell := func(script string) agent.Command {
		return agent.Command{Args: []string{"busybox", "sh", "-c", script}}
	}
	who := shell("busybox id -un; pwd; echo $HOME-$A; exit 42")
	who.Env = []string{"A=b"}
	if stdout, stderr, status := outcome(t, c, "", who); status != 42 || stdout != "redis\n/data\n/data-b\n" {
		t.Errorf("as the service: %q, %q, %d", stdout, stderr, status)
	}
	who.User, who.Dir = "root", "/usr"
	if stdout, stderr, status := outcome(t, c, "", who); status != 42 || stdout != "root\n/usr\n/root-b\n" {
		t.Errorf("as root: %q, %q, %d", stdout, stderr, status)
	}
	if stdout, stderr, status := outcome(t, c, "", agent.Command{Args: []string{"sh", "-c", "hostname; test -d /run/bundle && kill -9 $$"}, System: true}); status != 137 || stdout != "drafter\n" {
		t.Errorf("in the system: %q, %q, %d", stdout, stderr, status)
	}

	// A terminal in the container.
	terminal := shell(`trap 'echo size $(busybox stty size)' WINCH; trap 'echo interrupted' INT; busybox stty size; echo there > $(busybox tty); while ! read line; do :; done; busybox cat > /dev/null; echo end; exit 5`)
	terminal.TTY, terminal.Rows, terminal.Columns, terminal.Stdin = true, 31, 117, true
	session, err := c.Run(ctx, terminal)
	if err != nil {
		t.Fatal(err)
	}
	await := func(text string) {
		t.Helper()
		var got []byte
		b := make([]byte, 1024)
		for !strings.Contains(string(got), text) {
			n, err := session.Stdout.Read(b)
			got = append(got, b[:n]...)
			if err != nil {
				t.Fatalf("%q, then %v; want %q", got, err, text)
			}
		}
	}
	await("31 117\r\nthere\r\n")
	if err := session.Resize(20, 50); err != nil {
		t.Fatal(err)
	}
	await("size 20 50\r\n")
	if _, err := io.WriteString(session.Stdin, "\x03"); err != nil {
		t.Fatal(err)
	}
	await("interrupted\r\n")
	if _, err := io.WriteString(session.Stdin, "a\n"); err != nil {
		t.Fatal(err)
	}
	if err := session.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	await("end\r\n")
	if status, err := session.Wait(); err != nil || status != 5 {
		t.Errorf("terminal: %d, %v", status, err)
	}

	// Signals reach the program, and the end of a context all that it has started.
	session, err = c.Run(ctx, shell("trap 'exit 6' USR1; echo ready; while :; do busybox sleep 0.1; done"))
	if err != nil {
		t.Fatal(err)
	}
	await("ready\n")
	if err := session.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	if status, err := session.Wait(); err != nil || status != 6 {
		t.Errorf("signal: %d, %v", status, err)
	}
	short, cancel := context.WithCancel(ctx)
	session, err = c.Run(short, shell("busybox sleep 4711 & busybox sleep 4712 & echo ready; wait"))
	if err != nil {
		t.Fatal(err)
	}
	await("ready\n")
	cancel()
	if _, err := session.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("ends with %v", err)
	}
	guest(t, p, "while ps | grep -v grep | grep -q 'sleep 471[12]'; do sleep 0.1; done")

	copyTree(ctx, t, c)

	// What the service prints.
	boot, printed := logsUntil(t, c, 0, "Ready to accept connections")

	// What nobody reads.
	var sessions []*agent.Session
	for n := range 20 {
		command := shell("exec busybox cat /dev/zero")
		if n%2 == 1 {
			command = shell("exec busybox sleep 4713")
			command.Stdin = true
		}
		session, err := c.Run(ctx, command)
		if err != nil {
			t.Fatal(err)
		}
		sessions = append(sessions, session)
		if command.Stdin {
			go io.Copy(session.Stdin, zeros{})
		}
	}
	for range 5 {
		began := time.Now()
		if _, err := c.CatchUp(ctx, time.Nanosecond); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > time.Second { // this host emulates
			t.Errorf("a call took %s beside %d programs", took, len(sessions))
		} else {
			t.Logf("a call took %s beside %d programs", took, len(sessions))
		}
	}
	began := time.Now()
	if err := p.Suspend(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("suspended in %s", time.Since(began))
	for _, session := range sessions {
		if _, err := session.Wait(); err == nil {
			t.Error("a program of a suspended guest has ended well")
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = resume(t, "ark0", dir)
	guest(t, p, "while ps | grep -v grep | grep -qE 'sleep 4713|cat /dev/zero'; do sleep 0.1; done")
	if stdout, stderr, status := outcome(t, p.Agent(), "", shell("echo $PATH | busybox wc -l")); status != 0 || stdout != "1\n" {
		t.Errorf("after the resume: %q, %q, %d", stdout, stderr, status)
	}

	// Its log goes on where it was, and tells what is of before. The guest powers off when the service
	// ends, and has said how.
	part, err := p.Agent().Logs(ctx, 0)
	if err != nil || part.Boot != boot || part.Resumed < printed || part.Resumed > part.Next {
		t.Errorf("%+v, %v; want boot %s, resumed at %d", part, err, boot, printed)
	}
	guest(t, p, "kill -9 $(cat /run/oci.pid)")
	for part != nil && !part.Ended {
		if part, err = p.Agent().Logs(ctx, part.Next); err != nil {
			t.Fatal(err)
		}
	}
	if part.ExitStatus != 137 {
		t.Errorf("the service ends with %d", part.ExitStatus)
	}
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
}

// logsUntil reads what a guest's service prints until that has text.
func logsUntil(t *testing.T, c *agent.Client, position int64, text string) (boot string, next int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for got := ""; !strings.Contains(got, text); {
		part, err := c.Logs(ctx, position)
		if err != nil {
			t.Fatalf("%q, then %v; want %q", got, err, text)
		}
		for _, chunk := range part.Chunks {
			got += string(chunk.Data)
		}
		boot, position = part.Boot, part.Next
	}
	return boot, position
}

// A guest that holds its service is packaged without secrets, and its instances are given them.
func TestHeld(t *testing.T) {
	s := emptySite(t)
	dir := filepath.Join(s.dir, "held")
	if err := s.Run(t.Context(), io.Discard, "snapshotter", "--netns", "ark0", "--enable-output=false", "--chroot-base-dir", filepath.Join(s.dir, "vms"), "--boot-args", vmm.DefaultBootArgs+" drafter.hold",
		"--devices", tour.SnapshotterDevices(filepath.Join(work, "out/blueprint"), dir)); err != nil {
		t.Fatal(err)
	}
	instance := filepath.Join(s.dir, "instance")
	devices, err := peer.PackageDevices(dir, instance)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPeer("ark0", instance, func(c *peer.Config) { c.Devices = devices })
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx := t.Context()
	if err := p.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	c := p.Agent()
	ctx, end := context.WithTimeout(ctx, 3*time.Minute)
	defer end()
	if r, err := c.Ready(ctx); err != nil || !r.GetHeld() || r.GetReady() {
		t.Errorf("%v, %v", r, err)
	}
	if s, err := c.Run(ctx, agent.Command{Args: []string{"redis-cli"}}); err == nil || !strings.Contains(err.Error(), "does not run") {
		t.Errorf("%v, %v", s, err)
	}
	if err := c.Start(ctx, []string{"SECRET=rosebud"}); err != nil {
		t.Fatal(err)
	}
	logsUntil(t, c, 0, "Ready to accept connections")
	for r := (*agent.ReadyResponse)(nil); !r.GetReady(); {
		if r, err = c.Ready(ctx); err != nil || r.GetHeld() {
			t.Fatalf("%v, %v", r, err)
		}
	}
	// Redis has overwritten its own environment.
	guest(t, p, "grep -q SECRET=rosebud /run/crun/oci/config.json && ! grep -q rosebud /run/bundle/config.json && test ! -e /run/config.json")
	if stdout, stderr, status := outcome(t, c, "PING\n", agent.Command{Args: []string{"redis-cli"}}); status != 0 || stdout != "PONG\n" {
		t.Errorf("%q, %q, %d", stdout, stderr, status)
	}
	if err := c.Start(ctx, nil); err == nil {
		t.Error("it was started twice")
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// copyTree copies a tree with links into a container and out again.
func copyTree(ctx context.Context, t *testing.T, c *agent.Client) {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for _, h := range []*tar.Header{
		{Name: "tree/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 999, Gid: 999},
		{Name: "tree/file", Typeflag: tar.TypeReg, Mode: 0o640, Uid: 999, Gid: 1, Size: int64(len(content)), ModTime: time.Unix(1234567890, 0)},
		{Name: "tree/hard", Typeflag: tar.TypeLink, Linkname: "tree/file", Mode: 0o640, Uid: 999, Gid: 1, ModTime: time.Unix(1234567890, 0)},
		{Name: "tree/out", Typeflag: tar.TypeSymlink, Linkname: "/run/bundle"}, // which the guest's system has
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content[:h.Size]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := c.CopyIn(ctx, agent.File{Path: "/data"}, &archive); err != nil {
		t.Fatal(err)
	}
	out, err := c.CopyOut(ctx, agent.File{Path: "/data/tree"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for r := tar.NewReader(out); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil || len(b) > 0 && !bytes.Equal(b, content) {
			t.Errorf("%s: %d bytes, %v", h.Name, len(b), err)
		}
		got = append(got, fmt.Sprintf("%s %c %o %d:%d %d %s", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, len(b), h.Linkname))
	}
	if err := out.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("1 MiB copied in and out in %s", time.Since(began))
	want := []string{"tree/ 5 750 999:999 0 ", "tree/file 0 640 999:1 1048576 ", "tree/hard 1 640 999:1 0 tree/file", "tree/out 2 777 0:0 0 /run/bundle"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%q\nwant %q", got, want)
	}
	if _, err := c.CopyOut(ctx, agent.File{Path: "/data/tree/out/config.json"}); err == nil {
		t.Error("a link leads out of the container")
	}
	if _, err := c.Stat(ctx, agent.File{Path: "/run/bundle/config.json", System: true}); err != nil {
		t.Errorf("where it would lead: %v", err)
	}
	if info, err := c.Stat(ctx, agent.File{Path: "/data/tree/file"}); err != nil || info.Size != int64(len(content)) || info.Modified.Unix() != 1234567890 {
		t.Errorf("%+v, %v", info, err)
	}
}
