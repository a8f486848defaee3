// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// needs is what a built-in box asks of a machine.
type needs struct {
	least, usual lab.Bytes // memory
	cloudInit    bool
}

// builtins returns the built-in boxes, so that a Labfile is checked without
// having any box.
func builtins() map[string]needs {
	return map[string]needs{
		"builtin/debian-12": {least: 256 * lab.MiB, usual: 512 * lab.MiB, cloudInit: true},
		"builtin/tiny":      {least: 128 * lab.MiB, usual: 128 * lab.MiB},
	}
}

// Builtins returns the references of the built-in boxes, sorted.
func Builtins() []string { return slices.Sorted(maps.Keys(builtins())) }

// DefaultMemory returns the memory of a machine whose Labfile does not say it,
// by where its box comes from.
func DefaultMemory(from string) lab.Bytes {
	if n, ok := builtins()[from]; ok {
		return n.usual
	}
	return 512 * lab.MiB
}

// MinMemory returns the memory below which a machine of a built-in box does not
// boot, or 0 if that is not known.
func MinMemory(from string) lab.Bytes { return builtins()[from].least }

// isPath reports whether a reference names a file of the host.
func isPath(ref string) bool {
	return strings.HasPrefix(ref, "/") || strings.HasPrefix(ref, "./") || strings.HasPrefix(ref, "../")
}

// isDirect reports whether ref can be the box of a machine without an entry in
// boxes. Names of the store need an entry, so that a misspelt name of an entry is
// never mistaken for one.
func isDirect(ref string) bool {
	return isPath(ref) || strings.HasPrefix(ref, "builtin/") || strings.Contains(ref, "://") || digestForm.MatchString(ref)
}

var (
	digestForm   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	storeName    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:-]*$`)
	diskFile     = regexp.MustCompile(`(?i)\.(qcow2|img|raw|qcow|vmdk|vdi|vhdx|iso)$`)
	checksumForm = regexp.MustCompile(`^(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$`)
)

// checkReference says what is wrong with where a box comes from.
func checkReference(ref string) error {
	switch {
	case strings.HasPrefix(ref, "builtin/"):
		if _, ok := builtins()[ref]; !ok {
			return fmt.Errorf("there is no built-in box %q%s", shorten(ref),
				didYouMean(ref, Builtins(), "; there are "+strings.Join(Builtins(), " and ")))
		}
		return nil
	case strings.Contains(ref, "://"):
		return checkURL(ref)
	case isPath(ref), digestForm.MatchString(ref):
		return nil
	case strings.HasPrefix(ref, "~"):
		return fmt.Errorf("~ is not expanded; write ${HOME}%s", shorten(strings.TrimPrefix(ref, "~")))
	case diskFile.MatchString(ref):
		return fmt.Errorf("a path begins with ./, ../ or /; write ./%s", shorten(ref))
	case !storeName.MatchString(ref):
		return fmt.Errorf("%q is not a box; write builtin/NAME, an http(s) URL, a path that begins with ./ or /, or the name of a box in the store", shorten(ref))
	}
	return nil
}

func checkURL(ref string) error {
	u, err := url.Parse(ref)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // without the URL, which may hold a password
		}
		return fmt.Errorf("not a URL: %w", err)
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("boxes come from http and https URLs, not from %s", shorten(u.Scheme))
	case u.Host == "":
		return errors.New("the URL names no host")
	case u.User != nil:
		return errors.New("a URL with credentials would end up in the lock file and in logs; leave them out")
	}
	return nil
}

// normalChecksum returns the checksum with its algorithm, in lower case.
func normalChecksum(s string) (string, error) {
	if name, ok := strings.CutPrefix(s, "file:"); ok {
		if name == "" {
			return "", errors.New("file: needs the URL or path of a SHA256SUMS or SHA512SUMS file")
		}
		return s, nil
	}
	c := strings.ToLower(s)
	if !strings.Contains(c, ":") {
		c = map[int]string{64: "sha256:", 128: "sha512:"}[len(c)] + c
	}
	if !checksumForm.MatchString(c) {
		return "", fmt.Errorf("%q is not a checksum; write sha256: and 64 hexadecimal digits, or sha512: and 128", shorten(s))
	}
	return c, nil
}

// boxEntries checks the boxes of the document and returns those that are right,
// by name.
func (c *converter) boxEntries() map[string]lab.Box {
	boxes := map[string]lab.Box{}
	for _, row := range c.doc.Boxes.rows {
		if !lab.ValidLabel(row.name) {
			c.add(row.key, "%q is not a name; %s", shorten(row.name), labelRule)
		}
		box := lab.Box{Name: row.name, From: row.value.From.value}
		if from := row.value.From; from.set() {
			if err := checkReference(from.value); err != nil {
				c.add(from.place, "%v", err)
				box.From = ""
			}
		}
		if sum := row.value.Checksum; sum.set() {
			var err error
			if box.Checksum, err = normalChecksum(sum.value); err != nil {
				c.add(sum.place, "%v", err)
			} else if strings.HasPrefix(box.From, "builtin/") {
				c.add(sum.place, "a built-in box takes no checksum: it is built from signed packages, and the lock file pins it")
			}
		}
		boxes[row.name] = box
	}
	return boxes
}

// box returns the box that a machine names. Its From is empty if there was a
// problem with it, which has been noted.
func (c *converter) box(name text) lab.Box {
	if !name.set() {
		return lab.Box{}
	}
	if b, ok := c.boxes[name.value]; ok {
		return b
	}
	if err := checkReference(name.value); err != nil {
		c.add(name.place, "%v", err)
		return lab.Box{}
	}
	if !isDirect(name.value) {
		c.add(name.place, "%q is not in boxes%s", shorten(name.value), c.suggestBox(name.value))
		return lab.Box{}
	}
	return lab.Box{Name: name.value, From: name.value}
}

// suggestBox returns the end of a message about a box that is not there.
func (c *converter) suggestBox(name string) string {
	if c.full() {
		return "" // nobody will read it
	}
	if _, ok := builtins()["builtin/"+name]; ok {
		return fmt.Sprintf("; did you mean %q?", "builtin/"+name)
	}
	return didYouMean(name, append(slices.Sorted(maps.Keys(c.boxes)), Builtins()...),
		fmt.Sprintf("; add it there, or write %s, an http(s) URL or a path that begins with ./", strings.Join(Builtins(), ", ")))
}
