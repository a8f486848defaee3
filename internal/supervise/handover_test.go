// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
)

// standby is the machine as a standby.
func (v *vm) standby(forwards ...lab.Forward) Machine {
	m := v.machine(forwards...)
	m.Standby = true
	return m
}

// which asks the generation at the other end of a connection for its number.
func which(c net.Conn) (n int, err error) {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "?\n"); err != nil {
		return 0, err
	}
	_, err = fmt.Fscanf(byByte{c}, "%d\n", &n)
	return n, err
}

// byByte reads no more than is asked for.
type byByte struct{ io.Reader }

func (r byByte) Read(p []byte) (int, error) { return r.Reader.Read(p[:1]) }

func wantWhich(t testing.TB, want int, conns ...net.Conn) {
	t.Helper()
	for i, c := range conns {
		if got, err := which(c); err != nil || got != want {
			t.Errorf("connection %d is with generation %d, %v; want %d", i, got, err, want)
		}
	}
}

// phases returns each generation's phase.
func phases(t testing.TB, c *Client) map[string]Phase {
	t.Helper()
	st, err := c.Status(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]Phase)
	for _, m := range st.Machines {
		got[fmt.Sprintf("%s%d", m.Generation.Machine, m.Generation.Number)] = m.Phase
	}
	return got
}

// No connection through a forwarded port is refused, reset or left unanswered while
// generations take over from each other, and those that are open go on.
func TestPromoteUnderLoad(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	last := boot(t, d, "web", 1, 10)
	bound, err := c.Plug(ctx, last.machine(lab.Forward{GuestPort: 8080}))
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", bound[0].HostPort)
	var requests, failed, highest atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				seen := highest.Load()
				conn, err := net.Dial("tcp4", addr)
				if err == nil {
					var n int
					if n, err = which(conn); err == nil && int64(n) < seen {
						err = fmt.Errorf("generation %d answers after %d took over", n, seen)
					}
					conn.Close()
				}
				requests.Add(1)
				if err != nil {
					failed.Add(1)
					t.Errorf("request %d: %v", requests.Load(), err)
					return
				}
			}
		})
	}
	for n := 2; n <= 6; n++ {
		long := make([]net.Conn, 4)
		for i := range long {
			if long[i], err = net.Dial("tcp4", addr); err != nil {
				t.Fatal(err)
			}
		}
		wantWhich(t, n-1, long...)
		next := boot(t, d, "web", n, 10)
		if _, err := c.Plug(ctx, next.standby()); err != nil {
			t.Fatal(err)
		}
		conn, err := c.DialGeneration(ctx, next.g, 8080)
		if err != nil {
			t.Fatal(err)
		}
		wantWhich(t, n, conn)
		conn.Close()
		again, err := c.Promote(ctx, next.g, bound, patience)
		if err != nil || !cmp.Equal(again, bound) {
			t.Fatalf("promoted: %v, %v; want %v", again, err, bound)
		}
		highest.Store(int64(n))
		if conn, err = net.Dial("tcp4", addr); err != nil {
			t.Fatal(err)
		}
		wantWhich(t, n, conn)
		conn.Close()
		drained := make(chan error, 1)
		go func() { drained <- c.Drained(ctx, last.g) }()
		for range 5 { // far longer than it takes to see that nothing is left
			wantWhich(t, n-1, long...)
			time.Sleep(drainPoll)
		}
		select {
		case err := <-drained:
			t.Fatalf("drained with connections open: %v", err)
		default:
		}
		for _, conn := range long {
			conn.Close()
		}
		if err := <-drained; err != nil {
			t.Fatal(err)
		}
		if err := c.Unplug(ctx, last.g); err != nil {
			t.Fatal(err)
		}
		last = next
	}
	close(stop)
	wg.Wait()
	t.Logf("%d requests, %d failed", requests.Load(), failed.Load())
	if requests.Load() < 100 {
		t.Errorf("only %d requests were made", requests.Load())
	}
}

func TestPromote(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	one, two, three := boot(t, d, "web", 1, 10), boot(t, d, "web", 2, 10), boot(t, d, "web", 3, 10)
	bound, err := c.Plug(ctx, one.machine(lab.Forward{GuestPort: 8080}, lab.Forward{GuestPort: 7}))
	if err != nil {
		t.Fatal(err)
	}
	host := func(i int) string { return fmt.Sprintf("127.0.0.1:%d", bound[i].HostPort) }
	dial := func(addr string) net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	for range 2 { // it may be repeated
		if got, err := c.Plug(ctx, two.standby(lab.Forward{GuestPort: 8080})); err != nil || len(got) != 0 {
			t.Fatalf("plugging in a standby: %v, %v", got, err)
		}
	}
	if d := cmp.Diff(map[string]Phase{"web1": PhasePresent, "web2": PhaseStandby}, phases(t, c)); d != "" {
		t.Error(d)
	}
	if _, err := c.Plug(ctx, three.standby()); !errors.Is(err, ErrBeside) {
		t.Errorf("a second standby: %v", err)
	}
	if _, err := c.Promote(ctx, three.g, nil, 0); !errors.Is(err, ErrNotPlugged) {
		t.Errorf("promoting what is not plugged in: %v", err)
	}
	if err := c.Drained(ctx, one.g); err == nil || err.Error() != "waiting for the connections of web@1 to end: it is not draining but present" {
		t.Errorf("waiting for what is present: %v", err)
	}
	// The agents are those of their generations.
	one.mu.Lock()
	one.agent() // web@1's agent restarts, web@2's goes on
	one.mu.Unlock()
	conn, err := c.AgentGeneration(ctx, two.g)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn, "the standby's agent")

	// A port that cannot be had leaves everything as it was.
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := uint16(taken.Addr().(*net.TCPAddr).Port)
	var pe *network.PortError
	if _, err = c.Promote(ctx, two.g, []lab.Forward{bound[0], {HostPort: port, GuestPort: 7}}, 0); !errors.As(err, &pe) || pe.Port != port {
		t.Errorf("promoting with a port that is taken: %v", err)
	}
	wantWhich(t, 1, dial(host(0)))
	if d := cmp.Diff(map[string]Phase{"web1": PhasePresent, "web2": PhaseStandby}, phases(t, c)); d != "" {
		t.Error(d)
	}

	// One forward leads elsewhere, one goes, one comes.
	open := func() int {
		t.Helper()
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return int(st.Machines[0].Open)
	}
	before := open() // those of before, which have been answered
	long := dial(host(0))
	wantWhich(t, 1, long)
	kept := dial(host(1)) // echoes what it was sent, at the end
	if _, err := io.WriteString(kept, "half a "); err != nil {
		t.Fatal(err)
	}
	for open() < before+2 { // the forward connects behind the client's back
		time.Sleep(time.Millisecond)
	}
	next, err := c.Promote(ctx, two.g, []lab.Forward{{GuestPort: 8080}, {GuestPort: 7777}}, patience)
	if err != nil {
		t.Fatal(err)
	}
	if next[0] != bound[0] || next[1].GuestPort != 7777 {
		t.Errorf("forwards: %v after %v", next, bound)
	}
	if _, err := net.Dial("tcp4", host(1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a forward that is gone: %v", err)
	}
	wantWhich(t, 2, dial(host(0)))
	wantWhich(t, 1, long)
	if _, err := io.WriteString(kept, "message"); err != nil {
		t.Fatal(err)
	}
	_ = kept.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(kept); err != nil || string(got) != "half a message" {
		t.Errorf("through a forward that went meanwhile: %q, %v", got, err)
	}
	if conn, err = c.Dial(ctx, "web", 8080); err != nil {
		t.Fatal(err)
	}
	wantWhich(t, 2, conn)
	conn.Close()
	if conn, err = c.DialGeneration(ctx, one.g, 8080); err != nil {
		t.Fatal(err)
	}
	wantWhich(t, 1, conn)
	conn.Close()
	if d := cmp.Diff(map[string]Phase{"web1": PhaseDraining, "web2": PhasePresent}, phases(t, c)); d != "" {
		t.Error(d)
	}
	if again, err := c.Promote(ctx, two.g, next, patience); err != nil || !cmp.Equal(again, next) {
		t.Errorf("promoted again: %v, %v; want %v", again, err, next)
	}
	if _, err := c.Plug(ctx, one.machine()); !errors.Is(err, ErrStale) {
		t.Errorf("plugging in what is draining: %v", err)
	}

	// The old one's exit is its own, and takes nothing along.
	one.stop()
	e := <-r.events
	for e.Kind != EventExited {
		e = <-r.events
	}
	if e.Generation != one.g {
		t.Errorf("exit of %s is recorded, want %s", e.Generation, one.g)
	}
	if _, err := which(long); err == nil {
		t.Error("a connection with a machine that is gone goes on")
	}
	if err := c.Drained(ctx, one.g); err != nil {
		t.Errorf("waiting for what is gone: %v", err)
	}
	for phases(t, c)["web1"] != "" { // the exit is recorded first, then the machine is taken off
		if ctx.Err() != nil {
			t.Fatal("web@1 is still plugged in")
		}
		time.Sleep(time.Millisecond)
	}
	wantWhich(t, 2, dial(host(0)))

	// A newer generation that is no standby takes its place as ever, a standby's too.
	if _, err := c.Plug(ctx, three.standby()); err != nil {
		t.Fatal(err)
	}
	four := boot(t, d, "web", 4, 10)
	if _, err := c.Plug(ctx, four.machine(bound[0])); err != nil {
		t.Fatal(err)
	}
	wantWhich(t, 4, dial(host(0)))
	if d := cmp.Diff(map[string]Phase{"web4": PhasePresent}, phases(t, c)); d != "" {
		t.Error(d)
	}
}

func TestDrainTimeIsOver(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	last := boot(t, d, "web", 1, 10)
	bound, err := c.Plug(ctx, last.machine(lab.Forward{GuestPort: 8080}))
	if err != nil {
		t.Fatal(err)
	}
	for n, drain := range []time.Duration{0, 300 * time.Millisecond} {
		conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", bound[0].HostPort))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		wantWhich(t, n+1, conn)
		next := boot(t, d, "web", n+2, 10)
		if _, err := c.Plug(ctx, next.standby()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := c.Promote(ctx, next.g, bound, drain); err != nil {
			t.Fatal(err)
		}
		if err := c.Drained(ctx, last.g); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < drain || took > drain+patience/2 {
			t.Errorf("drained for %v, want %v", took, drain)
		}
		wantWhich(t, n+1, conn)
		if err := c.Unplug(ctx, last.g); err != nil {
			t.Fatal(err)
		}
		if got, err := which(conn); err == nil {
			t.Errorf("generation %d answers after it was unplugged", got)
		}
		last = next
	}
}

// A connection that the old generation never took is not lost with it.
func TestConnectionIsMadeAgain(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	one, two := boot(t, d, "web", 1, 10), boot(t, d, "web", 2, 10)
	bound, err := c.Plug(ctx, one.machine(lab.Forward{GuestPort: 8080}))
	if err != nil {
		t.Fatal(err)
	}
	if err := one.stack.DisableNIC(1); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", bound[0].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	byName := make(chan error, 1)
	go func() {
		conn, err := c.Dial(ctx, "web", 8080)
		if err == nil {
			defer conn.Close()
			var n int
			if n, err = which(conn); err == nil && n != 2 {
				err = fmt.Errorf("with generation %d", n)
			}
		}
		byName <- err
	}()
	for open := 0; open < 2; {
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		open = st.Machines[0].Open
	}
	if _, err := c.Plug(ctx, two.standby()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Promote(ctx, two.g, bound, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Unplug(ctx, one.g); err != nil {
		t.Fatal(err)
	}
	wantWhich(t, 2, conn)
	if err := <-byName; err != nil {
		t.Errorf("dialing by name: %v", err)
	}
}

// A standby that fails leaves no trace, also if it is the last one there.
func TestStandbyFails(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	one, two := boot(t, d, "web", 1, 10), boot(t, d, "web", 2, 10)
	bound, err := c.Plug(ctx, one.machine(lab.Forward{GuestPort: 8080}))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", bound[0].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	wantWhich(t, 1, conn)
	if _, err := c.Plug(ctx, two.standby()); err != nil {
		t.Fatal(err)
	}
	two.stop()
	if e := <-r.events; e.Kind != EventExited || e.Generation != two.g {
		t.Errorf("event %+v", e)
	}
	for len(phases(t, c)) > 1 {
		time.Sleep(time.Millisecond)
	}
	wantWhich(t, 1, conn)
	if _, err := c.Promote(ctx, two.g, nil, 0); !errors.Is(err, ErrNotPlugged) {
		t.Errorf("promoting what is gone: %v", err)
	}
	// The next one outlives the present one, and can take over all the same.
	three := boot(t, d, "web", 3, 10)
	if _, err := c.Plug(ctx, three.standby()); err != nil {
		t.Fatal(err)
	}
	if err := c.Unplug(ctx, one.g); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Dial(ctx, "web", 8080); !errors.Is(err, ErrNotPlugged) {
		t.Errorf("a standby answers to the name: %v", err)
	}
	if d := cmp.Diff(map[string]Phase{"web3": PhaseStandby}, phases(t, c)); d != "" {
		t.Error(d)
	}
	again, err := c.Promote(ctx, three.g, bound, 0)
	if err != nil || !cmp.Equal(again, bound) {
		t.Fatalf("promoted: %v, %v; want %v", again, err, bound)
	}
	next, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", bound[0].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	wantWhich(t, 3, next)
	c.Close()
	three.stop()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
}

func TestWithdraw(t *testing.T) {
	s := &supervisor{machines: map[lab.Name]*machine{}, beside: map[lab.Name]*machine{}, changed: make(chan struct{})}
	net := lab.NetworkOf(labID)
	for i, name := range []lab.Name{"web-1", "web-2"} {
		g := lab.Generation{Lab: labID, Machine: name, Number: 1}
		s.machines[name] = &machine{s: s, spec: Machine{Generation: g, Role: "web", Addr: net.Host(byte(10 + i))}, phase: PhasePresent}
		g.Number = 2
		s.beside[name] = &machine{s: s, spec: Machine{Generation: g, Role: "web", Addr: net.Host(byte(10 + i))}, phase: PhaseStandby}
	}
	if n := len(s.names()["web"]); n != 2 {
		t.Errorf("%d addresses of the role", n)
	}
	if err := s.withdraw(s.beside["web-1"].spec.Generation); !errors.Is(err, ErrNotPlugged) {
		t.Errorf("withdrawing a standby: %v", err)
	}
	if err := s.withdraw(s.machines["web-1"].spec.Generation); err != nil {
		t.Fatal(err)
	}
	names := s.names()
	if len(names["web"]) != 1 || names["web"][0] != net.Host(11) || len(names["web-1"]) != 1 {
		t.Errorf("names: %v", names)
	}
}
