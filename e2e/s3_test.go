package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/redis/go-redis/v9"

	"drafter/internal/s3test"
	"drafter/internal/tour"
)

// acknowledgedBy is how many numbers of the load had been acknowledged at a time.
func (l *load) acknowledgedBy(at time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return sort.Search(len(l.times), func(i int) bool { return l.times[i].After(at) })
}

// syncPoint is what a line "Synced to S3" reports.
func syncPoint(t *testing.T, line tour.Line) time.Time {
	t.Helper()
	m := regexp.MustCompile(`"moment":"([^"]+)"`).FindStringSubmatch(line.Text)
	if m == nil {
		t.Fatalf("no moment: %s", line.Text)
	}
	at, err := time.Parse(time.RFC3339Nano, m[1])
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// storage runs an object storage that the commands find in their environment.
//
// The commands are those without the race detector, which makes compression ten times slower; the
// tests of the package s3 have it.
func storage(t *testing.T, s *site) *s3test.Server {
	t.Helper()
	s.Bin = filepath.Join(work, "bin/plain/drafter")
	server := s3test.Start(t)
	t.Setenv("AWS_ENDPOINT_URL", "http://"+server.Endpoint)
	t.Setenv("AWS_ACCESS_KEY_ID", s3test.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s3test.SecretKey)
	return server
}

// A host is lost, at any time, with a storage that fails now and then. The VM starts elsewhere from
// that storage alone, with all that was acknowledged up to the last sync that was reported, goes on
// being backed up there, and is found there again after it was suspended.
func TestLostHost(t *testing.T) {
	s := emptySite(t)
	server := storage(t, s)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	backup := []string{"--s3-sync", "s3://vms/one", "--s3-interval", "200ms"}
	vm := s.peer(t, "instance-0", append(backup, "--netns", "ark0")...)
	server.Fail(func(*http.Request) string {
		if rand.IntN(10) > 0 {
			return ""
		}
		return []string{"cut", "lost", "slow", "429", "503", "500"}[rand.IntN(6)]
	})
	l := startLoad(t.Context(), "127.0.0.1:3333")
	var last time.Time
	for range 4 {
		last = syncPoint(t, await(t, vm, "Synced to S3"))
	}
	time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond) // at any moment
	if err := vm.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, vm)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		line, err := vm.Await(ctx, "Synced to S3")
		cancel()
		if err != nil {
			break
		}
		last = syncPoint(t, line)
	}
	l.stop()
	l.wg.Wait()
	if err := os.RemoveAll(filepath.Join(s.dir, "instance-0")); err != nil {
		t.Fatal(err)
	}
	want := l.acknowledgedBy(last)
	t.Logf("%d writes acknowledged, %d of them up to the last sync; longest silence %s", len(l.acked), want, l.gap.Round(time.Millisecond))
	if want == 0 {
		t.Error("nothing was acknowledged before the last sync")
	}
	server.Fail(nil)

	restore := append([]string{"--netns", "ark0", "--package", "s3://vms/one"}, backup...)
	vm = s.peer(t, "restored", restore...)
	holds(t, c, want)
	await(t, vm, "The whole package is here and verified")
	cleanDisks(t, filepath.Join(s.dir, "restored/base"))
	if err := c.Set(t.Context(), "after", "restore", 0).Err(); err != nil {
		t.Fatal(err)
	}
	end(t, vm)
	for _, instance := range []string{"restored", "again"} {
		vm = s.peer(t, instance, restore...)
		if v, err := c.Get(t.Context(), "after").Result(); err != nil || v != "restore" {
			t.Errorf("%s: %q, %v", instance, v, err)
		}
		end(t, vm)
	}
	// "restored" is not the latest any more.
	vm, err := s.Start(s.peerArgs("restored", restore...)...)
	if err != nil {
		t.Fatal(err)
	}
	await(t, vm, "Resumed VM")
	end(t, vm)
	logs, err := filepath.Glob(filepath.Join(s.dir, "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range logs {
		if b, err := os.ReadFile(path); err != nil || strings.Contains(string(b), s3test.SecretKey) {
			t.Errorf("%s tells the secret key, or %v", path, err)
		}
	}
}

// A checkpoint goes to an object storage, and only what has changed the next time; one that fails
// leaves the one before.
func TestCheckpointToStorage(t *testing.T) {
	s := emptySite(t)
	server := storage(t, s)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	vm := s.peer(t, "instance-0", "--netns", "ark0", "--laddr", "localhost:1337")
	checkpoint := []string{"checkpoint", "--raddr", "localhost:1337", "--output", "s3://vms/copies"}
	for _, v := range []string{"1", "2"} {
		if err := c.Set(t.Context(), "checkpoint", v, 0).Err(); err != nil {
			t.Fatal(err)
		}
		if err := s.Run(t.Context(), os.Stderr, checkpoint...); err != nil {
			t.Fatal(err)
		}
	}
	uploads := 0
	for _, r := range server.Requests() {
		if strings.HasPrefix(r, "PUT copies/packs/") {
			uploads++
		}
	}
	t.Logf("%d packs were uploaded", uploads)
	if err := c.Set(t.Context(), "checkpoint", "3", 0).Err(); err != nil {
		t.Fatal(err)
	}
	server.Fail(func(r *http.Request) string {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "manifest.json") {
			return "500"
		}
		return ""
	})
	s.fails(t, checkpoint...)
	server.Fail(nil)
	if err := c.Set(t.Context(), "runs", "on", 0).Err(); err != nil {
		t.Error(err)
	}
	end(t, vm)
	vm = s.peer(t, "restored", "--netns", "ark0", "--package", "s3://vms/copies")
	if v, err := c.Get(t.Context(), "checkpoint").Result(); err != nil || v != "2" {
		t.Errorf("%q, %v", v, err)
	}
	end(t, vm)
}

// While the storage is away the VM runs on, and says how old its backup is; then it is backed up
// again. A backup moves with the VM.
func TestStorageAway(t *testing.T) {
	s := emptySite(t)
	server := storage(t, s)
	c := s.redisIn(t, "ark1", "127.0.0.1:4444")
	backup := []string{"--s3-sync", "s3://vms/two", "--s3-interval", "200ms"}
	vm := s.peer(t, "instance-0", append(backup, "--netns", "ark0", "--laddr", "localhost:1337")...)
	await(t, vm, "Synced to S3")
	server.Fail(func(*http.Request) string { return "503" })
	await(t, vm, "Not synced to S3; what is there is the backup before")
	server.Fail(nil)
	await(t, vm, "Synced to S3")
	next := s.peer(t, "instance-1", append(backup, "--netns", "ark1", "--raddr", "localhost:1337")...)
	t.Log(moved(t, vm).Text)
	if err := c.Set(t.Context(), "moved", "yes", 0).Err(); err != nil {
		t.Fatal(err)
	}
	set := time.Now()
	for syncPoint(t, await(t, next, "Synced to S3")).Before(set) {
		continue
	}
	if err := next.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.awaitKilled(t, next)
	vm = s.peer(t, "restored", "--netns", "ark1", "--package", "s3://vms/two")
	if v, err := c.Get(t.Context(), "moved").Result(); err != nil || v != "yes" {
		t.Errorf("%q, %v", v, err)
	}
	end(t, vm)
}

// What S3 has of a VM comes from there when it moves, and only the rest from its source; if S3
// fails meanwhile, all comes from the source. Nothing is lost in either case.
func TestMoveFromStorage(t *testing.T) {
	s := emptySite(t)
	server := storage(t, s)
	c := s.redisIn(t, "ark0", "127.0.0.1:3333")
	next := s.redisIn(t, "ark1", "127.0.0.1:4444")
	backup := []string{"--s3-sync", "s3://vms/three", "--s3-interval", "1h"}
	vm := s.peer(t, "instance-0", append(backup, "--netns", "ark0", "--laddr", "localhost:1337")...)
	await(t, vm, "Synced to S3")
	amounts := regexp.MustCompile(`"fromS3":"([^"]+)","fromSource":"([^"]+)"`)
	clients := map[string]*redis.Client{"ark0": c, "ark1": next}
	ports := map[string]string{"ark0": "127.0.0.1:3333", "ark1": "127.0.0.1:4444"}
	at, acknowledged := c, 0
	for i, netns := range []string{"ark1", "ark0"} {
		if err := at.Del(t.Context(), "load").Err(); err != nil {
			t.Fatal(err)
		}
		l := startLoad(t.Context(), ports["ark0"], ports["ark1"])
		l.getsOn(t)
		if i == 1 {
			var packs atomic.Int64
			server.Fail(func(r *http.Request) string {
				if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/packs/") && packs.Add(1) > 20 {
					return "503"
				}
				return ""
			})
		}
		flags := append(slices.Clone(backup), "--netns", netns, "--raddr", fmt.Sprintf("localhost:%d", 1337+i), "--laddr", fmt.Sprintf("localhost:%d", 1338+i))
		target, err := s.Start(append(s.peerArgs(fmt.Sprintf("instance-%d", i+1), flags...), s.withoutPackage(i+1)...)...)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(moved(t, vm).Text)
		if i == 1 {
			await(t, target, "Not all of the backup could be had; the source sends the rest")
		}
		line := await(t, target, "Got from S3 what had not changed since the last sync")
		m := amounts.FindStringSubmatch(line.Text)
		if m == nil {
			t.Fatal(line.Text)
		}
		t.Logf("%s from S3, %s from the source", m[1], m[2])
		fromS3, err := humanize.ParseBytes(m[1])
		if err != nil {
			t.Fatal(err)
		}
		fromSource, err := humanize.ParseBytes(m[2])
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 && fromSource > fromS3 {
			t.Errorf("%d bytes came from S3, %d from the source", fromS3, fromSource)
		}
		l.getsOn(t)
		l.end(t, clients[netns])
		acknowledged = l.acknowledged()
		server.Fail(nil)
		await(t, target, "Synced to S3")
		vm, at = target, clients[netns]
	}
	end(t, vm)
	vm = s.peer(t, "restored", "--netns", "ark0", "--package", "s3://vms/three")
	holds(t, c, acknowledged)
	await(t, vm, "The whole package is here and verified")
	end(t, vm)
	cleanDisks(t, filepath.Join(s.dir, "restored/base"))
}

// What cannot be backed up is refused before anything happens, in one line that tells no secret.
func TestStorageRefused(t *testing.T) {
	s := emptySite(t)
	server := storage(t, s)
	device := "name=disk,s3sync=true,s3endpoint=" + server.Endpoint
	for _, c := range []struct {
		flags []string
		want  string
	}{
		{[]string{"--s3-sync", "s3://nowhere/x"}, "bucket nowhere does not exist"},
		{[]string{"--s3-sync", "nowhere"}, "not of the form s3://BUCKET/PREFIX"},
		{[]string{"--s3-sync", "s3://vms/x", "--s3-endpoint", "localhost:1"}, "not of the form https://HOST:PORT"},
		{[]string{"--device", device}, "device disk: s3bucket is missing"},
		{[]string{"--device", device + ",s3bucket=vms,s3accesskey=me,s3secretkey=guess-me"}, "refuses the credentials"},
		{[]string{"--device", device + ",s3bucket=vms,s3accesskey=me,s3secretkey=guess-me,unknown=1"}, `field "unknown" does not exist`},
		{[]string{"--device", device + ",s3bucket=vms,s3secretkey=guess-me"}, "belong together"},
		{[]string{"--device", device + ",s3bucket=vms", "--device", "name=oci,s3sync=true,s3endpoint=elsewhere,s3bucket=vms"}, "another place"},
		{[]string{"--package", "s3://vms/x"}, "nothing is kept there"},
	} {
		line := s.fails(t, s.peerArgs("instance-0", append(c.flags, "--netns", "ark0")...)...)
		if !strings.Contains(line, c.want) || strings.Contains(line, "guess-me") {
			t.Errorf("%v: %s", c.flags, line)
		}
	}
	if _, err := os.Stat(filepath.Join(s.dir, "instance-0/state/state.bin")); err == nil {
		t.Error("an instance was made")
	}
}
