package migration

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// What can be compressed is found between what cannot, but only where sending it takes longer.
func TestCompressionWorth(t *testing.T) {
	random := make([]byte, 256<<10)
	source := rand.NewChaCha8([32]byte{1})
	_, _ = source.Read(random)
	text := bytes.Repeat([]byte("what a guest's kernel holds "), 10_000)
	for _, link := range []struct {
		perSecond float64
		worth     bool
	}{{100e6, true}, {10e9, false}} {
		c, err := newCompression()
		if err != nil {
			t.Fatal(err)
		}
		c.link, c.speed = rate{link.perSecond, 1}, rate{500e6, 1}
		for i := range tryEvery - 1 {
			data, worth := random, false
			if i%8 == 7 {
				data, worth = text[:4096*(1+i%3)], link.worth
			}
			if got := c.worth(data); got != worth {
				t.Errorf("extent %d at %.0g bytes/s: %v instead of %v", i, link.perSecond, got, worth)
			}
		}
		if !c.worth(random) {
			t.Errorf("at %.0g bytes/s none is tried of %d", link.perSecond, tryEvery)
		}
		if err := c.encoder.Close(); err != nil {
			t.Error(err)
		}
	}
}
