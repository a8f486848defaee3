// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// packet makes one of a call's with that serial number.
func packet(kind, serial, status uint32, data string) string {
	h := header{length: uint32(headerSize + len(data)), procedure: 209, kind: kind, serial: serial, status: status}
	return string(h.append(nil)) + data
}

func TestPackets(t *testing.T) {
	const (
		reply, stream, event = socket.Reply, socket.Stream, socket.Message
		ok, failed, more     = socket.StatusOK, socket.StatusError, socket.StatusContinue
	)
	for _, c := range []struct {
		name      string
		in        []string
		want      []int // which of in come out, in that order
		finished  []uint32
		wantError string
	}{
		{
			name: "in order",
			in:   []string{packet(reply, 1, ok, "r"), packet(stream, 1, more, "a"), packet(stream, 1, more, "")},
			want: []int{0, 1, 2}, finished: []uint32{1},
		},
		{
			name: "data before the reply, an event and another call",
			in: []string{
				packet(stream, 1, more, "a"), packet(event, 0, ok, "e"), packet(stream, 1, more, "b"), packet(reply, 2, ok, "x"),
				packet(reply, 1, ok, ""), packet(stream, 1, more, ""),
			},
			want: []int{1, 3, 4, 0, 2, 5}, finished: []uint32{1},
		},
		{
			name: "an end before the reply",
			in:   []string{packet(stream, 1, more, ""), packet(reply, 1, ok, "")},
			want: []int{1, 0}, finished: []uint32{1},
		},
		{
			name: "what comes after the end",
			in: []string{
				packet(reply, 1, ok, ""), packet(stream, 1, more, ""), packet(stream, 1, ok, ""), packet(stream, 1, failed, "why"),
				packet(reply, 2, ok, ""),
			},
			want: []int{0, 1, 4}, finished: []uint32{1},
		},
		{
			name: "an error ends a stream",
			in:   []string{packet(reply, 1, ok, ""), packet(stream, 1, failed, "why"), packet(stream, 1, more, "late")},
			want: []int{0, 1},
		},
		{
			name: "a short length", in: []string{"\x00\x00\x00\x05" + string(make([]byte, 24))},
			wantError: `what comes from there is not libvirt's protocol: "\x00\x00\x00\x05` + strings.Repeat(`\x00`, 24) + `"`,
		},
		{
			name: "a long length", in: []string{"\xff\x00\x00\x05" + string(make([]byte, 24))},
			wantError: `what comes from there is not libvirt's protocol: "\xff\x00\x00\x05` + strings.Repeat(`\x00`, 24) + `"`,
		},
		{
			name: "a greeting", in: []string{"Welcome, stranger.\nThere is more to say.\n"},
			wantError: `what comes from there is not libvirt's protocol: "Welcome, stranger."`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var in, want bytes.Buffer
			for _, p := range c.in {
				in.WriteString(p)
			}
			for _, i := range c.want {
				want.WriteString(c.in[i])
			}
			var finished []uint32
			p := newPackets(iotest.OneByteReader(&in), func(h header) { finished = append(finished, h.serial) })
			got, err := io.ReadAll(iotest.HalfReader(p))
			if c.wantError == "" && err != nil || c.wantError != "" && (err == nil || err.Error() != c.wantError) {
				t.Errorf("error %v", err)
			}
			if !bytes.Equal(got, want.Bytes()) {
				t.Errorf("got  %q\nwant %q", got, want.Bytes())
			}
			if fmt.Sprint(finished) != fmt.Sprint(c.finished) {
				t.Errorf("finished %v, want %v", finished, c.finished)
			}
		})
	}
}

// A stream stays open however many other calls are answered meanwhile.
func TestPacketsOfALongStream(t *testing.T) {
	in := bytes.NewBufferString(packet(socket.Reply, 1, socket.StatusOK, "") + packet(socket.Stream, 1, socket.StatusContinue, "a"))
	for n := range uint32(3 * recentCalls) {
		in.WriteString(packet(socket.Reply, n+2, socket.StatusOK, ""))
	}
	in.WriteString(packet(socket.Stream, 1, socket.StatusContinue, "b"))
	want := bytes.Clone(in.Bytes())
	p := newPackets(in, func(header) {})
	if got, err := io.ReadAll(p); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came of %d, %v", len(got), len(want), err)
	}
	if len(p.calls) > recentCalls+1 || len(p.calls) != len(p.order) {
		t.Errorf("%d calls are remembered, %d in order", len(p.calls), len(p.order))
	}
}

func FuzzPackets(f *testing.F) {
	f.Add([]byte(packet(socket.Stream, 1, socket.StatusContinue, "a") + packet(socket.Reply, 1, socket.StatusOK, "")))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := newPackets(bytes.NewReader(b), func(header) {})
		if out, _ := io.ReadAll(p); len(out) > len(b) {
			t.Errorf("%d bytes came of %d", len(out), len(b))
		}
	})
}

// One connection serves many downloads: nothing is lost, nothing hangs, and the daemon
// keeps no files open.
func TestDownloads(t *testing.T) {
	t.Parallel()
	d := daemontest.StartRemote(t)
	r := testRemote(t, "qemu+tcp://127.0.0.1:"+d.Port+"/session", d, testDirs(t))
	files, err := r.pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("0123456789"), 500)
	path := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := files.put(t.Context(), "content", f, rawVolume); err != nil {
		t.Fatal(err)
	}
	open := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.PID))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := open()
	for i := range 3000 { // go-libvirt alone hung once in 2000
		at := i % (len(content) + 2)
		got, err := files.tail(t.Context(), "content", int64(at))
		if err != nil {
			t.Fatal(err)
		}
		if want := content[min(at, len(content)):]; !bytes.Equal(got, want) {
			t.Fatalf("download %d: got %d bytes, want %d", i, len(got), len(want))
		}
	}
	// A disk here that is full is an error, at once.
	full := errors.New("full")
	for range 20 {
		if err := files.get(t.Context(), "content", failing{full}); !errors.Is(err, full) {
			t.Fatalf("fetching to a full disk: %v", err)
		}
	}
	if err := r.p.link.ask(t.Context(), func(l *golibvirt.Libvirt) error { _, err := l.ConnectGetLibVersion(); return err }); err != nil {
		t.Error(err)
	}
	if after := open(); after > before+20 {
		t.Errorf("libvirtd has %d files open, had %d", after, before)
	}
	if err := files.remove(t.Context(), "content"); err != nil {
		t.Error(err)
	}
}

// failing is a file on a full disk.
type failing struct{ err error }

func (f failing) Write([]byte) (int, error) {
	time.Sleep(time.Millisecond) // more comes meanwhile
	return 0, f.err
}
