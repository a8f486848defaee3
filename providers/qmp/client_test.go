// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`

// request is what the scripted peer gets to see.
type request struct {
	Execute   string
	Arguments json.RawMessage
	ID        string
}

// peer serves one monitor connection: it greets, negotiates and then has answer
// write the answers.
func peer(t *testing.T, conn net.Conn, answer func(w io.Writer, r request)) {
	t.Helper()
	done := make(chan struct{})
	t.Cleanup(func() { conn.Close(); <-done })
	go func() {
		defer close(done)
		defer conn.Close()
		fmt.Fprintf(conn, "%s\r\n", greeting)
		s := bufio.NewScanner(conn)
		for s.Scan() {
			var r request
			if err := json.Unmarshal(s.Bytes(), &r); err != nil {
				t.Errorf("the client sent %q: %v", s.Bytes(), err)
				return
			}
			if r.Execute == "qmp_capabilities" {
				fmt.Fprintf(conn, `{"return": {}, "id": %q}`+"\r\n", r.ID)
				continue
			}
			answer(conn, r)
		}
	}()
}

func dialPeer(t *testing.T, answer func(w io.Writer, r request)) *Client {
	t.Helper()
	here, there := net.Pipe()
	peer(t, there, answer)
	c, err := New(testContext(t), here)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestExecute(t *testing.T) {
	c := dialPeer(t, func(w io.Writer, r request) {
		switch r.Execute {
		case "echo":
			fmt.Fprintf(w, `{"return": %s, "id": %q}`+"\n", r.Arguments, r.ID)
		default:
			fmt.Fprintf(w, `{"error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}, "id": %q}`+"\n", r.Execute, r.ID)
		}
	})
	if v := c.Version(); v != (Version{7, 2, 22, "Debian"}) || v.String() != "7.2.22" {
		t.Errorf("version %+v", v)
	}
	var got map[string]int
	if err := c.Execute(testContext(t), "echo", map[string]int{"a": 1}, &got); err != nil || got["a"] != 1 {
		t.Errorf("echo: %v, %v", got, err)
	}
	err := c.Execute(testContext(t), "dance", nil, nil)
	var refused *Error
	if !errors.As(err, &refused) || refused.Class != "CommandNotFound" ||
		err.Error() != "monitor command dance: The command dance has not been found" {
		t.Errorf("dance: %v", err)
	}
	var text string
	err = c.Execute(testContext(t), "echo", map[string]int{"a": 1}, &text)
	if err == nil || !strings.HasPrefix(err.Error(), "monitor command echo: decoding its answer: json: cannot unmarshal object") {
		t.Errorf("decoding: %v", err)
	}
}

// Answers find their commands whatever their order.
func TestExecuteConcurrently(t *testing.T) {
	const n = 20
	var mu sync.Mutex
	var waiting []request
	c := dialPeer(t, func(w io.Writer, r request) {
		mu.Lock()
		defer mu.Unlock()
		waiting = append(waiting, r)
		if len(waiting) < n {
			return
		}
		for i := n - 1; i >= 0; i-- {
			fmt.Fprintf(w, `{"return": %s, "id": %q}`+"\n", waiting[i].Arguments, waiting[i].ID)
		}
	})
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var got map[string]int
			if err := c.Execute(ctx, "echo", map[string]int{"i": i}, &got); err != nil || got["i"] != i {
				t.Errorf("command %d got %v, %v", i, got, err)
			}
		})
	}
	wg.Wait()
}

// A late answer to a command that was given up must not reach the next one.
func TestLateAnswer(t *testing.T) {
	var late request
	c := dialPeer(t, func(w io.Writer, r request) {
		if r.Execute == "slow" {
			late = r
			return
		}
		fmt.Fprintf(w, `{"return": "late", "id": %q}`+"\n"+`{"return": "mine", "id": %q}`+"\n", late.ID, r.ID)
	})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) ||
		err.Error() != "monitor command slow: context deadline exceeded" {
		t.Fatalf("slow: %v", err)
	}
	var got string
	if err := c.Execute(testContext(t), "quick", nil, &got); err != nil || got != "mine" {
		t.Errorf("quick: %q, %v", got, err)
	}
}

// A peer that does not even read must not hold a command beyond its context.
func TestPeerThatDoesNotRead(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	ready := make(chan struct{})
	go func() {
		fmt.Fprintf(there, "%s\n", greeting)
		b := make([]byte, 1024)
		n, _ := there.Read(b)
		var r request
		if err := json.Unmarshal(b[:n], &r); err != nil {
			t.Error(err)
		}
		fmt.Fprintf(there, `{"return": {}, "id": %q}`+"\n", r.ID)
		close(ready)
	}()
	c, err := New(testContext(t), here)
	if err != nil {
		t.Fatal(err)
	}
	<-ready
	defer c.Close()
	for range 2 {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		if err := c.Execute(ctx, "query-status", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		cancel()
	}
}

func TestEvents(t *testing.T) {
	c := dialPeer(t, func(w io.Writer, r request) {
		for i := range maxEvents + 10 {
			fmt.Fprintf(w, `{"event": "E%d", "data": {"i": %d}, "timestamp": {"seconds": 10, "microseconds": 5}}`+"\n", i, i)
		}
		fmt.Fprintf(w, `{"return": {}, "id": %q}`+"\n", r.ID)
	})
	// Nobody reads events, and still the command is answered.
	if err := c.Execute(testContext(t), "go", nil, nil); err != nil {
		t.Fatal(err)
	}
	e := <-c.Events()
	if e.Name != "E10" || string(e.Data) != `{"i": 10}` || !e.At.Equal(time.Unix(10, 5000)) {
		t.Errorf("the oldest event kept: %+v", e)
	}
	c.Close()
	n := 0
	for range c.Events() {
		n++
	}
	if n != maxEvents-1 {
		t.Errorf("%d more events, want %d", n, maxEvents-1)
	}
}

func TestBadGreetings(t *testing.T) {
	for text, want := range map[string]string{
		"":                                "awaiting the monitor's greeting: monitor connection is closed",
		"SSH-2.0-OpenSSH_9.2\n":           "awaiting the monitor's greeting: parsing monitor message: invalid character 'S' looking for beginning of value",
		`{"return": {}}` + "\n":           "awaiting the monitor's greeting: monitor connection is closed",
		"{}\n":                            "awaiting the monitor's greeting: parsing monitor message: neither greeting, event nor reply",
		strings.Repeat("x", maxMessage+1): "awaiting the monitor's greeting: bufio.Scanner: token too long",
	} {
		here, there := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.WriteString(there, text)
			there.Close()
		}()
		if _, err := New(testContext(t), here); err == nil || err.Error() != want {
			t.Errorf("%.20q: got %v\nwant %s", text, err, want)
		}
		<-done
	}
}

// QEMU gives the answers that a client did not wait for to the next one, before
// its greeting or after it.
func TestAnswersToAPredecessor(t *testing.T) {
	here, there := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer there.Close()
		fmt.Fprintf(there, `{"return": "old", "id": "1"}`+"\n%s\n", greeting)
		s := bufio.NewScanner(there)
		for s.Scan() {
			var r request
			if err := json.Unmarshal(s.Bytes(), &r); err != nil {
				t.Error(err)
				return
			}
			for _, old := range []string{"1", "2", "3"} {
				fmt.Fprintf(there, `{"return": "old", "id": %q}`+"\n", old)
			}
			fmt.Fprintf(there, `{"return": "new", "id": %q}`+"\n", r.ID)
		}
	}()
	c, err := New(testContext(t), here)
	if err != nil {
		t.Fatal(err)
	}
	var got string
	if err := c.Execute(testContext(t), "query-x", nil, &got); err != nil || got != "new" {
		t.Errorf("got %q, %v", got, err)
	}
	c.Close()
	<-done
}

func TestSilentPeer(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, here); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

func TestPeerHangsUp(t *testing.T) {
	var conn net.Conn
	here, there := net.Pipe()
	conn = there
	peer(t, there, func(io.Writer, request) { conn.Close() })
	c, err := New(testContext(t), here)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Execute(testContext(t), "quit", nil, nil); !errors.Is(err, ErrClosed) ||
		err.Error() != "monitor command quit: monitor connection is closed" {
		t.Errorf("got %v", err)
	}
	<-c.Done()
	if err := c.Execute(testContext(t), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestSendFile(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "qmp-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "m")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan string, 1)
	go func() {
		conn, err := l.AcceptUnix()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintln(conn, greeting)
		b, oob := make([]byte, 1024), make([]byte, 256)
		for range 2 {
			n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
			if err != nil {
				t.Error(err)
				return
			}
			var r request
			if err := json.Unmarshal(b[:n], &r); err != nil {
				t.Error(err)
			}
			if oobn > 0 {
				got <- string(r.Arguments) + " " + contentOf(t, oob[:oobn])
			}
			fmt.Fprintf(conn, `{"return": {}, "id": %q}`+"\n", r.ID)
		}
	}()
	c, err := Dial(testContext(t), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f, err := os.CreateTemp(dir, "f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("hello"); err != nil {
		t.Fatal(err)
	}
	if err := c.SendFile(testContext(t), "state", f); err != nil {
		t.Fatal(err)
	}
	if text := <-got; text != `{"fdname":"state"} hello` {
		t.Errorf("the peer got %s", text)
	}
}

// contentOf reads the file that was passed along.
func contentOf(t *testing.T, oob []byte) string {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(msgs) != 1 {
		t.Errorf("control messages: %v, %v", msgs, err)
		return ""
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Errorf("files: %v, %v", fds, err)
		return ""
	}
	f := os.NewFile(uintptr(fds[0]), "passed")
	defer f.Close()
	b := make([]byte, 64)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	return string(b[:n])
}

func TestSendFileNeedsSocket(t *testing.T) {
	c := dialPeer(t, func(io.Writer, request) {})
	err := c.SendFile(testContext(t), "x", os.Stdin)
	if err == nil || err.Error() != "monitor command getfd: passing a file needs a unix socket" {
		t.Errorf("got %v", err)
	}
}

func TestParseMessage(t *testing.T) {
	for line, want := range map[string]string{
		`{"return": {}, "id": 5}`:    "parsing monitor message: id: json: cannot unmarshal number into Go value of type string",
		`[]`:                         "parsing monitor message: json: cannot unmarshal array into Go value of type struct",
		`{"event": 1}`:               "parsing monitor message: json: cannot unmarshal number into Go struct field .event of type string",
		`{"QMP": null, "data": "x"}`: "parsing monitor message: neither greeting, event nor reply",
	} {
		_, err := ParseMessage([]byte(line))
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v\nwant %s", line, err, want)
		}
	}
	m, err := ParseMessage([]byte(`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "RESET"}`))
	if err != nil || m.Event == nil || !m.Event.At.IsZero() {
		t.Errorf("an event without a time: %+v, %v", m.Event, err)
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, seed := range []string{
		greeting, `{"return": {}, "id": "1"}`, `{"error": {"class": "GenericError", "desc": "no"}}`,
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}`, `{"id": null, "return": null}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := ParseMessage(line)
		set := 0
		for _, is := range []bool{m.Greeting != nil, m.Event != nil, m.Reply != nil} {
			if is {
				set++
			}
		}
		if err == nil && set != 1 || err != nil && set != 0 {
			t.Errorf("%q: %+v, %v", line, m, err)
		}
		if _, err := ReadEvents(strings.NewReader(string(line))); err != nil {
			t.Error(err)
		}
	})
}

// A queue that is full is not a monitor that is away.
func TestConnectFullQueue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		conn, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}

	short, stop := context.WithTimeout(ctx, 3*connectRetry)
	defer stop()
	if _, err := Connect(short, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody accepts: got %v", err)
	}

	connected := make(chan error, 1)
	go func() {
		conn, err := Connect(ctx, path)
		if err == nil {
			conn.Close()
		}
		connected <- err
	}()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := <-connected; err != nil {
		t.Error(err)
	}
}
