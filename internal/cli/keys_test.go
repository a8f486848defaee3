// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"
	"sync/atomic"
	"testing"
)

// What is typed goes to the guest, Ctrl-C too, until it is silent: Ctrl-C ends it then,
// though nobody takes what was typed before.
func TestTypedKeys(t *testing.T) {
	in, keyboard := io.Pipe()
	var silent atomic.Bool
	stopped := make(chan struct{})
	k := typedKeys(in, silent.Load, func() { close(stopped) })
	typeIn := func(s string) {
		if _, err := io.WriteString(keyboard, s); err != nil {
			t.Fatal(err)
		}
	}
	typeIn("ls\x03")
	got := make([]byte, 3)
	if _, err := io.ReadFull(k, got); err != nil || string(got) != "ls\x03" {
		t.Errorf("the guest got %q, %v", got, err)
	}
	if k.interrupted.Load() {
		t.Error("interrupted while the guest answers")
	}
	typeIn("lost")
	silent.Store(true)
	typeIn("more")
	typeIn("\x03")
	<-stopped
	if !k.interrupted.Load() {
		t.Error("not interrupted")
	}
	rest, err := io.ReadAll(k)
	if err != nil || string(rest) != "lostmore" {
		t.Errorf("the guest got %q, %v", rest, err)
	}
}
