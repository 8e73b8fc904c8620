package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// iptables-legacy keeps its rules apart from nftables'. A table is one blob of entries, which a
// socket option returns (linux/netfilter_ipv4/ip_tables.h, x_tables.h). Each entry is a struct
// ipt_entry, its extensions, and its target; the first of a chain and its policy are known by their
// offsets.

const (
	iptGetInfo    = 64 // IPT_SO_GET_INFO
	iptGetEntries = 65 // IPT_SO_GET_ENTRIES

	iptEntry = 112 // bytes of struct ipt_entry
	// bytes of struct xt_entry_match and xt_entry_target, which begin with size, name and revision
	iptHeader = 32

	iptGoto      = 0x02 // IPT_F_GOTO
	iptAccept    = -2   // verdicts are -NF_ACCEPT-1 and so on; those from 0 on are offsets
	iptDrop      = -1
	iptReturn    = -5
	iptInvertIn  = 0x01 // IPT_INV_VIA_IN
	iptInvertOut = 0x02
	iptInvertSrc = 0x08
	iptInvertDst = 0x10
)

// legacyTable is the filter table of iptables-legacy.
type legacyTable struct {
	entries []byte
	first   [5]uint32 // by hook, whose numbers are nftables'
	policy  [5]uint32
}

// readLegacy returns the filter table of the calling thread's network namespace, nil if there is
// none.
func readLegacy() (*legacyTable, error) {
	const path, filter = "/proc/thread-self/net/ip_tables_names", "filter"
	names, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// To ask for a table that is not there would make it.
	if !slices.Contains(strings.Fields(string(names)), filter) {
		return nil, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	const nameSize, infoSize, entriesAt = 32, 84, 40
	info := make([]byte, infoSize)
	copy(info, filter)
	if err := getOption(fd, iptGetInfo, info); err != nil {
		return nil, fmt.Errorf("read rules of iptables-legacy: %w", err)
	}
	t := &legacyTable{}
	for hook := range t.first {
		t.first[hook] = binary.NativeEndian.Uint32(info[36+4*hook:])
		t.policy[hook] = binary.NativeEndian.Uint32(info[56+4*hook:])
	}
	size := binary.NativeEndian.Uint32(info[80:])
	entries := make([]byte, entriesAt+int(size))
	copy(entries, filter)
	binary.NativeEndian.PutUint32(entries[nameSize:], size)
	if err := getOption(fd, iptGetEntries, entries); err != nil {
		return nil, fmt.Errorf("read rules of iptables-legacy: %w", err)
	}
	t.entries = entries[entriesAt:]
	return t, nil
}

func getOption(fd, option int, value []byte) error {
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_IP, uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// verdict returns what a chain does with a passage. As with nftables, a rule that cannot be
// evaluated counts as one that does not match.
func (t *legacyTable) verdict(p passage) int {
	v := t.chain(t.first[p.hook], p, 0)
	if v == returns {
		v = t.chain(t.policy[p.hook], p, 0)
	}
	return v
}

func (t *legacyTable) chain(at uint32, p passage, depth int) int {
	for int(at)+iptEntry <= len(t.entries) && depth < maxJumps {
		e := t.entries[at:]
		target, next := int(binary.NativeEndian.Uint16(e[88:])), int(binary.NativeEndian.Uint16(e[90:]))
		if target < iptEntry || next < target+iptHeader || next > len(e) {
			return goesOn // of a kernel that is not known here
		}
		if legacyMatches(e[:target], p) {
			switch action := e[target:next]; extensionName(action) {
			case "REJECT":
				return drops
			case "ERROR": // the end of the table
				return goesOn
			case "":
				if len(action) < iptHeader+4 {
					return goesOn
				}
				switch verdict := int32(binary.NativeEndian.Uint32(action[iptHeader:])); {
				case verdict == iptAccept:
					return accepts
				case verdict == iptDrop:
					return drops
				case verdict == iptReturn:
					return returns
				case verdict >= 0 && uint32(verdict) != at+uint32(next):
					inner := t.chain(uint32(verdict), p, depth+1)
					if inner == accepts || inner == drops || e[82]&iptGoto != 0 {
						return inner
					}
				}
			}
		}
		at += uint32(next)
	}
	return goesOn
}

// has tells whether there is a user's chain with this name. An ERROR target before the chain holds
// the name.
func (t *legacyTable) has(name string) bool {
	for at := 0; at+iptEntry <= len(t.entries); {
		e := t.entries[at:]
		target, next := int(binary.NativeEndian.Uint16(e[88:])), int(binary.NativeEndian.Uint16(e[90:]))
		if next < target+iptHeader || next > len(e) {
			return false
		}
		if action := e[target:next]; extensionName(action) == "ERROR" && text(action[iptHeader:]) == name {
			return true
		}
		at += next
	}
	return false
}

// legacyMatches tells whether an entry's addresses, interfaces and extensions match.
func legacyMatches(e []byte, p passage) bool {
	matches := func(value, want, mask []byte, invert byte) bool {
		same := true
		for i := range want {
			same = same && (value[i]^want[i])&mask[i] == 0
		}
		return same != (e[83]&invert != 0)
	}
	if !matches(p.src.To4(), e[0:4], e[8:12], iptInvertSrc) || !matches(p.dst.To4(), e[4:8], e[12:16], iptInvertDst) ||
		!matches(interfaceName(p.iif), e[16:32], e[48:64], iptInvertIn) || !matches(interfaceName(p.oif), e[32:48], e[64:80], iptInvertOut) {
		return false
	}
	if binary.NativeEndian.Uint16(e[80:]) != 0 {
		return false // a protocol: not all packets that guests need
	}
	for rest := e[iptEntry:]; len(rest) >= iptHeader; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < iptHeader || size > len(rest) {
			return false
		}
		data := rest[iptHeader:size]
		switch name := extensionName(rest); {
		case name == "comment":
		case name == "state" && len(data) >= 4:
			if !p.inState(uint16(binary.NativeEndian.Uint32(data)), false) {
				return false
			}
		case name == "conntrack" && len(data) >= 152: // struct xt_conntrack_mtinfo3
			flags, inverted := binary.NativeEndian.Uint16(data[146:]), binary.NativeEndian.Uint16(data[148:])
			if !onlyState(flags) || !p.inState(binary.NativeEndian.Uint16(data[150:]), inverted&1 != 0) {
				return false
			}
		default:
			return false
		}
		rest = rest[size:]
	}
	return true
}

func extensionName(e []byte) string { return text(e[2:31]) }

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// chainNames are the chains of the filter table.
var chainNames = map[nftables.ChainHook]string{
	*nftables.ChainHookInput: "INPUT", *nftables.ChainHookForward: "FORWARD", *nftables.ChainHookOutput: "OUTPUT",
}
