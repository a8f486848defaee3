// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/labfile/lab/internal/dirs"
	agentchannel "github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// patience bounds what a test waits for; it is only ever used up by a failure.
const patience = 30 * time.Second

const labID lab.ID = "shop-1f3a9c2b"

// TestMain is also the supervisor program that tests spawn.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "supervise" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		d := dirs.Dirs{Data: os.Args[2], Run: os.Args[2]}
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		err := Run(ctx, Config{
			ID: labID, Dirs: d, Provider: &socketProvider{dir: os.Args[3]}, Version: "v1.2.3", Log: log,
			Ready: Ready(os.Getenv), Grace: time.Minute,
		})
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "supervise:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// testDirs returns directories that are short enough for sockets.
func testDirs(t testing.TB) dirs.Dirs {
	t.Helper()
	dir, err := os.MkdirTemp("", "sup")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dirs.Dirs{Data: dir, Run: dir}
}

// socketProvider finds the machines that tests run behind sockets of a directory,
// from whatever process. What a supervisor does not use is not there.
type socketProvider struct {
	providers.Provider
	dir string
}

func (p *socketProvider) Name() string { return "socket" }

func (p *socketProvider) dial(ctx context.Context, g lab.Generation, kind string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(p.dir, fmt.Sprintf("%s-%d.%s", g.Machine, g.Number, kind)))
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		err = fmt.Errorf("%s: %w", g, providers.ErrNotRunning)
	}
	return c, err
}

func (p *socketProvider) DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	return p.dial(ctx, g, "nic")
}

func (p *socketProvider) DialAgent(ctx context.Context, g lab.Generation) (net.Conn, error) {
	return p.dial(ctx, g, "agent")
}

// Wait reads from a socket whose other end closes with the machine.
func (p *socketProvider) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	// A machine that is gone already ended the same way.
	if c, err := p.dial(ctx, g, "life"); err == nil {
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		_, _ = c.Read(make([]byte, 1))
	}
	return providers.Exit{Reason: providers.ExitGuest, Detail: "powered off"}, ctx.Err()
}

// vm is a machine behind sockets: a TCP/IP stack that echoes port 7, and an agent.
type vm struct {
	t     testing.TB
	g     lab.Generation
	addr  netip.Addr
	stack *stack.Stack
	ctx   context.Context
	kill  context.CancelFunc
	wg    sync.WaitGroup

	nics chan net.Conn // the cables, in the order they were plugged in

	mu      sync.Mutex
	agent   context.CancelFunc
	streams func(net.Conn) // what the agent does with a stream, if it is not to echo
}

func (v *vm) machine(forwards ...lab.Forward) Machine {
	return Machine{Generation: v.g, Role: string(v.g.Machine), Addr: v.addr, Agent: true, Forwards: forwards}
}

// boot starts a machine that the test's end stops.
func boot(t testing.TB, d dirs.Dirs, name lab.Name, number int, host byte) *vm {
	t.Helper()
	v := &vm{t: t, g: lab.Generation{Lab: labID, Machine: name, Number: number}, addr: lab.NetworkOf(labID).Host(host), nics: make(chan net.Conn, 10)}
	v.ctx, v.kill = context.WithCancel(context.Background())
	t.Cleanup(v.stop)
	ch := v.network()
	v.listen(d, "life", func(c net.Conn) { <-v.ctx.Done() })
	v.listen(d, "nic", func(c net.Conn) {
		v.nics <- c
		v.cable(c, ch)
	})
	v.listen(d, "agent", func(c net.Conn) {
		ctx, cancel := context.WithCancel(v.ctx)
		defer cancel()
		v.mu.Lock()
		v.agent = cancel
		v.mu.Unlock()
		_ = agentchannel.Serve(ctx, c, func(s net.Conn) {
			defer s.Close()
			v.mu.Lock()
			serve := v.streams
			v.mu.Unlock()
			if serve != nil {
				serve(s)
				return
			}
			_, _ = io.Copy(s, s)
		})
	})
	return v
}

func (v *vm) stop() {
	v.kill()
	v.wg.Wait()
	v.stack.Destroy()
}

// listen serves a socket of the machine, one client at a time, as QEMU does.
func (v *vm) listen(d dirs.Dirs, kind string, serve func(net.Conn)) {
	v.t.Helper()
	ln, err := net.Listen("unix", filepath.Join(d.Data, fmt.Sprintf("%s-%d.%s", v.g.Machine, v.g.Number, kind)))
	if err != nil {
		v.t.Fatal(err)
	}
	context.AfterFunc(v.ctx, func() { ln.Close() })
	v.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(v.ctx, func() { c.Close() })
			serve(c)
			stop()
			c.Close()
		}
	})
}

func (v *vm) network() *channel.Endpoint {
	v.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	hw, err := net.ParseMAC(lab.MACOf(v.addr))
	if err != nil {
		v.t.Fatal(err)
	}
	ch := channel.New(1024, 1500, tcpip.LinkAddress(hw))
	addr := tcpip.AddrFrom4(v.addr.As4())
	if err := v.stack.CreateNIC(1, ethernet.New(ch)); err != nil {
		v.t.Fatal(err)
	}
	if err := v.stack.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: addr, PrefixLen: 24},
	}, stack.AddressProperties{}); err != nil {
		v.t.Fatal(err)
	}
	subnet, _ := tcpip.NewSubnet(tcpip.AddrFrom4(lab.NetworkOf(labID).Subnet.Addr().As4()), tcpip.MaskFrom("\xff\xff\xff\x00"))
	v.stack.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: 1}})
	ln, err := gonet.ListenTCP(v.stack, tcpip.FullAddress{NIC: 1, Addr: addr, Port: 7}, ipv4.ProtocolNumber)
	if err != nil {
		v.t.Fatal(err)
	}
	v.accept(ln, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		_, _ = c.Write(b)
	})
	if ln, err = gonet.ListenTCP(v.stack, tcpip.FullAddress{NIC: 1, Addr: addr, Port: 8080}, ipv4.ProtocolNumber); err != nil {
		v.t.Fatal(err)
	}
	v.accept(ln, func(c net.Conn) { // which generation it is, for every line
		for r := bufio.NewReader(c); ; {
			if _, err := r.ReadString('\n'); err != nil {
				return
			}
			_, _ = fmt.Fprintf(c, "%d\n", v.g.Number)
		}
	})
	return ch
}

// accept serves a TCP port of the machine until it stops.
func (v *vm) accept(ln *gonet.TCPListener, serve func(net.Conn)) {
	context.AfterFunc(v.ctx, ln.Shutdown)
	v.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	})
}

// cable carries frames until the other end of the cable is pulled.
func (v *vm) cable(c net.Conn, ch *channel.Endpoint) {
	ctx, cancel := context.WithCancel(v.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for {
			pkt := ch.ReadContext(ctx)
			if pkt == nil {
				return
			}
			frame := binary.BigEndian.AppendUint32(nil, uint32(pkt.Size()))
			for _, b := range pkt.AsSlices() {
				frame = append(frame, b...)
			}
			pkt.DecRef()
			if _, err := c.Write(frame); err != nil {
				return
			}
		}
	})
	r := bufio.NewReader(c)
	for {
		var n [4]byte
		if _, err := io.ReadFull(r, n[:]); err != nil {
			return
		}
		b := make([]byte, binary.BigEndian.Uint32(n[:]))
		if _, err := io.ReadFull(r, b); err != nil {
			return
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		ch.InjectInbound(0, pkt)
		pkt.DecRef()
	}
}

// echo sends a message, half-closes, and wants the message back.
func echo(t testing.TB, c net.Conn, message string) {
	t.Helper()
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte(message)); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != message {
		t.Fatalf("got %q, %v; want %q", got, err, message)
	}
}
