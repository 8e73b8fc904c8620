package detached

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"drafter/internal/newfile"
)

// A detached process writes its log to a file and, where the program that started it does, to the
// journal of systemd. It rotates the file itself, because nobody else need be there.

// The log of a process that was started with one: the path of the file that is its stderr, and the
// number of the journal's stream, if it has that.
const (
	logVariable     = "DRAFTER_LOG"
	journalVariable = "DRAFTER_JOURNAL"
)

// mostLog is how large a log gets before it becomes the older one, in bytes.
const mostLog = 4 << 20

// OlderLog is where the log at a path had its lines before the last ones.
func OlderLog(path string) string { return path + ".1" }

// openLog opens a log, and the journal if this process has it.
func openLog(path string) (log, journal *os.File, err error) {
	if log, err = os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, newfile.Mode); err != nil {
		return nil, nil, fmt.Errorf("open log: %w", err)
	}
	if isJournal(os.Stderr, os.Getenv("JOURNAL_STREAM")) {
		journal = os.Stderr
	}
	return log, journal, nil
}

// isJournal tells whether a file is the stream that systemd names in sd-journal's way: its device and
// inode (systemd.exec(5), JOURNAL_STREAM).
func isJournal(f *os.File, stream string) bool {
	var st unix.Stat_t
	return stream != "" && unix.Fstat(int(f.Fd()), &st) == nil &&
		stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// journalFile is the number of the journal's stream in a detached process. 3 is its lock.
const journalFile = 4

var journalNumber = strconv.Itoa(journalFile)

// Stderr is where this process writes its log: stderr, which it rotates if it was started with a log.
func Stderr() io.Writer {
	path := os.Getenv(logVariable)
	if path == "" {
		return os.Stderr
	}
	l := &log{path: path, most: mostLog, file: os.Stderr}
	if os.Getenv(journalVariable) == journalNumber {
		unix.CloseOnExec(journalFile)
		l.journal = os.NewFile(journalFile, "journal")
	}
	return l
}

// log is the log of a detached process. What the runtime prints as it dies is there, too, because file
// stays stderr.
type log struct {
	path    string
	most    int64
	file    *os.File
	journal io.Writer // nil: there is none
}

// Write implements [io.Writer].
func (l *log) Write(p []byte) (int, error) {
	if info, err := l.file.Stat(); err == nil && info.Size()+int64(len(p)) > l.most &&
		info.Size() > 0 {
		if err := l.rotate(info); err != nil {
			return 0, err
		}
	}
	n, err := l.file.Write(p)
	if l.journal != nil {
		// The file has the line; the journal may be gone.
		if _, jerr := l.journal.Write(p); errors.Is(jerr, syscall.EPIPE) {
			l.journal = nil
		}
	}
	return n, err
}

// rotate makes the log the older one, and begins a new one. Who holds the file open meanwhile, as the
// process before this one, goes on in the older one.
func (l *log) rotate(is os.FileInfo) error {
	if there, err := os.Stat(l.path); err == nil && os.SameFile(there, is) {
		if err := os.Rename(l.path, OlderLog(l.path)); err != nil {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, newfile.Mode)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the VM's directory is being removed, and the old file with it
	}
	if err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	defer f.Close()
	if err := unix.Dup3(int(f.Fd()), int(l.file.Fd()), 0); err != nil {
		return fmt.Errorf("rotate log: %w", err)
	}
	return nil
}

// variables are the environment without those that an outer detached process has of itself.
func variables() (list []string) {
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		if name != logVariable && name != journalVariable && name != "JOURNAL_STREAM" {
			list = append(list, v)
		}
	}
	return list
}
