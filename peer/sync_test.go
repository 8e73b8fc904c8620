package peer

import (
	"context"
	"testing"
)

// A host that hands a VM over ends its backup, and makes none until it has the VM again. One that
// was handed over and taken back may have been backed up by its target since, which it is told
// once.
func TestHold(t *testing.T) {
	var h hold
	ctx, cancel, may := h.begin(t.Context())
	if !may {
		t.Fatal("no backup of a VM that is here")
	}
	defer cancel()
	h.set(true)
	if ctx.Err() == nil {
		t.Error("a backup goes on beside the handoff")
	}
	if _, _, may := h.begin(t.Context()); may {
		t.Error("a backup begins beside the handoff")
	}
	h.set(false) // the move failed before the handoff
	if h.tookBack() {
		t.Error("a VM that never left was taken back")
	}
	h.set(true)
	h.hand()
	if h.tookBack() {
		t.Error("a VM that is away was taken back")
	}
	h.set(false)
	if !h.tookBack() || h.tookBack() {
		t.Error("it is not told once that the VM is back")
	}
	ctx, cancel, may = h.begin(context.Background())
	if !may || ctx.Err() != nil {
		t.Error("no backup of a VM that is back")
	}
	cancel()
}
