// SPDX-License-Identifier: Apache-2.0

// Package labfile reads Labfiles: strict YAML in, a validated lab.Lab out, or
// everything that is wrong with the file by line and column. It keeps the lock
// file beside it, too.
package labfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/labfile/lab/internal/lab"
)

// ErrNotFound says that there is no Labfile in a directory or above it.
var ErrNotFound = errors.New("no Labfile found")

// maxFile is the size in bytes of the largest file that is read, and of what its
// variables may hold together.
const maxFile = 1 << 20

// Options is what the command line adds to a Labfile.
type Options struct {
	Vars      map[string]string           // --var; they come before the environment
	LookupEnv func(string) (string, bool) // os.LookupEnv, or nil for no environment
	Name      string                      // --name: replaces the key lab; empty keeps it

	// HostFiles has Load look at what the Labfile takes from this host: the files and
	// folders that mounts and provision steps name, and with "proxy: inherit" the proxy
	// settings of the environment. Only what makes machines needs them.
	HostFiles bool

	dir    string // that such names are relative to; empty to look at none
	dotenv string // the file .env beside the Labfile; empty for none
	owner  int    // of the Labfile
}

// fileNames are the names that Find looks for, in this order.
func fileNames() []string { return []string{"Labfile", "Labfile.yaml", "Labfile.yml"} }

// Find returns the absolute path of the Labfile that is in force in dir: the one
// in dir itself, or else in the nearest directory above. It wraps ErrNotFound if
// there is none, and is a *ForeignError if that above is another user's: such a file
// was not chosen by going to its directory, and a Labfile runs what it likes.
func Find(dir string) (string, error) { return find(dir, os.Geteuid()) }

// find is Find for the user uid.
func find(dir string, uid int) (string, error) {
	start, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("looking for a Labfile: %w", err)
	}
	for at := start; ; at = filepath.Dir(at) {
		for _, name := range fileNames() {
			path := filepath.Join(at, name)
			fi, err := os.Stat(path)
			// A directory may well be called Labfile; anything else is
			// Load's to judge.
			if err == nil && !fi.IsDir() {
				if at == start {
					return path, nil
				}
				if err := foreign(path, fi, uid); err != nil {
					return "", err
				}
				return path, nil
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return "", fmt.Errorf("looking for a Labfile: %w", err)
			}
		}
		if at == filepath.Dir(at) {
			return "", fmt.Errorf("%w in %s or above", ErrNotFound, start)
		}
	}
}

// ForeignError says that the Labfile which is in force belongs to another user.
type ForeignError struct {
	Path string
	UID  int // whom it belongs to
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("the Labfile in force here, %s, belongs to another user (uid %d)", e.Path, e.UID)
}

// Hint says how to use it all the same.
func (e *ForeignError) Hint() string {
	return "if you trust that user, name it: -f " + e.Path
}

// foreign returns a *ForeignError if the file, or the link that leads to it, belongs
// neither to the user uid nor to root.
func foreign(path string, fi fs.FileInfo, uid int) error {
	link, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("looking for a Labfile: %w", err)
	}
	for _, fi := range []fs.FileInfo{link, fi} {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != uid {
			return &ForeignError{Path: path, UID: int(st.Uid)}
		}
	}
	return nil
}

// Load reads the Labfile at path. What is wrong with its content, or with its being
// something else than a file of a sensible size, is a *Problems; any other error is
// about reaching it. Symbolic links in the directory of
// path are resolved, so that one Labfile is one lab by whatever way one comes.
func Load(path string, o Options) (*lab.Lab, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, readError("Labfile", err)
	}
	file, err := Canonical(path)
	if err != nil {
		return nil, fmt.Errorf("reading the Labfile: %w", err)
	}
	o.dotenv = filepath.Join(filepath.Dir(file), ".env")
	if fi, err := os.Stat(file); err == nil {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			o.owner = int(st.Uid)
		}
	}
	if o.HostFiles {
		o.dir = filepath.Dir(file)
	}
	l, err := parse(display(path), data, o)
	if err != nil {
		return nil, err
	}
	locate(l, file)
	return l, nil
}

// Canonical returns the path by which Load knows the Labfile at path. Only the
// directory needs to exist.
func Canonical(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, filepath.Base(abs)), nil
}

// display returns path as a message names it: relative to the working directory
// if it is below that.
func display(path string) string {
	dir, err := os.Getwd()
	if err != nil || !filepath.IsAbs(path) {
		return path
	}
	rel, err := filepath.Rel(dir, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return path
	}
	return rel
}

// readError words an error of readFile.
func readError(what string, err error) error {
	var problems *Problems
	if errors.As(err, &problems) {
		return problems
	}
	return fmt.Errorf("reading the %s: %w", what, err)
}

// readFile reads a regular file of at most maxFile bytes. It opens nothing else:
// a pipe or a device would block, or never end. Such a file is a *Problems.
func readFile(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if err := readableFile(path, fi); err != nil {
		return nil, err
	}
	// O_NONBLOCK is for the pipe that took the file's place in between.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err = f.Stat(); err != nil {
		return nil, err
	}
	if err := readableFile(path, fi); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, unfit(path, tooLarge)
	}
	return data, nil
}

func readableFile(path string, fi fs.FileInfo) error {
	switch {
	case fi.IsDir():
		return unfit(path, "a directory, not a file")
	case !fi.Mode().IsRegular():
		return unfit(path, "not a regular file")
	case fi.Size() > maxFile:
		return unfit(path, tooLarge)
	}
	return nil
}

const tooLarge = "larger than 1MiB"

// unfit says why a file was not read.
func unfit(path, message string) *Problems {
	return &Problems{List: []Problem{{File: display(path), Message: message}}}
}

// Parse reads a Labfile from data. file names it in messages and, made absolute,
// in the result. Every error is a *Problems.
func Parse(file string, data []byte, o Options) (*lab.Lab, error) {
	l, err := parse(file, data, o)
	if err != nil {
		return nil, err
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return nil, fmt.Errorf("naming the Labfile: %w", err)
	}
	locate(l, abs)
	return l, nil
}

// parse is Parse without the place of the file.
func parse(file string, data []byte, o Options) (*lab.Lab, error) {
	r := &report{file: file}
	if len(data) > maxFile {
		r.add(place{}, "%s", tooLarge)
		return nil, r.err()
	}
	var doc document
	vars := newVariables(o)
	root := parseYAML(r, data)
	if root != nil {
		root = writeOut(r, root)
	}
	if root != nil {
		d := &decoder{report: r, vars: vars, source: newSource(bytes.TrimPrefix(data, []byte(bom)))}
		d.value(root, place{line: root.Line, column: root.Column}, &doc, "")
	} else {
		return nil, r.err()
	}
	r.others = vars.dotenv.problems()
	l := convert(r, &doc, o.dir)
	if l.InheritProxy && o.HostFiles && o.LookupEnv != nil {
		if err := checkProxies(l, o.LookupEnv); err != nil {
			r.add(doc.Proxy.place, "%v", err)
		}
	}
	if o.Name != "" {
		if l.Name = o.Name; !lab.ValidLabel(o.Name) {
			r.add(place{}, "the name %q given for this lab is not a name; %s", shorten(o.Name), labelRule)
		}
	}
	if r.err() == nil {
		for _, name := range vars.unused() {
			hint := didYouMean(name, vars.asked(), "")
			if vars.shell[name] {
				hint = "; in text for the guest, write " + guestNotation.write(name)
			}
			r.add(place{}, "the variable %q was given, but no value uses it%s", shorten(name), hint)
		}
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return l, nil
}
