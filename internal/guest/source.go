// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"io"
)

// source is a reader that knows what went wrong with it.
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
