package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"drafter/api"
	"drafter/client"
	"drafter/internal/await"
	"drafter/internal/control"
	"drafter/migrate"
)

// standInMover gives the VM of a stand-in away: who connects first has it.
type standInMover struct {
	mu       sync.Mutex
	listener net.Listener
	gone     bool
	moved    chan struct{} // closed then
}

func (m *standInMover) Offer(_ context.Context, r *control.OfferRequest) (string, error) {
	network, addr := "tcp", r.GetAddress()
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		network, addr = "unix", path
		os.Remove(path)
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.listener = l
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.listener != l { // withdrawn
			conn.Close()
			return
		}
		if _, err := conn.Write([]byte("yours")); err == nil && !m.gone {
			m.gone = true
			close(m.moved)
		}
		conn.Close()
	}()
	return l.Addr().String(), nil
}

func (m *standInMover) Withdraw(context.Context) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listener != nil {
		m.listener.Close()
		m.listener = nil
	}
	return m.gone, nil
}

func (m *standInMover) Stats() (migrate.Stats, bool) { return migrate.Stats{}, false }

// receive gets a VM from another stand-in.
func receive(raddr string) error {
	network := "tcp"
	if path, ok := strings.CutPrefix(raddr, "unix:"); ok {
		network, raddr = "unix", path
	}
	conn, err := net.Dial(network, raddr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if b, err := io.ReadAll(conn); err != nil || string(b) != "yours" {
		return fmt.Errorf("the VM stays at its source: %q, %w", b, err)
	}
	return nil
}

// A VM moves to another process and to another host, and back. A move that fails leaves it where it is.
func TestMoves(t *testing.T) {
	d1, d2 := neighbour(t, "one"), neighbour(t, "two")
	token, err := d2.Token()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d1.AddHost(t.Context(), api.AddHost{Name: "two", Address: d2.config.Listen, Token: token.Token}); err != nil {
		t.Fatal(err)
	}
	o, err := d1.Run(api.Run{Image: "docker://image", Name: "it", Ports: []api.Port{{Host: 1000, Guest: 80}}})
	if err := d1.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	is := func(d *Daemon, state string) api.VM {
		t.Helper()
		var vm api.VM
		await.True(t, "the VM is "+state, func() bool {
			vm, err = d.VM("it")
			return err == nil && vm.State == state || state == "" && errors.Is(err, ErrNotFound)
		})
		return vm
	}
	for range 3 {
		before := is(d1, api.Running)
		o, err = d1.Upgrade("it")
		if err := d1.done(t, o, err); err != nil {
			t.Fatal(err)
		}
		if now := is(d1, api.Running); now.PID == before.PID || now.Namespace == before.Namespace || now.Moves != before.Moves+1 {
			t.Errorf("before: %+v\nnow: %+v", before, now)
		}
	}
	o, err = d1.Move("it", "two")
	if err := d1.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	is(d1, "")
	if vm := is(d2, api.Running); !vm.Foreign || vm.From != "one" {
		t.Errorf("at the other host: %+v", vm)
	}

	// One of the same name is there already; so is the port of another.
	for _, r := range []api.Run{{Image: "docker://image", Name: "it"}, {Image: "docker://image", Ports: []api.Port{{Host: 1000, Guest: 80}}}} {
		o, err = d1.Run(r)
		if err := d1.done(t, o, err); err != nil {
			t.Fatal(err)
		}
		o, err = d2.Move("it", "one")
		if err := d2.done(t, o, err); err == nil || !strings.Contains(err.Error(), "does not take VM it") {
			t.Error("moved to where it has no place:", err)
		}
		is(d2, api.Running)
		o, err = d1.Remove(o.VM, true)
		_ = d1.done(t, o, err)
		for _, vm := range d1.VMs() {
			o, err = d1.Remove(vm.ID, true)
			if err := d1.done(t, o, err); err != nil {
				t.Error(err)
			}
		}
	}

	// Its process cannot start there.
	t.Setenv("STAND_IN_FAILS", "1")
	o, err = d2.Move("it", "one")
	if err := d2.done(t, o, err); err == nil || !strings.Contains(err.Error(), "no memory is left") {
		t.Error("the reason is lost:", err)
	}
	is(d2, api.Running)
	is(d1, "")
	o, err = d2.Upgrade("it")
	if err := d2.done(t, o, err); err == nil {
		t.Error("a process that ends has a VM")
	}
	is(d2, api.Running)
	os.Unsetenv("STAND_IN_FAILS")

	// Drained, and back.
	o, err = d2.Drain(0)
	if err := d2.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	is(d1, api.Running)
	if _, err := d2.Run(api.Run{Image: "docker://image"}); !errors.Is(err, ErrConflict) {
		t.Error("a VM starts on a host that is drained:", err)
	}
	o, err = d1.Move("it", "two")
	if err := d1.done(t, o, err); err == nil {
		t.Error("a VM has moved to a host that is drained")
	}
	if _, err := d1.giveBack("it", api.Neighbour{Name: "two"}); !errors.Is(err, ErrForbidden) {
		t.Error("asked for by its name:", err)
	}
	if _, err := d1.giveBack(is(d1, api.Running).ID, api.Neighbour{Name: "three"}); !errors.Is(err, ErrForbidden) {
		t.Error("asked for by another host:", err)
	}
	o, err = d2.Undrain()
	if err := d2.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	is(d2, api.Running)
	is(d1, "")
	o, err = d2.Remove("it", true)
	if err := d2.done(t, o, err); err != nil {
		t.Error(err)
	}
}

// Two daemons are killed at any moment while VMs move between them and between processes. Each VM
// is at one of them afterwards, and runs once.
func TestKilledMoving(t *testing.T) {
	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	type side struct {
		dir    string
		daemon *exec.Cmd
		*client.Client
	}
	var sides [2]*side
	start := func(s *side) {
		t.Helper()
		s.daemon = exec.Command(os.Args[0], "daemon", s.dir)
		s.daemon.Stderr = os.Stderr
		if err := s.daemon.Start(); err != nil {
			t.Fatal(err)
		}
		await.True(t, "the daemon answers", func() bool { _, err := s.Host(t.Context()); return err == nil })
	}
	for i := range sides {
		s := &side{dir: testDir(t)}
		s.Client = client.New(filepath.Join(s.dir, "socket"))
		defer s.Close()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			err = errors.Join(os.WriteFile(filepath.Join(s.dir, "listen"), []byte(l.Addr().String()), 0o600), l.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
		start(s)
		sides[i] = s
	}
	token, err := sides[1].Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	address, err := os.ReadFile(filepath.Join(sides[1].dir, "listen"))
	if err != nil {
		t.Fatal(err)
	}
	one, err := sides[1].Host(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sides[0].AddHost(t.Context(), api.AddHost{Name: one.Name, Address: string(address), Token: token.Token}); err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{}
	for i := range 4 {
		o, err := sides[i%2].Run(t.Context(), api.Run{Image: "docker://image", Name: fmt.Sprint("vm", i), Ports: []api.Port{{Host: 1000 + i, Guest: 80}}})
		if err == nil {
			o, err = sides[i%2].Await(t.Context(), o, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		ids[o.VM] = true
	}
	for round := range rounds() {
		var actors sync.WaitGroup
		for _, s := range sides {
			random := rand.New(rand.NewPCG(random.Uint64(), 0))
			actors.Go(func() {
				hosts, err := s.Hosts(t.Context())
				for ctx := t.Context(); err == nil; {
					var vms []api.VM
					if vms, err = s.VMs(ctx); err != nil || len(vms) == 0 {
						continue // the daemon is killed, or has no VM
					}
					vm := vms[random.IntN(len(vms))].ID
					var o api.Operation
					var oerr error
					switch random.IntN(8) {
					case 0, 1:
						o, oerr = s.Upgrade(ctx, vm)
					case 2:
						o, oerr = s.Stop(ctx, vm)
					case 3, 4:
						o, oerr = s.Start(ctx, vm)
					default:
						o, oerr = s.Move(ctx, vm, hosts[0].Name)
					}
					if oerr == nil && random.IntN(3) > 0 {
						_, _ = s.Await(ctx, o, nil) // it may not be possible, or be cut off
					}
				}
			})
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		killed := sides[random.IntN(2)]
		if err := killed.daemon.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		killed.daemon.Wait()
		time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
		start(killed)
		other := sides[0]
		if other == killed {
			other = sides[1]
		}
		other.daemon.Process.Kill() // so that its actor ends
		other.daemon.Wait()
		actors.Wait()
		start(other)
		for _, s := range sides {
			check(t, s.Client, s.dir)
		}
		await.None(t, "each VM is once", func() string {
			found := map[string]int{}
			for _, s := range sides {
				vms, err := s.VMs(t.Context())
				if err != nil {
					return err.Error()
				}
				for _, vm := range vms {
					found[vm.ID]++
				}
			}
			for id := range ids {
				if found[id] != 1 {
					return fmt.Sprintf("%s is %d times", id, found[id])
				}
			}
			return ""
		})
		if t.Failed() {
			t.Fatal("in round ", round)
		}
	}
	for _, s := range sides {
		vms, err := s.VMs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, vm := range vms {
			o, err := s.Remove(t.Context(), vm.ID, true)
			if err == nil {
				_, err = s.Await(t.Context(), o, nil)
			}
			if err != nil {
				t.Error(err)
			}
		}
		s.daemon.Process.Signal(syscall.SIGTERM)
		if err := s.daemon.Wait(); err != nil {
			t.Error(err)
		}
		if left := standIns(t, s.dir); len(left) > 0 {
			t.Error("left:", left)
		}
		if entries, err := os.ReadDir(filepath.Join(s.dir, "lib/vms")); err != nil || len(entries) > 0 {
			t.Error("left:", entries, err)
		}
	}
}

// A daemon that was killed before it had asked the other host for a move does not take an earlier arrival
// there for this one.
func TestEarlierArrival(t *testing.T) {
	d1, d2 := neighbour(t, "one"), neighbour(t, "two")
	token, err := d2.Token()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d1.AddHost(t.Context(), api.AddHost{Name: "two", Address: d2.config.Listen, Token: token.Token}); err != nil {
		t.Fatal(err)
	}
	o, err := d1.Run(api.Run{Image: "docker://image", Name: "it"})
	if err := d1.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	moves := func() int {
		t.Helper()
		vm, err := d1.VM("it")
		if err != nil {
			t.Fatal(err)
		}
		return vm.Moves
	}
	before := moves()
	o, err = d1.Move("it", "two")
	if err := d1.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if o, err := d2.Arrival(t.Context(), o.VM, before, time.Minute); err != nil || o.State != api.Done {
		t.Error("it has arrived:", o, err)
	}
	o, err = d2.Move("it", "one")
	if err := d2.done(t, o, err); err != nil {
		t.Fatal(err)
	}
	if o, err := d2.Arrival(t.Context(), o.VM, moves(), 0); !errors.Is(err, ErrNotFound) {
		t.Error("it has not arrived again:", o, err)
	}
	o, err = d1.Remove("it", true)
	if err := d1.done(t, o, err); err != nil {
		t.Error(err)
	}
}
