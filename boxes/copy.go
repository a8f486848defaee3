// SPDX-License-Identifier: Apache-2.0

package boxes

import (
	"context"
	"crypto/sha256"
	_ "crypto/sha512" // go-digest looks its algorithms up in package crypto
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Sizes of the steps in which files are copied and hashed, in bytes. A copied
// chunk should still be in the processor's cache, or at least in memory, when it
// is hashed; a step of hashing is the unit of progress and of interruption.
const (
	copyChunk = 8 << 20
	hashChunk = 1 << 20
)

// copier brings the files of a box into the store. The sha256 of what was
// written is computed at the same time: hashing takes as long as copying, so
// this halves the time on two processors.
type copier struct {
	progress    func(done, total int64)
	done, total int64
	move        bool
}

// copy copies src to the new file dst, durably, and returns the digest and size
// of the copy. A *DigestError if checksum is neither empty nor that of the copy.
func (c *copier) copy(ctx context.Context, dst string, src *os.File, checksum digest.Digest) (digest.Digest, int64, error) {
	var sums []hash.Hash
	sum := sha256.New()
	sums = append(sums, sum)
	check := sum
	if checksum != "" {
		if err := checksum.Validate(); err != nil {
			return "", 0, fmt.Errorf("checksum %.150q: %w", checksum, err)
		}
		if checksum.Algorithm() != digest.SHA256 {
			check = checksum.Algorithm().Hash()
			sums = append(sums, check)
		}
	}
	size, err := c.transfer(ctx, dst, src, io.MultiWriter(writers(sums)...))
	if err != nil {
		return "", 0, err
	}
	if checksum != "" {
		if got := digest.NewDigest(checksum.Algorithm(), check); got != checksum {
			return "", 0, &DigestError{What: "checksum", Got: got, Want: checksum}
		}
	}
	return digest.NewDigest(digest.SHA256, sum), size, nil
}

func writers(sums []hash.Hash) []io.Writer {
	var ws []io.Writer
	for _, s := range sums {
		ws = append(ws, s)
	}
	return ws
}

// transfer fills dst and writes the same bytes to sum. What is hashed is read
// back from dst: src may change under our hands.
func (c *copier) transfer(ctx context.Context, dst string, src *os.File, sum io.Writer) (int64, error) {
	fi, err := src.Stat()
	if err != nil {
		return 0, err
	}
	size := fi.Size()
	if c.move && link(src, fi, dst) {
		ready := make(chan int64, 1)
		ready <- size
		close(ready)
		if err := c.hash(ctx, sum, src, ready); err != nil {
			return 0, err
		}
		return size, src.Sync()
	}

	out, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	// The size comes first, so that holes can be hashed like the rest.
	if err := out.Truncate(size); err != nil {
		return 0, err
	}
	ready := make(chan int64, 4)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(ready)
		return copyData(gctx, out, src, size, ready)
	})
	g.Go(func() error { return c.hash(gctx, sum, out, ready) })
	if err := g.Wait(); err != nil {
		return 0, err
	}
	if err := out.Sync(); err != nil {
		return 0, err
	}
	return size, out.Close()
}

// link makes dst another name of src, if it can: another file system, another
// owner or a symbolic link may forbid it.
func link(src *os.File, fi os.FileInfo, dst string) bool {
	if os.Link(src.Name(), dst) != nil {
		return false
	}
	if linked, err := os.Lstat(dst); err == nil && os.SameFile(fi, linked) {
		return true
	}
	os.Remove(dst)
	return false
}

// copyData copies size bytes, skips holes, and sends to ready up to where the
// copy is complete, after each chunk. The kernel copies, and shares the blocks
// where the file system can.
func copyData(ctx context.Context, out, src *os.File, size int64, ready chan<- int64) error {
	for off := int64(0); off < size; {
		start, end := nextData(src, off, size)
		if start >= size {
			off = size
		} else {
			n := min(end-start, copyChunk)
			if _, err := src.Seek(start, io.SeekStart); err != nil {
				return err
			}
			if _, err := out.Seek(start, io.SeekStart); err != nil {
				return err
			}
			if _, err := io.CopyN(out, src, n); err != nil {
				if errors.Is(err, io.EOF) {
					err = errors.New("the file became shorter while it was being copied")
				}
				return err
			}
			off = start + n
		}
		select {
		case ready <- off:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// nextData finds the next stretch of data at or behind off. A file system that
// knows nothing of holes, or an error, makes everything data.
func nextData(f *os.File, off, size int64) (start, end int64) {
	fd := int(f.Fd())
	start, err := unix.Seek(fd, off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size
	}
	if err != nil {
		return off, size
	}
	if end, err = unix.Seek(fd, start, unix.SEEK_HOLE); err != nil || end <= start {
		return start, size
	}
	return start, min(end, size)
}

// hash writes to sum what out holds up to each offset that ready brings.
func (c *copier) hash(ctx context.Context, sum io.Writer, out *os.File, ready <-chan int64) error {
	buf := make([]byte, hashChunk)
	var off int64
	for end := range ready {
		for off < end {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, err := out.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if err != nil && !(errors.Is(err, io.EOF) && n > 0) {
				return err
			}
			sum.Write(buf[:n]) // a hash never fails
			off += int64(n)
			c.done += int64(n)
			if c.progress != nil {
				c.progress(c.done, c.total)
			}
		}
	}
	return nil
}
