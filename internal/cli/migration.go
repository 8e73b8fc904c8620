package cli

import (
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"drafter/internal/output"
	"drafter/internal/progress"
	"drafter/migrate"
	"drafter/peer"
	"drafter/vmm"
)

// migrationLog tells a person how a migration goes: in log lines, and on a terminal also by a bar
// per device.
type migrationLog struct {
	mu    sync.Mutex
	out   io.Writer
	bars  *progress.Reporter // nil when out is no terminal
	cycle int
	begun bool // devices have arrived
}

func newMigrationLog(out io.Writer) *migrationLog { return &migrationLog{out: out} }

// messages are what is said at a change of phase. All phases are logged at debug level.
var messages = map[migrate.Phase]string{
	migrate.PreCopying:   "A target asks for the VM: copying its devices while it runs",
	migrate.HandingOff:   "Pausing the VM to hand it over",
	migrate.Snapshotting: "Pausing the VM to copy what is left",
	migrate.Delivering:   "The VM goes on; sending the rest of the copy",
	migrate.Storing:      "All of the copy is here; making it durable",
	migrate.Serving:      "The VM runs at its target; sending what is left",
	migrate.Rescuing:     "The migration failed; the VM goes on here",
	migrate.Receiving:    "Receiving the VM's devices while it runs at its source",
	migrate.TakingOver:   "The VM was handed over; resuming it here",
	migrate.HandingBack:  "The VM cannot be taken over; it stays at its source",
	migrate.Moved:        "Completed all device migrations",
}

func (l *migrationLog) phase(s migrate.Phase) {
	slog.Debug("Migration", "state", s)
	l.begun = l.begun || s == migrate.Receiving
	// A target that has not begun hands nothing back; its error says why.
	if text, ok := messages[s]; ok && (s != migrate.HandingBack || l.begun) {
		slog.Info(text)
	}
}

// deviceMessages are messages for devices that move without a VM.
var deviceMessages = map[migrate.Phase]string{
	migrate.PreCopying:  "A target asks for the devices: copying them while they are used",
	migrate.HandingOff:  "Holding up who uses the devices, to hand them over",
	migrate.Serving:     "The devices are at their target; sending what is left",
	migrate.Rescuing:    "The migration failed; the devices stay here",
	migrate.Receiving:   "Receiving devices while they are used at their source",
	migrate.TakingOver:  "The devices were handed over; opening them here",
	migrate.HandingBack: "The devices cannot be taken over; they stay at their source",
	migrate.Moved:       "Completed all device migrations",
}

func (l *migrationLog) deviceState(s migrate.Phase) {
	slog.Debug("Migration", "state", s)
	if text, ok := deviceMessages[s]; ok {
		slog.Info(text)
	}
}

func (l *migrationLog) progress(s migrate.Stats) {
	if s.Cycle != l.cycle {
		l.cycle = s.Cycle
		_, _, pending := s.Bytes()
		slog.Debug("Migration", "cycle", s.Cycle, "pending", humanize.IBytes(uint64(pending)))
	}
	bars := l.reporter()
	if bars == nil {
		return
	}
	over := s.Phase == migrate.Moved
	for _, d := range s.Devices {
		done := d.Size - min(d.Pending, d.Size)
		if !over {
			done = min(done, d.Size-1) // what is written meanwhile is pending again
		}
		bars.Report(d.Name, done, d.Size)
	}
}

// reporter is nil when there is no terminal.
func (l *migrationLog) reporter() *progress.Reporter {
	if output.Terminal(l.out) == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bars == nil {
		l.bars = progress.New(l.out)
	}
	return l.bars
}

// pull shows how much of a device has been pulled.
func (l *migrationLog) pull(device string, done, total int64) {
	if bars := l.reporter(); bars != nil {
		bars.Report(device, done, total)
	}
}

// summary tells what a migration did that has moved the VM away.
func (l *migrationLog) summary(p *peer.Peer) {
	if s, ok := p.Stats(); ok {
		l.summarize(s)
	}
}

func (l *migrationLog) summarize(s migrate.Stats) {
	memory := int64(0)
	for _, d := range s.Devices {
		if d.Name == vmm.Memory {
			memory = d.Wire
		}
		slog.Info("Migrated device", "device", d.Name, "size", humanize.IBytes(uint64(d.Size)), "sent", humanize.IBytes(uint64(d.Sent)), "notNeeded", humanize.IBytes(uint64(d.Saved)),
			"postCopy", humanize.IBytes(uint64(d.PostCopy)))
	}
	_, saved, _ := s.Bytes()
	slog.Info("Completed migration", "took", s.Total.Round(time.Millisecond), "preflight", s.Preflight.Round(time.Millisecond), "downtime", s.Paused.Round(10*time.Microsecond), "cycles", s.Cycle, "bytes", s.Wire, "memoryBytes", memory, "bytesSaved", saved)
}

func (l *migrationLog) close() {
	if l.bars != nil {
		l.bars.Close()
	}
}
