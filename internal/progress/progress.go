// Package progress shows how far long work is: bars on a terminal, plain lines elsewhere.
package progress

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/vbauerster/cupwriter"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"drafter/internal/output"
)

// Reporter shows steps. Its methods are safe for concurrent use.
type Reporter struct {
	mu    sync.Mutex
	out   io.Writer
	bars  *mpb.Progress // nil when out is no terminal
	steps map[string]*step
}

type step struct {
	bar      *mpb.Bar
	started  time.Time
	finished bool
}

// New returns a reporter that writes to out. It waits for out, which may be an [output.Writer].
func New(out io.Writer) *Reporter {
	r := &Reporter{out: out, steps: map[string]*step{}}
	if terminal := output.Terminal(out); terminal != nil {
		console := cupwriter.New(out, false)
		console.SetTermFd(int(terminal.Fd()))
		r.bars = mpb.New(mpb.WithConsoleWriter(console), mpb.WithWidth(40))
	}
	return r
}

// Report says that done of total bytes (or other units) of a step are done. A total of 0 is
// unknown. A step ends when done reaches total.
func (r *Reporter) Report(name string, done, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.steps[name]
	if s == nil {
		s = &step{started: time.Now()}
		r.steps[name] = s
		if r.bars != nil {
			s.bar = r.bars.AddBar(total,
				mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
				mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5}), decor.Elapsed(decor.ET_STYLE_GO, decor.WC{W: 6})))
		}
	}
	if s.finished {
		return
	}
	s.finished = total > 0 && done >= total
	if s.bar != nil {
		s.bar.SetTotal(max(total, 1), s.finished)
		s.bar.SetCurrent(done)
	} else if s.finished {
		// Nobody to hand a failed write of a progress line to; the work itself goes on.
		fmt.Fprintf(r.out, "%s: done in %s\n", name, time.Since(s.started).Round(time.Millisecond))
	}
}

// Close ends the display; steps that have not ended stay as they are.
func (r *Reporter) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bars == nil {
		return
	}
	for _, s := range r.steps {
		if !s.finished {
			s.bar.Abort(false)
		}
	}
	r.bars.Wait()
}
