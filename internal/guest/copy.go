// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/pkg/sftp"
)

// CopyOptions say how to copy.
type CopyOptions struct {
	// Progress is told how far a file is, in bytes, at its beginning and end and
	// now and then in between; total is what the file is said to have. It may be
	// called from several goroutines, one at a time.
	Progress func(path string, done, total int64)
}

// SkippedError says that everything was copied but these: they are neither files
// nor folders nor symbolic links.
type SkippedError struct{ Paths []string }

func (e *SkippedError) Error() string {
	return "not copied, being no ordinary files: " + strings.Join(e.Paths, ", ")
}

// copier is one Upload or Download.
type copier struct {
	ctx     context.Context
	sftp    *sftp.Client
	opt     CopyOptions
	skipped []string
}

// requests is how many reads or writes of a file are under way at once. A guest
// under emulation is slow to answer.
const requests = 64

// files opens sftp and runs f, which fails with ctx's cause if ctx ends.
func (c *Client) files(ctx context.Context, opt CopyOptions, f func(*copier) error) error {
	client, err := sftp.NewClient(c.ssh, sftp.UseConcurrentWrites(true), sftp.MaxConcurrentRequestsPerFile(requests))
	if err != nil {
		return fmt.Errorf("starting a file transfer: %w", lost(err))
	}
	defer client.Close()
	stop := context.AfterFunc(ctx, func() { client.Close() })
	cp := &copier{ctx: ctx, sftp: client, opt: opt}
	err = f(cp)
	if !stop() {
		return fmt.Errorf("copying files: %w", context.Cause(ctx))
	}
	if errors.Is(err, sftp.ErrSSHFxConnectionLost) {
		return fmt.Errorf("%w: %w", err, ErrDisconnected)
	}
	if err == nil && len(cp.skipped) > 0 {
		return &SkippedError{cp.skipped}
	}
	return err
}

// remotePath makes a path for the guest: what is relative begins in the user's home,
// and so does "~".
func remotePath(p string) string {
	if p == "~" {
		return "."
	}
	if rest, ok := strings.CutPrefix(p, "~/"); ok {
		p = strings.TrimLeft(rest, "/")
	}
	if p == "" {
		return "."
	}
	return path.Clean(p)
}

// count tells the progress of one file. It has the methods that sftp looks for to
// learn a file's size before it reads it.
type count struct {
	io.Reader
	io.Writer
	ctx  context.Context
	size int64
	done int64
	told time.Time
	tell func(done, total int64)
}

func (c *copier) counter(name string, size int64) *count {
	n := &count{ctx: c.ctx, size: size, tell: func(int64, int64) {}}
	if f := c.opt.Progress; f != nil {
		n.tell = func(done, total int64) { f(name, done, total) }
	}
	n.tell(0, size)
	n.told = time.Now()
	return n
}

const tellInterval = 100 * time.Millisecond

func (n *count) add(b int, err error) (int, error) {
	n.done += int64(b)
	if time.Since(n.told) >= tellInterval {
		n.told = time.Now()
		n.tell(n.done, n.size)
	}
	if err == nil {
		err = n.ctx.Err()
	}
	return b, err
}

func (n *count) Read(p []byte) (int, error)  { return n.add(n.Reader.Read(p)) }
func (n *count) Write(p []byte) (int, error) { return n.add(n.Writer.Write(p)) }

// Size is how much there is left to read.
func (n *count) Size() int64 { return n.size - n.done }

func (n *count) end() { n.tell(n.done, max(n.size, n.done)) }

// permissions keeps what a mode says about reading, writing and executing. Bits that
// give away the owner's rights are not carried from one system to the other.
func permissions(m fs.FileMode) fs.FileMode { return m.Perm() }

// kindOf sorts what can be copied from what cannot.
func kindOf(m fs.FileMode) (file, dir, link bool) {
	return m.IsRegular(), m.IsDir(), m&fs.ModeType == fs.ModeSymlink
}
