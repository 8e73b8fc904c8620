package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"drafter/api"
	"drafter/internal/newfile"
)

// events are what has happened, in order. They are kept in a file, so that a client that follows
// them misses none when the daemon is replaced.
type events struct {
	mu    sync.Mutex
	file  *os.File
	list  []api.Event // the last ones
	more  chan struct{}
	lines int // in the file
}

// keptEvents bounds how many a client can miss; the file has at most twice as many.
const keptEvents = 1000

func openEvents(path string) (*events, error) {
	e := &events{more: make(chan struct{})}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, newfile.Mode)
	if err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	e.file = f
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var event api.Event
		if json.Unmarshal(lines.Bytes(), &event) == nil { // or the last daemon was killed as it wrote it
			e.keep(event)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, errors.Join(fmt.Errorf("read events: %w", err), f.Close())
	}
	return e, e.rewrite()
}

func (e *events) keep(event api.Event) {
	e.list = append(e.list, event)
	if len(e.list) > keptEvents {
		e.list = e.list[len(e.list)-keptEvents:]
	}
	e.lines++
}

// rewrite makes the file hold only what is kept, and end with a whole line.
func (e *events) rewrite() error {
	path := e.file.Name()
	err := newfile.Write(path, func(f *os.File) error {
		to := json.NewEncoder(f)
		for _, event := range e.list {
			if err := to.Encode(event); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write events: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, newfile.Mode)
	if err != nil {
		return fmt.Errorf("open events: %w", err)
	}
	err = e.file.Close()
	e.file, e.lines = f, len(e.list)
	return err
}

// add adds an event that concerns a VM.
func (e *events) add(kind string, v *api.VM) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	event := api.Event{ID: 1, Time: time.Now().UTC(), Type: kind, VM: v}
	if n := len(e.list); n > 0 {
		event.ID = e.list[n-1].ID + 1
	}
	if err := json.NewEncoder(e.file).Encode(event); err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	e.keep(event)
	close(e.more)
	e.more = make(chan struct{})
	if e.lines >= 2*keptEvents {
		return e.rewrite()
	}
	return nil
}

// after returns the events that follow the one with an ID, and a channel that is closed when there
// are more. A negative ID stands for now.
func (e *events) after(id int64) ([]api.Event, int64, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := int64(0)
	if n := len(e.list); n > 0 {
		last = e.list[n-1].ID
	}
	if id < 0 || id > last {
		return nil, last, e.more
	}
	var list []api.Event
	for _, event := range e.list {
		if event.ID > id {
			list = append(list, event)
		}
	}
	return list, last, e.more
}

func (e *events) close() error { return e.file.Close() }
