// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	sumsPrefix = "file:"
	// maxSums bounds a file of checksums, in bytes.
	maxSums = 4 << 20

	checksumHint = "give it as sha256:HEX, sha512:HEX, or file:URL of a SHA256SUMS file"
)

// ParseChecksum reads a checksum that stands for itself: "sha256:HEX",
// "sha512:HEX", or HEX of either, in any case.
func ParseChecksum(s string) (digest.Digest, error) {
	algorithm, encoded, ok := strings.Cut(strings.ToLower(strings.TrimSpace(s)), ":")
	if !ok {
		algorithm, encoded = "", algorithm
	}
	if raw, err := hex.DecodeString(encoded); err == nil {
		switch {
		case len(raw) == 32 && (algorithm == "" || algorithm == "sha256"):
			return digest.NewDigestFromEncoded(digest.SHA256, encoded), nil
		case len(raw) == 64 && (algorithm == "" || algorithm == "sha512"):
			return digest.NewDigestFromEncoded(digest.SHA512, encoded), nil
		}
	}
	switch algorithm {
	case "md5", "sha1":
		return "", withHint(checksumHint, "the checksum uses %s, which can be forged", algorithm)
	}
	return "", withHint(checksumHint, "%.150q is not a sha256 or sha512 checksum", s)
}

// checksum returns the checksum that the request gives for the file at path, a
// path or the path of a URL; empty if it gives none.
func (r *Resolver) checksum(ctx context.Context, req Request, path string) (digest.Digest, error) {
	if req.Checksum == "" {
		return "", nil
	}
	where, ok := strings.CutPrefix(req.Checksum, sumsPrefix)
	if !ok {
		return ParseChecksum(req.Checksum)
	}
	data, err := r.sums(ctx, req, where)
	if err != nil {
		return "", fmt.Errorf("reading checksums from %s: %w", Redact(where), err)
	}
	sum, err := findSum(data, path)
	if err != nil {
		return "", fmt.Errorf("reading checksums from %s: %w", Redact(where), err)
	}
	return sum, nil
}

// sums reads a file of checksums: where is a URL or a path, or what is left of a
// file URL.
func (r *Resolver) sums(ctx context.Context, req Request, where string) ([]byte, error) {
	if strings.HasPrefix(where, "//") {
		where = sumsPrefix + where
	}
	if schemeSyntax.MatchString(where) {
		ref, err := parse(where, req.BaseDir)
		if err != nil {
			return nil, err
		}
		if ref.kind == kindURL {
			if req.Offline {
				return nil, ErrOffline
			}
			return r.fetchSmall(ctx, ref.url, maxSums)
		}
		where = ref.path
	}
	path, err := absolute(where, req.BaseDir)
	if err != nil {
		return nil, err
	}
	// A pipe would be waited for, and nothing could end that.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("it is not a regular file"))
	}
	return readSmall(f, maxSums)
}

func readSmall(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("it is larger than %d bytes", limit)
	}
	return data, err
}

var (
	gnuLine = regexp.MustCompile(`^([0-9A-Fa-f]{32,128})(?: [ *](.+))?$`)
	bsdLine = regexp.MustCompile(`^[A-Za-z0-9-]+ \((.+)\) ?= ?([0-9A-Fa-f]{32,128})$`)
)

// findSum looks path up in a file of checksums, in the styles of coreutils
// ("HEX  name") and of BSD ("SHA256 (name) = HEX"). A name in the file means path
// if path ends with it, whole components compared. A file that holds nothing but
// one checksum needs no name. Lines that are neither, such as those of a
// signature, are passed over.
func findSum(data []byte, path string) (digest.Digest, error) {
	var found digest.Digest
	var named, weak bool
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, maxSums)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), " \t\r")
		var name, encoded string
		if m := gnuLine.FindStringSubmatch(line); m != nil {
			encoded, name = m[1], m[2]
		} else if m := bsdLine.FindStringSubmatch(line); m != nil {
			name, encoded = m[1], m[2]
		} else {
			continue
		}
		if name != "" && !endsWith(path, name) {
			continue
		}
		sum, err := ParseChecksum(encoded)
		if err != nil {
			weak = true
			continue
		}
		switch {
		case found == "" || (name != "" && !named):
			found, named = sum, name != ""
		case name == "" && named:
		case sum.Algorithm() != found.Algorithm():
			// Both will do; sha256 is what the store computes anyway.
			if sum.Algorithm() == digest.SHA256 {
				found = sum
			}
		case sum != found:
			return "", fmt.Errorf("it has several checksums that may be meant for %q", base(path))
		}
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	if found == "" && weak {
		return "", withHint(checksumHint, "it has no sha256 or sha512 checksum for %q", base(path))
	}
	if found == "" {
		return "", withHint(checksumHint, "it has no checksum for %q", base(path))
	}
	return found, nil
}

func base(path string) string { return path[strings.LastIndex(path, "/")+1:] }

// endsWith reports whether the last components of path are name.
func endsWith(path, name string) bool {
	name = strings.TrimPrefix(name, "./")
	return path == name || strings.HasSuffix(path, "/"+strings.TrimPrefix(name, "/"))
}
