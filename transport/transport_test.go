package transport

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"drafter/internal/need"
)

func TestMain(m *testing.M) {
	if role := os.Getenv("DRAFTER_TEST_ROLE"); role != "" {
		if err := act(role, os.Getenv("DRAFTER_TEST_AT")); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() == overflowUser { // see TestOwnersFindEachOther; an example cannot be skipped by itself
		if err := flag.Set("test.skip", "^Example$"); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

const nobody = 65534

// act is what another process does. "dial…" connects, and says what it got before the connection
// ended; "listen" says where it listens, and greets who comes.
func act(role, at string) error {
	switch role {
	case "listen":
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		fmt.Println(l.Addr())
		for {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			if _, err := c.Write([]byte("let in")); err != nil {
				return err
			}
		}
	case "dial":
		network, address := split(at)
		c, err := net.Dial(network, address)
		if err != nil {
			return err
		}
		return hear(c)
	case "dial mapped": // a socket of IPv6 with an address of IPv4
		a := netip.MustParseAddrPort(at)
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(a.Port()), Addr: netip.AddrFrom16(a.Addr().As16()).As16()}); err != nil {
			return err
		}
		c, err := net.FileConn(os.NewFile(uintptr(fd), "mapped"))
		if err != nil {
			return err
		}
		return hear(c)
	case "dial many paths": // MPTCP
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		if err != nil {
			return err
		}
		a := netip.MustParseAddrPort(at)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}); err != nil {
			return err
		}
		c, err := net.FileConn(os.NewFile(uintptr(fd), "mptcp"))
		if err != nil {
			return err
		}
		return hear(c)
	case "hit and run": // what it has sent is there although its sockets are gone already
		network, address := split(at)
		for range 500 {
			c, err := net.Dial(network, address)
			if err != nil {
				return err
			}
			if _, err := c.Write([]byte("hello")); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				return err
			}
			c.Close()
		}
		return nil
	}
	return fmt.Errorf("no role %q", role)
}

// hear prints whether it was let in.
func hear(c net.Conn) error {
	defer c.Close()
	b, err := greeting(c)
	fmt.Print(b)
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

func greeting(c io.Reader) (string, error) {
	b := make([]byte, len("let in"))
	n, err := io.ReadFull(c, b)
	return string(b[:n]), err
}

// asUser returns a process of another user's that plays a role.
func asUser(t *testing.T, uid uint32, role, at string) *exec.Cmd {
	t.Helper()
	need.Root(t)
	dir, err := os.MkdirTemp("", "stranger-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	binary, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "test")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(path, binary, 0o755), os.Chmod(path, 0o755)); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), path)
	c.Dir = "/"
	c.Env = append(os.Environ(), "DRAFTER_TEST_ROLE="+role, "DRAFTER_TEST_AT="+at)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return c
}

// greeter says "let in" to every connection that a listener returns, and counts them.
type greeter struct {
	*Listener
	mu sync.Mutex
	n  int
}

func (g *greeter) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

func serve(t *testing.T, trust *Trust, addr string) *greeter {
	t.Helper()
	l, err := trust.Listen(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	g := &greeter{Listener: l}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept(ctx)
			if err != nil {
				return
			}
			g.mu.Lock()
			g.n++
			g.mu.Unlock()
			wg.Go(func() {
				c.Write([]byte("let in"))
				io.Copy(io.Discard, c) // until the other end is closed
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// On a loopback address and on a UNIX socket root gets in, and nobody else, however it connects.
func TestOnlyTheOwnerGetsIn(t *testing.T) {
	for _, addr := range []string{"localhost:0", "127.0.0.1:0", "[::1]:0"} {
		g := serve(t, &Trust{}, addr)
		at := g.Addr().String()
		roles := []string{"dial"}
		if !strings.HasPrefix(at, "[") {
			roles = append(roles, "dial mapped", "dial many paths")
		}
		for _, role := range roles {
			for uid, want := range map[uint32]string{0: "let in", nobody: ""} {
				got, err := asUser(t, uid, role, at).Output()
				if role == "dial many paths" && err != nil {
					t.Logf("%s %s as user %d: %s, %v", role, at, uid, got, err) // a kernel without MPTCP
					continue
				}
				if err != nil || string(got) != want {
					t.Errorf("%s %s as user %d: %q, %v; want %q", role, at, uid, got, err, want)
				}
			}
		}
	}
}

// The socket is closed to others from its beginning, whatever the umask; where somebody has opened
// it, the kernel still tells who connects.
func TestOnlyTheOwnerGetsInAtAPath(t *testing.T) {
	dir, err := os.MkdirTemp("", "unix-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "peer.sock")
	old := syscall.Umask(0)
	g := serve(t, &Trust{}, "unix:"+path)
	syscall.Umask(old)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info.Mode(), err)
	}
	if got, err := asUser(t, nobody, "dial", "unix:"+path).Output(); err == nil || !strings.Contains(string(got), "permission denied") {
		t.Errorf("as nobody: %q, %v", got, err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[uint32]string{0: "let in", nobody: ""} {
		if got, err := asUser(t, uid, "dial", "unix:"+path).Output(); err != nil || string(got) != want {
			t.Errorf("as user %d: %q, %v; want %q", uid, got, err, want)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
}

// A stranger whose socket is gone when the kernel is asked is not taken for root, whose the kernel
// says such sockets are.
func TestAStrangerWhoIsGoneIsRefused(t *testing.T) {
	g := serve(t, &Trust{}, "localhost:0")
	if got, err := asUser(t, nobody, "hit and run", g.Addr().String()).Output(); err != nil {
		t.Fatalf("%s: %v", got, err)
	}
	// The owner's connection comes after all of them.
	if got, err := asUser(t, 0, "dial", g.Addr().String()).Output(); err != nil || string(got) != "let in" {
		t.Errorf("%q, %v", got, err)
	}
	if n := g.count(); n != 1 {
		t.Errorf("%d connections got in; 1 is the owner's", n)
	}
}

// Who dials an address of this host is not fooled by a stranger who listens there first.
func TestAStrangerWhoListensIsRefused(t *testing.T) {
	c := asUser(t, nobody, "listen", "127.0.0.1:0")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	b := make([]byte, 100)
	n, err := out.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.TrimSpace(string(b[:n]))
	for _, addr := range []string{at, strings.Replace(at, "127.0.0.1", "localhost", 1)} {
		dial, err := (&Trust{}).Dialer(addr)
		if err != nil {
			t.Fatal(err)
		}
		if conn, err := dial(t.Context()); err == nil || !strings.Contains(err.Error(), "user 65534 is at the other end") {
			t.Errorf("%s: %v, %v", addr, conn, err)
		}
	}
	dial, err := (&Trust{Anybody: true}).Dialer(at)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// Both ends of a trusting pair find each other, at every kind of address.
func TestOwnersFindEachOther(t *testing.T) {
	if os.Geteuid() == overflowUser {
		need.Lacks(t, "own-user", "this user may stand for any other, and is nobody's owner; run the tests as another user")
	}
	for _, addr := range []string{"localhost:0", "[::1]:0", "unix:" + filepath.Join(t.TempDir(), "peer.sock")} {
		g := serve(t, &Trust{}, addr)
		at := addr
		if !strings.HasPrefix(addr, "unix:") {
			at = g.Addr().String()
		}
		dial, err := (&Trust{}).Dialer(at)
		if err != nil {
			t.Fatal(err)
		}
		c, err := dial(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
		if got, err := greeting(c); err != nil || got != "let in" {
			t.Errorf("%s: %q, %v", addr, got, err)
		}
		c.Close()
	}
}

// Addresses that others can reach, or answer at, need more than the kernel's word.
func TestBeyondThisHost(t *testing.T) {
	for _, addr := range []string{":0", "0.0.0.0:0", "[::]:0", "192.0.2.1:22000"} {
		if l, err := (&Trust{}).Listen(t.Context(), addr); !errors.Is(err, ErrBeyond) {
			t.Errorf("listen at %s: %v, %v", addr, l, err)
		}
		dial, err := (&Trust{}).Dialer(addr)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := dial(t.Context()); !errors.Is(err, ErrBeyond) {
			t.Errorf("dial %s: %v, %v", addr, c, err)
		}
	}
	g := serve(t, &Trust{Anybody: true}, "0.0.0.0:0")
	at := fmt.Sprintf("127.0.0.1:%d", g.Addr().(*net.TCPAddr).Port)
	if got, err := asUser(t, nobody, "dial", at).Output(); err != nil || string(got) != "let in" {
		t.Errorf("where everybody is trusted: %q, %v", got, err)
	}
}

// certificates makes a configuration with an authority of its own.
func certificates(t *testing.T) *Certificates {
	t.Helper()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert, private := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	loaded, err := LoadTLS(cert, private, cert)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

// What is renewed counts for the next connection, on both sides, and what is half written does not.
func TestRenewedCertificates(t *testing.T) {
	ours := certificates(t)
	g := serve(t, &Trust{TLS: ours}, "127.0.0.1:0")
	try := func(with *Certificates, want string) {
		t.Helper()
		dial, err := (&Trust{TLS: with}).Dialer(g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := dial(t.Context())
		if err != nil {
			if want != "" || !errors.Is(err, ErrUnauthorized) {
				t.Errorf("dial: %v", err)
			}
			return
		}
		defer c.Close()
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if got, _ := greeting(c); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	try(ours, "let in")
	renewed := certificates(t)
	for from, to := range map[string]string{renewed.cert: ours.cert, renewed.key: ours.key} {
		b, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	try(renewed, "let in")
	if err := os.Truncate(ours.key, 10); err != nil {
		t.Fatal(err)
	}
	try(renewed, "let in")
	try(certificates(t), "")
}

// A certificate decides, and not who holds the socket.
func TestCertificatesDecide(t *testing.T) {
	ours, theirs := &Trust{TLS: certificates(t)}, &Trust{TLS: certificates(t)}
	g := serve(t, ours, "127.0.0.1:0")
	for _, trust := range []*Trust{{}, {Anybody: true}, theirs} {
		dial, err := trust.Dialer(g.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := dial(t.Context())
		if err == nil {
			c.Write([]byte("hello"))
			got, _ := greeting(c)
			c.Close()
			if got == "let in" {
				t.Errorf("%+v was let in", trust)
			}
		}
	}
	if n := g.count(); n != 0 {
		t.Errorf("%d strangers got in", n)
	}
	dial, err := ours.Dialer(g.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := greeting(c); err != nil || got != "let in" {
		t.Errorf("%q, %v", got, err)
	}
}

// captureLog keeps what is logged until stop is called.
func captureLog() (log *bytes.Buffer, stop func()) {
	log = &bytes.Buffer{}
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	return log, func() { slog.SetDefault(old) }
}

// Strangers who connect and say nothing, far more of them than there are places, do not keep out
// who has a certificate, and do not fill the log.
func TestSilentStrangersHoldNobodyUp(t *testing.T) {
	log, stop := captureLog()
	defer stop()
	trust := &Trust{TLS: certificates(t)}
	l, err := trust.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept(ctx)
			if err != nil {
				return
			}
			wg.Go(func() { io.Copy(c, c); c.Close() })
		}
	})
	var strangers []net.Conn
	for range 2 * mostWaiting {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		strangers = append(strangers, c)
	}
	dial, err := trust.Dialer(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c, err := dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	for _, c := range strangers {
		c.Close()
	}
	cancel()
	wg.Wait()
	stop()
	if lines := strings.Count(log.String(), "\n"); lines > 20 || !strings.Contains(log.String(), "from=127.0.0.1:") {
		t.Errorf("%d lines:\n%s", lines, log.String())
	}
}

// The one who has to go is the oldest of the host that has most.
func TestWaiting(t *testing.T) {
	w := Waiting{Most: 3}
	var gone []string
	enter := func(host, name string) *Place { return w.Enter(host, func() { gone = append(gone, name) }) }
	enter("a", "a1")
	enter("b", "b1")
	enter("b", "b2")
	enter("c", "c1") // b has most
	enter("c", "c2")
	last := enter("c", "c3")
	enter("d", "d1")
	last.Leave()
	last.Leave()
	enter("e", "e1")
	if got := strings.Join(gone, " "); got != "b1 c1 c2 a1" {
		t.Error(got)
	}
}

func TestShares(t *testing.T) {
	s := NewShares(16)
	take := func(host string) (n int) {
		for s.Take(host) {
			n++
		}
		return n
	}
	if a, b, c, d := take("a"), take("b"), take("c"), take("d"); a != 8 || b != 4 || c != 2 || d != 2 {
		t.Error(a, b, c, d)
	}
	s.Return("a")
	if !s.Take("e") || s.Take("f") {
		t.Error("the place that was given back is not the next one's")
	}
}

func TestHost(t *testing.T) {
	for at, want := range map[string]string{"192.0.2.7:5": "192.0.2.7", "[::ffff:192.0.2.7]:5": "192.0.2.7", "[2001:db8:1:2:3::4]:5": "2001:db8:1:2::/64", "127.1.2.3:5": "", "[::ffff:127.3.2.1]:5": "", "[::1]:5": ""} {
		a := netip.MustParseAddrPort(at)
		if got := Host(addressed{net.TCPAddrFromAddrPort(a)}); got != want {
			t.Errorf("%s: %s", at, got)
		}
	}
	if got := Host(&bytes.Buffer{}); got != "" {
		t.Error(got)
	}
}

type addressed struct{ at net.Addr }

func (a addressed) RemoteAddr() net.Addr { return a.at }

// A dead socket is replaced if it is ours, and left alone if it is another program's.
func TestDeadSocket(t *testing.T) {
	for name, mode := range map[string]os.FileMode{"ours": 0o600, "another's": 0o777} {
		path := filepath.Join(t.TempDir(), "socket")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		if err := errors.Join(l.Close(), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		again, err := (&Trust{}).Listen(t.Context(), "unix:"+path)
		if (err == nil) != (mode == 0o600) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			again.Close()
			continue
		}
		if _, err := os.Lstat(path); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
