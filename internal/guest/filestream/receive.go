// SPDX-License-Identifier: Apache-2.0

package filestream

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Errors of a receiver.
var (
	// ErrUnsafeName says that the other side named a file in a way that would leave
	// the folder it is copied to.
	ErrUnsafeName = errors.New("unsafe file name")
	// ErrLeadsOut says that a link in the target leads out of it.
	ErrLeadsOut = errors.New("a link there leads out of the folder that is copied to; remove it, or name what it leads to")
	// ErrNoFile says that a file cannot go where something else is.
	ErrNoFile = errors.New("not an ordinary file")
)

// Place is where something that was named goes to.
type Place struct {
	Tree Tree
	Name string

	Keep bool // the folder was there: its mode and time stay

	// At is what a file goes to as it is, without a mode or a time. It is closed then.
	At io.WriteCloser
}

// Receiver writes what a stream has.
type Receiver struct {
	*Decoder

	// Where says where a thing that was named goes to. A folder must exist when it
	// returns; Place.Name is its path in Tree.
	Where func(Entry) (Place, error)

	// Atomic has files written beside their place and renamed when they are
	// complete.
	Atomic bool

	// Counted is told how many things were named, before the first; may be nil.
	Counted func(int64)

	// Progress is told of a file at its beginning, now and then, and at its end. May be
	// nil.
	Progress func(path string, done, total int64)

	ctx context.Context // of Receive
	buf []byte
}

// level is a folder that is being filled.
type level struct {
	Place
	mode fs.FileMode
	time time.Time
}

// Receive writes everything up to the End and returns what that says.
func (r *Receiver) Receive(ctx context.Context) (Outcome, error) {
	r.ctx, r.buf = ctx, make([]byte, maxChunk)
	var open []level
	first := true // nothing but what says how many things there are may have come
	for {
		if err := context.Cause(ctx); err != nil {
			return Outcome{}, err
		}
		e, err := r.Entry()
		if err != nil {
			return Outcome{}, err
		}
		switch e.Kind {
		case End:
			return outcome(e)
		case Count:
			if !first {
				return Outcome{}, fmt.Errorf("%w: the number of things comes late", ErrMalformed)
			}
			first = false
			if r.Counted != nil {
				r.Counted(e.Size)
			}
			continue
		case Up:
			if len(open) == 0 {
				return Outcome{}, fmt.Errorf("%w: no folder is open", ErrMalformed)
			}
			l := open[len(open)-1]
			open = open[:len(open)-1]
			if err := l.finish(); err != nil {
				return Outcome{}, err
			}
			continue
		}
		first = false
		var at Place
		switch {
		case len(open) == 0:
			if e.Name != Contents && !SafeName(e.Name) {
				return Outcome{}, fmt.Errorf("%w: %q", ErrUnsafeName, e.Name)
			}
			at, err = r.Where(e)
		case !SafeName(e.Name):
			return Outcome{}, fmt.Errorf("%w: %q in %q", ErrUnsafeName, e.Name, open[len(open)-1].Name)
		case len(open) > MaxDepth:
			return Outcome{}, fmt.Errorf("%w: more than %d folders inside each other", ErrMalformed, MaxDepth)
		default:
			l := open[len(open)-1]
			at = Place{Tree: l.Tree, Name: filepath.Join(l.Name, e.Name)}
			if e.Kind == Dir {
				err = at.Tree.Mkdir(at.Name, 0o700)
				if errors.Is(err, fs.ErrExist) {
					err = isFolder(at)
				}
			}
		}
		if err != nil {
			return Outcome{}, leadsOut(at, err)
		}
		switch e.Kind {
		case Dir:
			open = append(open, level{at, e.Mode, e.Time})
		case Link:
			err = link(at, e.To)
		case File:
			err = r.file(at, e)
		}
		if err != nil {
			return Outcome{}, leadsOut(at, err)
		}
	}
}

// SafeName reports whether a name from the other side is the name of one file.
func SafeName(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00") &&
		!strings.ContainsRune(name, filepath.Separator) && filepath.IsLocal(name)
}

// leadsOut says it plainly where an os.Root refused to follow a link.
func leadsOut(at Place, err error) error {
	if err != nil && strings.Contains(err.Error(), "path escapes from parent") {
		return fmt.Errorf("copying to %q: %w", shown(at), ErrLeadsOut)
	}
	return err
}

func shown(at Place) string {
	if at.Tree == nil {
		return at.Name
	}
	return filepath.Join(at.Tree.Name(), at.Name)
}

func isFolder(at Place) error {
	fi, err := at.Tree.Stat(at.Name)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return &Failure{What: Other, Text: shown(at) + " is not a folder"}
	}
	return nil
}

// finish sets what filling a folder would have changed. The mode comes last: it may
// take away what setting the time needs.
func (l level) finish() error {
	if l.Keep {
		return nil
	}
	if !l.time.IsZero() {
		if err := l.Tree.Chtimes(l.Name, time.Time{}, l.time); err != nil {
			return err
		}
	}
	return l.Tree.Chmod(l.Name, l.mode)
}

// link makes a symbolic link in the place of a link or a file.
func link(at Place, to string) error {
	err := at.Tree.Symlink(to, at.Name)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if fi, err := at.Tree.Lstat(at.Name); err == nil && fi.IsDir() {
		return &Failure{What: IsFolder, Path: shown(at)}
	}
	if err := at.Tree.Remove(at.Name); err != nil {
		return err
	}
	return at.Tree.Symlink(to, at.Name)
}

// file writes one file. A link is written through, as cp does it, and a new file that
// was not completed does not stay.
func (r *Receiver) file(at Place, e Entry) error {
	if at.At != nil {
		// The position belongs to the process that opened it: nothing is skipped or cut off.
		return errors.Join(r.fill(at.At, nil, shown(at), e.Size), at.At.Close())
	}
	const write = os.O_WRONLY | os.O_CREATE
	if !r.Atomic { // most files are new: one question less
		if out, err := at.Tree.OpenFile(at.Name, write|os.O_EXCL, 0o600); !errors.Is(err, fs.ErrExist) {
			return r.write(at, e, out, err, at.Name, nil)
		}
	}
	there, err := at.Tree.Lstat(at.Name)
	fresh := errors.Is(err, fs.ErrNotExist)
	switch {
	case fresh:
	case err != nil:
		return err
	case there.IsDir():
		return &Failure{What: IsFolder, Path: shown(at)}
	case there.Mode()&fs.ModeSymlink != 0:
		return r.through(at, e)
	case !there.Mode().IsRegular():
		return fmt.Errorf("copying to %q: %w", shown(at), ErrNoFile)
	}
	name := at.Name
	flag := write | os.O_TRUNC
	if fresh {
		flag = write | os.O_EXCL
	}
	if r.Atomic {
		name = filepath.Join(filepath.Dir(at.Name), ".lab-part-"+rand.Text()[:10])
		flag = write | os.O_EXCL
	}
	out, err := at.Tree.OpenFile(name, flag, 0o600)
	if r.Atomic && !fresh && errors.Is(err, fs.ErrPermission) {
		// The file may be written to, the folder may not.
		return r.through(at, e)
	}
	return r.write(at, e, out, err, name, there)
}

// write writes a file that was opened, if it was, as name. Unless one is there already,
// it is no more if it was not completed.
func (r *Receiver) write(at Place, e Entry, out *os.File, err error, name string, there fs.FileInfo) error {
	if err != nil {
		return err
	}
	made := there == nil || r.Atomic
	err = r.fill(out, out, shown(at), e.Size)
	if err == nil {
		err = setMode(out, e, there)
	}
	if err = errors.Join(err, out.Close()); err == nil && !e.Time.IsZero() {
		err = at.Tree.Chtimes(name, time.Time{}, e.Time)
	}
	if err == nil && r.Atomic {
		err = at.Tree.Rename(name, at.Name)
	}
	if err != nil && made {
		_ = at.Tree.Remove(name)
	}
	return err
}

// setMode gives a file the mode that the stream has for it, else the one that it had.
func setMode(f *os.File, e Entry, there fs.FileInfo) error {
	switch {
	case e.Mode != 0 || !e.Time.IsZero():
		return f.Chmod(e.Mode)
	case there != nil:
		return f.Chmod(there.Mode().Perm())
	}
	return f.Chmod(0o644)
}

// through writes to what is there, which stays what it is.
func (r *Receiver) through(at Place, e Entry) error {
	out, err := at.Tree.OpenFile(at.Name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	fi, err := out.Stat()
	if err != nil {
		out.Close()
		return err
	}
	var plain *os.File
	if fi.Mode().IsRegular() {
		plain = out
	}
	err = r.fill(out, plain, shown(at), e.Size)
	if err == nil && plain != nil {
		err = setMode(out, e, fi)
	}
	if err = errors.Join(err, out.Close()); err == nil && plain != nil && !e.Time.IsZero() {
		err = at.Tree.Chtimes(at.Name, time.Time{}, e.Time)
	}
	return err
}

// fill writes the data of a file. Holes stay holes in plain, which is out if that is an
// ordinary file.
func (r *Receiver) fill(out io.Writer, plain *os.File, name string, size int64) error {
	var at int64
	tell := func() {
		if r.Progress != nil {
			r.Progress(name, at, max(size, at))
		}
	}
	tell()
	for {
		hole, data, err := r.Chunk(r.buf)
		if err == nil {
			err = context.Cause(r.ctx)
		}
		if err != nil {
			return err
		}
		if at > 1<<62-hole {
			return fmt.Errorf("%w: a file without end", ErrMalformed)
		}
		switch {
		case hole == 0:
		case plain == nil:
			if _, err := io.CopyN(out, zeros{}, hole); err != nil {
				return err
			}
		case len(data) == 0:
			if err := plain.Truncate(at + hole); err != nil {
				return err
			}
		default:
			if _, err := plain.Seek(hole, io.SeekCurrent); err != nil {
				return err
			}
		}
		at += hole
		if len(data) == 0 {
			tell()
			return nil
		}
		if _, err := out.Write(data); err != nil {
			return err
		}
		at += int64(len(data))
		tell()
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
