package qemu

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// console carries the guest's serial port: output to a writer, keeping the last lines; input from a reader.
type console struct {
	conn   *net.UnixConn
	output io.Writer
	input  io.Reader
	last   lastLines
}

func newConsole(conn *net.UnixConn, output io.Writer, input io.Reader) *console {
	if output == nil {
		output = io.Discard
	}
	return &console{conn: conn, output: output, input: input}
}

// run copies until the VMM closes its end. Output that cannot be written any more (a closed terminal) is dropped: the guest must not
// block on its console.
func (c *console) run() {
	inputDone := make(chan struct{})
	if c.input == nil {
		close(inputDone)
	} else {
		go func() {
			defer close(inputDone)
			// Its error is the end of either side, which run and supervise notice themselves.
			_, _ = io.Copy(c.conn, c.input)
		}()
	}
	buf := make([]byte, 16<<10)
	broken := false
	defer c.conn.Close()
	for {
		n, err := c.conn.Read(buf)
		c.last.add(buf[:n])
		if !broken && n > 0 {
			_, werr := c.output.Write(buf[:n])
			broken = werr != nil
		}
		if err != nil {
			break
		}
	}
	// An input that knows deadlines (a terminal, a pipe) is waited for; any other ends with its next read.
	if d, ok := c.input.(interface{ SetReadDeadline(time.Time) error }); ok && d.SetReadDeadline(time.Unix(1, 0)) == nil {
		<-inputDone
	}
}

func (c *console) tail() string { return c.last.quote("the console's last lines") }

// lastLines keeps the end of what is written to it. It is safe for concurrent use.
type lastLines struct {
	mu  sync.Mutex
	buf []byte
}

// keepBytes is how much output an error quotes at most.
const keepBytes = 2048

func (l *lastLines) Write(p []byte) (int, error) {
	l.add(p)
	return len(p), nil
}

func (l *lastLines) add(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if extra := len(l.buf) - keepBytes; extra > 0 {
		l.buf = append(l.buf[:0], l.buf[extra:]...)
	}
}

// quote returns the last ten lines behind a title, to end an error message with, or "".
func (l *lastLines) quote(title string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := strings.TrimSpace(strings.ReplaceAll(string(l.buf), "\r", ""))
	if text == "" {
		return ""
	}
	lines := strings.Split(text, "\n")
	lines = lines[max(0, len(lines)-10):]
	return fmt.Sprintf("; %s: %s", title, strings.Join(lines, " | "))
}
