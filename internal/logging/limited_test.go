package logging

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// What is not logged is counted.
func TestLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		l := Limited{Logger: slog.New(slog.NewTextHandler(&log, nil))}
		for range 1000 {
			l.Warn("refused")
			l.Log(slog.LevelDebug, "hidden")
		}
		if lines := strings.Count(log.String(), "\n"); lines != atOnce || strings.Contains(log.String(), "leftOut") {
			t.Errorf("%d lines:\n%s", lines, log.String())
		}
		time.Sleep(every)
		l.Warn("refused")
		if !strings.HasSuffix(log.String(), "leftOut=990\n") {
			t.Errorf("the next line:\n%s", log.String())
		}
		for range 500 {
			l.Warn("refused")
		}
		time.Sleep(2 * tellLast)
		synctest.Wait()
		if lines := strings.Count(log.String(), "\n"); lines != atOnce+2 || !strings.HasSuffix(log.String(), "first=refused leftOut=500\n") {
			t.Errorf("no line came after those that were left out:\n%s", log.String())
		}
	})
}
