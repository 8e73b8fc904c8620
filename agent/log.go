package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// What a guest keeps of its workload's output, in bytes, where each chunk counts chunkOverhead more
// than it holds. It lies in the guest's memory, and so in packages.
const (
	keptLog       = 1 << 20
	chunkOverhead = 128
	maxChunk      = 16 << 10
	maxLogs       = 64 << 10 // of chunks in an answer
	logsWait      = 30 * time.Second
)

// LogChunk is a part of what a workload has printed, as it was read.
type LogChunk struct {
	Position int64 // in bytes of both outputs since the guest's boot
	Time     time.Time
	Stderr   bool
	Data     []byte
}

// LogPart is what a workload has printed from some position on.
type LogPart struct {
	// Boot identifies the boot of the guest. Positions of another one are of other output: whoever sees
	// it change asks anew from 0. Clones of a VM have it in common, and all that it had printed.
	Boot string
	// Chunks lie one behind the other. What lies between the position that was asked for and that of
	// the first one is no longer kept.
	Chunks []LogChunk
	Next   int64 // where to go on
	// Resumed is where the output was when the VM that was last resumed was suspended. What lies before
	// is the same for all clones of it.
	Resumed int64

	Ended      bool // the workload has: there is nothing behind Next
	ExitStatus int  // as from wait(2), once it has ended
}

// Logs returns what the guest's workload has printed from a position on, which is 0 or the Next of
// an earlier call, maybe to this VM when it was elsewhere. It returns once there is anything, or
// with no chunks after half a minute. A guest that is asked waits with its power-off until it has
// told that its workload has ended, and how. The guest keeps some 1 MiB. It does not wait for who
// asks.
func (c *Client) Logs(ctx context.Context, position int64) (*LogPart, error) {
	r, err := c.workload.Logs(ctx, &LogsRequest{Position: position})
	if err != nil {
		return nil, c.explain(ctx, "logs", missing(err))
	}
	p := &LogPart{Boot: fmt.Sprintf("%.32x", r.GetBoot()), Next: r.GetNextPosition(), Resumed: r.GetResumedPosition(), Ended: r.GetEnded(), ExitStatus: int(uint8(r.GetExitStatus()))}
	for _, l := range r.GetChunks() {
		p.Chunks = append(p.Chunks, LogChunk{Position: l.GetPosition(), Time: time.Unix(0, l.GetTimeUnixNano()), Stderr: l.GetStderr(), Data: l.GetData()})
	}
	if err := p.check(); err != nil {
		return nil, c.explain(ctx, "logs", err)
	}
	if p.Ended {
		// The guest may be off before it answers.
		_, _ = c.workload.Logs(ctx, &LogsRequest{Heard: true})
	}
	return p, nil
}

// check refuses positions that are none. They are a guest's.
func (p *LogPart) check() error {
	at := int64(0)
	for _, chunk := range p.Chunks {
		if chunk.Position < at || chunk.Position > p.Next-int64(len(chunk.Data)) {
			return errors.New("the guest's log has chunks in no order")
		}
		at = chunk.Position + int64(len(chunk.Data))
	}
	if p.Next < 0 || p.Resumed < 0 {
		return errors.New("the guest's log has positions below 0")
	}
	return nil
}

// Log keeps the last of what a guest's workload prints.
type Log struct {
	boot []byte

	mu      sync.Mutex
	changed chan struct{} // closed with the next change
	chunks  []LogChunk
	kept    int
	next    int64
	// where it was when a host last said that it suspends the VM, and, once it was resumed, for good
	suspended, resumed int64
	ended              bool
	status             int
	heard              chan struct{}
	isHeard            bool
}

// NewLog makes a log of this boot.
func NewLog() *Log {
	boot := make([]byte, 16)
	_, _ = rand.Read(boot) // never fails
	return &Log{boot: boot, changed: make(chan struct{}), heard: make(chan struct{})}
}

func (l *Log) change() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// Copy adds what r yields until it ends.
func (l *Log) Copy(r io.Reader, stderr bool) error {
	buf := make([]byte, maxChunk)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			l.add(LogChunk{Time: time.Now(), Stderr: stderr, Data: slices.Clone(buf[:n])})
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the workload's output: %w", err)
		}
	}
}

func (l *Log) add(c LogChunk) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.Position = l.next
	l.next += int64(len(c.Data))
	l.chunks = append(l.chunks, c)
	l.kept += len(c.Data) + chunkOverhead
	drop := 0
	for ; l.kept > keptLog; drop++ {
		l.kept -= len(l.chunks[drop].Data) + chunkOverhead
	}
	l.chunks = slices.Delete(l.chunks, 0, drop)
	l.change()
}

// End notes how the workload has ended, after all of its output was copied.
func (l *Log) End(status int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended, l.status = true, status
	l.change()
}

// Heard is closed once a host knows how the workload has ended.
func (l *Log) Heard() <-chan struct{} { return l.heard }

func (l *Log) hear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended && !l.isHeard {
		l.isHeard = true
		close(l.heard)
	}
}

func (l *Log) suspends() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.suspended = l.next
}

// wasResumed notes where the output was at the suspend. What was printed until now may be of after
// it, and is rather seen twice than not at all.
func (l *Log) wasResumed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resumed = l.suspended
}

// from returns chunks from a position on, and what is closed when there are more.
func (l *Log) from(position int64) (chunks []LogChunk, next, resumed int64, ended bool, status int, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	next = l.next
	i, _ := slices.BinarySearchFunc(l.chunks, position, func(c LogChunk, p int64) int {
		if c.Position+int64(len(c.Data)) <= p {
			return -1
		}
		return 1
	})
	size := 0
	for _, c := range l.chunks[i:] {
		if behind := position - c.Position; behind > 0 {
			c.Position, c.Data = position, c.Data[behind:]
		}
		if size += len(c.Data) + chunkOverhead; size > maxLogs && len(chunks) > 0 {
			next = c.Position
			break
		}
		chunks = append(chunks, c)
	}
	return chunks, next, l.resumed, l.ended && next == l.next, l.status, l.changed
}

// Follow calls do with all chunks there will be, until the workload has ended or ctx has. What do
// is too slow for is left out.
func (l *Log) Follow(ctx context.Context, do func(LogChunk) error) error {
	for at := int64(0); ; {
		chunks, next, _, ended, _, more := l.from(at)
		for _, c := range chunks {
			if err := do(c); err != nil {
				return err
			}
		}
		if at = next; ended {
			return nil
		}
		if len(chunks) > 0 {
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

var errNoLog = errors.New("the guest has no container whose output its agent keeps")

// Logs implements [WorkloadService].
func (s *Server) Logs(ctx context.Context, r *LogsRequest) (*LogsResponse, error) {
	if s.Log == nil {
		return nil, errNoLog
	}
	if r.GetHeard() {
		s.Log.hear()
		return &LogsResponse{}, nil
	}
	if r.GetPosition() < 0 {
		return nil, fmt.Errorf("%d is no position", r.GetPosition())
	}
	timeout := time.NewTimer(logsWait)
	defer timeout.Stop()
	for timedOut := false; ; {
		chunks, next, resumed, ended, status, more := s.Log.from(r.GetPosition())
		// A host that is ahead has followed the VM to what is the future here: this is an older state.
		if len(chunks) > 0 || ended || timedOut || r.GetPosition() > next {
			response := &LogsResponse{Boot: s.Log.boot, NextPosition: next, ResumedPosition: resumed, Ended: ended, ExitStatus: int32(status)}
			for _, c := range chunks {
				response.Chunks = append(response.Chunks, &LogEntry{Position: c.Position, TimeUnixNano: c.Time.UnixNano(), Stderr: c.Stderr, Data: c.Data})
			}
			return response, nil
		}
		select {
		case <-more:
		case <-timeout.C:
			timedOut = true
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Start starts the workload of a guest that holds it, with more variables in its environment, as
// NAME=value. They are nowhere but in the guest's memory.
func (c *Client) Start(ctx context.Context, env []string) error {
	_, err := c.workload.Start(ctx, &StartRequest{Env: env})
	return c.explain(ctx, "start", missing(err))
}

// Start implements [WorkloadService].
func (s *Server) Start(_ context.Context, r *StartRequest) (*StartResponse, error) {
	if s.StartWorkload == nil {
		return nil, errors.New("the guest does not hold its workload")
	}
	return &StartResponse{}, s.StartWorkload(r.GetEnv())
}
