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
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
)

// A program in the guest and its host talk over a numbered port. Where the VMM has vsock, the guest dials the host (CID 2) on that port. Where it
// has none, the port is a virtio-serial port called "drafter.PORT". A serial port has no connections: bytes of an earlier conversation may
// still lie in its queues, and a program that opens the port and dies takes what it had received with it. So each conversation starts with a
// greeting: the host sends portMagic and 16 random bytes, again and again, until the guest has sent the same back. Both drop everything before
// the greeting, the guest its repetitions too.
const (
	portMagic     = "\xffDRAFTER\x01"
	nonceSize     = 16
	greetingLen   = len(portMagic) + nonceSize
	greetingPause = 500 * time.Millisecond
)

// PortName is the virtio-serial name of a port.
func PortName(port uint32) string { return fmt.Sprintf("drafter.%d", port) }

// Greet performs the host's half of the greeting on conn and returns once a program in the guest serves the port. It waits until ctx ends.
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

// answerGreeting performs the guest's half and returns the greeting.
func answerGreeting(port io.ReadWriter) ([]byte, error) {
	if err := skipTo(port, []byte(portMagic)); err != nil {
		return nil, err
	}
	greeting := append([]byte(portMagic), make([]byte, nonceSize)...)
	if _, err := io.ReadFull(port, greeting[len(portMagic):]); err != nil {
		return nil, err
	}
	_, err := port.Write(greeting)
	return greeting, err
}

// skipTo reads up to and including the first occurrence of mark. It reads byte by byte, so that nothing behind it is lost.
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

// DialHost returns a connection with the host on port, from inside a guest. It waits until the host is there or ctx ends, trying again with a
// back-off of 10 ms to 1 s.
func DialHost(ctx context.Context, port uint32) (net.Conn, error) {
	backoff := 10 * time.Millisecond
	for {
		conn, err := dialHost(ctx, port)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("reach the host on port %d: %w (last try: %w)", port, context.Cause(ctx), err)
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, time.Second)
	}
}

func dialHost(ctx context.Context, port uint32) (net.Conn, error) {
	device, err := findSerial(port)
	if errors.Is(err, os.ErrNotExist) {
		conn, verr := vsock.Dial(vsock.Host, port, nil)
		if verr != nil {
			return nil, fmt.Errorf("%w, and no vsock: %w", err, verr)
		}
		return conn, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(device, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open virtio-serial port: %w", err)
	}
	c := &serialConn{File: f, in: bufio.NewReader(f), name: PortName(port)}
	stop := context.AfterFunc(ctx, func() { f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if c.greeting, err = answerGreeting(patientReader{f}); err != nil {
		return nil, errors.Join(fmt.Errorf("await host on %s: %w", PortName(port), err), f.Close())
	}
	return c, nil
}

// findSerial returns the device of a virtio-serial port, or os.ErrNotExist.
func findSerial(port uint32) (string, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", fmt.Errorf("list virtio-serial ports: %w", err)
	}
	for _, path := range names {
		if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == PortName(port) {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(path))), nil
		}
	}
	return "", fmt.Errorf("virtio-serial port %q: %w", PortName(port), os.ErrNotExist)
}

// serialConn is one conversation on a virtio-serial port in the guest. A read returns io.EOF once the host's end is closed.
type serialConn struct {
	*os.File
	in       *bufio.Reader
	greeting []byte // skipped where it is repeated before the conversation; nil once that has begun
	name     string
}

func (c *serialConn) Read(p []byte) (int, error) {
	for c.greeting != nil {
		// A shorter peek first: the conversation's first bytes may be fewer than a greeting, and the next ones an answer to ours.
		if head, err := c.in.Peek(1); err != nil || head[0] != c.greeting[0] {
			c.greeting = nil
			break
		}
		if repeated, err := c.in.Peek(greetingLen); err != nil || !bytes.Equal(repeated, c.greeting) {
			c.greeting = nil
			break
		}
		if _, err := c.in.Discard(greetingLen); err != nil {
			return 0, err
		}
	}
	return c.in.Read(p)
}

// patientReader waits where a read would return io.EOF because no host is connected yet. The kernel wakes the poller when one connects and
// sends.
type patientReader struct{ *os.File }

func (r patientReader) Read(p []byte) (int, error) {
	raw, err := r.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		n, readErr = syscall.Read(int(fd), p)
		if errors.Is(readErr, syscall.EINTR) || errors.Is(readErr, syscall.EAGAIN) {
			n, readErr = 0, nil
		}
		return n > 0 || readErr != nil
	})
	if err == nil {
		err = readErr
	}
	return n, err
}

type serialAddr string

func (serialAddr) Network() string  { return "virtio-serial" }
func (a serialAddr) String() string { return string(a) }

func (c *serialConn) LocalAddr() net.Addr  { return serialAddr(c.name) }
func (c *serialConn) RemoteAddr() net.Addr { return serialAddr(c.name) }
