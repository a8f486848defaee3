// SPDX-License-Identifier: Apache-2.0

// Package fsutil opens files that users name, writes files, durably and with holes, and
// locks folders.
package fsutil

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// KindError says that a path leads to something that is not a regular file.
type KindError struct {
	Path string
	Kind string // "a folder", "a named pipe" …
}

// Error implements error.
func (e *KindError) Error() string { return fmt.Sprintf("%s is %s, not a file", e.Path, e.Kind) }

// OpenRegular opens a regular file for reading. It never waits, as os.Open does for
// someone to write to a named pipe. Errors: those of os.Open, *KindError.
func OpenRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &KindError{path, kindOf(fi.Mode())}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func kindOf(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a folder"
	case mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	}
	return "a device"
}

// Sparse writes to the end of a file and leaves holes where there would be zeros. Close
// must be called after the last Write.
type Sparse struct {
	File *os.File
	at   int64
}

// AppendSparse goes on with a file that has size bytes.
func AppendSparse(f *os.File, size int64) *Sparse { return &Sparse{File: f, at: size} }

// block is the unit in which zeros are looked for, in bytes: that of most file systems.
const block = 4096

var zeros [block]byte

// Write implements io.Writer.
func (s *Sparse) Write(b []byte) (int, error) {
	begin := s.at
	for start := 0; start < len(b); {
		end, hole := run(b, start, s.at)
		if !hole {
			if _, err := s.File.WriteAt(b[start:end], s.at); err != nil {
				return int(s.at - begin), err
			}
		}
		s.at += int64(end - start)
		start = end
	}
	return len(b), nil
}

// run returns the end of the blocks from start on that are all data or all zeros;
// at is where in the file start is.
func run(b []byte, start int, at int64) (end int, hole bool) {
	for end = start; end < len(b); {
		n := min(block-int(at+int64(end-start))%block, len(b)-end)
		zero := bytes.Equal(b[end:end+n], zeros[:n])
		if end > start && zero != hole {
			break
		}
		hole = zero
		end += n
	}
	return end, hole
}

// Close gives the file its length. It does not close the file.
func (s *Sparse) Close() error { return s.File.Truncate(s.at) }
