package block

import "sync"

// Gate is a device that passes all calls on to another one, which can be replaced while the gate is
// used. It begins shut: its users wait until it is opened.
type Gate struct {
	size int64

	mu     sync.RWMutex // held for writing while the gate is shut
	device Device
	shut   bool       // guarded by turns
	turns  sync.Mutex // held to open and to shut
}

// NewGate returns a gate for devices of size bytes.
func NewGate(size int64) *Gate {
	g := &Gate{size: size, shut: true}
	g.mu.Lock()
	return g
}

// Shut lets no further call in, and returns once no call is in the gate.
func (g *Gate) Shut() {
	g.turns.Lock()
	defer g.turns.Unlock()
	if !g.shut {
		g.mu.Lock()
		g.shut = true
	}
}

// Open passes calls on to device from now on. If the gate was not shut, calls under way finish at
// the device before.
func (g *Gate) Open(device Device) {
	g.Shut()
	g.turns.Lock()
	defer g.turns.Unlock()
	g.device, g.shut = device, false
	g.mu.Unlock()
}

// Size implements [Device].
func (g *Gate) Size() int64 { return g.size }

// ReadAt implements [Device].
func (g *Gate) ReadAt(p []byte, off int64) (int, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.device.ReadAt(p, off)
}

// WriteAt implements [Device].
func (g *Gate) WriteAt(p []byte, off int64) (int, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.device.WriteAt(p, off)
}

// Trim implements [Trimmer].
func (g *Gate) Trim(off, length int64) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return Trim(g.device, off, length)
}

// NextData implements [Mapper].
func (g *Gate) NextData(off int64) (start, end int64, err error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return NextData(g.device, off)
}

// Sync implements [Device].
func (g *Gate) Sync() error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.device.Sync()
}

// Close implements [Device]. The gate does not own the device behind it.
func (g *Gate) Close() error { return nil }
