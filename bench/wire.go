package bench

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"

	"github.com/klauspost/compress/zstd"

	"drafter/internal/block"
	"drafter/internal/wire"
)

// wireSize is how much is encoded and decoded at a time, in bytes.
const wireSize = 1 << 30

// wire measures encoding and decoding of extents, of which one end sends and the other reads, over
// a pipe in memory.
func (b *bench) wire(ctx context.Context, rounds int) error {
	random := rand.NewChaCha8([32]byte{2})
	for range rounds {
		for _, kind := range []struct {
			name     string
			encoding wire.Encoding
			fill     func([]byte)
		}{
			{"raw", wire.Raw, func(p []byte) { _, _ = random.Read(p) }}, // which never fails
			{"zstd", wire.Zstd, func(p []byte) { // half of each page is zero
				_, _ = random.Read(p)
				for i := 0; i < len(p); i += block.PageSize {
					clear(p[i : i+block.PageSize/2])
				}
			}},
		} {
			var took, cpu float64
			var err error
			if took, cpu, err = timed(func() error { return encodeAndDecode(kind.encoding, kind.fill) }); err != nil {
				return err
			}
			b.add("wire_"+kind.name+"_mb_per_s", wireSize/1e6/took)
			b.add("wire_"+kind.name+"_cpu_s_per_gb", cpu/(wireSize/1e9))
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

func encodeAndDecode(encoding wire.Encoding, fill func([]byte)) (err error) {
	here, there := net.Pipe()
	from, to := wire.NewConn(here), wire.NewConn(there)
	defer func() { err = errors.Join(err, from.Close(), to.Close()) }()
	sizes := []int64{wireSize}
	sent := make(chan error, 1)
	go func() {
		sent <- func() error {
			encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
			if err != nil {
				return err
			}
			b := wire.NewExtentBuffer()
			fill(b.Data())
			for off := int64(0); off < wireSize && err == nil; off += wire.MaxExtent {
				if encoding == wire.Zstd {
					b.Compress(encoder, 0, wire.MaxExtent)
					err = from.SendCompressed(b, 0, off, wire.MaxExtent, wire.Soon)
					continue
				}
				err = from.SendExtent(b, 0, 0, encoding, off, wire.MaxExtent, wire.Soon)
			}
			return errors.Join(err, encoder.Close())
		}()
	}()
	d, err := wire.NewDecoder()
	if err != nil {
		return err
	}
	defer d.Close()
	for range wireSize / wire.MaxExtent {
		f, err := to.Read()
		if err != nil {
			return err
		}
		if _, err := d.Extent(f, sizes); err != nil {
			return err
		}
	}
	return <-sent
}
