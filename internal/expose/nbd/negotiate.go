package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Negotiation.
const (
	magicServer  = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption  = 0x49484156454f5054 // "IHAVEOPT"
	magicReply   = 0x3e889045565a9
	flagFixed    = 1 << 0
	flagNoZeroes = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMeta        = 9
	optSetMeta         = 10

	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4
	repUnsupported = 1<<31 | 1
	repInvalid     = 1<<31 | 3
	repUnknown     = 1<<31 | 6
	repTooBig      = 1<<31 | 9

	infoExport    = 0
	infoBlockSize = 3
)

// Transmission flags.
const (
	hasFlags        = 1 << 0
	readOnly        = 1 << 1
	sendFlush       = 1 << 2
	sendFUA         = 1 << 3
	sendTrim        = 1 << 5
	sendWriteZeroes = 1 << 6
	sendDF          = 1 << 7
	canMultiConn    = 1 << 8
)

const (
	allocationContext = "base:allocation"
	allocationID      = 1
)

func (e *Export) flags(structured bool) uint16 {
	// Sync covers what came over every connection, so several may share a device.
	flags := uint16(hasFlags | sendFlush | sendFUA | sendTrim | sendWriteZeroes | canMultiConn)
	if structured {
		flags |= sendDF
	}
	if e.ReadOnly {
		flags |= readOnly
	}
	return flags
}

// negotiate returns the export the client chose, or nil if it wanted none.
func (c *connection) negotiate() (*Export, error) {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixed|flagNoZeroes)
	if _, err := c.conn.Write(hello); err != nil {
		return nil, err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.r, flags[:]); err != nil {
		return nil, err
	}
	f := binary.BigEndian.Uint32(flags[:])
	if f&^uint32(flagFixed|flagNoZeroes) != 0 {
		return nil, fmt.Errorf("client flags %#x are unknown", f)
	}
	c.noZeroes = f&flagNoZeroes != 0
	for {
		var header [16]byte
		if _, err := io.ReadFull(c.r, header[:]); err != nil {
			return nil, err
		}
		if binary.BigEndian.Uint64(header[:]) != magicOption {
			return nil, errors.New("this is no NBD client")
		}
		option, length := binary.BigEndian.Uint32(header[8:]), binary.BigEndian.Uint32(header[12:])
		if length > maxOption {
			if option == optExportName || length > maxRequest {
				return nil, fmt.Errorf("option %d has %d bytes", option, length)
			}
			if _, err := io.CopyN(io.Discard, c.r, int64(length)); err != nil {
				return nil, err
			}
			if err := c.reply(option, repTooBig, nil); err != nil {
				return nil, err
			}
			continue
		}
		data := make([]byte, length)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return nil, err
		}
		if export, done, err := c.option(option, data); err != nil || done {
			return export, err
		}
	}
}

// option answers one option; done ends the negotiation.
func (c *connection) option(option uint32, data []byte) (export *Export, done bool, err error) {
	switch option {
	case optExportName:
		export = c.find(string(data))
		if export == nil {
			return nil, true, fmt.Errorf("export %q does not exist", data)
		}
		answer := binary.BigEndian.AppendUint64(nil, uint64(export.Device.Size()))
		answer = binary.BigEndian.AppendUint16(answer, export.flags(c.structured))
		if !c.noZeroes {
			answer = append(answer, make([]byte, 124)...)
		}
		_, err = c.conn.Write(answer)
		return export, true, err
	case optAbort:
		return nil, true, c.reply(option, repAck, nil)
	case optList:
		if len(data) != 0 {
			return nil, false, c.reply(option, repInvalid, nil)
		}
		for i := range c.exports {
			if err := c.reply(option, repServer, sized(c.exports[i].Name)); err != nil {
				return nil, false, err
			}
		}
		return nil, false, c.reply(option, repAck, nil)
	case optInfo, optGo:
		return c.info(option, data)
	case optStructuredReply:
		if len(data) != 0 {
			return nil, false, c.reply(option, repInvalid, nil)
		}
		c.structured = true
		return nil, false, c.reply(option, repAck, nil)
	case optListMeta, optSetMeta:
		return nil, false, c.metaContext(option, data)
	}
	return nil, false, c.reply(option, repUnsupported, nil)
}

func (c *connection) find(name string) *Export {
	for i := range c.exports {
		if c.exports[i].Name == name || name == "" {
			return &c.exports[i]
		}
	}
	return nil
}

func sized(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }

// takeString cuts a string with its length from data.
func takeString(data []byte) (s string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if n > maxName || int(n) > len(data)-4 {
		return "", nil, false
	}
	return string(data[4 : 4+n]), data[4+n:], true
}

func (c *connection) reply(option, kind uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := c.conn.Write(append(b, data...))
	return err
}

func (c *connection) info(option uint32, data []byte) (*Export, bool, error) {
	name, rest, ok := takeString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return nil, false, c.reply(option, repInvalid, nil)
	}
	export := c.find(name)
	if export == nil {
		return nil, false, c.reply(option, repUnknown, []byte("export does not exist"))
	}
	about := binary.BigEndian.AppendUint16(nil, infoExport)
	about = binary.BigEndian.AppendUint64(about, uint64(export.Device.Size()))
	about = binary.BigEndian.AppendUint16(about, export.flags(c.structured))
	sizes := binary.BigEndian.AppendUint16(nil, infoBlockSize)
	for _, n := range []uint32{1, 4096, maxRequest} {
		sizes = binary.BigEndian.AppendUint32(sizes, n)
	}
	err := errors.Join(c.reply(option, repInfo, about), c.reply(option, repInfo, sizes), c.reply(option, repAck, nil))
	return export, option == optGo, err
}

func (c *connection) metaContext(option uint32, data []byte) error {
	name, rest, ok := takeString(data)
	if !ok || len(rest) < 4 || !c.structured {
		return c.reply(option, repInvalid, nil)
	}
	if c.find(name) == nil {
		return c.reply(option, repUnknown, nil)
	}
	n := binary.BigEndian.Uint32(rest)
	wanted := n == 0 && option == optListMeta
	rest = rest[4:]
	for range n {
		var query string
		if query, rest, ok = takeString(rest); !ok {
			return c.reply(option, repInvalid, nil)
		}
		wanted = wanted || query == allocationContext || option == optListMeta && query == "base:"
	}
	if option == optSetMeta {
		c.allocation = wanted
	}
	if wanted {
		id := binary.BigEndian.AppendUint32(nil, allocationID)
		if err := c.reply(option, repMetaContext, append(id, allocationContext...)); err != nil {
			return err
		}
	}
	return c.reply(option, repAck, nil)
}
