// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// TestVagrantKeys makes the published public keys of the numbers.
func TestVagrantKeys(t *testing.T) {
	keys, err := vagrantKeys()
	if err != nil {
		t.Fatal(err)
	}
	// The fingerprints of vagrant.pub.ed25519 and vagrant.pub.rsa, by ssh-keygen -l.
	for i, want := range []string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIN1YdxBpNlzxDqfJyw/QKow1F+wvG9hXGoqiysfJOn5Y", "ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw"} {
		if got := AuthorizedKey(keys[i].PublicKey()); !strings.HasPrefix(got, want) {
			t.Errorf("key %d is %s", i, got)
		}
		sig, err := keys[i].Sign(zeros{}, []byte("data"))
		if err != nil {
			t.Fatal(err)
		}
		if err := keys[i].PublicKey().Verify([]byte("data"), sig); err != nil {
			t.Errorf("key %d: %v", i, err)
		}
	}
	var _ []ssh.Signer = keys
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
