package guest

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"drafter/agent"
)

// The init and the agent of one guest, without a container: the test is that.
func TestSupervised(t *testing.T) {
	init, err := newControl()
	if err != nil {
		t.Fatal(err)
	}
	files := init.agentFiles()
	conn, err := net.FileConn(files[2])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	container := &Container{process: specs.Process{Args: []string{"sh"}, Env: []string{"A=1", "B=2"}}}
	s := &agent.Server{}
	if err := supervised(ctx, s, container, conn, files[0], files[1], true, true); err != nil {
		t.Fatal(err)
	}
	go init.listen()
	if _, _, err := s.Main(); err == nil {
		t.Error("the program of a container that is held has begun")
	}
	// Its start, which fails at first.
	answers := make(chan error, 1)
	start := func(env ...string) []string {
		t.Helper()
		go func() { answers <- s.StartWorkload(env) }()
		return (<-init.starts).Env
	}
	if got := start("SECRET=x"); !slices.Equal(got, []string{"SECRET=x"}) || !s.Held() {
		t.Errorf("%q", got)
	}
	init.answer(errors.New("no room"))
	if err := <-answers; err == nil || err.Error() != "no room" || !s.Held() {
		t.Errorf("a start that fails: %v", err)
	}
	start("SECRET=y", "A=3")
	init.answer(nil)
	if err := <-answers; err != nil || s.Held() || !slices.Equal(container.process.Env, []string{"A=3", "B=2", "SECRET=y"}) {
		t.Errorf("%v, %q", err, container.process.Env)
	}
	if err := s.StartWorkload(nil); err == nil {
		t.Error("it was started twice")
	}
	if err := s.StartWorkload([]string{"hunter2"}); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("no variable: %v", err)
	}
	// Its program, for which it waits.
	args, ended, err := s.Main()
	if err != nil || !slices.Equal(args, []string{"sh"}) {
		t.Errorf("%q, %v", args, err)
	}
	if _, _, err := s.Main(); err == nil {
		t.Error("its program has begun twice")
	}
	ended(7)
	if status := exited(<-init.exits); status.ExitStatus() != 7 {
		t.Errorf("its program has ended with %d", status.ExitStatus())
	}
	// Its output, and its end, of which a host hears.
	if _, err := init.stdout[1].WriteString("out\n"); err != nil {
		t.Fatal(err)
	}
	r, err := s.Logs(ctx, &agent.LogsRequest{})
	if err != nil || len(r.GetChunks()) != 1 || string(r.GetChunks()[0].GetData()) != "out\n" {
		t.Errorf("%v, %v", r, err)
	}
	// The end is behind all output, even of what is told later.
	killed := 137
	init.send(message{Ended: &killed})
	asked := make(chan *agent.LogsResponse, 1)
	go func(at int64) {
		r, err := s.Logs(ctx, &agent.LogsRequest{Position: at})
		if err != nil {
			t.Error(err)
		}
		asked <- r
	}(r.GetNextPosition())
	select {
	case r := <-asked:
		t.Fatalf("it has ended, and may print: %v", r)
	case <-time.After(50 * time.Millisecond):
	}
	if _, err := init.stderr[1].WriteString("last words\n"); err != nil {
		t.Fatal(err)
	}
	init.closeOutput()
	if r = <-asked; r == nil {
		return
	}
	for at := r.GetNextPosition(); !r.GetEnded(); at = r.GetNextPosition() {
		if r, err = s.Logs(ctx, &agent.LogsRequest{Position: at}); err != nil {
			t.Fatal(err)
		}
	}
	if r.GetExitStatus() != 137 || r.GetNextPosition() != int64(len("out\nlast words\n")) {
		t.Errorf("%v", r)
	}
	if _, err := s.Logs(ctx, &agent.LogsRequest{Heard: true}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-init.heard:
	case <-time.After(10 * time.Second):
		t.Error("the init does not learn that the host knows")
	}
}

// A guest without a host does not wait for long.
func TestNobodyHears(t *testing.T) {
	init, err := newControl()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	init.tell(syscall.WaitStatus(9)) // killed
	var m message
	if err := json.NewDecoder(init.socket[1]).Decode(&m); err != nil || m.Ended == nil || *m.Ended != 137 {
		t.Errorf("%+v, %v", m, err)
	}
	if took := time.Since(began); took < hearTimeout || took > 5*hearTimeout {
		t.Errorf("it took %s", took)
	}
}

// The secrets of a container are added to its config, in which all else stays.
func TestConfigWith(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(`{"ociVersion":"1.0.2","process":{"args":["x"],"env":["A=1","B=2"],"ours":{"n":12345678901234567}},"theirs":[1]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	raw, err := configWith(path, []string{"B=3", "C=4"})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"ociVersion":"1.0.2","process":{"args":["x"],"env":["A=1","B=3","C=4"],"ours":{"n":12345678901234567}},"theirs":[1]}`; string(raw) != want {
		t.Errorf("%s\nwant %s", raw, want)
	}
	for _, bad := range []string{"", "{}", `{"process":1}`, `{"process":{"env":{}}}`} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if raw, err := configWith(path, []string{"A=1"}); err == nil {
			t.Errorf("%s became %s", bad, raw)
		}
	}
}

// A container that waits for its program has another one meanwhile, and all else as it was.
func TestWaitingConfig(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := waitingConfig([]byte(`{"mounts":[{"destination":"/dev"}],"process":{"args":["x"],"user":{"uid":7}},"theirs":[1]}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"mounts":[{"destination":"/dev"},{"destination":"/dev/drafter-idle","type":"bind","source":"` + self +
		`","options":["bind","ro","nosuid"]}],"process":{"args":["/dev/drafter-idle"],"user":{"uid":7}},"theirs":[1]}`; string(raw) != want {
		t.Errorf("%s\nwant %s", raw, want)
	}
	for _, bad := range []string{"", "{}", `{"process":1}`, `{"process":null}`, `{"process":{},"mounts":{}}`} {
		if raw, err := waitingConfig([]byte(bad)); err == nil {
			t.Errorf("%s became %s", bad, raw)
		}
	}
}

// What a host asks for in a container has the rights of the service.
func TestDescribe(t *testing.T) {
	root := t.TempDir()
	for name, mode := range map[string]os.FileMode{"bin/x": 0o755, "etc/passwd": 0o644} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755), os.WriteFile(filepath.Join(root, name), []byte("app:x:1000:1001::/home/app:/bin/sh\n"), mode)); err != nil {
			t.Fatal(err)
		}
	}
	rights := []string{"CAP_CHOWN", "CAP_NET_RAW"}
	c := &Container{process: specs.Process{
		Args: []string{"service"}, Env: []string{"PATH=/bin", "HOME=/root"}, Cwd: "/etc", Capabilities: &specs.LinuxCapabilities{Bounding: rights, Effective: rights, Permitted: rights},
		User: specs.User{AdditionalGids: []uint32{7}},
	}}
	for name, tt := range map[string]struct {
		program *agent.Program
		want    string
	}{
		"as the service": {&agent.Program{Args: []string{"x", "y"}}, `{"user":{"uid":0,"gid":0,"additionalGids":[7]},"args":["x","y"],"env":["PATH=/bin","HOME=/root"],"cwd":"/etc","capabilities":{"bounding":["CAP_CHOWN","CAP_NET_RAW"],"effective":["CAP_CHOWN","CAP_NET_RAW"],"permitted":["CAP_CHOWN","CAP_NET_RAW"]}}`},
		"another": {
			&agent.Program{Args: []string{"/bin/x"}, User: "app", Dir: "/bin", Env: []string{"A=b"}, Tty: true, WindowSize: &agent.WindowSize{Rows: 3, Columns: 4}},
			`{"terminal":true,"consoleSize":{"height":3,"width":4},"user":{"uid":1000,"gid":1001},"args":["/bin/x"],"env":["PATH=/bin","HOME=/home/app","TERM=xterm","A=b"],"cwd":"/bin","capabilities":{"bounding":["CAP_CHOWN","CAP_NET_RAW"],"effective":["CAP_CHOWN","CAP_NET_RAW"],"inheritable":["CAP_NET_RAW"],"permitted":["CAP_CHOWN","CAP_NET_RAW"],"ambient":["CAP_NET_RAW"]}}`,
		},
	} {
		p, err := c.describe(root, tt.program)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		raw, err := json.Marshal(p)
		if err != nil || string(raw) != tt.want {
			t.Errorf("%s: %s\nwant %s, %v", name, raw, tt.want, err)
		}
	}
	if len(c.process.Capabilities.Ambient) > 0 || len(c.process.Env) != 2 {
		t.Errorf("the service's changed: %+v", c.process)
	}
	if err := (&Container{pidFile: filepath.Join(root, "none")}).notStarted(); err == nil {
		t.Error("a program of a container that does not run was started")
	}
}

func (c *Container) notStarted() error {
	_, err := c.Start(&agent.Program{Args: []string{"x"}}, nil, nil, nil)
	var start *agent.StartError
	if !errors.As(err, &start) {
		return nil
	}
	return err
}
