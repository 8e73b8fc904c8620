package firecracker

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// standIn is jailer and Firecracker in one: a process that changes its root as the jailer does, and
// answers the API as src/firecracker/swagger/firecracker.yaml of Firecracker describes it, refusing
// fields that it does not know, those that are missing, and calls at the wrong time. Its guest
// writes to memory: when it runs, page n gets the number of the run, for a new n each time. It
// calls its host's port 26 then.
type standIn struct {
	mu     sync.Mutex
	state  string // "", "Running", "Paused"
	puts   map[string]map[string]any
	memory []byte
	dirty  map[int]bool
	runs   int
	refuse string // a call that is refused, with a fault
}

const standInEnv = "FIRECRACKER_TEST_STANDIN"

// runStandIn does what the command line says.
func runStandIn() error {
	debug.SetGCPercent(-1) // a thread that waits for a page cannot be stopped
	flags := map[string]string{}
	args := os.Args[1:]
	for i := 0; i+1 < len(args); i++ {
		if name, ok := strings.CutPrefix(args[i], "--"); ok && name != "" {
			flags[name] = args[i+1]
			i++
		}
	}
	for _, required := range []string{"id", "exec-file", "uid", "gid", "chroot-base-dir", "api-sock"} {
		if flags[required] == "" {
			return fmt.Errorf("--%s is missing", required)
		}
	}
	root := filepath.Join(flags["chroot-base-dir"], filepath.Base(flags["exec-file"]), flags["id"], "root")
	if err := errors.Join(unix.Chroot(root), unix.Chdir("/")); err != nil {
		return err
	}
	l, err := net.Listen("unix", flags["api-sock"])
	if err != nil {
		return err
	}
	s := &standIn{puts: map[string]map[string]any{}, dirty: map[int]bool{}, refuse: os.Getenv(standInEnv)}
	return http.Serve(l, s)
}

// schema is the fields of a call's body: those with a '!' are required.
var schema = map[string]string{
	"PUT /machine-config":  "vcpu_count! mem_size_mib! track_dirty_pages cpu_template huge_pages smt",
	"PUT /boot-source":     "kernel_image_path! initrd_path boot_args",
	"PUT /drives":          "drive_id! path_on_host is_root_device! is_read_only cache_type partuuid rate_limiter io_engine socket",
	"PUT /vsock":           "guest_cid! uds_path! vsock_id",
	"PUT /entropy":         "rate_limiter",
	"PUT /metrics":         "metrics_path!",
	"PUT /actions":         "action_type!",
	"PATCH /vm":            "state!",
	"PUT /snapshot/create": "snapshot_type snapshot_path! mem_file_path!",
	"PUT /snapshot/load":   "snapshot_path! mem_backend! mem_file_path track_dirty_pages enable_diff_snapshots resume_vm network_overrides vsock_override",
}

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := io.ReadAll(r.Body)
	if err == nil {
		err = s.handle(r.Method, r.URL.Path, b)
	}
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *standIn) handle(method, path string, b []byte) error {
	call := method + " " + path
	if strings.HasPrefix(path, "/drives/") {
		call = "PUT /drives"
	}
	fields, known := schema[call]
	if !known {
		return fmt.Errorf("invalid request method and/or path: %s %s", method, path)
	}
	var body map[string]any
	if err := json.Unmarshal(b, &body); err != nil {
		return err
	}
	allowed := map[string]bool{}
	for _, f := range strings.Fields(fields) {
		name, required := strings.CutSuffix(f, "!")
		allowed[name] = true
		if _, there := body[name]; required && !there {
			return fmt.Errorf("missing field `%s`", name)
		}
	}
	for name := range body {
		if !allowed[name] {
			return fmt.Errorf("unknown field `%s`", name)
		}
	}
	if s.refuse == call {
		return errors.New("the stand-in was told to refuse this")
	}
	if id, ok := strings.CutPrefix(path, "/drives/"); ok && body["drive_id"] != id {
		return errors.New("the path's id is not the body's")
	}
	for _, name := range []string{"kernel_image_path", "path_on_host", "initrd_path"} {
		if p, ok := body[name].(string); ok {
			if _, err := os.Stat(p); err != nil {
				return err
			}
		}
	}
	switch call {
	case "PUT /actions":
		return s.boot(body)
	case "PATCH /vm":
		return s.turn(body["state"])
	case "PUT /snapshot/create":
		return s.snapshot(body)
	case "PUT /snapshot/load":
		return s.load(body)
	}
	if s.state != "" {
		return errors.New("the requested operation is not supported after starting the microVM")
	}
	s.puts[call] = body
	return nil
}

func (s *standIn) boot(body map[string]any) error {
	if s.state != "" || body["action_type"] != "InstanceStart" || s.puts["PUT /boot-source"] == nil || s.puts["PUT /machine-config"] == nil {
		return errors.New("cannot start the microVM")
	}
	size := int(s.puts["PUT /machine-config"]["mem_size_mib"].(float64)) << 20
	var err error
	if s.memory, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return err
	}
	s.run()
	return nil
}

func (s *standIn) turn(state any) error {
	switch {
	case state == "Paused" && s.state != "":
		s.state = "Paused"
	case state == "Resumed" && s.state != "":
		s.run()
	default:
		return errors.New("the microVM is not running")
	}
	return nil
}

// run is the guest.
func (s *standIn) run() {
	s.state = "Running"
	s.runs++
	if _, err := os.Stat("/lost"); err == nil {
		return
	}
	binary.NativeEndian.PutUint64(s.memory[s.runs*4096:], uint64(s.runs))
	s.dirty[s.runs] = true
	fmt.Printf("run %d\n", s.runs)
	go func() {
		conn, err := net.Dial("unix", "/vsock.sock_26")
		if err != nil {
			return
		}
		fmt.Fprintf(conn, "call of run %d\n", s.runs)
		_, _ = io.Copy(io.Discard, conn)
	}()
}

func (s *standIn) snapshot(body map[string]any) error {
	if s.state != "Paused" {
		return errors.New("cannot create a snapshot of a microVM that is not paused")
	}
	state := binary.LittleEndian.AppendUint64([]byte("state of the stand-in "), uint64(s.runs))
	state = binary.LittleEndian.AppendUint64(state, ^crc64.Update(^uint64(0), jones, state))
	if err := os.WriteFile(body["snapshot_path"].(string), state, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(body["mem_file_path"].(string), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open memory file: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(s.memory))); err != nil {
		return err
	}
	for p := range s.dirty {
		if _, err := f.WriteAt(s.memory[p*4096:(p+1)*4096], int64(p)*4096); err != nil {
			return err
		}
	}
	clear(s.dirty)
	return nil
}

func (s *standIn) load(body map[string]any) error {
	state, err := os.ReadFile(body["snapshot_path"].(string))
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(state, []byte("state of the stand-in ")) {
		return errors.New("failed to deserialize the snapshot")
	}
	s.runs = int(binary.LittleEndian.Uint64(state[22:]))
	backend := body["mem_backend"].(map[string]any)
	if backend["backend_type"] != "Uffd" {
		return errors.New("only Uffd is served here")
	}
	const size = 8 << 20
	if s.memory, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return err
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return errno
	}
	a := struct{ api, features, ioctls uint64 }{0xaa, 1 << 3, 0}
	base := uint64(uintptr(unsafe.Pointer(&s.memory[0])))
	r := struct{ start, length, mode, ioctls uint64 }{base, size, 1, 0}
	for _, c := range []struct {
		request uintptr
		arg     unsafe.Pointer
	}{{0xc018aa3f, unsafe.Pointer(&a)}, {0xc020aa00, unsafe.Pointer(&r)}} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, c.request, uintptr(c.arg)); errno != 0 {
			return errno
		}
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: backend["backend_path"].(string), Net: "unix"})
	if err != nil {
		return err
	}
	b, err := json.Marshal([]map[string]uint64{{"base_host_virt_addr": base, "size": size, "offset": 0, "page_size": 4096, "page_size_kib": 4096}})
	if err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil); err != nil {
		return err
	}
	for p := 1; p <= s.runs; p++ {
		if got := binary.NativeEndian.Uint64(s.memory[p*4096:]); got != uint64(p) {
			return fmt.Errorf("page %d holds %d", p, got)
		}
	}
	s.state = "Paused"
	return nil
}
