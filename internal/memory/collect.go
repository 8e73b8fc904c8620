package memory

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"drafter/internal/block"
)

// Collect tells the device of every page that was written until now. The process goes on meanwhile;
// its later writes are for the next Collect. After an error nothing that was written is forgotten.
func (h *Handler) Collect(ctx context.Context) error {
	h.collecting.Lock()
	defer h.collecting.Unlock()
	if h.closing.Load() {
		return errors.New("collect memory: it is not served any more")
	}
	if h.scan != nil {
		for _, r := range h.regions {
			err := h.scan.written(r.Base, r.Base+r.Size, func(start, end uint64) {
				h.device.Written(int64(start-r.Base+r.Offset), int64(end-start))
			})
			if err != nil {
				return fmt.Errorf("collect memory: %w", err)
			}
		}
		return nil
	}
	for p := h.dirty.Next(0); p < h.dirty.Len(); p = h.dirty.Next(p) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		limit := min(h.dirty.Len(), max(p+1, (p*h.unit/stripeSize+1)*stripeSize/h.unit))
		_, q := h.dirty.Run(p, limit)
		next, err := h.collect(p, q)
		if err != nil {
			return fmt.Errorf("collect memory: %w", err)
		}
		p = next
	}
	return nil
}

// collect does so for the first of some pages of one stripe, and returns the page behind those.
func (h *Handler) collect(p, q int64) (next int64, err error) {
	off := p * h.unit
	address, follow, ok := h.address(off)
	if !ok {
		return p, fmt.Errorf("page at %d is in no region", off)
	}
	q = min(q, p+follow/h.unit)
	s := h.device.stripe(off)
	s.Lock()
	// A page that nobody has removed is there, whoever has filled it: another process may have, too.
	filled := func(page int64) bool { return h.present.Has(page) || !h.removed.Has(page) }
	there := filled(p)
	end := p + 1 // pages that are all there, or all removed
	for end < q && filled(end) == there {
		end++
	}
	h.dirty.ClearRange(p, end)
	length := (end - p) * h.unit
	if there {
		h.removed.ClearRange(p, end)
		for err = unix.EAGAIN; errors.Is(err, unix.EAGAIN); {
			err = h.fd.writeProtect(address, uint64(length), true)
			if errors.Is(err, unix.EAGAIN) { // until a removal is read, which needs this lock
				s.Unlock()
				time.Sleep(10 * time.Microsecond)
				s.Lock()
			}
		}
	}
	s.Unlock()
	switch {
	case err != nil:
		err = fmt.Errorf("protect %d bytes at %d: %w", length, off, err)
	case there:
		h.device.Written(off, length)
	default:
		if err = block.Trim(h.device.top, off, length); err != nil {
			err = fmt.Errorf("give back %d bytes at %d: %w", length, off, err)
		} else {
			h.settleRemoved(off, length)
		}
	}
	if err != nil {
		h.dirty.SetRange(p, end)
	}
	return end, err
}

// settleRemoved notes that the device has zeros for pages that were removed.
func (h *Handler) settleRemoved(off, length int64) {
	s := h.device.stripe(off)
	s.Lock()
	defer s.Unlock()
	h.removed.ClearRange(off/h.unit, (off+length)/h.unit)
}

// read reads pages out of the process. Those that it has given back are zeros.
func (h *Handler) read(p []byte, off int64) error {
	for len(p) > 0 {
		page := off / h.unit
		there, next := h.present.Run(page, (off+int64(len(p))+h.unit-1)/h.unit)
		n := min(next*h.unit-off, int64(len(p)))
		address, follow, ok := h.address(off)
		if !ok {
			return fmt.Errorf("page at %d is in no region", off)
		}
		n = min(n, follow)
		if !there {
			clear(p[:n])
		} else if err := h.readProcess(p[:n], off, address); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (h *Handler) readProcess(p []byte, off int64, address uint64) error {
	for len(p) > 0 {
		local := []unix.Iovec{{Base: &p[0], Len: uint64(len(p))}}
		remote := []unix.RemoteIovec{{Base: uintptr(address), Len: len(p)}}
		n, err := unix.ProcessVMReadv(h.pid, local, remote, 0)
		if err != nil {
			return fmt.Errorf("read %d bytes at %d out of process %d: %w", len(p), off, h.pid, err)
		}
		if n == 0 {
			return fmt.Errorf("read %d bytes at %d out of process %d: nothing is there", len(p), off, h.pid)
		}
		p, off, address = p[n:], off+int64(n), address+uint64(n)
	}
	return nil
}

// place fills missing pages of one region, which nobody else fills at the same time, with p. Threads
// that wait for them go on.
func (h *Handler) place(p []byte, off int64) error {
	var pinned runtime.Pinner
	pinned.Pin(&p[0])
	defer pinned.Unpin()
	var mode uint64
	if h.tracked() {
		mode = copyWP
	}
	for done := int64(0); done < int64(len(p)); {
		address, follow, ok := h.address(off + done)
		if !ok {
			return fmt.Errorf("page at %d is in no region", off+done)
		}
		n, err := h.fd.copy(address, unsafe.Pointer(&p[done]), uint64(min(follow, int64(len(p))-done)), mode)
		done += n
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("fill page at %d: %w", off+done, err)
		}
	}
	return nil
}

// copyIn writes to the process what is stored elsewhere than in the file that it maps. The process
// does not use its memory yet.
func (h *Handler) copyIn() error {
	if h.device.differ == nil {
		return nil
	}
	pages := h.device.differ()
	b := make([]byte, storeSize)
	for first := pages.Next(0); first < pages.Len(); first = pages.Next(first) {
		_, end := pages.Run(first, min(pages.Len(), first+storeSize/block.PageSize))
		off := first * block.PageSize
		p := b[:(end-first)*block.PageSize]
		if _, err := h.device.stored.ReadAt(p, off); err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
		for len(p) > 0 {
			address, follow, ok := h.address(off)
			if !ok {
				return fmt.Errorf("page at %d is in no region", off)
			}
			part := p[:min(follow, int64(len(p)))]
			local := []unix.Iovec{{Base: &part[0], Len: uint64(len(part))}}
			n, err := unix.ProcessVMWritev(h.pid, local, []unix.RemoteIovec{{Base: uintptr(address), Len: len(part)}}, 0)
			if err != nil {
				return fmt.Errorf("write %d bytes at %d to process %d: %w", len(part), off, h.pid, err)
			}
			p, off = p[n:], off+int64(n)
		}
		first = end
	}
	// These pages are stored.
	for _, r := range h.regions {
		if err := h.scan.written(r.Base, r.Base+r.Size, func(uint64, uint64) {}); err != nil {
			return err
		}
	}
	return nil
}
