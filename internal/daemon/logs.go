package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"drafter/api"
	"drafter/internal/control"
)

// logs sends what a VM's service has printed, and goes on until the VM has ended if it is to follow.
func (d *Daemon) logs(in *logInput) (*huma.StreamResponse, error) {
	d.mu.Lock()
	v, err := d.find(in.VM)
	d.mu.Unlock()
	if err != nil {
		return nil, problem(err)
	}
	return &huma.StreamResponse{Body: func(ctx huma.Context) {
		ctx.SetHeader("Content-Type", "application/x-ndjson")
		if err := v.sendLog(ctx, in); err != nil {
			d.log.Debug("A reader of a VM's log was cut off", "error", err)
			panic(http.ErrAbortHandler) // an answer that ends well would be taken for all of it
		}
	}}, nil
}

// logPause is how often a log is looked at that is followed.
const logPause = 100 * time.Millisecond

var errDaemonEnds = errors.New("the daemon ends")

func (v *vm) sendLog(ctx huma.Context, in *logInput) (err error) {
	out := json.NewEncoder(ctx.BodyWriter())
	log := logReader{dir: v.seat().control()}
	defer func() { err = errors.Join(err, log.close()) }()
	last := tail{most: in.Tail}
	err = log.read(func(l api.LogLine) error {
		switch {
		case l.Time.Before(in.Since):
			return nil
		case in.Tail >= 0:
			last.add(l)
			return nil
		}
		return out.Encode(l)
	})
	if err != nil {
		return err
	}
	for _, l := range last.lines {
		if err := out.Encode(l); err != nil {
			return err
		}
	}
	for in.Follow {
		if f, ok := ctx.BodyWriter().(http.Flusher); ok {
			f.Flush()
		}
		ended := v.owner() == nil // before the rest is read
		if now := v.seat().control(); now != log.dir {
			if err := log.moveOn(now); err != nil {
				return err
			}
		}
		if err := log.read(func(l api.LogLine) error { return out.Encode(l) }); err != nil {
			return err
		}
		if ended {
			return nil
		}
		select {
		case <-time.After(logPause):
		case <-ctx.Context().Done():
			return ctx.Context().Err()
		case <-v.d.ctx.Done():
			return errDaemonEnds
		}
	}
	return nil
}

// logReader reads a log from its beginning on, and goes on when there is more.
type logReader struct {
	dir   string
	files []*os.File // the rest of the older file, and the newer one
	part  []byte     // of a line that is not whole yet

	last    control.Line // that was read
	skips   bool         // what was read already, in the log of another seat
	skipped bool         // something of the last line's boot
}

// moveOn goes on in the log of the VM's next process, which begins with what the last one has written.
func (r *logReader) moveOn(dir string) error {
	err := r.close()
	r.dir, r.files, r.part = dir, nil, nil
	r.skips, r.skipped = r.last.Boot != "", false
	return err
}

// isKnown tells whether a line was read already.
func (r *logReader) isKnown(l control.Line) bool {
	if !r.skips {
		return false
	}
	same := l.Boot == r.last.Boot
	if same && l.Next <= r.last.Next || !same && !r.skipped {
		r.skipped = r.skipped || same
		return true
	}
	r.skips = false
	return false
}

// read calls f with each line that was not read yet.
func (r *logReader) read(f func(api.LogLine) error) error {
	for {
		if err := r.open(); err != nil || len(r.files) == 0 {
			return err
		}
		if err := r.drain(f); err != nil {
			return err
		}
		if len(r.files) == 1 {
			return nil
		}
		// What is written goes to the newer file, since that is there.
		if err := r.files[0].Close(); err != nil {
			return err
		}
		r.files, r.part = r.files[1:], nil
	}
}

// open opens the files that are there and were not opened yet.
func (r *logReader) open() error {
	paths := control.LogFiles(r.dir)
	if len(r.files) > 0 {
		paths = paths[1:] // what is open may be the older one by now
	}
	for _, path := range paths {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		same := false
		if n := len(r.files); n > 0 {
			if same, err = isSame(f, r.files[n-1]); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		if !same {
			r.files = append(r.files, f)
		} else if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

func isSame(a, b *os.File) (bool, error) {
	ours, err := a.Stat()
	if err != nil {
		return false, err
	}
	theirs, err := b.Stat()
	return err == nil && os.SameFile(ours, theirs), err
}

// drain reads the first file to its end.
func (r *logReader) drain(f func(api.LogLine) error) error {
	lines := bufio.NewReader(r.files[0])
	for {
		b, err := lines.ReadBytes('\n')
		r.part = append(r.part, b...)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var l control.Line
		err = json.Unmarshal(r.part, &l)
		if r.part = nil; err != nil || r.isKnown(l) {
			continue // a killed process has written it in part
		}
		r.last = l
		if err := f(api.LogLine{Time: l.Time, Stream: l.Stream, Text: l.Text}); err != nil {
			return err
		}
	}
}

func (r *logReader) close() error {
	var errs []error
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// tail keeps the last lines of a log, of which each has ended but perhaps the last one.
type tail struct {
	most  int
	lines []api.LogLine
	ends  int // of lines among them
}

func (t *tail) add(l api.LogLine) {
	t.lines = append(t.lines, l)
	t.ends += strings.Count(l.Text, "\n")
	for len(t.lines) > 0 {
		last := t.lines[len(t.lines)-1].Text
		whole := t.ends
		if !strings.HasSuffix(last, "\n") {
			whole++
		}
		if whole <= t.most {
			return
		}
		// The first line is one too many.
		first := &t.lines[0]
		at := strings.IndexByte(first.Text, '\n')
		if at < 0 || at == len(first.Text)-1 {
			t.lines = t.lines[1:]
		} else {
			first.Text = first.Text[at+1:]
		}
		if at >= 0 {
			t.ends--
		}
	}
}
