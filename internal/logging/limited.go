package logging

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limited logs what strangers, guests among them, can cause: ten lines at once, then one a second.
// The next line says how many were left out; if there is none, a line of its own does. The zero
// value is ready. It is safe for concurrent use.
type Limited struct {
	Logger *slog.Logger // nil: slog.Default()

	mu      sync.Mutex
	limiter *rate.Limiter
	left    int  // lines left out since the last one
	telling bool // whether tell will be called
}

const (
	atOnce   = 10
	every    = time.Second
	tellLast = 10 * time.Second // after the first line that was left out
)

// Warn is [slog.Logger.Warn], if there were not too many lines.
func (l *Limited) Warn(msg string, args ...any) { l.Log(slog.LevelWarn, msg, args...) }

// Log is [slog.Logger.Log], if there were not too many lines. A line that the level hides does
// not count.
func (l *Limited) Log(level slog.Level, msg string, args ...any) {
	if !Or(l.Logger).Enabled(context.Background(), level) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.limiter == nil {
		l.limiter = rate.NewLimiter(rate.Every(every), atOnce)
	}
	if !l.limiter.Allow() {
		if !l.telling {
			l.telling = true
			time.AfterFunc(tellLast, func() { l.tell(level, msg) })
		}
		l.left++
		return
	}
	if l.left > 0 {
		args = append(args, "leftOut", l.left)
		l.left = 0
	}
	Or(l.Logger).Log(context.Background(), level, msg, args...)
}

// tell says how many lines were left out, if no line has said it.
func (l *Limited) tell(level slog.Level, msg string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.telling = false
	if l.left > 0 {
		Or(l.Logger).Log(context.Background(), level, "Left out further log lines", "first", msg, "leftOut", l.left)
		l.left = 0
	}
}
