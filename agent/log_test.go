package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
)

// text is what chunks hold, with what is on stderr in brackets.
func text(chunks []LogChunk) string {
	var b strings.Builder
	for _, c := range chunks {
		if c.Stderr {
			fmt.Fprintf(&b, "[%s]", c.Data)
		} else {
			b.Write(c.Data)
		}
	}
	return b.String()
}

func TestLogs(t *testing.T) {
	l := NewLog()
	c := converse(t, &Server{Log: l})
	ctx := within(t, 30*time.Second)
	out, outWriter := io.Pipe()
	copied := make(chan error)
	go func() { copied <- l.Copy(out, false) }()
	asked := make(chan *LogPart)
	ask := func(position int64) {
		p, err := c.Logs(ctx, position)
		if err != nil {
			t.Error(err)
		}
		asked <- p
	}
	go ask(0) // before there is anything
	before := time.Now()
	io.WriteString(outWriter, "hello\n")
	p := <-asked
	if p == nil || text(p.Chunks) != "hello\n" || p.Next != 6 || len(p.Boot) != 32 || p.Ended || p.Chunks[0].Time.Before(before) {
		t.Fatalf("%+v", p)
	}
	l.Copy(strings.NewReader("oops"), true)
	if p, err := c.Logs(ctx, 2); err != nil || text(p.Chunks) != "llo\n[oops]" || p.Chunks[0].Position != 2 || p.Next != 10 {
		t.Errorf("%+v, %v", p, err)
	}
	// It was suspended here, and printed more before it was told that it was resumed.
	if err := c.BeforeSuspend(ctx); err != nil {
		t.Fatal(err)
	}
	l.Copy(strings.NewReader("after"), false)
	l.wasResumed()
	if p, err := c.Logs(ctx, 0); err != nil || text(p.Chunks) != "hello\n[oops]after" || p.Resumed != 10 {
		t.Errorf("%+v, %v", p, err)
	}
	// A host that knows its future.
	if p, err := c.Logs(ctx, 1000); err != nil || len(p.Chunks) > 0 || p.Next != 15 {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := c.Logs(ctx, -1); err == nil {
		t.Errorf("%+v", p)
	}
	go ask(15)
	if err := errors.Join(outWriter.Close(), <-copied); err != nil {
		t.Error(err)
	}
	l.End(3)
	if p := <-asked; p == nil || !p.Ended || p.ExitStatus != 3 || len(p.Chunks) > 0 || p.Next != 15 {
		t.Errorf("%+v", p)
	}
	<-l.Heard()
	if p, err := c.Logs(ctx, 0); err != nil || !p.Ended || text(p.Chunks) != "hello\n[oops]after" {
		t.Errorf("%+v, %v", p, err)
	}
}

// Of much output the last is kept, in bounded memory, and answers are bounded.
func TestMuchLog(t *testing.T) {
	for _, size := range []int{1, 100, 5000} {
		l := NewLog()
		var all bytes.Buffer
		for n := 0; all.Len() < 3<<20/(1+chunkOverhead/size); n++ {
			piece := bytes.Repeat([]byte{byte(n)}, size)
			all.Write(piece)
			l.add(LogChunk{Data: piece, Stderr: n%2 == 1})
		}
		c := converse(t, &Server{Log: l})
		var got []byte
		at, first := int64(0), int64(-1)
		for at < int64(all.Len()) {
			p, err := c.Logs(within(t, 10*time.Second), at)
			if err != nil || p.Next <= at {
				t.Fatalf("%+v, %v", p, err)
			}
			if first < 0 {
				first = p.Chunks[0].Position
			}
			length := 0
			for _, chunk := range p.Chunks {
				got = append(got, chunk.Data...)
				length += len(chunk.Data)
			}
			if length > maxLogs || int64(length) != p.Next-p.Chunks[0].Position {
				t.Fatalf("%d bytes of %d to %d", length, p.Chunks[0].Position, p.Next)
			}
			at = p.Next
		}
		if !bytes.Equal(got, all.Bytes()[first:]) || len(got) < keptLog/(1+chunkOverhead/size)*9/10-maxChunk || len(got) > keptLog {
			t.Errorf("pieces of %d: %d of %d bytes from %d on", size, len(got), all.Len(), first)
		}
	}
}

func TestFollow(t *testing.T) {
	l := NewLog()
	var got []LogChunk
	followed := make(chan error)
	follow := func(ctx context.Context) {
		followed <- l.Follow(ctx, func(c LogChunk) error {
			got = append(got, c)
			if string(c.Data) == "fail" {
				return io.ErrShortWrite
			}
			return nil
		})
	}
	go follow(t.Context())
	l.Copy(strings.NewReader("a"), false)
	l.Copy(strings.NewReader("b"), true)
	l.End(0)
	if err := <-followed; err != nil || text(got) != "a[b]" {
		t.Errorf("%q, %v", text(got), err)
	}
	l, got = NewLog(), nil
	ctx, cancel := context.WithCancel(t.Context())
	go follow(ctx)
	cancel()
	if err := <-followed; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	go follow(t.Context())
	l.Copy(strings.NewReader("fail"), false)
	if err := <-followed; !errors.Is(err, io.ErrShortWrite) {
		t.Error(err)
	}
	if err := l.Copy(failing{io.ErrNoProgress}, false); !errors.Is(err, io.ErrNoProgress) {
		t.Error(err)
	}
}

type hostileLog struct {
	Server
	answer *LogsResponse
}

func (h *hostileLog) Logs(context.Context, *LogsRequest) (*LogsResponse, error) { return h.answer, nil }

// Positions are a guest's words.
func TestHostileLog(t *testing.T) {
	entry := func(position int64, n int) *LogEntry { return &LogEntry{Position: position, Data: make([]byte, n)} }
	for name, answer := range map[string]*LogsResponse{
		"below 0":          {NextPosition: -1},
		"resumed below 0":  {ResumedPosition: -1},
		"no order":         {NextPosition: 100, Chunks: []*LogEntry{entry(50, 1), entry(40, 1)}},
		"overlap":          {NextPosition: 100, Chunks: []*LogEntry{entry(50, 10), entry(59, 1)}},
		"behind the end":   {NextPosition: 100, Chunks: []*LogEntry{entry(99, 2)}},
		"before the start": {NextPosition: 100, Chunks: []*LogEntry{entry(-1, 2)}},
		"too far":          {NextPosition: 100, Chunks: []*LogEntry{entry(1<<63-1, 2)}},
		"nothing in it":    {NextPosition: 100, Chunks: []*LogEntry{nil, entry(-1, 0)}},
	} {
		c := NewClient(serveAs(t, func(server *ttrpc.Server) { RegisterWorkloadService(server, &hostileLog{answer: answer}) }))
		if p, err := c.Logs(within(t, 10*time.Second), 0); err == nil {
			t.Errorf("%s: %+v", name, p)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A workload that is held is started once, with what the host gives it.
func TestHeld(t *testing.T) {
	held := true
	var env []string
	s := &Server{Held: func() bool { return held }, StartWorkload: func(e []string) error {
		if len(e) == 0 {
			return errors.New("it needs a secret")
		}
		held, env = false, e
		return nil
	}}
	c := converse(t, s)
	ctx := within(t, 10*time.Second)
	asked := time.Now()
	if r, err := c.Ready(ctx); err != nil || r.GetReady() || !r.GetHeld() || time.Since(asked) >= readyWait {
		t.Errorf("%v, %v after %s", r, err, time.Since(asked))
	}
	if err := c.Start(ctx, nil); err == nil || !strings.Contains(err.Error(), "it needs a secret") {
		t.Errorf("a start that fails: %v", err)
	}
	if err := c.Start(ctx, []string{"A=b"}); err != nil || !slices.Equal(env, []string{"A=b"}) {
		t.Errorf("%v, %v", env, err)
	}
	if r, err := c.Ready(ctx); err != nil || !r.GetReady() || r.GetHeld() {
		t.Errorf("%v, %v", r, err)
	}
	other := converse(t, &Server{})
	if err := other.Start(ctx, nil); err == nil {
		t.Error("a workload that is not held was started")
	}
	if p, err := other.Logs(ctx, 0); err == nil || !strings.Contains(err.Error(), "no container") {
		t.Errorf("%v, %v", p, err)
	}
}
