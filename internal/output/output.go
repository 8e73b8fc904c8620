// Package output passes on what a process prints, and waits for nobody: a full or closed pipe, a
// stopped terminal or a full disk delays neither a VM nor its log.
package output

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"
	"golang.org/x/time/rate"
)

// Writer is an [io.Writer] whose Write neither blocks nor fails. Its own goroutine passes the bytes
// on, in order. Bytes that find no room in the buffer, exceed the limit or cannot be passed on are
// left out, and a line in their place says how many they were. It is safe for concurrent use.
type Writer struct {
	to      io.Writer
	room    int           // bytes
	limiter *rate.Limiter // nil for no limit

	mu     sync.Mutex
	notice func(bytes int64) []byte
	buf    []byte // not passed on yet
	left   int64  // bytes left out since the last notice
	told   int64  // bytes that the notices in buf are about, less their own
	gone   bool   // the reader is gone for good
	closed bool

	wake     chan struct{} // there is something in buf; closed by Close
	progress chan struct{} // something was passed on
	done     chan struct{} // closed when the goroutine has ended
}

// New returns a writer that passes on to to, with a buffer of room bytes. notice makes the line
// about bytes that were left out. Close it.
func New(to io.Writer, room int, notice func(bytes int64) []byte) *Writer {
	return NewLimited(to, room, nil, notice)
}

// NewLimited is New with a limit of bytes over time. limiter may be nil.
func NewLimited(to io.Writer, room int, limiter *rate.Limiter, notice func(bytes int64) []byte) *Writer {
	w := &Writer{
		to: to, room: room, notice: notice, limiter: limiter,
		wake: make(chan struct{}, 1), progress: make(chan struct{}, 1), done: make(chan struct{}),
	}
	go w.run()
	return w
}

// Write implements [io.Writer]. It keeps or leaves out all of p.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.gone || w.closed || len(p) == 0:
	case len(w.buf)+len(p) > w.room, w.limiter != nil && !w.limiter.AllowN(time.Now(), len(p)):
		w.left += int64(len(p))
	default:
		w.tell()
		w.buf = append(w.buf, p...)
		signal(w.wake)
	}
	return len(p), nil
}

// Notice changes how bytes that were left out are told of.
func (w *Writer) Notice(notice func(bytes int64) []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.notice = notice
}

// tell puts a notice of what was left out into the buffer.
func (w *Writer) tell() {
	if w.left > 0 {
		line := w.notice(w.left)
		w.buf = append(w.buf, line...)
		w.told += w.left - int64(len(line))
		w.left = 0
	}
}

// signal notes an event that nobody need have seen yet.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (w *Writer) run() {
	defer close(w.done)
	for range w.wake {
		w.pass()
	}
	w.mu.Lock()
	w.tell()
	w.mu.Unlock()
	w.pass()
}

// busy is how long a reader gets that takes nothing at the moment.
const busy = 10 * time.Millisecond

// step is how many bytes are passed on at a time. Close sees by it that the reader takes something.
const step = 4 << 10

// pass passes on what is in the buffer.
func (w *Writer) pass() {
	w.mu.Lock()
	p, told := w.buf, w.told
	w.buf, w.told = nil, 0
	w.mu.Unlock()
	for len(p) > 0 {
		n, err := w.to.Write(p[:min(step, len(p))])
		p = p[n:]
		// somebody has made the file non-blocking, as 'drafter … --enable-input' does with a
		// terminal
		if errors.Is(err, syscall.EAGAIN) {
			time.Sleep(busy)
			continue
		}
		if err != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.left += int64(len(p)) + told
			if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) {
				w.gone, w.left = true, 0
			}
			return
		}
		signal(w.progress)
	}
}

// Patience is how long Close waits for a reader that takes nothing.
const Patience = 2 * time.Second

// Close passes on the content of the buffer, as long as the reader takes it, and ends the
// goroutine. A goroutine that hangs in a write, because the reader takes nothing, is left behind.
func (w *Writer) Close() {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		close(w.wake)
	}
	w.mu.Unlock()
	stuck := time.NewTimer(Patience)
	defer stuck.Stop()
	for {
		select {
		case <-w.done:
			return
		case <-w.progress:
			stuck.Reset(Patience)
		case <-stuck.C:
			return
		}
	}
}

// Terminal returns the terminal that w writes to, itself or as a [Writer]; nil if w is none.
func Terminal(w io.Writer) *os.File {
	if passed, ok := w.(*Writer); ok {
		w = passed.to
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}
