package migrate

import (
	"fmt"
	"time"

	"github.com/klauspost/compress/zstd"

	"drafter/wire"
)

// compression decides by trying whether an extent is worth compressing: it is when compressing it and sending what is left takes less time than sending it.
// Use it from one goroutine.
type compression struct {
	encoder *zstd.Encoder
	link    rate    // bytes per second that the connection takes, with the bandwidth limit
	speed   rate    // bytes per second that are compressed
	ratio   float64 // of compressed to raw size, of late
	count   int
}

// tryEvery is how many extents are sent before compression is tried again.
const tryEvery = 64

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

// worth tells whether to compress the next extent, or at least to try.
func (c *compression) worth() bool {
	c.count++
	if c.link.perSecond() == 0 {
		return false // unknown so far
	}
	if c.speed.perSecond() == 0 || c.count%tryEvery == 0 {
		return true
	}
	return c.pays(c.ratio)
}

// pays compares what a byte costs.
func (c *compression) pays(ratio float64) bool {
	raw := 1 / c.link.perSecond()
	return 1/c.speed.perSecond()+ratio*raw < 0.95*raw
}

// try compresses and tells whether the result is to be sent.
func (c *compression) try(b *wire.ExtentBuffer, at, length int64) bool {
	start := time.Now()
	n := b.Compress(c.encoder, at, length)
	c.speed.add(length, time.Since(start))
	ratio := float64(n) / float64(length)
	if c.ratio == 0 {
		c.ratio = ratio
	}
	c.ratio = 0.7*c.ratio + 0.3*ratio
	return int64(n) < length && c.pays(ratio)
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
