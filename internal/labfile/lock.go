// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"runtime"

	"gopkg.in/yaml.v3"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
)

// LockVersion is the version of the lock file that this package writes.
const LockVersion = 1

// Lock is a lock file: what each box of a Labfile was when it was first used.
type Lock struct {
	Version int // LockVersion, or 0 for a lock that was never written
	Boxes   map[string]LockedBox
}

// LockedBox pins a box.
type LockedBox struct {
	From     string // as in the Labfile when it was pinned
	Arch     string // Go's name of the architecture: "amd64"
	Digest   string // of the box: "sha256:<hex>"
	Checksum string // of the file that was fetched, "sha256:<hex>"; empty if none was
}

// LockPath returns the path of the lock file that belongs to a Labfile: it stands
// beside it.
func LockPath(labfile string) string { return labfile + ".lock" }

// Clone returns a copy that shares nothing with lk and can be added to.
func (lk Lock) Clone() Lock {
	c := Lock{Version: LockVersion, Boxes: map[string]LockedBox{}}
	maps.Copy(c.Boxes, lk.Boxes)
	return c
}

// Stale says, box by box in the order of l, what of l the lock does not pin for
// this host. It is empty if the lock is up to date; entries that l does not use
// do no harm.
func Stale(l *lab.Lab, lk Lock) []string {
	var out []string
	for _, b := range l.Boxes {
		p, ok := lk.Boxes[b.Name]
		switch {
		case !ok:
			out = append(out, fmt.Sprintf("box %q is not pinned", b.Name))
		case p.From != b.From:
			out = append(out, fmt.Sprintf("box %q is pinned as it came from %s; the Labfile says %s", b.Name, p.From, b.From))
		case p.Arch != runtime.GOARCH:
			out = append(out, fmt.Sprintf("box %q is pinned for %s; this host is %s", b.Name, p.Arch, runtime.GOARCH))
		case b.Checksum != "" && p.Checksum != "" && checksumForm.MatchString(b.Checksum) && sameAlgorithm(b.Checksum, p.Checksum) && b.Checksum != p.Checksum:
			out = append(out, fmt.Sprintf("box %q is pinned with the checksum %s; the Labfile says %s", b.Name, p.Checksum, b.Checksum))
		}
	}
	return out
}

// sameAlgorithm reports whether two checksums can be compared. Both begin with
// "sha256:" or "sha512:".
func sameAlgorithm(a, b string) bool { return len(a) == len(b) }

// lockDocument is the lock file as it is written.
type lockDocument struct {
	Version integer          `yaml:"version" need:"1" range:"1..1000000"`
	Boxes   table[lockEntry] `yaml:"boxes" example:"base: {from: builtin/tiny, …}"`
}

type lockEntry struct {
	place
	From     text `yaml:"from" need:"builtin/tiny"`
	Arch     text `yaml:"arch" need:"amd64"`
	Digest   text `yaml:"digest" need:"sha256:…"`
	Checksum text `yaml:"checksum"`
}

var archForm = regexp.MustCompile(`^[a-z0-9]{1,20}$`)

// ReadLock reads the lock file at path. A file that is not there is an empty
// lock. What is wrong with its content is a *Problems.
func ReadLock(path string) (Lock, error) {
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Lock{Boxes: map[string]LockedBox{}}, nil
	}
	if err != nil {
		return Lock{}, readError("lock file", err)
	}
	return parseLock(display(path), data)
}

func parseLock(file string, data []byte) (Lock, error) {
	r := &report{file: file}
	root := parseYAML(r, data)
	if root == nil {
		return Lock{}, r.err()
	}
	var doc lockDocument
	d := &decoder{report: r}
	d.value(root, place{line: root.Line, column: root.Column}, &doc, "")
	if v := doc.Version; v.set() && v.value != LockVersion {
		// What else is wrong with it is not for this version to say.
		r.list, r.more = nil, 0
		r.add(v.place, "version %d of the lock file was written by a newer lab than this one", v.value)
		return Lock{}, r.err()
	}
	lk := Lock{Version: LockVersion, Boxes: map[string]LockedBox{}}
	for _, row := range doc.Boxes.rows {
		e := row.value
		if e.Arch.set() && !archForm.MatchString(e.Arch.value) {
			r.add(e.Arch.place, "%q is not an architecture", shorten(e.Arch.value))
		}
		if e.Digest.set() && !digestForm.MatchString(e.Digest.value) {
			r.add(e.Digest.place, "%q is not a digest", shorten(e.Digest.value))
		}
		if e.Checksum.set() && !checksumForm.MatchString(e.Checksum.value) {
			r.add(e.Checksum.place, "%q is not a checksum", shorten(e.Checksum.value))
		}
		lk.Boxes[row.name] = LockedBox{
			From: e.From.value, Arch: e.Arch.value, Digest: e.Digest.value, Checksum: e.Checksum.value,
		}
	}
	if err := r.err(); err != nil {
		return Lock{}, err
	}
	return lk, nil
}

const lockHeader = `# Written by lab: the boxes of the Labfile beside it, pinned. Keep this file in
# version control. "lab lock --update" moves the pins; nothing else does.
`

// lockYAML and lockBoxYAML are the lock file for the encoder.
type lockYAML struct {
	Version int                    `yaml:"version"`
	Boxes   map[string]lockBoxYAML `yaml:"boxes"`
}

type lockBoxYAML struct {
	From     string `yaml:"from"`
	Arch     string `yaml:"arch"`
	Digest   string `yaml:"digest"`
	Checksum string `yaml:"checksum,omitempty"`
}

func renderLock(lk Lock) ([]byte, error) {
	doc := lockYAML{Version: LockVersion, Boxes: map[string]lockBoxYAML{}}
	for name, b := range lk.Boxes {
		doc.Boxes[name] = lockBoxYAML(b)
	}
	text := bytes.NewBufferString(lockHeader)
	encoder := yaml.NewEncoder(text)
	encoder.SetIndent(2)
	if err := errors.Join(encoder.Encode(doc), encoder.Close()); err != nil {
		return nil, err
	}
	out := text.Bytes()
	// What cannot be read back must not be written.
	back, err := parseLock("lock file", out)
	if err != nil {
		return nil, err
	}
	if !maps.Equal(back.Boxes, lk.Boxes) {
		return nil, errors.New("an entry would not read back as it is")
	}
	return out, nil
}

// WriteLock replaces the lock file at path by lk, whole or not at all. A file that
// says the same already is left alone.
func WriteLock(path string, lk Lock) error {
	data, err := renderLock(lk)
	if err == nil {
		err = replaceFile(path, data)
	}
	if err != nil {
		return fmt.Errorf("writing the lock file: %w", err)
	}
	return nil
}

// replaceFile writes path as a whole, unless it holds data already.
func replaceFile(path string, data []byte) error {
	if old, err := readFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	return fsutil.WriteFile(path, data, 0o666) // the file is the user's, so its mode is the umask's
}
