package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"drafter/signature"
)

// With a key, a signed package is started, moved to a host that has nothing of it, and started
// there again; what is not signed with the key is not.
func TestSigned(t *testing.T) {
	s := newSite(t)
	for _, name := range []string{"key", "stranger"} {
		command(t, s.dir, "openssl", "genpkey", "-algorithm", "ed25519", "-out", name+".pem")
		command(t, s.dir, "openssl", "pkey", "-in", name+".pem", "-pubout", "-out", name+".pub")
	}
	command(t, s.dir, "drafter", "sign", "--key", "key.pem", "--package", s.pkg)
	signed := filepath.Join(s.pkg, signature.File)
	peer := func(key string, flags ...string) []string {
		return append([]string{"peer", "--chroot-base-dir", "vms", "--verify-key", key}, flags...)
	}
	c := s.redisIn(t, "ark0", redisAddr)
	source := s.start(t, peer("key.pub", "--raddr", "", "--laddr", "localhost:1337", "--netns", "ark0", "--package", s.pkg, "--instance", "instance-0")...)
	if err := c.Set(t.Context(), "signed", "yes", 0).Err(); err != nil {
		t.Fatal(err)
	}
	target := func(key string) []string {
		return peer(key, "--raddr", "localhost:1337", "--laddr", "", "--netns", "ark1", "--package", "nowhere", "--instance", "instance-1")
	}
	if line := s.fails(t, target("stranger.pub")...); !strings.Contains(line, "none of the keys") {
		t.Errorf("a stranger's key: %s", line)
	}
	if err := c.Set(t.Context(), "signed", "still", 0).Err(); err != nil {
		t.Fatal(err)
	}
	moved := s.start(t, target("key.pub")...)
	if err := source.Wait(); err != nil {
		t.Fatal(err)
	}
	c = s.redisIn(t, "ark1", "127.0.0.1:4444")
	if got, err := c.Get(t.Context(), "signed").Result(); err != nil || got != "still" {
		t.Errorf("after the move: %q, %v", got, err)
	}
	end(t, moved)
	again := []string{"--raddr", "", "--laddr", "", "--netns", "ark1", "--devices", fullJSON(t, "nowhere", "instance-1")}
	if line := s.fails(t, peer("key.pub", again...)...); !strings.Contains(line, "no signature") {
		t.Errorf("an instance without its package: %s", line)
	}
	end(t, s.start(t, peer("key.pub", append(again, "--signature", signed)...)...))

	runner := s.run(t, "--netns", "ark0", "--verify-key", "key.pub")
	end(t, runner)
	if line := s.refused(t, "--netns", "ark0", "--verify-key", "key.pub"); !strings.Contains(line, "is not what was signed: it has changed since") {
		t.Errorf("the second run: %s", line)
	}
	end(t, s.run(t, "--netns", "ark0"))
}
