// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"strings"
)

// File is the guest's file that settings are written to, between marks.
const File = "/etc/environment"

// The beginnings of the lines between which lab's part of File stands.
const (
	blockBegin = "# begin: written by lab"
	blockEnd   = "# end: written by lab"
)

// HasBlock reports whether a text has a part that lab wrote.
func HasBlock(text []byte) bool {
	return bytes.HasPrefix(text, []byte(blockBegin)) || bytes.Contains(text, []byte("\n"+blockBegin))
}

// WithoutBlock returns a text without the part that lab wrote, and without empty lines at
// its end.
func WithoutBlock(text []byte) string {
	var b strings.Builder
	within := false
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, blockBegin):
			within = true
		case within && strings.HasPrefix(line, blockEnd):
			within = false
		case !within:
			b.WriteString(line)
		}
	}
	return strings.TrimRight(b.String(), "\n")
}
