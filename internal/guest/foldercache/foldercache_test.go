// SPDX-License-Identifier: Apache-2.0

package foldercache

import (
	"bytes"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// sample has one of everything.
func sample() Message {
	return Message{Kind: Content, ID: 7, Errno: syscall.EAGAIN, Path: "/a b", Name: "c\xff", Files: []File{
		{Name: "x\n", Mode: 0o100644, Size: 1 << 40, Attr: agentapi.Attr{
			Dev: 1, Ino: 1<<64 - 1, Nlink: 2, Blocks: 8,
			Atime: time.Unix(0, -1), Mtime: time.Unix(1e9, 123456789), Ctime: time.Unix(0, 0),
		}, Data: []byte("text")},
		{Name: "empty", Attr: agentapi.Attr{Atime: time.Unix(0, 0), Mtime: time.Unix(0, 0), Ctime: time.Unix(0, 0)}, Data: []byte{}},
	}}
}

func TestStream(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b)
	q := Request{ID: 1<<64 - 1, Path: "/sub", From: "f\x00"}
	if err := errors.Join(w.Request(q), w.Message(sample()), w.Message(Message{Kind: Forget})); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(b.Bytes())
	r := NewReader(&b)
	if got, err := r.Request(); err != nil || got != q {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, want := range []Message{sample(), {Kind: Forget}} {
		got, err := r.Message()
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	if _, err := r.Message(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	// Whatever is cut off is an error, and no message.
	for n := range len(whole) - 6 {
		r := NewReader(bytes.NewReader(whole[:n]))
		_, err := r.Request()
		if err == nil {
			_, err = r.Message()
		}
		if err == nil {
			t.Fatalf("cut at %d, and nobody noticed", n)
		}
	}
}

func FuzzReader(f *testing.F) {
	var b bytes.Buffer
	if err := NewWriter(&b).Message(sample()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := NewReader(bytes.NewReader(b)).Message()
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := NewWriter(&again).Message(m); err != nil {
			t.Fatal(err)
		}
		got, err := NewReader(&again).Message()
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(m, got); d != "" {
			t.Error(d)
		}
	})
}
