package transport

import (
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Complaints logs what strangers can cause: ten lines at once, then one a second. The next line
// says how many were left out. The zero value is ready. It is safe for concurrent use.
type Complaints struct {
	mu      sync.Mutex
	limiter *rate.Limiter
	left    int
}

const (
	complaintsAtOnce = 10
	complaintsEvery  = time.Second
)

// Warn is [slog.Warn], if there were not too many lines.
func (c *Complaints) Warn(msg string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limiter == nil {
		c.limiter = rate.NewLimiter(rate.Every(complaintsEvery), complaintsAtOnce)
	}
	if !c.limiter.Allow() {
		c.left++
		return
	}
	if c.left > 0 {
		args = append(args, "leftOut", c.left)
		c.left = 0
	}
	slog.Warn(msg, args...)
}
