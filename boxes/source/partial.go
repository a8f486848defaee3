// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// partial is a download that may be incomplete: a directory named after a hash
// of the URL, with the bytes so far in "data" and in "validator" what is needed
// to ask for the rest. It is locked against other processes as long as it is
// open.
type partial struct {
	dir  string
	lock *os.File
}

// validator identifies the version of a file that a server sent (RFC 9110,
// section 8.8).
type validator struct {
	ETag         string `json:"etag,omitempty"`
	LastModified string `json:"lastModified,omitempty"`
	Total        int64  `json:"total"` // size of the whole file; -1 if unknown
}

// openPartial opens the partial download of u below cache, and makes it if there
// is none. It waits for another process that has it.
func openPartial(ctx context.Context, cache string, u *url.URL) (*partial, error) {
	sum := sha256.Sum256([]byte(u.String()))
	p := &partial{dir: filepath.Join(cache, fmt.Sprintf("%x.part", sum[:16]))}
	for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		ok, err := p.tryLock()
		if ok || err != nil {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for another process that downloads the same: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// tryLock locks the directory. It is not ours if it was removed in between: who
// did so has completed the download.
func (p *partial) tryLock() (bool, error) {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return false, err
	}
	f, err := os.Open(p.dir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		opened, err1 := f.Stat()
		there, err2 := os.Stat(p.dir)
		if err1 == nil && err2 == nil && os.SameFile(opened, there) {
			p.lock = f
			return true, nil
		}
	}
	f.Close()
	if err != nil && err != unix.EWOULDBLOCK && err != unix.EINTR {
		return false, fmt.Errorf("locking %s: %w", p.dir, err)
	}
	return false, nil
}

func (p *partial) data() string      { return filepath.Join(p.dir, "data") }
func (p *partial) validator() string { return filepath.Join(p.dir, "validator") }

func (p *partial) close() {
	// A download of which nothing came leaves nothing.
	if fi, err := os.Stat(p.data()); err != nil || fi.Size() == 0 {
		p.remove()
	}
	p.lock.Close()
}

func (p *partial) remove() { os.RemoveAll(p.dir) }

// open opens the data and tells how much there is that can be completed.
// A file that nobody may write to is one that the store took over: whoever moved it
// there died before it could remove this name of it. It must not be written to.
func (p *partial) open() (*os.File, int64, validator, error) {
	if fi, err := os.Lstat(p.data()); err == nil && fi.Mode().Perm()&0o200 == 0 {
		if err := os.Remove(p.data()); err != nil {
			return nil, 0, validator{}, err
		}
	}
	f, err := os.OpenFile(p.data(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, validator{}, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, validator{}, err
	}
	var v validator
	raw, err := os.ReadFile(p.validator())
	if err != nil || json.Unmarshal(raw, &v) != nil || v.ifRange() == "" {
		return f, 0, validator{}, nil
	}
	return f, fi.Size(), v, nil
}

// restart forgets what was downloaded; v is the validator of what comes next.
func (p *partial) restart(f *os.File, v validator) error {
	// In this order: bytes of one version never stand beside the validator of
	// another.
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := f.Seek(0, 0); err != nil {
		return err
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(p.validator(), raw, 0o600)
}

func validatorOf(h http.Header, total int64) validator {
	return validator{ETag: h.Get("ETag"), LastModified: h.Get("Last-Modified"), Total: total}
}

// ifRange is the value of the If-Range header: with it, a server that has
// another version by now sends that one whole. Weak tags are not allowed there.
func (v validator) ifRange() string {
	if v.ETag != "" && !strings.HasPrefix(v.ETag, "W/") {
		return v.ETag
	}
	return v.LastModified
}

// contradicts reports whether what the server says of a part shows that it
// belongs to another version, whatever it made of If-Range.
func (v validator) contradicts(part validator) bool {
	return (v.ETag != "" && part.ETag != "" && v.ETag != part.ETag) ||
		(v.LastModified != "" && part.LastModified != "" && v.LastModified != part.LastModified) ||
		(v.Total >= 0 && part.Total >= 0 && v.Total != part.Total)
}
