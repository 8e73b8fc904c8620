package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"drafter/internal/newfile"
	"drafter/internal/private"
	"drafter/internal/rundir"
)

// notice is that one end of a link is no more. The NAT gives it to the host with the other end until
// that has heard it, or noticePatience is over. Nobody else waits for other hosts.
type notice struct {
	To     spot      `json:"to"` // where the other end is
	Link   string    `json:"link"`
	Anchor bool      `json:"anchor"` // the other end is an anchor's, not a landing's
	Since  time.Time `json:"since"`
	Said   bool      `json:"said"` // the log says that the host does not hear
}

// noticePatience is how long another host may be down.
const noticePatience = 24 * time.Hour

// mostNotices is how many a NAT has to give at a time. The oldest go first.
const mostNotices = 1000

const noticeRecords = "notices"

// giveNotice records notices for the NAT of a namespace. The NAT is called, so that it gives them at
// once; one that does not run does so when it starts.
func giveNotice(ns string, notices ...notice) error {
	if len(notices) == 0 {
		return nil
	}
	access, err := tunnelOf(ns)
	if access == nil || err != nil {
		return err // the NAT has been started anew, without a tunnel
	}
	defer access.close()
	for i := range notices {
		notices[i].Since = time.Now()
	}
	config, err := natOf(ns)
	if config == nil || err != nil {
		return err
	}
	err = changeList(noticeRecords, config.NamespacePrefix, func(all []notice) []notice {
		all = append(all, notices...)
		return all[max(0, len(all)-mostNotices):]
	})
	if err != nil {
		return err
	}
	if err := access.callWithin(tellTimeout, access.End, "notices", struct{}{}, nil); err != nil && !errors.Is(err, errNoNAT) {
		return err
	}
	return nil
}

// deliver gives the notices to other hosts. It does not wait for them.
func (t *tunnel) deliver() error {
	if t == nil {
		return nil
	}
	notices, err := t.notices()
	if len(notices) == 0 || err != nil {
		return err
	}
	hosts := map[TunnelKey][]notice{}
	for _, n := range notices {
		hosts[n.To.Tunnel.Key] = append(hosts[n.To.Tunnel.Key], n)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for host, notices := range hosts {
		if t.closed || t.delivering[host] {
			continue
		}
		t.delivering[host] = true
		t.serve.Go(func() {
			if err := t.giveHost(notices); err != nil {
				t.log.Error("Links that have ended here may stay at another host", "host", notices[0].To.Tunnel.endpoint(), "error", err)
			}
			t.mu.Lock()
			defer t.mu.Unlock()
			delete(t.delivering, host)
		})
	}
	return nil
}

func (t *tunnel) notices() ([]notice, error) {
	return readList[notice](noticeRecords, t.nat.config.NamespacePrefix)
}

// giveHost gives notices to one host, until it does not answer.
func (t *tunnel) giveHost(notices []notice) error {
	for _, n := range notices {
		if t.ended() {
			return nil // the next NAT gives the others, if there is one
		}
		what := "land/leave"
		if n.Anchor {
			what = "anchor/leave"
		}
		var err error
		if !t.unheardOf(n.To.Tunnel.Key) { // else nobody may be there, and calls would only pile up
			err = t.call(*n.To.Tunnel, what, linkCall{n.To.Netns, n.Link}, nil)
		}
		silent := !heard(err)
		switch {
		case silent && time.Since(n.Since) > noticePatience:
			t.log.Warn("Another host has not heard for a day that a link has ended here; it is not told again", "namespace", n.To.Netns, "error", err)
			silent = false
		case silent && n.Said:
			return nil
		case silent:
			t.log.Warn("Another host does not hear that a link has ended here; it is told again", "namespace", n.To.Netns, "error", err)
		}
		n.Said = true
		err = changeList(noticeRecords, t.nat.config.NamespacePrefix, func(all []notice) []notice {
			all = slices.DeleteFunc(all, func(o notice) bool { return o.Link == n.Link && o.Anchor == n.Anchor })
			if silent {
				all = append(all, n)
			}
			return all
		})
		if silent || err != nil {
			return err
		}
	}
	return nil
}

// ended tells whether the tunnel's time to give notices is over.
func (t *tunnel) ended() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.closed && time.Now().After(t.end)
}

// unheardOf tells whether another host has told of an end that has never answered.
func (t *tunnel) unheardOf(key TunnelKey) bool {
	t.mu.Lock()
	introduced := t.introduced[key]
	t.mu.Unlock()
	peers, err := t.peers()
	return introduced && err == nil && peers[key].handshake.IsZero()
}

// readList returns what a record lists.
func readList[T any](records, name string) (all []T, err error) {
	b, err := os.ReadFile(listPath(records, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return nil, fmt.Errorf("read the %s of %s: %w", records, name, err)
	}
	return all, nil
}

func listPath(records, name string) string {
	return filepath.Join(rundir.Path, records, name+".json")
}

// changeList changes what a record lists. An empty list has no record.
func changeList[T any](records, name string, change func([]T) []T) (err error) {
	if _, err := os.Stat(filepath.Join(rundir.Path, records)); errors.Is(err, os.ErrNotExist) && len(change(nil)) == 0 {
		return nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("record the %s of %s: %w", records, name, err)
		}
	}()
	lock, err := lockRecord(records + "/" + name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release(), rundir.Remove()) }()
	all, err := readList[T](records, name)
	if err != nil {
		return err
	}
	before := len(all)
	if all = change(all); len(all) == 0 && before > 0 {
		return os.Remove(listPath(records, name))
	}
	if len(all) == 0 {
		return nil
	}
	b, err := json.Marshal(all)
	if err == nil {
		err = private.MkdirAll(filepath.Dir(listPath(records, name)))
	}
	if err == nil {
		err = newfile.WriteBytes(listPath(records, name), b)
	}
	return err
}

// forgetList removes a record.
func forgetList(records, name string) error {
	if err := os.Remove(listPath(records, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget the %s of %s: %w", records, name, err)
	}
	return nil
}
