package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// Execution is how a program is executed.
type Execution struct {
	Path string // below the root directory
	Env  []string
	Dir  string
	User user.ExecUser
}

// defaultPath is where programs are looked up if the environment has no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Resolve finds out how a program is executed in a root directory, whose files are anybody's, where
// programs are executed as base says unless the program says otherwise. The error is a [StartError].
func Resolve(root string, p *Program, base Execution) (*Execution, error) {
	e := &Execution{Env: slices.Clone(base.Env), Dir: path.Join("/", base.Dir, p.GetDir()), User: base.User}
	if path.IsAbs(p.GetDir()) {
		e.Dir = path.Clean(p.GetDir())
	}
	if name := p.GetUser(); name != "" {
		found, err := lookUpUser(root, name)
		if err != nil {
			return nil, &StartError{CannotExecute, err.Error()}
		}
		e.User = *found
		e.Env = setenv(e.Env, "HOME="+found.Home)
	} else if e.User.Home != "" && getenv(e.Env, "HOME") == "" {
		e.Env = setenv(e.Env, "HOME="+e.User.Home)
	}
	if p.GetTty() && getenv(e.Env, "TERM") == "" {
		e.Env = setenv(e.Env, "TERM=xterm")
	}
	if err := CheckEnv(p.GetEnv()); err != nil {
		return nil, &StartError{CannotExecute, err.Error()}
	}
	e.Env = WithEnv(e.Env, p.GetEnv())
	dir, err := openIn(root, e.Dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, &StartError{CannotExecute, fmt.Sprintf("working directory: %s", err)}
	}
	dir.Close()
	e.Path, err = findProgram(root, e, p.GetArgs()[0])
	return e, err
}

// CheckEnv refuses what is not NAME=value. It does not repeat it, because it may be a secret.
func CheckEnv(env []string) error {
	for n, v := range env {
		if name, _, ok := strings.Cut(v, "="); !ok || name == "" {
			return fmt.Errorf("environment: entry %d is not NAME=value", n+1)
		}
	}
	return nil
}

// WithEnv returns an environment with more variables. Of several values the last counts.
func WithEnv(env, more []string) []string {
	env = slices.Clone(env)
	for _, v := range more {
		env = setenv(env, v)
	}
	return env
}

func setenv(env []string, v string) []string {
	name, _, _ := strings.Cut(v, "=")
	if i := slices.IndexFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") }); i >= 0 {
		env[i] = v
		return env
	}
	return append(env, v)
}

func getenv(env []string, name string) string {
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// findProgram looks a program up as execvp(3) does.
func findProgram(root string, e *Execution, name string) (string, error) {
	at := []string{name}
	if !strings.Contains(name, "/") {
		search := getenv(e.Env, "PATH")
		if search == "" {
			search = defaultPath
		}
		at = nil
		for _, dir := range strings.Split(search, ":") {
			at = append(at, dir+"/"+name)
		}
	}
	failed := &StartError{NotFound, fmt.Sprintf("%s: not found", name)}
	if len(at) > 1 {
		failed.Reason += " on PATH"
	}
	for _, p := range at {
		if !path.IsAbs(p) {
			p = path.Join(e.Dir, p)
		}
		f, err := openIn(root, p, unix.O_PATH)
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
				failed = &StartError{CannotExecute, fmt.Sprintf("%s: %s", p, errors.Unwrap(err))}
			}
			continue
		}
		info, err := f.Stat()
		f.Close()
		switch {
		case err != nil:
			failed = &StartError{CannotExecute, err.Error()}
		case info.IsDir():
			failed = &StartError{CannotExecute, fmt.Sprintf("%s: is a directory", p)}
		case info.Mode()&0o111 == 0:
			failed = &StartError{CannotExecute, fmt.Sprintf("%s: is not executable (mode %s)", p, info.Mode())}
		default:
			return p, nil
		}
	}
	return "", failed
}

// openIn opens a file below root, whose links do not lead out of it.
func openIn(root, name string, flags int) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), name, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// maxUsers bounds what is read of passwd and group files, in bytes.
const maxUsers = 4 << 20

func lookUpUser(root, name string) (*user.ExecUser, error) {
	var files [2]io.Reader
	for n, path := range []string{"/etc/passwd", "/etc/group"} {
		f, err := openIn(root, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		if errors.Is(err, os.ErrNotExist) {
			files[n] = strings.NewReader("")
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look up user %q: %w", name, err)
		}
		defer f.Close()
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			return nil, fmt.Errorf("look up user %q: %s is no regular file", name, path)
		}
		files[n] = io.LimitReader(f, maxUsers)
	}
	found, err := user.GetExecUser(name, &user.ExecUser{Home: "/"}, files[0], files[1])
	if err != nil {
		return nil, fmt.Errorf("look up user %q: %w", name, err)
	}
	return found, nil
}

// system is the guest's own system.
type system struct{}

func (system) Root() (string, error) { return "/", nil }

// Start implements [Container].
func (system) Start(p *Program, stdin, stdout, stderr *os.File) (*Process, error) {
	e, err := Resolve("/", p, Execution{Env: os.Environ(), Dir: "/", User: user.ExecUser{Uid: os.Getuid(), Gid: os.Getgid(), Home: os.Getenv("HOME")}})
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{Path: e.Path, Args: p.GetArgs(), Env: e.Env, Dir: e.Dir, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	if p.GetUser() != "" {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(e.User.Uid), Gid: uint32(e.User.Gid)}
		for _, g := range e.User.Sgids {
			cmd.SysProcAttr.Credential.Groups = append(cmd.SysProcAttr.Credential.Groups, uint32(g))
		}
	}
	var tty *os.File
	if p.GetTty() {
		var program *os.File
		if tty, program, err = openTTY(p.GetWindowSize(), e.User.Uid); err != nil {
			return nil, &StartError{CannotExecute, err.Error()}
		}
		defer program.Close()
		stdin, stdout, stderr = program, program, program
		cmd.SysProcAttr.Setctty = true
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	if err := cmd.Start(); err != nil {
		if tty != nil {
			tty.Close()
		}
		if errors.Is(err, os.ErrNotExist) { // a script's interpreter
			return nil, &StartError{NotFound, err.Error()}
		}
		return nil, &StartError{CannotExecute, err.Error()}
	}
	return &Process{PID: cmd.Process.Pid, TTY: tty, Wait: func() (int, error) { return ExitStatus(cmd.Wait()) }}, nil
}

// ExitStatus is a program's exit status as from wait(2), from what [exec.Cmd.Wait] has returned.
func ExitStatus(err error) (int, error) {
	var exit *exec.ExitError
	if err == nil || !errors.As(err, &exit) {
		return 0, err
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return exit.ExitCode(), nil
}

// openTTY makes a terminal: our end, which can be polled, and the program's.
func openTTY(size *WindowSize, uid int) (_, program *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open terminal: %w", err)
	}
	ours := os.NewFile(uintptr(fd), "/dev/ptmx")
	defer func() {
		if err != nil {
			ours.Close()
		}
	}()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, fmt.Errorf("unlock terminal: %w", err)
	}
	if program, err = peerOf(fd); err != nil {
		return nil, nil, err
	}
	if err := errors.Join(setSize(ours, size), own(program, uid)); err != nil {
		return nil, nil, errors.Join(err, program.Close())
	}
	return ours, program, nil
}

// peerOf opens the other end of a terminal.
func peerOf(fd int) (*os.File, error) {
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return nil, fmt.Errorf("open terminal: %w", errno)
	}
	return os.NewFile(peer, "terminal"), nil
}

func own(tty *os.File, uid int) error {
	if uid == os.Getuid() {
		return nil
	}
	return tty.Chown(uid, -1)
}

// GiveTTY lets a user open a terminal, of which the caller has the other end, by its name.
func GiveTTY(tty *os.File, uid int) error {
	raw, err := tty.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		var peer *os.File
		if peer, err = peerOf(int(fd)); err == nil {
			err = errors.Join(own(peer, uid), peer.Close())
		}
	})
	return errors.Join(cerr, err)
}
