package instance

import (
	"bytes"
	"io"

	"drafter/internal/console"
)

// ready passes on a console's output, and watches it for a text.
type ready struct {
	output io.Writer // nil discards
	text   string
	last   []byte        // the end of the output, as long as the text may begin in it
	seen   chan struct{} // closed once the text was written
	lines  console.LastLines
}

func newReady(text string, output io.Writer) *ready {
	r := &ready{output: output, text: text, seen: make(chan struct{})}
	if text == "" {
		close(r.seen)
	}
	return r
}

// Write implements io.Writer.
func (r *ready) Write(p []byte) (int, error) {
	_, _ = r.lines.Write(p) // which never fails
	select {
	case <-r.seen:
	default:
		r.last = append(r.last, p...)
		if bytes.Contains(r.last, []byte(r.text)) {
			close(r.seen)
		}
		r.last = r.last[max(0, len(r.last)-len(r.text)):]
	}
	if r.output == nil {
		return len(p), nil
	}
	return r.output.Write(p)
}
