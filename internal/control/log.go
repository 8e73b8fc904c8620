package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"drafter/agent"
	"drafter/internal/newfile"
)

// Line is a piece of what a VM's service has printed, as it lies in the log: one JSON object a line.
type Line struct {
	Time   time.Time `json:"time"`
	Stream string    `json:"stream"` // stdout or stderr
	Text   string    `json:"text"`   // as it was printed, which need not be a whole line
	Boot   string    `json:"boot"`   // of the guest, with the position there where the next piece begins
	Next   int64     `json:"next"`
}

// The log is two files: the older one has what no longer fitted.
const (
	logFile   = "log"
	olderLog  = "log.1"
	mostLog   = 16 << 20 // bytes of each
	mostText  = 16 << 10 // of a line's text
	mostPiece = 1 << 20  // more than any line has
)

// LogFiles are the log's files in a control directory, the older one first.
func LogFiles(dir string) []string {
	return []string{filepath.Join(dir, olderLog), filepath.Join(dir, logFile)}
}

// Log writes what a VM's service prints to the log of a control directory, from where the log ends,
// until ctx ends or the service has. It returns the service's exit status; nil if that is not known.
// What cannot be written is written later, if the guest still has it then. guest returns the
// connection with the guest's agent, or nil while there is none.
func Log(ctx context.Context, dir string, guest func() *agent.Client, log *slog.Logger) (ended *int, err error) {
	w := &logWriter{path: filepath.Join(dir, logFile), older: filepath.Join(dir, olderLog)}
	if err := w.open(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.file.Close()) }()
	if err := w.findEnd(); err != nil {
		return nil, err
	}
	for failing := false; ; {
		part := ask(ctx, guest, w.position)
		if part != nil && part.Boot != w.boot {
			asked := w.position
			w.boot, w.position, w.held = part.Boot, 0, [2][]byte{}
			if asked != 0 { // else this is its beginning, and maybe its end: a guest says that once
				part = ask(ctx, guest, 0)
			}
		}
		if part == nil {
			return nil, nil
		}
		err := w.write(part)
		if err == nil && part.Ended {
			return &part.ExitStatus, nil
		}
		if err == nil {
			failing = false
			continue
		}
		if !failing {
			log.Error("What the VM's service prints cannot be kept; trying again", "error", err)
		}
		failing = true
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(time.Second):
		}
	}
}

// logWriter writes the log.
type logWriter struct {
	path, older string
	file        *os.File
	boot        string
	position    int64     // up to which the guest's output is in the log
	held        [2][]byte // of stdout and stderr: the beginning of a character
	torn        bool      // the file may end with a part of a line
}

func (w *logWriter) open() (err error) {
	if w.file, err = os.OpenFile(w.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, newfile.Mode); err != nil {
		return fmt.Errorf("open the VM's log: %w", err)
	}
	return nil
}

// findEnd tells where the log has got to. Its last line may have been written in part.
func (w *logWriter) findEnd() error {
	info, err := w.file.Stat()
	if err != nil {
		return fmt.Errorf("read the VM's log: %w", err)
	}
	from := max(0, info.Size()-mostPiece)
	b, err := io.ReadAll(io.NewSectionReader(w.file, from, info.Size()-from))
	if err != nil {
		return fmt.Errorf("read the VM's log: %w", err)
	}
	w.torn = len(b) > 0 && b[len(b)-1] != '\n'
	for len(b) > 0 {
		b = b[:max(0, bytes.LastIndexByte(b, '\n'))]
		var last Line
		if json.Unmarshal(b[bytes.LastIndexByte(b, '\n')+1:], &last) == nil {
			w.boot, w.position = last.Boot, last.Next
			return nil
		}
	}
	return nil
}

// write writes what is new of a guest's output.
func (w *logWriter) write(part *agent.LogPart) error {
	for _, c := range part.Chunks {
		for at := 0; at < len(c.Data); at += mostText {
			piece := c.Data[at:min(at+mostText, len(c.Data))]
			next := c.Position + int64(at+len(piece))
			if next <= w.position {
				continue // before a failure
			}
			if err := w.writePiece(c, piece, next); err != nil {
				return err
			}
		}
	}
	w.position = part.Next
	if info, err := w.file.Stat(); err != nil || info.Size() < mostLog {
		return err
	}
	if err := errors.Join(w.file.Close(), os.Rename(w.path, w.older)); err != nil {
		return fmt.Errorf("rotate the VM's log: %w", errors.Join(err, w.open()))
	}
	return w.open()
}

func (w *logWriter) writePiece(c agent.LogChunk, piece []byte, next int64) error {
	line, stream := Line{Time: c.Time, Stream: "stdout", Boot: w.boot}, 0
	if c.Stderr {
		line.Stream, stream = "stderr", 1
	}
	text := slices.Concat(w.held[stream], piece)
	whole := len(text) - partOfRune(text)
	line.Text, line.Next = string(text[:whole]), next-int64(len(text)-whole)
	if whole > 0 {
		b, err := json.Marshal(line)
		if err != nil {
			return err
		}
		b = append(b, '\n')
		if w.torn {
			b = append([]byte{'\n'}, b...)
		}
		if _, err := w.file.Write(b); err != nil {
			w.torn = true
			return fmt.Errorf("write the VM's log: %w", err)
		}
		w.torn = false
	}
	w.held[stream], w.position = text[whole:], next
	return nil
}

// partOfRune is how many bytes at the end of a text begin a character that is not whole.
func partOfRune(text []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(text); n++ {
		if utf8.RuneStart(text[len(text)-n]) {
			if utf8.FullRune(text[len(text)-n:]) {
				return 0
			}
			return n
		}
	}
	return 0
}

// ask asks the guest for more, as soon as there is one that can be asked. It returns nil when ctx
// ends, or the guest keeps no log.
func ask(ctx context.Context, guest func() *agent.Client, position int64) *agent.LogPart {
	for {
		if c := guest(); c != nil {
			part, err := c.Logs(ctx, position)
			if err == nil && (len(part.Chunks) > 0 || part.Ended) {
				return part
			}
			if status.Code(err) == codes.Unimplemented {
				return nil
			}
		}
		select { // it is suspended, moves or boots again
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}
