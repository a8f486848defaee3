// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// hostPath reports whether the text can be a path of the host, and notes why not.
func (c *converter) hostPath(t text) bool {
	switch {
	case strings.HasPrefix(t.value, "~"):
		c.add(t.place, "~ is not expanded; write ${HOME}%s", shorten(strings.TrimPrefix(t.value, "~")))
	case strings.Contains(t.value, "://"):
		c.add(t.place, "%q is a URL; name a file of this host, or fetch it in a shell step", shorten(t.value))
	case strings.ContainsAny(t.value, "\n\r"):
		c.add(t.place, "a path has one line")
	default:
		return true
	}
	return false
}

// hostKind is what a path of the host must lead to.
type hostKind string

const (
	scriptFile  hostKind = "script"
	anyFile     hostKind = "file or folder"
	mountFolder hostKind = "folder"
)

// hostFile notes a path that leads to nothing of its kind, or to nothing that this user
// may read.
func (c *converter) hostFile(t text, kind hostKind) {
	if c.dir == "" || !t.set() {
		return
	}
	path := t.value
	if !filepath.IsAbs(path) {
		path = filepath.Join(c.dir, path)
	}
	fi, err := os.Stat(path)
	if err == nil && (fi.Mode().IsRegular() || fi.IsDir()) { // nothing else is opened: a pipe would block
		var f *os.File
		if f, err = os.Open(path); err == nil {
			f.Close()
		}
	}
	var why *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.add(t.place, "there is no %s %s; make it, or correct the path", kind, pathEnd(path))
	case errors.As(err, &why):
		c.add(t.place, "%s cannot be read: %v", pathEnd(path), why.Err)
	case err != nil:
		c.add(t.place, "%v", err)
	case kind == mountFolder && !fi.IsDir():
		c.add(t.place, "%s is not a folder; mount the folder that it is in, or put the file into the image by a provision step (file: …)", pathEnd(path))
	case kind == scriptFile && !fi.Mode().IsRegular():
		c.add(t.place, "%s is not a file", pathEnd(path))
	case !fi.Mode().IsRegular() && !fi.IsDir():
		c.add(t.place, "%s is neither a file nor a folder", pathEnd(path))
	}
}

// pathEnd cuts a path to what fits in a message. Its end, which says most, stays.
func pathEnd(path string) string {
	const most = 240
	if len(path) <= most {
		return path
	}
	cut := len(path) - most
	for cut < len(path) && !utf8.RuneStart(path[cut]) {
		cut++
	}
	return "…" + path[cut:]
}
