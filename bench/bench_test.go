package bench

import (
	"bytes"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// seen is a pulse at milliseconds after start.
func seen(start time.Time, at ...int) *pulse {
	p := &pulse{}
	for _, ms := range at {
		p.times = append(p.times, start.Add(time.Duration(ms)*time.Millisecond))
	}
	return p
}

func TestSilences(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	p := seen(start, 0, 10, 20, 35, 135, 145, 160, 170, 500)
	s := p.between(at(5), at(165))
	if len(s) != 7 || s.longest() != 100*time.Millisecond {
		t.Errorf("silences %v, the longest %s", s, s.longest())
	}
	if got := s.percentile(50); got != 10*time.Millisecond {
		t.Errorf("median %s", got)
	}
	// The VM was paused from 40 to 100 ms.
	before, handoff, after := s.split(at(40), at(100))
	if len(before) != 3 || before.longest() != 15*time.Millisecond {
		t.Errorf("before: %v", before)
	}
	if len(handoff) != 1 || handoff.longest() != 100*time.Millisecond {
		t.Errorf("handoff: %v", handoff)
	}
	if len(after) != 3 || after.longest() != 15*time.Millisecond {
		t.Errorf("after: %v", after)
	}
	if lasting := p.between(at(600), at(700)); len(lasting) != 1 || lasting.longest() != 200*time.Millisecond {
		t.Errorf("a silence that goes on: %v", lasting)
	}
	if none := seen(start).between(at(0), at(700)); none.longest() != 0 || none.percentile(99) != 0 {
		t.Errorf("silences when nothing was ever seen: %v", none)
	}
}

// A link takes its time in each direction, and takes nothing away.
func TestLink(t *testing.T) {
	dir := t.TempDir()
	there, err := net.Listen("unix", filepath.Join(dir, "there"))
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	echoed := make(chan error, 1)
	go func() {
		echoed <- func() error {
			c, err := there.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.Copy(c, c)
			return err
		}()
	}()
	const delay, rate = 20 * time.Millisecond, 4 << 20
	p, err := link{rate: rate, delay: delay}.through(t.Context(), "unix", filepath.Join(dir, "here"), filepath.Join(dir, "there"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", filepath.Join(dir, "here"))
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	begin := time.Now()
	go func() {
		_, _ = c.Write(data) // what does not come back shows it
		_ = c.(*net.UnixConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d came back: %v", len(got), len(data), err)
	}
	// Four chunks may go at once.
	if took, least := time.Since(begin), 2*delay+time.Duration(len(data)-4*linkChunk)*time.Second/rate; took < least {
		t.Errorf("it took %s, less than %s", took, least)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-echoed; err != nil {
		t.Error(err)
	}
	if err := p.close(); err != nil {
		t.Error(err)
	}
}

func TestResults(t *testing.T) {
	b := &bench{progress: io.Discard, values: map[string][]float64{}}
	add := func(name string, values ...float64) {
		for _, v := range values {
			b.add(name, v)
		}
	}
	add(Key("loopback", 1, "random", "precopy300", "gap_ms"), 90, 100, 300)
	add(Key("loopback", 1, "random", "present", "gap_ms"), 45, 50, 55)
	add(Key("loopback", 8, "random", "present", "gap_ms"), 70, 50)
	add("resume_ms", 40, 41, 90)
	add("run_memory_disk_mb", 0, 0)
	path := filepath.Join(t.TempDir(), "results", "latest.json")
	if err := b.results().write(path); err != nil {
		t.Fatal(err)
	}
	r, err := ReadResult(path)
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]float64{"gap_vs_precopy300": 0.5, "gap_8g_over_1g": 1.2, "resume_ms": 41} {
		if got := r.Ratios[key]; got != want {
			t.Errorf("%s is %v instead of %v", key, got, want)
		}
	}
	if v, ok := r.Ratios["run_memory_disk_mb"]; !ok || v != 0 {
		t.Errorf("what was measured as 0 is %v: %t", v, ok)
	}
	if _, ok := r.Ratios["gap_vs_precopy30"]; ok {
		t.Error("there is a ratio to what was not measured")
	}
	for key, want := range map[string][3]float64{
		"gap_vs_precopy300": {55. / 300, 50. / 100, 3}, // round by round
		"gap_8g_over_1g":    {50. / 55, 70. / 45, 2},   // of which there are fewer with 8 GiB
		"resume_ms":         {40, 90, 3},
		"gap_vs_precopy30":  {},
	} {
		if least, most, rounds := r.RatioSpread(key); [3]float64{least, most, float64(rounds)} != want {
			t.Errorf("%s is within %v … %v in %d rounds instead of %v", key, least, most, rounds, want)
		}
	}
	if spread := r.Spread["resume_ms"]; spread != [2]float64{40, 90} || len(r.Rounds["resume_ms"]) != 3 {
		t.Errorf("spread %v, rounds %v", spread, r.Rounds["resume_ms"])
	}
}

func TestUnknownPart(t *testing.T) {
	err := Run(t.Context(), Options{Dir: filepath.Join(t.TempDir(), "bench"), Parts: []string{"engine", "coffee"}, Progress: io.Discard})
	if err == nil || !strings.Contains(err.Error(), `part "coffee" is unknown`) {
		t.Errorf("%v", err)
	}
}

// What is not counted leaves no trace in the result.
func TestUncounted(t *testing.T) {
	b := &bench{progress: io.Discard, values: map[string][]float64{}}
	b.add("a", 1)
	err := b.uncounted(func() error {
		b.add("a", 2)
		b.add("b", 3)
		b.timeline = []Moment{{}}
		return nil
	})
	b.add("a", 4)
	if err != nil || len(b.names) != 1 || len(b.values) != 1 || !slices.Equal(b.values["a"], []float64{1, 4}) || b.timeline != nil {
		t.Errorf("%v: %v, %v", err, b.names, b.values)
	}
}
