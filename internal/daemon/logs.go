package daemon

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"drafter/api"
	"drafter/internal/control"
)

// logs sends what a VM's service has printed, and goes on until the VM has ended if it is to follow.
func (d *Daemon) logs(in *logInput) (*huma.StreamResponse, error) {
	d.mu.Lock()
	v, err := d.find(in.VM)
	d.mu.Unlock()
	if err != nil {
		return nil, problem(err)
	}
	return &huma.StreamResponse{Body: func(ctx huma.Context) {
		ctx.SetHeader("Content-Type", "application/x-ndjson")
		if err := v.sendLog(ctx, in); err != nil {
			d.log.Debug("A reader of a VM's log was cut off", "error", err)
		}
	}}, nil
}

// logPause is how often a log is looked at that is followed.
const logPause = 100 * time.Millisecond

func (v *vm) sendLog(ctx huma.Context, in *logInput) error {
	to := json.NewEncoder(ctx.BodyWriter())
	last := place{}
	list, err := v.logAfter(&last)
	if err != nil {
		return err
	}
	for _, l := range tail(list, in.Tail) {
		if l.Time.Before(in.Since) {
			continue
		}
		if err := to.Encode(l); err != nil {
			return err
		}
	}
	for in.Follow {
		flush(ctx)
		running := v.runsNow()
		if list, err = v.logAfter(&last); err != nil {
			return err
		}
		for _, l := range list {
			if err := to.Encode(l); err != nil {
				return err
			}
		}
		if !running {
			return nil // and all of it was read
		}
		select {
		case <-time.After(logPause):
		case <-ctx.Context().Done():
			return context.Cause(ctx.Context())
		case <-v.d.ctx.Done():
			return nil
		}
	}
	return nil
}

func (v *vm) runsNow() bool {
	_, err := v.runs()
	return err == nil
}

// flush sends what is written so far.
func flush(ctx huma.Context) {
	if f, ok := ctx.BodyWriter().(interface{ Flush() }); ok {
		f.Flush()
	}
}

// place is a place in a log, and how large its files were.
type place struct {
	boot  string
	next  int64
	sizes []int64
}

// logAfter returns what lies behind a place in the log, and moves it on.
func (v *vm) logAfter(at *place) (list []api.LogLine, err error) {
	files := control.LogFiles(v.path(controlDir))
	var sizes []int64
	for _, path := range files {
		size := int64(-1)
		if info, err := os.Stat(path); err == nil {
			size = info.Size()
		}
		sizes = append(sizes, size)
	}
	if slices.Equal(sizes, at.sizes) {
		return nil, nil
	}
	from := *at
	behind := from.boot == ""
	for _, path := range files {
		err := control.ReadLog(path, func(l control.Line) error {
			*at = place{l.Boot, l.Next, sizes}
			switch {
			case behind:
				list = append(list, api.LogLine{Time: l.Time, Stream: l.Stream, Text: l.Text})
			case l.Boot == from.boot && l.Next == from.next:
				behind = true
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if !behind { // so much was printed that it is gone
		*at = place{}
		return v.logAfter(at)
	}
	return list, nil
}

// tail returns the last n lines of a log; all if n is below 0.
func tail(list []api.LogLine, n int) []api.LogLine {
	switch {
	case n < 0:
		return list
	case n == 0:
		return nil
	}
	for i := len(list) - 1; i >= 0; i-- {
		text := list[i].Text
		for end := len(text); ; {
			at := strings.LastIndexByte(text[:end], '\n')
			if at < 0 {
				break
			}
			if i < len(list)-1 || at < len(text)-1 { // this newline ends a line of before
				if n--; n <= 0 {
					list[i].Text = text[at+1:]
					return list[i:]
				}
			}
			end = at
		}
	}
	return list
}
