package migration

import (
	"fmt"
	"time"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/wire"
)

// compression decides whether an extent is worth compressing. It is if compressing it, or sending
// the result, whichever is slower, takes less time than sending it raw. A sample of the extent
// predicts the size of the result. Use it from one goroutine.
type compression struct {
	encoder *zstd.Encoder
	link    rate // bytes per second that the connection takes, with the bandwidth limit
	speed   rate // bytes per second that are compressed
	sample  []byte
	count   int
}

const (
	// extents after which one is compressed in any case, because the speed of that may have changed
	tryEvery  = 64
	bestRatio = 0.2      // of compressed to raw size, that memory hardly ever goes below
	sampled   = 64 << 10 // bytes of which one page is a sample
)

func newCompression() (*compression, error) {
	e, err := newEncoder(1)
	return &compression{encoder: e}, err
}

// newEncoder returns an encoder that so many goroutines can use at once.
func newEncoder(users int) (*zstd.Encoder, error) {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(users), zstd.WithWindowSize(wire.MaxExtent), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	return e, nil
}

// worth tells whether to try to compress the next extent, which holds data.
func (c *compression) worth(data []byte) bool {
	if c.link.perSecond() == 0 {
		return false // unknown so far
	}
	c.count++
	switch {
	case c.speed.perSecond() == 0 || c.count%tryEvery == 0:
		return true
	case !c.pays(bestRatio):
		return false
	}
	return c.pays(c.estimate(data))
}

// estimate is about the ratio that compressing data would have.
func (c *compression) estimate(data []byte) float64 {
	raw, left := 0, 0
	for at := min(sampled, len(data)) / 2; at < len(data); at += sampled {
		page := data[at:min(at+block.PageSize, len(data))]
		c.sample = c.encoder.EncodeAll(page, c.sample[:0])
		raw, left = raw+len(page), left+len(c.sample)
	}
	return float64(left) / float64(raw)
}

// pays compares how long a byte takes. While one extent is compressed, the connection sends those
// before.
func (c *compression) pays(ratio float64) bool {
	raw := 1 / c.link.perSecond()
	return max(1/c.speed.perSecond(), ratio*raw) < 0.9*raw
}

// try compresses and tells whether the result is to be sent.
func (c *compression) try(b *wire.ExtentBuffer, at, length int64) bool {
	start := time.Now()
	n := b.Compress(c.encoder, at, length)
	c.speed.add(length, time.Since(start))
	return int64(n) < length && c.pays(float64(n)/float64(length))
}

// rate is a moving average of a speed.
type rate struct{ bytes, seconds float64 }

// add counts bytes that took d. What is older than some 16 MiB fades.
func (r *rate) add(bytes int64, d time.Duration) {
	r.bytes += float64(bytes)
	r.seconds += d.Seconds()
	if r.bytes > 16<<20 {
		r.bytes, r.seconds = r.bytes/2, r.seconds/2
	}
}

// perSecond is 0 until something was added.
func (r *rate) perSecond() float64 {
	if r.seconds == 0 {
		return 0
	}
	return r.bytes / r.seconds
}
