package wire

import (
	"encoding/binary"

	"drafter/internal/block"
)

// AppendPages appends a set of pages in at most limit bytes. Each run is two uvarints: the number
// of pages between the last run and this one, and the number of pages in it. 0, 0 ends the set. If
// the set would take more, runs that are near each other are joined. The encoded set then holds
// more pages than the given one, which only costs transfer.
func AppendPages(b []byte, set *block.Bitmap, limit int) []byte {
	start := len(b)
	for gap := int64(0); ; gap = max(1, 2*gap) {
		b = appendRuns(b[:start], set, gap, start+limit)
		if len(b) <= start+limit {
			return b
		}
	}
}

// appendRuns joins runs that are at most gap pages apart. It stops beyond limit.
func appendRuns(b []byte, set *block.Bitmap, gap int64, limit int) []byte {
	last := int64(0)
	for first := set.Next(0); first < set.Len(); {
		_, end := set.Run(first, set.Len())
		next := set.Next(end)
		for next < set.Len() && next-end <= gap {
			_, end = set.Run(next, set.Len())
			next = set.Next(end)
		}
		b = binary.AppendUvarint(b, uint64(first-last))
		b = binary.AppendUvarint(b, uint64(end-first))
		if len(b) > limit {
			return b
		}
		first, last = next, end
	}
	return append(b, 0, 0)
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.take(len(r.b) + 1)
		return 0
	}
	r.b = r.b[n:]
	return v
}

// pages decodes a set for a device of so many pages.
func (r *reader) pages(total int64) *block.Bitmap {
	set := block.NewBitmap(total)
	for at := int64(0); r.err == nil; {
		gap, run := r.uvarint(), r.uvarint()
		if gap == 0 && run == 0 {
			break
		}
		if gap > uint64(total-at) || run == 0 || run > uint64(total-at)-gap {
			r.err = violation("a set of pages leaves its device")
			break
		}
		set.SetRange(at+int64(gap), at+int64(gap+run))
		at += int64(gap + run)
	}
	return set
}

// appendLists appends the number of sets and the sets.
func appendLists(b []byte, sets []*block.Bitmap) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(sets)))
	for i, s := range sets {
		b = AppendPages(b, s, max(64, (maxList-len(b))/(len(sets)-i)))
	}
	return b
}

func (r *reader) lists(sizes []int64) []*block.Bitmap {
	if n := int(r.uint16()); r.err == nil && n != len(sizes) {
		r.err = violation("sets of pages for %d devices, of which there are %d", n, len(sizes))
	}
	var sets []*block.Bitmap
	for _, size := range sizes {
		if r.err != nil {
			return nil
		}
		sets = append(sets, r.pages(pagesOf(size)))
	}
	return sets
}
