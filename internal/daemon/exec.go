package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/coder/websocket"
	"github.com/danielgtaylor/huma/v2"

	"drafter/agent"
	"drafter/api"
	"drafter/internal/control"
)

// guest connects with the guest of a VM. Close the client.
func (d *Daemon) guest(ctx context.Context, name string) (*agent.Client, error) {
	d.mu.Lock()
	v, err := d.find(name)
	state := ""
	if err == nil {
		state = v.record.State
	}
	d.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if state != api.Running && state != api.Moving {
		return nil, fmt.Errorf("VM %s is %s: %w; it has to run ('drafter start %s')", name, state, ErrConflict, name)
	}
	return control.Guest(ctx, v.seat().control())
}

// refuse answers with a problem.
func refuse(w http.ResponseWriter, err error) {
	var p huma.StatusError
	if !errors.As(problem(err), &p) {
		return
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.GetStatus())
	json.NewEncoder(w).Encode(p) //nolint:errcheck,errchkjson // who has asked hears of it
}

// mostMessage bounds a message of a client, in bytes.
const mostMessage = 1 << 20

// exec runs a program in a VM, over a WebSocket; see [api.Exec].
func (d *Daemon) exec(w http.ResponseWriter, r *http.Request) {
	d.work.Add(1)
	defer d.work.Done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(d.ctx, cancel)() //nolint:contextcheck // it ends with the daemon, too
	var e api.Exec
	if err := json.Unmarshal([]byte(r.URL.Query().Get("exec")), &e); err != nil || (len(e.Args) == 0) != e.Main {
		refuse(w, fmt.Errorf("exec: no program is named, or it is malformed: %w", ErrInvalid))
		return
	}
	guest, err := d.guest(ctx, r.PathValue("vm"))
	if err != nil {
		refuse(w, err)
		return
	}
	defer guest.Close()
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // it has answered
	}
	defer conn.CloseNow() //nolint:errcheck // nothing is to be said any more
	conn.SetReadLimit(mostMessage)
	status := api.ExecStatus{}
	if status.ExitStatus, err = d.execOver(ctx, cancel, conn, guest, e); err != nil {
		status.Error = err.Error()
		if status.ExitStatus == 0 {
			status.ExitStatus = 1
		}
	}
	b, err := json.Marshal(status)
	if err == nil {
		err = conn.Write(ctx, websocket.MessageBinary, append([]byte{api.ChannelStatus}, b...))
	}
	if err == nil {
		err = conn.Close(websocket.StatusNormalClosure, "")
	}
	if err != nil {
		d.log.Debug("Who has run a program in a VM has gone", "error", err)
	}
}

// execOver runs a program until it ends. cancel ends it.
func (d *Daemon) execOver(ctx context.Context, cancel func(), conn *websocket.Conn, guest *agent.Client, e api.Exec) (int, error) {
	s, err := guest.Run(ctx, agent.Command{
		Args: e.Args, Env: e.Env, Dir: e.Dir, User: e.User, TTY: e.TTY, Rows: e.Rows, Columns: e.Columns, Stdin: e.Stdin, System: e.System, Main: e.Main,
	})
	var start *agent.StartError
	if errors.As(err, &start) {
		return start.ExitStatus, err
	}
	if err != nil {
		return 0, err
	}
	in := input{pieces: make(chan []byte, mostPieces)}
	d.work.Go(func() {
		defer cancel() // who has gone does not need the program
		defer close(in.pieces)
		in.receive(ctx, conn, s)
	})
	d.work.Go(func() { in.pass(ctx, conn, s) })
	var outputs sync.WaitGroup
	for channel, from := range map[byte]io.Reader{api.ChannelStdout: s.Stdout, api.ChannelStderr: s.Stderr} {
		outputs.Go(func() { sendOutput(ctx, conn, channel, from) })
	}
	outputs.Wait()
	return s.Wait()
}

// sendOutput passes on what a program prints.
func sendOutput(ctx context.Context, conn *websocket.Conn, channel byte, from io.Reader) {
	buf := make([]byte, 32<<10)
	buf[0] = channel
	gone := false
	for {
		n, err := from.Read(buf[1:])
		if n > 0 && !gone {
			gone = conn.Write(ctx, websocket.MessageBinary, buf[:1+n]) != nil
		}
		if err != nil {
			return // how it has ended, Wait says
		}
	}
}

// mostPieces bounds the messages of input that the program has not taken.
const mostPieces = 64

// input is what a client sends to a program. It waits apart from signals and sizes of the terminal.
type input struct {
	pieces chan []byte // an empty one ends it
	room   atomic.Int64
}

// receive takes a client's messages until it has gone, or sends more than there is room for.
func (in *input) receive(ctx context.Context, conn *websocket.Conn, s *agent.Session) {
	in.room.Store(api.InputWindow)
	for {
		_, b, err := conn.Read(ctx)
		if err != nil || len(b) == 0 {
			return
		}
		channel, b := b[0], b[1:]
		switch channel {
		case api.ChannelStdin:
			if in.room.Add(-int64(len(b))) < 0 {
				return
			}
			select {
			case in.pieces <- b:
			default:
				return
			}
		case api.ChannelSize:
			var size api.WindowSize
			if err = json.Unmarshal(b, &size); err == nil {
				err = s.Resize(size.Rows, size.Columns)
			}
		case api.ChannelSignal:
			var n int
			if n, err = strconv.Atoi(string(b)); err == nil {
				err = s.Signal(syscall.Signal(n))
			}
		}
		if err != nil {
			return
		}
	}
}

// pass lets the program take the input, and tells the client of that. A program that has ended takes
// none.
func (in *input) pass(ctx context.Context, conn *websocket.Conn, s *agent.Session) {
	var err error
	for b := range in.pieces {
		switch {
		case err != nil:
		case len(b) == 0:
			err = s.Stdin.Close()
		default:
			if _, err = s.Stdin.Write(b); err == nil {
				in.room.Add(int64(len(b)))
				taken := strconv.AppendInt([]byte{api.ChannelTaken}, int64(len(b)), 10)
				err = conn.Write(ctx, websocket.MessageBinary, taken)
			}
		}
	}
}
