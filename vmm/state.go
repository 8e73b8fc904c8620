package vmm

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"time"

	"github.com/google/uuid"
)

// StateSize is the size of a state device in bytes. It is fixed, because a device's size never
// changes and states differ in size. Unused bytes are holes. The largest state seen is 680 KB
// (QEMU, q35).
const StateSize = 16 << 20

// The state device is one header sector, then the VMM's own state. All integers are big endian.
//
//	offset  size  field
//	0       8     magic "DRFTSTAT"
//	8       4     format version, 2
//	12      4     status, see [Status]
//	16      16    package id (UUID)
//	32      8     length of the VMM state in bytes
//	40      32    SHA-256 of the VMM state
//	72      8     time of the last change, nanoseconds since 1970
//	80      16    id of the migration that the status is about (UUID), else zero
//	96      4     CRC-32 (Castagnoli) of bytes 0 to 95
//	4096    …     VMM state
//
// The header fits one disk sector, so a power cut leaves the old or the new one; Suspend writes it
// only after the state is durable.
const (
	stateMagic      = "DRFTSTAT"
	stateVersion    = 2
	stateHeaderSize = 100
	stateChecksum   = 96
	stateOffset     = 4096
)

// Status is the status of the VM whose state a state device holds.
type Status uint32

// The statuses of a state device.
const (
	Suspended  Status = 1 // memory and disks belong to the saved state: it can be resumed
	Running    Status = 2 // resumed and not suspended since: the saved state is stale
	PoweredOff Status = 3 // the guest has shut down: there is nothing to resume
	Arriving   Status = 4 // a migration to here is under way: the devices hold a part of a VM
	// a migration from here is at its end: the target may resume the VM at any moment. A state
	// saved meanwhile is of use there only
	Leaving Status = 5
	// the VM was handed over, and the target has not answered: the devices hold all of it
	InDoubt    Status = 6
	HandedOver Status = 7 // the VM runs at the target, which may still need what is here
	Moved      Status = 8 // the target has all of the VM
	// a migration to here is at its end: the VM may be resumed at any moment, unless its source
	// keeps it
	TakingOver Status = 9
	Copying    Status = 10 // a copy of the VM has saved the state; the VM goes on here
)

// statusNames are how a status is logged.
var statusNames = [...]string{"unknown", "suspended", "running", "powered off", "arriving", "leaving", "in doubt", "handed over", "moved", "taking over", "copying"}

// String is a status in words.
func (s Status) String() string {
	if int(s) >= len(statusNames) {
		s = 0
	}
	return statusNames[s]
}

// OfMigration tells whether a status says that the VM is, or may be, elsewhere.
func (s Status) OfMigration() bool { return s >= Arriving && s <= TakingOver }

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

	migration uuid.UUID
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
	copy(b[80:], h.migration[:])
	binary.BigEndian.PutUint32(b[stateChecksum:], crc32.Checksum(b[:stateChecksum], castagnoli))
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
	if v := binary.BigEndian.Uint32(b[8:]); v != stateVersion {
		return nil, fmt.Errorf("state format %d is not supported (this build reads %d); make the package again", v, stateVersion)
	}
	if got, want := crc32.Checksum(b[:stateChecksum], castagnoli), binary.BigEndian.Uint32(b[stateChecksum:]); got != want {
		return nil, fmt.Errorf("the header is damaged: checksum %08x instead of %08x", got, want)
	}
	h := &stateHeader{status: Status(binary.BigEndian.Uint32(b[12:])), length: int64(binary.BigEndian.Uint64(b[32:]))}
	copy(h.id[:], b[16:])
	copy(h.sum[:], b[40:])
	copy(h.migration[:], b[80:])
	h.changed = time.Unix(0, int64(binary.BigEndian.Uint64(b[72:])))
	if h.length < 0 || h.length > StateSize-stateOffset {
		return nil, fmt.Errorf("the header is damaged: length %d", h.length)
	}
	return h, nil
}

// ReadState returns the VMM state on dev after checking that it is whole, belongs to the package
// called id and can be resumed.
func ReadState(dev StateDevice, id string) ([]byte, error) {
	h, err := readStateHeader(dev)
	if err != nil {
		return nil, err
	}
	if err := h.resumable(); err != nil {
		return nil, err
	}
	return h.read(dev, id)
}

// CheckResumable refuses a state device whose VM cannot be resumed. It reads the header only.
func CheckResumable(dev StateDevice) error {
	h, err := readStateHeader(dev)
	if err != nil {
		return err
	}
	return h.resumable()
}

// CheckStart refuses a state device whose VM may be elsewhere, or is not wholly here. Otherwise it
// returns nil for why if the VM can be resumed. If not, the VM starts by booting from its disks, as
// a machine does after a power cut, and why is the reason.
func CheckStart(dev StateDevice) (why, err error) {
	h, err := readStateHeader(dev)
	if err != nil {
		return nil, err
	}
	at := h.changed.Format(time.RFC3339)
	switch {
	case h.status == Copying:
		return fmt.Errorf("it was being copied at %s: its process was killed, or the host failed", at), nil
	case h.migration != uuid.Nil: // one that has not reached its end; an operator settles what is in doubt
	case h.status == Running:
		return fmt.Errorf("it ran at %s, and was not suspended since: its process was killed, or the host failed", at), nil
	case h.status == PoweredOff:
		return fmt.Errorf("its guest powered itself off at %s", at), nil
	}
	return nil, h.resumable()
}

// resumable returns a [StatusError] unless the VM can be resumed.
func (h *stateHeader) resumable() error {
	if text := h.obstacle(); text != "" {
		return &StatusError{h.status, text}
	}
	return nil
}

// obstacle says why the VM cannot be resumed; "" if it can.
func (h *stateHeader) obstacle() string {
	at := h.changed.Format(time.RFC3339)
	switch h.status {
	case Suspended:
		return ""
	case Running, PoweredOff, Copying:
		if h.migration != uuid.Nil && h.status != Copying {
			return fmt.Sprintf("the VM was taken over from another host at %s, and this side ended before its source was known to have given it up; look there, and go on at one side with 'drafter peer settle --here'", at)
		}
		if h.status == PoweredOff {
			return fmt.Sprintf("the guest powered itself off at %s, so there is nothing to resume; boot its disk with drafter snapshotter", at)
		}
		return fmt.Sprintf("the VM was resumed, at %s or before, and never suspended, so its memory no longer fits its saved state; extract the package again, or make a new one from its disks ('drafter device export' takes them out of an instance, 'drafter snapshotter' boots them)", at)
	case Arriving:
		return fmt.Sprintf("a migration to here began at %s and did not get to its end, so this is a part of a VM; the VM is still at its source, migrate it again", at)
	case Leaving:
		return fmt.Sprintf("the VM was being handed over at %s when its peer was killed, so it may run at its target; look there, and note it with 'drafter peer settle --away'; only if it does not run there and never will, 'drafter peer settle --here': then its memory is lost, and its disks are as after a power cut", at)
	case TakingOver:
		return fmt.Sprintf("a migration to here was at its end at %s, and this side ended before it was certain that the VM ran here; go on at its source (if it does not by itself, with 'drafter peer settle --here' there), and give up what is here with 'drafter peer settle --away'", at)
	case InDoubt:
		return fmt.Sprintf("the VM was handed over at %s and the target has not answered, so it is in doubt where it runs; look there, and then settle it with 'drafter peer settle --here', or --away", at)
	case HandedOver:
		return fmt.Sprintf("the VM was handed over at %s, and it is not known whether its target has all of it; look there, and if it is lost, go on from that moment with 'drafter peer settle --here'; if it runs there, note it with 'drafter peer settle --away'", at)
	case Moved:
		return fmt.Sprintf("the VM moved away at %s; migrate it back, or remove this instance's files", at)
	}
	return fmt.Sprintf("status %d is unknown", h.status)
}

// ReadMigratedState is [ReadState] at the target of a migration.
func ReadMigratedState(dev StateDevice, id string, migration uuid.UUID) ([]byte, error) {
	return new(StateReader).Rest(dev, id, migration)
}

// read reads the state that belongs to the header.
func (h *stateHeader) read(dev StateDevice, id string) ([]byte, error) {
	return new(StateReader).rest(dev, id, h)
}

// StateReader reads a VMM state that is still being made. The zero value is at its beginning.
type StateReader struct {
	length int64
	sum    hash.Hash // nil at the beginning
}

// Next returns what follows of the state, up to byte end of its device. What it returns is verified
// by Rest.
func (r *StateReader) Next(dev StateDevice, end int64) ([]byte, error) {
	n := end - stateOffset - r.length
	if n < 0 || end > StateSize {
		return nil, fmt.Errorf("read state: there is no part of it before byte %d", end)
	}
	if r.sum == nil {
		r.sum = sha256.New()
	}
	part := make([]byte, n)
	if _, err := dev.ReadAt(part, stateOffset+r.length); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("the state device is truncated: %d bytes of state were expected", end-stateOffset)
		}
		return nil, fmt.Errorf("read state: %w", err)
	}
	r.length += n
	_, _ = r.sum.Write(part) // never fails
	return part, nil
}

// Rest returns what follows of a migration's state up to its end, after checking all of the state.
func (r *StateReader) Rest(dev StateDevice, id string, migration uuid.UUID) ([]byte, error) {
	h, err := readStateHeader(dev)
	if err != nil {
		return nil, err
	}
	if h.status != Leaving && h.status != Copying || h.migration != migration {
		return nil, fmt.Errorf("it does not hold the state of migration %s", migration)
	}
	return r.rest(dev, id, h)
}

func (r *StateReader) rest(dev StateDevice, id string, h *stateHeader) ([]byte, error) {
	if h.id.String() != id {
		return nil, fmt.Errorf("state and config belong to different packages (%s, %s); use the files of one snapshot", h.id, id)
	}
	rest, err := r.Next(dev, stateOffset+h.length)
	if err != nil {
		return nil, err
	}
	if [sha256.Size]byte(r.sum.Sum(nil)) != h.sum {
		return nil, errors.New("the saved state is damaged: its checksum does not match")
	}
	return rest, nil
}

// StateStatus returns the VM's status, its migration, and when it was noted.
func StateStatus(dev StateDevice) (status Status, migration uuid.UUID, changed time.Time, err error) {
	h, err := readStateHeader(dev)
	if err != nil {
		return 0, migration, changed, err
	}
	return h.status, h.migration, h.changed, nil
}

// WriteState stores a VMM state as resumable. When it returns nil the state is durable; when it
// fails the device is not resumable. Memory and disks must be durable before it is called.
func WriteState(dev StateDevice, id string, state []byte) error {
	h, err := putState(dev, id, state)
	if err != nil {
		return err
	}
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	h.status = Suspended
	return syncStateHeader(dev, h)
}

// WriteMigratedState stores a VMM state for the target of a migration; see [StateWriter.End].
func WriteMigratedState(dev StateDevice, id string, state []byte, migration uuid.UUID, status Status) error {
	w := NewStateWriter(dev)
	if _, err := w.Write(state); err != nil {
		return err
	}
	return w.End(id, migration, status)
}

// putState writes a state and returns the header that belongs to it.
func putState(dev StateDevice, id string, state []byte) (*stateHeader, error) {
	w := NewStateWriter(dev)
	if _, err := w.Write(state); err != nil {
		return nil, err
	}
	return w.header(id)
}

// StateWriter writes a VMM state to its device as it is made. Nothing is made durable.
type StateWriter struct {
	dev    StateDevice
	length int64
	sum    hash.Hash
}

// NewStateWriter returns a writer to a device, which has its previous header until End.
func NewStateWriter(dev StateDevice) *StateWriter { return &StateWriter{dev: dev, sum: sha256.New()} }

// Write implements io.Writer. It refuses more than a state device holds.
func (w *StateWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > StateSize-stateOffset-w.length {
		return 0, fmt.Errorf("the VMM's state is longer than the %d bytes of a state device", StateSize-stateOffset)
	}
	if _, err := w.dev.WriteAt(p, stateOffset+w.length); err != nil {
		return 0, fmt.Errorf("write state: %w", err)
	}
	w.length += int64(len(p))
	_, _ = w.sum.Write(p) // never fails
	return len(p), nil
}

// Final is up to which byte the device has its final content, but for its header. That is a
// multiple of 4,096, and never all of a state.
func (w *StateWriter) Final() int64 { return (stateOffset + w.length - 1) / stateOffset * stateOffset }

// End completes a state for the target of a migration, which alone can resume it. Its status is
// Leaving, or Copying if the VM stays.
func (w *StateWriter) End(id string, migration uuid.UUID, status Status) error {
	h, err := w.header(id)
	if err != nil {
		return err
	}
	h.status, h.migration = status, migration
	return writeStateHeader(w.dev, h)
}

// header returns the header that belongs to what was written.
func (w *StateWriter) header(id string) (*stateHeader, error) {
	u, err := uuid.Parse(id)
	if err != nil {
		return nil, fmt.Errorf("package id %q: %w", id, err)
	}
	return &stateHeader{id: u, length: w.length, sum: [sha256.Size]byte(w.sum.Sum(nil)), changed: time.Now()}, nil
}

// MarkArriving makes dev, whatever it held, the state device of a VM that is arriving. That is
// durable when it returns.
func MarkArriving(dev StateDevice, migration uuid.UUID) error {
	return syncStateHeader(dev, &stateHeader{status: Arriving, migration: migration, changed: time.Now()})
}

// MarkTakingOver notes on the state device of an arriving VM that the VM may run here from now on.
// That is durable once dev is synced.
func MarkTakingOver(dev StateDevice, migration uuid.UUID) error {
	return writeStateHeader(dev, &stateHeader{status: TakingOver, migration: migration, changed: time.Now()})
}

// MarkLeaving notes durably, on the state device of a running VM, that it may run at the target of
// a migration from now on.
func MarkLeaving(dev StateDevice, migration uuid.UUID) error {
	h, err := readStateHeader(dev)
	if err != nil {
		return err
	}
	h.status, h.migration, h.changed = Leaving, migration, time.Now()
	return syncStateHeader(dev, h)
}

// MarkState changes the status of a state device, durably. It is called with Running before a vCPU
// runs, and with PoweredOff once none ever will. The migration that the status is about stays
// noted, unless the VM runs here.
func MarkState(dev StateDevice, status Status) error {
	if err := NoteState(dev, status); err != nil {
		return err
	}
	return syncState(dev)
}

// NoteState is [MarkState] that does not wait until the status is durable. Until then the device
// may have its previous status.
func NoteState(dev StateDevice, status Status) error {
	h, err := readStateHeader(dev)
	if err != nil {
		return err
	}
	h.status, h.changed = status, time.Now()
	if status == Running {
		h.migration = uuid.Nil
	}
	return writeStateHeader(dev, h)
}

// NoteTakenOver notes at the target of a migration that the VM runs there. Until [NoteArrived] that
// holds only if its source has given it up. It is durable once dev is synced.
func NoteTakenOver(dev StateDevice) error {
	h, err := readStateHeader(dev)
	if err != nil {
		return err
	}
	h.status, h.changed = Running, time.Now()
	return writeStateHeader(dev, h)
}

// NoteArrived notes that the VM is here and nowhere else, whatever else the device says. It is
// durable once dev is synced.
func NoteArrived(dev StateDevice) error {
	h, err := readStateHeader(dev)
	if err != nil {
		return err
	}
	h.migration = uuid.Nil
	return writeStateHeader(dev, h)
}

// SettleState decides durably about a VM that an unfinished migration has left, and whose owner has
// ended: it goes on from dev's devices if here, or it is elsewhere. incomplete says that a device
// never wholly arrived here. SettleState fails if there is nothing to decide, or if
// the VM cannot go on here.
func SettleState(dev StateDevice, here, incomplete bool) error {
	status, migration, _, err := StateStatus(dev)
	if err != nil {
		return err
	}
	arrived := status == Arriving || status == TakingOver || status == Running && incomplete
	switch {
	case !incomplete && migration != uuid.Nil && (status == Running || status == PoweredOff): // taken over, and all of it is here
		if here {
			return MarkState(dev, Running)
		}
		return MarkState(dev, Moved)
	case !arrived && status != InDoubt && status != HandedOver && status != Leaving:
		return fmt.Errorf("nothing is in doubt: %s", settled(status))
	case !here:
		return MarkState(dev, Moved)
	case status == Arriving:
		return errors.New("not all of the VM came here, and it never left its source; go on there, and note it here with --away")
	case arrived:
		return errors.New("not all of the VM came here, so it cannot go on here; settle it at its source with 'drafter peer settle --here', and here with --away")
	case status == Leaving:
		// the state, or the memory that fits it, may not have reached the disk
		return MarkState(dev, Running)
	}
	return MarkState(dev, Suspended)
}

// settled says where a VM is about which there is nothing to settle.
func settled(status Status) string {
	switch status {
	case Moved:
		return "the VM has moved away; go on where it went"
	case Suspended:
		return "the VM is here, and suspended; start it"
	}
	return "the VM is here, and boots from its disks when it is started"
}

func syncStateHeader(dev StateDevice, h *stateHeader) error {
	if err := writeStateHeader(dev, h); err != nil {
		return err
	}
	return syncState(dev)
}

func syncState(dev StateDevice) error {
	if err := dev.Sync(); err != nil {
		return fmt.Errorf("sync state header: %w", err)
	}
	return nil
}

func writeStateHeader(dev StateDevice, h *stateHeader) error {
	if _, err := dev.WriteAt(h.encode(), 0); err != nil {
		return fmt.Errorf("write state header: %w", err)
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
