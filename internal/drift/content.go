// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/labfile/lab/internal/drift/ext4"
	"github.com/labfile/lab/internal/proxy"
)

// maxText is how long a file may be, in bytes, to be shown as text.
const maxText = 256 << 10

// Side is one of the two file systems that are compared, as far as the contents of
// its files go.
type Side interface {
	// contents writes at most limit bytes of a regular file to w, or says why
	// nobody can.
	contents(ctx context.Context, w io.Writer, path string, m *Meta, limit int64) (why string, err error)
	// accounts are the names in /etc/passwd or /etc/group.
	accounts(ctx context.Context, path string) (map[uint32]string, error)
}

// Diff returns a unified diff of the text of a file that was added, deleted or whose
// content changed, or a line that says why there is none. It is empty for all else.
func Diff(ctx context.Context, old, now Side, c Change) (string, error) {
	if c.Op == Modified && (len(c.What) == 0 || c.What[0] != Content) {
		return "", nil
	}
	if c.Op != Added && c.Old.Kind == KindFile && lost(old) {
		return after(ctx, now, c)
	}
	a, whyA, err := text(ctx, old, c.Path, c.Old)
	if err != nil {
		return "", fmt.Errorf("%s: %w", c.Path, err)
	}
	b, whyB, err := text(ctx, now, c.Path, c.New)
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

// after is Diff where nobody has kept what was in the file.
func after(ctx context.Context, now Side, c Change) (string, error) {
	if c.Op == Deleted {
		return fmt.Sprintf("%q was deleted; what was in it was not kept\n", c.Path), nil
	}
	b, why, err := text(ctx, now, c.Path, c.New)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", c.Path, err)
	case secret(c.Path, b):
		why = "has secrets, which are not shown"
	case why == "":
		head := fmt.Sprintf("%q was changed; what was in it was not kept, and this is in it now:\n", c.Path)
		return head + string(diff.Diff(name("a", c.Path, nil), nil, name("b", c.Path, c.New), b)), nil
	}
	return fmt.Sprintf("%q %s\n", c.Path, why), nil
}

// secret reports whether a text is one that should not reach a terminal or a log.
func secret(path string, text []byte) bool {
	// cloud-init keeps copies of user data, which has keys, and settings of proxies, which
	// may have passwords.
	for _, prefix := range []string{"/etc/shadow", "/etc/gshadow", "/var/lib/lab-agent/", "/var/lib/cloud/"} {
		if strings.HasPrefix(path, prefix) {
			return true
		}
	}
	if proxy.HasBlock(text) { // a proxy may want a password
		return true
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
func text(ctx context.Context, s Side, path string, m *Meta) (text []byte, why string, err error) {
	if m == nil || m.Kind != KindFile {
		return nil, "", nil
	}
	if m.Size > maxText {
		return nil, fmt.Sprintf("has %d bytes, too many to show", m.Size), nil
	}
	var b bytes.Buffer
	if why, err = s.contents(ctx, &b, path, m, maxText); why == "" && err == nil && !plain(b.Bytes()) {
		why = "is binary"
	}
	return b.Bytes(), why, err
}

func plain(text []byte) bool { return bytes.IndexByte(text, 0) < 0 && utf8.Valid(text) }

var _ Side = (*Root)(nil)

func (r *Root) contents(ctx context.Context, w io.Writer, _ string, m *Meta, limit int64) (string, error) {
	f, err := r.fs.File(m.inode)
	if err != nil {
		return "", err
	}
	for off, end := int64(0), min(f.Size(), limit); off < end; off += chunk {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		if _, err := io.Copy(w, io.NewSectionReader(f, off, min(chunk, end-off))); err != nil {
			return "", err
		}
	}
	return "", nil
}

// accounts implements Side. A disk without the file has no names.
func (r *Root) accounts(ctx context.Context, path string) (map[uint32]string, error) {
	i, err := r.fs.Lookup(strings.TrimPrefix(path, "/"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if i.Type() != ext4.TypeFile || i.Size > maxText {
		return nil, nil
	}
	text, err := r.fs.ReadFile(i, maxText)
	return accounts(text), err
}

// accountName is what a Labfile takes for a user or group.
var accountName = regexp.MustCompile(`^[a-z_][a-z0-9_.-]{0,31}$`)

// accounts reads the names in passwd or group.
func accounts(text []byte) map[uint32]string {
	names := map[uint32]string{}
	for line := range strings.Lines(string(text)) {
		f := strings.Split(line, ":")
		if len(f) < 3 || !accountName.MatchString(f[0]) {
			continue
		}
		if n, err := strconv.ParseUint(strings.TrimSpace(f[2]), 10, 32); err == nil && names[uint32(n)] == "" {
			names[uint32(n)] = f[0]
		}
	}
	return names
}
