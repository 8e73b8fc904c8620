package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// A program in the guest and its host talk over a numbered port. Where the VMM has vsock, the guest
// dials the host (CID 2) on that port. Where it has none, the port is a virtio-serial port called
// "drafter.PORT". A serial port has no connections: bytes of an earlier conversation may still lie
// in its queues, and a guest that was suspended in a conversation does not learn that its host is
// another one now. So each conversation starts with a greeting: the host sends portMagic and 16
// random bytes, again and again, until the guest has sent the same back. Both drop everything
// before the greeting. A greeting that arrives in a conversation ends it and starts the next.
const (
	// 8 random bytes at the end: no message holds them by chance
	portMagic     = "\xffDRAFTER\x01\x8d\x1c\x5e\xa3\x9b\x42\xf0\x77"
	nonceSize     = 16
	greetingLen   = len(portMagic) + nonceSize
	greetingPause = 500 * time.Millisecond
)

// PortName is the virtio-serial name of a port.
func PortName(port uint32) string { return fmt.Sprintf("drafter.%d", port) }

// Greet performs the host's half of the greeting on conn and returns once a program in the guest
// serves the port. It waits until ctx ends.
func Greet(ctx context.Context, conn net.Conn) error {
	greeting := make([]byte, greetingLen)
	copy(greeting, portMagic)
	if _, err := rand.Read(greeting[len(portMagic):]); err != nil {
		return fmt.Errorf("greet guest: %w", err)
	}
	// Sending is a goroutine of its own because a port that nobody has opened takes no bytes.
	answered, sent := make(chan struct{}), make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	go func() { sent <- repeatGreeting(conn, greeting, answered) }()
	err := skipTo(conn, greeting)
	close(answered)
	if err != nil {
		conn.SetWriteDeadline(time.Unix(1, 0))
	}
	err = errors.Join(err, <-sent)
	if ctx.Err() != nil {
		return fmt.Errorf("greet guest: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("greet guest: %w", err)
	}
	return nil
}

// repeatGreeting sends until answered is closed; a greeting once begun is finished.
func repeatGreeting(conn net.Conn, greeting []byte, answered <-chan struct{}) error {
	again := time.NewTicker(greetingPause)
	defer again.Stop()
	for {
		if _, err := conn.Write(greeting); err != nil {
			return err
		}
		select {
		case <-answered:
			return nil
		case <-again.C:
		}
	}
}

// skipTo reads up to and including the first occurrence of mark. It reads byte by byte, so that
// nothing behind it is lost.
func skipTo(r io.Reader, mark []byte) error {
	window := make([]byte, 0, len(mark))
	one := make([]byte, 1)
	for {
		if _, err := io.ReadFull(r, one); err != nil {
			return err
		}
		if len(window) == len(mark) {
			window = append(window[:0], window[1:]...)
		}
		window = append(window, one[0])
		if bytes.Equal(window, mark) {
			return nil
		}
	}
}

// Listener returns a guest program's conversations with its host on one port, one at a time: Accept
// waits until the last one has been closed.
type Listener struct {
	port    uint32
	timeout time.Duration
	ctx     context.Context // ends with Close
	cancel  context.CancelFunc

	serial *serialPort   // nil until Accept has found one; then for good
	last   chan struct{} // closed when the last conversation is
}

// Listen returns a listener on port. Its Accept fails when there is neither a serial port nor a
// host on vsock for timeout.
func Listen(port uint32, timeout time.Duration) *Listener {
	l := &Listener{port: port, timeout: timeout, last: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	close(l.last)
	return l
}

// Accept implements [net.Listener].
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.last:
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
	conn, err := l.accept()
	if l.ctx.Err() != nil {
		if conn != nil {
			err = conn.Close()
		}
		return nil, errors.Join(net.ErrClosed, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reach the host on port %d: %w", l.port, err)
	}
	last := make(chan struct{})
	l.last = last
	return &conversation{Conn: conn, ended: sync.OnceFunc(func() { close(last) })}, nil
}

// accept tries again with a back-off of 10 ms to 1 s. It waits for a serial port for ever: that is
// how a guest spends most of its life.
func (l *Listener) accept() (net.Conn, error) {
	backoff, deadline := 10*time.Millisecond, time.Now().Add(l.timeout)
	for {
		var err error
		if l.serial == nil {
			l.serial, err = openSerial(l.port)
		}
		if l.serial != nil {
			return l.serial.accept(l.ctx)
		}
		if errors.Is(err, os.ErrNotExist) {
			conn, verr := vsock.Dial(vsock.Host, l.port, nil)
			if verr == nil {
				return conn, nil
			}
			err = fmt.Errorf("%w, and no vsock: %w", err, verr)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no host within %s: %w", l.timeout, err)
		}
		select {
		case <-l.ctx.Done():
			return nil, l.ctx.Err()
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, time.Second)
	}
}

// Close implements [net.Listener]. It ends an Accept that waits, and the conversation on a serial
// port.
func (l *Listener) Close() error {
	l.cancel()
	return nil
}

// Addr implements [net.Listener].
func (l *Listener) Addr() net.Addr { return portAddr(PortName(l.port)) }

type portAddr string

func (portAddr) Network() string  { return "port" }
func (a portAddr) String() string { return string(a) }

// conversation tells the listener when it is closed.
type conversation struct {
	net.Conn
	ended func()
}

func (c *conversation) Close() error {
	defer c.ended()
	return c.Conn.Close()
}

// serialPort is a virtio-serial port, opened once for all conversations: closing it would drop what
// has arrived.
type serialPort struct {
	name string
	file *os.File
	in   *bufio.Reader
}

// openSerial opens a port, or returns os.ErrNotExist.
func openSerial(port uint32) (*serialPort, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, fmt.Errorf("list virtio-serial ports: %w", err)
	}
	for _, path := range names {
		if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == PortName(port) {
			f, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(path))), os.O_RDWR|syscall.O_NONBLOCK, 0)
			if err != nil {
				return nil, fmt.Errorf("open virtio-serial port: %w", err)
			}
			return newSerialPort(f, PortName(port)), nil
		}
	}
	return nil, fmt.Errorf("virtio-serial port %q: %w", PortName(port), os.ErrNotExist)
}

func newSerialPort(f *os.File, name string) *serialPort {
	return &serialPort{name: name, file: f, in: bufio.NewReader(f)}
}

// accept answers the next greeting.
func (p *serialPort) accept(ctx context.Context) (net.Conn, error) {
	if err := p.file.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { p.file.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := skipTo(patientReader{p}, []byte(portMagic)); err != nil {
		return nil, err
	}
	greeting := append([]byte(portMagic), make([]byte, nonceSize)...)
	if _, err := io.ReadFull(patientReader{p}, greeting[len(portMagic):]); err != nil {
		return nil, err
	}
	if _, err := p.file.Write(greeting); err != nil {
		return nil, err
	}
	return &serialConn{serialPort: p, greeting: greeting}, nil
}

// patientReader waits where a read returns nothing because no host is connected. The kernel wakes
// the poller when one connects and sends.
type patientReader struct{ *serialPort }

func (r patientReader) Read(p []byte) (int, error) {
	for {
		n, err := r.in.Read(p)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if err := awaitBytes(r.file); err != nil {
			return 0, err
		}
	}
}

// awaitBytes returns when f can be read. poll(2) also reports a port without a host, so only the
// poller's edge counts.
func awaitBytes(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = raw.Read(func(fd uintptr) bool {
		var n int
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, pollErr = unix.Poll(fds, 0)
		if pollErr != nil && errors.Is(pollErr, unix.EINTR) {
			pollErr = nil
		}
		done := pollErr != nil || n > 0 && fds[0].Revents&unix.POLLIN != 0
		return done
	})
	if err == nil {
		err = pollErr
	}
	return err
}

// serialConn is one conversation on a serial port. A read returns io.EOF once the host has gone or
// greets anew.
type serialConn struct {
	*serialPort
	// of this conversation; the host may have repeated it before it saw our answer
	greeting []byte
	reading  sync.Mutex // held by a Read
	closed   atomic.Bool
}

func (c *serialConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.closed.Load() {
		return 0, net.ErrClosed // the file is another conversation's
	}
	n, err := c.read(p)
	if err != nil {
		c.file.SetWriteDeadline(time.Unix(1, 0)) // a write that no host takes any more ends, too
	}
	return n, err
}

func (c *serialConn) read(p []byte) (int, error) {
	for {
		if c.closed.Load() {
			return 0, net.ErrClosed
		}
		if _, err := c.in.Peek(1); err != nil {
			return 0, err
		}
		pending, err := c.in.Peek(c.in.Buffered())
		if err != nil {
			return 0, err
		}
		// A host writes a greeting in one go, so it arrives whole; one that does not is repeated.
		at := bytes.Index(pending, []byte(portMagic))
		switch {
		case at < 0:
			return c.in.Read(p)
		case at > 0:
			return c.in.Read(p[:min(at, len(p))])
		case len(pending) < greetingLen || !bytes.Equal(pending[:greetingLen], c.greeting):
			return 0, io.EOF // the next accept finds it
		}
		if _, err := c.in.Discard(greetingLen); err != nil {
			return 0, err
		}
	}
}

func (c *serialConn) Write(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	return c.file.Write(p)
}

// Close ends the conversation and waits until nobody reads for it any more.
func (c *serialConn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	err := c.file.SetDeadline(time.Unix(1, 0))
	c.reading.Lock()
	defer c.reading.Unlock()
	return err
}

func (c *serialConn) LocalAddr() net.Addr                { return portAddr(c.name) }
func (c *serialConn) RemoteAddr() net.Addr               { return portAddr(c.name) }
func (c *serialConn) SetDeadline(t time.Time) error      { return c.file.SetDeadline(t) }
func (c *serialConn) SetReadDeadline(t time.Time) error  { return c.file.SetReadDeadline(t) }
func (c *serialConn) SetWriteDeadline(t time.Time) error { return c.file.SetWriteDeadline(t) }
