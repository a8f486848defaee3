// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/guest/filestream"
)

// destination is where a Download goes to.
type destination struct {
	ctx    context.Context
	target string
	names  []string // what was named; may be patterns
	folder bool     // target is one
	into   bool     // target must be one
	opt    CopyOptions
	roots  []*os.Root
	sub    *os.Root // the folder in target that is being filled

	pattern      bool // one of the sources may name several things
	count, limit int64
}

func newDestination(ctx context.Context, sources []string, target string, opt CopyOptions) (*destination, error) {
	d := &destination{ctx: ctx, target: target, opt: opt, into: len(sources) > 1 || strings.HasSuffix(target, "/")}
	for _, src := range sources {
		d.names = append(d.names, filestream.Name(filestream.HomePath(src)))
		d.pattern = d.pattern || strings.ContainsAny(src, "*?[")
	}
	d.limit = int64(len(sources))
	if d.stdout() {
		if len(sources) > 1 {
			return nil, errors.New("only one file can go to standard output")
		}
		return d, nil
	}
	fi, err := os.Stat(target)
	d.folder = err == nil && fi.IsDir()
	switch {
	case d.folder:
	case err == nil && d.into:
		return nil, fmt.Errorf("%s is not a folder", target)
	case d.into && len(sources) == 1 && d.names[0] == filestream.Contents:
		d.into = false // the folder is made
	case d.into:
		return nil, &filestream.Failure{What: filestream.NoFolder, Path: target}
	case errors.Is(err, fs.ErrNotExist):
		if fi, err := os.Stat(filepath.Dir(target)); err != nil || !fi.IsDir() {
			return nil, &filestream.Failure{What: filestream.NoFolder, Path: filepath.Dir(target)}
		}
	}
	return d, nil
}

func (d *destination) stdout() bool { return d.target == stdio && d.opt.Stdout != nil }

// receive writes a stream to the destination.
func (d *destination) receive(from *filestream.Decoder) (filestream.Outcome, error) {
	r := &filestream.Receiver{
		Decoder: from, Where: d.where, Atomic: true, Progress: d.opt.progress(),
		Counted: func(n int64) {
			d.into = d.into || n > 1
			if d.pattern || n < d.limit {
				d.limit = n
			}
		},
	}
	defer func() {
		for _, root := range append(d.roots, d.sub) {
			if root != nil {
				root.Close()
			}
		}
	}()
	return r.Receive(d.ctx)
}

// in returns a place in a folder that nothing leads out of.
func (d *destination) in(dir, name string) (filestream.Place, error) {
	for _, root := range d.roots {
		if root.Name() == dir {
			return filestream.Place{Tree: root, Name: name}, nil
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return filestream.Place{Name: dir}, err
	}
	d.roots = append(d.roots, root)
	return filestream.Place{Tree: root, Name: name}, nil
}

// asked reports whether a name is one of those that were named, or matches one as a
// shell's pattern does: not with a dot that the pattern does not say.
func (d *destination) asked(name string) bool {
	return slices.Contains(d.names, name) || name != filestream.Contents && slices.ContainsFunc(d.names, func(pattern string) bool {
		ok, _ := path.Match(pattern, name)
		return ok && (!strings.HasPrefix(name, ".") || strings.HasPrefix(pattern, "."))
	})
}

// where says where something that was named goes to.
func (d *destination) where(e filestream.Entry) (filestream.Place, error) {
	if d.count++; d.count > d.limit {
		return filestream.Place{}, fmt.Errorf("%w: %q is more than was asked for", filestream.ErrMalformed, e.Name)
	}
	switch {
	case !d.asked(e.Name):
		return filestream.Place{}, fmt.Errorf("%w: %q was not asked for", ErrUnsafeName, e.Name)
	case d.stdout() && e.Kind == filestream.File:
		return filestream.Place{Name: "standard output", At: open{d.opt.Stdout}}, nil
	case d.stdout():
		return filestream.Place{}, errors.New("a folder cannot go to standard output: name a file, or use \"lab exec MACHINE -- tar c FOLDER\"")
	case e.Kind == filestream.Link:
		return filestream.Place{}, filestream.ErrMalformed // what is named is followed
	case e.Name == filestream.Contents && e.Kind == filestream.File:
		return filestream.Place{}, fmt.Errorf("%w: %q", ErrUnsafeName, e.Name)
	case d.folder:
		return d.inside(e)
	case d.into && e.Name != filestream.Contents:
		return filestream.Place{}, &filestream.Failure{What: filestream.NoFolder, Path: d.target}
	case e.Kind == filestream.File:
		return d.file(d.target)
	}
	err := os.Mkdir(d.target, 0o700)
	keep := errors.Is(err, fs.ErrExist)
	if err != nil && !keep {
		return filestream.Place{}, err
	}
	if fi, err := os.Stat(d.target); err != nil || !fi.IsDir() {
		return filestream.Place{}, fmt.Errorf("%s is not a folder", d.target)
	}
	at, err := d.in(d.target, ".")
	at.Keep = keep && e.Name == filestream.Contents
	return at, err
}

// inside says where something in the target goes to, which is a folder. No link that is
// in it is followed out of it, even for a name that the user typed: the guest may have
// made the link a moment ago, or by an earlier copy.
func (d *destination) inside(e filestream.Entry) (filestream.Place, error) {
	at, err := d.in(d.target, e.Name)
	if err != nil {
		return at, err
	}
	root := at.Tree.(*os.Root)
	if e.Name == filestream.Contents {
		at.Keep = true
		return at, nil
	}
	if e.Kind == filestream.Dir {
		if err := root.Mkdir(e.Name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return at, err
		}
	}
	fi, err := root.Stat(e.Name)
	shown := filepath.Join(d.target, e.Name)
	switch {
	case e.Kind == filestream.Dir && err == nil && !fi.IsDir():
		return at, fmt.Errorf("%s is not a folder", shown)
	case e.Kind == filestream.Dir && err == nil:
		// A root of its own: what is in this folder leads nowhere else in the target.
		if d.sub != nil {
			d.sub.Close()
		}
		if d.sub, err = root.OpenRoot(e.Name); err != nil {
			return at, err
		}
		return filestream.Place{Tree: d.sub, Name: "."}, nil
	case e.Kind == filestream.Dir:
		return at, err
	case errors.Is(err, fs.ErrNotExist):
		return at, nil
	case err != nil:
		return at, err
	case fi.IsDir():
		return at, &filestream.Failure{What: filestream.IsFolder, Path: shown}
	case !fi.Mode().IsRegular() && slices.Contains(d.names, e.Name):
		at.At, err = filestream.Wait(d.ctx, func() (*os.File, error) { return root.OpenFile(e.Name, os.O_WRONLY, 0) })
	}
	return at, err
}

// file says how a file is written whose target was named. A link of the user's is
// followed: a pipe, a device or an open file behind it is written to, an ordinary file
// replaced.
func (d *destination) file(target string) (filestream.Place, error) {
	if pid, fd, ok := openFile(target); ok && pid == os.Getpid() {
		f, err := duplicate(fd)
		return filestream.Place{Name: target, At: f}, err
	} else if ok { // another process's, which would lose what it has if it were cut off
		f, err := filestream.OpenWait(d.ctx, target, os.O_WRONLY|os.O_APPEND)
		return filestream.Place{Name: target, At: f}, err
	}
	fi, err := os.Stat(target)
	switch {
	case err == nil && fi.IsDir():
		return filestream.Place{}, &filestream.Failure{What: filestream.IsFolder, Path: target}
	case err == nil && !fi.Mode().IsRegular():
		f, err := filestream.OpenWait(d.ctx, target, os.O_WRONLY)
		return filestream.Place{Name: target, At: f}, err
	case err == nil:
		if real, err := filepath.EvalSymlinks(target); err == nil {
			target = real
		}
	case errors.Is(err, fs.ErrNotExist):
		if there, lerr := os.Lstat(target); lerr == nil && there.Mode()&fs.ModeSymlink != 0 {
			return filestream.Place{Tree: filestream.Plain(""), Name: target}, nil // makes what it names
		}
	default:
		return filestream.Place{}, err
	}
	return d.in(filepath.Dir(target), filepath.Base(target))
}

// fdPath is how the kernel shows a file that a process has open.
var fdPath = regexp.MustCompile(`^/proc/([0-9]+)(?:/task/[0-9]+)?/fd/([0-9]+)$`)

// openFile follows links from a path to a file that a process has open, as /dev/stdout
// is.
func openFile(p string) (pid, fd int, ok bool) {
	for range 40 {
		dir, err := filepath.EvalSymlinks(filepath.Dir(p))
		if err != nil {
			return 0, 0, false
		}
		if dir, err = filepath.Abs(dir); err != nil {
			return 0, 0, false
		}
		p = filepath.Join(dir, filepath.Base(p))
		if m := fdPath.FindStringSubmatch(p); m != nil {
			pid, perr := strconv.Atoi(m[1])
			fd, ferr := strconv.Atoi(m[2])
			return pid, fd, perr == nil && ferr == nil
		}
		to, err := os.Readlink(p)
		if err != nil {
			return 0, 0, false
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(dir, to)
		}
		p = to
	}
	return 0, 0, false
}

// open is a writer that stays open.
type open struct{ io.Writer }

func (open) Close() error { return nil }
