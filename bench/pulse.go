package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// pulse is when a guest was seen to run, from outside.
type pulse struct {
	mu    sync.Mutex
	times []time.Time
}

func (p *pulse) note() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.times = append(p.times, time.Now())
}

// Write makes a pulse of what a guest shows on its console.
func (p *pulse) Write(b []byte) (int, error) {
	p.note()
	return len(b), nil
}

// first is when the guest was first seen after a moment. It waits that long for it.
func (p *pulse) first(after time.Time, wait time.Duration) (time.Time, error) {
	for deadline := time.Now().Add(wait); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		p.mu.Lock()
		i := slices.IndexFunc(p.times, func(t time.Time) bool { return t.After(after) })
		p.mu.Unlock()
		if i >= 0 {
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.times[i], nil
		}
	}
	return time.Time{}, errors.New("the guest is silent")
}

// silence is the time between two signs of life.
type silence struct{ from, to time.Time }

func (s silence) length() time.Duration { return s.to.Sub(s.from) }

// silences are in the order of time.
type silences []silence

// between returns the silences that a span of time touches. One that still goes on counts up to the
// span's end.
func (p *pulse) between(from, to time.Time) silences {
	p.mu.Lock()
	defer p.mu.Unlock()
	var s silences
	for i := 1; i < len(p.times); i++ {
		if p.times[i].After(from) && p.times[i-1].Before(to) {
			s = append(s, silence{p.times[i-1], p.times[i]})
		}
	}
	if n := len(p.times); n > 0 && p.times[n-1].Before(to) {
		s = append(s, silence{p.times[n-1], to})
	}
	return s
}

// percentile is 0 when there is none.
func (s silences) percentile(percent int) time.Duration {
	if len(s) == 0 {
		return 0
	}
	lengths := make([]time.Duration, len(s))
	for i := range s {
		lengths[i] = s[i].length()
	}
	slices.Sort(lengths)
	return lengths[min(len(lengths)-1, len(lengths)*percent/100)]
}

func (s silences) longest() time.Duration { return s.percentile(100) }

// split divides silences by the pause of a move: before it, those that it touches, and after it.
func (s silences) split(paused, resumed time.Time) (before, handoff, after silences) {
	for _, q := range s {
		switch {
		case q.to.Before(paused):
			before = append(before, q)
		case q.from.After(resumed):
			after = append(after, q)
		default:
			handoff = append(handoff, q)
		}
	}
	return before, handoff, after
}

// watcher sees a guest from outside until it is closed.
type watcher struct {
	pulse
	stop func() error
	wg   sync.WaitGroup
}

func (w *watcher) close() error {
	err := w.stop()
	w.wg.Wait()
	return err
}

// watchTicks listens for what load.c sends.
func watchTicks() (*watcher, error) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{Port: tickPort})
	if err != nil {
		return nil, err
	}
	w := &watcher{stop: conn.Close}
	w.wg.Go(func() {
		b := make([]byte, 100)
		for {
			if _, _, err := conn.ReadFromUDP(b); err != nil {
				return // closed
			}
			w.note()
		}
	})
	return w, nil
}

// What a client of Redis writes: a value of this many bytes under one of so many keys.
const (
	redisValue = 1 << 10
	redisKeys  = 20_000
)

// watchRedis writes to a Redis, each time as soon as the last write was acknowledged, wherever the
// guest is at that time: at one address of several.
func watchRedis(ctx context.Context, addrs ...string) *watcher {
	ctx, cancel := context.WithCancel(ctx)
	w := &watcher{stop: func() error { cancel(); return nil }}
	for _, addr := range addrs {
		w.wg.Go(func() {
			connect := func() *redis.Client {
				return redis.NewClient(&redis.Options{Addr: addr, MaxRetries: -1, PoolSize: 1, Dialer: dialEagerly, DialerRetries: 1, ReadTimeout: 2 * time.Second, WriteTimeout: 2 * time.Second})
			}
			client := connect()
			defer func() { client.Close() }()
			value := make([]byte, redisValue)
			for n := 0; ctx.Err() == nil; n++ {
				copy(value, fmt.Sprint(n))
				if client.Set(ctx, fmt.Sprint("key-", n%redisKeys), value, 0).Err() == nil {
					w.note()
					continue
				}
				// One that could not connect tries again only after a second.
				client.Close()
				client = connect()
			}
		})
	}
	return w
}

// dialEagerly connects to where nobody may be yet. The kernel repeats an attempt that nobody
// answers only after a second (RFC 6298), so another one begins every 50 ms.
func dialEagerly(ctx context.Context, network, addr string) (net.Conn, error) {
	return dialEvery(ctx, 50*time.Millisecond, network, addr)
}

// dialEvery begins an attempt to connect after every interval, for at most a second.
func dialEvery(ctx context.Context, interval time.Duration, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	var attempts sync.WaitGroup
	defer attempts.Wait()
	defer cancel()
	conns := make(chan net.Conn)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		attempts.Go(func() {
			conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err != nil {
				return // another attempt may get through
			}
			select {
			case conns <- conn:
			case <-ctx.Done():
				conn.Close()
			}
		})
		select {
		case conn := <-conns:
			return conn, nil
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
