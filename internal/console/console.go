// Package console carries a guest's serial console between a VMM and whoever watches it.
package console

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/time/rate"

	"drafter/internal/output"
)

// Console is a guest's serial port. Its output goes to a writer, and its last lines are kept. Its
// input comes from a reader.
type Console struct {
	from   io.ReadCloser
	to     io.WriteCloser
	output io.Writer
	input  io.Reader
	last   LastLines
}

// New returns the console of a VMM that is read from and written to by from and to, which may be
// the same. output and input may be nil, to discard. The guest waits for output; see [NewOutput].
func New(from io.ReadCloser, to io.WriteCloser, output io.Writer, input io.Reader) *Console {
	if output == nil {
		output = io.Discard
	}
	return &Console{from: from, to: to, output: output, input: input}
}

// A guest may write for ever, and its output may be stored. So this many bytes pass at once, far
// more than a system writes when it boots with all its debug messages, and then this many a second.
const (
	outputAtOnce    = 4 << 20
	outputPerSecond = 64 << 10
)

// NewOutput returns an output for consoles that passes on to to. Bytes beyond the limit, or that to
// does not take in time, are left out, and a line says how many: no guest blocks on its console.
// Close it.
func NewOutput(to io.Writer) *output.Writer {
	return output.NewLimited(to, outputAtOnce, rate.NewLimiter(outputPerSecond, outputAtOnce), func(bytes int64) []byte {
		return fmt.Appendf(nil, "\r\n[drafter: left out %d bytes of the console]\r\n", bytes)
	})
}

// Run copies until the VMM closes its end. A guest goes on after errors of the output.
func (c *Console) Run() {
	inputDone := make(chan struct{})
	if c.input == nil {
		close(inputDone)
	} else {
		go func() {
			defer close(inputDone)
			// Its error means the end of either side, which Run and the VMM's owner notice
			// themselves.
			_, _ = io.Copy(c.to, c.input)
		}()
	}
	buf := make([]byte, 16<<10)
	defer c.from.Close()
	defer c.to.Close()
	for {
		n, err := c.from.Read(buf)
		c.last.add(buf[:n])
		_, _ = c.output.Write(buf[:n])
		if err != nil {
			break
		}
	}
	// An input with deadlines (a terminal, a pipe) is interrupted and waited for. Any other ends
	// with its next read.
	if d, ok := c.input.(interface{ SetReadDeadline(time.Time) error }); ok && d.SetReadDeadline(time.Unix(1, 0)) == nil {
		<-inputDone
	}
}

// Tail is the end of the console's output, for the end of an error message, or "".
func (c *Console) Tail() string { return c.last.Quote("the console's last lines") }

// LastLines keeps the end of the bytes that are written to it. It is safe for concurrent use.
type LastLines struct {
	mu  sync.Mutex
	buf []byte
}

// keepBytes is how much output an error quotes at most.
const keepBytes = 2048

// Write implements io.Writer.
func (l *LastLines) Write(p []byte) (int, error) {
	l.add(p)
	return len(p), nil
}

func (l *LastLines) add(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if extra := len(l.buf) - keepBytes; extra > 0 {
		l.buf = append(l.buf[:0], l.buf[extra:]...)
	}
}

// Quote returns the last ten lines after a title, for the end of an error message, or "".
func (l *LastLines) Quote(title string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := strings.TrimSpace(strings.ReplaceAll(string(l.buf), "\r", ""))
	if text == "" {
		return ""
	}
	lines := strings.Split(text, "\n")
	lines = lines[max(0, len(lines)-10):]
	return fmt.Sprintf("; %s: %s", title, Printable(strings.Join(lines, " | ")))
}

// Printable returns a stranger's text for an error or a log line. What a terminal would act on, or
// could not show, is written as in Go: \x1b, \n, \u202e.
func Printable(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError && size == 1 || !strconv.IsPrint(r) {
			quoted := strconv.Quote(s[:size])
			b.WriteString(quoted[1 : len(quoted)-1])
		} else {
			b.WriteString(s[:size])
		}
		s = s[size:]
	}
	return b.String()
}
