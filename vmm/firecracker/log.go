package firecracker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"drafter/internal/console"
	"drafter/internal/logging"
)

// openFIFO opens a FIFO that Firecracker writes to. It is opened for writing, too, so that it is
// there before and after Firecracker has it open.
func openFIFO(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// level is the least important that Firecracker shall log.
func level(log *slog.Logger) string {
	if log.Enabled(context.Background(), slog.LevelDebug) {
		return "Debug"
	}
	return "Warn"
}

// followLog passes Firecracker's log on to log, and keeps its end, until the file is closed. A line
// is "TIME [ID:THREAD:LEVEL] MESSAGE". A guest can cause any number of them: some are left out of
// the log.
func followLog(f *os.File, last *console.LastLines, log *slog.Logger) {
	limited := logging.Limited{Logger: log}
	lines := bufio.NewReaderSize(f, maxLine)
	for {
		b, err := lines.ReadSlice('\n')
		cut := errors.Is(err, bufio.ErrBufferFull)
		if err != nil && !cut {
			return
		}
		severity, message := parseLine(strings.TrimSuffix(string(b), "\n"))
		if severity > slog.LevelDebug {
			fmt.Fprintln(last, message)
		}
		limited.Log(severity, "Firecracker says", "message", console.Printable(message))
		for ; cut && err != nil; _, err = lines.ReadSlice('\n') { // the rest of a long line
			if !errors.Is(err, bufio.ErrBufferFull) {
				return
			}
		}
	}
}

// maxLine is how much of a line is taken, in bytes.
const maxLine = 4 << 10

func parseLine(line string) (slog.Level, string) {
	_, rest, found := strings.Cut(line, "[")
	head, message, closed := strings.Cut(rest, "] ")
	switch {
	case !found || !closed:
		return slog.LevelDebug, line
	case strings.HasSuffix(head, ":ERROR"):
		return slog.LevelWarn, message // what it means for us, we say
	case strings.HasSuffix(head, ":WARN"):
		return slog.LevelInfo, message
	}
	return slog.LevelDebug, message
}

// followMetrics notes what Firecracker counts, until the file is closed: one JSON object a line, of
// groups of numbers.
func followMetrics(f *os.File, note func(name string, value float64)) {
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var groups map[string]json.RawMessage
		if json.Unmarshal(lines.Bytes(), &groups) != nil {
			continue
		}
		for group, raw := range groups {
			var values map[string]any
			if json.Unmarshal(raw, &values) != nil {
				continue // the time
			}
			for name, v := range values {
				if n, ok := v.(float64); ok {
					note(group+"."+name, n)
				}
			}
		}
	}
}
