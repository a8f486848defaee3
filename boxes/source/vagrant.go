// SPDX-License-Identifier: Apache-2.0

package source

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"runtime"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/internal/fsutil"
)

// Bounds of what is read of a Vagrant box.
const (
	maxVagrantFiles    = 1000
	maxVagrantMetadata = 1 << 20 // bytes
)

// vagrantUser is whom a Vagrant box lets in, unless it is said otherwise.
const vagrantUser = "vagrant"

// vagrantMetadata is metadata.json of a box for the libvirt provider.
// https://vagrant-libvirt.github.io/vagrant-libvirt/boxes.html
type vagrantMetadata struct {
	Provider     string `json:"provider"`
	Architecture string `json:"architecture"` // in Vagrant's words; empty if it is not said
	Format       string `json:"format"`
	Disks        []struct {
		Path string `json:"path"`
	} `json:"disks"`
}

// disk is the name of the one disk in the archive.
func (m vagrantMetadata) disk() (string, error) {
	switch {
	case !runsHere(m.Architecture):
		return "", withHint("take the box's version for "+runtime.GOARCH, "it is a Vagrant box for %.50q, which machines of this host (%s) cannot run", m.Architecture, runtime.GOARCH)
	case m.Provider != "libvirt":
		return "", withHint("take the box's version for the libvirt provider", "it is a Vagrant box for %q, whose disks lab cannot use", m.Provider)
	case len(m.Disks) == 0 && m.Format != "" && m.Format != "qcow2":
		return "", fmt.Errorf("the disk of the Vagrant box has the format %q, not qcow2", m.Format)
	case len(m.Disks) == 0:
		return "box.img", nil
	case len(m.Disks) > 1:
		return "", fmt.Errorf("the Vagrant box has %d disks; lab takes those with one", len(m.Disks))
	case m.Disks[0].Path == "":
		return "", errors.New("the Vagrant box does not say which file its disk is")
	}
	return inArchive(m.Disks[0].Path), nil
}

// runsHere reports whether machines of this host run what is made for an architecture.
// Vagrant has several words for each.
func runsHere(architecture string) bool {
	switch strings.ToLower(architecture) {
	case "", "unknown":
		return true
	case "amd64", "x86_64", "x86-64", "x64", "i386", "i486", "i586", "i686", "386", "x86":
		return runtime.GOARCH == "amd64"
	case "arm64", "aarch64":
		return runtime.GOARCH == "arm64"
	}
	return strings.EqualFold(architecture, runtime.GOARCH)
}

// inArchive is a name as it is compared: nothing is ever written under it.
func inArchive(name string) string { return path.Clean("/" + name)[1:] }

// asVagrant describes what a Vagrant box holds, given what was said of it.
func asVagrant(c boxes.Config) boxes.Config {
	c.Vagrant, c.CloudInit = true, false
	if c.User == "" {
		c.User = vagrantUser
	}
	return c
}

// sourceOf is the checksum of the file that a box was made of.
func sourceOf(box boxes.Box) digest.Digest {
	if box.Config.Source != "" {
		return box.Config.Source
	}
	return box.Disk.Digest
}

// archive opens the file at name if it is a tar archive, gzipped or not. walk gives each
// entry of it to f, until f returns io.EOF; it may be called again.
func archive(ctx context.Context, name string, whole hash.Hash) (walk func(f func(*tar.Header, io.Reader) error) error, close func() error, err error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe would be waited for
	if err != nil {
		return nil, nil, nil //nolint:nilerr // the store says so
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		f.Close()
		return nil, nil, err
	}
	open := func(raw io.Reader) (io.Reader, bool) {
		b := bufio.NewReaderSize(raw, 1<<20)
		if head, _ := b.Peek(2); bytes.Equal(head, []byte{0x1f, 0x8b}) {
			z, err := gzip.NewReader(b)
			if err != nil {
				return nil, false
			}
			b = bufio.NewReaderSize(z, 1<<20)
		}
		head, _ := b.Peek(262)
		return b, len(head) == 262 && string(head[257:262]) == "ustar"
	}
	if _, ok := open(f); !ok {
		f.Close()
		return nil, nil, nil
	}
	return func(each func(*tar.Header, io.Reader) error) error {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		whole.Reset()
		raw := io.TeeReader(untilDone{ctx, f}, whole)
		r, _ := open(raw)
		t := tar.NewReader(r)
		for n := 0; ; n++ {
			h, err := t.Next()
			if err == io.EOF {
				break
			}
			if err == nil && n > maxVagrantFiles {
				err = fmt.Errorf("it holds more than %d files", maxVagrantFiles)
			}
			if err == nil {
				err = each(h, t)
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
		_, err := io.Copy(io.Discard, raw) // the checksum is that of all of it
		return err
	}, f.Close, nil
}

// untilDone is a reader that ends with its context.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// vagrant takes the disk out of a Vagrant box: in becomes what to make of it. It
// changes nothing if the file is no archive, and verifies the checksum of one that is.
// Of what is in the archive only the metadata and the disk are looked at; its Vagrantfile is
// a program, and is never run. done removes what was unpacked.
func (r *Resolver) vagrant(ctx context.Context, req Request, in *boxes.Ingredients) (done func(), err error) {
	whole := sha256.New()
	var other hash.Hash = whole
	if in.Checksum != "" && in.Checksum.Algorithm() == digest.SHA512 {
		other = sha512.New()
	}
	walk, end, err := archive(ctx, in.Disk, both{whole, other})
	if walk == nil {
		return func() {}, err
	}
	defer end()
	var (
		meta  vagrantMetadata
		found bool
	)
	err = walk(func(h *tar.Header, content io.Reader) error {
		if inArchive(h.Name) != "metadata.json" {
			return nil
		}
		text, err := readSmall(content, maxVagrantMetadata)
		if err == nil {
			err = json.Unmarshal(text, &meta)
		}
		if err != nil {
			return fmt.Errorf("metadata.json: %w", err)
		}
		found = true
		return io.EOF
	})
	if err != nil {
		return nil, fmt.Errorf("reading the Vagrant box: %w", err)
	}
	if !found {
		return nil, withHint("unpack it, and name the disk", "it is an archive, and no Vagrant box: it has no metadata.json")
	}
	name, err := meta.disk()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(r.Cache, 0o700); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(r.Cache, "vagrant-*")
	if err != nil {
		return nil, err
	}
	done = func() { f.Close(); os.Remove(f.Name()) }
	limit := r.MaxBytes
	if limit == 0 {
		limit = DefaultMaxBytes
	}
	found = false
	err = walk(func(h *tar.Header, content io.Reader) error {
		if inArchive(h.Name) != name {
			return nil
		}
		switch {
		case h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeGNUSparse:
			return fmt.Errorf("%s is not a regular file", name)
		case found:
			return fmt.Errorf("%s is in it twice", name)
		case h.Size > limit:
			return fmt.Errorf("%s has %d bytes; the limit is %d", name, h.Size, limit)
		}
		found = true
		req.Progress("unpacking", 0, h.Size)
		to := &fsutil.Sparse{File: f}
		if _, err := io.Copy(to, content); err != nil {
			return err
		}
		return to.Close()
	})
	switch {
	case err != nil:
		err = fmt.Errorf("unpacking the Vagrant box: %w", err)
	case !found:
		err = fmt.Errorf("unpacking the Vagrant box: its disk %s is not in it", name)
	default:
		err = f.Sync()
	}
	got := digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(whole.Sum(nil)))
	if want := in.Checksum; err == nil && want != "" {
		have := digest.NewDigestFromEncoded(want.Algorithm(), hex.EncodeToString(other.Sum(nil)))
		if have != want {
			err = &boxes.DigestError{What: "checksum", Got: have, Want: want}
		}
	}
	if err != nil {
		done()
		return nil, err
	}
	in.Disk, in.Move, in.Checksum = f.Name(), true, ""
	in.Config = asVagrant(in.Config)
	in.Config.Source = got
	return done, nil
}

// both writes to two hashes, or to one.
type both struct {
	hash.Hash
	other hash.Hash
}

func (b both) Write(p []byte) (int, error) {
	if b.other != b.Hash {
		b.other.Write(p)
	}
	return b.Hash.Write(p)
}

func (b both) Reset() {
	b.Hash.Reset()
	b.other.Reset()
}
