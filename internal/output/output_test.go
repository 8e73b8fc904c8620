package output

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func notice(bytes int64) []byte { return fmt.Appendf(nil, "[%d left out]\n", bytes) }

// reader takes what is written once it is let to, or fails.
type reader struct {
	mu   sync.Mutex
	got  bytes.Buffer
	err  error
	take chan struct{} // closed: it takes all
}

func (r *reader) Write(p []byte) (int, error) {
	<-r.take
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return 0, r.err
	}
	return r.got.Write(p)
}

func (r *reader) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
}

// A reader that takes nothing holds up no writer. What it misses it is told of in its place, when
// it takes something again.
func TestStuckReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reader{take: make(chan struct{})}
		w := New(r, 100, notice)
		fmt.Fprint(w, "first\n")
		synctest.Wait() // it is taken out of the buffer, and hangs
		for range 30 {
			fmt.Fprint(w, "0123456789")
		}
		close(r.take)
		synctest.Wait()
		fmt.Fprint(w, "later\n")
		synctest.Wait()
		fmt.Fprint(w, strings.Repeat("x", 101))
		w.Close()
		if got, want := r.got.String(), "first\n"+strings.Repeat("0123456789", 10)+"[200 left out]\nlater\n[101 left out]\n"; got != want {
			t.Errorf("%q; want %q", got, want)
		}
	})
}

// The end waits for a reader that is slow, and not for one that takes nothing.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reader{take: make(chan struct{})}
		w := New(r, 100, notice)
		fmt.Fprint(w, "lost")
		start := time.Now()
		w.Close()
		if waited := time.Since(start); waited != Patience {
			t.Errorf("waited %s", waited)
		}
		fmt.Fprint(w, "after the end")
		close(r.take) // else its goroutine is left behind

		slow := &slowReader{}
		w = New(slow, 1<<20, notice)
		fmt.Fprint(w, strings.Repeat("x", 20*step))
		w.Close()
		if slow.got != 20*step {
			t.Errorf("%d bytes came", slow.got)
		}
	})
}

type slowReader struct{ got int }

func (r *slowReader) Write(p []byte) (int, error) {
	time.Sleep(Patience / 2) // of a bubble's clock
	r.got += len(p)
	return len(p), nil
}

// A disk that is full for a while costs what was written meanwhile; a reader that is gone is not
// asked again.
func TestFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &reader{take: make(chan struct{})}
		close(r.take)
		w := New(r, 100, notice)
		print := func(text string, err error) {
			r.fail(err)
			fmt.Fprint(w, text)
			synctest.Wait()
		}
		print("one\n", nil)
		print("lost\n", syscall.ENOSPC)
		print("lost, too\n", syscall.ENOSPC)
		print("two\n", nil)
		print("lost\n", syscall.EPIPE)
		print("three\n", nil)
		w.Close()
		if got, want := r.got.String(), "one\n[15 left out]\ntwo\n"; got != want {
			t.Errorf("%q; want %q", got, want)
		}
	})
}

// A terminal that --enable-input has made non-blocking takes all, in its time.
func TestNonBlocking(t *testing.T) {
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer out.Close()
	fd := int(out.Fd())
	if err := syscall.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	w := New(stdoutOnly{fd}, 1<<20, notice)
	text := strings.Repeat("0123456789", 50_000) // more than a pipe holds
	fmt.Fprint(w, text)
	got := make([]byte, len(text))
	if _, err := io.ReadFull(r, got); err != nil || string(got) != text {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	w.Close()
}

// stdoutOnly writes without waiting for readiness, as Go does to stdout.
type stdoutOnly struct{ fd int }

func (s stdoutOnly) Write(p []byte) (int, error) {
	n, err := syscall.Write(s.fd, p)
	return max(0, n), err
}

// The same with what Linux has of it.
func TestRealFiles(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	gone, broken, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer broken.Close()
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*os.File{"full": full, "without a reader": broken} {
		w := New(f, 1<<10, notice)
		for range 1000 {
			if n, err := fmt.Fprintln(w, "line"); n != 5 || err != nil {
				t.Fatalf("%s: %d, %v", name, n, err)
			}
		}
		w.Close()
	}
	if _, err := broken.WriteString("x"); !errors.Is(err, syscall.EPIPE) {
		t.Error(err)
	}
}
