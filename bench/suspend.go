package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/redis/go-redis/v9"
)

// suspendWritten are the amounts that a guest writes before it is suspended, in MB.
var suspendWritten = []int{0, 100, 500}

// suspend measures a suspend of a Redis that has written some memory since its start: how long the
// command takes to end, and how long of that the guest stands still.
func (b *bench) suspend(ctx context.Context, rounds int) (err error) {
	end, err := b.network(ctx, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	pkg, err := b.snapshot(ctx, loadRedis, 1)
	if err != nil {
		return err
	}
	for range rounds {
		for _, mb := range suspendWritten {
			if err := b.suspendAfter(ctx, pkg, mb); err != nil {
				return fmt.Errorf("%d MB written: %w", mb, err)
			}
		}
	}
	return nil
}

func (b *bench) suspendAfter(ctx context.Context, pkg string, mb int) (err error) {
	instance := filepath.Join(b.dir, "instance")
	defer func() { err = errors.Join(err, os.RemoveAll(instance)) }()
	vm, err := b.startPeer(pkg, instance, "ark0")
	if err != nil {
		return err
	}
	_, err = vm.Await(ctx, "Resumed VM")
	if err == nil {
		err = fillRedis(ctx, 0, mb)
	}
	if err = errors.Join(err, vm.End()); err != nil {
		return err
	}
	suspended, err := vm.Await(ctx, "Suspended VM")
	if err != nil {
		return err
	}
	name := fmt.Sprintf("suspend_%d_", mb)
	b.add(name+"ms", ms(suspended.Took))
	b.add(name+"pause_ms", ms(suspended.Paused))
	return nil
}

// guestAddr is where the guest in a network namespace is reached from this host.
func guestAddr(number int) string { return fmt.Sprintf("10.0.15.%d:6379", number+1) }

// redisInMemory returns a client of the Redis in a network namespace, which stops to write to its
// disk: only memory is measured.
func redisInMemory(ctx context.Context, number int) (*redis.Client, error) {
	c := redis.NewClient(&redis.Options{Addr: guestAddr(number), DialTimeout: time.Second, ReadTimeout: time.Minute})
	for _, setting := range [][2]string{{"appendonly", "no"}, {"save", ""}} {
		if err := c.ConfigSet(ctx, setting[0], setting[1]).Err(); err != nil {
			return nil, errors.Join(fmt.Errorf("set %s of Redis: %w", setting[0], err), c.Close())
		}
	}
	return c, nil
}

// fillRedis writes so many MB to the memory of the Redis in a network namespace.
func fillRedis(ctx context.Context, number, mb int) (err error) {
	c, err := redisInMemory(ctx, number)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	random := rand.NewChaCha8([32]byte{})
	for i := range mb {
		value := make([]byte, 1e6)
		if _, err := random.Read(value); err != nil {
			return err
		}
		if err := c.Set(ctx, fmt.Sprint("value-", i), value, 0).Err(); err != nil {
			return fmt.Errorf("write %d MB to Redis: %w", mb, err)
		}
	}
	return nil
}
