package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"drafter/internal/block"
	"drafter/internal/expose"
	"drafter/internal/need"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counting counts syncs.
type counting struct {
	*block.File
	syncs atomic.Int64
}

func (c *counting) Sync() error {
	c.syncs.Add(1)
	return c.File.Sync()
}

const size = 16 << 20

// serve exports a device of random data and holes over a UNIX socket and TCP.
func serve(t *testing.T) (unix, tcp string, d *counting, content []byte) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "device")
	content = make([]byte, size)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for off := 0; off < size; off += 3 << 20 {
		p := content[off:min(off+1<<20, size)]
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	file, err := block.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	d = &counting{File: file}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	socket := filepath.Join(dir, "socket")
	exports := []Export{{Name: "disk", Device: d}, {Name: "locked", Device: d, ReadOnly: true}}
	for i, l := range []struct{ network, addr string }{{"unix", socket}, {"tcp", "127.0.0.1:0"}} {
		listener, err := net.Listen(l.network, l.addr)
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			tcp = listener.Addr().String()
		}
		go func() { done <- Serve(ctx, listener, exports) }()
	}
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, <-done, d.Close()); err != nil {
			t.Error(err)
		}
	})
	return socket, tcp, d, content
}

// tool runs a program of Debian's packages libnbd-bin and qemu-utils.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	need.Program(t, name)
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestIndependentClients(t *testing.T) {
	socket, tcp, d, content := serve(t)
	uri := "nbd+unix:///disk?socket=" + socket

	out := tool(t, "nbdinfo", uri)
	for _, want := range []string{"newstyle-fixed", "using structured packets", "export-size: 16777216", "can_flush: true", "can_fua: true", "can_trim: true", "can_zero: true", "can_multi_conn: true", "can_df: true", "is_read_only: false", "base:allocation", "block_size_maximum: 33554432"} {
		if !strings.Contains(strings.ReplaceAll(out, "protocol: ", ""), want) {
			t.Errorf("nbdinfo does not say %q:\n%s", want, out)
		}
	}
	if out := tool(t, "nbdinfo", "--list", "nbd://"+tcp); !strings.Contains(out, `export="disk"`) || !strings.Contains(out, `export="locked"`) {
		t.Errorf("list: %s", out)
	}
	if out := tool(t, "nbdinfo", "nbd://"+tcp+"/locked"); !strings.Contains(out, "is_read_only: true") {
		t.Errorf("the read-only export: %s", out)
	}
	if out := tool(t, "nbdinfo", "--map", uri); strings.Count(out, "data") != 6 || strings.Count(out, "hole,zero") != 5 {
		t.Errorf("map: %s", out)
	}

	dir := t.TempDir()
	copied := filepath.Join(dir, "copied")
	tool(t, "nbdcopy", uri, copied)
	if got, err := os.ReadFile(copied); err != nil || !bytes.Equal(got, content) {
		t.Errorf("nbdcopy read other bytes, %v", err)
	}
	for i := range content[:2<<20] {
		content[i] ^= byte(i)
	}
	clear(content[12<<20 : 13<<20])
	if err := os.WriteFile(copied, content, 0o644); err != nil {
		t.Fatal(err)
	}
	tool(t, "nbdcopy", "--flush", copied, "nbd://"+tcp+"/disk")
	if d.syncs.Load() == 0 {
		t.Error("a flush did not reach the device")
	}
	if out := tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", copied, "nbd:unix:"+socket+":exportname=disk"); !strings.Contains(out, "identical") {
		t.Errorf("qemu-img: %s", out)
	}

	before := d.syncs.Load()
	out = tool(t, "qemu-io", "-f", "raw", "-t", "none", "-c", "write -P 7 1000 5000", "-c", "write -f -P 8 100k 64k", "-c", "write -z 200k 100k", "-c", "discard 1M 1M", "-c", "flush",
		"-c", "read -P 7 1000 5000", "-c", "read -P 8 100k 64k", "-c", "read -P 0 200k 100k", "-c", "read -P 0 1M 1M", "-c", "aio_write -P 9 3M 2M", "-c", "aio_write -P 10 5M 2M", "-c", "aio_flush",
		"-c", "read -P 9 3M 2M", "-c", "read -P 10 5M 2M", "nbd:unix:"+socket+":exportname=disk")
	if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io: %s", out)
	}
	if got := d.syncs.Load() - before; got < 2 {
		t.Errorf("a FUA write and a flush synced the device %d times", got)
	}
	if start, _, err := d.NextData(1 << 20); err != nil || start < 2<<20 {
		t.Errorf("a discard left data at %d, %v", start, err)
	}
}

// dial negotiates as old clients do: by export name, without structured replies.
func dial(t *testing.T, addr, export string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.ReadFull(conn, make([]byte, 18)); err != nil {
		t.Fatal(err)
	}
	b := binary.BigEndian.AppendUint32(nil, flagFixed|flagNoZeroes)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, optExportName)
	if _, err := conn.Write(append(b, sized(export)...)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func send(t *testing.T, conn net.Conn, flags, kind uint16, off uint64, length uint32, data []byte) {
	t.Helper()
	b := binary.BigEndian.AppendUint32(nil, magicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, 4711)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, length)
	if _, err := conn.Write(append(b, data...)); err != nil {
		t.Fatal(err)
	}
}

func TestOldClientAndErrors(t *testing.T) {
	_, tcp, _, content := serve(t)
	conn := dial(t, tcp, "disk")
	answer := func(want uint32, length int) []byte {
		t.Helper()
		head := make([]byte, 16+length)
		if _, err := io.ReadFull(conn, head[:16]); err != nil {
			t.Fatal(err)
		}
		if magic, code, handle := binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:]), binary.BigEndian.Uint64(head[8:]); magic != magicSimple || handle != 4711 || code != want {
			t.Fatalf("reply %#x with error %d for %d; want error %d", magic, code, handle, want)
		}
		if want != 0 {
			return nil
		}
		if _, err := io.ReadFull(conn, head[16:]); err != nil {
			t.Fatal(err)
		}
		return head[16:]
	}
	send(t, conn, 0, cmdRead, 100, 1000, nil)
	if got := answer(0, 1000); !bytes.Equal(got, content[100:1100]) {
		t.Error("read")
	}
	send(t, conn, 0, cmdRead, size-1, 2, nil)
	answer(22, 0)
	send(t, conn, 0, cmdRead, 1<<63, 2, nil)
	answer(22, 0)
	send(t, conn, 0, cmdWrite, size, 3, []byte("abc"))
	answer(28, 0)
	send(t, conn, 0, cmdRead, 0, maxRequest+1, nil)
	answer(75, 0)
	send(t, conn, 0, 99, 0, 0, nil)
	answer(22, 0)
	send(t, conn, 0, cmdBlockStatus, 0, 10, nil)
	answer(22, 0)
	send(t, conn, cmdFlagFUA, cmdWrite, 5, 3, []byte("abc"))
	answer(0, 0)
	send(t, conn, 0, cmdFlush, 0, 0, nil)
	answer(0, 0)
	send(t, conn, 0, cmdRead, 5, 3, nil)
	if got := answer(0, 3); string(got) != "abc" {
		t.Errorf("read %q", got)
	}
	conn = dial(t, tcp, "locked")
	for _, kind := range []uint16{cmdTrim, cmdWriteZeroes} {
		send(t, conn, 0, kind, 0, 10, nil)
		answer(1, 0)
	}
	send(t, conn, 0, cmdWrite, 0, 3, []byte("abc"))
	answer(1, 0)
	send(t, conn, 0, cmdDisconnect, 0, 0, nil)
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after a disconnect: %v", err)
	}
}

// Garbage ends its own connection and nothing else, and allocates nothing to speak of.
func FuzzServer(f *testing.F) {
	hello := binary.BigEndian.AppendUint32(nil, flagFixed|flagNoZeroes)
	option := func(kind uint32, data []byte) []byte {
		b := binary.BigEndian.AppendUint64(bytes.Clone(hello), magicOption)
		b = binary.BigEndian.AppendUint32(b, kind)
		return append(b, sized(string(data))...)
	}
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add(option(optExportName, []byte("disk")))
	f.Add(option(optGo, append(sized("disk"), 0, 0)))
	f.Add(option(optGo, append(sized("disk"), 255, 255)))
	f.Add(option(optSetMeta, append(sized("disk"), 255, 255, 255, 255)))
	f.Add(append(option(optExportName, []byte("disk")), binary.BigEndian.AppendUint32(nil, magicRequest)...))
	f.Fuzz(func(t *testing.T, input []byte) {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		d := &zero{}
		go func() {
			defer close(done)
			_ = ServeConn(t.Context(), theirs, []Export{{Name: "disk", Device: d}}) // any error will do
		}()
		read := make(chan struct{})
		go func() {
			defer close(read)
			io.Copy(io.Discard, ours)
		}()
		ours.SetWriteDeadline(time.Now().Add(10 * time.Second))
		ours.Write(input)
		ours.Close()
		<-done
		<-read
	})
}

// zero is a device of zeros.
type zero struct{}

func (*zero) Size() int64                            { return 1 << 20 }
func (*zero) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (*zero) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (*zero) Sync() error                            { return nil }
func (*zero) Close() error                           { return nil }

// The kernel's client is tried where there is one.
func TestAttach(t *testing.T) {
	need.Root(t)
	if _, err := os.Stat("/sys/module/nbd"); err != nil {
		if _, err := Attach(t.Context(), filepath.Join(t.TempDir(), "devices"), nil); err == nil || !strings.Contains(err.Error(), "modprobe nbd") {
			t.Errorf("without the module: %v", err)
		}
	}
	need.NBD(t)
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
		t.Fatal(err)
	}
	d, err := block.OpenFile(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	a, err := Attach(t.Context(), filepath.Join(t.TempDir(), "devices"), []expose.Device{{Name: "disk", Device: d}})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("drafter "), 1024)
	f, err := os.OpenFile(a.Path("disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(want, 8192)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 8192); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device has other bytes, %v", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}
