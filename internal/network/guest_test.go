// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/labfile/lab/internal/lab"
)

// patience bounds what a test waits for; it is only ever used up by a failure.
const patience = 20 * time.Second

var testNet = lab.NetworkOf("shop-1f3a9c2b")

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// newSwitch returns a switch that the test's end closes.
func newSwitch(t testing.TB, cfg Config) *Switch {
	t.Helper()
	cfg.Network = testNet
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	if cfg.Resolvers == nil {
		cfg.Resolvers = func() []netip.AddrPort { return nil }
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// cable returns the two ends of a unix stream connection, as QEMU's is one.
func cable(t testing.TB) (switchEnd, guestEnd net.Conn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "net")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if guestEnd, err = net.Dial("unix", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if switchEnd, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { guestEnd.Close(); switchEnd.Close() })
	return switchEnd, guestEnd
}

// plugRaw plugs in a machine that the test itself speaks for, frame by frame.
func plugRaw(t testing.TB, s *Switch, name lab.Name, host byte) (*Port, *rawGuest) {
	t.Helper()
	sw, gu := cable(t)
	p, err := s.Plug(context.Background(), name, testNet.Host(host), sw)
	if err != nil {
		t.Fatal(err)
	}
	return p, &rawGuest{t: t, conn: gu, r: bufio.NewReader(gu), host: host}
}

type rawGuest struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
	host byte
}

func (g *rawGuest) mac() net.HardwareAddr { return macOf(g.host) }

func macOf(host byte) net.HardwareAddr {
	hw, err := net.ParseMAC(lab.MACOf(testNet.Host(host)))
	if err != nil {
		panic(err)
	}
	return hw
}

func (g *rawGuest) send(frame []byte) {
	g.t.Helper()
	if _, err := g.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
		g.t.Fatal(err)
	}
}

// next returns the next frame to the guest.
func (g *rawGuest) next() []byte {
	g.t.Helper()
	_ = g.conn.SetReadDeadline(time.Now().Add(patience))
	var n [4]byte
	if _, err := io.ReadFull(g.r, n[:]); err != nil {
		g.t.Fatal(err)
	}
	b := make([]byte, binary.BigEndian.Uint32(n[:]))
	if _, err := io.ReadFull(g.r, b); err != nil {
		g.t.Fatal(err)
	}
	return b
}

// guest is a machine with a TCP/IP stack of its own, as a real one has.
type guest struct {
	addr  netip.Addr
	port  *Port
	stack *stack.Stack
}

// plugGuest plugs in a guest that the test's end unplugs.
func plugGuest(t testing.TB, s *Switch, name lab.Name, host byte) *guest {
	t.Helper()
	return plugGuestBy(t, s.Plug, name, host)
}

func plugGuestBy(t testing.TB, plug func(context.Context, lab.Name, netip.Addr, net.Conn) (*Port, error), name lab.Name, host byte) *guest {
	t.Helper()
	sw, conn := cable(t)
	p, err := plug(context.Background(), name, testNet.Host(host), sw)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{addr: testNet.Host(host), port: p}
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	ch := channel.New(4096, mtu, tcpip.LinkAddress(macOf(host)))
	if err := g.stack.CreateNIC(nic, ethernet.New(ch)); err != nil {
		t.Fatal(err)
	}
	if err := g.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpAddr(g.addr), PrefixLen: 24},
	}, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	sack := tcpip.TCPSACKEnabled(true)
	g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	subnet, _ := tcpip.NewSubnet(tcpAddr(testNet.Subnet.Addr()), tcpip.MaskFrom("\xff\xff\xff\x00"))
	everywhere, _ := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{}), tcpip.MaskFrom("\x00\x00\x00\x00"))
	g.stack.SetRouteTable([]tcpip.Route{
		{Destination: subnet, NIC: nic},
		{Destination: everywhere, Gateway: tcpAddr(testNet.Gateway), NIC: nic},
	})

	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { // from the guest
		var buf []byte
		for {
			pkt := ch.ReadContext(ctx)
			buf = buf[:0]
			for ; pkt != nil && len(buf) < 64<<10; pkt = ch.Read() {
				buf = binary.BigEndian.AppendUint32(buf, uint32(pkt.Size()))
				for _, b := range pkt.AsSlices() {
					buf = append(buf, b...)
				}
				pkt.DecRef()
			}
			if pkt != nil {
				buf = binary.BigEndian.AppendUint32(buf, uint32(pkt.Size()))
				for _, b := range pkt.AsSlices() {
					buf = append(buf, b...)
				}
				pkt.DecRef()
			}
			if ctx.Err() != nil {
				return
			}
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	})
	wg.Go(func() { // to the guest
		r := bufio.NewReaderSize(conn, 128<<10)
		for {
			head, err := r.Peek(4)
			if err != nil {
				return
			}
			n := int(binary.BigEndian.Uint32(head))
			b, err := r.Peek(4 + n)
			if err != nil {
				return
			}
			pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b[4:])})
			ch.InjectInbound(0, pkt)
			pkt.DecRef()
			_, _ = r.Discard(4 + n)
		}
	})
	t.Cleanup(func() {
		cancel()
		conn.Close()
		wg.Wait()
		g.stack.Destroy()
	})
	return g
}
