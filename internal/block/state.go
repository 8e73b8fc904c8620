package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/google/uuid"
)

// The state file of an overlay, version 1. All numbers are little-endian; checksums are CRC-32C
// over the page with the checksum as zero.
//
//	page 0        header: magic "DrafterO", version uint32, block size uint32, device size uint64, content id of the base [32]byte,
//	              id of the overlay [16]byte, checksum uint32, content id [32]byte of the base that the device was made from, where that is not
//	              the one beneath, else zero; the rest is zero
//	page 1+2i     bitmap page i, copy 0
//	page 2+2i     bitmap page i, copy 1
//
//	bitmap page   sequence number uint64, page index uint32, checksum uint32, id of the overlay [16]byte, bits [4064]byte: bit b of byte a stands
//	              for block 32512×i + 8×a + b
//
// A commit of a page overwrites the copy that is not the latest, so that a torn write leaves the
// latest whole. Bits are only ever added, which makes it harmless that the pages of one commit can
// reach the disk one by one.
//
// The overlay file holds the device's blocks at their own offsets and, behind them on the next
// multiple of 4096, a trailer page: magic "DrafterD", id of the overlay [16]byte, checksum uint32.
const (
	stateMagic   = "DrafterO"
	overlayMagic = "DrafterD"
	stateVersion = 1

	pageSize       = 4096
	pageHeaderSize = 32
	blocksPerPage  = (pageSize - pageHeaderSize) * 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// stateHeader is what an overlay is bound to.
type stateHeader struct {
	blockSize int64
	size      int64
	base      ID
	id        uuid.UUID
	origin    ID
}

const (
	headerChecksum  = 72
	pageChecksum    = 12
	trailerChecksum = 24
)

func sealed(page []byte, at int) []byte {
	binary.LittleEndian.PutUint32(page[at:], 0)
	binary.LittleEndian.PutUint32(page[at:], crc32.Checksum(page, castagnoli))
	return page
}

func intact(page []byte, at int) bool {
	sum := binary.LittleEndian.Uint32(page[at:])
	crc := crc32.Update(0, castagnoli, page[:at])
	crc = crc32.Update(crc, castagnoli, zeros[:4])
	return crc32.Update(crc, castagnoli, page[at+4:]) == sum
}

func (h *stateHeader) encode() []byte {
	p := make([]byte, pageSize)
	copy(p, stateMagic)
	binary.LittleEndian.PutUint32(p[8:], stateVersion)
	binary.LittleEndian.PutUint32(p[12:], uint32(h.blockSize))
	binary.LittleEndian.PutUint64(p[16:], uint64(h.size))
	copy(p[24:], h.base[:])
	copy(p[56:], h.id[:])
	copy(p[76:], h.origin[:])
	return sealed(p, headerChecksum)
}

// blocks is the number of blocks of the device.
func (h *stateHeader) blocks() int64 { return (h.size + h.blockSize - 1) / h.blockSize }

// pages is the number of bitmap pages.
func (h *stateHeader) pages() int64 { return (h.blocks() + blocksPerPage - 1) / blocksPerPage }

func (h *stateHeader) fileSize() int64 { return pageSize * (1 + 2*h.pages()) }

func decodeHeader(p []byte) (*stateHeader, error) {
	if !bytes.HasPrefix(p, []byte(stateMagic)) {
		return nil, errors.New("it is no state file: its magic number is missing")
	}
	if !intact(p, headerChecksum) {
		return nil, errors.New("its header is damaged: the checksum does not match")
	}
	if v := binary.LittleEndian.Uint32(p[8:]); v != stateVersion {
		return nil, fmt.Errorf("it has version %d, this program knows version %d", v, stateVersion)
	}
	h := &stateHeader{blockSize: int64(binary.LittleEndian.Uint32(p[12:])), size: int64(binary.LittleEndian.Uint64(p[16:]))}
	copy(h.base[:], p[24:])
	copy(h.id[:], p[56:])
	copy(h.origin[:], p[76:])
	if err := CheckBlockSize(h.blockSize); err != nil {
		return nil, err
	}
	if h.size < 0 || h.size > 1<<56 {
		return nil, fmt.Errorf("its device size %d is not valid", h.size)
	}
	return h, nil
}

// overlayTrailer is the page behind the data of the overlay file.
func overlayTrailer(id uuid.UUID) []byte {
	p := make([]byte, pageSize)
	copy(p, overlayMagic)
	copy(p[8:], id[:])
	return sealed(p, trailerChecksum)
}

func trailerOffset(size int64) int64 { return (size + pageSize - 1) / pageSize * pageSize }

// storage is where a state file is kept.
type storage interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Size() int64
	Sync() error
	Close() error
}

// stateFile is an open state file. Set bits in present, then call changed; take and commit are
// called by one goroutine at a time.
type stateFile struct {
	f       storage
	header  *stateHeader
	present *Bitmap
	dirty   *Bitmap  // bitmap pages with bits that are not committed
	latest  []uint64 // sequence number of each page's latest copy; its parity is the copy
	damaged []int64  // pages of which one copy is not intact: after a power cut, or the file rots
}

// initialState is the content of a new state file.
func initialState(h *stateHeader) []byte {
	b := slices.Grow(h.encode(), int(h.fileSize()-pageSize))
	for i := range h.pages() {
		// Both copies exist from the start: a copy that is not intact was torn, or is damaged.
		for sequence := range uint64(2) {
			b = append(b, encodePage(h, i, sequence, nil)...)
		}
	}
	return b
}

func encodePage(h *stateHeader, index int64, sequence uint64, present *Bitmap) []byte {
	p := make([]byte, pageSize)
	binary.LittleEndian.PutUint64(p, sequence)
	binary.LittleEndian.PutUint32(p[8:], uint32(index))
	copy(p[16:], h.id[:])
	if present != nil {
		first := index * blocksPerPage / 64
		for w := range int64(blocksPerPage / 64) {
			if first+w < int64(len(present.words)) {
				binary.LittleEndian.PutUint64(p[pageHeaderSize+8*w:], present.words[first+w].Load())
			}
		}
	}
	return sealed(p, pageChecksum)
}

// readState opens a state file and checks all of it.
func readState(f storage) (*stateFile, error) {
	page := make([]byte, pageSize)
	if f.Size() < pageSize {
		return nil, fmt.Errorf("it is truncated to %d bytes", f.Size())
	}
	if _, err := f.ReadAt(page, 0); err != nil {
		return nil, err
	}
	h, err := decodeHeader(page)
	if err != nil {
		return nil, err
	}
	if f.Size() != h.fileSize() {
		return nil, fmt.Errorf("it has %d bytes instead of %d", f.Size(), h.fileSize())
	}
	s := &stateFile{f: f, header: h}
	var words []uint64 // of the set; it grows only as intact pages are there
	copies := make([]byte, 2*pageSize)
	for i := range h.pages() {
		if _, err := f.ReadAt(copies, pageSize*(1+2*i)); err != nil {
			return nil, err
		}
		page, err := s.readPage(i, copies)
		if err != nil {
			return nil, err
		}
		for at := pageHeaderSize; at < pageSize; at += 8 {
			words = append(words, binary.LittleEndian.Uint64(page[at:]))
		}
	}
	s.present, s.dirty = NewBitmap(h.blocks()), NewBitmap(h.pages())
	for i := range s.present.words {
		s.present.words[i].Store(words[i])
	}
	if rest := h.blocks() % 64; rest > 0 {
		s.present.words[len(s.present.words)-1].And(1<<rest - 1)
	}
	return s, nil
}

// readPage returns the latest of a page's two copies that is intact.
func (s *stateFile) readPage(index int64, copies []byte) ([]byte, error) {
	var best []byte
	var latest uint64
	for parity := range uint64(2) {
		p := copies[parity*pageSize:][:pageSize]
		sequence := binary.LittleEndian.Uint64(p)
		ok := intact(p, pageChecksum) && sequence%2 == parity && int64(binary.LittleEndian.Uint32(p[8:])) == index && bytes.Equal(p[16:32], s.header.id[:])
		if !ok {
			s.damaged = append(s.damaged, index)
			continue
		}
		if best == nil || sequence > latest {
			best, latest = p, sequence
		}
	}
	if best == nil {
		return nil, fmt.Errorf("page %d of its bitmap is damaged in both copies", index)
	}
	s.latest = append(s.latest, latest)
	return best, nil
}

// changed notes that bits were set.
func (s *stateFile) changed(first, end int64) {
	s.dirty.SetRange(first/blocksPerPage, (end-1)/blocksPerPage+1)
}

// uncommitted is a bitmap page as it is to be committed.
type uncommitted struct {
	index int64
	page  []byte
}

// take encodes the changed pages as they are now.
func (s *stateFile) take() []uncommitted {
	var pages []uncommitted
	for i := range s.dirty.Take().All() {
		pages = append(pages, uncommitted{i, encodePage(s.header, i, s.latest[i]+1, s.present)})
	}
	return pages
}

// giveBack leaves pages that were taken, and not committed, to the next commit.
func (s *stateFile) giveBack(pages []uncommitted) {
	for _, p := range pages {
		s.dirty.Set(p.index)
	}
}

// commit makes pages durable.
func (s *stateFile) commit(pages []uncommitted) error {
	if len(pages) == 0 {
		return nil
	}
	for _, p := range pages {
		parity := int64(s.latest[p.index]+1) % 2
		if _, err := s.f.WriteAt(p.page, pageSize*(1+2*p.index+parity)); err != nil {
			return fmt.Errorf("write state file: %w", err)
		}
	}
	if err := s.f.Sync(); err != nil {
		return err
	}
	for _, p := range pages {
		s.latest[p.index]++
	}
	return nil
}

func (s *stateFile) close() error { return s.f.Close() }
