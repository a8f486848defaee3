// SPDX-License-Identifier: Apache-2.0

package agentapi

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestControl(t *testing.T) {
	host, guest := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer guest.Close()
		if h, err := Accept(guest); h != (Header{Kind: Control}) || err != nil {
			t.Errorf("accepted %+v, %v", h, err)
		}
		if err := Answer(guest, nil); err != nil {
			t.Error(err)
		}
		err := Serve(guest, func(r Request) Response {
			if r.Op != OpIdentify {
				return Response{Error: "not now"}
			}
			return Response{Hello: &Hello{Hostname: r.Identity.Hostname, Uptime: time.Second}}
		})
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	ctx := t.Context()
	if err := Begin(ctx, host, Control); err != nil {
		t.Fatal(err)
	}
	resp, err := Call(ctx, host, Request{Op: OpIdentify, Identity: &Identity{Hostname: "web"}})
	if err != nil || resp.Hello == nil || resp.Hello.Hostname != "web" || resp.Hello.Uptime != time.Second {
		t.Errorf("got %+v, %v", resp, err)
	}
	_, err = Call(ctx, host, Request{Op: OpSync})
	var refused *RefusedError
	if !errors.As(err, &refused) || err.Error() != `the agent refused "sync": not now` {
		t.Errorf("got %v", err)
	}
	host.Close()
	wg.Wait()
}

func TestRefusedStream(t *testing.T) {
	host, guest := net.Pipe()
	defer host.Close()
	go func() {
		_, _ = Accept(guest)
		_ = Answer(guest, errors.New("no identity"))
		guest.Close()
	}()
	err := Begin(t.Context(), host, SSH)
	if err == nil || err.Error() != `the agent refused "ssh": no identity` {
		t.Errorf("got %v", err)
	}
}

func TestContextEndsWaiting(t *testing.T) {
	cause := errors.New("enough")
	for _, f := range []func(context.Context, net.Conn) error{
		func(ctx context.Context, c net.Conn) error { return Begin(ctx, c, Control) },
		func(ctx context.Context, c net.Conn) error { _, err := Call(ctx, c, Request{}); return err },
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		host, guest := net.Pipe()
		go func() {
			_, _ = guest.Read(make([]byte, 1))
			cancel(cause)
		}()
		if err := f(ctx, host); !errors.Is(err, cause) {
			t.Errorf("got %v, want %v", err, cause)
		}
		guest.Close()
	}
}

func TestReadLine(t *testing.T) {
	r := strings.NewReader("{\"kind\":\"ssh\"}\nSSH-2.0")
	var h Header
	if err := readLine(r, maxHeader, &h); err != nil || h.Kind != SSH {
		t.Errorf("got %+v, %v", h, err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "SSH-2.0" {
		t.Errorf("left %q", rest)
	}
	for in, want := range map[string]string{
		"":                                      "EOF",
		"{":                                     "unexpected EOF",
		"{\n":                                   "unexpected end of JSON input",
		strings.Repeat(" ", maxHeader+1) + "\n": "a line of more than 16384 bytes",
	} {
		if err := readLine(strings.NewReader(in), maxHeader, &h); err == nil || err.Error() != want {
			t.Errorf("%.10q: got %v, want %s", in, err, want)
		}
	}
}

func TestFingerprint(t *testing.T) {
	id := Identity{Hostname: "web", HostKey: []byte("k"), Address: netip.MustParsePrefix("10.0.0.2/24")}
	same := id
	same.Time, same.Entropy = time.Now(), []byte("x")
	other := id
	other.Hostname = "db"
	if id.Fingerprint() != same.Fingerprint() {
		t.Error("what is of the moment changes the fingerprint")
	}
	if id.Fingerprint() == other.Fingerprint() || len(id.Fingerprint()) != 32 {
		t.Errorf("fingerprints %s and %s", id.Fingerprint(), other.Fingerprint())
	}
}

func TestValidate(t *testing.T) {
	ok := Identity{Hostname: "web", HostKey: []byte("k")}
	for _, tc := range []struct {
		change func(*Identity)
		want   string
	}{
		{func(*Identity) {}, ""},
		{func(id *Identity) { id.Hostname = "" }, "identity: hostname must have 1 to 64 bytes"},
		{func(id *Identity) { id.MAC = "52:54:00:00:00:01" }, "identity: address must be an IPv4 prefix"},
		{func(id *Identity) { id.HostKey = nil }, "identity: host key is missing"},
		{func(id *Identity) { id.Domain = "a\nnameserver 1.1.1.1" }, `identity: "a\nnameserver 1.1.1.1" is more than one line`},
		{func(id *Identity) { id.AuthorizedKeys = []string{"a\nb"} }, `identity: "a\nb" is more than one line`},
	} {
		id := ok
		tc.change(&id)
		err := id.Validate()
		if (err == nil) != (tc.want == "") || err != nil && err.Error() != tc.want {
			t.Errorf("got %v, want %q", err, tc.want)
		}
	}
}
