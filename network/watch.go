package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Others change a host's network, too: a firewall is loaded anew and flushes all tables, a network
// service removes routes that it does not know, an administrator turns forwarding off. NAT and
// forwarder look after what they have made, and put it back.

// lookInterval is between looks for changes that no notification tells. A variable for the tests.
var lookInterval = 3 * time.Second

// lookPause is between two looks, however many changes there are.
const lookPause = 100 * time.Millisecond

// watch calls a function after each change of the host's nftables rules, and every lookInterval.
type watch struct {
	cancel context.CancelFunc
	conn   *netlink.Conn
	wait   sync.WaitGroup
}

// startWatch starts a watch of the calling thread's network namespace. The calls of look come one
// after the other.
func startWatch(look func()) (*watch, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("watch nftables rules: %w", err)
	}
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return nil, errors.Join(fmt.Errorf("watch nftables rules: %w", err), conn.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	w := &watch{cancel: cancel, conn: conn}
	changed := make(chan struct{}, 1)
	w.wait.Go(func() {
		for {
			// ENOBUFS: so many changes that some notifications were lost.
			if _, err := conn.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return // closed; if it failed, there are the looks in intervals
			}
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	})
	w.wait.Go(func() {
		for {
			select {
			case <-changed:
			case <-time.After(lookInterval):
			case <-ctx.Done():
				return
			}
			look()
			select {
			case <-time.After(lookPause):
			case <-ctx.Done():
				return
			}
		}
	})
	return w, nil
}

// Close waits until the last look has ended. A nil watch is closed.
func (w *watch) Close() error {
	if w == nil {
		return nil
	}
	w.cancel()
	err := w.conn.Close()
	w.wait.Wait()
	return err
}

// news logs what a look finds, once until it changes.
type news struct {
	log  *slog.Logger
	said map[string]string // subject to the last line about it
}

func newNews(log *slog.Logger) *news { return &news{log, map[string]string{}} }

// say logs a line about a subject, unless that was the last one about it. "" says that there is
// nothing to say any more.
func (n *news) say(subject, line string, args ...any) {
	text := line
	if line != "" {
		text = fmt.Sprint(append([]any{line}, args...)...)
	}
	if n.said[subject] == text {
		return
	}
	n.said[subject] = text
	if line != "" {
		n.log.Warn(line, args...) //nolint:sloglint // the caller's
	}
}

// mended logs what was put back, or why it cannot be.
func (n *news) mended(what string, done bool, err error) {
	if err != nil {
		n.say(what, "Somebody has removed or changed what is ours, and it cannot be put back", "what", what, "error", err)
		return
	}
	n.say(what, "")
	if done {
		n.log.Warn("Put back what somebody has removed or changed", "what", what)
	}
}

// keepSysctl sets a kernel parameter of the calling thread's network namespace if it has another
// value. One that this kernel has not is as good.
func keepSysctl(name, value string) (changed bool, err error) {
	b, err := os.ReadFile("/proc/sys/" + name)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read kernel parameter: %w", err)
	}
	if strings.TrimSpace(string(b)) == value {
		return false, nil
	}
	return true, setSysctl(name, value)
}

// applied is a table of ours as the kernel had it when it was applied.
type applied struct {
	family     byte
	table      string
	state      []string
	generation uint32 // when it was last like that
}

// note notes how the table is, just after it was applied.
func (a *applied) note() (err error) {
	if a.generation, err = generation(); err != nil {
		return err
	}
	a.state, err = tableState(a.family, a.table)
	return err
}

// intact tells whether nobody has removed or changed the table since.
func (a *applied) intact() (bool, error) {
	now, err := generation()
	if err != nil || now == a.generation {
		return true, err
	}
	state, err := tableState(a.family, a.table)
	if err != nil || !slices.Equal(state, a.state) {
		return false, err
	}
	a.generation = now
	return true, nil
}

// generation is a number that differs after each change of nftables' rules, in the calling thread's
// network namespace.
func generation() (uint32, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("read nftables rules: %w", err)
	}
	defer conn.Close()
	messages, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil || len(messages) == 0 {
		return 0, fmt.Errorf("read the generation of nftables' rules: %w", err)
	}
	d, err := netlink.NewAttributeDecoder(messages[0].Data[4:])
	if err != nil {
		return 0, fmt.Errorf("read the generation of nftables' rules: %w", err)
	}
	d.ByteOrder = binary.BigEndian
	number := uint32(0)
	for d.Next() {
		if d.Type() == unix.NFTA_GEN_ID {
			number = d.Uint32()
		}
	}
	return number, d.Err()
}

// tableState is all that the kernel holds of a family's table of the calling thread's network
// namespace, in an order of its own, but for what packets change: the elements of dynamic sets. It
// is empty if there is no such table.
func tableState(family byte, table string) (state []string, err error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("read nftables rules: %w", err)
	}
	defer conn.Close()
	t := tableReader{conn, family, table}
	for _, message := range []uint16{unix.NFT_MSG_GETTABLE, unix.NFT_MSG_GETCHAIN, unix.NFT_MSG_GETRULE, unix.NFT_MSG_GETOBJ, unix.NFT_MSG_GETSET} {
		objects, err := t.objects(message)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			if message != unix.NFT_MSG_GETSET {
				state = append(state, o.content)
				continue
			}
			if o.dynamic {
				continue
			}
			elements, err := t.elements(o.set)
			if err != nil {
				return nil, err
			}
			state = append(state, elements...)
		}
	}
	slices.Sort(state)
	return state, nil
}

// The first attribute of all that a table consists of is the table's name, the second of a set its
// own (nf_tables.h).
const (
	attributeTable    = unix.NFTA_SET_TABLE
	attributeSet      = unix.NFTA_SET_NAME
	attributeSetFlags = unix.NFTA_SET_FLAGS
)

// tableReader reads what the kernel holds of a table.
type tableReader struct {
	conn   *netlink.Conn
	family byte
	table  string
}

// tableObject is one chain, rule, set, … of a table.
type tableObject struct {
	content string // as the kernel tells it
	set     []byte // name of a set
	dynamic bool   // it is a set that packets change
}

// objects lists those of a kind, which is told by the message that asks for them.
func (t tableReader) objects(message uint16) (list []tableObject, err error) {
	var filter []netlink.Attribute
	if message != unix.NFT_MSG_GETTABLE {
		filter = append(filter, t.name()) // an older kernel does not look at it
	}
	messages, err := t.dump(message, filter...)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		// before it is the number of the last change of any table
		o, in := tableObject{content: string(m.Data[4:])}, ""
		err := attributes(m, func(d *netlink.AttributeDecoder) {
			switch d.Type() {
			case attributeTable:
				in = d.String()
			case attributeSet:
				o.set = d.Bytes()
			case attributeSetFlags:
				o.dynamic = message == unix.NFT_MSG_GETSET && len(d.Bytes()) == 4 && d.Bytes()[3]&unix.NFT_SET_EVAL != 0
			}
		})
		if err != nil {
			return nil, err
		}
		if in == t.table {
			list = append(list, o)
		}
	}
	return list, nil
}

// elements lists those of a set.
func (t tableReader) elements(set []byte) (list []string, err error) {
	messages, err := t.dump(unix.NFT_MSG_GETSETELEM, t.name(), netlink.Attribute{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: set})
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		err := attributes(m, func(d *netlink.AttributeDecoder) {
			if d.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					list = append(list, string(set)+string(d.Bytes()))
				}
				return d.Err()
			})
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

// attributes calls each for the attributes of a message.
func attributes(m netlink.Message, each func(d *netlink.AttributeDecoder)) error {
	d, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return fmt.Errorf("read nftables rules: %w", err)
	}
	for d.Next() {
		each(d)
	}
	if err := d.Err(); err != nil {
		return fmt.Errorf("read nftables rules: %w", err)
	}
	return nil
}

func (t tableReader) name() netlink.Attribute {
	return netlink.Attribute{Type: attributeTable, Data: append([]byte(t.table), 0)}
}

// dump asks for all objects of a kind; there are none of a table that is gone.
func (t tableReader) dump(message uint16, filter ...netlink.Attribute) ([]netlink.Message, error) {
	attributes, err := netlink.MarshalAttributes(filter)
	if err != nil {
		return nil, err
	}
	messages, err := t.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | message), Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{t.family, unix.NFNETLINK_V0, 0, 0}, attributes...),
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read nftables rules: %w", err)
	}
	return messages, nil
}
