package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

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
	mostPiece = 1 << 20  // of a line
)

// LogFiles are the log's files in a control directory, the older one first.
func LogFiles(dir string) []string {
	return []string{filepath.Join(dir, olderLog), filepath.Join(dir, logFile)}
}

// Log writes what a VM's service prints to the log of a control directory, from where the log ends,
// until ctx ends or the service has. It returns the service's exit status; nil if that is not known.
// guest returns the connection with the guest's agent, or nil while there is none.
func Log(ctx context.Context, dir string, guest func() *agent.Client) (ended *int, err error) {
	path := filepath.Join(dir, logFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, newfile.Mode)
	if err != nil {
		return nil, fmt.Errorf("open the VM's log: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	boot, position, err := end(f)
	if err != nil {
		return nil, err
	}
	for ctx.Err() == nil {
		part := ask(ctx, guest, position)
		if part != nil && part.Boot != boot {
			boot = part.Boot
			part = ask(ctx, guest, 0)
		}
		if part == nil {
			return nil, nil
		}
		for _, c := range part.Chunks {
			line := Line{Time: c.Time, Stream: "stdout", Text: string(c.Data), Boot: boot, Next: c.Position + int64(len(c.Data))}
			if c.Stderr {
				line.Stream = "stderr"
			}
			if err := json.NewEncoder(f).Encode(line); err != nil {
				return nil, fmt.Errorf("write the VM's log: %w", err)
			}
		}
		position = part.Next
		if part.Ended {
			return &part.ExitStatus, nil
		}
		if info, err := f.Stat(); err != nil || info.Size() < mostLog {
			continue
		}
		if err := errors.Join(f.Close(), os.Rename(path, filepath.Join(dir, olderLog))); err != nil {
			return nil, fmt.Errorf("rotate the VM's log: %w", err)
		}
		if f, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, newfile.Mode); err != nil {
			return nil, fmt.Errorf("open the VM's log: %w", err)
		}
	}
	return nil, nil
}

// ask asks the guest for more, as soon as there is one that can be asked. It returns nil when ctx
// ends, or the guest keeps no log.
func ask(ctx context.Context, guest func() *agent.Client, position int64) *agent.LogPart {
	for {
		if c := guest(); c != nil {
			part, err := c.Logs(ctx, position)
			if err == nil {
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

// end tells where the log has got to, and removes what a killed process has written only in part.
func end(f *os.File) (boot string, position int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	from := max(0, info.Size()-mostPiece)
	b, err := io.ReadAll(io.NewSectionReader(f, from, info.Size()-from))
	if err != nil {
		return "", 0, fmt.Errorf("read the VM's log: %w", err)
	}
	whole := bytes.LastIndexByte(b, '\n') + 1
	if whole < len(b) {
		if err := f.Truncate(from + int64(whole)); err != nil {
			return "", 0, fmt.Errorf("mend the VM's log: %w", err)
		}
	}
	last := bytes.TrimSuffix(b[:whole], []byte("\n"))
	last = last[bytes.LastIndexByte(last, '\n')+1:]
	var line Line
	if len(last) > 0 {
		err = json.Unmarshal(last, &line)
	}
	return line.Boot, line.Next, err
}

// ReadLog calls f for each line of a log's file. One that is not there has none.
func ReadLog(path string, f func(Line) error) error {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, mostPiece)
	for lines.Scan() {
		var line Line
		if json.Unmarshal(lines.Bytes(), &line) != nil {
			continue // it is being written
		}
		if err := f(line); err != nil {
			return err
		}
	}
	return lines.Err()
}
