// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/diff"
)

// maxText is how long a file may be, in bytes, to be shown as text.
const maxText = 256 << 10

// Diff returns a unified diff of the text of a file that was added, deleted or whose
// content changed, or a line that says why there is none. It is empty for all else.
func Diff(old, now *Root, c Change) (string, error) {
	if c.Op == Modified && (len(c.What) == 0 || c.What[0] != Content) {
		return "", nil
	}
	a, whyA, err := old.text(c.Old)
	if err != nil {
		return "", fmt.Errorf("%s: %w", c.Path, err)
	}
	b, whyB, err := now.text(c.New)
	if err != nil {
		return "", fmt.Errorf("%s: %w", c.Path, err)
	}
	if secret(c.Path, a) || secret(c.Path, b) {
		return fmt.Sprintf("%q has secrets, which are not shown\n", c.Path), nil
	}
	for _, why := range []string{whyA, whyB} {
		if why != "" {
			return fmt.Sprintf("%q %s\n", c.Path, why), nil
		}
	}
	return string(diff.Diff(name("a", c.Path, c.Old), a, name("b", c.Path, c.New), b)), nil
}

// secret reports whether a text is one that should not reach a terminal or a log.
func secret(path string, text []byte) bool {
	for _, prefix := range []string{"/etc/shadow", "/etc/gshadow", "/var/lib/lab-agent/"} {
		if strings.HasPrefix(path, prefix) {
			return true
		}
	}
	return bytes.Contains(text, []byte("PRIVATE KEY-----"))
}

func name(side, path string, m *Meta) string {
	if m == nil {
		return "/dev/null"
	}
	return fmt.Sprintf("%s%s", side, path)
}

// text returns a file's text, none for what is no file, or why it can't be shown.
func (r *Root) text(m *Meta) (text []byte, why string, err error) {
	if m == nil || m.Kind != KindFile {
		return nil, "", nil
	}
	if m.Size > maxText {
		return nil, fmt.Sprintf("has %d bytes, too many to show", m.Size), nil
	}
	text, err = r.fs.ReadFile(m.inode, maxText)
	if err == nil && (bytes.IndexByte(text, 0) >= 0 || !utf8.Valid(text)) {
		why = "is binary"
	}
	return text, why, err
}
