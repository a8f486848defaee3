// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"slices"

	"github.com/digitalocean/go-libvirt/socket"
)

// packets reads what the daemon says, packet by packet, and hands it on in an order that
// go-libvirt understands. The daemon may send the first data of a stream before the reply
// to the call that opened it, which libvirt's own client tells apart by their kinds.
// go-libvirt takes what comes first for the reply, loses data, and stops reading for ever
// when something comes for a call that has ended. Nor does it finish what the daemon has
// ended, which the daemon keeps files open for.
type packets struct {
	from *bufio.Reader
	out  []byte // what is read and not handed on yet

	finish func(header) // is called when the daemon has ended a stream

	calls map[uint32]*call // by serial number
	order []uint32         // the serial numbers, oldest first
}

// call is what is known of a call: all but those with streams are forgotten soon.
type call struct {
	replied bool
	stream  bool   // it has one
	held    []byte // the stream's packets that came before the reply
	ended   bool   // the stream
}

// recentCalls is how many calls are remembered.
const recentCalls = 256

// maxPacket is the most that libvirt sends (virnetprotocol.x, VIR_NET_MESSAGE_MAX), with
// room for the length.
const maxPacket = 32<<20 + 4

func newPackets(r io.Reader, finish func(header)) *packets {
	return &packets{from: bufio.NewReaderSize(r, 64<<10), finish: finish, calls: map[uint32]*call{}}
}

func (p *packets) Read(b []byte) (int, error) {
	for len(p.out) == 0 {
		if err := p.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, p.out)
	p.out = p.out[n:]
	return n, nil
}

// next reads a packet.
func (p *packets) next() error {
	var head [headerSize]byte
	if n, err := io.ReadFull(p.from, head[:]); err == io.ErrUnexpectedEOF && len(p.calls) == 0 { // nothing was answered yet
		return foreign(head[:n])
	} else if err != nil {
		return err
	}
	h := readHeader(&head)
	if h.length < headerSize || h.length > maxPacket {
		rest, _ := p.from.Peek(p.from.Buffered())
		return foreign(append(head[:], rest...))
	}
	packet := make([]byte, h.length)
	copy(packet, head[:])
	if _, err := io.ReadFull(p.from, packet[headerSize:]); err != nil {
		return err
	}
	switch h.kind {
	case socket.Reply:
		c := p.call(h.serial)
		c.replied = true
		p.out = append(packet, c.held...)
		c.held = nil
	case socket.Stream:
		c := p.call(h.serial)
		c.stream = true
		switch {
		case c.ended:
			return nil
		case h.status == socket.StatusContinue && h.length == headerSize:
			p.finish(h)
			c.ended = true
		case h.status != socket.StatusContinue:
			c.ended = true
		}
		if c.replied {
			p.out = packet
		} else {
			c.held = append(c.held, packet...)
		}
	default:
		p.out = packet
	}
	return nil
}

// foreign is the error of what is not from libvirt: a greeting that a shell prints, a server
// of something else.
func foreign(b []byte) error {
	line, _, _ := bytes.Cut(bytes.TrimSpace(b), []byte("\n"))
	return fmt.Errorf("what comes from there is not libvirt's protocol: %.80q", bytes.TrimSpace(line))
}

// call returns what is known of a call, and forgets an old one whose stream is not open.
func (p *packets) call(serial uint32) *call {
	if c := p.calls[serial]; c != nil {
		return c
	}
	c := &call{}
	p.calls[serial] = c
	p.order = append(p.order, serial)
	if len(p.order) > recentCalls {
		old := slices.IndexFunc(p.order, func(serial uint32) bool { return !p.calls[serial].open() })
		if old >= 0 && p.order[old] != serial {
			delete(p.calls, p.order[old])
			p.order = slices.Delete(p.order, old, old+1)
		}
	}
	return c
}

// open reports whether more may come on the call's stream.
func (c *call) open() bool { return c.stream && !c.ended }
