// SPDX-License-Identifier: Apache-2.0

package network

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// listenDiscard makes the guest swallow what it is sent on a TCP port.
func (g *guest) listenDiscard(b *testing.B, port uint16) {
	b.Helper()
	ln, err := gonet.ListenTCP(g.stack, fullAddr(netip.AddrPortFrom(g.addr, port)), ipv4.ProtocolNumber)
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 256<<10)
				for {
					if _, err := c.Read(buf); err != nil {
						return
					}
				}
			}()
		}
	}()
	b.Cleanup(func() { ln.Shutdown(); <-done; ln.Close() })
}

// stream measures writing to c, whose other end swallows it. The last byte
// counts only once the other end has closed, having read everything.
func stream(b *testing.B, c net.Conn) {
	chunk := make([]byte, 256<<10)
	b.SetBytes(int64(len(chunk)))
	b.ResetTimer()
	for b.Loop() {
		if _, err := c.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	if err := closeWrite(c); err != nil {
		b.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		b.Fatal(err)
	}
}

func BenchmarkGuestToGuest(b *testing.B) {
	s := newSwitch(b, Config{})
	from, to := plugGuest(b, s, "a", 10), plugGuest(b, s, "b", 11)
	to.listenDiscard(b, 80)
	c, err := from.dial(b.Context(), netip.AddrPortFrom(to.addr, 80))
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	stream(b, c)
}

func BenchmarkHostToGuest(b *testing.B) {
	s := newSwitch(b, Config{})
	to := plugGuest(b, s, "b", 11)
	to.listenDiscard(b, 80)
	c, err := s.DialTCP(b.Context(), to.addr, 80)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	stream(b, c)
}

// The switch alone: frames from one cable to another, no TCP/IP of ours.
func BenchmarkFrames(b *testing.B) {
	s := newSwitch(b, Config{})
	_, from := plugRaw(b, s, "a", 10)
	_, to := plugRaw(b, s, "b", 11)
	go func() { _, _ = io.Copy(io.Discard, to.conn) }()
	frame := ipFrame(10, testNet.Host(11), macOf(11), make([]byte, 1400))
	b.SetBytes(int64(len(frame)))
	for b.Loop() {
		from.send(frame)
	}
}
