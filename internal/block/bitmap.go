package block

import (
	"iter"
	"math/bits"
	"sync/atomic"
)

// Bitmap is a set of block numbers. It is safe for concurrent use. A set of 64 KiB blocks takes 2
// KiB per GiB of device, and is taken and cleared by an atomic swap per 64 blocks.
type Bitmap struct {
	words  []atomic.Uint64
	length int64
}

// NewBitmap returns an empty set of numbers below length.
func NewBitmap(length int64) *Bitmap {
	return &Bitmap{words: make([]atomic.Uint64, (length+63)/64), length: length}
}

// Len is the bound of the numbers: all are below it.
func (b *Bitmap) Len() int64 { return b.length }

// Has tells whether i is in the set.
func (b *Bitmap) Has(i int64) bool { return b.words[i/64].Load()&(1<<(i%64)) != 0 }

// Set adds i. It returns whether i is new.
func (b *Bitmap) Set(i int64) bool {
	bit := uint64(1) << (i % 64)
	// The load spares most writers of hot blocks the contention.
	return b.words[i/64].Load()&bit == 0 && b.words[i/64].Or(bit)&bit == 0
}

// SetRange adds the numbers from from to end-1.
func (b *Bitmap) SetRange(from, end int64) {
	for i := from; i < end; {
		n := min(64-i%64, end-i)
		mask := ^uint64(0) >> (64 - n) << (i % 64)
		if b.words[i/64].Load()&mask != mask {
			b.words[i/64].Or(mask)
		}
		i += n
	}
}

// Clear removes i and returns whether it was there.
func (b *Bitmap) Clear(i int64) bool {
	bit := uint64(1) << (i % 64)
	return b.words[i/64].And(^bit)&bit != 0
}

// ClearRange removes the numbers from from to end-1, and returns how many of them were there.
func (b *Bitmap) ClearRange(from, end int64) (cleared int64) {
	for i := from; i < end; {
		n := min(64-i%64, end-i)
		mask := ^uint64(0) >> (64 - n) << (i % 64)
		if b.words[i/64].Load()&mask != 0 {
			cleared += int64(bits.OnesCount64(b.words[i/64].And(^mask) & mask))
		}
		i += n
	}
	return cleared
}

// Next returns the first number of the set that is at least from, or Len if there is none.
func (b *Bitmap) Next(from int64) int64 {
	if from >= b.length || b.Has(from) {
		return min(from, b.length)
	}
	_, next := b.Run(from, b.length)
	return next
}

// Run returns whether from is in the set, and the first number after from, at most end, for which
// the answer differs.
func (b *Bitmap) Run(from, end int64) (has bool, next int64) {
	has = b.Has(from)
	for i := from + 1; i < end; { // from itself may change meanwhile, and a run is never empty
		word := b.words[i/64].Load() >> (i % 64)
		if has {
			word = ^word
		}
		left := 64 - i%64
		if n := int64(bits.TrailingZeros64(word)); n < left {
			return has, min(i+n, end)
		}
		i += left
	}
	return has, end
}

// Count is the size of the set.
func (b *Bitmap) Count() int64 {
	var n int
	for i := range b.words {
		n += bits.OnesCount64(b.words[i].Load())
	}
	return int64(n)
}

// All yields the set in ascending order.
func (b *Bitmap) All() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for w := range b.words {
			for word := b.words[w].Load(); word != 0; word &= word - 1 {
				if !yield(int64(w)*64 + int64(bits.TrailingZeros64(word))) {
					return
				}
			}
		}
	}
}

// Take moves the set into a new one. Each number added meanwhile is in one of the two.
func (b *Bitmap) Take() *Bitmap {
	taken := NewBitmap(b.length)
	for i := range b.words {
		if b.words[i].Load() != 0 {
			taken.words[i].Store(b.words[i].Swap(0))
		}
	}
	return taken
}

// Clone returns a copy.
func (b *Bitmap) Clone() *Bitmap {
	c := NewBitmap(b.length)
	c.Add(b)
	return c
}

// Add adds all of other, which has the same length.
func (b *Bitmap) Add(other *Bitmap) {
	for i := range other.words {
		if w := other.words[i].Load(); w != 0 {
			b.words[i].Or(w)
		}
	}
}
