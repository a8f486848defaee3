// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/labfile/lab/internal/lab"
)

const (
	// maxFrame is the longest frame that QEMU's stream netdev sends or takes
	// (NET_BUFSIZE in its include/net/net.h). A longer one means that the two
	// ends no longer agree where frames begin.
	maxFrame = 4096 + 65536

	// maxQueue bounds the bytes that wait for a guest to read them. What does
	// not fit is dropped, as a real switch does, so that a guest that stops
	// reading costs the others nothing.
	maxQueue = 512 << 10

	// maxFlows bounds the connections that one guest has to the outside at a
	// time, by transport: each costs the host a descriptor.
	maxTCPFlows = 1024
	maxUDPFlows = 256
)

// FrameError says that a cable carried the length of a frame that cannot be.
type FrameError struct {
	Machine lab.Name
	Length  uint32
}

func (e *FrameError) Error() string {
	return fmt.Sprintf("machine %q announced a frame of %d bytes, more than the %d that are possible", e.Machine, e.Length, maxFrame)
}

// Counters tell what went through a port. In is from the guest, Out is to it.
type Counters struct {
	FramesIn  uint64 `json:"frames_in"`
	BytesIn   uint64 `json:"bytes_in"`
	FramesOut uint64 `json:"frames_out"`
	BytesOut  uint64 `json:"bytes_out"`
	Dropped   uint64 `json:"dropped"` // frames to the guest that it did not read in time
	Refused   uint64 `json:"refused"` // frames from the guest that it may not send
}

// Port is where a machine is plugged in.
type Port struct {
	sw   *Switch
	name lab.Name
	addr netip.Addr
	host byte // last byte of addr
	conn net.Conn
	seat *seat // set before the port starts

	ctx    context.Context // ends when the cable is gone; its cause says why
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when the port's goroutines have ended

	mu      sync.Mutex
	pending []byte        // whole frames behind their lengths, to be written next
	kick    chan struct{} // tells the writer that pending is no longer empty

	framesIn, bytesIn, framesOut, bytesOut, dropped, refused atomic.Uint64
	told                                                     atomic.Uint32 // refusals already logged, a bit each
	active                                                   atomic.Int64  // see LastActive; nanoseconds since 1970

	tcpFlows, udpFlows flowLimit
}

func newPort(s *Switch, name lab.Name, addr netip.Addr, host byte, conn net.Conn) *Port {
	p := &Port{
		sw: s, name: name, addr: addr, host: host, conn: conn,
		done:     make(chan struct{}),
		kick:     make(chan struct{}, 1),
		tcpFlows: flowLimit{max: maxTCPFlows},
		udpFlows: flowLimit{max: maxUDPFlows},
	}
	p.ctx, p.cancel = context.WithCancelCause(s.ctx)
	return p
}

// Name returns the name of the machine.
func (p *Port) Name() lab.Name { return p.name }

// Addr returns the address of the machine.
func (p *Port) Addr() netip.Addr { return p.addr }

// Done is closed once the cable is gone and nothing of the port runs any more.
func (p *Port) Done() <-chan struct{} { return p.done }

// Err says why the cable is gone: ErrUnplugged, ErrReplaced, ErrClosed, io.EOF if
// the machine's end closed it, a *FrameError, or what reading or writing
// returned. It is nil while the machine is plugged in.
func (p *Port) Err() error { return context.Cause(p.ctx) }

// Unplug pulls the cable, gives up the machine's place at its address, and waits
// until the cable is out. It may be called again.
func (p *Port) Unplug() {
	p.vacate()
	p.fail(ErrUnplugged)
	<-p.done
}

// Counters returns what went through the port so far.
func (p *Port) Counters() Counters {
	return Counters{
		FramesIn: p.framesIn.Load(), BytesIn: p.bytesIn.Load(),
		FramesOut: p.framesOut.Load(), BytesOut: p.bytesOut.Load(),
		Dropped: p.dropped.Load(), Refused: p.refused.Load(),
	}
}

// fail ends the port for a reason; the first one counts.
func (p *Port) fail(reason error) { p.cancel(reason) }

// start runs the port until its cable is gone. Called with the switch locked.
func (p *Port) start(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		p.vacate()
		p.fail(ErrUnplugged)
	})
	context.AfterFunc(p.ctx, func() { p.conn.Close() })
	var pumps sync.WaitGroup
	pumps.Go(func() { p.fail(p.readFrames()) })
	pumps.Go(func() { p.fail(p.writeFrames()) })
	p.sw.wg.Go(func() {
		pumps.Wait()
		stop()
		p.sw.ports[p.host].CompareAndSwap(p, nil)
		p.seat.port.CompareAndSwap(p, nil)
		p.sw.log.Debug("cable out", "machine", p.name, "reason", p.Err())
		close(p.done)
	})
	p.sw.log.Debug("cable in", "machine", p.name, "addr", p.addr)
}

// readFrames takes frames from the guest until the cable is gone.
func (p *Port) readFrames() error {
	r := bufio.NewReaderSize(p.conn, 4+maxFrame)
	for {
		head, err := r.Peek(4)
		if err != nil {
			return cableError(err, len(head))
		}
		n := binary.BigEndian.Uint32(head)
		if n > maxFrame {
			return &FrameError{Machine: p.name, Length: n}
		}
		frame, err := r.Peek(4 + int(n))
		if err != nil {
			return cableError(err, len(frame))
		}
		frame = frame[4:]
		p.framesIn.Add(1)
		p.bytesIn.Add(uint64(n))
		if why := p.sw.inspect(p.host, frame); why != 0 {
			p.refuse(why)
		} else {
			p.sw.fromPort(p, frame)
		}
		if _, err := r.Discard(4 + int(n)); err != nil {
			return err
		}
	}
}

// cableError tells a cable that was closed between frames from one that broke
// off within a frame.
func cableError(err error, partial int) error {
	if errors.Is(err, io.EOF) && partial > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}

// refuse counts a frame that was dropped for a reason, and logs the reason the
// first time: a hostile guest could fill the log otherwise.
func (p *Port) refuse(why refusal) {
	p.refused.Add(1)
	bit := uint32(1) << why
	if p.told.Or(bit)&bit == 0 {
		p.sw.log.Info("refusing frames", "machine", p.name, "reason", why)
	}
}

// send queues a frame, given in parts, for the guest. It never blocks: a frame
// that does not fit is dropped.
func (p *Port) send(parts ...[]byte) {
	n := 0
	for _, b := range parts {
		n += len(b)
	}
	p.mu.Lock()
	if len(p.pending)+4+n > maxQueue || p.ctx.Err() != nil {
		p.mu.Unlock()
		p.dropped.Add(1)
		return
	}
	p.pending = binary.BigEndian.AppendUint32(p.pending, uint32(n))
	for _, b := range parts {
		p.pending = append(p.pending, b...)
	}
	p.mu.Unlock()
	p.framesOut.Add(1)
	p.bytesOut.Add(uint64(n))
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// writeFrames writes what is queued until the cable is gone. Two buffers take
// turns, so a burst of frames is one write and no frame is ever written in part.
func (p *Port) writeFrames() error {
	var writing []byte
	for {
		select {
		case <-p.kick:
		case <-p.ctx.Done():
			return context.Cause(p.ctx)
		}
		p.mu.Lock()
		writing, p.pending = p.pending, writing[:0]
		p.mu.Unlock()
		if _, err := p.conn.Write(writing); err != nil {
			return err
		}
	}
}

// tie makes c end with the port.
func (p *Port) tie(c net.Conn) net.Conn {
	t := &tiedConn{Conn: c}
	t.untie = context.AfterFunc(p.ctx, t.cut)
	return t
}

// tiedConn is a connection with a guest that ends when the guest is unplugged.
type tiedConn struct {
	net.Conn
	untie func() bool
}

// cut ends the connection from outside: the deadline wakes whoever reads or
// writes, which closing alone does not promise.
func (c *tiedConn) cut() {
	_ = c.Conn.SetDeadline(past)
	_ = c.Conn.Close()
}

func (c *tiedConn) Close() error {
	c.untie()
	_ = c.Conn.SetDeadline(past)
	return c.Conn.Close()
}

// CloseWrite tells the guest that nothing more comes (TCP's half-close).
func (c *tiedConn) CloseWrite() error { return closeWrite(c.Conn) }

// flowLimit counts what a guest has open.
type flowLimit struct {
	max  int32
	open atomic.Int32
}

func (l *flowLimit) take() bool {
	if l.open.Add(1) > l.max {
		l.open.Add(-1)
		return false
	}
	return true
}

func (l *flowLimit) give() { l.open.Add(-1) }
