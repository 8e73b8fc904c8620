package vmm

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
)

const (
	testID  = "0a0b0c0d-0000-4000-8000-000000000001"
	otherID = "0a0b0c0d-0000-4000-8000-000000000002"
)

func newStateFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "state.bin"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(StateSize); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestStateLifeCycle(t *testing.T) {
	f := newStateFile(t)
	want := bytes.Repeat([]byte("state"), 100_000)
	if _, err := ReadState(f, testID); err == nil || !strings.Contains(err.Error(), "no state device") {
		t.Errorf("an empty device: %v", err)
	}
	if err := WriteState(f, testID, want); err != nil {
		t.Fatal(err)
	}
	got, err := ReadState(f, testID)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	if _, err := ReadState(f, otherID); err == nil || !strings.Contains(err.Error(), "different packages") {
		t.Errorf("another package's state: %v", err)
	}
	if err := MarkState(f, Running); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(f, testID); err == nil || !strings.Contains(err.Error(), "never suspended") {
		t.Errorf("a VM that was killed: %v", err)
	}
	if err := MarkState(f, PoweredOff); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(f, testID); err == nil || !strings.Contains(err.Error(), "powered itself off") {
		t.Errorf("a VM that is off: %v", err)
	}
	// A shorter state replaces a longer one wholly.
	if err := WriteState(f, testID, []byte("short")); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadState(f, testID); err != nil || string(got) != "short" {
		t.Errorf("read %q, %v", got, err)
	}
	if err := WriteState(f, testID, make([]byte, StateSize)); err == nil {
		t.Error("a state larger than the device was accepted")
	}
}

// TestStateOfMigrations goes through what the devices of a source and a target say while a VM
// moves, is in doubt, and is settled.
func TestStateOfMigrations(t *testing.T) {
	migration := uuid.New()
	refused := func(dev StateDevice, want string) {
		t.Helper()
		if err := CheckResumable(dev); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
		if _, err := ReadState(dev, testID); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("read: %v; want %q", err, want)
		}
		status, m, _, err := StateStatus(dev)
		if err != nil || m != migration {
			t.Errorf("status %d is of migration %s, %v; want %s", status, m, err, migration)
		}
	}
	target := newStateFile(t)
	if err := MarkArriving(target, migration); err != nil {
		t.Fatal(err)
	}
	refused(target, "did not get to its end")

	source := newStateFile(t)
	if err := WriteState(source, testID, []byte("package")); err != nil {
		t.Fatal(err)
	}
	if err := SettleState(source, true, false); err == nil {
		t.Error("a suspended VM was settled")
	}
	want := []byte("state at the handoff")
	if err := WriteMigratedState(source, testID, want, migration, Leaving); err != nil {
		t.Fatal(err)
	}
	refused(source, "may run at its target")
	if got, err := ReadMigratedState(source, testID, migration); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the migration's state: %q, %v", got, err)
	}
	if _, err := ReadMigratedState(source, testID, uuid.New()); err == nil {
		t.Error("another migration's state was accepted")
	}
	if _, err := ReadMigratedState(source, otherID, migration); err == nil {
		t.Error("another VM's state was accepted")
	}
	if _, err := ReadMigratedState(target, testID, migration); err == nil {
		t.Error("a state that has not arrived was accepted")
	}
	for _, s := range []struct {
		status Status
		want   string
	}{{InDoubt, "settle it with 'drafter peer settle --here', or --away"}, {HandedOver, "go on from that moment with 'drafter peer settle --here'"}} {
		if err := MarkState(source, s.status); err != nil {
			t.Fatal(err)
		}
		refused(source, s.want)
		if err := SettleState(source, true, false); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadState(source, testID); err != nil || !bytes.Equal(got, want) {
			t.Errorf("status %d, settled here: %q, %v", s.status, got, err)
		}
		if err := MarkState(source, s.status); err != nil {
			t.Fatal(err)
		}
		if err := SettleState(source, false, false); err != nil {
			t.Fatal(err)
		}
		refused(source, "moved away")
		if err := SettleState(source, true, false); err == nil {
			t.Error("a VM that has moved away was settled to be here")
		}
	}
}

// A VM that was killed or is off boots, unless it may be on another host.
func TestCheckStart(t *testing.T) {
	migration := uuid.New()
	check := func(what string, dev StateDevice, boots, refused string) {
		t.Helper()
		why, err := CheckStart(dev)
		if (why != nil) != (boots != "") || why != nil && !strings.Contains(why.Error(), boots) {
			t.Errorf("%s: it boots because: %v; want %q", what, why, boots)
		}
		if (err != nil) != (refused != "") || err != nil && !strings.Contains(err.Error(), refused) {
			t.Errorf("%s: it is refused because: %v; want %q", what, err, refused)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	source := newStateFile(t)
	do(WriteState(source, testID, []byte("state")))
	check("suspended", source, "", "")
	do(MarkState(source, Running))
	check("killed", source, "its process was killed, or the host failed", "")
	do(MarkState(source, PoweredOff))
	check("off", source, "powered itself off", "")
	do(MarkState(source, Running))
	do(MarkLeaving(source, migration))
	check("about to leave", source, "", "may run at its target")
	if err := SettleState(source, true, false); err != nil {
		t.Error(err)
	}
	check("about to leave, settled", source, "was not suspended since", "")
	do(MarkLeaving(source, migration))
	do(NoteState(source, Running))
	check("rescued", source, "was not suspended since", "")
	do(WriteMigratedState(source, testID, []byte("state"), migration, Leaving))
	check("leaving", source, "", "may run at its target")
	do(WriteMigratedState(source, testID, []byte("state"), migration, Copying))
	if got, err := ReadMigratedState(source, testID, migration); err != nil || string(got) != "state" {
		t.Errorf("a copy: %q, %v", got, err)
	}
	check("copied", source, "it was being copied", "")
	if err := SettleState(source, true, false); err == nil {
		t.Error("a VM that was copied was settled")
	}
	for _, status := range []Status{InDoubt, HandedOver, Moved} {
		do(MarkState(source, status))
		if why, err := CheckStart(source); why != nil || err == nil {
			t.Errorf("status %d: %v, %v", status, why, err)
		}
	}

	target := newStateFile(t)
	do(MarkArriving(target, migration))
	check("arriving", target, "", "did not get to its end")
	do(MarkTakingOver(target, migration))
	check("taking over", target, "", "before it was certain")
	do(WriteMigratedState(target, testID, []byte("state"), migration, Leaving))
	do(NoteTakenOver(target))
	check("taken over", target, "", "taken over from another host")
	do(NoteArrived(target))
	check("arrived", target, "was not suspended since", "")
	do(NoteTakenOver(target))
	do(MarkState(target, PoweredOff))
	do(NoteArrived(target))
	check("arrived, and off", target, "powered itself off", "")
	do(WriteMigratedState(target, testID, []byte("state"), migration, Leaving))
	do(NoteTakenOver(target))
	if err := SettleState(target, false, false); err != nil {
		t.Error(err)
	}
	check("taken over, settled to be away", target, "", "moved away")
}

// TestStateDamage flips every bit of the header, and some of the state: nothing damaged is ever
// returned.
func TestStateDamage(t *testing.T) {
	f := newStateFile(t)
	want := []byte("the state of a machine")
	if err := WriteState(f, testID, want); err != nil {
		t.Fatal(err)
	}
	flip := func(offset int64, bit int) {
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, offset); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1 << bit
		if _, err := f.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
	}
	for _, part := range []struct{ from, to int64 }{{0, stateHeaderSize}, {stateOffset, stateOffset + int64(len(want))}} {
		for offset := part.from; offset < part.to; offset++ {
			for bit := range 8 {
				flip(offset, bit)
				if _, err := ReadState(f, testID); err == nil {
					t.Fatalf("bit %d of byte %d is wrong, and nobody noticed", bit, offset)
				}
				flip(offset, bit)
			}
		}
	}
	if _, err := ReadState(f, testID); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(stateOffset + 3); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(f, testID); err == nil || !strings.Contains(err.Error(), "truncated") {
		t.Errorf("a truncated device: %v", err)
	}
}

func FuzzReadState(f *testing.F) {
	h := (&stateHeader{status: Suspended, length: 5}).encode()
	f.Add(h)
	f.Fuzz(func(t *testing.T, b []byte) {
		file := newStateFile(t)
		if _, err := file.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if state, err := ReadState(file, testID); err == nil {
			t.Errorf("returned %d bytes of a random file", len(state))
		}
	})
}

func TestAccelerator(t *testing.T) {
	dir := t.TempDir()
	there, absent := filepath.Join(dir, "there"), filepath.Join(dir, "absent")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ requested, kvm, pvm, want, wantErr string }{
		{"auto", there, absent, "kvm", ""},
		{"auto", there, there, "tcg", ""}, // PVM: a stock kernel would spin for ever
		{"auto", absent, absent, "tcg", ""},
		{"kvm", there, there, "kvm", ""},
		{"kvm", absent, absent, "", "use KVM"},
		{"tcg", there, absent, "tcg", ""},
		{"hvf", there, absent, "", `"hvf" is unknown`},
	} {
		got, why, err := accelerator(tt.requested, tt.kvm, tt.pvm)
		if got != tt.want || (err == nil) != (tt.wantErr == "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
			t.Errorf("accelerator(%q, …) = %q (%s), %v; want %q, %q", tt.requested, got, why, err, tt.want, tt.wantErr)
		}
	}
}
