package vmm

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/google/uuid"
)

// StateSize is the size of a state device in bytes. It is fixed, as a device's size never changes while states do; unused bytes are
// holes. The largest state seen is 680 KB (QEMU, q35).
const StateSize = 16 << 20

// The state device is one header sector, then the VMM's own state. All integers are big endian.
//
//	offset  size  field
//	0       8     magic "DRFTSTAT"
//	8       4     format version, 1
//	12      4     status: 1 suspended, 2 running, 3 powered off
//	16      16    package id (UUID)
//	32      8     length of the VMM state in bytes
//	40      32    SHA-256 of the VMM state
//	72      8     time of the last change, nanoseconds since 1970
//	80      4     CRC-32 (Castagnoli) of bytes 0 to 79
//	4096    …     VMM state
//
// The header fits one disk sector, so a power cut leaves the old or the new one; Suspend writes it only after the state is durable.
const (
	stateMagic      = "DRFTSTAT"
	stateVersion    = 1
	stateHeaderSize = 84
	stateOffset     = 4096
)

// Status says what became of the VM whose state a state device holds.
type Status uint32

// The statuses of a state device.
const (
	Suspended  Status = 1 // memory and disks belong to the saved state: it can be resumed
	Running    Status = 2 // resumed and not suspended since: the saved state is stale
	PoweredOff Status = 3 // the guest shut down: there is nothing to resume
)

// StateDevice is what a state device is stored on. *os.File is one.
type StateDevice interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type stateHeader struct {
	status  Status
	id      uuid.UUID
	length  int64
	sum     [sha256.Size]byte
	changed time.Time
}

func (h *stateHeader) encode() []byte {
	b := make([]byte, stateHeaderSize)
	copy(b, stateMagic)
	binary.BigEndian.PutUint32(b[8:], stateVersion)
	binary.BigEndian.PutUint32(b[12:], uint32(h.status))
	copy(b[16:], h.id[:])
	binary.BigEndian.PutUint64(b[32:], uint64(h.length))
	copy(b[40:], h.sum[:])
	binary.BigEndian.PutUint64(b[72:], uint64(h.changed.UnixNano()))
	binary.BigEndian.PutUint32(b[80:], crc32.Checksum(b[:80], castagnoli))
	return b
}

func readStateHeader(r io.ReaderAt) (*stateHeader, error) {
	b := make([]byte, stateHeaderSize)
	if _, err := r.ReadAt(b, 0); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, errors.New("the state device is truncated: it has no header")
		}
		return nil, fmt.Errorf("read header: %w", err)
	}
	if string(b[:8]) != stateMagic {
		return nil, errors.New("this is no state device: its magic number is missing")
	}
	if got, want := crc32.Checksum(b[:80], castagnoli), binary.BigEndian.Uint32(b[80:]); got != want {
		return nil, fmt.Errorf("the header is damaged: checksum %08x instead of %08x", got, want)
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != stateVersion {
		return nil, fmt.Errorf("state format %d is not supported (this build reads %d)", v, stateVersion)
	}
	h := &stateHeader{status: Status(binary.BigEndian.Uint32(b[12:])), length: int64(binary.BigEndian.Uint64(b[32:]))}
	copy(h.id[:], b[16:])
	copy(h.sum[:], b[40:])
	h.changed = time.Unix(0, int64(binary.BigEndian.Uint64(b[72:])))
	if h.length < 0 || h.length > StateSize-stateOffset {
		return nil, fmt.Errorf("the header is damaged: length %d", h.length)
	}
	return h, nil
}

// ReadState returns the VMM state on dev after checking that it is whole, belongs to the package called id and can be resumed.
func ReadState(dev StateDevice, id string) ([]byte, error) {
	h, err := readStateHeader(dev)
	if err != nil {
		return nil, err
	}
	if h.id.String() != id {
		return nil, fmt.Errorf("state and config belong to different packages (%s, %s); use the files of one snapshot", h.id, id)
	}
	switch h.status {
	case Suspended:
	case Running:
		return nil, fmt.Errorf("the VM was resumed at %s and never suspended, so its memory no longer fits its saved state; extract the package again, or make a new one from its disks ('drafter device export' takes them out of an instance, 'drafter snapshotter' boots them)", h.changed.Format(time.RFC3339))
	case PoweredOff:
		return nil, fmt.Errorf("the guest powered itself off at %s, so there is nothing to resume; boot its disk with drafter snapshotter", h.changed.Format(time.RFC3339))
	default:
		return nil, fmt.Errorf("status %d is unknown", h.status)
	}
	state := make([]byte, h.length)
	if _, err := dev.ReadAt(state, stateOffset); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("the state device is truncated: %d bytes of state were expected", h.length)
		}
		return nil, fmt.Errorf("read state: %w", err)
	}
	if sha256.Sum256(state) != h.sum {
		return nil, errors.New("the saved state is damaged: its checksum does not match")
	}
	return state, nil
}

// WriteState stores a VMM state as resumable. When it returns nil the state is durable; when it fails the device is not resumable. Memory and
// disks must be durable before it is called.
func WriteState(dev StateDevice, id string, state []byte) error {
	if len(state) > StateSize-stateOffset {
		return fmt.Errorf("the VMM's state is %d bytes, the state device holds %d", len(state), StateSize-stateOffset)
	}
	if _, err := dev.WriteAt(state, stateOffset); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	u, err := uuid.Parse(id)
	if err != nil {
		return fmt.Errorf("package id %q: %w", id, err)
	}
	return writeStateHeader(dev, &stateHeader{status: Suspended, id: u, length: int64(len(state)), sum: sha256.Sum256(state), changed: time.Now()})
}

// MarkState changes the status of a state device, durably. It is called with Running before a vCPU runs and with PoweredOff once none
// ever will.
func MarkState(dev StateDevice, status Status) error {
	h, err := readStateHeader(dev)
	if err != nil {
		return err
	}
	h.status, h.changed = status, time.Now()
	return writeStateHeader(dev, h)
}

func writeStateHeader(dev StateDevice, h *stateHeader) error {
	if _, err := dev.WriteAt(h.encode(), 0); err != nil {
		return fmt.Errorf("write state header: %w", err)
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("sync state header: %w", err)
	}
	return nil
}

// StateBuffer collects what [Machine.Save] writes, refusing more than a state device holds.
type StateBuffer struct{ state []byte }

// Write implements io.Writer.
func (b *StateBuffer) Write(p []byte) (int, error) {
	if len(b.state)+len(p) > StateSize-stateOffset {
		return 0, fmt.Errorf("the VMM's state is longer than the %d bytes of a state device", StateSize-stateOffset)
	}
	b.state = append(b.state, p...)
	return len(p), nil
}

// Bytes returns what was written.
func (b *StateBuffer) Bytes() []byte { return b.state }
