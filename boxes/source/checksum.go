// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/internal/fsutil"
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
	f, err := fsutil.OpenRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
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
	gnuLine = regexp.MustCompile(`^[ \t]*(\\?)([0-9A-Fa-f]{32,128})(?:[ \t]+\*?(.+))?$`)
	bsdLine = regexp.MustCompile(`^[ \t]*(\\?)([A-Za-z0-9/-]+) ?\((.+)\) ?= ?([0-9A-Fa-f]{32,128})$`)
)

// algorithms are those of digest, by the names that programs print before a sum.
var algorithms = map[string]string{
	"SHA256": "sha256", "SHA2-256": "sha256", "SHA512": "sha512", "SHA2-512": "sha512",
}

// How well a line of a file of checksums fits a path.
const (
	fitsNot   = iota
	unnamed   // it names no file
	sameBase  // the file has that name, in another folder
	wholeName // the path ends with the name in the line
)

// findSum looks path up in a file of checksums, as "sha256sum -c" reads them: in the
// style of coreutils ("HEX  name"), of BSD ("SHA256 (name) = HEX") or of OpenSSL
// ("SHA2-256(name)= HEX"). The line that fits path best counts: see the constants. A
// file that holds nothing but one checksum needs no name. Lines that are no checksums,
// such as those of a signature, are passed over.
func findSum(data []byte, path string) (digest.Digest, error) {
	var found digest.Digest
	best, weak := fitsNot, false
	lines := bufio.NewScanner(bytes.NewReader(bytes.TrimPrefix(data, []byte("\ufeff"))))
	lines.Buffer(nil, maxSums)
	for lines.Scan() {
		name, encoded, ok := readSum(strings.TrimRight(lines.Text(), " \t\r"))
		if !ok {
			continue
		}
		fit := fits(path, name)
		if fit == fitsNot {
			continue
		}
		sum, err := ParseChecksum(encoded)
		if err != nil {
			weak = true
			continue
		}
		switch {
		case fit > best:
			found, best = sum, fit
		case fit < best:
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

var escapes = strings.NewReplacer(`\\`, `\`, `\n`, "\n", `\r`, "\r")

// readSum takes a line of a file of checksums apart. A backslash before it says that
// some characters of the name are escaped; "-" is the standard input, and no name.
func readSum(line string) (name, encoded string, ok bool) {
	var escaped bool
	if m := gnuLine.FindStringSubmatch(line); m != nil {
		escaped, encoded, name = m[1] != "", m[2], m[3]
	} else if m := bsdLine.FindStringSubmatch(line); m != nil {
		escaped, name = m[1] != "", m[3]
		// Other algorithms have sums of the same lengths.
		encoded = cmp.Or(algorithms[strings.ToUpper(m[2])], "unknown") + ":" + m[4]
	} else {
		return "", "", false
	}
	if escaped {
		name = escapes.Replace(name)
	}
	if name == "-" {
		name = ""
	}
	return name, encoded, true
}

// fits says how well a name in a file of checksums fits a path.
func fits(path, name string) int {
	switch name := strings.TrimPrefix(name, "./"); {
	case name == "":
		return unnamed
	case path == name || strings.HasSuffix(path, "/"+strings.TrimPrefix(name, "/")):
		return wholeName
	case base(path) == base(name), base(path) == name[strings.LastIndex(name, `\`)+1:]:
		return sameBase
	}
	return fitsNot
}

func base(path string) string { return path[strings.LastIndex(path, "/")+1:] }
