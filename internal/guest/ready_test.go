// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

// check fills in times that a passing check needs, and a failing one uses up.
func check(c lab.Check, timeout time.Duration) []lab.Check {
	c.Timeout, c.Interval = timeout, time.Millisecond
	return []lab.Check{c}
}

const (
	plenty = time.Minute
	little = 50 * time.Millisecond
)

// dialTo is a target all of whose ports are one server.
func dialTo(addr string) guest.Target {
	return guest.Target{Machine: "web", Dialers: guest.Dialers{
		Port: func(ctx context.Context, port uint16) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		},
	}}
}

func wantNotReady(t *testing.T, err error, after time.Duration, want string) {
	t.Helper()
	var not *guest.NotReadyError
	if !errors.As(err, &not) {
		t.Fatalf("got %v, want NotReadyError", err)
	}
	if not.After != after || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want after %v: %s", err, after, want)
	}
}

func TestReadyPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := dialTo(l.Addr().String())
	c := lab.Check{Kind: lab.CheckPort, Port: 5432}
	if err := guest.WaitReady(testContext(t), target, check(c, plenty), nil, nil); err != nil {
		t.Error(err)
	}
	l.Close()
	var told []string
	err = guest.WaitReady(testContext(t), target, check(c, little), nil, func(c lab.Check, err error) {
		told = append(told, fmt.Sprint(c, " ", err))
	})
	refused := `reaching port 5432 of machine "web": dial tcp ` + l.Addr().String() + ": connect: connection refused"
	wantNotReady(t, err, little, "check port 5432 failed for 50ms: "+refused)
	if got, want := fmt.Sprintf("%q", told), fmt.Sprintf("%q", []string{"port 5432 <nil>", "port 5432 " + refused}); got != want {
		t.Errorf("told %s, want %s", got, want)
	}
}

func TestReadyHTTP(t *testing.T) {
	var calls atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/later":
			if calls.Add(1) < 3 {
				w.WriteHeader(503)
			}
		case "/elsewhere":
			http.Redirect(w, r, "http://no.such.host.invalid/", http.StatusFound)
		case "/endless":
			for {
				if _, err := w.Write(make([]byte, 4096)); err != nil {
					return
				}
			}
		case "/hung":
			<-r.Context().Done()
		case "/host":
			if r.Host != "web:80" {
				w.WriteHeader(400)
			}
		default:
			w.WriteHeader(404)
		}
	}))
	defer srv.Close()
	target := dialTo(srv.Listener.Addr().String())
	for _, path := range []string{"/later", "/elsewhere", "/endless", "/host"} {
		c := lab.Check{Kind: lab.CheckHTTP, Port: 80, Path: path}
		if err := guest.WaitReady(testContext(t), target, check(c, plenty), nil, nil); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	ok := lab.Check{Kind: lab.CheckHTTP, Port: 80, Path: "/no", Status: 404}
	if err := guest.WaitReady(testContext(t), target, check(ok, plenty), nil, nil); err != nil {
		t.Error(err)
	}
	no := lab.Check{Kind: lab.CheckHTTP, Port: 80, Path: "/no"}
	wantNotReady(t, guest.WaitReady(testContext(t), target, check(no, little), nil, nil), little,
		"check http :80/no failed for 50ms: got status 404, want a status from 200 to 399")
	hung := lab.Check{Kind: lab.CheckHTTP, Port: 80, Path: "/hung"}
	wantNotReady(t, guest.WaitReady(testContext(t), target, check(hung, little), nil, nil), little, "context deadline exceeded")
}

func TestReadyExec(t *testing.T) {
	b := newBox(t)
	b.connect(t)
	c := lab.Check{Kind: lab.CheckExec, Command: "echo x >>tries; test $(wc -l <tries) -ge 3"}
	if err := guest.WaitReady(testContext(t), b.Target, check(c, plenty), nil, nil); err != nil {
		t.Error(err)
	}
	c.Command = "echo it is broken >&2; exit 7"
	err := guest.WaitReady(testContext(t), b.Target, check(c, time.Second), nil, nil)
	wantNotReady(t, err, time.Second, "command ended with exit code 7: it is broken")
	if exit := (*guest.ExitError)(nil); errors.As(err, &exit) {
		t.Errorf("a check's exit code can be taken for one to pass on: %v", exit)
	}
}

func TestReadySSH(t *testing.T) {
	key, host := newKey(t), newKey(t)
	c := lab.Check{Kind: lab.CheckSSH}
	target := guest.Target{Machine: "web", User: "root", Key: key.Signer, HostKey: host.Signer.PublicKey()}
	b := newBox(t)
	b.connect(t)
	// The agent's ssh server stands in for the guest's own.
	b.Target.Port = func(ctx context.Context, port uint16) (net.Conn, error) {
		if port != 22 {
			t.Errorf("port %d was dialled", port)
		}
		return guest.DialSSH(ctx, guest.Target{Machine: "web", Dialers: guest.Dialers{Agent: b.Agent}})
	}
	if err := guest.WaitReady(testContext(t), b.Target, check(c, plenty), nil, nil); err != nil {
		t.Error(err)
	}
	target.Port = b.Target.Port
	wantNotReady(t, guest.WaitReady(testContext(t), target, check(c, time.Second), nil, nil), time.Second,
		"the host key is not the one that lab gave the machine")
}

// growingLog gives its parts one by one, with an end after each.
type growingLog struct {
	parts  [][]byte
	closed *bool
}

func (l *growingLog) Read(p []byte) (int, error) {
	if len(l.parts) == 0 {
		return 0, io.EOF
	}
	n := copy(p, l.parts[0])
	if l.parts[0] = l.parts[0][n:]; len(l.parts[0]) == 0 {
		l.parts = l.parts[1:]
		return n, io.EOF
	}
	return n, nil
}

func (l *growingLog) Close() error { *l.closed = true; return nil }

func TestReadyConsole(t *testing.T) {
	c := lab.Check{Kind: lab.CheckConsole, Pattern: `login on tty\d+`}
	noise := bytes.Repeat([]byte("noise\n"), 200_000)
	closed := false
	log := func(parts ...[]byte) func() (guest.Log, error) {
		return func() (guest.Log, error) { return &growingLog{parts, &closed}, nil }
	}
	target := guest.Target{Machine: "web"}
	// Across any seam, behind any amount of noise.
	for cut := range len("login on tty1") {
		text := []byte("login on tty1\n")
		if err := guest.WaitReady(testContext(t), target, check(c, plenty), log(noise[:150_000+cut], text[:cut], text[cut:]), nil); err != nil {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
	if !closed {
		t.Error("the log was not closed")
	}
	wantNotReady(t, guest.WaitReady(testContext(t), target, check(c, little), log(noise), nil), little,
		`check console /login on tty\d+/ failed for 50ms: the console has not printed it`)
	broken := func() (guest.Log, error) { return nil, errors.New("no log") }
	wantNotReady(t, guest.WaitReady(testContext(t), target, check(c, little), broken, nil), little, "opening the console log: no log")
}

func TestReadyCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(testContext(t))
	cause := errors.New("changed my mind")
	target := guest.Target{Machine: "web", Dialers: guest.Dialers{Port: func(ctx context.Context, _ uint16) (net.Conn, error) {
		cancel(cause)
		<-ctx.Done()
		return nil, ctx.Err()
	}}}
	err := guest.WaitReady(ctx, target, check(lab.Check{Kind: lab.CheckPort, Port: 1}, plenty), nil, nil)
	if err != cause {
		t.Errorf("got %v, want %v", err, cause)
	}
}

func TestReadyInOrder(t *testing.T) {
	var told []string
	target := guest.Target{Machine: "web", Dialers: guest.Dialers{Port: func(_ context.Context, port uint16) (net.Conn, error) {
		told = append(told, fmt.Sprint(port))
		a, b := net.Pipe()
		b.Close()
		return a, nil
	}}}
	checks := append(check(lab.Check{Kind: lab.CheckPort, Port: 1}, plenty), check(lab.Check{Kind: lab.CheckPort, Port: 2}, plenty)...)
	if err := guest.WaitReady(testContext(t), target, checks, nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(told, " "); got != "1 2" {
		t.Errorf("ports were tried in the order %s", got)
	}
	err := guest.WaitReady(testContext(t), target, check(lab.Check{Kind: "magic"}, plenty), nil, nil)
	if want := `unknown kind of check: "magic"`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
