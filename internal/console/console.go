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

// Console is a guest's serial port: what comes from it goes to a writer, its last lines are kept;
// input comes from a reader.
type Console struct {
	from   io.ReadCloser
	to     io.WriteCloser
	output io.Writer
	input  io.Reader
	last   LastLines
}

// New returns the console of a VMM that is read from and written to by from and to, which may be
// the same. output may be nil, to discard, and so may input. The guest waits for output; see
// [NewOutput].
func New(from io.ReadCloser, to io.WriteCloser, output io.Writer, input io.Reader) *Console {
	if output == nil {
		output = io.Discard
	}
	return &Console{from: from, to: to, output: output, input: input}
}

// A guest may write for ever, and what it writes may be kept. So much passes at once, in bytes,
// which is many times what a system writes when it boots with all its debug messages, and then so
// much a second.
const (
	outputAtOnce    = 4 << 20
	outputPerSecond = 64 << 10
)

// NewOutput returns an output for consoles that passes on to to. What is beyond the limit, or what
// to does not take in time, is left out, and a line in it says how much: no guest blocks on its
// console. Close it.
func NewOutput(to io.Writer) *output.Writer {
	return output.NewLimited(to, outputAtOnce, rate.NewLimiter(outputPerSecond, outputAtOnce), func(bytes int64) []byte {
		return fmt.Appendf(nil, "\r\n[drafter: left out %d bytes of the console]\r\n", bytes)
	})
}

// Run copies until the VMM closes its end. Errors of the output are not the guest's: it goes on.
func (c *Console) Run() {
	inputDone := make(chan struct{})
	if c.input == nil {
		close(inputDone)
	} else {
		go func() {
			defer close(inputDone)
			// Its error is the end of either side, which Run and the VMM's owner notice themselves.
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
	// An input that knows deadlines (a terminal, a pipe) is waited for; any other ends with its
	// next read.
	if d, ok := c.input.(interface{ SetReadDeadline(time.Time) error }); ok && d.SetReadDeadline(time.Unix(1, 0)) == nil {
		<-inputDone
	}
}

// Tail is what the console showed last, to end an error message with, or "".
func (c *Console) Tail() string { return c.last.Quote("the console's last lines") }

// LastLines keeps the end of what is written to it. It is safe for concurrent use.
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

// Quote returns the last ten lines behind a title, to end an error message with, or "".
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
