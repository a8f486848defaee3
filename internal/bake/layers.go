// SPDX-License-Identifier: Apache-2.0

// Package bake makes images of boxes and provision steps: what a step's layer is
// cached by, where layers are kept, and how steps are run in a machine: in the throw-away one
// that they are baked in, or in a generation at its first boot.
package bake

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// keyVersion is part of every key: whoever changes how steps are run, or what is
// cleaned up behind them, changes it, and everything is baked anew.
const keyVersion = "lab layer 1"

// What one step may bring along from the host.
const (
	maxFiles = 20_000
	maxBytes = 4 << 30
)

// listed is how many files of a step are told one by one; of more only the sum is.
// Each generation's record carries them.
const listed = 500

// InputError says what is wrong with what a step takes from the host.
type InputError struct {
	Key   string // of the Labfile: "provision" or "boot"
	Place string // in the Labfile
	Step  lab.Provision
	Err   error
}

// Error implements error.
func (e *InputError) Error() string {
	text := fmt.Sprintf("%s step %q: %v", e.Key, e.Step.String(), e.Err)
	if e.Place == "" {
		return text
	}
	return e.Place + ": " + text
}

// Unwrap returns the cause.
func (e *InputError) Unwrap() error { return e.Err }

// Keys computes the keys of layers. It remembers the digests of files by path, size
// and modification time, so that machines that share files do not read them again.
// It serves one command; it is not for several goroutines.
type Keys struct {
	dir     string
	digests map[seen]string
	steps   map[string]material
}

// seen tells whether a file is the one whose digest is known.
type seen struct {
	path string
	size int64
	time time.Time
	mode fs.FileMode
}

// material is what a step is made of.
type material struct {
	step  string
	files map[string]string
	whole string // digest of all files
}

// NewKeys returns the keys of steps whose files are relative to dir.
func NewKeys(dir string) *Keys {
	return &Keys{dir: dir, digests: map[seen]string{}, steps: map[string]material{}}
}

// Layers returns the layer of each step, in order, on top of the box with the given
// digest. It reads the steps' files and nothing else. Errors: *InputError.
func (k *Keys) Layers(box string, steps []lab.Provision) ([]lab.Layer, error) {
	var layers []lab.Layer
	parent := box
	for _, p := range steps {
		m, err := k.material(p)
		if err != nil {
			return nil, &InputError{Key: "provision", Place: p.Place, Step: p, Err: err}
		}
		parent = sum(keyVersion, parent, m.step, m.whole)
		layers = append(layers, lab.Layer{Key: parent, Step: m.step, Text: p.String(), Files: m.files})
	}
	return layers, nil
}

// sum hashes strings so that no two lists of them meet.
func sum(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return digestOf(h.Sum(nil))
}

func digestOf(b []byte) string { return "sha256:" + hex.EncodeToString(b) }

// canonical is a step without its place, which does not shape the image.
func canonical(p lab.Provision) (string, error) {
	p.Place = ""
	b, err := json.Marshal(p) // of a struct: the order of its fields is fixed
	return string(b), err
}

func (k *Keys) material(p lab.Provision) (material, error) {
	text, err := canonical(p)
	if err != nil {
		return material{}, err
	}
	if m, ok := k.steps[text]; ok {
		return m, nil
	}
	m := material{step: sum("step", text)}
	from := p.From
	if p.Script != "" {
		from = p.Script
	}
	if from != "" {
		all := sha256.New()
		files := map[string]string{}
		n := 0
		err := k.walk(from, p.Script != "", func(f hostFile) error {
			d, err := k.digest(f)
			if err != nil {
				return err
			}
			n++
			fmt.Fprintf(all, "%d:%s=%s,", len(f.rel), f.rel, d)
			files[path.Join(filepath.ToSlash(from), f.rel)] = d
			return nil
		})
		if err != nil {
			return material{}, err
		}
		m.whole = digestOf(all.Sum(nil))
		if n > listed {
			files = map[string]string{filepath.ToSlash(from): m.whole}
		}
		m.files = files
	}
	k.steps[text] = m
	return m, nil
}

// hostFile is a file, folder or symbolic link that a step brings along.
type hostFile struct {
	path string // on the host
	rel  string // below what the step names; "." or "" for that itself
	info fs.FileInfo
	link string // target of a symbolic link
}

// walk visits what a step brings along, sorted by name, each folder before what is
// in it. What was named itself may be a symbolic link and is followed.
func (k *Keys) walk(from string, script bool, visit func(hostFile) error) error {
	return walk(k.dir, from, script, visit)
}

func walk(dir, from string, script bool, visit func(hostFile) error) error {
	root := from
	if !filepath.IsAbs(root) {
		root = filepath.Join(dir, from)
	}
	fi, err := os.Stat(root)
	if err != nil {
		return err
	}
	if script && !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file", from)
	}
	if fi.Mode().IsRegular() {
		if fi.Size() > maxBytes {
			return tooMuch(from)
		}
		return visit(hostFile{path: root, info: fi})
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is neither a file nor a folder", from)
	}
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return err
	}
	var (
		files int
		bytes int64
	)
	return filepath.WalkDir(real, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(real, name)
		if err != nil {
			return err
		}
		f := hostFile{path: name, rel: filepath.ToSlash(rel), info: fi}
		if strings.ContainsAny(f.rel, "\n\x00") {
			return fmt.Errorf("the name %q has a line break", f.rel)
		}
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			if f.link, err = os.Readlink(name); err != nil {
				return err
			}
		case fi.Mode().IsRegular():
			bytes += fi.Size()
		case !fi.IsDir():
			return fmt.Errorf("%s is neither a file nor a folder nor a symbolic link", name)
		}
		if files++; files > maxFiles || bytes > maxBytes {
			return tooMuch(from)
		}
		return visit(f)
	})
}

func tooMuch(from string) error {
	return fmt.Errorf("%s is more than %d files or %s; let a shell step fetch it instead", from, maxFiles, lab.Bytes(maxBytes))
}

// digest is of what a file brings into an image: kind, mode and content.
func (k *Keys) digest(f hostFile) (string, error) {
	switch {
	case f.info.IsDir():
		return head(f), nil
	case f.info.Mode()&fs.ModeSymlink != 0:
		return sum(head(f), f.link), nil
	}
	key := seen{f.path, f.info.Size(), f.info.ModTime(), f.info.Mode()}
	if d, ok := k.digests[key]; ok {
		return d, nil
	}
	in, err := os.Open(f.path)
	if err != nil {
		return "", err
	}
	defer in.Close()
	d := newDigester(f)
	if _, err := io.Copy(d, in); err != nil {
		return "", err
	}
	k.digests[key] = d.sum()
	return k.digests[key], nil
}

// head is the kind and mode of a file. The size of a folder means nothing.
func head(f hostFile) string {
	kind := "file"
	switch {
	case f.info.IsDir():
		kind = "folder"
	case f.info.Mode()&fs.ModeSymlink != 0:
		return "link"
	}
	return fmt.Sprintf("%s %04o", kind, f.info.Mode().Perm())
}

// digester computes a regular file's digest from its content, as it is written.
type digester struct {
	head string
	hash interface {
		io.Writer
		Sum([]byte) []byte
	}
}

func newDigester(f hostFile) *digester { return &digester{head(f), sha256.New()} }

func (d *digester) Write(b []byte) (int, error) { return d.hash.Write(b) }
func (d *digester) sum() string                 { return sum(d.head, digestOf(d.hash.Sum(nil))) }

// errChanged says that a file is no longer the one that the key was made of.
var errChanged = errors.New("it changed while the image was baked; try again")
