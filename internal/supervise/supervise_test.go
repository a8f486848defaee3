// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/providers"
)

// running is a supervisor within the test's own process.
type running struct {
	done   chan struct{}
	err    error // of Run; valid once done is closed
	events chan Event
}

func (r *running) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-r.done:
		return r.err
	case <-time.After(patience):
		t.Fatal("the supervisor does not end")
		return nil
	}
}

// run starts a supervisor that the test's end stops, and connects to it.
func run(t testing.TB, d dirs.Dirs, change func(*Config)) (*running, *Client) {
	t.Helper()
	r := &running{done: make(chan struct{}), events: make(chan Event, 100)}
	ready := make(chan struct{})
	cfg := Config{
		ID: labID, Dirs: d, Provider: &socketProvider{dir: d.Data}, Version: "v1.2.3",
		Log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
		Record: func(e Event) error { r.events <- e; return nil },
		Ready:  func() { close(ready) },
	}
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(r.done)
		r.err = Run(ctx, cfg)
	}()
	t.Cleanup(func() { cancel(); <-r.done })
	select {
	case <-ready:
	case <-r.done:
		t.Fatal(r.err)
	}
	c, err := Dial(testContext(t), d, labID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return r, c
}

func TestPlugDialAgentStatus(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	if c.Version() != "v1.2.3" {
		t.Errorf("version %q", c.Version())
	}
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	bound, err := c.Plug(ctx, v.machine(lab.Forward{GuestPort: 7}))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Dial(ctx, "db", 7)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn, "through the switch")
	if conn, err = c.Agent(ctx, "db"); err != nil {
		t.Fatal(err)
	}
	echo(t, conn, "through the agent")
	if conn, err = net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", bound[0].HostPort)); err != nil {
		t.Fatal(err)
	}
	echo(t, conn, "through the forward")

	st, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n := st.Machines[0].Counters
	if n.FramesIn == 0 || n.FramesOut == 0 || n.Refused != 0 || n.Dropped != 0 {
		t.Errorf("counters: %+v", n)
	}
	if since := time.Since(st.Machines[0].LastActive); since < 0 || since > patience {
		t.Errorf("last active %v ago", since)
	}
	st.Machines[0].Counters, st.Since = network.Counters{}, time.Time{}
	st.Machines[0].Open, st.Machines[0].LastActive = 0, time.Time{} // the connections above are just ending
	want := Status{Version: "v1.2.3", PID: os.Getpid(), Machines: []MachineStatus{{
		Generation: v.g, Phase: PhasePresent, Role: "db", Addr: v.addr, Cable: LinkConnected, Agent: LinkConnected, Forwards: bound,
	}}}
	if diff := cmp.Diff(want, st, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestErrorsKeepTheirKind(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "db", 2, 10)
	mute := v.machine()
	mute.Agent = false
	if _, err := c.Plug(ctx, mute); err != nil {
		t.Fatal(err)
	}
	off := Machine{Generation: lab.Generation{Lab: labID, Machine: "web", Number: 1}, Role: "web", Addr: lab.NetworkOf(labID).Host(11)}
	old := v.machine()
	old.Generation.Number = 1
	foreign := v.machine()
	foreign.Generation.Lab = "other"
	plug := func(m Machine) error { _, err := c.Plug(ctx, m); return err }
	dial := func(name lab.Name, port uint16) error { _, err := c.Dial(ctx, name, port); return err }
	_, noAgent := c.Agent(ctx, "db")
	_, nobody := c.Agent(ctx, "nobody")
	for _, tt := range []struct {
		err  error
		is   error
		text string
	}{
		{dial("db", 8), syscall.ECONNREFUSED, fmt.Sprintf("dialing %v:8: connection refused", v.addr)},
		{dial("nobody", 8), ErrNotPlugged, `machine "nobody": machine is not plugged in`},
		{noAgent, ErrNoAgent, `machine "db": machine has no agent`},
		{nobody, ErrNotPlugged, `machine "nobody": machine is not plugged in`},
		{plug(off), providers.ErrNotRunning, "plugging in web@1: web@1: machine is not running"},
		{plug(old), ErrStale, "plugging in db@1: a newer generation is plugged in: db@2"},
		{plug(foreign), nil, `plugging in db@2: not a generation of lab "shop-1f3a9c2b"`},
	} {
		if tt.err == nil || tt.err.Error() != tt.text || tt.is != nil && !errors.Is(tt.err, tt.is) {
			t.Errorf("got %v\nwant %s", tt.err, tt.text)
		}
	}
	select {
	case <-r.done:
		t.Error("the supervisor ended")
	default:
	}
}

func TestForwardsConverge(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "web", 1, 10)
	first, err := c.Plug(ctx, v.machine(lab.Forward{GuestPort: 7}, lab.Forward{GuestPort: 8}))
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Plug(ctx, v.machine(lab.Forward{GuestPort: 7}, lab.Forward{GuestPort: 8}))
	if err != nil || !cmp.Equal(first, again) {
		t.Errorf("asked again: %v, %v; want %v", again, err, first)
	}
	// A successor is asked for the ports that were picked.
	open, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", first[0].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.Plug(ctx, v.machine(first[0]))
	if err != nil || !cmp.Equal(first[:1], second) {
		t.Errorf("asked for less: %v, %v; want %v", second, err, first[:1])
	}
	echo(t, open, "a forward that stays is not interrupted")
	if _, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", first[1].HostPort)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a forward that is gone: %v", err)
	}
	third, err := c.Plug(ctx, v.machine(lab.Forward{HostPort: first[0].HostPort, GuestPort: 9}))
	if err != nil || third[0].GuestPort != 9 || third[0].HostPort != first[0].HostPort {
		t.Errorf("a host port that leads elsewhere: %v, %v", third, err)
	}

	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := uint16(taken.Addr().(*net.TCPAddr).Port)
	_, err = c.Plug(ctx, v.machine(lab.Forward{HostPort: port, GuestPort: 7}))
	var pe *network.PortError
	if want := fmt.Sprintf(`forwarding to machine "web": port %d of 127.0.0.1 is taken by another program`, port); err == nil ||
		err.Error() != want || !errors.As(err, &pe) || pe.Port != port || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want %s", err, want)
	}
	conn, err := c.Dial(ctx, "web", 7)
	if err != nil {
		t.Fatalf("a machine without its forward is not plugged in: %v", err)
	}
	echo(t, conn, "plugged in all the same")
}

func TestMachineEnds(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	db, web := boot(t, d, "db", 1, 10), boot(t, d, "web", 3, 11)
	for _, v := range []*vm{db, web} {
		if _, err := c.Plug(ctx, v.machine()); err != nil {
			t.Fatal(err)
		}
	}
	db.kill()
	e := <-r.events
	if e.Kind != EventExited || e.Generation != db.g || e.Exit.Reason != providers.ExitGuest || e.Exit.Detail != "powered off" || e.At.IsZero() {
		t.Errorf("event %+v", e)
	}
	// It is taken off after that: what it leaves is waited for.
	for {
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(st.Machines) == 1 && st.Machines[0].Generation == web.g {
			break
		}
	}
	c.Close()
	for range 3 { // no client, but a machine: it stays
		if c, err := Dial(ctx, d, labID); err != nil {
			t.Fatal(err)
		} else {
			c.Close()
		}
	}
	web.kill()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socketPath(d, labID)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	if _, err := Dial(ctx, d, labID); !errors.Is(err, ErrNotRunning) {
		t.Errorf("dialing a supervisor that ended: %v", err)
	}
}

// A machine can be asked about as soon as it is being plugged in.
func TestStatusWhilePlugging(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx, stop := context.WithCancel(testContext(t))
	asked := make(chan error, 1)
	go func() {
		for {
			if _, err := c.Status(ctx); err != nil {
				asked <- err
				return
			}
		}
	}()
	for i := range 20 {
		if _, err := c.Plug(ctx, boot(t, d, "db", i+1, 10).machine()); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	if err := <-asked; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestUnplug(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	one, two := boot(t, d, "db", 1, 10), boot(t, d, "db", 2, 10)
	for _, v := range []*vm{one, two} { // the second takes the place of the first
		if _, err := c.Plug(ctx, v.machine()); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Unplug(ctx, one.g); err != nil {
		t.Fatal(err)
	}
	conn, err := c.Dial(ctx, "db", 7)
	if err != nil {
		t.Fatalf("unplugging an older generation: %v", err)
	}
	echo(t, conn, "still there")
	for range 2 {
		if err := c.Unplug(ctx, two.g); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	if len(r.events) != 0 {
		t.Errorf("unplugging was recorded: %+v", <-r.events)
	}
}

func TestCableIsPluggedInAgain(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	if _, err := c.Plug(ctx, v.machine()); err != nil {
		t.Fatal(err)
	}
	if _, err := (<-v.nics).Write([]byte{0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	e := <-r.events
	if e.Kind != EventCable || e.Detail != `machine "db" announced a frame of 4294967295 bytes, more than the 69632 that are possible` {
		t.Errorf("event %+v", e)
	}
	conn, err := c.Dial(ctx, "db", 7)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, conn, "plugged in again")
}

func TestAgentRestarts(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	if _, err := c.Plug(ctx, v.machine()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		conn, err := c.Agent(ctx, "db")
		if err != nil {
			t.Fatal(err)
		}
		echo(t, conn, "hello")
		conn, err = c.Agent(ctx, "db")
		if err != nil {
			t.Fatal(err)
		}
		v.mu.Lock()
		v.agent() // the agent dies
		v.mu.Unlock()
		if _, err := io.ReadAll(conn); err == nil {
			// an end is as good as an error: what matters is that reading ends
			t.Log("the stream of a dead agent ended")
		}
		conn.Close()
	}
}

func TestAgentIsWaitedFor(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, func(cfg *Config) { cfg.Provider = deafAgent{&socketProvider{dir: d.Data}} })
	v := boot(t, d, "db", 1, 10)
	if _, err := c.Plug(testContext(t), v.machine()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Agent(ctx, "db"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an agent that does not answer: %v", err)
	}
	st, err := c.Status(testContext(t))
	if err != nil || st.Machines[0].Agent != LinkWaiting {
		t.Errorf("status %+v, %v", st, err)
	}
	gone := make(chan error, 1)
	go func() {
		_, err := c.Agent(testContext(t), "db")
		gone <- err
	}()
	if err := c.Unplug(testContext(t), v.g); err != nil {
		t.Fatal(err)
	}
	if err := <-gone; !errors.Is(err, ErrNotPlugged) {
		t.Errorf("waiting for the agent of a machine that is unplugged: %v", err)
	}
}

// deafAgent has machines whose agent never answers.
type deafAgent struct{ *socketProvider }

func (deafAgent) DialAgent(context.Context, lab.Generation) (net.Conn, error) {
	host, guest := net.Pipe()
	go io.Copy(io.Discard, guest)
	return host, nil
}

// Clients that say nothing, too much or nonsense, or hang in the middle, are alone
// with that.
func TestBadClients(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	say := func(text string) string {
		t.Helper()
		conn, err := net.Dial("unix", socketPath(d, labID))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		go io.WriteString(conn, text)
		if !strings.Contains(text, "\n") && len(text) < maxLine {
			return "" // hangs
		}
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		line, _ := bufio.NewReader(conn).ReadString('\n')
		return line
	}
	say("")
	say(`{"op":"plug",`)
	for text, want := range map[string]string{
		"hello\n":               `{"error":{"text":"reading the request: invalid character 'h' looking for beginning of value"}}`,
		"{\"op\":\"dance\"}\n":  `{"error":{"text":"the lab's supervisor (version v1.2.3) does not know the request \"dance\""}}`,
		"{\"op\":\"plug\"}\n":   `{"error":{"text":"plug needs a machine"}}`,
		"{\"op\":\"unplug\"}\n": `{"error":{"text":"unplug needs a generation"}}`,
	} {
		if got := strings.TrimSpace(say(text)); got != want {
			t.Errorf("%q is answered with %s\nwant %s", text, got, want)
		}
	}
	if got, want := strings.TrimSpace(say(strings.Repeat("x", 2*maxLine))), `{"error":{"text":"reading the request: a line of more than 1048576 bytes"}}`; got != want && got != "" {
		t.Errorf("too long a request is answered with %s", got)
	}
	if _, err := c.Status(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestOneSupervisorPerLab(t *testing.T) {
	d := testDirs(t)
	run(t, d, nil)
	err := Run(testContext(t), Config{ID: labID, Dirs: d, Provider: &socketProvider{dir: d.Data}})
	if !errors.Is(err, ErrRunning) || err.Error() != "starting the supervisor of shop-1f3a9c2b: the lab has a supervisor already" {
		t.Errorf("a second supervisor: %v", err)
	}
}

func TestEndsWithoutClients(t *testing.T) {
	d := testDirs(t)
	r := make(chan error, 1)
	go func() {
		r <- Run(context.Background(), Config{ID: labID, Dirs: d, Provider: &socketProvider{dir: d.Data}, Grace: 10 * time.Millisecond})
	}()
	select {
	case err := <-r:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("a supervisor that nobody wants does not end")
	}
}

func TestStop(t *testing.T) {
	d := testDirs(t)
	ctx := testContext(t)
	if err := Stop(ctx, d, labID); err != nil {
		t.Fatalf("stopping nothing: %v", err)
	}
	r, c := run(t, d, nil)
	v := boot(t, d, "db", 1, 10)
	if _, err := c.Plug(ctx, v.machine()); err != nil {
		t.Fatal(err)
	}
	if err := Stop(ctx, d, labID); err != nil {
		t.Fatal(err)
	}
	if Alive(d, labID) {
		t.Error("still alive")
	}
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
	if _, err := c.Status(ctx); !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("asking a stopped supervisor: %v", err)
	}
}

// spawner starts supervisors as processes, and counts them.
func spawner(t *testing.T, d dirs.Dirs) (start func() error, count func() int) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GORACE", "atexit_sleep_ms=0") // or the race detector holds every exit up
	var mu sync.Mutex
	n := 0
	t.Cleanup(func() {
		if err := Stop(testContext(t), d, labID); err != nil {
			t.Error(err)
		}
	})
	return func() error {
			mu.Lock()
			n++
			mu.Unlock()
			return Spawn(self, []string{"supervise", d.Run, d.Data}, d.Data+"/supervisor.log")
		}, func() int {
			mu.Lock()
			defer mu.Unlock()
			return n
		}
}

func TestSuccessorOfAKilledSupervisor(t *testing.T) {
	d := testDirs(t)
	start, _ := spawner(t, d)
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	var last []lab.Forward
	var pid int
	for i := range 3 {
		c, err := Ensure(ctx, d, labID, start)
		if err != nil {
			t.Fatal(err)
		}
		want := lab.Forward{GuestPort: 7}
		if i > 0 {
			want = last[0]
		}
		bound, err := c.Plug(ctx, v.machine(want))
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && !cmp.Equal(bound, last) {
			t.Errorf("the successor listens on %v, want %v", bound, last)
		}
		last = bound
		conn, err := c.Dial(ctx, "db", 7)
		if err != nil {
			t.Fatal(err)
		}
		echo(t, conn, "through the switch")
		if conn, err = c.Agent(ctx, "db"); err != nil {
			t.Fatal(err)
		}
		echo(t, conn, "through the agent")
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if st.PID == pid || st.PID == os.Getpid() {
			t.Errorf("process %d is no new supervisor", st.PID)
		}
		pid = st.PID
		if i == 2 {
			c.Close()
			break
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil { // our own child, alive: it has just answered
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c.hello); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("waiting for its end: %v", err)
		}
		c.Close()
		if _, err := os.Stat(socketPath(d, labID)); err != nil {
			t.Errorf("a killed supervisor leaves its socket: %v", err)
		}
	}
}

func TestStoppedSupervisorIsNamed(t *testing.T) {
	d := testDirs(t)
	start, _ := spawner(t, d)
	ctx := testContext(t)
	c, err := Ensure(ctx, d, labID, start)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := syscall.Kill(c.pid, syscall.SIGSTOP); err != nil { // our own child, alive: it has just answered
		t.Fatal(err)
	}
	defer syscall.Kill(c.pid, syscall.SIGCONT)
	for !halted(c.pid) {
		if ctx.Err() != nil {
			t.Fatal("it does not stop")
		}
		time.Sleep(pause)
	}
	_, err = dialOnce(ctx, d, labID, 50*time.Millisecond)
	var silent *SilentError
	if !errors.As(err, &silent) {
		t.Fatalf("dialing: %v", err)
	}
	got := []string{silent.Error(), silent.Hint()}
	want := []string{
		fmt.Sprintf("the lab's supervisor (process %d) is stopped by a signal: it did not answer within 50ms", c.pid),
		fmt.Sprintf("\"kill -CONT %d\" lets it go on; or \"kill -KILL %[1]d\": the machines run on, and the next command starts a new one", c.pid),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestConcurrentEnsureStartsOne(t *testing.T) {
	d := testDirs(t)
	start, count := spawner(t, d)
	ctx := testContext(t)
	pids := make([]int, 8)
	var wg sync.WaitGroup
	for i := range pids {
		wg.Go(func() {
			c, err := Ensure(ctx, d, labID, start)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { c.Close() })
			st, err := c.Status(ctx)
			if err != nil {
				t.Error(err)
			}
			pids[i] = st.PID
		})
	}
	wg.Wait()
	for _, pid := range pids {
		if pid != pids[0] {
			t.Errorf("several supervisors: %v", pids)
			break
		}
	}
	if n := count(); n != 1 {
		t.Errorf("%d supervisors were started", n)
	}
}

func TestSpawnTellsWhyItFailed(t *testing.T) {
	d := testDirs(t)
	log := d.Data + "/supervisor.log"
	if err := os.WriteFile(log, []byte("what an earlier one said\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.RunLab(labID), nil, 0o600); err != nil { // in the way
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	err = Spawn(self, []string{"supervise", d.Run, d.Data}, log)
	want := fmt.Sprintf("starting the supervisor: exit status 1:\nsupervise: starting the supervisor: mkdir %s: not a directory", d.RunLab(labID))
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	if err := Spawn(d.Data+"/nothing", nil, log); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("spawning what does not exist: %v", err)
	}
}

func TestLogIsBounded(t *testing.T) {
	path := testDirs(t).Data + "/supervisor.log"
	for range 3 {
		if err := os.WriteFile(path, make([]byte, maxLog+1), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := openLog(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
			t.Errorf("the log begins with %d bytes, %v", fi.Size(), err)
		}
		f.Close()
	}
}
