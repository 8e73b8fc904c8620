package wire

import (
	"encoding/binary"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"

	"drafter/internal/block"
)

// Lane says what a connection is for.
type Lane uint8

// The lanes of a migration. Where there is but one connection, it carries both.
const (
	Main   Lane = 0 // all that is neither wanted nor an answer to it
	Demand Lane = 1 // wants of the target and their answers

	// Forward is the lane for operations of users at the source, on devices that have moved away.
	// The target opens it, and the source sends operations on it.
	Forward Lane = 2
)

const magic = "DRAFTER\x00"

// Hello opens every connection. Its payload: magic [8]byte, version uint16, lane uint8, flags uint8
// (1: it resumes, 2: a copy is wanted), migration id [16]byte, features uint64. A side that does
// not know a feature's bit can ignore it.
type Hello struct {
	Version   uint16
	Lane      Lane
	Resume    bool // the migration was handed over before, on another connection
	Copy      bool // a copy of the VM is wanted, which goes on at its source
	Migration uuid.UUID
	Features  uint64
}

// FeaturePackage is a feature of a manifest: there is no VM, and nothing is handed over. The other
// side may ask for any pages, any number of times. The devices' [Contents] follow the manifest.
const FeaturePackage uint64 = 1

// FeatureForward is a feature of a manifest: the devices have users at the source, who go on there
// after the handoff. The target serves them; see [Forward].
const FeatureForward uint64 = 2

// FeatureSignature is a feature of a hello: the target takes the package's signature. In the
// manifest that answers it, it says that the signature follows.
const FeatureSignature uint64 = 4

// FeatureForce is a feature of a hello: the target takes the VM even if its guest does not get
// ready to be paused.
const FeatureForce uint64 = 8

// FeatureContents is a feature of a hello: the target sends the contents of a base that it holds
// and the source lacks; see [Device].
const FeatureContents uint64 = 16

// FeatureFile is a feature of a hello: the target takes the VM's memory as an open file, which comes
// with the manifest; see [Device].
const FeatureFile uint64 = 32

// FeatureLanding is a feature of a manifest, which has a departure: the source takes a landing with
// the [Accept].
const FeatureLanding uint64 = 64

// Kind is what an [Operation] does.
type Kind uint8

// The kinds.
const (
	Read  Kind = 1
	Write Kind = 2
	Trim  Kind = 3
	Sync  Kind = 4
)

// Operation is an operation on a device. Its payload: id uint64, kind uint8, offset uint64, length
// uint32, the data of a write; the device is in the header. It may come twice, if the connection
// was lost before its result came. Doing it twice has the same effect as once.
type Operation struct {
	Device int
	ID     uint64
	Kind   Kind
	Off    int64
	Length int64  // at most MaxExtent, but for trims
	Data   []byte // valid until the next Read
}

// Result is the result of an operation; results come in any order. Its payload: id uint64, failed
// uint8, then the data of a read or, if it failed, the reason.
type Result struct {
	ID     uint64
	Failed bool
	Data   []byte // valid until the next Read
}

// Manifest says what there is to migrate. Its payload: features uint64, config and processor as
// byte strings, generation [16]byte, number of devices uint16, then for each: name as byte string,
// size uint64, block size uint32, flags uint8 (1: it needs the base, 2: the source lacks it, 4: it comes
// as an open file),
// content ids of the base and of the backup [32]byte each, zero for none. With [FeatureSignature],
// the signature follows as a byte string, with [FeatureLanding] the departure. A byte string is its
// length as uint32 and the bytes.
type Manifest struct {
	Features  uint64
	Config    []byte // content of the config device (JSON)
	Processor []byte // of the source's host (JSON); empty when it does not matter
	// Generation is the VM's generation ID, which it keeps when it moves; zero when it keeps none.
	Generation uuid.UUID
	Devices    []Device
	Signature  []byte // of the package, with FeatureSignature
	// how the VM's connections can come from the source, as the network knows it, in JSON; empty if
	// only from its host. With FeatureLanding
	Departure []byte
}

// Device is one device of a manifest.
type Device struct {
	Name      string
	Size      int64 // bytes
	BlockSize int64 // bytes
	NeedsBase bool  // the target must have the base
	// the source does not have the base: a target that has it sends its [Contents] before it
	// accepts. With [FeatureContents]
	Absent bool
	// The device itself comes with the manifest, as an open file. With [FeatureFile]
	Open   bool
	Base   block.ID
	Backup block.ID // what a backup that the target may reach held of it
}

// Sizes are those of the devices, in bytes.
func (m *Manifest) Sizes() []int64 {
	var sizes []int64
	for _, d := range m.Devices {
		sizes = append(sizes, d.Size)
	}
	return sizes
}

// maxName bounds the name of a device, in bytes.
const maxName = 64

// Contents are content ids of a device's blocks (see [block.ContentBlockSize]). Its payload: first
// block uint64, number of blocks uint32, 32 bytes for each; the device is in the header.
type Contents struct {
	Device int
	First  int64
	Blocks []block.ID // at most MaxContents
}

// Held says what of a device the target has.
type Held uint8

// What a target can have of a device.
const (
	HoldsNothing Held = 0 // it reads as zeros
	HoldsBase    Held = 1 // the base that the manifest names
	Unwanted     Held = 2 // the device is not to be sent
	// the backup that the manifest names, or it wants what it cannot get of it before it is ready
	HoldsBackup Held = 3

	// TakesFile is added to one of these: it takes the device itself, which came as an open file.
	TakesFile Held = 0x80
)

// Accept says that the target can take the VM. Its payload: one byte per device of the manifest,
// then the landing.
type Accept struct {
	Held []Held
	// where the VM's connections can go on, if they can, as the network knows it, in JSON. With
	// [FeatureLanding]
	Landing []byte
}

// Want asks for pages that somebody waits for. Its payload: first page uint64, number of pages
// uint32; the device is in the header.
type Want struct {
	Device      int
	First, Ends int64 // pages; Ends is not part
}

// Cycle announces a cycle. Its payload: number uint32, bytes to send uint64.
type Cycle struct {
	Number int
	Bytes  int64
}

// State says, while the VM is being saved, that the target has all of it but what the save still
// makes. Its payload: up to which byte the device with the state has its final content, uint64.
type State struct{ Final int64 }

// Handed says which pages of the device that came as a file have their content there, and nowhere
// else at the target. A later extent takes its pages out of this set. Its payload: the set, see
// [AppendPages]; the device is in the header.
type Handed struct {
	Device int
	Pages  *block.Bitmap
}

// MaxHanded is the number of pages from the first to the last of one [Handed]: their set is exact.
const MaxHanded = 4 << 20

// Authority hands the VM over. Its payload: how long it has been paused, int64 in nanoseconds;
// number of devices uint16; then the set of pages of each whose final content has not been sent,
// see [AppendPages].
type Authority struct {
	Paused  time.Duration
	Missing []*block.Bitmap
}

// Snapshot ends a copy: everything has been sent as it was in one moment. Its payload: how long the
// VM was paused for it, int64 in nanoseconds.
type Snapshot struct{ Paused time.Duration }

// Ack answers an authority. Its payload: accepted uint8, reason.
type Ack struct {
	Accepted bool   // the VM runs at the target; else it never will
	Reason   string // why not
}

// Outcome is what a target has decided about a VM after an authority may have been sent.
type Outcome uint8

// The outcomes at a target.
const (
	Refused  Outcome = 0 // the VM will never run here
	Accepted Outcome = 1 // the VM runs here
)

// Resume goes on after a lost connection. Its payload: outcome uint8, number of devices uint16,
// then the set of missing pages of each.
type Resume struct {
	Outcome Outcome
	Missing []*block.Bitmap
}

// Progress answers a [Cycle]: everything that was sent before it is stored. Its payload: number
// uint32.
type Progress struct{ Cycle int }

// Code says what kind an error is.
type Code uint16

// The codes of errors.
const (
	CodeInternal     Code = 1 // the sender failed
	CodeIncompatible Code = 2 // the migration cannot work; trying again is of no use
	CodeBusy         Code = 3 // the source migrates already, or is not ready to
	CodeUnknown      Code = 4 // there is no migration of that id to resume
	CodeCancelled    Code = 5 // somebody wanted the end
	CodeProtocol     Code = 6 // the receiver does not follow the protocol
	CodeTakenBack    Code = 7 // an operator has settled that the VM goes on at its source
)

// Error ends a migration. Its payload: code uint16, text in UTF-8.
type Error struct {
	Code Code
	Text string
}

func (e *Error) Error() string { return e.Text }

// Send sends a message: one of the types above, or a bare [Type] for those without payload. It
// overtakes what waits to be sent from other goroutines.
func (c *Conn) Send(message any) error {
	b, err := encode(message)
	if err != nil {
		return err
	}
	return c.write(b, Urgent)
}

// encode makes a sealed frame of a message.
func encode(message any) ([]byte, error) {
	b := make([]byte, headerSize, headerSize+256)
	le := binary.LittleEndian
	var t Type
	device := 0
	switch m := message.(type) {
	case Type:
		t = m
	case Hello:
		t, b = TypeHello, append(b, magic...)
		b = le.AppendUint16(b, m.Version)
		b = append(b, byte(m.Lane), oneIf(m.Resume)|oneIf(m.Copy)<<1)
		b = le.AppendUint64(append(b, m.Migration[:]...), m.Features)
	case Manifest:
		t, b = TypeManifest, le.AppendUint64(b, m.Features)
		b = append(appendString(appendString(b, m.Config), m.Processor), m.Generation[:]...)
		b = le.AppendUint16(b, uint16(len(m.Devices)))
		for _, d := range m.Devices {
			b = le.AppendUint64(appendString(b, []byte(d.Name)), uint64(d.Size))
			b = append(le.AppendUint32(b, uint32(d.BlockSize)), oneIf(d.NeedsBase)|oneIf(d.Absent)<<1|oneIf(d.Open)<<2)
			b = append(append(b, d.Base[:]...), d.Backup[:]...)
		}
		if m.Features&FeatureSignature != 0 {
			b = appendString(b, m.Signature)
		}
		if m.Features&FeatureLanding != 0 {
			b = appendString(b, m.Departure)
		}
	case Accept:
		t = TypeAccept
		for _, h := range m.Held {
			b = append(b, byte(h))
		}
		b = append(b, m.Landing...)
	case Want:
		t, device = TypeWant, m.Device
		b = le.AppendUint32(le.AppendUint64(b, uint64(m.First)), uint32(m.Ends-m.First))
	case Contents:
		t, device = TypeContents, m.Device
		b = le.AppendUint32(le.AppendUint64(b, uint64(m.First)), uint32(len(m.Blocks)))
		for i := range m.Blocks {
			b = append(b, m.Blocks[i][:]...)
		}
	case Operation:
		t, device = TypeOperation, m.Device
		b = append(le.AppendUint64(b, m.ID), byte(m.Kind))
		b = append(le.AppendUint32(le.AppendUint64(b, uint64(m.Off)), uint32(m.Length)), m.Data...)
	case Result:
		t = TypeResult
		b = append(append(le.AppendUint64(b, m.ID), oneIf(m.Failed)), m.Data...)
	case Snapshot:
		t, b = TypeSnapshot, le.AppendUint64(b, uint64(m.Paused))
	case Cycle:
		t, b = TypeCycle, le.AppendUint64(le.AppendUint32(b, uint32(m.Number)), uint64(m.Bytes))
	case State:
		t, b = TypeState, le.AppendUint64(b, uint64(m.Final))
	case Handed:
		t, device, b = TypeHanded, m.Device, AppendPages(b, m.Pages, maxList)
	case Authority:
		t, b = TypeAuthority, appendLists(le.AppendUint64(b, uint64(m.Paused)), m.Missing)
	case Ack:
		t, b = TypeAck, append(append(b, oneIf(m.Accepted)), cut(m.Reason)...)
	case Resume:
		t, b = TypeResume, appendLists(append(b, byte(m.Outcome)), m.Missing)
	case Progress:
		t, b = TypeProgress, le.AppendUint32(b, uint32(m.Cycle))
	case Error:
		t, b = TypeError, append(le.AppendUint16(b, uint16(m.Code)), cut(m.Text)...)
	default:
		return nil, fmt.Errorf("send: %T is no message", message)
	}
	if len(b)-headerSize > maxPayload(t) {
		return nil, fmt.Errorf("send %s: %d bytes are more than the protocol allows", t, len(b)-headerSize)
	}
	sealFrame(b, t, 0, uint16(device))
	return b, nil
}

func oneIf(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// cut bounds a text for a human.
func cut(s string) string { return s[:min(len(s), maxText)] }

// maxText bounds a text for a human, in bytes.
const maxText = 2000

// Printable is a text of the other side for a human: bounded, on one line, and without control
// characters.
func Printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(b[:min(len(b), maxText)]), "?"))
}

func appendString(b, s []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(s))), s...)
}

// Decode decodes any frame but an extent. Page sets are bounded by sizes, the devices' in bytes.
func Decode(f Frame, sizes []int64) (any, error) {
	r := &reader{b: f.Payload}
	var m any
	switch f.Type {
	case TypeReady, TypeComplete, TypeReleased, TypePing, TypePrepare:
		m = f.Type
	case TypeHello:
		if string(r.take(len(magic))) != magic {
			return nil, violation("this is not Drafter's protocol")
		}
		h := Hello{Version: r.uint16(), Lane: Lane(r.uint8())}
		flags := r.uint8()
		h.Resume, h.Copy = flags&1 != 0, flags&2 != 0
		copy(h.Migration[:], r.take(16))
		h.Features = r.uint64()
		m = h
	case TypeManifest:
		m = r.manifest()
	case TypeAccept:
		a := Accept{}
		for len(r.b) > 0 && len(a.Held) < len(sizes) {
			a.Held = append(a.Held, Held(r.uint8()))
		}
		if len(r.b) > 0 {
			a.Landing = r.rest()
		}
		m = a
	case TypeWant:
		if int(f.Device) >= len(sizes) {
			return nil, violation("pages wanted of device %d, of which there are %d", f.Device, len(sizes))
		}
		first, n := r.uint64(), int64(r.uint32())
		if pages := pagesOf(sizes[f.Device]); n == 0 || first >= uint64(pages) || n > pages-int64(first) {
			return nil, violation("%d pages wanted at %d of a device of %d", n, first, pages)
		}
		m = Want{Device: int(f.Device), First: int64(first), Ends: int64(first) + n}
	case TypeContents:
		m = r.contents(f.Device, sizes)
	case TypeOperation:
		m = r.operation(f.Device, sizes)
	case TypeResult:
		m = Result{ID: r.uint64(), Failed: r.uint8() == 1, Data: r.rest()}
	case TypeSnapshot:
		m = Snapshot{Paused: r.duration()}
	case TypeCycle:
		m = Cycle{Number: int(r.uint32()), Bytes: int64(r.uint64())}
		if c := m.(Cycle); c.Bytes < 0 {
			return nil, violation("a cycle of %d bytes", c.Bytes)
		}
	case TypeState:
		m = State{Final: int64(r.uint64())}
		if s := m.(State); s.Final < 0 {
			return nil, violation("a state up to byte %d", s.Final)
		}
	case TypeHanded:
		if int(f.Device) >= len(sizes) {
			return nil, violation("pages handed over of device %d, of which there are %d", f.Device, len(sizes))
		}
		m = Handed{Device: int(f.Device), Pages: r.pages(pagesOf(sizes[f.Device]))}
	case TypeAuthority:
		m = Authority{Paused: r.duration(), Missing: r.lists(sizes)}
	case TypeAck:
		m = Ack{Accepted: r.uint8() == 1, Reason: Printable(r.rest())}
	case TypeResume:
		m = Resume{Outcome: Outcome(r.uint8()), Missing: r.lists(sizes)}
	case TypeProgress:
		m = Progress{Cycle: int(r.uint32())}
	case TypeError:
		m = Error{Code: Code(r.uint16()), Text: Printable(r.rest())}
	default:
		return nil, violation("an unexpected %s", f.Type)
	}
	if r.err == nil && len(r.b) > 0 {
		r.err = violation("%d bytes too many", len(r.b))
	}
	if r.err != nil {
		return nil, fmt.Errorf("%s: %w", f.Type, r.err)
	}
	return m, nil
}

// reader decodes a payload field by field. After its first failure it returns zeros.
type reader struct {
	b   []byte
	err error
}

var shortage [64]byte

func (r *reader) take(n int) []byte {
	if r.err == nil && n > len(r.b) {
		r.err, r.b = violation("truncated"), nil
	}
	if r.err != nil {
		return shortage[:min(n, len(shortage))]
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) uint8() uint8   { return r.take(1)[0] }
func (r *reader) uint16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *reader) uint32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *reader) uint64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }
func (r *reader) rest() []byte   { return r.take(len(r.b)) }

// duration is one that has passed.
func (r *reader) duration() time.Duration {
	d := time.Duration(r.uint64())
	if d < 0 && r.err == nil {
		r.err = violation("a duration of %s", d)
	}
	return d
}

func (r *reader) string() []byte {
	n := r.uint32()
	if r.err == nil && int64(n) > int64(len(r.b)) {
		r.err = violation("truncated")
	}
	if r.err != nil {
		return nil
	}
	return append([]byte(nil), r.take(int(n))...)
}

func (r *reader) manifest() Manifest {
	m := Manifest{Features: r.uint64(), Config: r.string(), Processor: r.string()}
	copy(m.Generation[:], r.take(len(m.Generation)))
	n := r.uint16()
	if n > block.MaxDevices {
		r.err = violation("%d devices, of which %d are allowed", n, block.MaxDevices)
	}
	names := map[string]bool{}
	for ; n > 0 && r.err == nil; n-- {
		d := Device{Name: string(r.string()), Size: int64(r.uint64()), BlockSize: int64(r.uint32())}
		flags := r.uint8()
		d.NeedsBase, d.Absent, d.Open = flags&1 != 0, flags&2 != 0, flags&4 != 0
		copy(d.Base[:], r.take(len(d.Base)))
		copy(d.Backup[:], r.take(len(d.Backup)))
		switch {
		case r.err != nil:
		case d.Name == "" || len(d.Name) > maxName || names[d.Name]:
			r.err = violation("a device's name %q is empty, too long, or another one's", d.Name[:min(len(d.Name), maxName)])
		case d.Size <= 0:
			r.err = violation("device %q has size %d", d.Name, d.Size)
		case block.CheckBlockSize(d.BlockSize) != nil:
			r.err = violation("device %q has blocks of %d bytes", d.Name, d.BlockSize)
		}
		names[d.Name] = true
		m.Devices = append(m.Devices, d)
	}
	if m.Features&FeatureSignature != 0 {
		m.Signature = r.string()
	}
	if m.Features&FeatureLanding != 0 {
		m.Departure = r.string()
	}
	return m
}

func (r *reader) contents(device uint16, sizes []int64) Contents {
	c := Contents{Device: int(device), First: int64(r.uint64())}
	n := int64(r.uint32())
	if int(device) >= len(sizes) {
		r.err = violation("contents of device %d, of which there are %d", device, len(sizes))
		return c
	}
	blocks := (sizes[device] + block.ContentBlockSize - 1) / block.ContentBlockSize
	if c.First < 0 || n > MaxContents || c.First > blocks-n {
		r.err = violation("contents of %d blocks at %d of a device of %d", n, c.First, blocks)
		return c
	}
	for range n {
		var id block.ID
		copy(id[:], r.take(len(id)))
		c.Blocks = append(c.Blocks, id)
	}
	return c
}

func (r *reader) operation(device uint16, sizes []int64) Operation {
	o := Operation{Device: int(device), ID: r.uint64(), Kind: Kind(r.uint8()), Off: int64(r.uint64()), Length: int64(r.uint32())}
	o.Data = r.rest()
	switch {
	case r.err != nil:
	case int(device) >= len(sizes):
		r.err = violation("device %d, of which there are %d", device, len(sizes))
	case o.Kind < Read || o.Kind > Sync:
		r.err = violation("kind %d", o.Kind)
	case o.Off < 0 || o.Off > sizes[device]-o.Length:
		r.err = violation("%d bytes at %d of a device of %d", o.Length, o.Off, sizes[device])
	case o.Kind == Write && o.Length != int64(len(o.Data)), o.Kind != Write && len(o.Data) > 0, o.Kind == Read && o.Length > MaxExtent:
		r.err = violation("%d bytes of data for %d bytes", len(o.Data), o.Length)
	}
	return o
}
