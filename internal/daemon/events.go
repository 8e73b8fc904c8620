package daemon

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"drafter/api"
	"drafter/internal/newfile"
)

// events are what has happened, in order. They are kept in a file, so that a client that follows
// them misses none when the daemon is replaced.
type events struct {
	log   *slog.Logger
	mu    sync.Mutex
	file  *os.File
	list  []api.Event // the last ones
	more  chan struct{}
	lines int  // in the file
	torn  bool // the file may end with a part of a line
}

// keptEvents bounds how many a client can miss; the file has at most twice as many.
const keptEvents = 1000

const removedEvent = "vm.removed"

func openEvents(path string, log *slog.Logger) (*events, error) {
	e := &events{log: log, more: make(chan struct{})}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, newfile.Mode)
	if err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	e.file = f
	for lines := bufio.NewReader(f); err == nil; {
		var line []byte
		line, err = lines.ReadBytes('\n')
		var event api.Event
		if json.Unmarshal(line, &event) == nil && event.VM != nil { // or it was written in part only
			e.keep(event)
		}
	}
	if !errors.Is(err, io.EOF) {
		return nil, errors.Join(fmt.Errorf("read events: %w", err), f.Close())
	}
	if err := e.rewrite(); err != nil {
		e.torn = true // on a full disk, say
		log.Error("The file of events stays as it was", "error", err)
	}
	return e, nil
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
	e.file, e.lines, e.torn = f, len(e.list), false
	return err
}

// add adds an event that concerns a VM. Who follows hears of it also if it cannot be written.
func (e *events) add(kind string, v api.VM) {
	e.mu.Lock()
	defer e.mu.Unlock()
	event := api.Event{ID: 1, Time: time.Now().UTC(), Type: kind, VM: &v}
	if n := len(e.list); n > 0 {
		event.ID = e.list[n-1].ID + 1
	}
	err := e.write(event)
	e.keep(event)
	close(e.more)
	e.more = make(chan struct{})
	if e.lines >= 2*keptEvents {
		err = errors.Join(err, e.rewrite())
	}
	if err != nil {
		e.log.Error("The next daemon will not know of an event", "event", kind, "vm", v.Name, "error", err)
	}
}

func (e *events) write(event api.Event) error {
	b, err := json.Marshal(event)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if e.torn {
		b = append([]byte{'\n'}, b...)
	}
	_, err = e.file.Write(b)
	e.torn = err != nil
	return err
}

// last returns the last event of each VM.
func (e *events) last() map[string]api.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := map[string]api.Event{}
	for _, event := range e.list {
		last[event.VM.ID] = event
	}
	return last
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
