// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"testing"

	"golang.org/x/crypto/ssh"
)

// A request that came before a channel is handled before it, however the two are delivered.
func TestRequestsComeBeforeChannels(t *testing.T) {
	for range 100 {
		chans, reqs := make(chan ssh.NewChannel, 2), make(chan *ssh.Request, 16)
		for range 3 {
			reqs <- new(ssh.Request)
		}
		chans <- nil
		close(chans)
		handled, yielded := 0, 0
		for range inOrder(chans, reqs, func(*ssh.Request) { handled++ }) {
			if yielded++; handled != 3 {
				t.Fatalf("%d requests were handled before the channel, want 3", handled)
			}
		}
		if yielded != 1 {
			t.Fatalf("%d channels", yielded)
		}
	}
}
