// SPDX-License-Identifier: Apache-2.0

package filestream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// MaxDepth bounds how deep folders nest: a hostile system could make it endless.
const MaxDepth = 200

// Sender writes files of this system to a stream.
type Sender struct {
	*Encoder
	Skipped  []string // what is neither a file nor a folder nor a link
	Vanished []string // what was removed while its folder was sent

	// Progress is told of a file at its beginning, now and then, and at its end. May be
	// nil.
	Progress func(path string, done, total int64)

	buf []byte
}

// Name is what a path that was named is called where it goes to: its base name, or
// Contents for one that ends in "." or "..", or is "/".
func Name(path string) string {
	slash := strings.TrimRight(path, string(filepath.Separator))
	switch base := filepath.Base(slash); {
	case slash == "" || base == "." || base == "..":
		return Contents
	default:
		return base
	}
}

// Send sends what was named: a link is followed, and what is no ordinary file is read
// to its end.
func (s *Sender) Send(ctx context.Context, path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return noFile(path, err)
	}
	switch {
	case fi.Mode().IsRegular(), fi.IsDir():
		return s.send(ctx, path, Name(path), fi, 0)
	case fi.Mode()&(fs.ModeSocket|fs.ModeIrregular) != 0:
		s.Skipped = append(s.Skipped, path)
		return nil
	}
	f, err := OpenWait(ctx, path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.Stream(ctx, Name(path), path, f)
}

// noFile says that a path that was named does not exist.
func noFile(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &Failure{What: NoFile, Path: path}
	}
	return err
}

// OpenWait opens a file, and gives up when ctx ends: a FIFO is not open before its
// other end is.
func OpenWait(ctx context.Context, path string, flag int) (*os.File, error) {
	return Wait(ctx, func() (*os.File, error) { return os.OpenFile(path, flag, 0) })
}

// Wait is OpenWait with an open of the caller's. A file that it opens after ctx ended is
// closed.
func Wait(ctx context.Context, open func() (*os.File, error)) (*os.File, error) {
	type opened struct {
		f   *os.File
		err error
	}
	ch := make(chan opened, 1)
	go func() {
		f, err := open()
		ch <- opened{f, err}
	}()
	select {
	case o := <-ch:
		return o.f, o.err
	case <-ctx.Done():
		go func() {
			if o := <-ch; o.err == nil {
				o.f.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// Stream sends what r has as a file called name, without mode and time.
func (s *Sender) Stream(ctx context.Context, name, shown string, r io.Reader) error {
	if err := s.Entry(Entry{Kind: File, Name: name, Size: -1}); err != nil {
		return err
	}
	return s.copy(ctx, r, shown, 0, -1)
}

func (s *Sender) send(ctx context.Context, path, name string, fi fs.FileInfo, depth int) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if depth > MaxDepth {
		return fmt.Errorf("copying %q: more than %d folders inside each other", path, MaxDepth)
	}
	e := Entry{Name: name, Mode: fi.Mode().Perm(), Time: fi.ModTime(), Size: fi.Size()}
	switch {
	case fi.Mode().IsRegular():
		return s.file(ctx, path, e)
	case fi.IsDir():
		entries, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		e.Kind = Dir
		if err := s.Entry(e); err != nil {
			return err
		}
		for _, x := range entries {
			sub := filepath.Join(path, x.Name())
			fi, err := x.Info()
			if err == nil {
				err = s.send(ctx, sub, x.Name(), fi, depth+1)
			}
			if errors.Is(err, fs.ErrNotExist) { // nothing of it was sent then
				s.Vanished = append(s.Vanished, sub)
			} else if err != nil {
				return err
			}
		}
		return s.Entry(Entry{Kind: Up})
	case fi.Mode()&fs.ModeType == fs.ModeSymlink:
		to, err := os.Readlink(path)
		if err != nil {
			return err
		}
		e.Kind, e.To = Link, to
		return s.Entry(e)
	}
	s.Skipped = append(s.Skipped, path)
	return nil
}

func (s *Sender) file(ctx context.Context, path string, e Entry) error {
	// What was an ordinary file a moment ago may be a FIFO now.
	f, err := os.OpenFile(path, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		s.Skipped = append(s.Skipped, path)
		return nil
	}
	e.Kind, e.Mode, e.Time, e.Size = File, fi.Mode().Perm(), fi.ModTime(), fi.Size()
	if err := s.Entry(e); err != nil {
		return err
	}
	if !sparse(fi) {
		return s.copy(ctx, f, path, 0, e.Size)
	}
	var at, hole int64 // hole: before at, and not sent yet
	for at < e.Size {
		from, to, err := nextData(f, at, e.Size)
		if err != nil {
			return err
		}
		hole += from - at
		if from >= e.Size {
			break
		}
		if _, err := f.Seek(from, io.SeekStart); err != nil {
			return err
		}
		if hole, err = s.data(ctx, io.LimitReader(f, to-from), path, hole, e.Size); err != nil {
			return err
		}
		at = to
	}
	return s.Encoder.Close(hole)
}

// copy sends what r has and ends the file.
func (s *Sender) copy(ctx context.Context, r io.Reader, shown string, hole, size int64) error {
	hole, err := s.data(ctx, r, shown, hole, size)
	if err != nil {
		return err
	}
	return s.Encoder.Close(hole)
}

// data sends what r has behind a hole, and returns the hole if r had nothing.
func (s *Sender) data(ctx context.Context, r io.Reader, shown string, hole, size int64) (int64, error) {
	if s.buf == nil {
		s.buf = make([]byte, 64<<10)
	}
	var done int64
	tell := func() {
		if s.Progress != nil {
			s.Progress(shown, done, max(size, done))
		}
	}
	tell()
	for {
		n, err := r.Read(s.buf)
		if n > 0 {
			if err := s.Chunk(hole, s.buf[:n]); err != nil {
				return 0, err
			}
			if size < 0 { // the reader of a pipe sees data at once
				if err := s.Flush(); err != nil {
					return 0, err
				}
			}
			hole, done = 0, done+int64(n)
			tell()
		}
		if errors.Is(err, io.EOF) {
			return hole, nil
		}
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return 0, err
		}
	}
}
