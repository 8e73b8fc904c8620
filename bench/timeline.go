package bench

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Moment is what the source of a migration says at a time.
type Moment struct {
	MS      float64 `json:"ms"`
	DirtyMB float64 `json:"dirty_mb"`
	SentMB  float64 `json:"sent_mb"`
	Phase   string  `json:"phase"`
}

// followMigration asks a peer's metrics again and again until ctx ends, or the peer has.
func followMigration(ctx context.Context, addr string) (moments []Moment) {
	begin := time.Now()
	for ctx.Err() == nil {
		res, err := http.Get("http://" + addr + "/metrics")
		if err != nil {
			return moments
		}
		b, err := io.ReadAll(res.Body)
		_ = res.Body.Close() // it was read
		if err != nil {
			return moments
		}
		m := Moment{MS: ms(time.Since(begin))}
		for line := range strings.SplitSeq(string(b), "\n") {
			name, value, _ := strings.Cut(line, "} ")
			if !strings.Contains(line, "{") {
				name, value, _ = strings.Cut(line, " ")
			}
			v, err := strconv.ParseFloat(value, 64)
			switch {
			case err != nil:
			case name == `drafter_device_dirty_bytes{device="memory"`:
				m.DirtyMB = v / 1e6
			case name == "drafter_migration_wire_bytes":
				m.SentMB = v / 1e6
			case strings.HasPrefix(name, `drafter_migration_state{state="`) && v == 1:
				m.Phase = strings.Trim(strings.TrimPrefix(name, `drafter_migration_state{state=`), `"`)
			}
		}
		if m.Phase != "" {
			moments = append(moments, m)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return moments
}
