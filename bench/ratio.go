package bench

import "slices"

// ratio is a figure of [Result.Ratios]: the median of what was measured under one name over that
// under another.
type ratio struct {
	key string
	of  []string // of several, the one with the largest median counts
	to  string   // "" for none: the figure itself
	// round says that the figure is the median of the ratios of each round. That is for speeds of
	// what follows one another: how fast the machine is changes from one minute to the next.
	round bool
}

// ratios are all there are.
func ratios() []ratio {
	move := func(link string, gib int, opponent, figure string) string {
		return Key(link, gib, "random", opponent, figure)
	}
	loopback := func(opponent, figure string) string { return move("loopback", 1, opponent, figure) }
	var all []ratio
	for _, figure := range []string{"gap", "total", "whole"} {
		all = append(all, ratio{key: figure + "_vs_precopy300", of: []string{loopback("present", figure+"_ms")}, to: loopback("precopy300", figure+"_ms")})
		// where the package is absent, QEMU has to bring the disks, too
		all = append(all, ratio{key: figure + "_absent_vs_precopy300_disks", of: []string{loopback("absent", figure+"_ms")}, to: loopback("precopy300_disks", figure+"_ms")})
	}
	for key, figure := range map[string]string{"bytes": "mb", "memory_bytes": "memory_mb"} {
		all = append(all, ratio{key: key + "_absent_vs_precopy300_disks", of: []string{loopback("absent", figure)}, to: loopback("precopy300_disks", figure)})
	}
	return append(all,
		ratio{key: "gap_vs_precopy30", of: []string{loopback("present", "gap_ms")}, to: loopback("precopy30", "gap_ms")},
		ratio{key: "bytes_vs_precopy300", of: []string{loopback("present", "mb")}, to: loopback("precopy300", "mb")},
		ratio{key: "cpu_vs_precopy300", of: []string{loopback("present", "cpu_s")}, to: loopback("precopy300", "cpu_s")},
		ratio{key: "gap_rtt100_ms", of: []string{move("1gbit_rtt100", 1, "present", "gap_ms")}},
		ratio{key: "gap_8g_over_1g", of: []string{move("loopback", 8, "present", "gap_ms")}, to: loopback("present", "gap_ms")},
		ratio{key: "engine_vs_tcp", of: []string{"engine_mb_per_s"}, to: "raw_tcp_mb_per_s", round: true},
		ratio{key: "run_memory_disk_mb", of: []string{"run_memory_disk_mb"}},
		ratio{key: "run_memory_share", of: []string{"run_redis_drafter_memory_share", "run_bound_drafter_memory_share"}},
		ratio{key: "run_memfd_memory_share", of: []string{"run_redis_memfd_memory_share", "run_bound_memfd_memory_share"}},
		ratio{key: "run_redis_vs_memfd", of: []string{"run_redis_drafter_ops_per_s"}, to: "run_redis_memfd_ops_per_s", round: true},
		ratio{key: "run_bound_vs_memfd", of: []string{"run_bound_drafter_ops_per_s"}, to: "run_bound_memfd_ops_per_s", round: true},
		ratio{key: "downtime_ms", of: []string{loopback("present", "downtime_ms")}},
		ratio{key: "handover_shared_ms", of: []string{"handover_shared_ms"}},
		ratio{key: "handover_shared_memory_mb", of: []string{"handover_shared_memory_mb"}},
		ratio{key: "handover_private_ms", of: []string{"handover_private_ms"}},
		ratio{key: "handover_private_memory_mb", of: []string{"handover_private_memory_mb"}},
		ratio{key: "suspend_500_pause_ms", of: []string{"suspend_500_pause_ms"}},
		ratio{key: "clones_20_ms", of: []string{"clones_20_ms"}},
		ratio{key: "clone_memory_share", of: []string{"clone_memory_share"}},
		ratio{key: "resume_ms", of: []string{"resume_ms"}},
		ratio{key: "peak_rss_mb", of: []string{
			loopback("present", "source_peak_rss_mb"), loopback("present", "target_peak_rss_mb"), loopback("absent", "source_peak_rss_mb"), loopback("absent", "target_peak_rss_mb"),
		}},
		ratio{key: "fc_resume_vs_load", of: []string{"fc_resume_ms"}, to: "fc_own_load_ms"},
		ratio{key: "fc_downtime_ms", of: []string{"fc_move_downtime_ms"}},
		ratio{key: "fc_gap_vs_own", of: []string{"fc_move_gap_ms"}, to: "fc_own_move_gap_ms"},
		ratio{key: "fault_us", of: []string{"fault_served_p50_us"}},
		ratio{key: "cpu_vs_copy", of: []string{loopback("absent", "cpu_s_per_gb")}, to: "copy_tcp_cpu_s_per_gb", round: true},
	)
}

// series returns what the ratio is of. One of them is empty when it was not measured.
func (q ratio) series(r *Result) (of, to []float64) {
	for _, name := range q.of {
		if v := r.Rounds[name]; of == nil || median(v) > median(of) {
			of = v
		}
	}
	if q.to == "" {
		return of, []float64{1}
	}
	return of, r.Rounds[q.to]
}

// perRound is the ratios of each round, the last ones of which are left out if the other side has
// fewer.
func perRound(of, to []float64) []float64 {
	var v []float64
	for i := range min(len(of), len(to)) {
		v = append(v, of[i]/to[i])
	}
	return v
}

// value is the ratio, unless it was not measured.
func (q ratio) value(r *Result) (v float64, measured bool) {
	of, to := q.series(r)
	if len(of) == 0 || median(to) <= 0 {
		return 0, false
	}
	if q.round {
		return median(perRound(of, to)), true
	}
	return median(of) / median(to), true
}

// RatioSpread returns within what a ratio was in this run: the least and the most of its rounds'
// ratios, where both sides were measured in as many, else the least of the one side over the most
// of the other, and the most over the least. Another run's is the same within noise if it is in
// there. Rounds is how many there were, of the side with fewer; 0: it was not measured.
func (r *Result) RatioSpread(key string) (least, most float64, rounds int) {
	for _, q := range ratios() {
		if _, measured := q.value(r); q.key != key || !measured {
			continue
		}
		of, to := q.series(r)
		switch {
		case q.to == "":
			return slices.Min(of), slices.Max(of), len(of)
		case q.round || len(of) == len(to):
			v := perRound(of, to)
			return slices.Min(v), slices.Max(v), len(v)
		}
		return slices.Min(of) / slices.Max(to), slices.Max(of) / slices.Min(to), min(len(of), len(to))
	}
	return 0, 0, 0
}
