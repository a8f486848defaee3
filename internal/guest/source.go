// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/labfile/lab/internal/guest/filestream"
)

// source is a reader that remembers its error.
type source struct {
	io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// blame says of an error of copying to dst on which side it arose.
func (s *source) blame(dst string, err error) error {
	if s.err != nil {
		return s.err
	}
	return inGuest(dst, err)
}

// gone notes a file that was removed while its folder was copied, if err says that its
// source does not exist. What the guest says of a target is a Failure.
func (c *sftpCopier) gone(src string, err error) bool {
	var there *filestream.Failure
	if !errors.Is(err, fs.ErrNotExist) || errors.As(err, &there) {
		return false
	}
	c.vanished = append(c.vanished, src)
	return true
}

// count tells the progress of one file. It has the method that sftp looks for to
// learn a file's size before it reads it.
type count struct {
	io.Reader
	ctx  context.Context
	path string
	size int64
	done int64
	tell func(path string, done, total int64)
}

func (n *count) Read(p []byte) (int, error) {
	b, err := n.Reader.Read(p)
	n.add(b)
	if err == nil {
		err = n.ctx.Err()
	}
	return b, err
}

func (n *count) add(b int) {
	if n.done += int64(b); n.tell != nil {
		n.tell(n.path, n.done, max(n.size, n.done))
	}
}

// Size is how much there is left to read.
func (n *count) Size() int64 { return n.size - n.done }
