package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"drafter/internal/console"
	"drafter/vmm"
)

// qmp is a client of the QEMU Machine Protocol (docs/interop/qmp-spec.rst of QEMU): JSON objects
// over a UNIX socket, one reply per command in order, events in between.
type qmp struct {
	conn *net.UnixConn

	mu      sync.Mutex // guards writing to conn and the fields below
	nextID  uint64
	waiting map[uint64]chan qmpReply
	failed  error // set once; no command is sent any more

	events chan qmpEvent // unbuffered towards the driver's event loop; closed at the end
	done   chan struct{} // closed when the reader has ended
	stop   chan struct{} // closed by close
	once   sync.Once
}

type qmpReply struct {
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
}

type qmpEvent struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// qmpError is an error QEMU reported.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return words(e.Desc) }

// maxWords bounds a quotation of QEMU, in bytes.
const maxWords = 1 << 10

// words is a text of QEMU's for an error. A guest may have broken out into QEMU.
func words(s string) string { return console.Printable(s[:min(len(s), maxWords)]) }

// newQMP reads the greeting from conn and negotiates. The caller must drain events.
func newQMP(ctx context.Context, conn *net.UnixConn) (*qmp, vmm.Version, error) {
	q := &qmp{conn: conn, waiting: map[uint64]chan qmpReply{}, events: make(chan qmpEvent), done: make(chan struct{}), stop: make(chan struct{})}
	greeting := make(chan vmm.Version, 1)
	go q.read(greeting)
	var version vmm.Version
	select {
	case version = <-greeting:
	case <-q.done:
		return nil, version, q.close()
	case <-ctx.Done():
		return nil, version, errors.Join(context.Cause(ctx), q.close())
	}
	if err := q.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, version, errors.Join(err, q.close())
	}
	return q, version, nil
}

// maxMessage bounds a message of QEMU's, in bytes. Each is a line. The largest that is asked for
// has some hundreds.
const maxMessage = 1 << 20

func (q *qmp) read(greeting chan<- vmm.Version) {
	defer close(q.done)
	defer close(q.events)
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, maxMessage)
	for {
		var m struct {
			QMP *struct {
				Version struct {
					QEMU vmm.Version `json:"qemu"`
				} `json:"version"`
			} `json:"QMP"`
			ID *uint64 `json:"id"`
			qmpReply
			qmpEvent
		}
		var err error
		if lines.Scan() {
			err = json.Unmarshal(lines.Bytes(), &m)
		} else if err = lines.Err(); err == nil {
			err = io.EOF
		}
		if err != nil {
			q.fail(fmt.Errorf("QMP connection lost: %w", err))
			return
		}
		switch {
		case m.QMP != nil:
			select {
			case greeting <- m.QMP.Version.QEMU:
			default:
			}
		case m.Name != "":
			select {
			case q.events <- m.qmpEvent:
			case <-q.stop:
			}
		case m.ID != nil:
			q.mu.Lock()
			reply := q.waiting[*m.ID]
			delete(q.waiting, *m.ID)
			q.mu.Unlock()
			if reply != nil {
				reply <- m.qmpReply
			}
		}
	}
}

func (q *qmp) fail(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.failed == nil {
		q.failed = err
	}
	for id, reply := range q.waiting {
		delete(q.waiting, id)
		close(reply)
	}
}

// execute runs one command and decodes its result into out, if not nil. Files are passed along as
// descriptors.
func (q *qmp) execute(ctx context.Context, command string, arguments, out any, files ...*os.File) error {
	if err := q.roundTrip(ctx, command, arguments, out, files); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	return nil
}

func (q *qmp) roundTrip(ctx context.Context, command string, arguments, out any, files []*os.File) error {
	reply := make(chan qmpReply, 1)
	id, err := q.send(command, arguments, files, reply)
	if err != nil {
		return err
	}
	select {
	case r, ok := <-reply:
		switch {
		case !ok:
			q.mu.Lock()
			defer q.mu.Unlock()
			return q.failed
		case r.Error != nil:
			return r.Error
		case out != nil:
			return json.Unmarshal(r.Return, out)
		}
		return nil
	case <-ctx.Done():
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
		return context.Cause(ctx)
	}
}

func (q *qmp) send(command string, arguments any, files []*os.File, reply chan qmpReply) (uint64, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.failed != nil {
		return 0, q.failed
	}
	q.nextID++
	id := q.nextID
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return 0, err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	q.waiting[id] = reply
	if _, _, err := q.conn.WriteMsgUnix(append(b, '\n'), rights, nil); err != nil {
		delete(q.waiting, id)
		return 0, err
	}
	return id, nil
}

// close ends the connection and waits for the reader.
func (q *qmp) close() error {
	q.once.Do(func() { close(q.stop) })
	err := q.conn.Close()
	<-q.done
	q.mu.Lock()
	defer q.mu.Unlock()
	return errors.Join(q.failed, err)
}
