package wire

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// socket is a [net.UnixConn], or a stream around one.
type socket interface {
	ReadMsgUnix(b, oob []byte) (n, oobn, flags int, addr *net.UnixAddr, err error)
	WriteMsgUnix(b, oob []byte, addr *net.UnixAddr) (n, oobn int, err error)
}

// Files tells whether an open file can be sent over the connection: it is a UNIX socket.
func (c *Conn) Files() bool {
	_, ok := c.stream.(socket)
	return ok
}

// SendFile sends a message and an open file with it (SCM_RIGHTS of unix(7)), which stays the
// caller's. The connection must be one that [Conn.Files] tells of.
func (c *Conn) SendFile(message any, f *os.File) error {
	b, err := encode(message)
	if err != nil {
		return err
	}
	c.send.lock()
	defer c.send.unlock()
	if err := c.flush(); err != nil {
		return err
	}
	n, _, err := c.stream.(socket).WriteMsgUnix(b, unix.UnixRights(int(f.Fd())), nil)
	n = max(n, 0)
	c.out.Add(int64(n))
	if err == nil && n < len(b) {
		err = c.writeOut(b[n:])
	}
	if err != nil {
		return fmt.Errorf("send %s with a file: %w", Type(b[4]), err)
	}
	return nil
}

// ExpectFile allows the other side to send one open file. It is called before the first Read.
func (c *Conn) ExpectFile() {
	c.files = &fileReader{conn: c.stream.(socket)}
	c.reader = bufio.NewReaderSize(c.files, 32<<10)
}

// TakeFile returns the file that has come, which is the caller's; nil if none has.
func (c *Conn) TakeFile() *os.File {
	if c.files == nil {
		return nil
	}
	return c.files.take()
}

// fileReader reads a UNIX socket, and keeps the first file that comes with the bytes.
type fileReader struct {
	conn socket

	mu   sync.Mutex
	file *os.File
	over bool // no other file is kept
}

// Read implements io.Reader.
func (r *fileReader) Read(p []byte) (int, error) {
	control := make([]byte, unix.CmsgSpace(4))
	n, controlled, _, _, err := r.conn.ReadMsgUnix(p, control)
	if controlled > 0 {
		err = errors.Join(err, r.keep(control[:controlled]))
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (r *fileReader) keep(control []byte) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return err
	}
	var errs []error
	for i := range messages {
		if messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		errs = append(errs, err)
		for _, fd := range fds {
			errs = append(errs, r.add(os.NewFile(uintptr(fd), "received")))
		}
	}
	return errors.Join(errs...)
}

func (r *fileReader) add(f *os.File) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over {
		return errors.Join(violation("a file that was not expected"), f.Close())
	}
	r.file, r.over = f, true
	return nil
}

func (r *fileReader) take() *os.File {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.file
	r.file, r.over = nil, true
	return f
}
