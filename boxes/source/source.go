// SPDX-License-Identifier: Apache-2.0

// Package source says where boxes come from: it finds the box that a Labfile or
// a user refers to, and fetches or builds it if the store has it not yet.
package source

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes"
)

// ErrOffline says that a box can be had only from the network, which the request
// rules out.
var ErrOffline = errors.New("not available offline")

// Progress is told how far a stage has come, in bytes unless the stage's name
// says otherwise; total is 0 if it is unknown.
type Progress func(stage string, done, total int64)

// Builder builds the built-in boxes.
type Builder interface {
	// Build makes the box "builtin/"+name, gives it that name in the store, and
	// returns it. It is called only if the box is not there, or not the one that
	// is wanted.
	Build(ctx context.Context, name string, p Progress) (boxes.Box, error)
}

// Resolver turns references into boxes. Its methods may be called by several
// goroutines at once.
type Resolver struct {
	Store   *boxes.Store
	Builder Builder // may be nil: then only built-in boxes that the store has can be used
	Cache   string  // directory for what is half downloaded; made when needed

	Transport http.RoundTripper // nil for Go's own, which obeys the proxy variables
	MaxBytes  int64             // of a download; 0 means DefaultMaxBytes
	Stall     time.Duration     // without a byte before a download is given up; 0 means DefaultStall

	backoff time.Duration // before the first retry; 0 means a second

	proxy func(*http.Request) (*url.URL, error) // without Transport; nil for that of the environment
}

// Defaults of a Resolver.
const (
	DefaultMaxBytes = 256 << 30
	DefaultStall    = time.Minute
)

// Request says which box is wanted.
type Request struct {
	// Ref is "builtin/NAME", an http, https or file URL, the path of a qcow2 or
	// raw disk or of a Vagrant box with one, the name of a box in the store, or a digest. A path begins with
	// "./", "../", "/" or "~/", or ends like one of a disk (".qcow2").
	Ref string
	// Checksum of the file that Ref names: "sha256:HEX", "sha512:HEX", HEX of
	// either, or "file:" and the URL or path of a file of checksums. Empty if it
	// is not known.
	Checksum string
	// Pin is the digest of the box that the lock file names; empty if there is
	// none. If the store has that box, it is the answer, and nothing is fetched.
	Pin digest.Digest
	// BaseDir is what relative paths are relative to.
	BaseDir string
	// Config describes a disk that comes without metadata; nil for DefaultConfig.
	Config *boxes.Config
	// Name is what to call the box in the store; empty for nothing in particular.
	Name string
	// Offline rules out the network.
	Offline bool
	// Progress may be nil.
	Progress Progress
}

// Result is a box that was found.
type Result struct {
	Box boxes.Box
	// Checksum is that of the file that Ref names, "sha256:HEX" or "sha512:HEX",
	// as it was given or as it was seen; empty for boxes that are no such file.
	// Whoever gave none should write it down.
	Checksum string
	// Fetched says that the box was fetched, built or copied just now.
	Fetched bool
}

// DefaultConfig is what is assumed of a disk that comes without metadata: it is
// for this host's processor, and reads a NoCloud seed if it is given one.
func DefaultConfig() boxes.Config {
	return boxes.Config{Architecture: runtime.GOARCH, CloudInit: true}
}

// Resolve returns the box that req names. An error wraps boxes.ErrNotFound,
// boxes.ErrDigest, boxes.ErrUnsafe or ErrOffline where one of them is the reason,
// and has a method Hint() string where there is a next step. No message holds a
// password or the query of a URL.
func (r *Resolver) Resolve(ctx context.Context, req Request) (Result, error) {
	if req.Progress == nil {
		req.Progress = func(string, int64, int64) {}
	}
	if req.Name != "" {
		if err := boxes.ValidName(req.Name); err != nil {
			return Result{}, err
		}
	}
	res, err := r.resolve(ctx, req)
	if err != nil {
		return Result{}, fmt.Errorf("resolving box %q: %w", Redact(req.Ref), pinHint(err, req))
	}
	if req.Name != "" {
		if err := r.Store.Tag(ctx, res.Box.Digest.String(), req.Name); err != nil {
			return Result{}, fmt.Errorf("resolving box %q: %w", Redact(req.Ref), err)
		}
	}
	return res, nil
}

func (r *Resolver) resolve(ctx context.Context, req Request) (Result, error) {
	ref, err := parse(req.Ref, req.BaseDir)
	if err != nil {
		return Result{}, err
	}
	if req.Pin != "" {
		box, err := r.Store.Get(ctx, req.Pin.String())
		if err == nil {
			return pinned(ref, req, box)
		}
		// Fetching a damaged box heals it.
		if !errors.Is(err, boxes.ErrNotFound) && !errors.Is(err, boxes.ErrDigest) {
			return Result{}, err
		}
	}
	switch ref.kind {
	case kindBuiltin:
		return r.builtin(ctx, ref, req)
	case kindPath:
		return r.local(ctx, ref, req)
	case kindURL:
		return r.web(ctx, ref, req)
	}
	return r.stored(ctx, ref, req)
}

// pinned is the result for a box that the store has by its pin. A checksum that
// contradicts the pin is not passed over.
func pinned(ref reference, req Request, box boxes.Box) (Result, error) {
	res := Result{Box: box}
	if ref.kind != kindPath && ref.kind != kindURL {
		return res, nil
	}
	res.Checksum = sourceOf(box).String()
	if req.Checksum == "" || strings.HasPrefix(req.Checksum, sumsPrefix) {
		return res, nil
	}
	sum, err := ParseChecksum(req.Checksum)
	if err != nil {
		return Result{}, err
	}
	if sum.Algorithm() == digest.SHA256 && sum != sourceOf(box) {
		return Result{}, &boxes.DigestError{What: "checksum", Got: sourceOf(box), Want: sum}
	}
	res.Checksum = sum.String()
	return res, nil
}

// hinted is an error that comes with a next step.
type hinted struct {
	error
	hint string
}

func (h hinted) Unwrap() error { return h.error }

// Hint is the next step for the user.
func (h hinted) Hint() string { return h.hint }

func withHint(hint, format string, args ...any) error {
	return hinted{fmt.Errorf(format, args...), hint}
}

// pinHint adds to an error about digests what to do about it.
func pinHint(err error, req Request) error {
	var wrong *boxes.DigestError
	if !errors.As(err, &wrong) {
		return err
	}
	switch {
	case req.Pin != "" && wrong.What == "box":
		return hinted{err, "the lock file pins another box; if the change is welcome, accept it: lab lock --update"}
	case req.Pin != "":
		// The checksum may be that of the Labfile or that of the lock file.
		return hinted{err, "the file is not the one that was pinned; if the change is welcome, correct the checksum in the Labfile, if it has one, and accept it: lab lock --update"}
	}
	return hinted{err, "compare the checksum with the one that the image's publisher names"}
}

// kind is the kind of a reference.
type kind int

const (
	kindStored kind = iota
	kindBuiltin
	kindPath
	kindURL
)

// reference is a reference taken apart.
type reference struct {
	kind kind
	name string   // of a box in the store, or a digest; of a built-in box, without "builtin/"
	path string   // absolute
	url  *url.URL // http or https, with a host
}

const builtinPrefix = "builtin/"

var (
	schemeSyntax = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9+.-]*)://`)
	forcedSyntax = regexp.MustCompile(`^[A-Za-z0-9]+::`)
	// What a path may end with that has no "./" before it.
	diskSuffixes = []string{".qcow2", ".qcow", ".img", ".raw", ".vmdk", ".vdi", ".vhd", ".vhdx", ".iso", ".box", ".gz", ".xz", ".zst", ".zip"}
)

// parse tells the kinds of references apart by their form alone: what a
// reference means must not depend on which files there are.
func parse(ref, baseDir string) (reference, error) {
	if ref == "" {
		return reference{}, errors.New("the reference is empty")
	}
	if m := schemeSyntax.FindStringSubmatch(ref); m != nil {
		u, err := url.Parse(ref)
		if err != nil {
			return reference{}, errors.New("the URL is malformed") // err would quote it, password and all
		}
		switch scheme := strings.ToLower(m[1]); scheme {
		case "http", "https":
			if u.Host == "" {
				return reference{}, errors.New("the URL names no host")
			}
			u.Fragment, u.RawFragment = "", ""
			return reference{kind: kindURL, url: u}, nil
		case "file":
			if (u.Host != "" && u.Host != "localhost") || !filepath.IsAbs(u.Path) {
				return reference{}, withHint("write file:///path/to/disk.qcow2", "a file URL must name an absolute path on this host")
			}
			return reference{kind: kindPath, path: filepath.Clean(u.Path)}, nil
		default:
			return reference{}, withHint("use http, https or file, or download the image yourself", "%q URLs are not supported", scheme)
		}
	}
	if forcedSyntax.MatchString(ref) {
		return reference{}, withHint("use a plain http or https URL", "references of the form \"git::…\" are not supported")
	}
	if name, ok := strings.CutPrefix(ref, builtinPrefix); ok {
		return reference{kind: kindBuiltin, name: name}, nil
	}
	if isPath(ref) {
		path, err := absolute(ref, baseDir)
		return reference{kind: kindPath, path: path}, err
	}
	return reference{kind: kindStored, name: ref}, nil
}

func isPath(ref string) bool {
	for _, prefix := range []string{"/", "./", "../", "~/"} {
		if strings.HasPrefix(ref, prefix) {
			return true
		}
	}
	return slices.Contains(diskSuffixes, strings.ToLower(filepath.Ext(ref)))
}

// Redact returns ref without what must not be shown: the user and password of a
// URL, and its query, which may hold a token.
func Redact(ref string) string {
	if !schemeSyntax.MatchString(ref) {
		return ref
	}
	u, err := url.Parse(ref)
	if err != nil {
		return ref[:strings.Index(ref, "://")] + "://…"
	}
	return redact(u)
}

func redact(u *url.URL) string {
	c := *u
	c.User, c.RawQuery, c.ForceQuery, c.Fragment, c.RawFragment = nil, "", false, "", ""
	s := c.String()
	if u.RawQuery != "" {
		s += "?…"
	}
	return s
}
