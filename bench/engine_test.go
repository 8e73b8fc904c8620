package bench

import (
	"math/rand/v2"
	"testing"
)

// BenchmarkEngine moves a device from memory to memory over TCP on loopback, without a VM.
func BenchmarkEngine(b *testing.B) {
	from, to := make(ram, aloneSize), make(ram, aloneSize)
	_, _ = rand.NewChaCha8([32]byte{}).Read(from) // which never fails
	copy(to, from)                                // its pages are there
	b.SetBytes(aloneSize)
	b.ReportAllocs()
	for b.Loop() {
		if err := moveAlone(b.Context(), from, to); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRawTCP is the same connection without the engine.
func BenchmarkRawTCP(b *testing.B) {
	from, to := make(ram, aloneSize), make(ram, aloneSize)
	_, _ = rand.NewChaCha8([32]byte{}).Read(from) // which never fails
	copy(to, from)
	b.SetBytes(aloneSize)
	for b.Loop() {
		if err := sendRaw(from, to); err != nil {
			b.Fatal(err)
		}
	}
}
