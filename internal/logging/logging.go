// Package logging is what the packages that log have in common: which logger they have, and a bound
// on the lines that strangers can cause.
package logging

import "log/slog"

// Or is a logger that a library's user has set, or [slog.Default] if there is none.
func Or(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.Default()
	}
	return l
}
