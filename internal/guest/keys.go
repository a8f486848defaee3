// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// Key is an ed25519 key pair.
type Key struct {
	PEM    []byte // the private key in OpenSSH's format
	Signer ssh.Signer
}

// NewKey makes a key pair. The comment is for humans who look into the file.
func NewKey(comment string) (Key, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return Key{}, fmt.Errorf("making a key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return Key{}, fmt.Errorf("making a key: %w", err)
	}
	return ParseKey(pem.EncodeToMemory(block))
}

// ParseKey reads a private key that NewKey made.
func ParseKey(data []byte) (Key, error) {
	signer, err := ssh.ParsePrivateKey(data)
	if err != nil {
		return Key{}, fmt.Errorf("reading a key: %w", err)
	}
	if signer.PublicKey().Type() != ssh.KeyAlgoED25519 {
		return Key{}, errors.New("reading a key: it is not an ed25519 key")
	}
	return Key{PEM: data, Signer: signer}, nil
}

// AuthorizedKey returns the key as a line of authorized_keys(5), without comment
// and end of line.
func AuthorizedKey(k ssh.PublicKey) string {
	return string(bytes.TrimSpace(ssh.MarshalAuthorizedKey(k)))
}

// KnownHostsLine returns a line of a known_hosts file, with its end of line.
func KnownHostsLine(host string, k ssh.PublicKey) string {
	return knownhosts.Line([]string{host}, k) + "\n"
}

// Quote joins words into a command line that a POSIX shell splits into the same
// words again.
func Quote(words []string) string {
	var b strings.Builder
	for i, w := range words {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(quote(w))
	}
	return b.String()
}

func quote(w string) string {
	plain := w != ""
	for _, c := range []byte(w) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-_./:,+@%", c) >= 0:
		default:
			plain = false
		}
	}
	if plain {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
